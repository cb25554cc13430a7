"""Attestation documents of Nitro Enclaves: verified, or refused for one reason.

Follows AWS's description, https://docs.aws.amazon.com/enclaves/latest/user/verify-root.html, and is stricter
where real documents allow it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from gpu_server.sealed import canonical
from gpu_server.sealed.chain import MAX_INTERMEDIATES, verify_chain
from gpu_server.sealed.cose import Sign1, decode_strictly, read_sign1
from gpu_server.sealed.errors import AttestationRefused, Malformed

AWS_ROOT_SHA256: Final = bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")
"""SHA-256 of the DER of AWS's root, G1, of the commercial partition."""
SIMULATED_ROOT_NAME: Final = "gpu-server simulated enclave root"
"""Common name of the roots that `SoftwareNsm` makes for itself."""
MAX_DOCUMENT_BYTES: Final = 0x3000
"""No answer of the Nitro Security Module is longer."""
MAX_CERTIFICATE_BYTES: Final = 1024
MAX_FIELD_BYTES: Final = 1024
PCR_BYTES: Final = 48
PROTOCOL: Final = "gpu-server/1"
CLOCK_SKEW: Final = timedelta(seconds=60)
"""How far ahead of ours the clock of an enclave may be."""
_LAST_TIMESTAMP: Final = 253_402_300_799_999  # the end of the year 9999


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """What a verified document says.

    `expires` is when the first certificate of its chain does. With `simulated` its root is not AWS's, so it
    says nothing about hardware, whatever its measurements are.
    """

    module_id: str
    timestamp: datetime
    pcrs: Mapping[int, bytes]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    expires: datetime
    simulated: bool

    @property
    def epoch(self) -> bytes:
        """Names this life of the enclave: the first 16 bytes of SHA-256 of its public key. Raises
        `AttestationRefused` (malformed) where there is none."""
        if self.public_key is None:
            raise AttestationRefused("malformed", "there is no public key in the document")
        return hashlib.sha256(self.public_key).digest()[:16]

    @property
    def slots(self) -> tuple[bytes, ...]:
        """Hash of the newest wash record of each slot, from `user_data`. Raises `AttestationRefused`
        (malformed) where that is not of our protocol."""
        try:
            match canonical.decode(self.user_data or b"", max_bytes=MAX_FIELD_BYTES):
                case [str(protocol), [*records]] if protocol == PROTOCOL:
                    found = tuple(record for record in records if isinstance(record, bytes))
                    if len(found) == len(records) and all(len(record) == 32 for record in found):
                        return found
        except Malformed:
            pass
        raise AttestationRefused("malformed", "the document's user data is not of this protocol")


def verify(
    document: bytes,
    *,
    nonce: bytes | None,
    pcrs: Mapping[int, bytes],
    roots: Collection[bytes] = (AWS_ROOT_SHA256,),
    allow_simulated: bool = False,
    at: datetime | None = None,
    at_document_time: bool = False,
    max_age: float = 300.0,
) -> Attestation:
    """Verify a document, at `at` (None: now) or, for a stored one, at the time that it names itself.

    `roots` holds the SHA-256 of the DER of each root that is trusted. `allow_simulated` accepts, beside them,
    any root of a `SoftwareNsm`: it proves nothing. `pcrs` are the registers that must have these values (48
    bytes each), `nonce` is the one that was asked for; with `{}` and None the caller says that neither is
    checked. A document is fresh for `max_age` seconds.

    Raises `AttestationRefused`, with the reason malformed, root, expired, chain, signature, debug, nonce, pcr
    or stale: the first that applies.
    """
    sign1 = _read(document)
    fields = _fields(sign1)
    timestamp = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=fields["timestamp"])
    asked = datetime.now(UTC) if at is None else at.astimezone(UTC)
    # An enclave's certificate begins three seconds before its first document: a verifier whose clock is a
    # little behind judges the chain at the document's time.
    when = timestamp if at_document_time or asked < timestamp <= asked + CLOCK_SKEW else asked

    bundle = fields["cabundle"]
    trusted = hashlib.sha256(bundle[0]).digest() in roots
    if not trusted and not allow_simulated:
        raise AttestationRefused("root", "the document does not come from a trusted root")
    chain = verify_chain(fields["certificate"], bundle, at=when)
    if not trusted and chain.root_name != SIMULATED_ROOT_NAME:
        raise AttestationRefused(
            "root", "the document comes neither from a trusted nor from a simulated root"
        )
    _verify_signature(sign1, chain.leaf_key)

    found: Mapping[int, bytes] = MappingProxyType(fields["pcrs"])
    if not any(found.get(0, b"")):
        raise AttestationRefused("debug", "the enclave runs in debug mode: its host can read it")
    if nonce is not None and fields["nonce"] != nonce:
        raise AttestationRefused("nonce", "the document does not answer this nonce")
    for index, expected in pcrs.items():
        if found.get(index) != expected:
            raise AttestationRefused("pcr", f"PCR{index} is not what is expected")
    age = (asked - timestamp).total_seconds()
    if not at_document_time and not -CLOCK_SKEW.total_seconds() <= age <= max_age:
        raise AttestationRefused("stale", f"the document was made at {timestamp:%Y-%m-%d %H:%M:%S} UTC")
    return Attestation(
        module_id=fields["module_id"],
        timestamp=timestamp,
        pcrs=found,
        public_key=fields["public_key"],
        user_data=fields["user_data"],
        nonce=fields["nonce"],
        expires=chain.expires,
        simulated=hashlib.sha256(bundle[0]).digest() != AWS_ROOT_SHA256,
    )


