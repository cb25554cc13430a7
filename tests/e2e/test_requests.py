"""Requests that are refused: who may ask, for what, and in which form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from gpu_server.client import Refused
from tests.e2e.harness import Caller, Service, body, only_docker, only_process

SUBMIT = "/api/tasks/submit"

# -- who asks -----------------------------------------------------------------------------------------------

ROUTES = [
    ("POST", SUBMIT),
    ("GET", "/api/tasks/t_1"),
    ("GET", "/api/tasks/t_1/events"),
    ("DELETE", "/api/tasks/t_1"),
    ("GET", "/api/sessions"),
    ("POST", "/api/sessions"),
    ("GET", "/api/sessions/s_1"),
    ("DELETE", "/api/sessions/s_1"),
    ("POST", "/api/sessions/s_1/keepalive"),
]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "wrong"},
        {"X-API-Key": ""},
        {"X-API-Key": "schlüssel"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic d3Jvbmc6d3Jvbmc="},
        {"Authorization": "Bearer"},
    ],
)
@only_process
async def test_every_route_needs_the_key(service: Service, headers: dict[str, str]) -> None:
    """Without the key, or with a wrong one, the answer is 401 and says how to ask, whatever the body is."""
    async with aiohttp.ClientSession(service.url, headers=headers) as http:
        for method, path in ROUTES:
            async with http.request(method, path, data=b"{" if method == "POST" else None) as answer:
                problem = await answer.json(content_type="application/problem+json")
                assert (answer.status, problem["code"]) == (401, "unauthorized"), (method, path)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert service.key not in await answer.text()


@only_process
async def test_the_key_as_a_bearer_token(service: Service) -> None:
    """`Authorization: Bearer` is as good as `X-API-Key`; who names no tenant is `default`."""
    headers = {"Authorization": f"Bearer {service.key}"}
    async with aiohttp.ClientSession(service.url, headers=headers) as http:
        async with http.get("/api/sessions") as answer:
            assert answer.status == 200
            assert {session["tenant"] for session in (await answer.json())["sessions"]} <= {"default"}
        async with http.post(SUBMIT, json=body(oneoff=True, prompt="x")) as answer:
            assert answer.status == 200
            assert "task_finish" in await answer.text()
        async with http.get("/api/sessions") as answer:
            assert {session["tenant"] for session in (await answer.json())["sessions"]} == {"default"}


@only_process
async def test_health_is_open_but_not_to_a_wrong_key(service: Service) -> None:
    """`/health` needs no key; one that is sent must be right."""
    async with aiohttp.ClientSession(service.url) as http:
        async with http.get("/health") as answer:
            health = await answer.json()
        assert (health["status"], health["ready"], health["runtime"]) == ("ok", True, service.runtime)
        async with http.get("/health", headers={"X-API-Key": "wrong"}) as answer:
            assert answer.status == 401


@pytest.mark.parametrize("tenant", ["", "a b", "a\u00e9", "x" * 129, "a;b"])
@only_process
async def test_a_tenant_name_has_a_form(service: Service, tenant: str) -> None:
    """X-Tenant-ID is refused when it is empty, too long, or has other characters than it may."""
    headers = {"X-API-Key": service.key, "X-Tenant-ID": tenant}
    async with (
        aiohttp.ClientSession(service.url, headers=headers) as http,
        http.get("/api/sessions") as answer,
    ):
        assert (answer.status, (await answer.json(content_type=None))["code"]) == (422, "invalid_request")


async def test_tenants_do_not_see_each_other(service: Service) -> None:
    """Another tenant's session or task is as unknown as one that never was, for every route."""
    async with service.caller() as mine, service.caller() as other:
        task = await mine.working(hang=True)
        refused = [
            ("GET", f"/api/sessions/{task.session_id}", None, "session_not_found"),
            ("DELETE", f"/api/sessions/{task.session_id}", None, "session_not_found"),
            ("POST", f"/api/sessions/{task.session_id}/keepalive", None, "session_not_found"),
            ("POST", SUBMIT, body(session=task.session_id), "session_not_found"),
            ("GET", f"/api/tasks/{task.task_id}", None, "task_not_found"),
            ("GET", f"/api/tasks/{task.task_id}/events", None, "task_not_found"),
            ("DELETE", f"/api/tasks/{task.task_id}", None, "task_not_found"),
        ]
        for method, path, content, code in refused:
            status, problem, _ = await other.ask(method, path, json=content)
            assert (status, problem["code"]) == (404, code), path
            # Not even the wording tells whether it is there.
            unknown = path.replace(task.task_id, "t_0").replace(task.session_id, "s_0")
            blank = json.loads(json.dumps(content).replace(task.session_id, "s_0"))
            _, never, _ = await other.ask(method, unknown, json=blank)
            text = json.dumps(problem).replace(task.task_id, "t_0").replace(task.session_id, "s_0")
            assert json.loads(text) == never
        assert await other.client.call("GET", "/api/sessions") == {"sessions": []}
        listed = (await mine.client.call("GET", "/api/sessions"))["sessions"]
        assert [session["session_id"] for session in listed] == [task.session_id]

        (slot,) = task.of("connection")[-1]["gpu_ids"]
        held = {"session_id": task.session_id, "task_ids": [task.task_id]}
        for caller, holder in ((mine, held), (other, None)):
            health = await caller.client.call("GET", "/health")
            assert {s["id"]: s["held_by"] for s in health["gpus"]}[slot] == holder
            assert {s["id"]: s["state"] for s in health["gpus"]}[slot] == "leased"
        assert mine.tenant not in json.dumps(service.health())
        assert task.session_id not in json.dumps(service.health())
        assert (await mine.task(task.task_id))["state"] == "running"


