"""Chunks: padding in steps, cutting, and reading what comes in pieces."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.sealed.chunks import (
    FINAL,
    MAX_CHUNK,
    MAX_DATA,
    MAX_PADDED,
    MIN_CHUNK,
    MORE,
    STEP,
    ChunkReader,
    cut,
    frame,
    pad,
    parse,
    unpad,
)
from gpu_server.sealed.errors import Malformed, StreamBroken


@given(data=st.binary(max_size=1200))
def test_padding_comes_off(data: bytes) -> None:
    """What is padded has a multiple of 256 bytes, no step too many, and comes back as it was."""
    padded = pad(data)
    assert unpad(padded) == data
    assert len(padded) % STEP == 0
    assert len(padded) - len(data) < STEP + 4


@pytest.mark.parametrize(
    ("size", "padded"), [(0, 256), (252, 256), (253, 512), (MAX_DATA - 1, MAX_PADDED), (MAX_DATA, MAX_PADDED)]
)
def test_steps(size: int, padded: int) -> None:
    """Only the step that a size falls into is seen."""
    assert len(pad(bytes(size))) == padded


def test_too_much_for_a_chunk() -> None:
    """What does not fit into 256 KiB with its length is refused."""
    with pytest.raises(Malformed):
        pad(bytes(MAX_DATA + 1))


@pytest.mark.parametrize(
    "padded",
    [
        b"",
        bytes(3),
        bytes(255),
        pad(b"a")[:-1],
        pad(b"a") + b"\0",
        pad(b"a") + bytes(256),
        pad(b"a")[:-1] + b"\1",
        pad(b"a")[:5] + b"\1" + pad(b"a")[6:],
        b"\0\0\0\xfd" + bytes(252),
        b"\xff\xff\xff\xff" + bytes(252),
        MAX_DATA.to_bytes(4, "big") + bytes(MAX_DATA + 256),
        (MAX_DATA + 1).to_bytes(4, "big") + bytes(MAX_DATA + 256),
    ],
    ids=lambda padded: f"{len(padded)} bytes, {padded[:6].hex()}",
)
def test_wrong_padding(padded: bytes) -> None:
    """Only what `pad` gives is taken: nothing hides in the padding, and a plaintext has one form."""
    with pytest.raises(Malformed):
        unpad(padded)


@pytest.mark.parametrize("size", [0, 1, MAX_DATA - 1, MAX_DATA, MAX_DATA + 1, 3 * MAX_DATA])
def test_cutting(size: int) -> None:
    """A plaintext makes as many chunks as it needs; the last is the final one, and one there is always."""
    data = bytes(i & 255 for i in range(251)) * (size // 251 + 1)
    data = data[:size]
    pieces = list(cut(data, final=True))
    assert [flag for flag, _ in pieces] == [MORE] * (len(pieces) - 1) + [FINAL]
    assert len(pieces) == max(1, -(-size // MAX_DATA))
    assert b"".join(unpad(padded) for _, padded in pieces) == data
    assert [padded for _, padded in cut(data, final=False)] == [padded for _, padded in pieces if size]
    assert all(flag == MORE for flag, _ in cut(data, final=False))


@pytest.mark.parametrize("size", [0, 1, 17, MIN_CHUNK - 1, MIN_CHUNK + 1, MAX_CHUNK + 256])
def test_lengths_that_no_chunk_has(size: int) -> None:
    """A chunk's size is judged before anything is decrypted."""
    with pytest.raises(Malformed):
        parse(bytes(size))


@pytest.mark.parametrize("flag", [2, 0x7F, 0x80, 0xFF])
def test_flags_that_no_chunk_has(flag: int) -> None:
    """A flag is 0 or 1."""
    with pytest.raises(Malformed):
        parse(bytes([flag]) + bytes(MIN_CHUNK - 1))
    assert parse(FINAL + bytes(MIN_CHUNK - 1)) == (FINAL, bytes(MIN_CHUNK - 1))


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=50), max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=20),
)
def test_reading_in_pieces(chunks: list[bytes], cuts: list[int]) -> None:
    """However a stream is cut on its way, the same chunks come out."""
    stream = b"".join(frame(chunk) for chunk in chunks)
    places = sorted({0, len(stream), *(place for place in cuts if place < len(stream))})
    reader = ChunkReader()
    read = [chunk for begin, end in pairwise(places) for chunk in reader.feed(stream[begin:end])]
    reader.close()
    assert read == chunks


@settings(max_examples=50)
@given(cut_at=st.integers(1, 30))
def test_a_cut_stream(cut_at: int) -> None:
    """A stream that ends in the middle of a chunk, or of its length, is broken."""
    stream = frame(b"x" * 27)
    reader = ChunkReader()
    assert reader.feed(stream[:cut_at]) == []
    with pytest.raises(StreamBroken):
        reader.close()


@pytest.mark.parametrize("length", [0, MAX_CHUNK + 1, 2**31, 2**32 - 1])
def test_a_claimed_length_allocates_nothing(length: int) -> None:
    """A length that no chunk has is refused at once, and no memory is taken for it."""
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            ChunkReader().feed(length.to_bytes(4, "big") + bytes(100))
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_a_smaller_limit() -> None:
    """A reader with a limit of its own keeps it."""
    assert ChunkReader(5).feed(frame(b"12345")) == [b"12345"]
    with pytest.raises(Malformed):
        ChunkReader(5).feed(frame(b"123456"))
