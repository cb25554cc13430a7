"""The client: what it makes of an event stream, and that a broken one costs nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gpu_server import client as client_module
from gpu_server.client import Client, Refused, TaskEvent, read_events
from tests.app.api_world import KEY, TASK, api_world
from tests.app.played_worker import frame


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_SECONDS", 0)


EVENTS = [
    TaskEvent(id=1, event="connection", data={"task_id": "t_1", "status": "queued"}),
    TaskEvent(id=1, event="queue", data={"position": 1}),
    TaskEvent(id=2, event="text_delta", data={"delta": "a: b\n\n"}),
    TaskEvent(id=3, event="text", data={"text": "ü"}),
    TaskEvent(id=4, event="task_finish", data={"status": "completed"}),
]
FRAMES = [frame(event.id, event.event, **event.data) for event in EVENTS]


class Pieces:
    """A stream of these chunks."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    async def iter_any(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk


@given(st.lists(st.integers(0, 400), max_size=8))
async def test_split_frames(cuts: list[int]) -> None:
    """Frames are read the same in whatever pieces they come, comments and blank lines between them."""
    raw = b": ping\n\n".join(FRAMES) + b": ping\n\n\n\n"
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    chunks = [raw[a:b] for a, b in itertools.pairwise(edges)]
    assert [event async for event in read_events(Pieces(chunks))] == EVENTS


async def test_half_a_frame() -> None:
    """What was cut off by the end of the stream is not given out."""
    assert [event async for event in read_events(Pieces([FRAMES[0] + FRAMES[2][:-1]]))] == EVENTS[:1]


async def test_no_id() -> None:
    """An event without a number has none."""
    (event,) = [event async for event in read_events(Pieces([b"event: x\ndata: {}\n\n"]))]
    assert event.id is None


Handler = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


@asynccontextmanager
async def played_service(*answers: Handler | int) -> AsyncIterator[tuple[Client, list[web.Request]]]:
    """A service that gives these answers in turn: streams, or statuses with a problem."""
    left, requests = list(answers), []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        answer = left.pop(0)
        if isinstance(answer, int):
            problem = {"code": "some_code", "detail": "some detail"}
            return web.json_response(problem, status=answer, content_type="application/problem+json")
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await answer(request, stream)
        return stream

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with Client(f"http://127.0.0.1:{port}", KEY, tenant="a") as client:
            yield client, requests
    finally:
        await runner.cleanup()


def sends(*frames: bytes, cut: bool = False) -> Handler:
    """A stream of these frames, with its proper end or cut off."""

    async def answer(request: web.Request, stream: web.StreamResponse) -> None:
        await stream.write(b"".join(frames))
        if cut:
            request.transport.abort()

    return answer


async def follow(client: Client) -> list[TaskEvent]:
    async with asyncio.timeout(20):
        return [event async for event in client.submit(TASK)]


@pytest.mark.parametrize("cut", [True, False])
async def test_resuming(cut: bool) -> None:
    """A stream that breaks, or ends too early, is taken up behind the last event."""
    breaks = sends(*FRAMES[:3], FRAMES[3][:10], cut=cut)
    async with played_service(breaks, sends(cut=cut), sends(*FRAMES[3:])) as (client, requests):
        assert await follow(client) == EVENTS
        assert [(request.method, request.path) for request in requests] == [
            ("POST", "/api/tasks/submit"),
            ("GET", "/api/tasks/t_1/events"),
            ("GET", "/api/tasks/t_1/events"),
        ]
        assert [request.headers.get("Last-Event-ID") for request in requests] == [None, "2", "2"]
        assert all(request.headers["X-API-Key"] == KEY for request in requests)
        assert all(request.headers["X-Tenant-ID"] == "a" for request in requests)


async def test_patience_is_renewed() -> None:
    """A stream that breaks after each event is followed to its end."""
    answers = [sends(frame, cut=True) for frame in FRAMES]
    async with played_service(*answers) as (client, _):
        assert await follow(client) == EVENTS


async def test_giving_up() -> None:
    """A service that does not come back is given up after some tries."""
    dead = [sends(cut=True) for _ in range(client_module.RECONNECT_TRIES)]
    async with played_service(sends(FRAMES[0], cut=True), *dead) as (client, requests):
        with pytest.raises(aiohttp.ClientError):
            await follow(client)
        assert len(requests) == 1 + client_module.RECONNECT_TRIES


@pytest.mark.parametrize("cut", [True, False])
async def test_nothing_is_submitted_twice(cut: bool) -> None:
    """A stream that breaks before its first event is an error: nobody knows whether the task was taken."""
    async with played_service(sends(cut=cut)) as (client, requests):
        with pytest.raises(aiohttp.ClientError):
            await follow(client)
        assert len(requests) == 1


@pytest.mark.parametrize("status", [401, 404, 429, 500])
async def test_refused(status: int) -> None:
    """A refusal has its status, its code and its message, on the way in and when resuming."""
    async with played_service(status, status) as (client, _):
        for work in (follow(client), client.call("GET", "/api/sessions")):
            with pytest.raises(Refused, match="some detail") as refused:
                await work
            assert (refused.value.status, refused.value.code) == (status, "some_code")
    async with played_service(sends(FRAMES[0], cut=True), status) as (client, _):
        with pytest.raises(Refused):
            await follow(client)


async def test_with_the_service(tmp_path: Path) -> None:
    """Against the real interface: a task to its end, a call, and a refusal that is no JSON problem."""
    async with api_world(tmp_path) as api, Client(api.url, KEY, tenant="a") as client:
        events = [event async for event in client.submit({**TASK, "metadata": {"prompt": "x"}})]
        assert events[-1].event == "task_finish"
        session_id = events[0].data["session_id"]
        assert (await client.call("GET", f"/api/sessions/{session_id}"))["tasks_done"] == 1
        with pytest.raises(Refused) as refused:
            await client.call("POST", "/api/sessions", {"model_id": "unknown", "task_preset": "p"})
        assert refused.value.problem["status"] == 404


async def test_unreadable_refusal() -> None:
    """An answer of something between that is not JSON is still told."""

    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=502, text="<html>bad gateway</html>")

    app = web.Application()
    app.router.add_get("/api/sessions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}", KEY) as client:
            with pytest.raises(Refused, match="bad gateway") as refused:
                await client.call("GET", "/api/sessions")
            assert (refused.value.status, refused.value.code) == (502, "unknown")
    finally:
        await runner.cleanup()


def test_task_event_is_a_value() -> None:
    """Events can be compared and cannot be changed."""
    event: Any = EVENTS[0]
    with pytest.raises(AttributeError):
        event.id = 2