def root_fingerprint(pem: bytes) -> bytes:
    """The entry for `roots` of a root certificate in PEM. Raises ValueError."""
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())


def _read(document: bytes) -> Sign1:
    try:
        return read_sign1(document, max_bytes=MAX_DOCUMENT_BYTES)
    except Malformed as error:
        raise AttestationRefused("malformed", f"the document is no attestation: {error}") from error


def _fields(sign1: Sign1) -> dict[str, Any]:
    """The payload's fields, each of its type and size; those that are not known here are left alone."""
    try:
        payload = decode_strictly(sign1.payload, max_bytes=MAX_DOCUMENT_BYTES)
    except Malformed as error:
        raise AttestationRefused("malformed", f"the document's payload: {error}") from error
    if not isinstance(payload, dict):
        raise AttestationRefused("malformed", "the document's payload is no map")
    for name, fits in _FIELDS.items():
        # Real documents have null for what is absent.
        if not fits(payload.setdefault(name, None)):
            raise AttestationRefused("malformed", f"the document's {name} is not as it should be")
    return payload


def _is_pcrs(value: object) -> bool:
    return (
        isinstance(value, dict)
        and 1 <= len(value) <= 32
        and all(type(index) is int and 0 <= index < 32 for index in value)
        and all(isinstance(data, bytes) and len(data) == PCR_BYTES for data in value.values())
    )


def _is_bytes(value: object, least: int, most: int) -> bool:
    return isinstance(value, bytes) and least <= len(value) <= most


def _is_certificate(value: object) -> bool:
    return _is_bytes(value, 1, MAX_CERTIFICATE_BYTES)


def _is_bundle(value: object) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_INTERMEDIATES + 1
        and all(_is_certificate(entry) for entry in value)
    )


_FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "module_id": lambda value: isinstance(value, str) and 1 <= len(value) <= 256,
    "digest": lambda value: value == "SHA384",
    "timestamp": lambda value: type(value) is int and 0 < value <= _LAST_TIMESTAMP,
    "pcrs": _is_pcrs,
    "certificate": _is_certificate,
    "cabundle": _is_bundle,
    "public_key": lambda value: value is None or _is_bytes(value, 1, MAX_FIELD_BYTES),
    "user_data": lambda value: value is None or _is_bytes(value, 0, MAX_FIELD_BYTES),
    "nonce": lambda value: value is None or _is_bytes(value, 0, MAX_FIELD_BYTES),
}


def _verify_signature(sign1: Sign1, key: ec.EllipticCurvePublicKey) -> None:
    half = len(sign1.signature) // 2
    r, s = (int.from_bytes(part) for part in (sign1.signature[:half], sign1.signature[half:]))
    try:
        key.verify(encode_dss_signature(r, s), sign1.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise AttestationRefused("signature", "the document's signature does not fit") from None
