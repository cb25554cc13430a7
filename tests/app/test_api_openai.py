"""`/v1` with the official client: which session a request finds, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from gpu_server.core import events as ev
from gpu_server.core.sessions import Rules
from gpu_server.core.slots import Tier
from tests.app.api_world import KEY, Api, api_world
from tests.app.played_worker import hold
from tests.app.text_worker import HELLO, MODEL, USAGE, chunks, client_of, fails, says
from tests.app.world import slot_specs

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_world(tmp_path) as found:
        found.world.on_task = says("he", "llo")
        yield found


async def test_models(api: Api) -> None:
    """The models are those with a preset for these routes whose image may be started."""
    async with client_of(api) as client:
        listed, hard = (await client.models.list()).data
        assert hard.id == "hard"
        assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "gpu-server")
        assert listed.created == api.service.presets.changed_at > 1_700_000_000
        assert await client.models.retrieve(MODEL) == listed
        for name in ("m", "org", "org/chat/serve", "none", "closed"):
            with pytest.raises(openai.NotFoundError) as raised:
                await client.models.retrieve(name)
            assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


async def test_chat(api: Api) -> None:
    """A conversation is answered by a task of a new session, and what was asked reaches its worker."""
    asked: list[Any] = []
    api.world.on_task = says("he", "llo", asked=asked)
    async with client_of(api) as client:
        raw = await client.chat.completions.with_raw_response.create(
            **HELLO, max_tokens=5, stop="x", user="u"
        )
        answer = raw.parse()
        assert answer.choices[0].message.content == "hello"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.model_dump(exclude_none=True) == USAGE
        (session,) = api.world.engine.node.sessions.values()
        (task,) = api.world.engine.node.tasks.values()
        assert answer.id == f"chatcmpl-{task.id}"
        assert answer._request_id == task.id
        assert raw.headers["x-session-id"] == session.id
        assert "x-queue-position" not in raw.headers
        assert (session.workload.model_id, session.workload.task_preset) == (MODEL, "serve")
        assert (session.tenant, task.timeout) == ("a", api.service.settings.default_task_timeout)
        assert asked == [{"messages": HELLO["messages"], "max_tokens": 5, "stop": "x"}]


async def test_chat_streamed(api: Api) -> None:
    """The same in chunks, with the usage if it is asked for."""
    async with client_of(api) as client:
        stream = await client.chat.completions.create(
            **HELLO, stream=True, stream_options={"include_usage": True}
        )
        found = [chunk async for chunk in stream]
        assert [c.choices[0].delta.content for c in found[:-1]] == ["", "he", "llo", None]
        assert found[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in found[:-1]] == [None, None, None, "stop"]
        assert found[-1].usage is not None
        assert found[-1].usage.total_tokens == 5
        assert {chunk.model for chunk in found} == {MODEL}


async def test_completions(api: Api) -> None:
    """A prompt is continued, whole or in chunks, with 16 tokens where nobody says how many."""
    asked: list[Any] = []
    api.world.on_task = says("he", "llo", reason="length", asked=asked)
    async with client_of(api) as client:
        answer = await client.completions.create(model=MODEL, prompt="say")
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "length")
        stream = await client.completions.create(model=MODEL, prompt=[5, 6], stream=True, max_tokens=3)
        found = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in found) == "hello"
        assert found[-1].choices[0].finish_reason == "length"
        assert asked == [{"prompt": "say", "max_tokens": 16}, {"prompt": [5, 6], "max_tokens": 3}]


async def test_the_session_is_used_again(api: Api) -> None:
    """The next request of the tenant finds the session, another tenant's makes its own."""
    first = await api.ask("POST", CHAT, HELLO)
    second = await api.ask("POST", COMPLETE, {"model": MODEL, "prompt": "x", "stream": True})
    others = await api.ask("POST", CHAT, HELLO, tenant="b")
    assert [answer.status for answer in (first, second, others)] == [200, 200, 200]
    assert first.headers["X-Session-ID"] == second.headers["X-Session-ID"]
    assert first.headers["X-Request-ID"] != second.headers["X-Request-ID"]
    assert others.headers["X-Session-ID"] != first.headers["X-Session-ID"]
    assert len(api.world.started) == 2


