"""The client: no break and no restart costs it anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gpu_server.client import TaskEvent, Unreadable
from gpu_server.client.service import (
    FIRST_PAUSE_SECONDS,
    MAX_ANSWER_BYTES,
    MAX_PAUSE_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    Client,
    Refused,
)
from tests.app.api_world import KEY, TASK, api_world
from tests.app.played_service import Handler, Played, dies, played_service, sends
from tests.app.played_worker import frame

EVENTS = [
    TaskEvent(id=1, event="connection", data={"task_id": "t_1", "status": "queued"}),
    TaskEvent(id=1, event="queue", data={"position": 1}),
    TaskEvent(id=2, event="text_delta", data={"delta": "a: b\n\n"}),
    TaskEvent(id=3, event="text", data={"text": "ü"}),
    TaskEvent(id=4, event="task_finish", data={"status": "completed"}),
]
FRAMES = [frame(event.id, event.event, **event.data) for event in EVENTS]


async def submit(client: Client, **more: Any) -> list[TaskEvent]:
    async with asyncio.timeout(20):
        return [event async for event in client.submit(TASK, **more)]


POST = ("POST", "/api/tasks/submit", None)


def get(last: int) -> tuple[str, str, str]:
    return ("GET", "/api/tasks/t_1/events", str(last))


# -- following ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False])
async def test_resuming(cut: bool) -> None:
    """A stream that breaks, or ends too early, is taken up behind the last event."""
    breaks = sends(*FRAMES[:3], FRAMES[3][:10], cut=cut)
    async with played_service(breaks, sends(cut=cut), sends(*FRAMES[3:])) as (client, service):
        assert await submit(client) == EVENTS
        assert service.asked == [POST, get(2), get(2)]
        assert all(request.headers["X-API-Key"] == KEY for request in service.requests)
        assert all(request.headers["X-Tenant-ID"] == "a" for request in service.requests)


async def test_a_restart() -> None:
    """A service that is killed and comes back is found again, and no event is lost or given twice."""
    answers = dies(*FRAMES[:3], back_after=5), dies(FRAMES[3], back_after=1), sends(FRAMES[4])
    async with played_service(*answers) as (client, service):
        assert await submit(client) == EVENTS
        assert service.asked == [POST, get(2), get(3)]
        assert len(service.clock.pauses) == 6


async def test_pauses() -> None:
    """The pauses grow from a moment to a bound, by chance differently for each client, and begin anew with
    the next event."""
    answers = dies(FRAMES[0], back_after=9), sends(FRAMES[2], cut=True), sends(*FRAMES[3:])
    async with played_service(*answers) as (client, service):
        await submit(client)
        *growing, last = service.clock.pauses
    expected = [min(FIRST_PAUSE_SECONDS * 2**n, MAX_PAUSE_SECONDS) for n in range(len(growing))]
    for pause, most in zip([*growing, last], [*expected, FIRST_PAUSE_SECONDS], strict=True):
        assert most / 2 - 1e-6 <= pause <= most + 1e-6
    assert len({pause / most for pause, most in zip(growing, expected, strict=True)}) > 1


async def test_patience_is_renewed() -> None:
    """A stream that breaks after each event is followed to its end, however long it takes."""
    answers = [sends(frame, cut=True) for frame in FRAMES]
    async with played_service(*answers, reconnect_seconds=0.3) as (client, service):
        assert await submit(client) == EVENTS
        assert sum(service.clock.pauses) > 0.3


async def test_a_silent_stream_is_a_sign_of_life() -> None:
    """The patience counts from the moment at which a stream breaks, not from its last event."""

    async def late(service: Played, request: web.Request, stream: web.StreamResponse) -> None:
        service.clock.time += 10_000
        await service.die()
        service.clock.then[len(service.clock.pauses) + 3] = service.come_back

    async with played_service(sends(FRAMES[0]), late, sends(*FRAMES[2:])) as (client, service):
        assert await submit(client) == [EVENTS[0], *EVENTS[2:]]
        assert service.asked == [POST, get(1), get(1)]


async def test_giving_up() -> None:
    """A service that does not come back is given up, `reconnect_seconds` after its last sign of life."""
    async with played_service(dies(FRAMES[0]), reconnect_seconds=30) as (client, service):
        with pytest.raises(aiohttp.ClientConnectionError):
            await submit(client)
        assert sum(service.clock.pauses) == pytest.approx(30)


async def test_gap() -> None:
    """A gap is given out like any event, and the stream goes on behind it."""
    gap = TaskEvent(id=1, event="gap", data={"from": 2, "to": 2})
    answers = sends(FRAMES[0], cut=True), sends(frame(1, "gap", **gap.data), *FRAMES[3:])
    async with played_service(*answers) as (client, _):
        assert await submit(client) == [EVENTS[0], gap, *EVENTS[3:]]


async def test_follow() -> None:
    """A task that was submitted elsewhere is followed from any event on, also through a restart."""
    answers = dies(FRAMES[2], back_after=2), sends(*FRAMES[3:])
    async with played_service(*answers) as (client, service):
        assert [event async for event in client.follow("t_1", after=1)] == EVENTS[2:]
        assert service.asked == [get(1), get(2)]


async def test_nothing_left_to_follow() -> None:
    """Behind its last event a task has no more."""
    async with played_service(204) as (client, service):
        assert [event async for event in client.follow("t_1", after=4)] == []
        assert service.asked == [get(4)]


# -- submitting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [sends(cut=True), sends(), dies(back_after=3)], ids=["cut", "empty", "died"])
async def test_an_answer_that_is_lost(lost: Handler) -> None:
    """A submission that breaks before its first event is sent again as it was, with the same key."""
    async with played_service(lost, sends(*FRAMES)) as (client, service):
        assert await submit(client) == EVENTS
        assert service.asked == [POST, POST]
        assert len(set(service.bodies)) == 1
        (key,) = set(service.keys)
        assert key is not None
        assert len(key) == 32


async def test_keys() -> None:
    """Each submission has a key of its own, or the one that it is given."""
    async with played_service(*[sends(*FRAMES)] * 3) as (client, service):
        await submit(client)
        await submit(client)
        await submit(client, key="my-key")
        assert len(set(service.keys)) == 3
        assert service.keys[2] == "my-key"


async def test_submit_async() -> None:
    """A task may be submitted without being followed; an answer that was lost is asked for again."""
    async with played_service(dies(back_after=2), 503, 202, 202) as (client, service):
        assert await client.submit_async(TASK) == {"task_id": "t_1"}
        assert len(set(service.keys)) == 1
        assert await client.submit_async(TASK, key="my-key") == {"task_id": "t_1"}
        assert service.keys[3] == "my-key"
        assert [one.headers["Prefer"] for one in service.requests] == ["respond-async"] * 4
        assert service.asked == [POST] * 4


async def test_a_service_that_was_there() -> None:
    """A service that this client has talked to is waited for, also with a new submission."""
    async with played_service(200, sends(*FRAMES)) as (client, service):
        await client.call("GET", "/api/sessions")
        await service.die()
        service.clock.then[3] = service.come_back
        assert await submit(client) == EVENTS


async def test_a_service_that_never_was_there() -> None:
    """A service that this client has never reached is not waited for: its address is probably wrong."""
    async with played_service() as (client, service):
        await service.die()
        with pytest.raises(aiohttp.ClientConnectorError):
            await submit(client)
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.submit_async(TASK)
        assert service.clock.pauses == []


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 404, 410, 429, 500])
async def test_refused(status: int) -> None:
    """A refusal has its status, its code and its message, on the way in and when resuming."""
    async with played_service(*[status] * 3) as (client, _):
        for work in (submit(client), client.call("GET", "/api/sessions"), client.submit_async(TASK)):
            with pytest.raises(Refused, match="some detail") as refused:
                await work
            assert (refused.value.status, refused.value.code) == (status, "some_code")
    async with played_service(sends(FRAMES[0], cut=True), status) as (client, _):
        with pytest.raises(Refused):
            await submit(client)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_not_there_yet(status: int) -> None:
    """A service that is starting, or a proxy that does not find it, is asked again by who is following."""
    answers = sends(FRAMES[0], cut=True), status, status, sends(*FRAMES[1:])
    async with played_service(*answers) as (client, service):
        assert await submit(client) == EVENTS
        assert len(service.requests) == 4


async def test_no_room() -> None:
    """A new submission that is refused for now is the caller's to repeat; it is told when."""
    async with played_service((503, "7"), (503, "7")) as (client, service):
        for work in (submit(client), client.submit_async(TASK)):
            with pytest.raises(Refused) as refused:
                await work
            assert refused.value.retry_after == 7
        assert service.clock.pauses == []


