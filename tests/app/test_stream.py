"""Histories of events: replay, then live, for any number of readers, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.frames import encode
from gpu_server.stream import MAX_WRITE_BYTES, Stream, Streams
from tests.app.reading import Event, all_events, next_events, parse

BIG = 1 << 24


def fill(stream: Stream, count: int, size: int = 10) -> None:
    for _ in range(count):
        stream.publish("text", {"n": stream.last_id + 1, "text": "x" * size})


def numbers(events: list[Event]) -> list[int]:
    return [event.data["n"] for event in events if event.name == "text"]


async def waits(reader: AsyncIterator[bytes]) -> asyncio.Future[bytes]:
    """A reader that has nothing to read and waits: what it will get."""
    news = asyncio.get_running_loop().create_task(anext(reader))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not news.done()
    return news


async def test_replay_from_any_point() -> None:
    """A reader gets every event after the one it names, in order and without holes."""
    stream = Stream(BIG)
    fill(stream, 3)
    stream.relay([encode("text", {"n": n}) for n in (4, 5, 6)])
    fill(stream, 1)
    stream.publish("task_finish", {"status": "completed"})
    for after in range(9):
        events = await all_events(stream, after)
        assert numbers(events) == list(range(after + 1, 8))
        assert [event.number for event in events] == list(range(after + 1, 9))


async def test_live() -> None:
    """A reader that has read everything gets each further event as it comes, and the end."""
    stream = Stream(BIG)
    reader = aiter(stream.read())
    for _ in range(3):
        news = await waits(reader)
        fill(stream, 1)
        assert numbers(parse(await news)) == [stream.last_id]
    news = await waits(reader)
    stream.publish("task_finish", {})
    assert [event.name for event in parse(await news)] == ["task_finish"]
    with pytest.raises(StopAsyncIteration):
        await anext(reader)


async def test_what_is_ready_comes_at_once() -> None:
    """Everything that is ready goes out in one write, up to a bound."""
    stream = Stream(BIG)
    fill(stream, 100)
    reader = aiter(stream.read())
    assert numbers(await next_events(reader)) == list(range(1, 101))
    fill(stream, 10, size=MAX_WRITE_BYTES // 4)
    assert len(await next_events(reader)) == 4


async def test_readers_do_not_wait_for_each_other() -> None:
    """A reader that has stopped reading slows neither the writer nor another reader."""
    stream = Stream(BIG)
    stalled, quick = aiter(stream.read()), aiter(stream.read())
    fill(stream, 1)
    await anext(stalled)
    for n in range(1, 50):
        assert numbers(await next_events(quick)) == [n]
        fill(stream, 1)
    assert numbers(await next_events(stalled)) == list(range(2, 51))


async def test_gap() -> None:
    """A reader that has fallen out of the history hears exactly which events it has missed."""
    stream = Stream(64 * 1024)
    early = aiter(stream.read())
    fill(stream, 3)
    await anext(early)
    fill(stream, 100, size=8 * 1024)
    stream.publish("task_finish", {})
    kept = numbers(await all_events(stream, after=stream.last_id - 3))
    assert kept == [102, 103]
    for last, reader in ((0, aiter(stream.read())), (3, early), (50, aiter(stream.read(50)))):
        events = parse(b"".join([chunk async for chunk in reader]))
        gap, *rest = events
        assert (gap.name, gap.number) == ("gap", last)
        first = rest[0].number
        assert first is not None
        assert gap.data == {"from": last + 1, "to": first - 1}
        assert [event.number for event in rest] == list(range(first, stream.last_id + 1))


async def test_gap_before_a_note() -> None:
    """A note never goes out under the number of an event that its reader has missed and not heard of."""
    stream = Stream(64 * 1024)
    reader = aiter(stream.read())
    fill(stream, 1)
    await anext(reader)
    fill(stream, 1, size=100 * 1024)
    stream.note("progress", {})
    gap, note = await next_events(reader)
    assert (gap.name, gap.number, gap.data) == ("gap", 1, {"from": 2, "to": 2})
    assert (note.name, note.number) == ("progress", 2)
    fill(stream, 1)
    assert [event.number for event in await next_events(reader)] == [3]


async def test_notes_are_live() -> None:
    """An event without a number repeats the last number and goes to those who read."""
    stream = Stream(BIG)
    reader = aiter(stream.read())
    fill(stream, 2)
    await anext(reader)
    stream.note("queue", {"position": 1})
    assert await next_events(reader) == [Event(2, "queue", {"position": 1})]
    fill(stream, 1)
    assert [event.number for event in await next_events(reader)] == [3]


async def test_notes_show_the_present_state() -> None:
    """A new reader sees the latest note of each kind, until a numbered event makes them history."""
    stream = Stream(BIG)
    fill(stream, 1)
    for position in (3, 2):
        stream.note("queue", {"position": position})
    stream.note("progress", {"done": 1})
    present = [Event(1, "queue", {"position": 2}), Event(1, "progress", {"done": 1})]
    assert (await next_events(aiter(stream.read())))[1:] == present
    assert await next_events(aiter(stream.read(after=1))) == present
    fill(stream, 1)
    assert [event.name for event in await next_events(aiter(stream.read()))] == ["text", "text"]


async def test_notes_are_not_replayed() -> None:
    """A reader that comes later does not see the notes that an earlier reader saw."""
    stream = Stream(BIG)
    first = aiter(stream.read())
    fill(stream, 1)
    await anext(first)
    stream.note("queue", {"position": 1})
    await anext(first)
    fill(stream, 1)
    assert numbers(await next_events(aiter(stream.read()))) == [1, 2]
    stream.publish("task_finish", {})
    assert [event.name for event in await all_events(stream)] == ["text", "text", "task_finish"]


async def test_a_newer_note_has_the_last_word() -> None:
    """A reader that is busy with a long replay does not get an old note behind a newer one."""
    stream = Stream(BIG)
    fill(stream, 3, size=MAX_WRITE_BYTES)
    stream.note("queue", {"position": 2})
    reader = aiter(stream.read())
    await anext(reader)
    stream.note("queue", {"position": 1})
    positions = []
    while positions[-1:] != [1]:
        positions += [event.data["position"] for event in await next_events(reader) if event.name == "queue"]
    assert positions in ([1], [2, 1])


async def test_a_finished_stream_takes_nothing_more() -> None:
    """After `task_finish` nothing is added, whoever writes."""
    stream = Stream(BIG)
    stream.publish("task_finish", {})
    stream.publish("task_finish", {})
    stream.relay([encode("text", {"text": "late"})])
    stream.note("progress", {})
    assert [event.name for event in await all_events(stream)] == ["task_finish"]
    assert await all_events(stream, after=1) == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    """Nothing is kept for a reader that has gone, even one that left in the middle."""
    stream = Stream(BIG)
    fill(stream, 1)
    reader = stream.read()
    await anext(reader)
    assert len(stream._readers) == 1
    await reader.aclose()
    assert not stream._readers
    size = stream.size
    stream.note("queue", {})
    assert stream.size == size


async def test_memory_is_bounded() -> None:
    """However much is written, what is kept stays within the bound plus the last piece."""
    stream = Stream(100_000)
    reader = aiter(stream.read())
    for n in range(2000):
        stream.relay([encode("text", {"n": n, "text": "x" * (n % 500)})])
        stream.note("progress", {"done": n})
        assert stream.size <= 100_000 + 1000
        assert len(stream._segments) < 2 * 100_000 / 160
    kept = sum(len(segment.data) for segment in stream._segments[stream._head :])
    assert kept <= stream.size
    await reader.aclose()


def test_forgotten_bytes_are_given_back() -> None:
    """The count of all streams together goes back to nothing when they are forgotten."""
    streams = Streams(max_bytes_each=10_000, max_bytes_total=1 << 20)
    for name in "abc":
        fill(streams.open(name), 100, size=200)
    assert streams.kept_bytes > 20_000
    for name in "abc":
        streams.forget(name)
        streams.forget(name)
    assert streams.kept_bytes == 0
    assert len(streams) == 0
    assert streams.get("a") is None


async def test_the_oldest_finished_is_dropped_first() -> None:
    """When all together are too large, finished streams lose their history, the first one first."""
    streams = Streams(max_bytes_each=1 << 20, max_bytes_total=250_000)
    live = streams.open("live")
    fill(live, 10, size=10_000)
    for name in ("first", "second", "third"):
        stream = streams.open(name)
        fill(stream, 6, size=10_000)
        stream.publish("task_finish", {"n": 7})
        streams.finished(name)
    assert streams.kept_bytes <= 250_000

    async def kept(name: str) -> list[str]:
        stream = streams.get(name)
        assert stream is not None
        return [event.name for event in await all_events(stream)]

    assert await kept("first") == ["gap", "task_finish"]
    assert await kept("second") == await kept("third") == ["text"] * 6 + ["task_finish"]
    assert len(numbers(await next_events(aiter(live.read())))) == 10


async def test_a_forgotten_stream_is_read_to_its_end() -> None:
    """A reader that is there when the retention ends reads the rest."""
    streams = Streams(max_bytes_each=BIG, max_bytes_total=BIG)
    stream = streams.open("t")
    fill(stream, 4, size=MAX_WRITE_BYTES)
    stream.publish("task_finish", {})
    reader = aiter(stream.read())
    await anext(reader)
    streams.forget("t")
    rest = parse(b"".join([chunk async for chunk in reader]))
    assert [event.number for event in rest] == [2, 3, 4, 5]


# -- any history ------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 10, 300, 2000])
STEPS = st.one_of(
    st.tuples(st.just("publish"), SIZES),
    st.tuples(st.just("relay"), st.lists(SIZES, min_size=1, max_size=4)),
    st.tuples(st.just("note"), st.sampled_from(["queue", "progress"])),
    st.tuples(st.just("open"), st.integers(0, 12)),
    st.tuples(st.just("read"), st.integers(0, 3)),
    st.tuples(st.just("leave"), st.integers(0, 3)),
)


@dataclass
class Reader:
    """A client that checks what it gets, one event at a time."""

    stream: AsyncIterator[bytes]
    last: int
    came_at: int | None = None
    seen: list[Event] = field(default_factory=list)

    def take(self, events: list[Event], written: list[int], notes: list[tuple[int, str]]) -> None:
        for event in events:
            if event.name == "gap":
                assert event.number == self.last
                assert event.data["from"] == self.last + 1
                assert event.data["to"] >= event.data["from"]
                self.last = event.data["to"]
            elif event.name in ("queue", "progress"):
                # Never under another number than the last one the reader has, and never from the past.
                assert event.number == self.last
                assert notes[event.data["serial"]] == (event.number, event.name)
                assert self.came_at is not None
                assert event.number >= self.came_at
            else:
                assert event.number == self.last + 1
                assert event.data["size"] == len(event.data["text"]) == written[self.last]
                self.last += 1
            self.seen.append(event)


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=40), st.sampled_from([500, 3000, 1 << 20]))
async def test_any_history(steps: list[tuple[str, Any]], bound: int) -> None:
    """Whatever is written and read in whatever order, each reader sees what a plain list would show it."""
    stream = Stream(bound)
    written: list[int] = []
    notes: list[tuple[int, str]] = []
    readers: list[Reader] = []
    try:
        for step, value in steps:
            if step == "publish":
                written.append(value)
                stream.publish("text", {"size": value, "text": "x" * value})
            elif step == "relay":
                written.extend(value)
                stream.relay([encode("text", {"size": size, "text": "x" * size}) for size in value])
            elif step == "note":
                notes.append((len(written), value))
                stream.note(value, {"serial": len(notes) - 1})
            elif step == "open" and len(readers) < 4:
                after = min(value, len(written))
                readers.append(Reader(aiter(stream.read(after)), after))
            elif step == "read" and value < len(readers):
                await _read_what_is_there(readers[value], stream, written, notes)
            elif step == "leave" and value < len(readers):
                await readers.pop(value).stream.aclose()
            assert stream.last_id == len(written)
        stream.publish("task_finish", {})
        for reader in readers:
            events = parse(b"".join([chunk async for chunk in reader.stream]))
            assert events.pop() == Event(len(written) + 1, "task_finish", {})
            reader.take(events, written, notes)
            assert reader.last == len(written)
            serials = [event.data["serial"] for event in reader.seen if "serial" in event.data]
            for name in ("queue", "progress"):
                own = [serial for serial in serials if notes[serial][1] == name]
                assert own == sorted(set(own))
            if bound == 1 << 20:
                assert all(event.name != "gap" for event in reader.seen)
    finally:
        for reader in readers:
            await reader.stream.aclose()


async def _read_what_is_there(
    reader: Reader, stream: Stream, written: list[int], notes: list[tuple[int, str]]
) -> None:
    """One write, if there is anything to read; a reader that would wait is left alone."""
    if reader.last < len(written):
        if reader.came_at is None:
            reader.came_at = len(written)
        reader.take(await next_events(reader.stream), written, notes)
