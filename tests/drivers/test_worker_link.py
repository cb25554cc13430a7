"""The link to a worker over its real socket, with workers that behave, break off, and lie."""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    Path(path).unlink(missing_ok=True)
    failed = health_answer(status="failed", message="no weights")
    async with listening(path, answers(200, failed)) as worker:
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
    raw = orjson.dumps if not isinstance(wrong, int) else lambda data: repr(data).encode()
    progress = {"stage": wrong, "done": wrong, "total": wrong}
    for fields in ({"progress": wrong, "message": wrong}, {"progress": progress}):
        answer = orjson.dumps(health_answer(**fields)) if wrong != 10**30 else _huge(fields)
        async with listening(path, answers(200, answer)) as worker:
            health = await worker.link.health()
        Path(path).unlink(missing_ok=True)
        assert health.status == "ready"
        assert health.message is None or type(health.message) is str
        assert health.stage is None or type(health.stage) is str
        assert isinstance(health.done, int | float)
        assert math.isfinite(health.done)
        assert health.total is None or math.isfinite(health.total)
    assert raw


async def test_health_texts_are_cut(path: str) -> None:
    """What a worker says of itself is kept to a length."""
    answer = health_answer(message="m" * 10_000, progress={"stage": "s" * 10_000})
    async with listening(path, answers(200, answer)) as worker:
        health = await worker.link.health()
        assert health.message is not None
        assert health.stage is not None
        assert (len(health.message), len(health.stage)) == (2000, 200)
