import asyncio
import base64
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from gpu_worker import frames
from gpu_worker.history import Dropped, History, Reader
from gpu_worker.sealed_history import WITHHELD, SealedHistory
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.sealed.response import ResponseOpener, ResponseSealer

from .conftest import parse

FRAME = frames.text_delta("a")
END = frames.end("completed", usage={"tokens": 3})
SECRET = bytes(32)


def history(limit: int = 1 << 20) -> SealedHistory:
    return SealedHistory(limit, ResponseSealer(SECRET))


class Opened:
    """The clear text of the pieces that one reader was given, event by event."""

    def __init__(self) -> None:
        self.outer: list[tuple[int | None, str, dict[str, Any]]] = []
        self.clear = b""
        self._opener: ResponseOpener | None = None

    def take(self, data: bytes) -> bytes:
        """Returns what this piece adds."""
        before = len(self.clear)
        self.events(parse(data))
        return self.clear[before:]

    def events(self, events: list[tuple[int | None, str, dict[str, Any]]]) -> None:
        for event in events:
            self.outer.append(event)
            if event[1] != "sealed":
                continue
            piece = base64.b64decode(event[2]["data"])
            if self._opener is None:
                self._opener = ResponseOpener(SECRET, piece)
            else:
                self.clear += self._opener.open(piece)

    def close(self) -> None:
        assert self._opener is not None
        self._opener.close()


async def test_the_clear_text_is_what_a_plain_history_would_hold() -> None:
    """Frame by frame, number by number, to the byte, the end included."""
    sealed, plain = history(), History(1 << 20)
    for kept in (sealed, plain):
        for number in range(100):
            assert kept.add(frames.text_delta(f"{number} ")) is None
        kept.end(FRAME, END, status="completed")
    opened = Opened()
    with sealed.reader(0) as reader:
        opened.take(await reader.ready())
    opened.close()
    with plain.reader(0) as reader:
        assert opened.clear == await reader.ready()


async def test_all_that_is_ready_is_one_chunk() -> None:
    """However many events: sealing costs by the batch, and nobody can count them from outside."""
    sealed = history()
    opened = Opened()
    with sealed.reader(0) as reader:
        for _ in range(50):
            sealed.add(FRAME)
        opened.take(await reader.ready())
        reader.took()
        assert [number for number, _, _ in opened.outer] == [1, 2]
        sealed.add(FRAME)
        opened.take(await reader.ready())
    assert [(number, event) for number, event, _ in opened.outer] == [
        (1, "sealed"),
        (2, "sealed"),
        (3, "sealed"),
    ]
    assert [number for number, _, _ in parse(opened.clear)] == list(range(1, 52))


async def test_nothing_in_clear_leaves_it() -> None:
    """What readers get holds no piece of what was said: texts, codes and usage are inside alone."""
    sealed = history()
    with sealed.reader(0) as reader:
        sealed.add(frames.text_delta("canary-text"))
        sealed.pass_by(frames.progress("canary-stage", 1, 2))
        outer = await reader.ready()
        reader.took()
        sealed.end(frames.end("failed", ("canary_code", "canary-message")), status="failed")
        outer += await reader.ready()
    assert b"canary" not in outer
    assert parse(outer)[-1] == (
        4,
        "end",
        {
            "status": "failed",
            "error": {
                "code": "task_failed",
                "message": WITHHELD[1],
            },
        },
    )
    opened = Opened()
    opened.take(outer)
    assert [event for _, event, _ in parse(opened.clear)] == ["text_delta", "progress", "end"]


@pytest.mark.parametrize("status", ["completed", "cancelled"])
async def test_outside_an_end_says_its_status_alone(status: Any) -> None:
    """No usage; and the final chunk came before it."""
    sealed = history()
    sealed.end(END, status=status)
    opened = Opened()
    with sealed.reader(0) as reader:
        opened.take(await reader.ready())
        reader.took()
        assert await reader.ready() == b""
    assert opened.outer[-1][1:] == ("end", {"status": status})
    opened.close()
    assert parse(opened.clear) == [(1, "end", {"status": "completed", "usage": {"tokens": 3}})]


