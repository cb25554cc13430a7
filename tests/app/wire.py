"""An application behind the HTTP/1.1 protocol, and connections to it that are played byte by byte."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from gpu_server.app import Server
from gpu_server.http_protocol import MAX_HEAD_BYTES, BoundedHeadProtocol

BIG = 5 * MAX_HEAD_BYTES


@dataclass
class Counting:
    """An application that answers with the length of the body; what it is asked for says how."""

    requests: list[tuple[str, int]] = field(default_factory=list)
    streaming: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        length, more = 0, scope["path"] != "/refused"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            length += len(message["body"])
            more = message["more_body"]
        if scope["path"] == "/flood":
            await self._flood(receive, send)
            return
        self.requests.append((scope["path"], length))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % length, "more_body": True})
        if scope["path"] == "/stream":
            self.streaming.set()
            await self.go_on.wait()
            await send({"type": "http.response.body", "body": b" and more", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _flood(
        self, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Send until the client has left."""

        async def flood() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            flooding = group.create_task(flood())
            assert await receive() == {"type": "http.disconnect"}
            flooding.cancel()
        self.left.set()


@dataclass
class Wire:
    """One connection, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *pieces: bytes) -> None:
        """Send pieces, each in a read of its own as far as the system allows."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0.001 if len(piece) < 100 else 0)

    async def head(self) -> bytes:
        """The next answer's head."""
        async with asyncio.timeout(20):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[int, bytes]:
        """The next answer, which is chunked: its status and body."""
        status, body = int((await self.head()).split(b" ")[1]), b""
        async with asyncio.timeout(20):
            while length := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(length + 2))[:length]
            await self.reader.readline()
        return status, body

    async def rest(self) -> bytes:
        """Everything until the server closes, which it must. A reset may swallow what came before it."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@dataclass
class Served:
    """A served application."""

    app: Counting
    port: int
    server: Server

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Wire]:
        """A connection that is closed behind the test."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            yield Wire(reader, writer)
        finally:
            writer.transport.abort()


@asynccontextmanager
async def served(keep_alive: float = 20) -> AsyncIterator[Served]:
    """A `Counting` behind the protocol, on a free port."""
    app = Counting()
    config = uvicorn.Config(
        app,
        http=BoundedHeadProtocol,
        lifespan="off",
        log_config=None,
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # fractions work
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            try:
                yield Served(app, listener.getsockname()[1], server)
            finally:
                app.go_on.set()
                server.should_exit = server.force_exit = True


def get(path: str = "/", *headers: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path.encode(), b"".join(headers))


def post(path: str = "/", length: int = BIG) -> bytes:
    return get(path, b"Content-Length: %d\r\n" % length).replace(b"GET", b"POST", 1)
