"""The streams of all tasks: one bound for all, and another life that goes on with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_server.drivers.spool import Spool
from gpu_server.frames import encode
from gpu_server.stream import MAX_WRITE_BYTES, Stream
from gpu_server.streams import Streams
from tests.app.reading import Event, all_events, next_events, parse
from tests.full_disk import no_room_beyond

BIG = 1 << 24

Life = Callable[..., Streams]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def spool(root: Path) -> Spool:
    spool = Spool(root)
    spool.open()
    return spool


@pytest.fixture
def life(spool: Spool, root: Path) -> Life:
    """Streams as each life of the service makes them."""

    def begin(max_bytes_each: int = BIG, max_bytes_total: int = BIG) -> Streams:
        spool = Spool(root)
        spool.open()
        return Streams(max_bytes_each=max_bytes_each, max_bytes_total=max_bytes_total, spool=spool)

    return begin


def fill(stream: Stream, count: int, size: int = 10) -> None:
    for _ in range(count):
        stream.publish("text", {"n": stream.last_id + 1, "text": "x" * size})


def relay(stream: Stream, count: int, size: int = 10) -> None:
    for _ in range(count):
        stream.relay([encode("text", {"n": stream.last_id + 1, "text": "x" * size})])


def finish(streams: Streams, task_id: str) -> None:
    stream = streams.get(task_id)
    assert stream is not None
    stream.publish("task_finish", {"n": stream.last_id + 1})
    streams.finished(task_id)


def end(streams: Streams, task_id: str, count: int = 6, size: int = 10) -> Stream:
    """A task from its beginning to its end, with two events of the service's own."""
    stream = streams.open(task_id)
    fill(stream, 1)
    relay(stream, count, size)
    finish(streams, task_id)
    return stream


async def kept(streams: Streams, task_id: str) -> list[str]:
    stream = streams.get(task_id)
    assert stream is not None
    return [event.name for event in await all_events(stream)]


def open_files(root: Path) -> list[str]:
    """The files of a spool that this process holds open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the one that listed them
    return [link for link in links if link.startswith(f"{root}/")]


# -- the bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spooled", [False, True])
def test_forgotten_bytes_are_given_back(life: Life, spool: Spool, spooled: bool) -> None:
    """The count of all streams together goes back to nothing when they are forgotten, and nothing is left."""
    streams = life(10_000) if spooled else Streams(max_bytes_each=10_000, max_bytes_total=BIG)
    for name in "abc":
        fill(streams.open(name), 100, size=200)
    assert streams.kept_bytes > 20_000
    for name in "abc":
        streams.forget(name)
        streams.forget(name)
    assert streams.kept_bytes == 0
    assert len(streams) == 0
    assert streams.get("a") is None
    assert spool.known() == set()


@pytest.mark.parametrize("spooled", [False, True])
async def test_the_oldest_finished_is_dropped_first(life: Life, spooled: bool) -> None:
    """When all together are too large, finished streams lose their history, the first one first; in the
    spool too."""
    bounds = {"max_bytes_each": 1 << 20, "max_bytes_total": 250_000}
    streams = life(**bounds) if spooled else Streams(**bounds)
    live = streams.open("live")
    fill(live, 10, size=10_000)
    for name in ("first", "second", "third"):
        end(streams, name, 6, size=10_000)
    assert streams.kept_bytes <= 250_000
    whole = ["text"] * 7 + ["task_finish"]

    assert await kept(streams, "first") == ["gap", "task_finish"]
    assert await kept(streams, "second") == await kept(streams, "third") == whole
    assert len(await next_events(aiter(live.read()))) == 10
    if spooled:
        another = life()
        for name in ("first", "second", "third"):
            assert another.restore_ended(name, told=2)
        assert await kept(another, "first") == ["gap", "task_finish"]
        assert await kept(another, "second") == await kept(another, "third") == whole


async def test_a_forgotten_stream_is_read_to_its_end(life: Life) -> None:
    """A reader that is there when the retention ends reads the rest."""
    streams = life()
    stream = streams.open("t")
    fill(stream, 4, size=MAX_WRITE_BYTES)
    stream.publish("task_finish", {})
    reader = aiter(stream.read())
    await anext(reader)
    streams.forget("t")
    rest = parse(b"".join([chunk async for chunk in reader]))
    assert [event.number for event in rest] == [2, 3, 4, 5]


# -- tasks that go on -------------------------------------------------------------------------------------


async def test_another_life_goes_on(life: Life, root: Path) -> None:
    """A task's events are all there, and the next ones have the next numbers, in one life after the other."""
    streams = life()
    stream = streams.open("t")
    fill(stream, 2)
    for n in range(1, 5):
        relay(stream, n)
        before = stream
        stream = life().restore_live("t", told=2)
        assert (stream.last_id, stream.worker_seq) == (before.last_id, before.worker_seq)
        assert await next_events(aiter(stream.read())) == await next_events(aiter(before.read()))
        before.close_file()
    fill(stream, 1)
    assert stream.last_id == 13


