"""A worker that answers every request as a test says, a link to it, and a reader of its tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest

from gpu_server.drivers import worker_link
from gpu_server.drivers.worker_link import (
    WorkerLink,
)
from gpu_server.frames import FrameReader
from tests.app.played_worker import Call, frame

SESSION = "s_1"
BODY = orjson.dumps({"metadata": {"prompt": "p"}})
Handler = Callable[[Call], Awaitable[None]]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take as long as they take, but where a test is about that."""
    monkeypatch.setattr(worker_link, "_CALL", aiohttp.ClientTimeout(total=60))
    monkeypatch.setattr(worker_link, "_STREAM", aiohttp.ClientTimeout(total=None, sock_connect=60))


@dataclass
class Sink:
    """Keeps what a reader passes on."""

    bodies: list[bytes] = field(default_factory=list)
    notes: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def relay(self, bodies: list[bytes]) -> None:
        self.bodies += bodies

    def note(self, event: str, data: Mapping[str, Any]) -> None:
        self.notes.append((event, data))

    def miss(self, count: int) -> None:
        raise AssertionError(f"nobody said that {count} events are missed")


@dataclass
class Listening:
    """What a listening worker has seen."""

    link: WorkerLink
    calls: list[tuple[str, str, bytes]] = field(default_factory=list)
    connections: int = 0


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
                fields = {name: value.strip() for name, _, value in lines}
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                worker.calls.append((method, target, body))
                await handler(Call(method, target, body, writer, fields.get("content-type", "")))
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


class Heard(FrameReader):
    """A reader that tells when it has heard the task's end."""

    def __init__(self, seq: int = 0) -> None:
        self.sink, self.ended = Sink(), asyncio.Event()
        super().__init__(self.sink, seq)

    def feed(self, chunk: bytes) -> None:
        super().feed(chunk)
        if self.end is not None:
            self.ended.set()

    @property
    def deltas(self) -> list[str]:
        return [orjson.loads(body.split(b"data: ")[1])["delta"] for body in self.sink.bodies]
