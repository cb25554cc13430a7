"""HPKE: the RFC's own vectors, and the traps of the library below."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from gpu_server.sealed.errors import CannotOpen, Malformed
from gpu_server.sealed.hpke import (
    Recipient,
    Sender,
    WorkerKey,
    base_recipient,
    base_sender,
    psk_recipient,
    psk_sender,
)

VECTORS = json.loads((Path(__file__).parent / "rfc9180.json").read_text())["vectors"]
PSK, PSK_ID = b"p" * 32, b"an id"

# Public keys that make every shared secret zero: RFC 7748, section 6.1 asks to refuse that.
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def ends(vector: dict[str, Any]) -> tuple[Sender, Recipient]:
    raw = {name: bytes.fromhex(text) for name, text in vector.items() if isinstance(text, str)}
    key = WorkerKey(X25519PrivateKey.from_private_bytes(raw["skRm"]))
    ephemeral = X25519PrivateKey.from_private_bytes(raw["skEm"])
    assert key.public == raw["pkRm"]
    if vector["mode"] == 0:
        sender = base_sender(key.public, raw["info"], ephemeral=ephemeral)
        recipient = base_recipient(raw["enc"], key, raw["info"])
    else:
        sender = psk_sender(key.public, raw["info"], raw["psk"], raw["psk_id"], ephemeral=ephemeral)
        recipient = psk_recipient(raw["enc"], key, raw["info"], raw["psk"], raw["psk_id"])
    assert sender.enc == raw["enc"]
    return sender, recipient


@pytest.mark.parametrize("vector", VECTORS, ids=["base", "psk"])
def test_rfc_9180(vector: dict[str, Any]) -> None:
    """Both modes seal, open and export as the vectors of RFC 9180 say, up to sequence number 256."""
    sender, recipient = ends(vector)
    expected = {item["seq"]: item for item in vector["encryptions"]}
    for seq in range(max(expected) + 1):
        plaintext = bytes.fromhex(expected[0]["pt"])
        aad = b"Count-%d" % seq
        ciphertext = sender.seal(plaintext, aad)
        if seq in expected:
            assert aad.hex() == expected[seq]["aad"]
            assert ciphertext.hex() == expected[seq]["ct"]
        assert recipient.open(ciphertext, aad) == plaintext
    for item in vector["exports"]:
        label = bytes.fromhex(item["exporter_context"])
        assert sender.export(label, item["L"]).hex() == item["exported_value"]
        assert recipient.export(label, item["L"]).hex() == item["exported_value"]


@pytest.mark.parametrize(
    ("psk", "psk_id"),
    [(b"", PSK_ID), (PSK, b""), (b"", b""), (PSK[:-1], PSK_ID), (PSK + b"p", PSK_ID)],
    ids=["no psk", "no id", "neither", "short", "long"],
)
def test_a_psk_is_required_at_both_ends(psk: bytes, psk_id: bytes) -> None:
    """PSK mode is never silently base mode: without 32 bytes and an id neither end begins."""
    key = WorkerKey.generate()
    enc = psk_sender(key.public, b"", PSK, PSK_ID).enc
    with pytest.raises(Malformed):
        psk_sender(key.public, b"", psk, psk_id)
    with pytest.raises(Malformed):
        psk_recipient(enc, key, b"", psk, psk_id)


@pytest.mark.parametrize("bad", [*LOW_ORDER, b"", bytes(31), bytes(33)], ids=lambda bad: bad.hex()[:8])
def test_bad_public_keys(bad: bytes) -> None:
    """A key of low order or of another length is an error of this package, at both ends and in both modes."""
    key = WorkerKey.generate()
    with pytest.raises(Malformed):
        base_sender(bad, b"")
    with pytest.raises(Malformed):
        psk_sender(bad, b"", PSK, PSK_ID)
    with pytest.raises(CannotOpen):
        base_recipient(bad, key, b"")
    with pytest.raises(CannotOpen):
        psk_recipient(bad, key, b"", PSK, PSK_ID)


OTHERS: dict[str, Callable[[WorkerKey, bytes], Recipient]] = {
    "key": lambda _, enc: psk_recipient(enc, WorkerKey.generate(), b"info", PSK, PSK_ID),
    "info": lambda key, enc: psk_recipient(enc, key, b"other", PSK, PSK_ID),
    "psk": lambda key, enc: psk_recipient(enc, key, b"info", b"q" * 32, PSK_ID),
    "psk id": lambda key, enc: psk_recipient(enc, key, b"info", PSK, b"another id"),
    "mode": lambda key, enc: base_recipient(enc, key, b"info"),
    "enc": lambda key, _: psk_recipient(WorkerKey.generate().public, key, b"info", PSK, PSK_ID),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_another_context_opens_nothing(other: Callable[[WorkerKey, bytes], Recipient]) -> None:
    """With any other key, info, psk, id, mode or enc, nothing opens."""
    key = WorkerKey.generate()
    sender = psk_sender(key.public, b"info", PSK, PSK_ID)
    with pytest.raises(CannotOpen):
        other(key, sender.enc).open(sender.seal(b"plain", b""), b"")


def test_associated_data_is_bound() -> None:
    """A message does not open with other associated data, nor after the one behind it."""
    key = WorkerKey.generate()
    for aad, first in ((b"other", 0), (b"aad", 1)):
        sender = base_sender(key.public, b"")
        messages = [sender.seal(b"one", b"aad"), sender.seal(b"two", b"aad")]
        with pytest.raises(CannotOpen):
            base_recipient(sender.enc, key, b"").open(messages[first], aad)


def test_a_key_is_not_shown() -> None:
    """A worker's key shows its public half only, and cannot be copied or pickled away."""
    private = X25519PrivateKey.generate()
    key = WorkerKey(private)
    secret = private.private_bytes_raw()
    assert key.public == private.public_key().public_bytes_raw()
    assert secret.hex() not in repr(key)
    assert repr(secret) not in repr(key)
    for away in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            away(key)


def test_keys_are_fresh() -> None:
    """No two workers, and no two messages, have the same key."""
    key = WorkerKey.generate()
    assert key.public != WorkerKey.generate().public
    assert base_sender(key.public, b"").enc != base_sender(key.public, b"").enc