@pytest.mark.parametrize(
    ("header", "least"), [("7", 7), ("99999", MAX_RETRY_AFTER_SECONDS), ("soon", 0), ("-1", 0), ("", 0)]
)
async def test_retry_after(header: str, least: float) -> None:
    """The service says when to come again, in bounds; clients that were told the same do not come at once."""
    async with played_service((503, header), sends(*FRAMES[1:])) as (client, service):
        assert [event async for event in client.follow("t_1", after=1)] == EVENTS[1:]
        (pause,) = service.clock.pauses
        assert least < pause <= least + FIRST_PAUSE_SECONDS


async def test_never_there_again() -> None:
    """A service that goes on saying that it is not there is given up, with what it said."""
    async with played_service(*[503] * 100) as (client, service):
        with pytest.raises(Refused, match="some detail"):
            [event async for event in client.follow("t_1")]
        assert sum(service.clock.pauses) == pytest.approx(60)


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


async def test_once_with_the_service(tmp_path: Path) -> None:
    """Against the real interface: what is submitted twice with one key runs once, and can be followed."""
    async with api_world(tmp_path) as api, Client(api.url, KEY, tenant="a") as client:
        accepted = [await client.submit_async(TASK, key="once") for _ in range(2)]
        (task_id,) = {task["task_id"] for task in accepted}
        events = [event async for event in client.follow(task_id)]
        assert events[-1].event == "task_finish"
        with pytest.raises(Refused, match="idempotency_mismatch"):
            await submit(client, key="once")
        assert [event async for event in client.follow(task_id, after=events[-1].id or 0)] == []


