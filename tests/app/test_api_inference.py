"""`POST /inference`: sealed requests over HTTP, from the client's bytes to the worker's, and back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_server.core import events as ev
from gpu_server.sealed.delivery import unpack
from tests.app.reading import numbered_without_a_hole
from tests.app.sealed_world import SealedClient, sealed_world
from tests.fakes.key_service import OTHER_ARN

CANARY = "canary-4711"


def words(events: list[Any]) -> list[str]:
    return [event.data["delta"] for event in events if event.name == "text_delta"]


async def test_there_and_back(tmp_path: Path) -> None:
    """What a client has sealed is opened by its session's worker, and the answer by the client alone."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal(f"the {CANARY} sings")
        answer = await client.send(request)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/octet-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        events = request.read(answer.raw)
        assert words(events) == ["the", CANARY, "sings"]
        assert (events[-1].name, events[-1].data["usage"]) == ("end", {"words": 3})
        assert sealed.workers.ran == [(request.request_id, {"prompt": f"the {CANARY} sings"})]
        task = (await sealed.api.ask("GET", answer.headers["Location"])).json
        assert (task["state"], task["session_id"]) == ("completed", client.session_id)


async def test_nothing_is_in_the_clear(tmp_path: Path) -> None:
    """Neither what the worker is given nor what anybody could read of the task holds a word of it."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal(CANARY)
        answer = await client.send(request)
        stream = (await sealed.api.ask("GET", f"{answer.headers['Location']}/events")).raw
        for raw in (request.body, answer.raw, stream, *sealed.workers.bodies):
            assert CANARY.encode() not in raw
        kept = _all_of(tmp_path)
        assert kept
        assert CANARY.encode() not in kept


def _all_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_what_the_worker_is_given(tmp_path: Path) -> None:
    """The names of the headers, the grant and the bytes as they came: it believes none of them."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("a")
        await client.send(request)
        given = unpack(sealed.workers.bodies[0])
        binding = client.binding
        assert (given.tenant, given.pool, given.kms_key_arn) == ("a", "default", binding.kms_key_arn)
        assert (given.request_id, given.body) == (request.request_id, request.body)
        assert (given.epoch, given.wrapped_key) == (binding.epoch, binding.wrapped_key)


async def test_as_events(tmp_path: Path) -> None:
    """With `Accept: text/event-stream` the answer is the task's events, which can be followed again."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("one two")
        answer = await client.send(request, accept="text/event-stream")
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert numbered_without_a_hole(answer.events)
        assert words(request.read_events(answer.events)) == ["one", "two"]
        finish = answer.events[-1]
        assert finish.name == "task_finish"
        assert "usage" not in finish.data
        before = next(event for event in answer.events if event.name == "sealed").number
        again = await sealed.api.ask(
            "GET", f"{answer.headers['Location']}/events", headers={"Last-Event-ID": str(before)}
        )
        assert again.events == [e for e in answer.events if (e.number or 0) > (before or 0)]


async def test_a_session_that_is_still_loading(tmp_path: Path) -> None:
    """It can be opened as soon as its worker shows a key, and a request then waits for it."""
    async with sealed_world(tmp_path) as sealed:
        sealed.api.world.health["status"] = "loading"
        session_id = await sealed.start(ready=False)
        world = sealed.api.world
        await world.until(lambda: world.session(session_id).worker_key is not None)
        client = await sealed.open(session_id)
        request = client.seal("later")
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(client.send(request))
            await world.until(lambda: world.session(session_id).queue)
            world.workers[session_id].health["status"] = "ready"
        assert words(request.read(asking.result().raw)) == ["later"]


# -- the same again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", [None, "text/event-stream"])
async def test_the_same_bytes_again(tmp_path: Path, accept: str | None) -> None:
    """They give the same answer, and run once."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("once")
        first, second = [await client.send(request, accept=accept) for _ in range(2)]
        assert first.raw == second.raw
        assert first.headers["Location"] == second.headers["Location"]
        assert len(sealed.workers.bodies) == 1


