"""The enclave's wire: one frame a request, one a reply, over vsock or a Unix socket.

A frame is `u32be length || C(...)`, at most 64 KiB of the latter. Requests are `C([1, op, id, args])`,
replies `C([1, id, code, result])` with the request's id. `encode_*` give whole frames; `decode_*` take what
`FrameReader` gives, without the length.

| op | args | result |
|---|---|---|
| INIT | one record hash of 32 bytes for each slot, at most 14 | epoch |
| HELLO | nonce of 32 bytes | attestation document |
| GRANT | tenant, pool, KMS key ARN, session id, worker's key, wrapped key, CiphertextForRecipient | grant |
| STATUS | | "new" or "ready", epoch or empty bytes, version, "nitro" or "simulated" |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gpu_server.sealed.canonical import Value, decode, encode
from gpu_server.sealed.chunks import ChunkReader, frame
from gpu_server.sealed.errors import Malformed

MAX_FRAME = 65536
MAX_SLOTS = 14
"""Record hashes: more do not fit into the 512 bytes that an attestation document has for its user's data."""

_FORMAT = 1
_HASH_BYTES = 32


class Op(StrEnum):
    """What the enclave is asked to do."""

    INIT = "INIT"
    HELLO = "HELLO"
    GRANT = "GRANT"
    STATUS = "STATUS"


class Code(StrEnum):
    """How it went."""

    OK = "OK"
    BUSY = "BUSY"
    KMS_DENIED = "KMS_DENIED"
    KMS_DOWN = "KMS_DOWN"
    POLICY = "POLICY"
    REPLAY = "REPLAY"
    DECRYPT = "DECRYPT"
    ATTEST = "ATTEST"
    MALFORMED = "MALFORMED"
    INTERNAL = "INTERNAL"


_ARGS: dict[Op, tuple[type, ...]] = {
    Op.HELLO: (bytes,),
    Op.GRANT: (str, str, str, str, bytes, bytes, bytes),
    Op.STATUS: (),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request, its args of the number and the types that its op has. The enclave judges what they say."""

    op: Op
    id: int
    args: list[Value] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to the request with the same id."""

    id: int
    code: Code
    result: list[Value] = field(repr=False)


def encode_request(op: Op, id: int, args: Sequence[Value]) -> bytes:
    """A request's frame. Raises `Malformed` for args that its op does not have, or too many bytes."""
    _check_args(op, args)
    return _frame([_FORMAT, str(op), id, list(args)])


def decode_request(payload: bytes) -> Request:
    """A request, from a frame without its length. Raises `Malformed`."""
    match decode(payload, max_bytes=MAX_FRAME):
        case [1, str() as op, int() as id, list() as args] if op in Op.__members__:
            _check_args(Op(op), args)
            return Request(Op(op), id, args)
    raise Malformed("not a request to the enclave")


def encode_reply(id: int, code: Code, result: Sequence[Value] = ()) -> bytes:
    """A reply's frame. Raises `Malformed` for too many bytes."""
    return _frame([_FORMAT, id, str(code), list(result)])


def decode_reply(payload: bytes) -> Reply:
    """A reply, from a frame without its length. Raises `Malformed`."""
    match decode(payload, max_bytes=MAX_FRAME):
        case [1, int() as id, str() as code, list() as result] if code in Code.__members__:
            return Reply(id, Code(code), result)
    raise Malformed("not a reply of the enclave")


class FrameReader(ChunkReader):
    """Takes frames in whatever pieces they come, and gives them without lengths; `close` it at the end."""

    def __init__(self) -> None:
        super().__init__(MAX_FRAME)


def _frame(content: list[Value]) -> bytes:
    payload = encode(content)
    if len(payload) > MAX_FRAME:
        raise Malformed(f"more than {MAX_FRAME} bytes in a frame")
    return frame(payload)


def _check_args(op: Op, args: Sequence[Value]) -> None:
    if op is Op.INIT:
        fits = len(args) <= MAX_SLOTS and all(type(arg) is bytes and len(arg) == _HASH_BYTES for arg in args)
    else:
        fits = tuple(type(arg) for arg in args) == _ARGS[op]
    if not fits:
        raise Malformed("not the arguments of this operation")
