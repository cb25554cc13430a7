"""The request: head and chunks, opened by the one worker they are for, in full or not at all."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gpu_server.sealed.canonical import encode
from gpu_server.sealed.chunks import MAX_DATA, frame
from gpu_server.sealed.errors import CannotOpen, Malformed, SealedError, StreamBroken
from gpu_server.sealed.grant import WorkerKey
from gpu_server.sealed.request import MAX_HEAD_BYTES, Head, RequestOpener, RequestSealer, read_head
from tests.sealed.exchange import ARN, Exchange, frames_of

PLAINTEXT = b'{"prompt":"what nobody else reads"}'


@pytest.mark.parametrize("size", [0, 1, 252, 253, 1024, MAX_DATA, MAX_DATA + 1, 3 * MAX_DATA + 5])
def test_there_and_back(size: int) -> None:
    """A request of any size is opened by its worker, and its answer by its client."""
    exchange = Exchange()
    plaintext = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    opener, chunks = exchange.opener(exchange.sealer.body(plaintext))
    assert opener.open(chunks) == plaintext
    answer = opener.answer()
    client = exchange.sealer.answer(answer.salt)
    sealed = answer.seal(b"text", final=False) + answer.seal(b"end", final=True)
    assert [client.open(chunk) for chunk in sealed] == [b"text", b"end"]
    client.close()


def opened(exchange: Exchange, body: bytes) -> bytes:
    opener, chunks = exchange.opener(body)
    return opener.open(chunks)


def test_in_pieces() -> None:
    """What is sealed in pieces and read in other pieces is the same request."""
    exchange = Exchange()
    pieces = [b"a" * 100, b"", b"b" * (MAX_DATA + 7), b"c"]
    stream = b"".join(exchange.sealer.seal(piece, final=False) for piece in pieces)
    stream += exchange.sealer.seal(b"", final=True)
    opener, _ = exchange.opener(exchange.sealer.head)
    opened = b"".join(opener.feed(stream[at : at + 1000]) for at in range(0, len(stream), 1000))
    opener.finish()
    assert opener.finished
    assert opened == b"".join(pieces)


def peak(call: Callable[[], object]) -> int:
    """The most memory that a call takes at one time, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_request_is_not_held_twice() -> None:
    """Sealing and opening take room for what they give and for some chunks, however long a request is: fresh
    memory costs more time than the cipher does."""
    exchange, size = Exchange(), 16 * MAX_DATA
    plaintext = bytes(size)
    room = size * 9 // 8 + 6 * MAX_DATA
    body = exchange.sealer.body(plaintext)
    again = RequestSealer(exchange.binding, exchange.psk, exchange.request_id)
    assert peak(lambda: again.body(plaintext)) < room
    opener, chunks = exchange.opener(body)
    assert peak(lambda: opener.open(memoryview(chunks))) < room


def test_a_head_in_clear() -> None:
    """The service reads which session and which key a request is for, and where its chunks begin."""
    exchange = Exchange()
    body = exchange.sealer.body(PLAINTEXT)
    head, begin = read_head(body)
    assert head.session_id == exchange.binding.session_id
    assert head.psk_id == exchange.binding.psk_id
    assert body[:begin] == exchange.sealer.head == head.pack()
    assert PLAINTEXT not in body
    assert len(exchange.sealer.head) <= MAX_HEAD_BYTES


def test_the_longest_head_fits() -> None:
    """A session's id of 128 characters leaves room."""
    head = Head("x" * 128, bytes(32), bytes(32))
    assert read_head(head.pack()) == (head, len(head.pack()))
    assert len(head.pack()) < MAX_HEAD_BYTES


BAD_HEADS: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\0\0",
    "a length of 4 GB": b"\xff\xff\xff\xff" + bytes(600),
    "a length of 513": (513).to_bytes(4, "big") + bytes(600),
    "a cut head": Head("s", bytes(32), bytes(32)).pack()[:-1],
    "no CBOR": frame(b"{}"),
    "an empty array": frame(encode([])),
    "another version": frame(encode([2, "s", bytes(32), bytes(32)])),
    "a version as text": frame(encode(["1", "s", bytes(32), bytes(32)])),
    "a session as bytes": frame(encode([1, b"s", bytes(32), bytes(32)])),
    "a session that is no name": frame(encode([1, "a b", bytes(32), bytes(32)])),
    "no session": frame(encode([1, "", bytes(32), bytes(32)])),
    "a short key id": frame(encode([1, "s", bytes(31), bytes(32)])),
    "a long enc": frame(encode([1, "s", bytes(32), bytes(33)])),
    "one more": frame(encode([1, "s", bytes(32), bytes(32), 0])),
    "one less": frame(encode([1, "s", bytes(32)])),
    "nested": frame(encode([1, "s", [bytes(32)], bytes(32)])),
    "not canonical": frame(b"\x84\x18\x01" + encode([1, "s", bytes(32), bytes(32)])[2:]),
}


