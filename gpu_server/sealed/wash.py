"""Certificates of washes: a record, signed by the node and attested by the enclave that was born after it.

`certificate = C([record, document, signature])`: the node's Ed25519 signature over `h || SHA-256(document)`,
where `h` is SHA-256 of the record, and `document` is empty on a node without an enclave. docs/certificates.md
says what that proves and what not.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from gpu_server.sealed.attestation import AWS_ROOT_SHA256, MAX_DOCUMENT_BYTES, Attestation, verify
from gpu_server.sealed.canonical import decode, encode
from gpu_server.sealed.errors import AttestationRefused, Malformed, SealedError
from gpu_server.sealed.wash_record import (
    MAX_RECORD_BYTES,
    NO_CERTIFICATE,
    STEPS,
    Figures,
    Record,
    Step,
    encode_record,
    hash_of,
    read_record,
)

__all__ = [
    "NO_CERTIFICATE",
    "STEPS",
    "Chain",
    "Figures",
    "Record",
    "Step",
    "Verified",
    "WashRefused",
    "encode_record",
    "hash_of",
    "issue",
    "read_record",
    "slot_of",
    "verify_certificate",
    "verify_chain",
    "view",
]

SIGNATURE_BYTES: Final = 64
MAX_CERTIFICATE_BYTES: Final = 1 + 3 + MAX_RECORD_BYTES + 3 + MAX_DOCUMENT_BYTES + 2 + SIGNATURE_BYTES
"""A head of one byte, and three strings with theirs."""
NO_GPU: Final = "CPU-"
"""How the uuid of a slot without a GPU begins: only there are scrub and gates not applicable."""

_LOW_ORDER: Final = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    )
)
"""The points of low order on Edwards25519, in all their encodings but for the bit of the sign. Under such a
key one signature fits many messages, and everybody can make it."""

_CLEAN: Final[Mapping[str, frozenset[str]]] = {
    "teardown": frozenset({"passed", "not_applicable"}),
    "residue": frozenset({"passed"}),
    "scrub": frozenset({"passed", "not_applicable", "skipped"}),
    "enclave": frozenset({"passed", "not_applicable"}),
    "gates": frozenset({"passed", "not_applicable"}),
}

Presence = Literal["required", "absent", "any"]


class WashRefused(SealedError):
    """A certificate, or a chain of them, that is not accepted.

    `reason` is a short stable code: malformed, node_key, signature, steps, document, nonce or unlisted; of a
    chain also slot, order or head. `index` is the place of the certificate in its chain, from 0; `document`
    is the reason for which `attestation.verify` refused its document, where it did.
    """

    def __init__(self, reason: str, message: str, *, index: int = 0, document: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.index = index
        self.document = document


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A certificate that was verified. `attestation` is None where it has no document."""

    raw: bytes = field(repr=False)
    hash: bytes
    """What the next certificate's `prev` is."""
    record: Record
    record_hash: bytes
    """h: what the enclave lists, and what a session is told."""
    attestation: Attestation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Certificates of one slot that follow each other, oldest first.

    Without `head_checked` nobody knows whether newer ones were left out.
    """

    certificates: tuple[Verified, ...]
    head_checked: bool

    @property
    def from_first(self) -> bool:
        """Whether it begins with the slot's first certificate."""
        return self.certificates[0].record.prev == NO_CERTIFICATE

    def up_to(self, heads: Collection[bytes]) -> Chain:
        """The same chain with its tail checked: its last record's hash is one of `heads`, the newest that are
        known, such as those in a client's own attestation document. Raises `WashRefused` (head)."""
        if self.certificates[-1].record_hash not in heads:
            raise WashRefused(
                "head", "the last record is not the newest one", index=len(self.certificates) - 1
            )
        return replace(self, head_checked=True)


class _Parts(NamedTuple):
    record: bytes
    document: bytes
    signature: bytes


def issue(record: bytes, document: bytes | None, key: Ed25519PrivateKey) -> bytes:
    """Sign a record and the document that was made for it, which is not verified here.

    Raises `Malformed`, and `WashRefused` (node_key, steps, document) for what no verifier would accept.
    """
    read = read_record(record)
    if read.node_key != key.public_key().public_bytes_raw():
        raise WashRefused("node_key", "the record names another node's key")
    _check_steps(read)
    _check_presence(read, document or b"", "any")
    if len(document or b"") > MAX_DOCUMENT_BYTES:
        raise Malformed(f"a document has at most {MAX_DOCUMENT_BYTES} bytes")
    return encode([record, document or b"", key.sign(_signed(record, document or b""))])


