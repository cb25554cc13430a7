import asyncio
import functools
import threading

import pytest
from gpu_worker.history import Dropped, History

FRAME = b"event: text\ndata: {}\n\n"  # 28 bytes with a one-digit id


def ids(data: bytes) -> list[int]:
    return [int(line[4:]) for line in data.split(b"\n") if line.startswith(b"id: ")]


def fill(history: History) -> int:
    """Add until there is no room; returns how many were kept."""
    kept = 0
    while history.offer(FRAME):
        kept += 1
    return kept


async def test_frames_are_numbered_without_holes() -> None:
    """Ids are 1, 2, 3, in the order of adding."""
    history = History(10_000)
    for _ in range(5):
        assert history.add(FRAME) is None
    with history.reader(0) as reader:
        assert ids(await reader.ready()) == [1, 2, 3, 4, 5]


async def test_all_that_is_ready_comes_at_once() -> None:
    """A reader that was away gets everything in one piece, and then waits."""
    history = History(10_000)
    with history.reader(0) as reader:
        history.add(FRAME)
        history.add(FRAME)
        assert len(ids(await reader.ready())) == 2
        reader.took()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(reader.ready())
            await asyncio.sleep(0)
            assert not waiting.done()
            history.add(FRAME)
        assert ids(waiting.result()) == [3]


async def test_a_full_history_of_untaken_frames_makes_its_writer_wait() -> None:
    """Nothing untaken is dropped: adding gives a future, which is done when a reader took something."""
    history = History(1000)
    kept = fill(history)
    wait = history.add(FRAME)
    assert wait is not None
    assert history.last == kept
    assert history.oldest == 1
    with history.reader(0) as reader:
        await reader.ready()
        assert history.add(FRAME) is not None
        reader.took()
        assert wait.done()
        assert history.add(FRAME) is None


async def test_taken_frames_go_oldest_first_when_room_is_needed() -> None:
    """What was taken is kept until room is needed; then asking for it raises Dropped."""
    history = History(1000)
    kept = fill(history)
    with history.reader(0) as reader:
        await reader.ready()
        reader.took()
    assert history.oldest == 1
    history.add(FRAME)
    oldest = history.oldest
    assert 1 < oldest < kept
    assert history.size <= 1000
    with pytest.raises(Dropped) as caught:
        history.reader(oldest - 2)
    assert caught.value.oldest == oldest
    with history.reader(oldest - 1) as reader:
        assert ids(await reader.ready()) == list(range(oldest, kept + 2))


async def test_the_newest_taken_frames_are_kept_for_a_reader_that_dies() -> None:
    """An eighth of the bound stays, though it was taken: it may have been on its way when the reader died."""
    history = History(8000)
    kept = fill(history)
    with history.reader(0) as reader:
        await reader.ready()
        reader.took()
    fill(history)
    with history.reader(history.oldest - 1) as reader:
        still_there = [number for number in ids(await reader.ready()) if number <= kept]
    assert 1000 <= len(still_there) * len(b"id: 100\n" + FRAME) < 1100


async def test_one_frame_may_go_beyond_the_bound_when_all_is_taken() -> None:
    """A frame larger than the bound does not wait for ever."""
    history = History(100)
    assert history.add(b"x" * 500) is None
    assert history.add(FRAME) is not None


async def test_a_slower_reader_hears_that_its_frames_were_dropped() -> None:
    """One reader's taking can drop what another has not read; it is told, and never given a hole."""
    history = History(1000)
    fill(history)
    with history.reader(0) as quick, history.reader(0) as slow:
        await quick.ready()
        quick.took()
        fill(history)
        with pytest.raises(Dropped):
            await slow.ready()


async def test_attaching_after_n_says_that_n_was_taken() -> None:
    """A host that asks for what follows N has N, so the frames up to N may be dropped."""
    history = History(1000)
    kept = fill(history)
    with history.reader(kept):
        assert history.offer(FRAME)


async def test_passing_frames_keep_their_place_and_are_not_replayed() -> None:
    """Unnumbered frames reach the readers of the moment between the numbered ones, and nobody later."""
    history = History(1000)
    with history.reader(0) as reader:
        history.add(FRAME)
        history.pass_by(b"PROGRESS")
        history.add(FRAME)
        assert await reader.ready() == b"id: 1\n" + FRAME + b"PROGRESS" + b"id: 2\n" + FRAME
    with history.reader(0) as reader:
        assert b"PROGRESS" not in await reader.ready()


async def test_passing_frames_are_bounded() -> None:
    """A reader that does not read costs at most 64 of them; the oldest go."""
    history = History(1000)
    with history.reader(0) as reader:
        for number in range(100):
            history.pass_by(b"<%d>" % number)
        assert (await reader.ready()).startswith(b"<36>")


async def test_the_end_needs_no_room_and_is_the_last() -> None:
    """A full history still takes its end, readers see the end of the stream, and nothing follows."""
    history = History(1000)
    kept = fill(history)
    history.end(b"END", status="completed")
    history.end(b"AGAIN", status="failed")
    with history.reader(kept) as reader:
        assert (await reader.ready()).endswith(b"END")
        reader.took()
        assert await reader.ready() == b""
    assert not history.offer(FRAME)
    with pytest.raises(RuntimeError, match="ended"):
        history.add(FRAME)


async def test_flushed_when_every_reader_was_sent_everything() -> None:
    """`unflushed` is None without readers, and a future while one is behind."""
    history = History(1000)
    history.add(FRAME)
    assert history.unflushed() is None
    with history.reader(0) as reader:
        wait = history.unflushed()
        assert wait is not None
        await reader.ready()
        assert history.unflushed() is not None
        reader.took()
        assert wait.done()
        assert history.unflushed() is None


async def test_a_thread_writes_while_the_loop_reads() -> None:
    """No frame is lost or doubled between a thread that waits for room and a reader on the loop."""
    history = History(2000)

    def write() -> None:
        for _ in range(3000):
            while (wait := history.add(FRAME)) is not None:
                wait.result()
        loop.call_soon_threadsafe(functools.partial(history.end, FRAME, status="completed"))

    loop = asyncio.get_running_loop()
    thread = threading.Thread(target=write)
    thread.start()
    seen: list[int] = []
    with history.reader(0) as reader:
        while data := await reader.ready():
            seen += ids(data)
            reader.took()
    thread.join()
    assert seen == list(range(1, 3002))