# -- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"model_id": "nobody"}, 404, "model_not_found"),
        ({"model_id": "../etc"}, 404, "model_not_found"),
        ({"task_preset": "nothing"}, 404, "preset_not_found"),
        ({"task_preset": "forbidden"}, 403, "image_not_allowed"),
        ({"task_preset": "program"}, 422, "preset_not_supported"),
        ({"task_preset": "huge"}, 422, "no_such_capacity"),
        ({"session_id": "s_01ARZ3NDEKTSV4RRFFQ69G5FAV"}, 404, "session_not_found"),
        ({"session_id": "../../etc/passwd"}, 404, "session_not_found"),
        ({"timeout_seconds": 601}, 422, "timeout_out_of_range"),
        ({"timeout_seconds": 0}, 422, "invalid_request"),
        ({"timeout_seconds": -1}, 422, "invalid_request"),
        ({"timeout_seconds": "10"}, 422, "invalid_request"),
        ({"timeout_seconds": True}, 422, "invalid_request"),
        ({"timeout_seconds": 1e999}, 422, "invalid_request"),
        ({"task_type": "batch"}, 422, "invalid_request"),
        ({"task_type": None}, 422, "invalid_request"),
        ({"task_type": "oneoff", "session_id": "s_1"}, 422, "invalid_request"),
        ({"task_difficulty": "extreme"}, 422, "invalid_request"),
        ({"model_id": 7}, 422, "invalid_request"),
        ({"model_id": ""}, 422, "invalid_request"),
        ({"model_id": "x" * 300}, 422, "invalid_request"),
        ({"model_id": ["echo"]}, 422, "invalid_request"),
        ({"metadata": "text"}, 422, "invalid_request"),
        ({"metadata": [1]}, 422, "invalid_request"),
        ({"metadata": None}, 422, "invalid_request"),
        ({"session_id": 5}, 422, "invalid_request"),
        ({"tenant": "somebody"}, 422, "invalid_request"),
        ({"docker_image": "evil:1"}, 422, "invalid_request"),
    ],
)
@only_process
async def test_a_submission_that_cannot_be(
    caller: Caller, changes: dict[str, Any], status: int, code: str
) -> None:
    """Each mistake has its status and its stable code, and changes nothing."""
    content = json.dumps({**body(prompt="x"), **changes})
    headers = {"Content-Type": "application/json"}
    answered, problem, answer = await caller.ask("POST", SUBMIT, data=content, headers=headers)
    assert (answered, problem["code"], problem["status"]) == (status, code, status)
    assert answer["Content-Type"] == "application/problem+json"
    assert problem["detail"]
    assert await caller.client.call("GET", "/api/sessions") == {"sessions": []}


