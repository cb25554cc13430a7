"""The OpenAI interface, with the official client against the running service."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import openai
import pytest

from tests.e2e.harness import Caller, Service, until
from tests.e2e.openai_features import FEATURES, TALK, Feature, Target, text_of

ONE_SLOT = {"CPU_SLOTS": 1, "SESSION_QUEUE_MAX_SIZE": 0}
LONG = [{"role": "user", "content": " ".join(f"w{n}" for n in range(2000))}]


def target_of(caller: Caller, model: str = "echo") -> Target:
    return Target(
        url=caller.service.url, key=caller.service.key, tenant=caller.tenant, model=model, chooses=False
    )


@pytest.fixture
async def client(caller: Caller) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client as the caller's tenant, with `echo` for its model."""
    async with target_of(caller).client() as found:
        yield found


def ask(model: str = "echo", text: str = "hello there", **changes: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **changes}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
async def test_feature(caller: Caller, feature: Feature) -> None:
    """Each feature of the list, with the echo worker."""
    await feature(target_of(caller))


async def test_the_echo_is_an_echo(client: openai.AsyncOpenAI) -> None:
    """What the user said last comes back, to the byte, whole and streamed."""
    text = ' Grüße\n\n"你好" \\ data: x\n\n '
    whole = await client.chat.completions.create(**ask(text=text))
    assert whole.choices[0].message.content == text
    stream = await client.chat.completions.create(**ask(text=text, stream=True))
    assert text_of([chunk async for chunk in stream]) == text
    completion = await client.completions.create(model="echo", prompt=text)
    assert completion.choices[0].text == text


async def test_the_second_request_loads_nothing(caller: Caller, client: openai.AsyncOpenAI) -> None:
    """The first request starts a session, the second one goes to it, as a task that finds it ready."""
    for _ in range(2):
        await client.chat.completions.create(**ask("cold"))
    (session,) = (await caller.client.call("GET", "/api/sessions"))["sessions"]
    assert (session["model_id"], session["task_preset"], session["tasks_done"]) == ("cold", "serve", 2)
    raw = await client.chat.completions.with_raw_response.create(**ask("cold", stream=True))
    async with caller.events(raw.headers["x-request-id"]) as following:
        await following.finish()
        assert [data["status"] for data in following.of("connection")] == ["session_ready"]


async def test_a_cold_start_waits_and_says_why(caller: Caller) -> None:
    """While the session starts, comments tell how far it is; the first chunk is the answer's."""
    async with caller.http.post("/v1/chat/completions", json=ask("cold", stream=True)) as answer:
        assert answer.status == 200
        assert answer.headers["X-Session-ID"].startswith("s_")
        raw = await answer.read()
    head, _, _ = raw.partition(b"data: ")
    comments = [line for line in head.decode().split("\n\n") if line]
    assert all(line.startswith(": ") and "\n" not in line for line in comments), comments
    assert ": ping" in comments
    loading = [line.split()[2] for line in comments if line.startswith(": loading ")]
    assert loading, comments
    assert all(0 <= float(done) <= 1 for done in loading)
    assert raw.endswith(b"data: [DONE]\n\n")


async def test_a_start_that_fails(caller: Caller, client: openai.AsyncOpenAI) -> None:
    """A model that cannot be loaded is an error that names the reason, and is not tried again."""
    async with target_of(caller).client(max_retries=3) as patient:
        with pytest.raises(openai.InternalServerError, match="the weights are torn") as raised:
            await patient.chat.completions.create(**ask("broken"))
    assert raised.value.code == "start_failed"
    sessions = (await caller.client.call("GET", "/api/sessions"))["sessions"]
    assert len([session for session in sessions if session["model_id"] == "broken"]) == 1
    with pytest.raises(openai.APIError, match="the weights are torn"):
        _ = [chunk async for chunk in await client.chat.completions.create(**ask("broken", stream=True))]


async def test_the_least_busy_of_two(caller: Caller, client: openai.AsyncOpenAI) -> None:
    """With two sessions there, a request goes to the one that has less to do."""
    both = [(await caller.open("serve", model="slow"))["session_id"] for _ in range(2)]
    for session in both:
        await caller.in_state(session, "ready")
    asked = {"model": "slow", "messages": LONG, "stream": True}
    pin = {"X-Session-ID": both[0]}
    held = await client.chat.completions.with_raw_response.create(**asked, extra_headers=pin)
    other = await client.chat.completions.with_raw_response.create(**asked)
    assert held.headers["x-session-id"] == both[0]
    assert other.headers["x-session-id"] == both[1]
    for raw in (held, other):
        await raw.http_response.aclose()
    for session in both:
        await caller.in_state(session, "ready")


async def test_another_tenants_session(service: Service, caller: Caller, client: openai.AsyncOpenAI) -> None:
    """Another tenant's session is neither found nor to be had by its name."""
    first = await client.chat.completions.with_raw_response.create(**ask())
    async with service.caller() as stranger, target_of(stranger).client() as theirs:
        second = await theirs.chat.completions.with_raw_response.create(**ask())
        assert second.headers["x-session-id"] != first.headers["x-session-id"]
        pin = {"X-Session-ID": first.headers["x-session-id"]}
        with pytest.raises(openai.NotFoundError) as raised:
            await theirs.chat.completions.create(**ask(), extra_headers=pin)
        assert raised.value.code == "session_not_found"