async def test_a_pinned_session(api: Api) -> None:
    """`X-Session-ID` chooses the session; one of another tenant is unknown, of another preset no match."""
    for _ in range(2):
        await api.ask("POST", "/api/sessions", {"model_id": MODEL, "task_preset": "serve"})
    one, two = (session.id for session in api.world.engine.node.live_sessions())
    for session_id in (two, one, two):
        answer = await api.ask("POST", CHAT, HELLO, headers={"X-Session-ID": session_id})
        assert (answer.status, answer.headers["X-Session-ID"]) == (200, session_id)
    other = await api.session()
    for tenant, session_id, status, code in (
        ("b", one, 404, "session_not_found"),
        ("a", "s_none", 404, "session_not_found"),
        ("a", other, 409, "session_mismatch"),
    ):
        answer = await api.ask("POST", CHAT, HELLO, tenant=tenant, headers={"X-Session-ID": session_id})
        assert (answer.status, answer.json["error"]["code"]) == (status, code)
        assert answer.headers["x-should-retry"] == "false"
    await api.ask("DELETE", f"/api/sessions/{one}")
    answer = await api.ask("POST", CHAT, HELLO, headers={"X-Session-ID": one})
    assert (answer.status, answer.json["error"]["code"]) == (409, "session_closed")


async def test_the_least_busy_session(api: Api) -> None:
    """Requests go where fewer tasks run; one that waits says at which place."""
    api.world.on_task = hold
    for _ in range(2):
        await api.ask("POST", "/api/sessions", {"model_id": MODEL, "task_preset": "serve"})
    one, two = api.world.engine.node.live_sessions()
    await api.world.ready(one.id)
    await api.world.ready(two.id)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(api.ask("POST", CHAT, {**HELLO, "stream": True})) for _ in range(5)]
        await api.world.until(lambda: len(one.busy) + len(two.busy) == 4 and len(one.queue) == 1)
        for worker in api.world.workers.values():
            worker.released.set()
    answers = [task.result() for task in asking]
    served = [answer.headers["X-Session-ID"] for answer in answers]
    assert sorted(served) == sorted([one.id, two.id] * 2 + [one.id])
    positions = [answer.headers.get("X-Queue-Position") for answer in answers]
    assert sorted(positions, key=str) == ["1", None, None, None, None]


async def test_queue_full(tmp_path: Path) -> None:
    """With every queue full and no slot free the answer is 429, worth another try; nothing is left behind."""
    settings = {"session_queue_max_size": 0}
    async with api_world(tmp_path, settings=settings, slots=slot_specs(1)) as api, client_of(api) as client:
        api.world.on_task = hold
        session_id = await api.session(model=MODEL, preset="serve")
        session = api.world.session(session_id)
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(api.ask("POST", CHAT, {**HELLO, "stream": True}))
            await api.world.until(lambda: len(session.busy) == 2)
            with pytest.raises(openai.RateLimitError) as raised:
                await client.chat.completions.create(**HELLO)
            api.world.workers[session_id].released.set()
        assert raised.value.code == "session_queue_full"
        assert int(raised.value.response.headers["retry-after"]) > 0
        assert raised.value.response.headers["x-should-retry"] == "true"
        assert len(api.world.engine.node.tasks) == 2