async def test_what_was_not_decided_is_not_shown(life: Life) -> None:
    """Events of the service's own that no decision has counted are gone, and their numbers free again."""
    stream = life().open("t")
    fill(stream, 1)
    relay(stream, 2)
    stream.publish("task_finish", {"status": "undecided"})
    streams = life()
    again = streams.restore_live("t", told=1)
    assert (again.last_id, again.finished) == (3, False)
    again.publish("task_finish", {"status": "decided"})
    streams.finished("t")
    another = life()
    assert another.restore_ended("t", told=2)
    restored = another.get("t")
    assert restored is not None
    assert (await all_events(restored, 3)) == [Event(4, "task_finish", {"status": "decided"})]


@pytest.mark.parametrize("spooled", [False, True])
def test_a_live_task_without_its_history(life: Life, spooled: bool) -> None:
    """Only the numbers of the service's own events are known, and that is enough for those of the worker."""
    streams = life() if spooled else Streams(max_bytes_each=BIG, max_bytes_total=BIG)
    stream = streams.restore_live("t", told=3)
    assert streams.get("t") is stream
    relay(stream, 1)
    assert (stream.last_id, stream.worker_seq) == (4, 1)


# -- tasks that have ended --------------------------------------------------------------------------------


async def test_ended_tasks_are_read_when_asked_for(life: Life) -> None:
    """Until then a history counts with what the spool has of it, and from then on as one of this life."""
    before = life()
    stream = end(before, "t", 20)
    streams = life()
    assert not streams.restore_ended("other", told=2)
    assert streams.restore_ended("t", told=2)
    assert len(streams) == 1
    spooled = streams.kept_bytes
    assert 0 < spooled < stream.size
    read = streams.get("t")
    assert read is not None
    assert streams.get("t") is read
    assert streams.kept_bytes == read.size == stream.size
    assert await all_events(read) == await all_events(stream)
    streams.forget("t")
    assert (streams.kept_bytes, len(streams)) == (0, 0)
    assert not life().restore_ended("t", told=2)


def test_without_a_spool_nothing_is_restored() -> None:
    """Then an ended task has no stream in another life."""
    streams = Streams(max_bytes_each=BIG, max_bytes_total=BIG)
    assert not streams.restore_ended("t", told=2)
    assert streams.get("t") is None
    assert streams.fault is None


async def test_a_history_without_its_end_is_none(life: Life, spool: Spool) -> None:
    """A reader of it would wait for ever, so there is no stream, and the rest of it goes too."""
    stream = life().open("t")
    fill(stream, 1)
    relay(stream, 3)
    streams = life()
    assert streams.restore_ended("t", told=2)
    assert streams.get("t") is None
    assert (streams.kept_bytes, len(streams)) == (0, 0)
    assert spool.known() == set()


def test_a_history_that_has_vanished(life: Life, root: Path) -> None:
    """Somebody has removed the file: there is no stream, and it counts no more."""
    end(life(), "t")
    streams = life()
    assert streams.restore_ended("t", told=2)
    (root / "t.events").unlink()
    assert streams.get("t") is None
    assert (streams.kept_bytes, len(streams)) == (0, 0)


def test_a_history_that_cannot_be_read_now(life: Life, root: Path) -> None:
    """It is not there for the one who asks, and is once it can be read again."""
    end(life(), "t")
    streams = life()
    assert streams.restore_ended("t", told=2)
    (root / "t.events").rename(root / "away")
    (root / "t.events").symlink_to("away")
    assert streams.get("t") is None
    (root / "away").rename(root / "t.events")
    assert streams.get("t") is not None


