"""The link to a worker over its real socket, with workers that behave, break off, and lie."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import socket
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from gpu_server.drivers import worker_link
from gpu_server.drivers.worker_link import (
    MAX_ANSWER_BYTES,
    LinkBroken,
    TaskRefused,
    WorkerHealth,
    WorkerLink,
)
from gpu_server.frames import FrameReader, ProtocolFault
from tests.app.played_worker import Call, end, frame

SESSION = "s_1"
BODY = orjson.dumps({"metadata": {"prompt": "p"}})
Handler = Callable[[Call], Awaitable[None]]


@dataclass
class Sink:
    """Keeps what a reader passes on."""

    bodies: list[bytes] = field(default_factory=list)
    notes: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def relay(self, bodies: list[bytes]) -> None:
        self.bodies += bodies

    def note(self, event: str, data: Mapping[str, Any]) -> None:
        self.notes.append((event, data))


@dataclass
class Listening:
    """What a listening worker has seen."""

    link: WorkerLink
    calls: list[tuple[str, str, bytes]] = field(default_factory=list)
    connections: int = 0


@pytest.fixture
def path() -> Iterator[str]:
    """A socket's path, short enough for its address."""
    with tempfile.TemporaryDirectory(prefix="link") as folder:
        yield str(Path(folder, "worker.sock"))


@asynccontextmanager
async def linked(path: str, *, uid: int | None = None) -> AsyncIterator[WorkerLink]:
    """A link that is closed behind the test."""
    link = WorkerLink(path, session_id=SESSION, uid=uid)
    try:
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def listening(path: str, handler: Handler, *, uid: int | None = None) -> AsyncIterator[Listening]:
    """A worker whose every answer is the handler's, and a link to it."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker.connections += 1
        try:
            while not writer.transport.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, target, _ = head.split(" ", 2)
                lines = (line.partition(":") for line in head.lower().splitlines())
                length = next((int(value) for name, _, value in lines if name == "content-length"), 0)
                body = await reader.readexactly(length)
                worker.calls.append((method, target, body))
                await handler(Call(method, target, body, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async with linked(path, uid=uid) as link:
        worker = Listening(link)
        server = await asyncio.start_unix_server(connected, path)
        try:
            yield worker
        finally:
            await link.close()
            server.close()


def answers(status: int, body: Any) -> Handler:
    """Every request gets this answer."""

    async def handler(call: Call) -> None:
        await call.answer(status, body)

    return handler


def streams(*chunks: bytes) -> Handler:
    """Every request gets this stream, ended properly."""

    async def handler(call: Call) -> None:
        await call.stream(*chunks)
        await call.done()

    return handler


def delta(number: int) -> bytes:
    return frame(number, "text_delta", delta=f"d{number}")


def health_answer(**changes: Any) -> dict[str, Any]:
    return {"status": "ready", "session_id": SESSION, "progress": None, "message": None, **changes}


# -- health -------------------------------------------------------------------------------------------------


async def test_health(path: str) -> None:
    """A worker that is ready says so; asking again takes the same connection."""
    async with listening(path, answers(200, health_answer())) as worker:
        expected = WorkerHealth(status="ready", message=None, stage=None, done=0, total=None)
        assert await worker.link.health() == expected
        assert await worker.link.health() == expected
        assert worker.calls == [("GET", "/health", b"")] * 2
        assert worker.connections == 1


async def test_health_tells_of_loading(path: str) -> None:
    """How far the loading is, and why it failed, are passed on."""
    progress = {"stage": "weights", "done": 1.5, "total": 7}
    async with listening(path, answers(200, health_answer(status="loading", progress=progress))) as worker:
        assert await worker.link.health() == WorkerHealth(
            status="loading", message=None, stage="weights", done=1.5, total=7
        )
    failed = health_answer(status="failed", message="no weights")
    async with listening(path + "2", answers(200, failed)) as worker:
        health = await worker.link.health()
        assert (health.status, health.message) == ("failed", "no weights")


@pytest.mark.parametrize("other", ["s_2", None, 1, [SESSION], ""])
async def test_health_of_another_session(path: str, other: Any) -> None:
    """A worker that answers for another session is not this one's."""
    async with listening(path, answers(200, health_answer(session_id=other))) as worker:
        with pytest.raises(ProtocolFault, match="another session"):
            await worker.link.health()


