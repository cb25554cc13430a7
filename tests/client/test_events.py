"""What the client makes of an event stream, in whatever pieces and of whatever quality it comes."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.client.events import MAX_FRAME_BYTES, EventParser, TaskEvent, Unreadable, read_events
from tests.client.test_service import EVENTS, FRAMES


class Body:
    """The body of an answer, of these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


@given(st.lists(st.integers(0, 400), max_size=8))
async def test_split_frames(cuts: list[int]) -> None:
    """Frames are read the same in whatever pieces they come, comments and blank lines between them."""
    raw = b": ping\n\n".join(FRAMES) + b": ping\n\n\n\n"
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges)]
    assert [event async for event in read_events(Body(pieces))] == EVENTS


async def test_half_a_frame() -> None:
    """What was cut off by the end of the stream is not given out."""
    assert [event async for event in read_events(Body([FRAMES[0] + FRAMES[2][:-1]]))] == EVENTS[:1]
    parser = EventParser()
    parser.feed(FRAMES[0])
    assert not parser.in_frame
    parser.feed(FRAMES[2][:-1])
    assert parser.in_frame


async def test_no_id() -> None:
    """An event without a number has none."""
    (event,) = [event async for event in read_events(Body([b"event: x\ndata: {}\n\n"]))]
    assert event.id is None


@pytest.mark.parametrize(
    "frame",
    [
        b"event: x\ndata: {",
        b"event: x\ndata: [1]",
        b"event: x\ndata: 1",
        b"data: {}",
        b"event: \xff\ndata: {}",
        b"id: one\nevent: x\ndata: {}",
        b"no field at all",
    ],
)
def test_what_is_no_event(frame: bytes) -> None:
    """What is no event of this service is told so, without being quoted."""
    with pytest.raises(Unreadable) as unreadable:
        EventParser().feed(frame + b"\n\n")
    assert unreadable.value.__cause__ is None
    assert frame.decode(errors="replace") not in str(unreadable.value)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Bytes of any kind are events, or nothing yet, or unreadable; never another error."""
    try:
        events = EventParser().feed(data + b"\n\n")
    except Unreadable:
        return
    assert all(isinstance(event, TaskEvent) for event in events)


def test_a_frame_without_end() -> None:
    """A frame that does not end is not kept for ever."""
    parser = EventParser()
    for _ in range(MAX_FRAME_BYTES // (1 << 20)):
        parser.feed(b"x" * (1 << 20))
    with pytest.raises(Unreadable, match="too long"):
        parser.feed(b"x")


def test_a_long_frame_in_small_pieces() -> None:
    """A frame that comes bit by bit costs about as much as one that comes at once: it is not copied, nor
    searched, from its beginning for each of them."""
    parser, piece = EventParser(), b"x" * 256
    began = time.process_time()
    for _ in range(MAX_FRAME_BYTES // len(piece)):
        parser.feed(piece)
    assert time.process_time() - began < 5  # here 0.02; more than a minute otherwise


def test_events_are_values() -> None:
    """Events can be compared and cannot be changed, and say whether they were sealed."""
    event: Any = EVENTS[0]
    assert event.sealed is False
    (inner,) = EventParser(sealed=True).feed(FRAMES[0])
    assert inner.sealed
    with pytest.raises(AttributeError):
        event.id = 2