async def test_the_same_bytes_when_the_task_is_forgotten(tmp_path: Path) -> None:
    """The service may have forgotten the task; its worker has not, and nothing runs twice."""
    async with sealed_world(tmp_path, settings={"task_retention_seconds": 5}) as sealed:
        client = await sealed.client()
        request = client.seal("once")
        first = await client.send(request)
        world = sealed.api.world
        world.clock.advance(6)
        world.engine.report(ev.Tick())
        second = await client.send(request)
        assert first.headers["Location"] != second.headers["Location"]
        assert first.raw == second.raw
        assert len(sealed.workers.ran) == 1


async def test_the_same_bytes_after_the_session_has_ended(tmp_path: Path) -> None:
    """As long as the task is known its answer is given."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("once")
        first = await client.send(request)
        await sealed.api.ask("DELETE", f"/api/sessions/{client.session_id}")
        assert (await client.send(request)).raw == first.raw
        (await client.send(client.seal("new"))).problem(409, "session_closed")


async def test_other_bytes_under_the_same_name(tmp_path: Path) -> None:
    """They are refused, by the service as long as it knows the first, and by the worker after that."""
    async with sealed_world(tmp_path, settings={"task_retention_seconds": 5}) as sealed:
        client = await sealed.client()
        await client.send(client.seal("one", "r"))
        other = client.seal("two", "r")
        assert (await client.send(other)).problem(409, "replay")["session_id"] == client.session_id
        sealed.api.world.clock.advance(6)
        sealed.api.world.engine.report(ev.Tick())
        answer = await client.send(other)
        problem = answer.problem(409, "replay")
        assert answer.headers["Location"] == f"/api/tasks/{problem['task_id']}"
        assert [metadata["prompt"] for _, metadata in sealed.workers.ran] == ["one"]
        assert sealed.api.world.session(client.session_id).state == "ready"


@pytest.mark.parametrize("change", [{"x_model_pool": "one"}, {"x_kms_key_arn": OTHER_ARN}])
async def test_the_same_bytes_with_other_headers(tmp_path: Path, change: dict[str, str]) -> None:
    """They are another request, also while the answer of the first is known."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("x")
        assert (await client.send(request)).status == 200
        (await client.send(request, **change)).problem(409, "replay")


async def test_names_belong_to_sessions(tmp_path: Path) -> None:
    """The same request id in another session is another request."""
    async with sealed_world(tmp_path) as sealed:
        for _ in range(2):
            client = await sealed.client()
            assert (await client.send(client.seal("x", "r"))).status == 200
        assert len(sealed.workers.ran) == 2


# -- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"x_api_key": None}, 401, "unauthorized"),
        ({"x_kms_key_arn": None}, 422, "invalid_request"),
        ({"x_kms_key_arn": "key"}, 422, "invalid_request"),
        ({"x_kms_key_arn": OTHER_ARN}, 409, "session_mismatch"),
        ({"x_tenant_id": None}, 422, "invalid_request"),
        ({"x_tenant_id": "b"}, 404, "session_not_found"),
        ({"x_request_id": None}, 422, "invalid_request"),
        ({"x_request_id": "with a space"}, 422, "invalid_request"),
        ({"x_request_id": "r" * 129}, 422, "invalid_request"),
        ({"x_model_pool": "one"}, 409, "session_mismatch"),
        ({"x_model_pool": "with a space"}, 422, "invalid_request"),
        ({"content_type": "application/json"}, 422, "invalid_request"),
        ({"content_type": ""}, 422, "invalid_request"),
    ],
)
async def test_headers(tmp_path: Path, changes: dict[str, str | None], status: int, code: str) -> None:
    """Each of the four is needed but the pool, and must be the session's; what is refused has not run."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        (await client.send(client.seal("x"), **changes)).problem(status, code)
        assert (await client.send(client.seal("x"), x_model_pool=None)).status == 200
        assert len(sealed.workers.ran) == 1


@pytest.mark.parametrize(
    "body", [b"", b"\0", b"\0\0\0\1", bytes(600), b"\xff\xff\xff\xff" + bytes(600), b'{"metadata": {}}']
)
async def test_bodies(tmp_path: Path, body: bytes) -> None:
    """What does not begin as a sealed request does is refused, and nothing of it is repeated."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("x")
        request.body = body
        (await client.send(request)).problem(422, "invalid_request")


