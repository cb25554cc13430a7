"""The service as its client sees it, played: it answers to order, dies and comes back; no pause is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gpu_server.client import Client
from tests.app.api_world import KEY
from tests.app.processes import free_port


@dataclass
class Jumping:
    """A clock that jumps ahead for whoever sleeps; `then` says what happens in which pause."""

    time: float = 1000.0
    pauses: list[float] = field(default_factory=list)
    then: dict[int, Callable[[], Awaitable[None]]] = field(default_factory=dict)

    def now(self) -> float:
        return self.time

    async def sleep_until(self, when: float | None, *, wake: asyncio.Event | None = None) -> None:
        assert when is not None
        self.pauses.append(when - self.time)
        self.time = when
        await asyncio.sleep(0)
        if (happens := self.then.get(len(self.pauses))) is not None:
            await happens()


Handler = Callable[["Played", web.Request, web.StreamResponse], Awaitable[None]]


@dataclass
class Played:
    """Gives these answers in turn: streams, or statuses with a problem, and `Retry-After` where one is named.
    It can die and come back on its port."""

    left: list[Handler | int | tuple[int, str]]
    clock: Jumping
    requests: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    port: int = field(default_factory=free_port)  # nobody takes it meanwhile

    async def open(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await self.come_back()

    async def close(self) -> None:
        await self._runner.cleanup()

    async def die(self) -> None:
        """As by SIGKILL: nobody listens any more, and every connection breaks."""
        await self._site.stop()
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def come_back(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await self._site.start()

    @property
    def asked(self) -> list[tuple[str, str, str | None]]:
        """Each request: its method, path and `Last-Event-ID`."""
        return [(one.method, one.path, one.headers.get("Last-Event-ID")) for one in self.requests]

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("Idempotency-Key") for request in self.requests]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        answer = self.left.pop(0)
        if not callable(answer):
            status, retry_after = answer if isinstance(answer, tuple) else (answer, None)
            if status < 300:
                return web.json_response({"task_id": "t_1"}, status=status)
            problem = {"code": "some_code", "detail": "some detail"}
            headers = {} if retry_after is None else {"Retry-After": retry_after}
            return web.json_response(
                problem, status=status, content_type="application/problem+json", headers=headers
            )
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await answer(self, request, stream)
        return stream


@asynccontextmanager
async def played_service(
    *answers: Handler | int | tuple[int, str], **options: Any
) -> AsyncIterator[tuple[Client, Played]]:
    """A service that gives these answers, and a client of it, whose clock is its clock."""
    service = Played(list(answers), Jumping())
    await service.open()
    try:
        url = f"http://127.0.0.1:{service.port}"
        async with Client(url, KEY, tenant="a", clock=service.clock, **options) as client:
            yield client, service
    finally:
        await service.close()


def sends(*frames: bytes, cut: bool = False) -> Handler:
    """A stream of these frames, with its proper end or cut off."""

    async def answer(service: Played, request: web.Request, stream: web.StreamResponse) -> None:
        await stream.write(b"".join(frames))
        if cut:
            assert request.transport is not None
            request.transport.abort()

    return answer


def dies(*frames: bytes, back_after: int | None = None) -> Handler:
    """A stream of these frames, and then the service is killed; it is back after so many pauses."""

    async def answer(service: Played, request: web.Request, stream: web.StreamResponse) -> None:
        await stream.write(b"".join(frames))
        await service.die()
        if back_after is not None:
            service.clock.then[len(service.clock.pauses) + back_after] = service.come_back

    return answer
