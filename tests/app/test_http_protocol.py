"""The HTTP/1.1 protocol under clients that send too much, too slowly, or nothing at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from gpu_server import http_protocol
from gpu_server.app import Server
from gpu_server.http_protocol import MAX_HEAD_BYTES, BoundedHeadProtocol

BIG = 5 * MAX_HEAD_BYTES


@dataclass
class Counting:
    """An application that answers with the length of the body; what it is asked for says how."""

    requests: list[tuple[str, int]] = field(default_factory=list)
    streaming: asyncio.Event = field(default_factory=asyncio.Event)
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
        self.requests.append((scope["path"], length))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % length, "more_body": True})
        if scope["path"] == "/stream":
            self.streaming.set()
            await self.go_on.wait()
            await send({"type": "http.response.body", "body": b" and more", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
                yield Served(app, listener.getsockname()[1])
            finally:
                app.go_on.set()
                server.should_exit = server.force_exit = True


def get(path: str = "/", *headers: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path.encode(), b"".join(headers))


def post(path: str = "/", length: int = BIG) -> bytes:
    return get(path, b"Content-Length: %d\r\n" % length).replace(b"GET", b"POST", 1)


def pieces(data: bytes, size: int = 10_000) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# -- what must go on working ------------------------------------------------------------------------------


async def test_requests_in_a_row() -> None:
    """A connection serves one request after the other, and those that were sent ahead in their order."""
    async with served() as service, service.connect() as wire:
        for number in range(3):
            await wire.send(get(f"/{number}"))
            assert await wire.answer() == (200, b"0")
        await wire.send(get("/ahead") + post("/of", 5) + b"12345" + get("/time"))
        assert [await wire.answer() for _ in range(3)] == [(200, b"0"), (200, b"5"), (200, b"0")]
        assert [path for path, _ in service.app.requests] == ["/0", "/1", "/2", "/ahead", "/of", "/time"]


@pytest.mark.parametrize("size", [700, 10_000, MAX_HEAD_BYTES, 2 * MAX_HEAD_BYTES, 2 * BIG])
@pytest.mark.parametrize("ahead", [False, True], ids=["in_turn", "ahead"])
async def test_big_bodies(size: int, ahead: bool) -> None:
    """A body is not the head's fault, whatever the pieces it comes in, and however many follow each other."""
    request = post() + b"x" * BIG
    async with served() as service, service.connect() as wire, asyncio.TaskGroup() as group:
        if ahead:
            group.create_task(wire.send(*pieces(3 * request, size)))
        for _ in range(3):
            if not ahead:
                await wire.send(*pieces(request, size))
            assert await wire.answer() == (200, b"%d" % BIG)


async def test_big_body_behind_a_broken_head() -> None:
    """A head that comes in two pieces, the second with much of the body, is as good as any."""
    async with served() as service, service.connect() as wire:
        head = post()
        for _ in range(3):
            await wire.send(head[:20], head[20:] + b"x" * BIG)
            assert await wire.answer() == (200, b"%d" % BIG)


async def test_big_chunked_body() -> None:
    """A body in chunks is bounded by nothing here, also when it is made of very small ones."""
    head = get("/", b"Transfer-Encoding: chunked\r\n").replace(b"GET", b"POST")
    body = b"1\r\nx\r\n" * BIG + b"0\r\n\r\n"
    async with served() as service, service.connect() as wire:
        for _ in range(2):
            await wire.send(head, *pieces(body, 100_000))
            assert await wire.answer() == (200, b"%d" % BIG)


async def test_a_large_head_within_the_bound() -> None:
    """Heads of just the permitted size are served, again and again."""
    filler = b"X-Filler: " + b"x" * (MAX_HEAD_BYTES - len(get()) - 12) + b"\r\n"
    request = get("/", filler)
    assert len(request) == MAX_HEAD_BYTES
    async with served() as service, service.connect() as wire:
        for _ in range(3):
            await wire.send(*pieces(request))
            assert await wire.answer() == (200, b"0")


