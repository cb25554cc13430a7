"""The enclave's wire: whole frames, the arguments that each operation has, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_server.sealed.canonical import Value, encode
from gpu_server.sealed.chunks import frame
from gpu_server.sealed.errors import Malformed, StreamBroken
from gpu_server.sealed.frames import (
    MAX_FRAME,
    MAX_SLOTS,
    Code,
    FrameReader,
    Op,
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from tests.sealed.exchange import ARN

ARGS: dict[Op, list[Value]] = {
    Op.INIT: [b"h" * 32, b"i" * 32],
    Op.HELLO: [b"n" * 32],
    Op.GRANT: ["acme", "chat", ARN, "sess_1", b"k" * 32, b"wrapped", b"for the enclave"],
    Op.STATUS: [],
}


def payload(data: bytes) -> bytes:
    """The one frame in `data`, without its length."""
    reader = FrameReader()
    (found,) = reader.feed(data)
    reader.close()
    return found


@pytest.mark.parametrize("op", Op)
def test_requests(op: Op) -> None:
    """Every operation's request is read as it was written."""
    data = encode_request(op, 7, ARGS[op])
    assert decode_request(payload(data)) == Request(op, 7, ARGS[op])
    assert data == frame(encode([1, op.value, 7, ARGS[op]]))


@pytest.mark.parametrize("code", Code)
def test_replies(code: Code) -> None:
    """Every code is read as it was written, with its result and the request's id."""
    data = encode_reply(2**40, code, [b"document", "new"])
    assert decode_reply(payload(data)) == Reply(2**40, code, [b"document", "new"])
    assert decode_reply(payload(encode_reply(0, code))) == Reply(0, code, [])
    assert data == frame(encode([1, 2**40, code.value, [b"document", "new"]]))


WRONG: dict[str, tuple[Op, list[Any]]] = {
    "a hash of 31 bytes": (Op.INIT, [b"h" * 31]),
    "a hash as text": (Op.INIT, ["h" * 32]),
    "too many slots": (Op.INIT, [b"h" * 32] * (MAX_SLOTS + 1)),
    "no nonce": (Op.HELLO, []),
    "two nonces": (Op.HELLO, [b"n" * 32] * 2),
    "a nonce as text": (Op.HELLO, ["n" * 32]),
    "a nested nonce": (Op.HELLO, [[b"n" * 32]]),
    "one argument less": (Op.GRANT, ARGS[Op.GRANT][:-1]),
    "one argument more": (Op.GRANT, [*ARGS[Op.GRANT], b""]),
    "a tenant as bytes": (Op.GRANT, [b"acme", *ARGS[Op.GRANT][1:]]),
    "a key as text": (Op.GRANT, [*ARGS[Op.GRANT][:4], "k" * 32, *ARGS[Op.GRANT][5:]]),
    "an argument to STATUS": (Op.STATUS, [0]),
}


@pytest.mark.parametrize(("op", "args"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_an_operation_does_not_have(op: Op, args: list[Any]) -> None:
    """Number and types of the arguments are checked when a request is written, and again when it is read."""
    with pytest.raises(Malformed):
        encode_request(op, 1, args)
    with pytest.raises(Malformed):
        decode_request(encode([1, op.value, 1, args]))


def test_as_many_slots_as_fit() -> None:
    """Fourteen record hashes are a request, and fit into the user data of a document with their label."""
    hashes: list[Value] = [bytes([i]) * 32 for i in range(MAX_SLOTS)]
    assert decode_request(payload(encode_request(Op.INIT, 1, hashes))).args == hashes
    assert len(encode(["gpu-server/1", hashes])) <= 512 < len(encode(["gpu-server/1", [*hashes, hashes[0]]]))


NO_MESSAGES: list[list[Any]] = [
    [],
    [1],
    [2, "STATUS", 1, []],
    ["1", "STATUS", 1, []],
    [1, "status", 1, []],
    [1, "STOP", 1, []],
    [1, b"STATUS", 1, []],
    [1, "STATUS", "1", []],
    [1, "STATUS", 1, b""],
    [1, "STATUS", 1],
    [1, "STATUS", 1, [], 0],
    [2, 1, "OK", []],
    [1, 1, "ok", []],
    [1, 1, "FINE", []],
    [1, 1, b"OK", []],
    [1, "1", "OK", []],
    [1, 1, "OK", "result"],
    [1, 1, "OK"],
    [1, 1, "OK", [], 0],
]


@pytest.mark.parametrize("content", NO_MESSAGES, ids=str)
def test_no_messages(content: list[Any]) -> None:
    """Another version, operation, code, shape or type is neither a request nor a reply."""
    for decode in (decode_request, decode_reply):
        with pytest.raises(Malformed):
            decode(encode(content))


def test_a_request_is_no_reply() -> None:
    """Neither can be taken for the other."""
    with pytest.raises(Malformed):
        decode_reply(payload(encode_request(Op.STATUS, 1, [])))
    with pytest.raises(Malformed):
        decode_request(payload(encode_reply(1, Code.OK)))


def test_frames_in_pieces() -> None:
    """Frames come out whole and in order, however they arrive."""
    stream = b"".join(encode_request(op, i, ARGS[op]) for i, op in enumerate(Op))
    for size in (1, 3, 64, len(stream)):
        reader = FrameReader()
        found = [
            decode_request(piece)
            for at in range(0, len(stream), size)
            for piece in reader.feed(stream[at : at + size])
        ]
        reader.close()
        assert [(request.op, request.id) for request in found] == [(op, i) for i, op in enumerate(Op)]


def test_a_cut_frame() -> None:
    """A peer that closes in the middle of a frame is noticed."""
    reader = FrameReader()
    assert reader.feed(encode_reply(1, Code.OK)[:-1]) == []
    with pytest.raises(StreamBroken):
        reader.close()


def test_size_is_bounded() -> None:
    """A frame has at most 64 KiB, for whoever writes it and whoever reads it."""
    room = MAX_FRAME - len(encode([1, 1, "OK", [bytes(60_000)]])) + 60_000
    assert decode_reply(payload(encode_reply(1, Code.OK, [bytes(room)]))).result == [bytes(room)]
    with pytest.raises(Malformed):
        encode_reply(1, Code.OK, [bytes(room + 1)])
    with pytest.raises(Malformed):
        FrameReader().feed((MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(Malformed):
        decode_reply(encode([1, 1, "OK", [bytes(room + 1)]]))


def test_content_is_not_shown() -> None:
    """A request in a log shows neither keys nor ciphertext."""
    request = decode_request(payload(encode_request(Op.GRANT, 1, ARGS[Op.GRANT])))
    assert "wrapped" not in repr(request)
    assert "document" not in repr(Reply(1, Code.OK, [b"document"]))
