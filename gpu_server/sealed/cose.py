"""COSE_Sign1 (RFC 9052) as the Nitro Security Module writes it, and CBOR of strangers, decoded strictly.

cbor2 would otherwise compile a tag 35 into a regular expression, follow shared references into cycles, take
the last of two equal keys and leave bytes behind the item unread. Lengths are safe as it is: it reads long
strings piece by piece, and takes room for nothing before it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, NoReturn

import cbor2

from gpu_server.sealed.errors import Malformed

ES384: Final = -35
SIGNATURE_BYTES: Final = 96
MAX_DEPTH: Final = 8
_SIGN1_TAG: Final = b"\xd2"


class _NoTags(Mapping[int, Any]):
    """Semantic decoders for cbor2 that refuse every tag, also those it knows by itself."""

    def __getitem__(self, tag: int) -> NoReturn:
        raise cbor2.CBORDecodeError("a tag")

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


def decode_strictly(data: bytes, *, max_bytes: int) -> Any:
    """One CBOR item without tags, repeated keys, deep nesting, or anything behind it. Raises `Malformed`."""
    if len(data) > max_bytes:
        raise Malformed(f"more than {max_bytes} bytes")
    source = BytesIO(data)
    decoder = cbor2.CBORDecoder(
        source,
        semantic_decoders=_NoTags(),
        allow_duplicate_keys=False,
        max_depth=MAX_DEPTH,
        read_size=1,
    )
    try:
        value = decoder.decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Malformed("no CBOR that is allowed here") from error
    if source.tell() != len(data):
        raise Malformed("something follows the CBOR item")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign1:
    """A COSE_Sign1 with ES384: `payload` is what was signed, `signature` is r || s."""

    protected: bytes
    payload: bytes
    signature: bytes

    @property
    def signed(self) -> bytes:
        """The bytes that the signature is over: Sig_structure of RFC 9052, section 4.4."""
        return cbor2.dumps(["Signature1", self.protected, b"", self.payload])


def read_sign1(document: bytes, *, max_bytes: int) -> Sign1:
    """Take a document apart, tagged or not; nothing is verified. Raises `Malformed`."""
    match decode_strictly(document.removeprefix(_SIGN1_TAG), max_bytes=max_bytes):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)] if not unprotected:
            pass
        case _:
            raise Malformed("no COSE_Sign1")
    header = decode_strictly(protected, max_bytes=64)
    if not (isinstance(header, dict) and header == {1: ES384} and _all_ints(header)):
        raise Malformed("not signed with ES384")
    if len(signature) != SIGNATURE_BYTES:
        raise Malformed(f"a signature of ES384 has {SIGNATURE_BYTES} bytes")
    return Sign1(protected=protected, payload=payload, signature=signature)


def write_sign1(*, protected: bytes, payload: bytes, signature: bytes) -> bytes:
    """The document, untagged."""
    return cbor2.dumps([protected, {}, payload, signature])


def protected_es384() -> bytes:
    """The protected header of what the Nitro Security Module signs."""
    return cbor2.dumps({1: ES384})


def _all_ints(header: dict[Any, Any]) -> bool:
    # In Python 1 == 1.0 == True, in CBOR not.
    return all(type(item) is int for pair in header.items() for item in pair)
