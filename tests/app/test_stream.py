"""Histories of events: replay, then live, for any number of readers, within bounds."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.drivers.spool import Record, Spool
from gpu_server.frames import encode
from gpu_server.stream import MAX_WRITE_BYTES, Stream
from tests.app.reading import Event, all_events, next_events, parse
from tests.full_disk import no_room_beyond

BIG = 1 << 24


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "kept")
    spool.open()
    return spool


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


async def test_a_gap_behind_which_nothing_is() -> None:
    """A new reader hears at once what it has missed, also where nothing is kept that would tell; and then
    what is the present state."""
    stream = Stream(1000)
    reader = aiter(stream.read())
    fill(stream, 3)
    await anext(reader)
    for n in range(20):  # together they push everything else out
        stream.note("queue", {"position": n})
    expected = [Event(1, "gap", {"from": 2, "to": 3}), Event(3, "queue", {"position": 19})]
    assert await next_events(aiter(stream.read(1))) == expected


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


# -- the file ---------------------------------------------------------------------------------------------


async def test_what_is_seen_is_in_the_file(spool: Spool) -> None:
    """Every numbered event is there before a reader can have it, with whose it is; notes are not."""
    stream = Stream(BIG, file=spool.history("t_1", BIG))
    reader = aiter(stream.read())
    for own in (True, True, False, False, True):
        news = await waits(reader)
        if own:
            fill(stream, 1)
        else:
            stream.relay([encode("text", {"n": stream.last_id + k}) for k in (1, 2, 3)])
        *_, last = spool.read_history("t_1")
        assert last.own is own
        assert await news == last.data
        stream.note("queue", {})
        assert spool.read_history("t_1")[-1] == last
        await anext(reader)
    told = [(record.first, record.last, record.told) for record in spool.read_history("t_1")]
    assert told == [(1, 1, 1), (2, 2, 2), (3, 5, 2), (6, 8, 2), (9, 9, 3)]
    stream.close_file()
    stream.close_file()
    fill(stream, 1)
    assert len(spool.read_history("t_1")) == 5


async def test_a_full_disk_stops_no_stream(spool: Spool) -> None:
    """The fault is told once, the file keeps what it has, and the stream goes on as ever."""
    faults: list[OSError] = []
    stream = Stream(BIG, None, spool.history("t_1", BIG), faults.append)
    fill(stream, 2)
    with no_room_beyond(spool.history_bytes("t_1") + 50):
        fill(stream, 1)
    fill(stream, 2)
    stream.publish("task_finish", {})
    assert len(faults) == 1
    assert [record.first for record in spool.read_history("t_1")] == [1, 2]
    assert numbers(await all_events(stream)) == [1, 2, 3, 4, 5]


async def test_missed_events_keep_their_numbers() -> None:
    """Events that the worker dropped are a gap for those who read then and later; what comes behind them has
    the number that it would have had, and what was the present state is none any more."""
    stream = Stream(BIG)
    fill(stream, 2)
    stream.relay([encode("text", {"n": 3})])
    stream.note("progress", {})
    reader = aiter(stream.read())
    await anext(reader)
    stream.miss(5)
    assert stream.worker_seq == 6
    gap = Event(3, "gap", {"from": 4, "to": 8})
    assert (await next_events(aiter(stream.read(2))))[1:] == [gap]
    stream.relay([encode("text", {"n": 9})])
    for late in (reader, aiter(stream.read(3))):
        assert await next_events(late) == [gap, Event(9, "text", {"n": 9})]
    stream.publish("task_finish", {})
    stream.miss(1)
    assert stream.last_id == 10


async def test_a_note_behind_missed_events() -> None:
    """A reader hears of what it has missed before it gets a note with a number beyond."""
    stream = Stream(BIG)
    reader = aiter(stream.read())
    fill(stream, 1)
    await anext(reader)
    stream.miss(2)
    stream.note("progress", {})
    assert await next_events(reader) == [Event(1, "gap", {"from": 2, "to": 3}), Event(3, "progress", {})]


def test_the_workers_own_numbers() -> None:
    """`worker_seq` is what the worker called its last event, whatever the service said before and after."""
    stream = Stream(1000)
    assert stream.worker_seq == 0
    fill(stream, 3)
    assert stream.worker_seq == 0
    for n in range(1, 100):
        stream.relay([encode("text", {}), encode("text", {})])
        assert stream.worker_seq == 2 * n
    fill(stream, 1)
    stream.publish("task_finish", {})
    stream.relay([encode("text", {})])
    assert stream.worker_seq == 198


async def test_the_workers_frames() -> None:
    """Those of the worker's numbered events that are kept, as readers get them, and nothing else."""
    stream = Stream(2000)
    news = await waits(reader := stream.read())  # so that notes are kept too
    fill(stream, 2)
    assert stream.worker_frames() == b""
    stream.relay([encode("logs", {"line": "a"}), encode("text", {"text": "b"})])
    stream.note("progress", {})
    stream.relay([encode("logs", {"line": "c"})])
    fill(stream, 1)
    assert [(event.number, event.name) for event in parse(stream.worker_frames())] == [
        (3, "logs"),
        (4, "text"),
        (5, "logs"),
    ]
    for _ in range(100):
        stream.relay([encode("text", {})])
    kept = parse(stream.worker_frames())
    assert [event.number for event in kept] == list(range(107 - len(kept), 107))
    assert 1 < len(kept) < 10
    await news
    await reader.aclose()


# -- another life -----------------------------------------------------------------------------------------


