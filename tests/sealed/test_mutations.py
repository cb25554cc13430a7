"""Bytes from elsewhere, mutated by the thousand: one family of errors, and no memory for mere claims."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_server.sealed import canonical, delivery, frames
from gpu_server.sealed.chunks import ChunkReader, parse, unpad
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.frames import Code, FrameReader, Op
from gpu_server.sealed.grant import WorkerKey, open_grant, seal_grant
from gpu_server.sealed.request import RequestOpener, RequestSealer, read_head
from gpu_server.sealed.response import ResponseOpener, ResponseSealer
from tests.sealed.exchange import ARN, binding

EXAMPLES = 1200
"""Of each parser; with the parsers below, more than ten thousand mutated inputs a run."""

SALT, SECRET = b"s" * 32, b"e" * 32

# Everything is fixed, so that an example that hypothesis finds can be tried again.
KEY = WorkerKey(X25519PrivateKey.from_private_bytes(b"w" * 32))
BINDING = binding(worker_key=KEY.public)
PSK = BINDING.psk(b"d" * 32)
EPHEMERAL = X25519PrivateKey.from_private_bytes(b"e" * 32)
SEALER = RequestSealer(BINDING, PSK, "req-1", _ephemeral=EPHEMERAL)
CHUNKS = SEALER.seal(b"a" * 300, final=False) + SEALER.seal(b"b" * 20, final=True)
BODY = SEALER.head + CHUNKS
HEAD, BEGIN = read_head(BODY)
GRANT = seal_grant(BINDING, b"d" * 32, _ephemeral=EPHEMERAL)
DELIVERY = delivery.pack(
    tenant="acme",
    pool="chat",
    kms_key_arn=ARN,
    request_id="req-1",
    epoch=BINDING.epoch,
    wrapped_key=BINDING.wrapped_key,
    grant=GRANT,
    body=BODY,
)
ANSWER = ResponseSealer(SECRET, SALT).seal(b"answer", final=True)[0]
ASKED = frames.encode_request(Op.GRANT, 9, ["acme", "chat", ARN, "sess_1", b"k" * 32, b"w" * 99, b"c" * 500])
TOLD = frames.encode_reply(9, Code.OK, [b"d" * 700, "ready"])
NESTED = canonical.encode([1, "text", b"bytes", [2**64 - 1, 23, 24, [256, ["", b""]]], "ü" * 30])


def framed(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    reader.close()


def chunked(data: bytes) -> None:
    reader = ChunkReader()
    for chunk in reader.feed(data):
        parse(chunk)
    reader.close()


def opened(data: bytes) -> bytes:
    head, begin = read_head(data)
    return RequestOpener(BINDING, PSK, "req-1", KEY, head).open(data[begin:])


def delivered(data: bytes) -> bytes:
    found = delivery.unpack(data)
    bound = found.binding(BINDING.session_id, KEY.public)
    psk = open_grant(bound, found.grant, KEY)
    head, begin = read_head(found.body)
    return RequestOpener(bound, psk, found.request_id, KEY, head).open(found.body[begin:])


def canonically(data: bytes) -> None:
    assert canonical.encode(canonical.decode(data)) == data


PARSERS: dict[str, tuple[Callable[[bytes], Any], bytes, bool]] = {
    "canonical": (canonically, NESTED, False),
    "head": (read_head, SEALER.head, False),
    "chunks": (chunked, CHUNKS, False),
    "padding": (unpad, (20).to_bytes(4, "big") + b"x" * 20 + bytes(232), False),
    "frames": (framed, ASKED + TOLD, False),
    "enclave request": (frames.decode_request, ASKED[4:], False),
    "enclave reply": (frames.decode_reply, TOLD[4:], False),
    "grant": (lambda data: open_grant(BINDING, data, KEY), GRANT, True),
    "request": (opened, BODY, True),
    "response": (lambda data: ResponseOpener(SECRET, SALT).open(data), ANSWER, True),
    "delivery": (delivered, DELIVERY, True),
}
"""The parser, a seed that it takes, and whether it is sealed: then no other bytes at all are taken."""


def _replaced(at: int, new: bytes, data: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _inserted(at: int, new: bytes, data: bytes) -> bytes:
    return data[:at] + new + data[at:]


def _removed(at: int, count: int, data: bytes) -> bytes:
    return data[:at] + data[at + count :]


def _repeated(at: int, count: int, data: bytes) -> bytes:
    return data[: at + count] + data[at:]


def _flipped(at: int, bit: int, data: bytes) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if at < len(data) else data


LENGTHS = [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1", b"\0\1\0\0", b"\0\4\0\x11"]
HEADS = [b"\x9b" + b"\xff" * 8, b"\x5a\xff\xff\xff\xff", b"\x9f", b"\xd8\x23", b"\xa0", b"\xf6", b"\x81" * 9]


def mutations(size: int) -> st.SearchStrategy[list[Callable[[bytes], bytes]]]:
    """One to four changes of a seed of `size` bytes."""
    at = st.integers(0, size - 1)
    piece = st.binary(min_size=1, max_size=8) | st.sampled_from(LENGTHS) | st.sampled_from(HEADS)
    count = st.integers(1, 300)
    one = (
        st.builds(lambda a, b: partial(_flipped, a, b), at, st.integers(0, 7))
        | st.builds(lambda a, b: partial(_replaced, a, b), at, piece)
        | st.builds(lambda a, b: partial(_inserted, a, b), at, piece)
        | st.builds(lambda a, b: partial(_removed, a, b), at, count)
        | st.builds(lambda a, b: partial(_repeated, a, b), at, count)
    )
    return st.lists(one, min_size=1, max_size=4)


@pytest.mark.parametrize("name", PARSERS)
def test_the_seed_is_taken(name: str) -> None:
    """What is mutated below is good as it stands."""
    parser, seed, _ = PARSERS[name]
    parser(seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_mutated(name: str) -> None:
    """A parser takes mutated bytes or raises the family's errors; a sealed one takes none."""
    parser, seed, is_sealed = PARSERS[name]

    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=mutations(len(seed)))
    def run(changes: list[Callable[[bytes], bytes]]) -> None:
        data = seed
        for change in changes:
            data = change(data)
        try:
            parser(data)
        except SealedError:
            return
        assert not is_sealed or data == seed

    run()


@pytest.mark.parametrize("name", PARSERS)
def test_claims_allocate_nothing(name: str) -> None:
    """A length of gigabytes, wherever it stands in a message, costs no more than the message does."""
    parser, seed, _ = PARSERS[name]
    tracemalloc.start()
    try:
        for claim in (*LENGTHS, *HEADS):
            for at in range(min(len(seed), 220)):
                with suppress(SealedError):
                    parser(_replaced(at, claim, seed))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", PARSERS)
def test_anything(name: str) -> None:
    """Bytes that were never a message raise the family's errors too."""
    parser, _, is_sealed = PARSERS[name]

    @settings(max_examples=200, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.binary(max_size=700))
    def run(data: bytes) -> None:
        try:
            parser(data)
        except SealedError:
            return
        assert not is_sealed

    run()