async def test_what_was_sealed_is_the_same_for_all_who_read_it() -> None:
    """Also for one that comes later, or takes up in the middle: a chunk is sealed once."""
    sealed = history()
    with sealed.reader(0) as reader:
        pieces = []
        for _ in range(3):
            sealed.add(FRAME)
            pieces.append(await reader.ready())
            reader.took()
    with sealed.reader(0) as late, sealed.reader(2) as middle:
        assert await late.ready() == b"".join(pieces)
        assert await middle.ready() == b"".join(pieces[1:])


STEPS = st.one_of(
    st.tuples(st.just("say"), st.integers(1, 700)),
    st.tuples(st.just("progress"), st.just(0)),
    st.tuples(st.sampled_from(("attach", "read", "took", "leave")), st.integers(0, 9)),
)


@given(st.sampled_from((3000, 1 << 20)), st.lists(STEPS, max_size=60))
def test_a_number_stands_for_the_same_bytes_for_ever(limit: int, steps: list[tuple[str, int]]) -> None:
    """Whoever attaches at whatever number, reads at whatever moment, or leaves in the middle; and together
    they open to what was said. Two texts sealed as one chunk would give both away."""
    asyncio.run(go_through(limit, steps))


async def go_through(limit: int, steps: list[tuple[str, int]]) -> None:
    sealed, readers, said = SealedHistory(limit, ResponseSealer(SECRET)), list[Reader](), list[str]()
    seen: dict[int, tuple[int | None, str, dict[str, Any]]] = {}

    async def read(reader: Reader) -> None:
        try:
            events = parse(await reader.ready())
        except Dropped:
            readers.remove(reader)
            reader.__exit__()
            return
        for event in events:
            assert event[0] is not None
            assert seen.setdefault(event[0], event) == event

    for step, number in steps:
        if step == "say":
            text = f"{len(said)} " + "x" * number
            if sealed.add(frames.text(text)) is None:
                said.append(text)
        elif step == "progress":
            sealed.pass_by(frames.progress("s", len(said), None))
        elif step == "attach":
            with contextlib.suppress(Dropped):
                readers.append(sealed.reader(max(0, sealed.last + 4 - number)).__enter__())
        elif readers:
            reader = readers[number % len(readers)]
            if step == "leave":
                readers.remove(reader)
                reader.__exit__()
            elif reader._busy:
                if step == "took":
                    reader.took()
            elif not reader.caught_up and reader._sent <= sealed.last:
                await read(reader)
    sealed.end(END, status="completed")
    readers.append(sealed.reader(sealed.oldest - 1).__enter__())
    await read(readers[-1])
    assert [*range(sealed.oldest, sealed.last + 1)] == [
        number for number in sorted(seen) if number >= sealed.oldest
    ]
    if len(seen) == sealed.last:
        opened = Opened()
        opened.events([seen[number] for number in sorted(seen)])
        opened.close()
        assert [data["text"] for _, event, data in parse(opened.clear) if event == "text"] == said
    else:
        assert limit == 3000


async def test_a_fork_seals_nothing() -> None:
    """It has the same key and the same next nonce as the process it came from, and other words to seal."""
    sealed = history()
    opened = Opened()
    with sealed.reader(0) as reader:
        sealed.add(FRAME)
        opened.take(await reader.ready())
        reader.took()
        assert fails_in_a_fork(functools.partial(sealed.end, FRAME, status="failed"))
        sealed.end(END, status="completed")
        opened.take(await reader.ready())
    opened.close()