@pytest.mark.parametrize("missing", ["task_type", "model_id", "task_preset"])
@only_process
async def test_a_submission_without_a_field(caller: Caller, missing: str) -> None:
    """A field that is needed is named when it is not there."""
    content = {name: value for name, value in body(prompt="x").items() if name != missing}
    status, problem, _ = await caller.ask("POST", SUBMIT, json=content)
    assert (status, problem["code"]) == (422, "invalid_request")
    assert missing in problem["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"task_type": "session",}',
        b'{"task_type": NaN}',
        b"\x00" * 100,
        b'{"model_id": "\\ud800"}',
    ],
)
@only_process
async def test_a_body_that_is_no_json_object(caller: Caller, content: bytes) -> None:
    """It is refused as `invalid_request`, on every route that takes a body."""
    for path in (SUBMIT, "/api/sessions"):
        headers = {"Content-Type": "application/json"}
        status, problem, _ = await caller.ask("POST", path, data=content, headers=headers)
        assert (status, problem["code"]) == (422, "invalid_request"), path


@pytest.mark.parametrize("depth", [31, 32, 33, 200, 1_000, 1_025, 10_000, 100_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
@only_process
async def test_metadata_nested_deeply(caller: Caller, depth: int, left: str, right: str) -> None:
    """METADATA_MAX_DEPTH levels are taken, one more is not, and no depth does the service any harm."""
    inner = depth - 1  # metadata itself is the first level
    nested = '{"prompt":' + left * inner + ("1" if left != "[" else "") + right * inner + "}"
    wish = json.dumps(body("program", oneoff=True))
    content = wish.replace('"metadata": {}', f'"metadata": {nested}')
    headers = {"Content-Type": "application/json"}
    if depth <= 32:
        async with caller.http.post(SUBMIT, data=content, headers=headers) as answer:
            assert answer.status == 200
            assert "task_finish" in await answer.text()
        return
    status, problem, _ = await caller.ask("POST", SUBMIT, data=content, headers=headers)
    assert (status, problem["code"] in ("metadata_too_deep", "invalid_request")) == (422, True)
    if depth <= 1_000:
        assert problem["code"] == "metadata_too_deep"
    assert caller.service.is_all_free(caller.service.health())


@only_process
async def test_a_body_that_is_too_large(caller: Caller) -> None:
    """It is refused while it arrives, whether its size was announced or not; one byte less is taken."""
    headers = {"Content-Type": "application/json"}
    most = 1_000_000
    wish = json.dumps(body("program", oneoff=True, code="", pad="")).replace('"pad": ""', '"pad": "%s"')
    fits = wish % ("x" * (most - len(wish) + 2))
    assert len(fits) == most
    async with caller.http.post(SUBMIT, data=fits, headers=headers) as answer:
        assert answer.status == 200
        assert '"status":"completed"' in await answer.text()

    status, problem, _ = await caller.ask("POST", SUBMIT, data=fits + " ", headers=headers)
    assert (status, problem["code"]) == (413, "body_too_large")

    async def endless() -> Any:
        while True:
            yield b" " * 65536

    # The connection may be closed on the sender before it has read the answer.
    try:
        status, problem, _ = await caller.ask("POST", SUBMIT, data=endless(), headers=headers)
    except aiohttp.ClientError:
        pass
    else:
        assert (status, problem["code"]) == (413, "body_too_large")
    assert caller.service.memory("VmHWM") < 400 << 20


@only_process
async def test_unknown_places(caller: Caller) -> None:
    """What is not there is 404, a wrong method 405, a task or session that never was has its own code."""
    for method, path, status, code in (
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", SUBMIT, 404, "task_not_found"),  # read as the task named `submit`
        ("PUT", "/api/sessions", 405, "method_not_allowed"),
        ("GET", "/api/tasks/t_0", 404, "task_not_found"),
        ("GET", "/api/tasks/t_0/events", 404, "task_not_found"),
        ("DELETE", "/api/tasks/t_0", 404, "task_not_found"),
        ("GET", "/api/sessions/s_0", 404, "session_not_found"),
        ("DELETE", "/api/sessions/s_0", 404, "session_not_found"),
        ("POST", "/api/sessions/s_0/keepalive", 404, "session_not_found"),
    ):
        answered, problem, answer = await caller.ask(method, path)
        assert (answered, problem["code"]) == (status, code), path
        assert answer["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("last", ["-1", "x", "1.5", "9" * 40, "1 2"])
@only_process
async def test_a_last_event_id_that_is_no_number(caller: Caller, last: str) -> None:
    """It is refused; one that is too high knows more than the service does, and gets the end again."""
    task = await caller.run("program", oneoff=True, code="")
    path = f"/api/tasks/{task.task_id}/events"
    status, problem, _ = await caller.ask("GET", path, headers={"Last-Event-ID": last})
    assert (status, problem["code"]) == (422, "invalid_request")
    async with caller.events(task.task_id, after=999) as again, asyncio.timeout(60):
        assert (await again.until("task_finish")).id == task.events[-1].id


async def test_a_session_that_does_not_fit_the_task(caller: Caller) -> None:
    """A task must ask for its session's model, preset and difficulty, and for a session that is open."""
    session_id = await caller.warm()
    for wish in (
        body(session=session_id, model="other"),
        body("batch", session=session_id),
        {**body(session=session_id), "task_difficulty": "high"},
    ):
        status, problem, _ = await caller.ask("POST", SUBMIT, json=wish)
        assert (status, problem["code"]) == (409, "session_mismatch"), wish
    await caller.kill(session_id)
    await caller.ended(session_id)
    with pytest.raises(Refused) as refused:
        await caller.run(session=session_id)
    assert (refused.value.status, refused.value.code) == (409, "session_closed")


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"model_id": "nobody"}, 404, "model_not_found"),
        ({"task_preset": "nothing"}, 404, "preset_not_found"),
        ({"task_preset": "program"}, 422, "preset_not_supported"),
        ({"task_preset": "forbidden"}, 403, "image_not_allowed"),
        ({"task_preset": "huge"}, 422, "no_such_capacity"),
        ({"metadata": {}}, 422, "invalid_request"),
        ({"task_difficulty": 1}, 422, "invalid_request"),
    ],
)
@only_process
async def test_a_session_that_cannot_be(
    caller: Caller, changes: dict[str, Any], status: int, code: str
) -> None:
    """Starting a session ahead is refused for the same reasons as a task."""
    wish = {"model_id": "echo", "task_preset": "stream", **changes}
    answered, problem, _ = await caller.ask("POST", "/api/sessions", json=wish)
    assert (answered, problem["code"]) == (status, code)


