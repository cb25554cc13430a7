"""Certificates of washes for tests: records, good and bad, and simulated documents made for them."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gpu_server.sealed import canonical
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm
from gpu_server.sealed.wash import (
    NO_CERTIFICATE,
    STEPS,
    Record,
    Step,
    Verified,
    encode_record,
    hash_of,
    verify_certificate,
)
from tests.sealed.documents import NOW, PCRS, PUBLIC_KEY, software_nsm

NODE = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
OTHER_NODE = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
NODE_KEY = NODE.public_key().public_bytes_raw()
GPU = "GPU-5c0f3a4e-6f1e-4a0d-9b5e-0f2d6f1c7a10"
MADE = int(NOW.timestamp() * 1000)
OLDER = sha256(b"the newest record of another slot").digest()
NOBODY = {"lease": b"", "teardown": "not_applicable"}
"""What a wash without a lease has."""
STAND_IN = {
    "slot_id": "cpu0",
    "slot_uuid": "CPU-0123-0",
    "scrub": "not_applicable",
    "gates": "not_applicable",
}
"""What a slot without a GPU has."""
ALONE = {"enclave": "not_applicable"}
"""What a node without an enclave has."""

MODULE = software_nsm()


def steps(made: int = MADE, **results: str) -> tuple[Step, ...]:
    """All five, with a figure of each kind."""
    return tuple(
        Step(
            name=name,
            result=results.get(name, "passed"),
            started_ms=made - 20 + 2 * place,
            ended_ms=made - 10 + 2 * place,
            figures={"bytes_seen": 1 << 40, "device": "NVIDIA L40S", "digest": b"\1\2"},
        )
        for place, name in enumerate(STEPS)
    )


def record(key: Ed25519PrivateKey = NODE, **changes: Any) -> Record:
    """A full wash of a GPU behind a lease; changes to its fields, and to results by the name of a step."""
    results = {name: changes.pop(name) for name in STEPS if name in changes}
    plain: dict[str, Any] = {
        "node_key": key.public_key().public_bytes_raw(),
        "slot_id": "0",
        "slot_uuid": GPU,
        "fence": 7,
        "prev": NO_CERTIFICATE,
        "made_ms": MADE,
        "tier": "full",
        "lease": b"m" * 32,
    }
    fields = {**plain, **changes}
    return Record(**{"steps": steps(fields["made_ms"], **results), **fields})


def document(h: bytes, module: SoftwareNsm = MODULE, **changes: Any) -> bytes:
    """A document for h, of an enclave that was started with h and the record of another slot."""
    fields = {"nonce": h, "public_key": PUBLIC_KEY, "user_data": listing(OLDER, h), **changes}
    return Nsm(module.process).attestation(**fields)


def listing(*hashes: bytes) -> bytes:
    """The user data of an enclave that was started with these records."""
    return canonical.encode(["gpu-server/1", list(hashes)])


def sign(raw: bytes, paper: bytes, key: Ed25519PrivateKey = NODE) -> bytes:
    """A certificate over anything, as a node would sign it that checks nothing."""
    return canonical.encode([raw, paper, key.sign(hash_of(raw) + sha256(paper).digest())])


def washed(key: Ed25519PrivateKey = NODE, **changes: Any) -> bytes:
    """A certificate of such a record, with its document where it has one."""
    raw = encode_record(record(key, **changes))
    with_document = changes.get("enclave", "passed") == "passed"
    return sign(raw, document(hash_of(raw)) if with_document else b"", key)


def chain(count: int, **changes: Any) -> list[bytes]:
    """Certificates of one slot that follow each other, oldest first."""
    found: list[bytes] = []
    for place in range(count):
        prev = hash_of(found[-1]) if found else NO_CERTIFICATE
        found.append(washed(**{"prev": prev, "fence": place, "made_ms": MADE + 10 * place, **changes}))
    return found


def verified(raw: bytes, **options: Any) -> Verified:
    """Verify as a client who knows node and program, and accepts simulations."""
    wanted: dict[str, Any] = {"node_key": NODE_KEY, "pcrs": PCRS, "allow_simulated": True}
    return verify_certificate(raw, **{**wanted, **options})


def record_hash(raw: bytes) -> bytes:
    """h of a certificate, unverified."""
    inner = canonical.decode(raw)[0]
    assert isinstance(inner, bytes)
    return hash_of(inner)