def restored(records: list[Record], told: int = 0, max_bytes: int = BIG) -> Stream:
    stream = Stream(max_bytes)
    stream.restore(records, told)
    return stream


async def test_own_events_that_nobody_has_any_more() -> None:
    """They keep their numbers, so that the worker's events get theirs; readers hear of the gap."""
    lost = restored([], told=3)
    assert (lost.last_id, lost.worker_seq, lost.size) == (3, 0, 0)
    gap = Event(0, "gap", {"from": 1, "to": 3})
    assert await next_events(aiter(lost.read())) == [gap]
    lost.relay([encode("text", {"n": 4})])
    assert await next_events(aiter(lost.read())) == [gap, Event(4, "text", {"n": 4})]
    assert await next_events(aiter(lost.read(3))) == [Event(4, "text", {"n": 4})]

    partly = restored([Record(True, 1, 1, 1, b"id: 1\n" + encode("text", {"n": 1}))], told=3)
    assert (partly.last_id, partly.worker_seq) == (3, 0)
    partly.relay([encode("text", {"n": 4})])
    assert numbers(await next_events(aiter(partly.read()))) == [1, 4]


async def test_readers_can_be_closed() -> None:
    """Wherever a reader is, waiting or in the middle, it ends without an end of the task; so does one that
    comes later; and the stream goes on."""
    stream = Stream(BIG)
    fill(stream, 4, size=MAX_WRITE_BYTES)
    busy, waiting, unborn = stream.read(), stream.read(4), stream.read()
    await anext(busy)
    news = await waits(waiting)
    stream.close_readers()
    with pytest.raises(StopAsyncIteration):
        await news
    for reader in (busy, unborn, stream.read(), stream.read(4)):
        with pytest.raises(StopAsyncIteration):
            await anext(reader)
    assert not stream._readers
    stream.relay([encode("text", {})])
    stream.publish("task_finish", {})
    assert stream.last_id == 6
    assert await all_events(stream) == []


async def test_a_reader_that_knows_more_gets_the_end() -> None:
    """A client that has heard of events which are lost here gets none of those again that it has, and no note
    with a number before its own; but the end of the task it gets, also where that has such a number."""
    stream = restored([], told=1)
    early = await waits(aiter(stream.read(5)))
    stream.note("queue", {})
    late, further = await waits(aiter(stream.read(5))), await waits(aiter(stream.read(9)))
    stream.note("progress", {})
    stream.relay([encode("text", {"n": n}) for n in (2, 3, 4)])
    stream.relay([encode("text", {"n": n}) for n in (5, 6)])
    for news in (await early, await late, await anext(aiter(stream.read(5)))):
        assert parse(news) == [Event(6, "text", {"n": 6})]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not further.done()
    stream.publish("task_finish", {})
    end = [Event(7, "task_finish", {})]
    assert parse(await further) == end
    for after in (6, 8, 100):
        assert await all_events(stream, after) == end
    assert await all_events(stream, after=7) == []


LIVES = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from([0, 10, 300, 2000])),
    st.tuples(st.just("relay"), st.lists(st.sampled_from([0, 10, 300, 2000]), min_size=1, max_size=4)),
    st.tuples(st.just("miss"), st.integers(1, 5)),
    st.tuples(st.just("note"), st.just(0)),
    st.tuples(st.just("killed"), st.sampled_from(["waiting", "deciding", "writing"])),
)


@settings(max_examples=150)
@given(st.lists(LIVES, max_size=40), st.sampled_from([500, 3000, 1 << 20]), st.booleans())
async def test_another_life_shows_the_same(steps: list[tuple[str, Any]], bound: int, forgotten: bool) -> None:
    """Whatever is written, and however often the service is killed between: readers see, from wherever they
    begin, the same bytes as if nothing had happened, within the same bound."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "kept")
        spool.open()
        plain = Stream(bound)
        lived = Stream(bound, file=spool.history("t_1", bound))

        def another_life(killed: str) -> Stream:
            if killed == "deciding":
                lived.publish("text", {"text": "never decided"})
            lived.close_file()
            if killed == "writing":
                with (Path(folder) / "kept/t_1.events").open("ab") as torn:
                    torn.write(b"\0" * 30)
            file = spool.history("t_1", bound)
            file.cut(plain._told)
            stream = Stream(bound, file=file)
            stream.restore(file.read(), plain._told)
            if (missed := plain.worker_seq - stream.worker_seq) > 0:
                stream.miss(missed)  # as the worker's answer will tell
            return stream

        for step, value in [*steps, ("publish", None), ("killed", "waiting")]:
            if step == "killed":
                lived = another_life(value)
            for stream in (plain, lived):
                if step == "publish" and value is None:
                    stream.publish("task_finish", {})
                elif step == "publish":
                    stream.publish("text", {"text": "x" * value})
                elif step == "relay":
                    stream.relay([encode("text", {"text": "x" * size}) for size in value])
                elif step == "miss":
                    stream.miss(value)
                elif step == "note":
                    stream.note("queue", {})
            assert (lived.last_id, lived.worker_seq) == (plain.last_id, plain.worker_seq)
            assert (lived.finished, lived.size) == (plain.finished, plain.size)
        if forgotten:
            lived.close_file()
            spool.replace_history("t_1", plain.forget())
            lived = another_life("waiting")
        for after in range(plain.last_id + 3):
            expected = [chunk async for chunk in plain.read(after)]
            assert [chunk async for chunk in lived.read(after)] == expected
        lived.close_file()


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