async def test_a_slow_answer_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for the head: an answer may take any time, and so may the body before it."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    async with served() as service, service.connect() as wire:
        await wire.send(post("/stream", 2), b"a")
        await asyncio.sleep(0.1)
        await wire.send(b"b")
        await service.app.streaming.wait()
        await asyncio.sleep(0.1)
        service.app.go_on.set()
        assert await wire.answer() == (200, b"2 and more")


# -- too much -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"X-%d: x\r\n", b"x%d"], ids=["many", "one"])
async def test_a_head_that_grows(header: bytes) -> None:
    """A head without end is answered 431 when it is too large, be it many headers or one; also the second."""
    fill = b"".join(header % number for number in range(MAX_HEAD_BYTES))[: MAX_HEAD_BYTES - 20]
    async with served() as service:
        for before in (0, 2):
            async with service.connect() as wire:
                for _ in range(before):
                    await wire.send(get("/fine"))
                    assert (await wire.answer())[0] == 200
                await wire.send(b"GET /never HTTP/1.1\r\nX-Name: ", *pieces(fill))
                head = await wire.head()
                assert head.startswith(b"HTTP/1.1 431 ")
                assert b"connection: close" in head
                assert await wire.rest() == b""
        assert [path for path, _ in service.app.requests] == ["/fine"] * 2


@pytest.mark.parametrize("length", [MAX_HEAD_BYTES + 1, 200_000, 2_000_000])
async def test_a_head_in_one_piece(length: int) -> None:
    """A head that is too large is refused however it comes: the application never sees it."""
    request = get("/never", b"X-Filler: " + b"x" * length + b"\r\n")
    async with served() as service, service.connect() as wire:
        wire.writer.write(request)
        answer = await wire.rest()
        # Closing with bytes unread resets the connection, which may overtake the answer.
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
        assert service.app.requests == []


async def test_a_url_without_end() -> None:
    """The request's target counts."""
    async with served() as service, service.connect() as wire:
        await wire.send(b"GET /", *pieces(b"x" * (MAX_HEAD_BYTES - 5)))
        assert (await wire.head()).startswith(b"HTTP/1.1 431 ")
        assert await wire.rest() == b""


async def test_trailers_without_end() -> None:
    """Fields behind a chunked body are kept like those of the head, and bounded like them."""
    head = get("/", b"Transfer-Encoding: chunked\r\n").replace(b"GET", b"POST")
    async with served() as service, service.connect() as wire:
        wire.writer.write(head + b"1\r\nx\r\n0\r\n" + b"X-Trailer: x\r\n" * 10_000)
        assert await wire.rest() == b""
        assert service.app.requests == []


async def test_an_answer_under_way_is_not_spoilt() -> None:
    """A next request that is too large ends the connection without a word in the answer of the one before."""
    async with served() as service, service.connect() as wire:
        await wire.send(get("/stream"))
        await service.app.streaming.wait()
        await wire.send(b"GET /never HTTP/1.1\r\nX-Name: ", *pieces(b"x" * (MAX_HEAD_BYTES - 20)))
        assert b"431" not in await wire.rest()


# -- too slow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\nX-Na"])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
async def test_a_head_that_does_not_come(monkeypatch: pytest.MonkeyPatch, sent: bytes, before: int) -> None:
    """A connection whose request does not get complete in time is closed, also between requests."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    async with served(keep_alive=0.05) as service, service.connect() as wire:
        for _ in range(before):
            await wire.send(get())
            assert (await wire.answer())[0] == 200
        await wire.send(sent)
        assert await wire.rest() == b""


async def test_a_head_that_trickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is the whole head's: a byte now and then does not put it off."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    async with served() as service, service.connect() as wire:

        async def trickle() -> None:
            await wire.send(b"GET / HTTP/1.1\r\nX: ")
            while True:
                await wire.send(b"x")
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as group:
            trickling = group.create_task(trickle())
            assert await wire.rest() == b""
            trickling.cancel()
        assert service.app.requests == []


async def test_a_body_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has his answer, and goes on with a body that never ends, does not keep the connection."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    async with served() as service, service.connect() as wire:
        await wire.send(post("/refused"))
        assert (await wire.answer())[0] == 200
        await wire.send(b"x")
        assert await wire.rest() == b""