def fails_in_a_fork(call: Callable[[], None]) -> bool:
    """Whether it raises RuntimeError in a child that this process forks."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except RuntimeError:
            os._exit(3)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


async def test_a_large_answer_is_several_chunks() -> None:
    """Each of a size that may be sealed, in order, and none of them too large for an event."""
    sealed = history(8 << 20)
    for _ in range(4):
        assert sealed.add(frames.text("x" * 900_000)) is None
    opened = Opened()
    with sealed.reader(0) as reader:
        data = await reader.ready()
    opened.take(data)
    assert len(opened.outer) > 12
    assert max(len(frame) for frame in data.split(b"\n\n")) < frames.MAX_FRAME
    assert [len(data["text"]) for _, _, data in parse(opened.clear)] == [900_000] * 4


async def test_unread_it_stays_within_its_bound_and_makes_its_writer_wait() -> None:
    """What waits in clear counts as what it will be when it is sealed."""
    sealed = history(20_000)
    while sealed.offer(FRAME):
        pass
    wait = sealed.add(FRAME)
    assert wait is not None
    opened = Opened()
    with sealed.reader(0) as reader:
        opened.take(await reader.ready())
        assert 10_000 < sealed.size <= 20_000
        while (wait := sealed.add(FRAME)) is None:
            pass
        reader.took()
        assert wait.done()
        assert sealed.add(FRAME) is None
    assert parse(opened.clear)[-1][0] == len(parse(opened.clear))


async def test_one_event_may_go_beyond_the_bound_when_all_is_taken() -> None:
    """A large one does not wait for ever, and the next one waits for its taking."""
    sealed = history(1000)
    opened = Opened()
    with sealed.reader(0) as reader:
        opened.take(await reader.ready())
        reader.took()
        assert sealed.add(frames.text("x" * 5000)) is None
        wait = sealed.add(FRAME)
        assert wait is not None
        opened.take(await reader.ready())
        reader.took()
        assert wait.done()
        assert sealed.add(FRAME) is None


async def test_a_reader_is_woken_by_what_is_in_clear() -> None:
    """Also by progress, which has no number."""
    sealed = history()
    opened = Opened()
    with sealed.reader(0) as reader:
        opened.take(await reader.ready())
        reader.took()
        for write in (sealed.add, sealed.pass_by):
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(reader.ready())
                await asyncio.sleep(0)
                assert not waiting.done()
                write(FRAME)
            assert FRAME in opened.take(waiting.result())
            reader.took()


async def test_progress_is_the_present_state() -> None:
    """Of several in a row the last counts, each keeps its place among the events, and nobody is told later
    what nobody watched."""
    sealed = history()
    opened = Opened()
    sealed.pass_by(b"event: progress\ndata: {}\n\n")
    with sealed.reader(0) as reader:
        for number in range(100):
            sealed.pass_by(frames.progress("s", number, None))
        sealed.add(FRAME)
        sealed.pass_by(frames.progress("s", 100, None))
        opened.take(await reader.ready())
    assert [(event, data.get("done")) for _, event, data in parse(opened.clear)] == [
        ("progress", 99),
        ("text_delta", None),
        ("progress", 100),
    ]


async def test_progress_finds_no_room_and_is_left_out() -> None:
    """It never waits, and never goes beyond the bound."""
    sealed = history(2000)
    opened = Opened()
    with sealed.reader(0) as reader:
        while sealed.offer(FRAME):
            pass
        sealed.pass_by(frames.progress("s", 1, None))
        assert b"progress" not in opened.take(await reader.ready())
        sealed.end(END, status="completed")
        sealed.pass_by(frames.progress("s", 1, None))
        opened.take(await reader.ready())
    opened.close()


async def test_flushed_when_what_was_in_clear_is_sent() -> None:
    """`unflushed` counts what is not sealed yet."""
    sealed = history()
    with sealed.reader(0) as reader:
        await reader.ready()
        reader.took()
        assert sealed.unflushed() is None
        sealed.add(FRAME)
        wait = sealed.unflushed()
        assert wait is not None
        await reader.ready()
        reader.took()
        assert wait.done()
        assert sealed.unflushed() is None


async def test_nothing_follows_the_end() -> None:
    """As for a plain task."""
    sealed = history()
    sealed.end(END, status="completed")
    sealed.end(END, status="completed")
    assert not sealed.offer(FRAME)
    with pytest.raises(RuntimeError, match="ended"):
        sealed.add(FRAME)


async def test_a_thread_writes_while_the_loop_reads() -> None:
    """No event is lost or doubled between a thread that waits for room and a reader on the loop."""
    sealed = history(5000)

    def write() -> None:
        for _ in range(3000):
            while (wait := sealed.add(FRAME)) is not None:
                wait.result()
        loop.call_soon_threadsafe(functools.partial(sealed.end, END, status="completed"))

    loop = asyncio.get_running_loop()
    thread = threading.Thread(target=write)
    thread.start()
    opened = Opened()
    with sealed.reader(0) as reader:
        while data := await reader.ready():
            opened.take(data)
            reader.took()
    thread.join()
    opened.close()
    assert [number for number, _, _ in parse(opened.clear)] == list(range(1, 3002))