@pytest.mark.parametrize("body", BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_no_head(body: bytes) -> None:
    """What is not exactly a head is refused before a session is looked for."""
    with pytest.raises(Malformed):
        read_head(body)


CHANGES: dict[str, Any] = {
    "tenant": "other",
    "pool": "other",
    "kms_key_arn": ARN.replace("1", "2"),
    "session_id": "sess_other",
    "epoch": bytes(16),
    "wrapped_key": b"another",
    "worker_key": WorkerKey.generate().public,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_name_counts(name: str) -> None:
    """A worker that is told another tenant, pool, KMS key, session, enclave, key or worker opens nothing."""
    exchange = Exchange()
    with pytest.raises(CannotOpen):
        exchange.opener(exchange.sealer.body(PLAINTEXT), **{name: CHANGES[name]})


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "worker_key"])
def test_names_count_where_the_id_is_made_to_fit(name: str) -> None:
    """Nor does it help to put the key id that the changed names give into the head."""
    exchange = Exchange()
    head, begin = read_head(body := exchange.sealer.body(PLAINTEXT))
    other = replace(exchange.binding, **{name: CHANGES[name]})
    fitting = Head(other.session_id, other.psk_id, head.enc)
    for psk in (exchange.psk, other.psk(exchange.data_key)):
        opener = RequestOpener(other, psk, exchange.request_id, exchange.key, fitting)
        with pytest.raises(CannotOpen):
            opener.open(body[begin:])


def test_the_request_id_counts() -> None:
    """A request that is delivered under another id does not open, so a replay cannot hide under a new id."""
    exchange = Exchange()
    body = exchange.sealer.body(PLAINTEXT)
    head, begin = read_head(body)
    opener = RequestOpener(exchange.binding, exchange.psk, "req-2", exchange.key, head)
    with pytest.raises(CannotOpen):
        opener.open(body[begin:])


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "ä"])
def test_a_request_id_is_a_name(request_id: str) -> None:
    """An id that no header may have is refused at both ends."""
    exchange = Exchange()
    with pytest.raises(Malformed):
        RequestSealer(exchange.binding, exchange.psk, request_id)
    with pytest.raises(Malformed):
        RequestOpener(
            exchange.binding, exchange.psk, request_id, exchange.key, read_head(exchange.sealer.head)[0]
        )


def test_every_byte_of_the_head_counts() -> None:
    """Whatever byte of the head is changed, the request does not open."""
    exchange = Exchange()
    body = exchange.sealer.body(PLAINTEXT)
    for at in range(len(exchange.sealer.head)):
        for bit in (0x01, 0x80):
            changed = body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :]
            with pytest.raises(SealedError):
                opened(exchange, changed)


def three() -> tuple[Exchange, list[bytes]]:
    """Three framed chunks, the last of them the final one."""
    exchange = Exchange()
    stream = exchange.sealer.seal(b"one", final=False) + exchange.sealer.seal(b"two", final=False)
    return exchange, frames_of(stream + exchange.sealer.seal(b"three", final=True))


@pytest.mark.parametrize(
    "order",
    [[], [0], [0, 1], [1, 0, 2], [0, 2], [2], [0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 2, 0]],
    ids=lambda order: "-".join(map(str, order)) or "none",
)
def test_chunks_left_out_doubled_or_reordered(order: list[int]) -> None:
    """Only all chunks, in order, each once, are a request."""
    exchange, frames = three()
    opener, _ = exchange.opener(exchange.sealer.head)
    with pytest.raises((CannotOpen, StreamBroken)):
        opener.open(b"".join(frames[i] for i in order))