@pytest.mark.parametrize(
    "body",
    [b"", b"ready", b"{", b"\xff\xfe", b'{"status": "ready"', b"[" * 60_000, b'"\\ud800"', b"NaN"],
)
async def test_health_that_is_not_json(path: str, body: bytes) -> None:
    """Bytes that are no JSON are a fault, however deep or broken."""
    async with listening(path, answers(200, body)) as worker:
        with pytest.raises(ProtocolFault, match="not JSON"):
            await worker.link.health()


@pytest.mark.parametrize(
    "body",
    [
        [],
        None,
        "ready",
        1,
        {},
        health_answer(status="fine"),
        health_answer(status=None),
        health_answer(status=["ready"]),
        health_answer(status={"ready": 1}),
    ],
)
async def test_health_without_a_status(path: str, body: Any) -> None:
    """JSON that is no health answer is a fault."""
    async with listening(path, answers(200, body)) as worker:
        with pytest.raises(ProtocolFault, match="no valid status"):
            await worker.link.health()


@pytest.mark.parametrize("wrong", ["x", [1], {"a": 1}, True, None, 1, -1.5, 10**30, {"stage": {}}])
async def test_health_of_hostile_types(path: str, wrong: Any) -> None:
    """Fields of a wrong type are left out; what comes through has the type it promises."""
    progress = {"stage": wrong, "done": wrong, "total": wrong}
    for number, fields in enumerate(({"progress": wrong, "message": wrong}, {"progress": progress})):
        answer = json.dumps(health_answer(**fields)).encode()
        async with listening(f"{path}{number}", answers(200, answer)) as worker:
            health = await worker.link.health()
        assert health.status == "ready"
        assert health.message is None or type(health.message) is str
        assert health.stage is None or type(health.stage) is str
        assert isinstance(health.done, int | float)
        assert math.isfinite(health.done)
        assert health.total is None or math.isfinite(health.total)


async def test_health_texts_are_cut(path: str) -> None:
    """What a worker says of itself is kept to a length."""
    answer = health_answer(message="m" * 10_000, progress={"stage": "s" * 10_000})
    async with listening(path, answers(200, answer)) as worker:
        health = await worker.link.health()
        assert health.message is not None
        assert health.stage is not None
        assert (len(health.message), len(health.stage)) == (2000, 200)


@pytest.mark.parametrize("announced", [True, False])
async def test_an_endless_health_answer(path: str, announced: bool) -> None:
    """An answer is read up to its bound, whatever it announces, and not a moment longer."""
    sent = 0

    async def handler(call: Call) -> None:
        nonlocal sent
        how = b"Content-Length: 1000000000000" if announced else b"Transfer-Encoding: chunked"
        call._writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % how)
        while True:
            await call.send(b" " * 8192)
            sent += 8192

    async with listening(path, handler) as worker:
        with pytest.raises(ProtocolFault, match="longer than"):
            await worker.link.health()
    assert sent < 4 << 20  # what the sockets and the reader may hold


async def test_the_longest_health_answer(path: str) -> None:
    """An answer of just the permitted length is taken."""
    raw = orjson.dumps(health_answer()).ljust(MAX_ANSWER_BYTES)
    async with listening(path, answers(200, raw)) as worker:
        assert (await worker.link.health()).status == "ready"


async def test_health_of_nobody(path: str) -> None:
    """Without a socket, and with one that breaks off, the link is broken: that may pass."""
    async with linked(path) as link:
        with pytest.raises(LinkBroken):
            await link.health()

    async def cuts(call: Call) -> None:
        call.cut()

    async with listening(path, cuts) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.health()