@only_process
async def test_tiers(serve: Callable[..., Service]) -> None:
    """A task gets a slot of its difficulty, waits where that is taken, and is refused where there is none."""
    settings = {"CPU_SLOTS": 2, "GPU_DEVICE_DIFFICULTY": "cpu0:low,cpu1:low", "GPU_WAIT_MAX_SECONDS": 0}
    async with serve(**settings).caller() as caller:
        status, problem, _ = await caller.ask("POST", SUBMIT, json={**body(), "task_difficulty": "high"})
        assert (status, problem["code"]) == (422, "no_such_capacity")
    settings["GPU_DEVICE_DIFFICULTY"] = "cpu0:low,cpu1:high"
    async with serve(**settings).caller() as caller:
        session = await caller.open(task_difficulty="high")
        assert (session["gpu_ids"], session["task_difficulty"]) == (["cpu1"], "high")
        wish = {**body(), "task_difficulty": "high"}
        status, problem, _ = await caller.ask("POST", SUBMIT, json=wish)
        assert (status, problem["code"]) == (503, "no_available_gpu")
        assert (await caller.open(task_difficulty="low"))["gpu_ids"] == ["cpu0"]


@only_docker
async def test_an_image_that_is_not_there(caller: Caller) -> None:
    """The task fails with `image_missing`, and its slot is free again."""
    task = await caller.run("no_image", prompt="x")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", "image_missing")
    assert "gpu-server/no-such-image:0" in end["error"]["message"]
    assert (await caller.ended(task.session_id))["close_reason"] == "start_failed"


@only_process
async def test_a_preset_without_a_command_for_processes(caller: Caller) -> None:
    """Where workers are processes, a preset without `process_command` fails its task and says so."""
    task = await caller.run("no_command", prompt="x")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", "start_failed")
    assert "process_command" in end["error"]["message"]


@only_process
async def test_many_at_once(caller: Caller) -> None:
    """Bad requests by the hundred leave no trace."""
    wishes = [body(model=f"m{n}") if n % 2 else {"junk": n} for n in range(300)]
    answers = await asyncio.gather(*(caller.ask("POST", SUBMIT, json=wish) for wish in wishes))
    assert {(status, problem["code"]) for status, problem, _ in answers} == {
        *((404, "model_not_found"), (422, "invalid_request"))
    }
