"""Tasks over the link to a worker: given, taken up again, cancelled; workers behave, break off, and lie."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpu_server.drivers import worker_link
from gpu_server.drivers.worker_link import (
    MAX_ANSWER_BYTES,
    EventsDropped,
    LinkBroken,
    TaskRefused,
    TaskUnknown,
    WorkerNotReady,
)
from gpu_server.frames import ProtocolFault
from tests.app.played_worker import Call, end, frame
from tests.drivers.listening_worker import (
    BODY,
    Heard,
    answers,
    delta,
    health_answer,
    linked,
    listening,
    patient,
    streams,
)

__all__ = ["patient"]


@pytest.fixture
def path() -> Iterator[str]:
    """A socket's path, short enough for its address."""
    with tempfile.TemporaryDirectory(prefix="link") as folder:
        yield str(Path(folder, "worker.sock"))


async def test_run(path: str) -> None:
    """A task's body goes to the worker, its events come to the reader, and the connection is used again."""
    frames = delta(1) + frame(None, "progress", stage="s", done=1, total=None) + delta(2)
    async with listening(path, streams(frames[:30], frames[30:], end(3, usage={"n": 2}))) as worker:
        for task_id in ("t_1", "t_2"):
            reader = Heard()
            await worker.link.run(task_id, BODY, reader)
            assert reader.deltas == ["d1", "d2"]
            assert reader.sink.notes == [("progress", {"stage": "s", "done": 1, "total": None})]
            assert reader.end == ("completed", None, {"n": 2})
            assert reader.seq == 3
        assert worker.calls == [("POST", f"/tasks/{task_id}", BODY) for task_id in ("t_1", "t_2")]
        assert worker.connections == 1


async def test_attach(path: str) -> None:
    """A stream that broke in the middle of a frame is asked for behind the last whole one."""

    async def handler(call: Call) -> None:
        if call.method == "POST":
            await call.stream(delta(1), delta(2), delta(3)[:15])
        else:
            await call.stream(delta(3), end(4))
        await call.done()

    async with listening(path, handler) as worker:
        reader = Heard()
        with pytest.raises(LinkBroken, match="ended before the task"):
            await worker.link.run("t_1", BODY, reader)
        assert (reader.seq, reader.end) == (2, None)
        await worker.link.attach("t_1", reader)
        assert worker.calls[1] == ("GET", "/tasks/t_1/events?after=2", b"")
        assert reader.deltas == ["d1", "d2", "d3"]
        assert reader.end is not None


async def test_accepted(path: str) -> None:
    """That the worker has the task is told once, when it has answered and before its first event."""
    seen: list[int] = []

    async def handler(call: Call) -> None:
        await call.stream()
        while not seen:  # noqa: ASYNC110  # the link is in this loop too
            await asyncio.sleep(0)
        await call.send(delta(1), end(2))
        await call.done()

    async with listening(path, handler) as worker:
        reader = Heard()
        await worker.link.run("t_1", BODY, reader, lambda: seen.append(reader.seq))
        again = Heard()
        seen.clear()
        await worker.link.attach("t_1", again, lambda: seen.append(again.seq))
        assert (seen, reader.seq, again.seq) == ([0], 2, 2)


@pytest.mark.parametrize("status", [400, 404, 410, 503])
async def test_not_accepted(path: str, status: int) -> None:
    """A worker that refuses, or breaks off before it has answered, has not taken the task."""
    seen: list[str] = []

    async def cuts(call: Call) -> None:
        call.cut()

    for number, handler in enumerate((answers(status, {"oldest": 2}), cuts)):
        async with listening(f"{path}{number}", handler) as worker:
            with pytest.raises((TaskRefused, EventsDropped, LinkBroken)):
                await worker.link.run("t_1", BODY, Heard(), lambda: seen.append("accepted"))
    assert seen == []


async def test_attaching_in_another_life(path: str) -> None:
    """A reader that begins behind event n asks for what comes behind it."""
    async with listening(path, streams(delta(8), end(9))) as worker:
        reader = Heard(7)
        await worker.link.attach("t_1", reader)
        assert worker.calls == [("GET", "/tasks/t_1/events?after=7", b"")]
        assert (reader.deltas, reader.seq) == (["d8"], 9)


async def test_an_unknown_task(path: str) -> None:
    """A worker that does not know the task to attach to is told apart from one that refuses."""
    async with listening(path, answers(404, {})) as worker:
        with pytest.raises(TaskUnknown):
            await worker.link.attach("t_1", Heard())
        with pytest.raises(TaskRefused) as refused:
            await worker.link.run("t_1", BODY, Heard())
        assert not isinstance(refused.value, TaskUnknown)


async def test_a_worker_that_is_not_ready(path: str) -> None:
    """A worker that takes no task now is told apart from one that refuses this one."""
    async with listening(path, answers(503, {})) as worker:
        with pytest.raises(WorkerNotReady):
            await worker.link.run("t_1", BODY, Heard())
        with pytest.raises(TaskRefused) as refused:
            await worker.link.attach("t_1", Heard())
        assert not isinstance(refused.value, WorkerNotReady)