async def test_the_tier_of_a_preset(tmp_path: Path) -> None:
    """A preset's task_difficulty is the tier of the sessions that are made; others of it are used too."""
    high = [replace(spec, tiers=frozenset({Tier.HIGH})) for spec in slot_specs(1)]
    both = slot_specs(2)[1:]
    async with api_world(tmp_path, slots=(*high, *both)) as api:
        api.world.on_task = says("a")
        first = await api.ask("POST", CHAT, {**HELLO, "model": "hard"})
        assert first.status == 200
        session = api.world.session(first.headers["X-Session-ID"])
        assert session.tier is Tier.HIGH
        low = await api.session(model="hard", preset="serve", tenant="b")
        for pin in ({}, {"X-Session-ID": low}):
            again = await api.ask("POST", CHAT, {**HELLO, "model": "hard"}, tenant="b", headers=pin)
            assert (again.status, again.headers["X-Session-ID"]) == (200, low)


async def test_a_tier_that_no_slot_has(tmp_path: Path) -> None:
    """Where no slot serves the tier of the preset, `low` where it names none, there can be no session."""
    high = [replace(spec, tiers=frozenset({Tier.HIGH})) for spec in slot_specs(1)]
    async with api_world(tmp_path, slots=tuple(high)) as api:
        answer = await api.ask("POST", CHAT, HELLO)
        assert (answer.status, answer.json["error"]["code"]) == (422, "no_such_capacity")


async def test_a_session_near_its_end(tmp_path: Path) -> None:
    """A request goes to a new session where the one that is there may not outlive it."""
    async with api_world(tmp_path, rules=Rules(max_lifetime=100, idle_timeout=1000)) as api:
        api.world.on_task = says("a")
        served = []
        for seconds in (0, 70, 10):
            api.world.clock.advance(seconds)
            answer = await api.ask("POST", CHAT, HELLO)
            served.append(answer.headers["X-Session-ID"])
        assert served[0] == served[1] != served[2]


async def test_refusals(api: Api) -> None:
    """A wrong key, a model that is not served, an image that may not be started: each in OpenAI's shape."""
    async with client_of(api, key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            await client.chat.completions.create(**HELLO)
        assert unknown.value.code == "invalid_api_key"
    async with client_of(api) as client:
        with pytest.raises(openai.NotFoundError) as none:
            await client.chat.completions.create(**{**HELLO, "model": "m"})
        assert (none.value.code, none.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.PermissionDeniedError) as closed:
            await client.completions.create(model="closed", prompt="x")
        assert closed.value.code == "image_not_allowed"
    assert len(api.world.engine.node.tasks) == 0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", openai.BadRequestError),
        ("context_length_exceeded", openai.BadRequestError),
        ("engine_dead", openai.InternalServerError),
    ],
)
async def test_what_the_worker_refuses(api: Api, code: str, kind: type[openai.APIStatusError]) -> None:
    """What only the worker can tell is told with its own status too, streamed or not, and once."""
    api.world.on_task = fails(code, "no: because")
    for stream in (False, True):
        async with client_of(api, max_retries=2) as client:
            with pytest.raises(kind) as raised:
                await client.chat.completions.create(**HELLO, stream=stream)
            assert raised.value.code == code
            assert "no: because" in raised.value.message
            assert raised.value.request_id in api.world.engine.node.tasks
    assert len(api.world.engine.node.tasks) == 2, "nothing was tried twice"


async def test_a_failure_in_the_middle(api: Api) -> None:
    """An error after some text is an error for the client, with the text before it."""
    api.world.on_task = hold
    async with client_of(api) as client:
        stream = await client.chat.completions.create(**HELLO, stream=True)
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        assert texts == ["", "held"]
        (session_id,) = api.world.workers
        api.world.exit(session_id, 9)
        with pytest.raises(openai.APIError, match="exited with code 9") as raised:
            await anext(stream)
        assert raised.value.code == "worker_exited"