def verify_certificate(
    raw: bytes,
    *,
    node_key: bytes | None,
    enclave: Presence = "any",
    pcrs: Mapping[int, bytes] | None = None,
    roots: Collection[bytes] = (AWS_ROOT_SHA256,),
    allow_simulated: bool = False,
) -> Verified:
    """Verify one certificate. Its document is judged at its own time, which may be long ago.

    `node_key` is the Ed25519 public key that must have signed; with None the record's own word is taken for
    it. `enclave` says whether there must, must not or may be a document; `pcrs`, `roots` and
    `allow_simulated` are those of `attestation.verify`.

    Raises `WashRefused`, with the first reason that applies: malformed, node_key, signature, steps (a result
    that is not clean, or does not fit the slot), document (missing, unexpected, or refused by
    `attestation.verify`), nonce (made for another record) or unlisted (the enclave was not born with it).
    """
    try:
        parts = _parts(raw)
        record = read_record(parts.record)
    except Malformed as error:
        raise WashRefused("malformed", f"no certificate of a wash: {error}") from None
    h = hash_of(parts.record)
    if node_key is not None and record.node_key != node_key:
        raise WashRefused("node_key", "the record is of another node")
    if not _fits(record.node_key, parts):
        raise WashRefused("signature", "the node's signature does not fit record and document")
    _check_steps(record)
    _check_presence(record, parts.document, enclave)
    attestation = None
    if parts.document:
        attestation = _attested(
            parts.document, h, pcrs=pcrs or {}, roots=roots, allow_simulated=allow_simulated
        )
    return Verified(raw=raw, hash=hash_of(raw), record=record, record_hash=h, attestation=attestation)


def verify_chain(
    raws: Sequence[bytes],
    *,
    node_key: bytes | None,
    head: bytes | None = None,
    enclave: Presence = "any",
    pcrs: Mapping[int, bytes] | None = None,
    roots: Collection[bytes] = (AWS_ROOT_SHA256,),
    allow_simulated: bool = False,
) -> Chain:
    """Verify certificates of one slot that follow each other, oldest first, none left out.

    `head` is the hash of the slot's newest record, as somebody knows it from elsewhere; without it the tail
    is not checked. With `node_key=None` all must be of the first one's node.

    Raises `WashRefused` as `verify_certificate` does, and for slot (of different slots or devices), order
    (not each behind the one before it) and head (the last is not the newest).
    """
    if not raws:
        raise WashRefused("malformed", "there is no certificate")
    found: list[Verified] = []
    for index, raw in enumerate(raws):
        try:
            verified = verify_certificate(
                raw,
                node_key=found[0].record.node_key if found else node_key,
                enclave=enclave,
                pcrs=pcrs,
                roots=roots,
                allow_simulated=allow_simulated,
            )
            if found:
                _check_link(found[-1], verified)
        except WashRefused as error:
            error.index = index
            raise
        found.append(verified)
    chain = Chain(certificates=tuple(found), head_checked=False)
    return chain if head is None else chain.up_to((head,))


def slot_of(raw: bytes) -> str | None:
    """The slot that a certificate says it is of, for messages: unverified. None where it cannot be read."""
    try:
        return read_record(_parts(raw).record).slot_id
    except Malformed:
        return None


def view(verified: Verified) -> dict[str, Any]:
    """A certificate as JSON: bytes in hex; `certificate`, which alone counts, and `document` in base64."""
    parts, record = _parts(verified.raw), verified.record
    return {
        "hash": verified.hash.hex(),
        "record_hash": verified.record_hash.hex(),
        "record": {
            "node_key": record.node_key.hex(),
            "slot_id": record.slot_id,
            "slot_uuid": record.slot_uuid,
            "fence": record.fence,
            "prev": record.prev.hex(),
            "made_ms": record.made_ms,
            "tier": record.tier,
            "lease": record.lease.hex() or None,
            "steps": [
                {
                    "name": step.name,
                    "result": step.result,
                    "started_ms": step.started_ms,
                    "ended_ms": step.ended_ms,
                    "figures": {name: _shown(value) for name, value in step.figures.items()},
                }
                for step in record.steps
            ],
        },
        "attestation": None if verified.attestation is None else _attestation_view(verified.attestation),
        "document": b64encode(parts.document).decode() or None,
        "signature": parts.signature.hex(),
        "certificate": b64encode(verified.raw).decode(),
    }