@pytest.mark.parametrize("oldest", [6, 10**15 - 1])
async def test_dropped_events(path: str, oldest: int) -> None:
    """A worker that has dropped events says where they begin again, to a task sent twice as well."""
    async with listening(path, answers(410, {"error": "gone", "oldest": oldest})) as worker:
        with pytest.raises(EventsDropped) as dropped:
            await worker.link.attach("t_1", reader := Heard(4))
        assert (dropped.value.oldest, reader.seq) == (oldest, 4)
        with pytest.raises(EventsDropped):
            await worker.link.run("t_1", BODY, Heard())


@pytest.mark.parametrize(
    "body",
    [
        *({"oldest": oldest} for oldest in (5, 4, 1, 0, -6, 10**15, 6.0, "6", True, None, [6])),
        b'{"oldest": 1%b}' % (b"0" * 50_000),
        {"error": "gone"},
        [6],
        b"gone",
        b"",
        b"[" * 60_000,
        b'{"oldest": 6}'.ljust(MAX_ANSWER_BYTES + 1),
    ],
)
async def test_dropped_events_that_are_none(path: str, body: Any) -> None:
    """An answer that does not say, in bounds, where the events begin behind the last one taken is a fault."""
    async with listening(path, answers(410, body)) as worker:
        with pytest.raises(ProtocolFault):
            await worker.link.attach("t_1", Heard(4))


