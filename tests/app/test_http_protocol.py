"""The HTTP/1.1 protocol under clients that send too much, too slowly, or nothing at all, or do not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gpu_server import http_protocol
from gpu_server.http_protocol import MAX_HEAD_BYTES, BoundedHeadProtocol
from tests.app.wire import BIG, Counting, Served, get, post, served


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


async def test_a_slow_answer_has_time() -> None:
    """The deadline is for the head: an answer may take any time, and so may the body before it."""
    request = post("/stream", 2).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    async with served() as service, service.connect() as wire:
        await wire.send(request)
        assert (await wire.head()).startswith(b"HTTP/1.1 100 ")  # so the application has the head
        (protocol,) = service.server.server_state.connections
        assert protocol._head_timer is None
        await wire.send(b"ab")
        await service.app.streaming.wait()
        assert protocol._head_timer is None
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
    if not before:
        monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    async with served(keep_alive=0.05) as service, service.connect() as wire:
        if before:
            await wire.send(get())
            assert (await wire.answer())[0] == 200
            monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
        await wire.send(sent)
        assert await wire.rest() == b""


async def test_a_head_that_trickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is the whole head's: a byte now and then does not put it off."""
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
    async with served() as service, service.connect() as wire:

        async def trickle() -> None:
            with suppress(ConnectionError):  # it may be the first to see the end
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
    async with served() as service, service.connect() as wire:
        await wire.send(post("/refused"))
        assert (await wire.answer())[0] == 200
        monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.05)
        await wire.send(b"x")
        assert await wire.rest() == b""


# -- not reading --------------------------------------------------------------------------------------------


@asynccontextmanager
async def not_reading(service: Served) -> AsyncIterator[socket.socket]:
    """A client that asks for more than it ever reads."""
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", service.port))
        await loop.sock_sendall(client, get("/flood"))
        yield client


async def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing of what there is for it is cut off; others are served meanwhile."""
    monkeypatch.setattr(http_protocol, "STALL_SECONDS", 0.05)
    async with served() as service, not_reading(service), service.connect() as wire:
        await wire.send(get())
        assert await wire.answer() == (200, b"0")
        async with asyncio.timeout(20):
            await service.app.left.wait()
        await wire.send(get())
        assert await wire.answer() == (200, b"0")


@dataclass
class FakeLoop:
    """Keeps the timers that are set."""

    timers: list[tuple[float, Any, tuple[Any, ...], Any]] = field(default_factory=list)

    def call_later(self, delay: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(0, callback, args, asyncio.get_running_loop())
        self.timers.append((delay, callback, args, handle))
        return handle

    def stalls(self) -> list[Any]:
        """The timers that watch for a stall and are still set."""
        return [
            handle
            for delay, _, _, handle in self.timers
            if delay == http_protocol.STALL_SECONDS and not handle.cancelled()
        ]

    def fire(self) -> None:
        """The time of the one stall timer has come."""
        (handle,) = self.stalls()
        handle._run()


@dataclass
class FakeTransport(asyncio.Transport):
    """A connection that is not there; `unsent` bytes wait for its client."""

    unsent: int = 0
    aborted: bool = False
    connection: socket.socket | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.connection if name == "socket" else default

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


def connected(
    connection: socket.socket | None = None,
) -> tuple[BoundedHeadProtocol, FakeTransport, FakeLoop]:
    config = uvicorn.Config(Counting(), log_config=None)
    loop, transport = FakeLoop(), FakeTransport(unsent=100_000, connection=connection)
    protocol = BoundedHeadProtocol(config, ServerState(), {}, loop)  # type: ignore[arg-type]  # all it uses
    protocol.connection_made(transport)
    return protocol, transport, loop


async def test_a_slow_client_is_not_cut() -> None:
    """As long as a client takes something now and then it has the time it needs; then it is cut."""
    protocol, transport, loop = connected()
    assert loop.stalls() == []
    protocol.pause_writing()
    for left in (99_999, 50_000):
        transport.unsent = left
        loop.fire()
        assert not transport.aborted
    loop.fire()
    assert transport.aborted


@pytest.mark.parametrize("how", ["resumed", "lost"])
async def test_nobody_is_watched_in_vain(how: str) -> None:
    """A client that has taken everything, or has left, has no deadline."""
    protocol, _, loop = connected()
    protocol.pause_writing()
    assert len(loop.stalls()) == 1
    if how == "resumed":
        protocol.resume_writing()
    else:
        protocol.connection_lost(ConnectionResetError())
    assert loop.stalls() == []
    if how == "resumed":
        protocol.pause_writing()
        assert len(loop.stalls()) == 1


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_vanished_clients_are_found_out(loop: str) -> None:
    """The kernel probes every client, so one that is gone without a word is noticed in about a minute."""

    async def look() -> dict[str, int]:
        async with served() as service, service.connect() as wire:
            await wire.send(get())
            await wire.answer()
            (protocol,) = service.server.server_state.connections
            connection = protocol.transport.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            return {
                name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name, _ in http_protocol._PROBES
                if hasattr(socket, name)
            }

    if loop == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        seen = uvloop.run(look())
    else:
        seen = asyncio.run(look())
    assert seen == {name: value for name, value in http_protocol._PROBES if name in seen}
    if {"TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"} <= seen.keys():
        assert seen["TCP_KEEPIDLE"] + seen["TCP_KEEPINTVL"] * seen["TCP_KEEPCNT"] == 60


async def test_other_sockets() -> None:
    """A client on a Unix socket cannot vanish: it is not probed, and served like any other."""
    for connection in socket.socketpair():
        with connection:
            connected(connection)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