def _parts(raw: bytes) -> _Parts:
    match decode(raw, max_bytes=MAX_CERTIFICATE_BYTES):
        case [bytes() as record, bytes() as document, bytes() as signature] if (
            len(document) <= MAX_DOCUMENT_BYTES and len(signature) == SIGNATURE_BYTES
        ):
            return _Parts(record, document, signature)
    raise Malformed("it is not a record, a document and a signature")


def _signed(record: bytes, document: bytes) -> bytes:
    return hash_of(record) + sha256(document).digest()


def _fits(key: bytes, parts: _Parts) -> bool:
    if key[:-1] + bytes([key[-1] & 0x7F]) in _LOW_ORDER:
        return False
    message = _signed(parts.record, parts.document)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(parts.signature, message)
    except InvalidSignature:
        return False
    return True


def _check_steps(record: Record) -> None:
    """Each result is clean, and one that this wash can have had."""
    for step in record.steps:
        if step.result not in _CLEAN[step.name]:
            raise WashRefused("steps", f"step {step.name}: {step.result}")
        needs_gpu = step.name in ("scrub", "gates")
        if needs_gpu and step.result == "not_applicable" and not record.slot_uuid.startswith(NO_GPU):
            raise WashRefused("steps", f"step {step.name} is not applicable, but the slot is a GPU")
    if record.result("scrub") == "skipped" and record.tier != "light":
        raise WashRefused("steps", "a full wash skips nothing")
    if record.tier == "light" and not record.lease:
        raise WashRefused("steps", "a light wash is for the tenant of a lease, and there was none")
    if bool(record.lease) != (record.result("teardown") == "passed"):
        raise WashRefused("steps", "a lease is torn down, and without one there is nothing to tear down")


def _check_presence(record: Record, document: bytes, enclave: Presence) -> None:
    if bool(document) != (record.result("enclave") == "passed"):
        raise WashRefused("document", "there is a document if, and only if, the enclave was renewed")
    if enclave == "required" and not document:
        raise WashRefused("document", "there is no enclave's document")
    if enclave == "absent" and document:
        raise WashRefused("document", "there is a document, and the node has no enclave")


def _attested(
    document: bytes,
    h: bytes,
    *,
    pcrs: Mapping[int, bytes],
    roots: Collection[bytes],
    allow_simulated: bool,
) -> Attestation:
    """What the document says, of an enclave that was born with the record and has a key."""
    try:
        attestation = verify(
            document,
            nonce=h,
            pcrs=pcrs,
            roots=roots,
            allow_simulated=allow_simulated,
            at_document_time=True,
        )
        slots, _ = attestation.slots, attestation.epoch
    except AttestationRefused as error:
        if error.reason == "nonce":
            raise WashRefused("nonce", "the document was made for another record") from None
        raise WashRefused(
            "document", f"its document is refused ({error.reason}): {error}", document=error.reason
        ) from None
    if h not in slots:
        raise WashRefused("unlisted", "the document does not list this record")
    return attestation


def _check_link(before: Verified, after: Verified) -> None:
    if (after.record.slot_id, after.record.slot_uuid) != (before.record.slot_id, before.record.slot_uuid):
        raise WashRefused("slot", "it is of another slot or device than the one before it")
    if after.record.prev != before.hash:
        raise WashRefused("order", "it does not follow the one before it")
    if after.record.made_ms < before.record.made_ms:
        raise WashRefused("order", "it is older than the one before it")


def _shown(value: int | str | bytes) -> int | str:
    return value.hex() if isinstance(value, bytes) else value


def _attestation_view(attestation: Attestation) -> dict[str, Any]:
    return {
        "assurance": "simulated" if attestation.simulated else "isolated-worker",
        "module_id": attestation.module_id,
        "timestamp": attestation.timestamp.isoformat(),
        "epoch": attestation.epoch.hex(),
        "pcrs": {f"PCR{index}": data.hex() for index, data in attestation.pcrs.items()},
        "slots": [h.hex() for h in attestation.slots],
    }
