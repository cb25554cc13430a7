"""Answers on the wire: when the head goes out, what is said meanwhile, and what a client leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from gpu_server.api.openai_answer import HEAD_HELD_SECONDS, TaskAnswer, _Wire
from gpu_server.api.openai_stream import Chunks, Heading
from gpu_server.core import events as ev
from gpu_server.core.sessions import Task
from tests.app.api_world import KEY, Api, api_world
from tests.app.played_worker import Call, PlayedWorker, end, frame, hold
from tests.app.text_worker import HELLO, chunks, comments, fails, says
from tests.app.world import slot_specs

CHAT = "/v1/chat/completions"
STREAM = {**HELLO, "stream": True}
HEADERS = {"X-API-Key": KEY, "X-Tenant-ID": "a"}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """With one slot, so that the second tenant waits."""
    async with api_world(tmp_path, slots=slot_specs(1)) as found:
        yield found


@asynccontextmanager
async def posted(api: Api, body: Any = STREAM, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """A request, with its head read."""
    async with (
        asyncio.timeout(20),
        api.http.post(CHAT, json=body, headers={**HEADERS, **headers}) as answer,
    ):
        yield answer


async def read_until(answer: aiohttp.ClientResponse, text: str, seen: bytes = b"") -> bytes:
    """Read on until this text has come; everything so far."""
    while text.encode() not in seen:
        piece = await answer.content.readany()
        assert piece, f"no {text!r} in {seen!r}"
        seen += piece
    return seen


def only_task(api: Api) -> Task:
    (task,) = api.world.engine.node.tasks.values()
    return task


async def test_a_stream_is_a_stream(api: Api) -> None:
    """The head says that nobody between may keep or change what comes."""
    api.world.on_task = says("a")
    async with posted(api) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert chunks(await answer.read())[-1] == "[DONE]"
    async with posted(api, HELLO) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        assert int(answer.headers["Content-Length"]) == len(await answer.read())


async def test_a_cold_start_says_what_it_waits_for(api: Api) -> None:
    """Nothing comes for a moment, then the head and comments: the place in line, the start, pings; no chunk
    comes before the text."""
    api.world.on_task = says("a")
    other = await api.session("b")
    clock = api.world.clock
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(anext(posting := _posts(api)))
        await clock.until_slept_to(clock.now() + HEAD_HELD_SECONDS)
        assert not asking.done()
        clock.advance(HEAD_HELD_SECONDS)
        answer = await asking
        assert (answer.status, answer.headers["X-Queue-Position"]) == (200, "1")
        seen = await read_until(answer, "queued 1")
        for _ in range(2):
            await clock.until_slept_to(clock.now() + api.service.settings.sse_ping_seconds)
            clock.advance(api.service.settings.sse_ping_seconds)
            seen = await read_until(answer, ": ping", seen)
        assert b"data:" not in seen
        await api.ask("DELETE", f"/api/sessions/{other}", tenant="b")
        seen = await read_until(answer, "[DONE]", seen)
        await posting.aclose()
    told = comments(seen)
    assert told[:2] == ["queued", "queued 1"]
    assert [word for word in told if word in ("allocated", "created", "working")] == [
        *("allocated", "created", "working")
    ]
    assert chunks(seen)[1]["choices"][0]["delta"] == {"content": "a"}


async def _posts(api: Api) -> Any:
    async with posted(api) as answer:
        yield answer


async def test_a_late_failure_is_told_in_the_stream(api: Api) -> None:
    """After the head nothing but the stream can tell of a failure: as an error, and without `[DONE]`."""
    other = await api.session("b")
    api.world.on_task = fails("engine_dead", "no more")
    clock = api.world.clock
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(anext(posting := _posts(api)))
        await clock.until_slept_to(clock.now() + HEAD_HELD_SECONDS)
        clock.advance(HEAD_HELD_SECONDS)
        answer = await asking
        await api.ask("DELETE", f"/api/sessions/{other}", tenant="b")
        raw = await answer.read()
        await posting.aclose()
    assert answer.status == 200
    assert chunks(raw) == [
        {"error": {"message": "no more", "type": "server_error", "param": None, "code": "engine_dead"}}
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels(api: Api, stream: bool) -> None:
    """The task of a client that is gone is cancelled at once, and its worker is told."""
    api.world.on_task = hold
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(_hangs_up(api, {**HELLO, "stream": stream}, wait_for_text=stream))
        await api.world.until(lambda: api.world.engine.node.tasks)
        await api.world.saw(only_task(api).id, "held")
        if not stream:
            asking.cancel()
        await api.world.until(lambda: only_task(api).state == "cancelled")
    (worker,) = api.world.workers.values()
    await api.world.until(lambda: not api.world.session(only_task(api).session_id).busy)
    assert worker.cancelled == [only_task(api).id]
    assert only_task(api).readers == 0
    api.world.on_task = says("x")
    assert api.world.session(only_task(api).session_id).state == "ready"


async def _hangs_up(api: Api, body: Any, *, wait_for_text: bool) -> None:
    async with posted(api, body) as answer:
        if wait_for_text:
            await read_until(answer, "held")
        answer.close()


async def test_a_client_that_goes_away_while_it_waits(api: Api) -> None:
    """A task that waits for a slot is cancelled too, and its session does not go on waiting."""
    await api.session("b")
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(api.ask("POST", CHAT, HELLO))
        await api.world.until(lambda: len(api.world.engine.node.line) == 1)
        asking.cancel()
        await api.world.until(lambda: len(api.world.engine.node.line) == 0)
    assert only_task(api).state == "cancelled"


async def test_a_key_lets_a_client_come_back(api: Api) -> None:
    """With an Idempotency-Key a client that was cut off has the usual time to ask again, and gets it all."""
    api.world.on_task = hold
    key = {"Idempotency-Key": "k"}
    async with posted(api, **key) as answer:
        await read_until(answer, "held")
        answer.close()
    await api.world.until(lambda: only_task(api).readers == 0)
    assert only_task(api).state == "running"
    async with posted(api, **key) as answer:
        assert b"held" in await read_until(answer, "held")
    await api.world.until(lambda: only_task(api).readers == 0)
    api.world.clock.advance(api.world.rules.disconnect_grace)
    api.world.engine.report(ev.Tick())
    assert only_task(api).state == "cancelled"
    again = await api.ask("POST", CHAT, STREAM, headers=key)
    assert (again.status, again.json["error"]["code"]) == (409, "client_gone")


async def test_another_life_takes_over(api: Api) -> None:
    """When the service is replaced, streams end with an error that says so, and the task is left to it."""
    api.world.on_task = hold
    async with asyncio.TaskGroup() as group:
        whole = group.create_task(api.ask("POST", CHAT, HELLO))
        async with posted(api) as answer:
            seen = await read_until(answer, "held")
            api.world.engine.hand_over()
            seen += await answer.read()
    assert chunks(seen)[-1]["error"]["code"] == "shutting_down"
    assert (whole.result().status, whole.result().json["error"]["code"]) == (503, "shutting_down")
    assert whole.result().headers["Retry-After"] == "1"
    assert {task.state for task in api.world.engine.node.tasks.values()} == {"running"}


async def test_a_reader_that_is_too_slow(api: Api) -> None:
    """Where events were dropped before the client took them it gets an error, not a text with a hole."""

    async def flood(worker: PlayedWorker, call: Call) -> None:
        await call.stream(frame(1, "text_delta", delta="held"))
        await worker.released.wait()
        for number in range(2, 66):
            await call.send(frame(number, "text_delta", delta="x" * 32_768))
        text = frame(66, "text", text="held...", finish_reason="stop", stop_reason=None)
        await call.send(text + end(67))
        await call.done()

    api.world.on_task = flood
    session_id = await api.session()
    task_id, _ = api.world.submit(session_id)
    task, stream = api.world.task(task_id), api.world.engine.streams.get(task_id)
    assert stream is not None
    gate, sent = asyncio.Event(), b""

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal sent
        sent += message.get("body", b"")
        if b"held" in sent:
            api.world.workers[session_id].released.set()
            await gate.wait()

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    heading = Heading(chat=True, task_id=task_id, model="org/chat", created=0)
    answer = TaskAnswer(api.service, task, stream, Chunks(heading, include_usage=False), {}, keyed=False)
    async with asyncio.TaskGroup() as group:
        group.create_task(answer({}, receive, send))
        await api.world.until(lambda: task.ended)
        gate.set()
    *found, last = chunks(sent)
    assert last["error"]["code"] == "events_gone"
    assert [chunk["choices"][0]["delta"]["content"] for chunk in found] == ["", "held"]


@pytest.mark.parametrize("stream", [True, False])
async def test_what_no_worker_should_do_cancels_its_task(api: Api, stream: bool) -> None:
    """An answer that cannot go on ends at once, leaves no task running behind it, and is not told as one
    whose client has gone."""

    async def odd(worker: PlayedWorker, call: Call) -> None:
        await call.stream(frame(1, "text_delta", delta="a", logprobs=5))
        await worker.released.wait()

    api.world.on_task = odd
    with capture_logs() as lines:
        async with posted(api, {**HELLO, "logprobs": True, "stream": stream}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (500, "worker_protocol")
        await api.world.until(lambda: only_task(api).state == "cancelled")
    assert "task.client_gone" not in [line["event"] for line in lines]


async def test_a_client_that_is_gone_is_logged(api: Api) -> None:
    """A task that is cancelled because its client has gone is told as that."""
    api.world.on_task = hold
    with capture_logs() as lines:
        await _hangs_up(api, STREAM, wait_for_text=True)
        await api.world.until(lambda: only_task(api).state == "cancelled")
    assert [line["task_id"] for line in lines if line["event"] == "task.client_gone"] == [only_task(api).id]


async def test_a_head_that_was_held_up() -> None:
    """A head whose writer was cancelled while there was no room comes before whatever is sent next."""
    waiting, room, sent = asyncio.Event(), asyncio.Event(), []

    async def send(message: MutableMapping[str, Any]) -> None:
        waiting.set()
        await room.wait()
        sent.append(message["type"])

    wire = _Wire(send, {})
    async with asyncio.TaskGroup() as group:
        pulse = group.create_task(wire.begin({}))
        await waiting.wait()
        pulse.cancel()
    room.set()
    await wire.write(b"x")
    await wire.end()
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