async def test_the_same_request_again(api: Api) -> None:
    """With an Idempotency-Key the same request gets the same answer, and is done once; another is refused."""
    key = {"Idempotency-Key": "k1"}
    for body in (HELLO, {**HELLO, "stream": True}):
        key = {"Idempotency-Key": f"k{len(body)}"}
        first = await api.ask("POST", CHAT, body, headers=key)
        again = await api.ask("POST", CHAT, body, headers=key)
        assert first.status == again.status == 200
        assert first.headers["X-Request-ID"] == again.headers["X-Request-ID"]
        if body is HELLO:
            assert first.json == again.json
        else:
            assert chunks(first.raw) == chunks(again.raw)
        other = await api.ask("POST", CHAT, {**body, "seed": 1}, headers=key)
        assert (other.status, other.json["error"]["code"]) == (409, "idempotency_mismatch")
        assert other.headers["x-should-retry"] == "false"
    assert len(api.world.engine.node.tasks) == 2


async def test_a_key_is_looked_up_before_a_session(tmp_path: Path) -> None:
    """A request that is known is answered also where no new one would be taken."""
    async with api_world(tmp_path, rules=Rules(session_queue_max=0, gpu_wait_max=0)) as api:
        api.world.on_task = says("x")
        first = await api.ask("POST", CHAT, HELLO, headers={"Idempotency-Key": "k"})
        api.world.engine.report(ev.DrainOrdered())
        again = await api.ask("POST", CHAT, HELLO, headers={"Idempotency-Key": "k"})
        assert (again.status, again.json) == (200, first.json)
        fresh = await api.ask("POST", CHAT, HELLO)
        assert (fresh.status, fresh.json["error"]["code"]) == (503, "shutting_down")
        assert fresh.headers["x-should-retry"] == "true"


async def test_a_failure_is_an_answer_too(api: Api) -> None:
    """The same request with its key gets the same failure, so that no client tries it again by itself."""
    api.world.on_task = fails("shutdown", "no more")
    first = await api.ask("POST", CHAT, HELLO)
    keyed = await api.ask("POST", CHAT, HELLO, headers={"Idempotency-Key": "k"})
    again = await api.ask("POST", CHAT, HELLO, headers={"Idempotency-Key": "k"})
    assert [answer.status for answer in (first, keyed, again)] == [503] * 3
    tried = [answer.headers["x-should-retry"] for answer in (first, keyed, again)]
    assert tried == ["true", "false", "false"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_history_that_is_gone(api: Api, stream: bool) -> None:
    """A known request of whose answer the end alone is kept is told so too, streamed or not."""
    headers, body = {"Idempotency-Key": "k"}, {**HELLO, "stream": stream}
    first = await api.ask("POST", CHAT, body, headers=headers)
    kept = api.world.engine.streams.get(first.headers["X-Request-ID"])
    assert kept is not None
    kept.forget()
    again = await api.ask("POST", CHAT, body, headers=headers)
    assert (again.status, again.json["error"]["code"]) == (410, "events_gone")


async def test_events_that_are_gone(api: Api) -> None:
    """A known request whose answer is not kept any more is told so, and not done again."""
    headers = {"Idempotency-Key": "k"}
    first = await api.ask("POST", CHAT, HELLO, headers=headers)
    api.world.engine.streams.forget(first.headers["X-Request-ID"])
    again = await api.ask("POST", CHAT, HELLO, headers=headers)
    assert (again.status, again.json["error"]["code"]) == (410, "events_gone")


async def test_the_description(api: Api) -> None:
    """The OpenAPI document names the parameters that are supported, and the header that pins a session."""
    document = (await api.ask("GET", "/openapi.json", tenant=None)).json
    operation = document["paths"][CHAT]["post"]
    assert {"application/json", "text/event-stream"} <= operation["responses"]["200"]["content"].keys()
    assert "X-Session-ID" in [parameter["name"] for parameter in operation["parameters"]]
    body = document["components"]["schemas"]["ChatBody"]
    assert {"messages", "max_tokens", "max_completion_tokens", "stop", "seed"} <= body["properties"].keys()
    assert body["additionalProperties"] is False
    assert KEY not in str(document)