def test_cut_anywhere() -> None:
    """A request that is cut, at whatever byte, is broken."""
    exchange, frames = three()
    stream = b"".join(frames)
    for end in range(0, len(stream), 7):
        opener, _ = exchange.opener(exchange.sealer.head)
        with pytest.raises(StreamBroken):
            opener.open(stream[:end])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_forged_flags(place: int) -> None:
    """A flag that is changed ends nothing and hides no end."""
    exchange, frames = three()
    chunk = bytearray(frames[place])
    for flag in {0, 1, 2, 255} - {chunk[4]}:
        chunk[4] = flag
        opener, _ = exchange.opener(exchange.sealer.head)
        with pytest.raises(SealedError):
            opener.open(b"".join([*frames[:place], bytes(chunk), *frames[place + 1 :]]))


@pytest.mark.parametrize("more", [b"\0", b"\0\0\0\x01", frame(b"x" * 273)], ids=["byte", "length", "chunk"])
def test_nothing_behind_the_final_chunk(more: bytes) -> None:
    """Bytes behind the final chunk are refused, also when they come later."""
    exchange, frames = three()
    stream = b"".join(frames)
    opener, _ = exchange.opener(exchange.sealer.head)
    with pytest.raises(StreamBroken):
        opener.open(stream + more)
    opener, _ = exchange.opener(exchange.sealer.head)
    opener.feed(stream)
    with pytest.raises(StreamBroken):
        opener.feed(more)
    for final in (True, False):
        with pytest.raises(StreamBroken):
            exchange.sealer.seal(b"more", final=final)


def test_a_failure_is_the_end() -> None:
    """After one wrong chunk the right ones do not open either, and nothing is answered."""
    exchange, frames = three()
    opener, _ = exchange.opener(exchange.sealer.head)
    assert opener.feed(frames[0]) == b"one"
    with pytest.raises(CannotOpen):
        opener.feed(frames[2])
    for call in (lambda: opener.feed(frames[1]), opener.finish, opener.answer):
        with pytest.raises(StreamBroken):
            call()


def test_no_answer_before_the_end() -> None:
    """A request is answered when it is here in full."""
    exchange, frames = three()
    opener, _ = exchange.opener(exchange.sealer.head)
    opener.feed(frames[0])
    with pytest.raises(StreamBroken):
        opener.answer()
    opener.feed(frames[1] + frames[2])
    assert len(opener.answer().salt) == 32


def test_chunks_of_another_request() -> None:
    """A chunk from another request of the same session does not open, in whatever place."""
    exchange, frames = three()
    other = RequestSealer(exchange.binding, exchange.psk, "req-1")
    foreign = frames_of(other.seal(b"one", final=False) + other.seal(b"two", final=False))
    for mixed in ([foreign[0], *frames[1:]], [frames[0], foreign[1], frames[2]]):
        opener, _ = exchange.opener(exchange.sealer.head)
        with pytest.raises(CannotOpen):
            opener.open(b"".join(mixed))


def test_another_session() -> None:
    """A request cannot be moved to another session, whether its own worker or that session's reads it."""
    here, there = Exchange(), Exchange()
    body = here.sealer.body(PLAINTEXT)
    with pytest.raises(CannotOpen):
        there.opener(body)
    head, begin = read_head(body)
    fitting = Head(there.binding.session_id, there.binding.psk_id, head.enc)
    opener = RequestOpener(there.binding, there.psk, "req-1", there.key, fitting)
    with pytest.raises(CannotOpen):
        opener.open(body[begin:])


def test_an_answer_to_another_request() -> None:
    """The same worker's answer to another request does not open."""
    exchange = Exchange()
    first, chunks = exchange.opener(exchange.sealer.body(PLAINTEXT))
    first.open(chunks)
    other = RequestSealer(exchange.binding, exchange.psk, "req-2")
    answer = first.answer()
    (chunk,) = answer.seal(b"for the first", final=True)
    with pytest.raises(CannotOpen):
        other.answer(answer.salt).open(chunk)


def test_requests_are_fresh() -> None:
    """The same plaintext under the same id is other bytes each time, so enc tells a repeat from a replay."""
    exchange = Exchange()
    again = RequestSealer(exchange.binding, exchange.psk, exchange.request_id)
    assert exchange.sealer.body(PLAINTEXT) != again.body(PLAINTEXT)


def test_a_worker_key_of_low_order() -> None:
    """A client seals nothing to a key that anybody could compute the secret of."""
    exchange = Exchange()
    weak = replace(exchange.binding, worker_key=bytes(32))
    with pytest.raises(Malformed):
        RequestSealer(weak, exchange.psk, "req-1")
    with pytest.raises(CannotOpen):
        exchange.opener(Head(exchange.binding.session_id, exchange.binding.psk_id, bytes(32)).pack())