async def test_brackets_are_no_depth(tmp_path: Path) -> None:
    """A body is bytes: whatever they look like, its size alone is bounded."""
    async with sealed_world(tmp_path, settings={"max_body_bytes": 8192}) as sealed:
        client = await sealed.client()
        request = client.seal("x")
        request.body += b"[" * 4000
        (await client.send(request)).problem(400, "decrypt_failed")
        request.body += b"[" * 8000
        (await client.send(request)).problem(413, "body_too_large")


async def test_a_key_without_a_grant(tmp_path: Path) -> None:
    """A session that was not opened, or not with this key, takes nothing that is sealed with it."""
    async with sealed_world(tmp_path) as sealed:
        opened, other = await sealed.client(), await sealed.start()
        elsewhere = SealedClient(sealed.api, other, replace(opened.binding, session_id=other), opened.psk)
        problem = (await elsewhere.send(elsewhere.seal("x"))).problem(409, "session_not_open")
        assert problem["session_id"] == other
        await sealed.api.ask("DELETE", f"/api/sessions/{other}")  # then opening it would be no use
        (await elsewhere.send(elsewhere.seal("x"))).problem(409, "session_closed")


async def test_a_plain_session(tmp_path: Path) -> None:
    """Nothing can be sealed to it."""
    async with sealed_world(tmp_path) as sealed:
        client, plain = await sealed.client(), await sealed.api.session()
        stranger = SealedClient(sealed.api, plain, replace(client.binding, session_id=plain), client.psk)
        (await stranger.send(stranger.seal("x"))).problem(422, "sealed_not_supported")


@pytest.mark.parametrize("part", ["head", "chunk"])
async def test_changed_on_the_way(tmp_path: Path, part: str) -> None:
    """What the worker cannot open has not run, and the session serves on."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("x")
        at = len(request.sealer.head) - 1 if part == "head" else -1
        changed = bytearray(request.body)
        changed[at] ^= 1
        request.body = bytes(changed)
        (await client.send(request)).problem(400, "decrypt_failed")
        assert sealed.workers.ran == []
        assert (await client.send(client.seal("y"))).status == 200


async def test_no_plain_way_in(tmp_path: Path) -> None:
    """Neither a plain task nor the OpenAI routes get into a sealed session."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        (await sealed.api.submit(session_id=session_id)).problem(409, "session_mismatch")
        body = {"model": "org/chat", "messages": [{"role": "user", "content": "x"}]}
        answer = await sealed.api.ask(
            "POST", "/v1/chat/completions", body, headers={"X-Session-ID": session_id}
        )
        assert answer.json["error"]["code"] == "session_mismatch"


# -- tasks that fail, clients that go ---------------------------------------------------------------------


async def test_a_dead_worker(tmp_path: Path) -> None:
    """Before the first byte of the answer its death has a status; what it said of itself is not read."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        world = sealed.api.world

        async def dies(call: Any) -> None:
            world.exit(client.session_id, 3)
            await asyncio.Event().wait()

        sealed.workers.before[1] = dies
        problem = (await client.send(client.seal("x"))).problem(500, "worker_exited")
        assert problem["session_id"] == client.session_id


async def test_a_client_that_goes_and_comes_back(tmp_path: Path) -> None:
    """Its task goes on, and the same bytes join it."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        going_on = asyncio.Event()

        async def waits(call: Any) -> None:
            await going_on.wait()

        sealed.workers.before[3] = waits
        request = client.seal("one two three")
        headers = client.headers(request)
        async with sealed.api.http.post("/inference", data=request.body, headers=headers) as answer:
            assert len(await answer.content.readexactly(32)) == 32
        world = sealed.api.world
        (task,) = world.engine.node.tasks.values()
        await world.until(lambda: task.readers == 0)
        async with asyncio.TaskGroup() as group:
            again = group.create_task(client.send(request))
            await world.until(lambda: task.readers == 1)
            going_on.set()
        assert words(request.read(again.result().raw)) == ["one", "two", "three"]
        assert len(sealed.workers.ran) == 1