async def test_unreadable_refusal() -> None:
    """An answer of something between that is not JSON is still told."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="<html>bad gateway</html>")

    async with answering(handle) as url, Client(url, KEY) as client:
        with pytest.raises(Refused, match="bad gateway") as refused:
            await client.call("GET", "/api/sessions")
        assert (refused.value.status, refused.value.code) == (502, "unknown")


async def test_what_is_no_answer() -> None:
    """An answer that is neither a stream nor a refusal is told, and not asked for again."""
    async with played_service(202, sends(b"event: x\ndata: {\n\n")) as (client, service):
        with pytest.raises(Unreadable, match="202"):
            await submit(client)
        with pytest.raises(Unreadable, match="no event stream"):
            await submit(client)
        assert service.asked == [POST, POST]


@asynccontextmanager
async def answering(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """Something that answers everything like this; its address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_without_end(status: int) -> None:
    """No answer, and no refusal, is kept beyond a bound."""
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        answer = web.StreamResponse(status=status)
        await answer.prepare(request)
        with suppress(ConnectionError):
            while written < 20 * MAX_ANSWER_BYTES:
                await answer.write(bytes(1 << 20))
                written += 1 << 20
        return answer

    async with answering(endless) as url, Client(url, KEY) as client:
        with pytest.raises(Unreadable, match="too long"):
            await client.call("GET", "/api/sessions")
    assert written < 3 * MAX_ANSWER_BYTES


async def test_an_answer_from_elsewhere() -> None:
    """A redirection is a refusal: neither the key nor what is asked goes where the service points."""
    asked = []

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.Response(status=307, headers={"Location": "http://127.0.0.1:9/x"})

    async with answering(elsewhere) as url, Client(url, KEY) as client:
        for work in (client.call("GET", "/api/sessions"), client.call_once("GET", "/x"), submit(client)):
            with pytest.raises(Refused, match="it is said to be at http") as refused:
                await work
            assert refused.value.status == 307
    assert asked == ["/api/sessions", "/x", "/api/tasks/submit"]


async def test_no_cookies() -> None:
    """What a service wants to be kept for it is not."""
    cookies = []

    async def baker(request: web.Request) -> web.StreamResponse:
        cookies.append(dict(request.cookies))
        return web.json_response({}, headers={"Set-Cookie": "a=b"})

    async with answering(baker) as url, Client(url.replace("127.0.0.1", "localhost"), KEY) as client:
        for _ in range(2):
            await client.call("GET", "/api/sessions")
    assert cookies == [{}, {}]


async def test_an_answer_that_is_no_json() -> None:
    """What a page of something between says is not taken for an answer."""

    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>please log in</html>")

    async with answering(page) as url, Client(url, KEY) as client:
        with pytest.raises(Unreadable, match="no JSON"):
            await client.call("GET", "/api/sessions")


async def test_a_service_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection on which nothing comes any more, of a machine that lost its power for one, is given up
    and made anew."""
    loop = asyncio.get_running_loop()
    now = loop.time
    over = asyncio.Event()

    async def silent(service: Played, request: web.Request, stream: web.StreamResponse) -> None:
        await stream.write(FRAMES[0])
        await over.wait()

    try:
        async with played_service(silent, sends(*FRAMES[1:]), silence_seconds=300) as (client, service):
            events = client.submit(TASK)
            assert await anext(events) == EVENTS[0]
            monkeypatch.setattr(loop, "time", lambda: now() + 300)
            assert [event async for event in events] == EVENTS[1:]
            over.set()
            assert service.asked == [POST, get(1)]
    finally:
        over.set()


async def test_calling_once() -> None:
    """A call that is made once is asked again, with the same key, when its answer was lost; one without a
    body too."""
    async with played_service(dies(back_after=2), 201, dies(back_after=2), 200) as (client, service):
        assert await client.call_once("POST", "/api/sessions", {"pool": "x"}) == {"task_id": "t_1"}
        assert len(set(service.keys)) == 1
        assert service.keys[0]
        assert await client.call_once("GET", "/api/sessions/s_1") == {"task_id": "t_1"}
        assert [request.method for request in service.requests] == ["POST", "POST", "GET", "GET"]


async def test_nothing_left_to_come_back_for() -> None:
    """A stream of which nothing is missed is not taken up again when it breaks."""
    async with played_service(sends(*FRAMES[:3], cut=True)) as (client, service):
        events = client.submit_bytes("/inference", b"bytes", {"X-Name": "v"}, complete=lambda: True)
        assert [event async for event in events] == EVENTS[:3]
        assert service.asked == [("POST", "/inference", None)]
        assert service.bodies == [b"bytes"]
        assert service.requests[0].headers["X-Name"] == "v"
