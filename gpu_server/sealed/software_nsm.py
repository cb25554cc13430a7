"""A Nitro Security Module in software: it speaks the bytes of /dev/nsm, and secures nothing.

Requests, answers and errors are those of https://github.com/aws/aws-nitro-enclaves-nsm-api. Its root is its
own, so nobody accepts its documents who has not said that a simulation will do.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from gpu_server.sealed.cose import Sign1, decode_strictly, protected_es384, write_sign1
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.nsm import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES
from gpu_server.sealed.software_pki import Holder, issue_below, make_root

PCR_COUNT: Final = 32
LOCKED_AT_BOOT: Final = 16
"""PCR0 to PCR15 are the hypervisor's: read-only from the start, and the ones that a document has."""
MEASURED: Final = (0, 1, 2, 8)
"""What describes the program; all zero in debug mode, and only these (seen in real documents)."""
MAX_RANDOM_BYTES: Final = 256
MAX_KEY_BYTES: Final = 1024
MAX_DATA_BYTES: Final = 512
"""Of user data and of a nonce. AWS names 1024 in one place and 512 in another; the smaller one is safe."""
RENEWED_BEFORE: Final = timedelta(minutes=10)
"""A document's certificate has at least this long to live."""
_ZERO: Final = bytes(48)


class _Refused(Exception):
    """An error that the module answers."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class SoftwareNsm:
    """One module, with the registers of one enclave. `process` may be called by many threads.

    `measurements`: PCR index (0 to 15) -> 48 bytes; the rest begins as zeros. `encoding` chooses how the map
    of the payload is written, since real modules do either.
    """

    def __init__(
        self,
        measurements: Mapping[int, bytes],
        *,
        debug: bool = False,
        encoding: Literal["definite", "indefinite"] = "definite",
        module_id: str = "i-0123456789abcdef0-enc0123456789abcdef",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if any(
            len(data) != len(_ZERO) or index not in range(LOCKED_AT_BOOT)
            for index, data in measurements.items()
        ):
            raise ValueError(f"a measurement has {len(_ZERO)} bytes and an index below {LOCKED_AT_BOOT}")
        self._pcrs = [measurements.get(index, _ZERO) for index in range(PCR_COUNT)]
        if debug:
            for index in MEASURED:
                self._pcrs[index] = _ZERO
        self._locked = set(range(LOCKED_AT_BOOT))
        self._indefinite = encoding == "indefinite"
        self._module_id = module_id
        self._now = now
        self._lock = threading.Lock()
        self._root = make_root(now())
        self._below: list[Holder] = []

    @property
    def root(self) -> bytes:
        """The root certificate, DER."""
        return self._root.der

    def process(self, request: bytes) -> bytes:
        """What the module answers, CBOR to CBOR. Raises nothing: its errors are answers."""
        try:
            with self._lock:
                answer = cbor2.dumps(self._answer(request))
            if len(answer) > MAX_RESPONSE_BYTES:
                raise _Refused("BufferTooSmall")
        except _Refused as error:
            return cbor2.dumps({"Error": error.code})
        return answer

    def _answer(self, request: bytes) -> object:
        if len(request) > MAX_REQUEST_BYTES:
            raise _Refused("InputTooLarge")
        try:
            asked = decode_strictly(request, max_bytes=MAX_REQUEST_BYTES)
        except Malformed:
            raise _Refused("InvalidOperation") from None
        match asked:
            case "GetRandom":
                return {"GetRandom": {"random": secrets.token_bytes(MAX_RANDOM_BYTES)}}
            case "DescribeNSM":
                return {"DescribeNSM": self._description()}
            case {"DescribePCR": {"index": index}} if len(asked) == 1:
                index = self._index(index)
                return {"DescribePCR": {"lock": index in self._locked, "data": self._pcrs[index]}}
            case {"ExtendPCR": {"index": index, "data": bytes(data)}} if len(asked) == 1:
                return {"ExtendPCR": {"data": self._extend(self._index(index), data)}}
            case {"LockPCR": {"index": index}} if len(asked) == 1:
                self._locked.add(self._writable(self._index(index)))
                return "LockPCR"
            case {"LockPCRs": {"range": int(count)}} if len(asked) == 1:
                if not 0 <= count <= PCR_COUNT:
                    raise _Refused("InvalidIndex")
                self._locked |= set(range(count))
                return "LockPCRs"
            case {"Attestation": dict(fields)} if len(asked) == 1:
                return {"Attestation": {"document": self._document(fields)}}
            case _:
                raise _Refused("InvalidOperation")

    # -- registers ------------------------------------------------------------------------------------------

    def _description(self) -> dict[str, object]:
        return {
            "version_major": 1,
            "version_minor": 0,
            "version_patch": 0,
            "module_id": self._module_id,
            "max_pcrs": PCR_COUNT,
            "locked_pcrs": sorted(self._locked),
            "digest": "SHA384",
        }

    def _index(self, index: object) -> int:
        if type(index) is not int or not 0 <= index < PCR_COUNT:
            raise _Refused("InvalidIndex")
        return index

    def _writable(self, index: int) -> int:
        if index in self._locked:
            raise _Refused("ReadOnlyIndex")
        return index

    def _extend(self, index: int, data: bytes) -> bytes:
        value = hashlib.sha384(self._pcrs[self._writable(index)] + data).digest()
        self._pcrs[index] = value
        return value

    # -- documents ------------------------------------------------------------------------------------------

    def _document(self, asked: dict[str, Any]) -> bytes:
        if not asked.keys() <= {"user_data", "nonce", "public_key"}:
            raise _Refused("InvalidArgument")
        limits = {"public_key": MAX_KEY_BYTES, "user_data": MAX_DATA_BYTES, "nonce": MAX_DATA_BYTES}
        given = {name: asked.get(name) for name in limits}
        for name, limit in limits.items():
            value = given[name]
            if not (value is None or isinstance(value, bytes)):
                raise _Refused("InvalidArgument")
            if value is not None and len(value) > limit:
                raise _Refused("InputTooLarge")
        now = self._now()
        *middle, leaf = self._certificates(now)
        payload = {
            "module_id": self._module_id,
            "digest": "SHA384",
            "timestamp": int(now.timestamp() * 1000),
            "pcrs": {index: self._pcrs[index] for index in sorted(self._locked)},
            "certificate": leaf.der,
            "cabundle": [self._root.der, *(holder.der for holder in middle)],
            **given,
        }
        return sign_document(_indefinite(payload) if self._indefinite else cbor2.dumps(payload), leaf.key)

    def _certificates(self, now: datetime) -> list[Holder]:
        """The chain below the root: made anew before one of its certificates ends."""
        ends = min((holder.certificate.not_valid_after_utc for holder in self._below), default=now)
        if ends - now < RENEWED_BEFORE:
            self._below = issue_below(self._root, module_id=self._module_id, now=now)
        return self._below


def sign_document(payload: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A COSE_Sign1 over a payload: ES384, untagged."""
    protected = protected_es384()
    signed = Sign1(protected=protected, payload=payload, signature=b"").signed
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384())))
    return write_sign1(protected=protected, payload=payload, signature=r.to_bytes(48) + s.to_bytes(48))


def _indefinite(payload: dict[str, object]) -> bytes:
    """A map of indefinite length (RFC 8949, section 3.2.2)."""
    pairs = b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in payload.items())
    return b"\xbf" + pairs + b"\xff"
