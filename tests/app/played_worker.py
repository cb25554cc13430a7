"""A worker of the `http` contract played inside the test: well behaved, or hostile to order.

It speaks HTTP/1.1 by hand over the real Unix socket, so that a test decides about every byte and every
connection.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from gpu_server.frames import encode


def frame(number: int | None, event: str, **data: Any) -> bytes:
    """One frame of the contract."""
    head = b"" if number is None else b"id: %d\n" % number
    return head + encode(event, data)


def end(number: int, status: str = "completed", **more: Any) -> bytes:
    """The frame that ends a task."""
    return frame(number, "end", status=status, **more)


@dataclass
class Call:
    """One request that the worker got, and its answer in the making."""

    method: str
    path: str
    body: bytes
    _writer: asyncio.StreamWriter
    media_type: str = ""

    async def answer(self, status: int, body: Any) -> None:
        """A whole JSON answer."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        self._writer.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(raw), raw)
        )
        await self._writer.drain()

    async def stream(self, *chunks: bytes) -> None:
        """Begin an event stream, and send some bytes of it."""
        self._writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        await self.send(*chunks)

    async def send(self, *chunks: bytes) -> None:
        """Some more bytes of the stream."""
        for chunk in chunks:
            self._writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        await self._writer.drain()

    async def done(self) -> None:
        """The stream's proper end."""
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def cut(self) -> None:
        """Break the connection."""
        self._writer.transport.abort()


TaskScript = Callable[["PlayedWorker", Call], Awaitable[None]]


async def echo(worker: PlayedWorker, call: Call) -> None:
    """One delta with the task's prompt, then the end."""
    prompt = orjson.loads(call.body)["metadata"].get("prompt", "")
    await call.stream(frame(1, "text_delta", delta=prompt) + end(2))
    await call.done()


async def hold(worker: PlayedWorker, call: Call) -> None:
    """Send one delta, and end the task when the test says so: completed, or cancelled by DELETE."""
    await call.stream(frame(1, "text_delta", delta="held"))
    await worker.released.wait()
    await call.send(end(2, "cancelled" if worker.cancelled else "completed"))
    await call.done()


def delta(number: int) -> bytes:
    return frame(number, "text_delta", delta=f"d{number}")


@dataclass
class Remembering:
    """A worker that keeps what it said: it runs a task once, and can be followed from any event on. It says
    `before` deltas at once, and the others and the end when the test says so.

    `oldest`: it has dropped the events before that one. `says` makes other events than deltas.
    """

    says: Callable[[int], bytes] = delta

    deltas: int = 6
    before: int = 3
    oldest: int = 1
    ran: list[str] = field(default_factory=list)

    async def __call__(self, worker: PlayedWorker, call: Call) -> None:
        """Answer to a task that is given, or asked for."""
        task_id, _, rest = call.path.removeprefix("/tasks/").partition("/")
        after = int(rest.partition("after=")[2] or 0)
        if task_id not in self.ran:
            if call.method != "POST":
                await call.answer(404, {})
                return
            self.ran.append(task_id)
        if after + 1 < self.oldest:
            await call.answer(410, {"error": "dropped", "oldest": self.oldest})
            return
        frames = [self.says(n) for n in range(1, self.deltas + 1)]
        await call.stream(*frames[after : self.before])
        await worker.released.wait()
        await call.send(*frames[max(after, self.before) :])
        await call.send(end(self.deltas + 1, "cancelled" if task_id in worker.cancelled else "completed"))
        await call.done()


@dataclass
class PlayedWorker:
    """Answers on one socket; `on_task` and `on_attach` say how it behaves."""

    session_id: str
    path: Path
    on_task: TaskScript = echo
    on_attach: TaskScript | None = None
    health: dict[str, Any] = field(default_factory=lambda: {"status": "ready"})
    calls: list[tuple[str, str]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    got_task: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    unknown_to_cancel: int = 0  # how many requests to cancel come before their task does

    def listen(self) -> socket.socket:
        """The listening socket. A path of any length: it is reached through its folder's descriptor."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{self.path.name}")
        finally:
            os.close(folder)
        listener.listen()
        return listener

    async def serve(self, listener: socket.socket) -> None:
        """Serve until cancelled."""
        writers: set[asyncio.StreamWriter] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            writers.add(writer)
            try:
                while await self._one(reader, writer):
                    pass
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writers.discard(writer)
                writer.close()

        server = await asyncio.start_unix_server(connected, sock=listener)
        try:
            await server.serve_forever()
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when there will be no other on this connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return False
        method, path, _ = head.split(" ", 2)
        length = [
            line.split(":")[1] for line in head.lower().splitlines() if line.startswith("content-length")
        ]
        body = await reader.readexactly(int(length[0])) if length else b""
        kinds = [line.split(": ")[1] for line in head.splitlines() if line.lower().startswith("content-type")]
        call = Call(method, path, body, writer, *kinds)
        self.calls.append((method, path))
        if path == "/health":
            progress = {"progress": None, "message": None}
            await call.answer(200, {"session_id": self.session_id, **progress, **self.health})
        elif method == "DELETE" and self.unknown_to_cancel:
            self.unknown_to_cancel -= 1
            await call.answer(404, {})
        elif method == "DELETE":
            self.cancelled.append(path.removeprefix("/tasks/"))
            self.released.set()
            await call.answer(202, {})
        elif method == "POST":
            self.got_task.set()
            await self.on_task(self, call)
        else:
            assert self.on_attach is not None, path
            await self.on_attach(self, call)
        return not writer.transport.is_closing()