@pytest.mark.parametrize(
    "head", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"]
)
async def test_health_that_is_not_http(path: str, head: bytes) -> None:
    """Something that does not speak HTTP, or without measure, is no worker yet."""

    async def handler(call: Call) -> None:
        call._writer.write(head)
        await call._writer.drain()

    async with listening(path, handler) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.health()


@pytest.mark.parametrize("begun", [True, False])
async def test_calls_have_a_deadline(path: str, begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that takes a call and never answers it, or never to the end, breaks the link."""
    monkeypatch.setattr(worker_link, "_CALL", aiohttp.ClientTimeout(total=0.05))
    hanging = asyncio.Event()

    async def handler(call: Call) -> None:
        if begun:
            await call.stream(b" ")
        await hanging.wait()

    async with listening(path, handler) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.health()
        if not begun:
            with pytest.raises(LinkBroken):
                await worker.link.cancel("t_1")
        hanging.set()


# -- who listens --------------------------------------------------------------------------------------------


async def test_listener(path: str) -> None:
    """The listener's uid is compared, where it is known, without a byte being sent."""
    async with listening(path, answers(200, {}), uid=os.geteuid()) as worker:
        worker.link.check_listener()
        assert worker.calls == []
    async with listening(path + "2", answers(200, {}), uid=None) as worker:
        worker.link.check_listener()
        assert worker.connections == 0


async def test_another_listens(path: str) -> None:
    """Another user's listener is a fault."""
    async with listening(path, answers(200, {}), uid=os.geteuid() + 1) as worker:
        with pytest.raises(ProtocolFault, match=f"uid {os.geteuid()} listens"):
            worker.link.check_listener()


@pytest.mark.parametrize("what", ["nothing", "a socket", "a file", "a full queue"])
async def test_nobody_listens(path: str, what: str) -> None:
    """Whatever is there, as long as it takes no connection at once the link is broken, and nothing waits."""
    with contextlib.ExitStack() as stack:
        if what == "a file":
            stack.enter_context(contextlib.closing(os.fdopen(os.open(path, os.O_CREAT))))
        elif what != "nothing":
            bound = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            bound.bind(path)
        if what == "a full queue":
            bound.listen(0)
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(path)
        async with linked(path, uid=os.geteuid()) as link:
            with pytest.raises(LinkBroken, match="nobody listens"):
                link.check_listener()


# -- tasks --------------------------------------------------------------------------------------------------


class Heard(FrameReader):
    """A reader that tells when it has heard the task's end."""

    def __init__(self) -> None:
        self.sink, self.ended = Sink(), asyncio.Event()
        super().__init__(self.sink)

    def feed(self, chunk: bytes) -> None:
        super().feed(chunk)
        if self.end is not None:
            self.ended.set()

    @property
    def deltas(self) -> list[str]:
        return [orjson.loads(body.split(b"data: ")[1])["delta"] for body in self.sink.bodies]


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


@pytest.mark.parametrize("status", [201, 204, 206, 302, 400, 404, 410, 500, 503])
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
        async with asyncio.timeout(5):
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


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- closing ------------------------------------------------------------------------------------------------


async def test_close(path: str) -> None:
    """Closing, also twice and with streams that were abandoned, leaves nothing open and warns of nothing."""
    before = open_descriptors()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        holding = asyncio.Event()

        async def handler(call: Call) -> None:
            await call.stream(delta(1))
            await holding.wait()

        async with listening(path, handler) as worker:
            reader = Heard()
            async with asyncio.TaskGroup() as group:
                running = group.create_task(worker.link.run("t_1", BODY, reader))
                while reader.seq < 1:  # noqa: ASYNC110  # the reader is in this loop too
                    await asyncio.sleep(0)
                running.cancel()
            await worker.link.close()
            await worker.link.close()
            holding.set()
        del worker, running
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
    assert [str(each.message) for each in warned] == []
    assert open_descriptors() == before