async def test_queue_full(serve: Callable[..., Service]) -> None:
    """When nothing more may wait the client is told 429, and how long to wait; then it gets its answer."""
    async with serve(**ONE_SLOT).caller() as caller, target_of(caller).client() as client:
        session = await caller.warm("serve", model="slow")
        held = await client.chat.completions.create(model="slow", messages=LONG, stream=True)
        await anext(held)
        with pytest.raises(openai.RateLimitError) as raised:
            await client.chat.completions.create(**ask("slow"))
        assert raised.value.code == "session_queue_full"
        assert int(raised.value.response.headers["retry-after"]) > 0
        await held.close()
        await caller.in_state(session, "ready")
        assert (await client.chat.completions.create(**ask("slow"))).choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels(
    caller: Caller, client: openai.AsyncOpenAI, stream: bool
) -> None:
    """The task of a client that hangs up is cancelled at once, and the session is free for the next."""
    session = await caller.warm("serve", model="slow")
    asked = {"model": "slow", "messages": LONG, "stream": stream}
    if stream:
        answer = await client.chat.completions.create(**asked)
        task_id = (await anext(answer)).id.removeprefix("chatcmpl-")
        await answer.close()
        assert (await caller.task_in_state(task_id, "cancelled"))["error"]["code"] == "task_cancelled"
    else:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.5).chat.completions.create(**asked)
    await caller.in_state(session, "ready")
    answer = await client.chat.completions.create(**ask("slow"))
    assert answer.choices[0].message.content == "hello there"


async def test_a_worker_that_dies_in_the_middle(serve: Callable[..., Service]) -> None:
    """The client gets the text so far and then an error, never a clean end; the next request is served."""
    service = serve(CPU_SLOTS=2)
    async with service.caller() as caller, target_of(caller).client() as client:
        stream = await client.chat.completions.create(model="slow", messages=LONG, stream=True)
        chunks = [await anext(stream) for _ in range(3)]
        service.kill_a_worker(random.Random(0))

        async def read_on() -> None:
            async for chunk in stream:
                chunks.append(chunk)

        with pytest.raises(openai.APIError) as raised:
            await asyncio.wait_for(read_on(), 60)
        assert raised.value.code == "worker_exited"
        assert {chunk.choices[0].finish_reason for chunk in chunks} == {None}
        assert text_of(chunks).startswith("w0 w1 ")
        assert (await client.chat.completions.create(**ask())).choices[0].message.content == "hello there"


async def test_a_session_that_is_killed(caller: Caller, client: openai.AsyncOpenAI) -> None:
    """A request whose session is killed fails, and is not tried again by the client."""
    session = await caller.warm("serve", model="slow")

    async def ask_patiently() -> openai.ConflictError:
        async with target_of(caller).client(max_retries=3) as patient:
            with pytest.raises(openai.ConflictError) as raised:
                await patient.chat.completions.create(model="slow", messages=LONG)
            return raised.value

    async with asyncio.TaskGroup() as group:
        asking = group.create_task(ask_patiently())
        await caller.in_state(session, "working")
        await caller.kill(session)
    assert asking.result().code == "session_killed"
    assert len((await caller.client.call("GET", "/api/sessions"))["sessions"]) == 1


async def test_a_restart_breaks_streams(services: Any) -> None:
    """A stream of a service that dies is broken, not ended; the tasks of the clients that are gone are
    cancelled by the next life, and new requests find the sessions."""
    service = services.own(DISCONNECT_GRACE_SECONDS=1).start()
    try:
        async with service.caller() as caller, target_of(caller).client() as client:
            session = await caller.warm("serve", model="slow")
            stream = await client.chat.completions.create(model="slow", messages=LONG, stream=True)
            task_id = (await anext(stream)).id.removeprefix("chatcmpl-")
            service.crash()
            with pytest.raises(openai.APIError):
                _ = [chunk async for chunk in stream]
            service.launch()
            await service.serving()
            assert (await caller.task_in_state(task_id, "cancelled"))["error"]["code"] == "client_gone"
            raw = await client.chat.completions.with_raw_response.create(**ask("slow"))
            assert raw.headers["x-session-id"] == session
    finally:
        service.close()


async def test_the_client_needs_no_more_than_a_key(service: Service) -> None:
    """Key and address are all that the client is told; its tenant is then the default one."""
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key) as client:
        raw = await client.chat.completions.with_raw_response.create(model="echo", messages=TALK)
        session = raw.headers["x-session-id"]
        assert raw.parse().choices[0].message.content == TALK[-1]["content"]
    headers = {"X-API-Key": service.key}
    async with aiohttp.ClientSession(service.url, headers=headers) as http:
        async with http.delete(f"/api/sessions/{session}") as answer:
            assert answer.status == 200

        async def ended() -> bool:
            async with http.get(f"/api/sessions/{session}") as answer:
                return (await answer.json())["state"] == "closed"

        await until("the session has ended", ended)
