"""The published vectors of certificates: each is accepted, or refused for the reason that stands there."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gpu_server.sealed.canonical import decode
from gpu_server.sealed.wash import (
    Chain,
    Verified,
    WashRefused,
    encode_record,
    issue,
    verify_certificate,
    verify_chain,
)

FOLDER = Path(__file__).resolve().parents[2] / "docs/sealed-vectors"
VECTORS = json.loads((FOLDER / "certificates.json").read_text())
RAW = bytes.fromhex
WANTED: dict[str, Any] = {
    "node_key": RAW(VECTORS["node_key"]),
    "pcrs": {int(index): RAW(data) for index, data in VECTORS["pcrs"].items()},
    "roots": [RAW(VECTORS["root_sha256"])],
}


def verified(vector: dict[str, str]) -> Verified:
    return verify_certificate(RAW(vector["certificate"]), **WANTED)


def linked(vector: dict[str, Any]) -> Chain:
    raws = [RAW(VECTORS["pool"][place]["certificate"]) for place in vector["certificates"]]
    return verify_chain(raws, head=RAW(vector["head"]) if vector["head"] else None, **WANTED)


@pytest.mark.parametrize(
    "vector", VECTORS["good"] + VECTORS["pool"][:4], ids=lambda vector: vector["hash"][:8]
)
def test_good(vector: dict[str, str]) -> None:
    """Every certificate holds, what is computed on the way is what stands beside it, and the node's key makes
    the same bytes again."""
    found = verified(vector)
    assert found.hash.hex() == vector["hash"]
    assert found.record_hash.hex() == vector["record_hash"]
    assert encode_record(found.record).hex() == vector["record"]
    record, document, signature = decode(RAW(vector["certificate"]))
    assert isinstance(document, bytes)
    assert sha256(document).hexdigest() == vector["document_sha256"]
    assert signature == RAW(vector["signature"])
    key = Ed25519PrivateKey.from_private_bytes(RAW(VECTORS["node_private_key"]))
    assert issue(RAW(vector["record"]), document, key).hex() == vector["certificate"]
    assert record == RAW(vector["record"])


def test_the_example_of_the_page() -> None:
    """The certificate that docs/certificates.md takes apart is one of these, byte for byte."""
    page = (FOLDER.parent / "certificates.md").read_text()
    block = page.split("### An example")[1].split("```")[1]
    shown, _, hashes = block.strip().partition("\n\n")
    vector = VECTORS["good"][1]
    assert "".join(line.split()[0] for line in shown.splitlines()) == vector["certificate"]
    assert hashes.split() == ["h", "=", vector["record_hash"], "hash", "=", vector["hash"]]


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["name"])
def test_refused(vector: dict[str, str]) -> None:
    """Every other certificate is refused, for the reason that stands beside it."""
    with pytest.raises(WashRefused) as caught:
        verified(vector)
    assert caught.value.reason == vector["reason"]


def test_reasons_are_all_there() -> None:
    """There is a vector for each reason that there is."""
    both = {vector["reason"] for vector in VECTORS["refused"] + VECTORS["refused_chains"]}
    alone = {"malformed", "node_key", "signature", "steps", "document", "nonce", "unlisted"}
    assert both == alone | {"slot", "order", "head"}
    assert {vector["reason"] for vector in VECTORS["refused"]} == alone


def test_the_chain() -> None:
    """The chain holds up to its head."""
    assert linked(VECTORS["chain"]).head_checked


@pytest.mark.parametrize("vector", VECTORS["refused_chains"], ids=lambda vector: vector["name"])
def test_refused_chains(vector: dict[str, Any]) -> None:
    """Every other chain is refused, for the reason that stands beside it."""
    with pytest.raises(WashRefused) as caught:
        linked(vector)
    assert caught.value.reason == vector["reason"]