async def test_dropped_events_have_a_deadline(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that never gets to the end of such an answer breaks the link."""
    monkeypatch.setattr(worker_link, "_CALL", aiohttp.ClientTimeout(total=0.05))
    hanging = asyncio.Event()

    async def handler(call: Call) -> None:
        call._writer.write(b"HTTP/1.1 410 X\r\nContent-Length: 20\r\n\r\n{")
        await hanging.wait()

    async with listening(path, handler) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.attach("t_1", Heard(4))
        hanging.set()


@pytest.mark.parametrize("status", [201, 204, 206, 302, 400, 404, 500, 503])
async def test_refused(path: str, status: int) -> None:
    """Everything but 200 is a refusal, and its body is not looked at."""
    body = b"" if status == 204 else delta(1) + end(2)
    async with listening(path, answers(status, body)) as worker:
        reader = Heard()
        with pytest.raises(TaskRefused, match=f"{status} to POST"):
            await worker.link.run("t_1", BODY, reader)
        with pytest.raises(TaskRefused, match=f"{status} to GET"):
            await worker.link.attach("t_1", reader)
        assert (reader.seq, reader.end) == (0, None)


@pytest.mark.parametrize("when", ["at once", "after the head", "in the stream"])
async def test_a_connection_that_breaks(path: str, when: str) -> None:
    """A connection that breaks is told apart from a task that fails; what came before has been read."""
    reader = Heard()

    async def handler(call: Call) -> None:
        if when != "at once":
            await call.stream()
        if when == "in the stream":
            await call.send(delta(1))
            while reader.seq < 1:  # noqa: ASYNC110  # the reader is in this loop too
                await asyncio.sleep(0)
        call.cut()

    async with listening(path, handler) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.run("t_1", BODY, reader)
        assert reader.deltas == (["d1"] if when == "in the stream" else [])
        with pytest.raises(LinkBroken):
            await worker.link.attach("t_1", Heard())


async def test_run_without_a_worker(path: str) -> None:
    """Without a socket the link is broken."""
    async with linked(path) as link:
        with pytest.raises(LinkBroken):
            await link.run("t_1", BODY, Heard())
        with pytest.raises(LinkBroken):
            await link.attach("t_1", Heard())


async def test_a_stream_without_end(path: str) -> None:
    """A response that ends properly without the task's end is a broken link."""
    for number, chunks in enumerate(([], [delta(1)], [delta(1)[:10]])):
        async with listening(f"{path}{number}", streams(*chunks)) as worker:
            with pytest.raises(LinkBroken, match="ended before the task"):
                await worker.link.run("t_1", BODY, Heard())


async def test_an_end_that_is_held_open(path: str) -> None:
    """The task's end does not wait for the response's; a connection so left is not used again."""
    holding = asyncio.Event()

    async def handler(call: Call) -> None:
        if call.method == "GET":
            await call.answer(200, health_answer())
            return
        await call.stream(delta(1), end(2))
        await holding.wait()

    async with listening(path, handler) as worker:
        reader = Heard()
        async with asyncio.timeout(20):
            await worker.link.run("t_1", BODY, reader)
        assert reader.end is not None
        assert not holding.is_set()
        assert (await worker.link.health()).status == "ready"
        assert worker.connections == 2
        holding.set()


async def test_a_connection_that_breaks_after_the_end(path: str) -> None:
    """Once the task has ended, how its connection ends is nobody's business."""
    reader = Heard()

    async def handler(call: Call) -> None:
        await call.stream(end(1))
        await reader.ended.wait()
        call.cut()

    async with listening(path, handler) as worker:
        await worker.link.run("t_1", BODY, reader)
        assert reader.end is not None


@pytest.mark.parametrize(
    ("what", "late"),
    [
        *((what, late) for what in (delta(2), end(2), b"junk\n\n") for late in (False, True)),
        (b"x", True),  # half a frame in one piece with the end is not looked at
    ],
)
async def test_bytes_after_the_end(
    path: str, what: bytes, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that goes on behind its task's end is out of line, in the same piece or a later one."""
    monkeypatch.setattr(worker_link, "LAST_BYTE_SECONDS", 20)
    reader = Heard()

    async def handler(call: Call) -> None:
        await call.stream(end(1) if late else end(1) + what)
        if late:
            await reader.ended.wait()
            await call.send(what)

    async with listening(path, handler) as worker:
        with pytest.raises(ProtocolFault):
            await worker.link.run("t_1", BODY, reader)


async def test_what_the_reader_refuses(path: str) -> None:
    """A fault in the stream comes out as it is, and the worker's connection is closed on it."""
    closed = asyncio.Event()

    async def handler(call: Call) -> None:
        await call.stream(delta(1), delta(3))
        try:
            while True:
                await call.send(delta(4))
        except ConnectionError:
            closed.set()

    async with listening(path, handler) as worker:
        reader = Heard()
        with pytest.raises(ProtocolFault, match="3 came after 1"):
            await worker.link.run("t_1", BODY, reader)
        assert reader.deltas == ["d1"]
        async with asyncio.timeout(20):
            await closed.wait()


async def test_a_stream_has_no_deadline(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may be silent for longer than any call may take."""
    monkeypatch.setattr(worker_link, "_CALL", aiohttp.ClientTimeout(total=0.01))

    async def handler(call: Call) -> None:
        await call.stream(delta(1))
        await asyncio.sleep(0.1)
        await call.send(end(2))
        await call.done()

    async with listening(path, handler) as worker:
        reader = Heard()
        await worker.link.run("t_1", BODY, reader)
        assert reader.end is not None


# -- cancelling ---------------------------------------------------------------------------------------------


async def test_cancel(path: str) -> None:
    """A cancel goes beside the stream of its task, on a connection of its own."""
    cancelled = asyncio.Event()

    async def handler(call: Call) -> None:
        if call.method == "DELETE":
            await call.answer(202, {})
            cancelled.set()
            return
        await call.stream(delta(1))
        await cancelled.wait()
        await call.send(end(2, "cancelled"))
        await call.done()

    async with listening(path, handler) as worker, asyncio.TaskGroup() as group:
        reader = Heard()
        running = group.create_task(worker.link.run("t_1", BODY, reader))
        while reader.seq < 1:  # noqa: ASYNC110  # the reader is in this loop too
            await asyncio.sleep(0)
        await worker.link.cancel("t_1")
        await running
        assert reader.end is not None
        assert reader.end[0] == "cancelled"
        assert worker.calls[1] == ("DELETE", "/tasks/t_1", b"")
        assert worker.connections == 2


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_cancel_refused(path: str, status: int) -> None:
    """A worker that does not know the task yet says so, and may be asked again."""
    async with listening(path, answers(status, {})) as worker:
        with pytest.raises(TaskRefused, match=f"{status} to DELETE"):
            await worker.link.cancel("t_1")


async def test_cancel_without_a_worker(path: str) -> None:
    """A cancel that reaches nobody says so."""
    async with linked(path) as link:
        with pytest.raises(LinkBroken, match="not delivered"):
            await link.cancel("t_1")


async def test_a_sealed_task_says_what_it_is(path: str) -> None:
    """A task goes out under the media type that it was given with."""
    seen: list[str] = []

    async def handler(call: Call) -> None:
        seen.append(call.media_type)
        await call.answer(400, {})

    async with listening(path, handler) as worker:
        for media_type in ("application/json", "application/vnd.gpu-server.sealed"):
            with pytest.raises(TaskRefused) as refused:
                await worker.link.run("t_1", BODY, Heard(), media_type=media_type)
            assert refused.value.status == 400
    assert seen == ["application/json", "application/vnd.gpu-server.sealed"]


@pytest.mark.parametrize(("method", "refusal"), [("POST", TaskRefused), ("GET", ProtocolFault)])
async def test_nothing_is_kept_of_a_task(path: str, method: str, refusal: type[Exception]) -> None:
    """A 410 to a task that names no event: it ran, under this id or another, and its answer is gone. A worker
    that was following it may not say that."""
    async with listening(path, answers(410, {"error": "gone", "code": "gone"})) as worker:
        link = worker.link
        asked = link.run("t_1", BODY, Heard()) if method == "POST" else link.attach("t_1", Heard(4))
        with pytest.raises(refusal):
            await asked
