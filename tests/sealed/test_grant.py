"""Bindings and grants: another name, enclave or key, and nothing opens."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from os import urandom
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gpu_server.sealed.canonical import encode
from gpu_server.sealed.errors import CannotOpen, Malformed, SealedError
from gpu_server.sealed.grant import GRANT_BYTES, Binding, WorkerKey, open_grant, seal_grant
from tests.sealed.exchange import ARN, binding

DATA_KEY = b"k" * 32

OTHER: dict[str, Any] = {
    "tenant": "acmf",
    "pool": "chat2",
    "kms_key_arn": ARN.replace("eu-central-1", "eu-west-1"),
    "session_id": "sess_01JD40",
    "epoch": b"another enclave.",
    "worker_key": WorkerKey.generate().public,
    "wrapped_key": b"another data key",
}


def test_the_key_schedule() -> None:
    """g, the psk and its id are what the protocol says, computed here from the parts."""
    bound = binding()
    g = encode(
        [
            *("gpu-server/1", "grant", "acme", "chat", ARN, "sess_01JD3Z"),
            *(bound.epoch, bound.worker_key, sha256(bound.wrapped_key).digest()),
        ]
    )
    assert bound.info == g
    assert bound.psk_id == sha256(g).digest()
    derived = HKDF(algorithm=SHA256(), length=32, salt=bytes(32), info=g).derive(DATA_KEY)
    assert bound.psk(DATA_KEY) == derived


def test_the_worker_gets_the_psk() -> None:
    """What the enclave seals, the session's worker opens: 80 bytes, other ones each time."""
    key = WorkerKey.generate()
    bound = binding(worker_key=key.public)
    grants = {seal_grant(bound, DATA_KEY) for _ in range(3)}
    assert len(grants) == 3
    for grant in grants:
        assert len(grant) == GRANT_BYTES == 80
        assert open_grant(bound, grant, key) == bound.psk(DATA_KEY)


@pytest.mark.parametrize("name", OTHER)
def test_every_part_of_the_binding_counts(name: str) -> None:
    """Another name, enclave, worker or wrapped key gives another psk and id, and nothing opens."""
    key = WorkerKey.generate()
    bound = binding(worker_key=key.public)
    changed = replace(bound, **{name: OTHER[name]})
    assert changed.psk_id != bound.psk_id
    assert changed.psk(DATA_KEY) != bound.psk(DATA_KEY)
    with pytest.raises(CannotOpen):
        open_grant(changed, seal_grant(bound, DATA_KEY), key)
    with pytest.raises(CannotOpen):
        open_grant(bound, seal_grant(changed, DATA_KEY), key)


def test_names_do_not_run_into_each_other() -> None:
    """A character that moves from one name to the next makes another binding."""
    assert binding(tenant="ab", pool="c").info != binding(tenant="a", pool="bc").info


def test_another_worker_opens_nothing() -> None:
    """A worker whose key is not the binding's opens no grant, whoever says so."""
    bound = binding(worker_key=WorkerKey.generate().public)
    mixed_up = WorkerKey.generate()
    grant = seal_grant(bound, DATA_KEY)
    for seen in (bound, replace(bound, worker_key=mixed_up.public)):
        with pytest.raises(CannotOpen):
            open_grant(seen, grant, mixed_up)


def test_another_data_key_is_another_psk() -> None:
    """The psk depends on the data key: a forged KMS answer gives one that the client does not have."""
    assert binding().psk(DATA_KEY) != binding().psk(urandom(32))


def test_every_byte_of_a_grant_counts() -> None:
    """A grant with any byte changed, cut or added does not open."""
    key = WorkerKey.generate()
    bound = binding(worker_key=key.public)
    grant = seal_grant(bound, DATA_KEY)
    changed = [grant[:at] + bytes([grant[at] ^ 1]) + grant[at + 1 :] for at in range(len(grant))]
    for bad in (*changed, grant[:-1], grant + b"\0", b"", bytes(80)):
        with pytest.raises(CannotOpen):
            open_grant(bound, bad, key)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant", ""),
        ("tenant", "a b"),
        ("pool", "x" * 129),
        ("session_id", "a\n"),
        ("kms_key_arn", "alias/chat"),
        ("epoch", bytes(15)),
        ("worker_key", bytes(31)),
        ("wrapped_key", b""),
        ("wrapped_key", bytes(6145)),
    ],
)
def test_a_binding_checks_itself(name: str, value: Any) -> None:
    """A value that cannot be one is refused when the binding is made."""
    with pytest.raises(Malformed):
        binding(**{name: value})


@pytest.mark.parametrize("data_key", [b"", bytes(31), bytes(33)])
def test_a_data_key_has_32_bytes(data_key: bytes) -> None:
    """A data key of another length is refused by client and enclave alike."""
    with pytest.raises(Malformed):
        binding().psk(data_key)
    with pytest.raises(Malformed):
        seal_grant(binding(), data_key)


def test_a_worker_key_of_low_order_gets_no_grant() -> None:
    """A key that anybody could compute the secret of is not sealed to."""
    with pytest.raises(Malformed):
        seal_grant(binding(worker_key=bytes(32)), DATA_KEY)


def test_errors_quote_nothing() -> None:
    """No error shows a data key, a psk or a grant."""
    key = WorkerKey.generate()
    bound: Binding = binding(worker_key=key.public)
    grant = seal_grant(bound, DATA_KEY)
    with pytest.raises(SealedError) as refused:
        open_grant(replace(bound, tenant="other"), grant, key)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__
    assert DATA_KEY.hex() not in str(refused.value)