async def test_the_bound_holds_in_another_life(life: Life) -> None:
    """Many histories of an earlier life stay within the bound, in the spool and when they are all read; none
    loses its end."""
    before = life()
    names = [f"t{n}" for n in range(30)]
    for name in names:
        end(before, name, 5, size=2000)
    streams = life(BIG, 100_000)
    for name in names:
        assert streams.restore_ended(name, told=2)
        assert streams.kept_bytes <= 100_000
    shown = []
    for name in names:
        shown.append(await kept(streams, name))
        assert streams.kept_bytes <= 100_000
    assert shown[0] == ["gap", "task_finish"]
    assert shown[-1] == ["text"] * 6 + ["task_finish"]
    assert all(events[-1] == "task_finish" for events in shown)
    for name in names:
        streams.forget(name)
    assert (streams.kept_bytes, len(streams)) == (0, 0)


# -- the spool --------------------------------------------------------------------------------------------


def test_files_are_open_as_long_as_the_task(life: Life, root: Path) -> None:
    """A descriptor for each live task, and none for one that has ended or is forgotten."""
    streams = life()
    for name in "abc":
        fill(streams.open(name), 1)
    assert len(open_files(root)) == 3
    finish(streams, "a")
    streams.forget("b")
    assert open_files(root) == [f"{root}/c.events"]
    finish(streams, "c")
    streams = life()
    assert streams.restore_ended("a", told=2)
    assert streams.get("a") is not None
    assert open_files(root) == []


async def test_a_full_spool(life: Life, spool: Spool) -> None:
    """Streams go on in memory, and it is told; what has only a beginning in the spool goes with the task's
    end; the next stream that can be written is the end of the fault."""
    streams = life()
    assert streams.fault is None
    stream = streams.open("t")
    fill(stream, 1, size=100_000)  # so that what is logged about it does not pass the bound
    with no_room_beyond(spool.history_bytes("t")):
        relay(stream, 3)
        assert streams.fault is not None
    other = streams.open("o")
    fill(other, 1)
    assert spool.fault is None
    assert streams.fault is not None  # one history is not all there
    assert spool.known() == {"t", "o"}
    assert life().restore_live("t", told=1).worker_seq == 0
    finish(streams, "t")
    assert spool.known() == {"o"}
    assert await kept(streams, "t") == ["text"] * 4 + ["task_finish"]


async def test_a_history_is_mended(life: Life, spool: Spool) -> None:
    """What could not be written is written when there is room again, so that another life has all of it."""
    streams = life()
    stream = streams.open("t")
    fill(stream, 1, size=100_000)
    with no_room_beyond(spool.history_bytes("t")):
        relay(stream, 3)
        streams.mend()
        assert streams.fault is not None
    streams.mend()
    assert streams.fault is None
    relay(stream, 2)
    finish(streams, "t")
    expected = await kept(streams, "t")
    other = life()
    assert other.restore_ended("t", told=2)
    assert await kept(other, "t") == expected


async def test_a_file_that_cannot_be_opened(life: Life, spool: Spool, root: Path) -> None:
    """A new task and one that is taken up both go on in memory."""
    (root / "t.events").mkdir()
    streams = life()
    for stream, expected in ((streams.open("t"), 1), (streams.restore_live("t", told=3), 4)):
        assert streams.fault is not None
        fill(stream, 1)
        assert stream.last_id == expected
    streams.open("o")
    assert spool.fault is None
    assert streams.fault is not None
    streams.mend()  # which cannot help
    assert streams.fault is not None
    assert streams.get("t") is stream


def test_a_file_that_cannot_be_cut(life: Life, root: Path) -> None:
    """A task that is taken up goes on in memory, with the numbers that are known."""
    fill(life().open("t"), 2)
    (root / "t.events.old").symlink_to("t.events")
    stream = life().restore_live("t", told=2)
    relay(stream, 1)
    assert (stream.last_id, stream.worker_seq) == (3, 1)


# -- the end ----------------------------------------------------------------------------------------------


async def test_no_stream_is_read_after_the_end(life: Life) -> None:
    """When the readers are closed, so are those of streams that are opened, taken up or read later."""
    end(life(), "ended")
    streams = life()
    assert streams.restore_ended("ended", told=2)
    early = streams.open("early")
    fill(early, 1)
    streams.close_readers()
    fill(streams.open("late"), 1)
    streams.restore_live("live", told=1)
    for name in ("early", "late", "live", "ended"):
        assert await kept(streams, name) == []
    fill(early, 1)
    assert life().restore_live("early", told=2).last_id == 2
