"""What goes wrong is always told in the same form, and never with what was sent."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gpu_server.api.problems import STATUS
from gpu_server.core.errors import RefusalCode
from gpu_server.core.sessions import Rules
from tests.app.api_world import Api, api_world
from tests.app.played_worker import hold

SECRET = "my-grandmothers-recipe"


def test_every_code_has_a_status() -> None:
    """Every refusal has a status, and it is one of a refusal."""
    assert set(STATUS) == set(RefusalCode)
    assert all(HTTPStatus(status).value >= 400 for status in STATUS.values())


async def test_unknown_routes_and_methods(tmp_path: Path) -> None:
    """What is not there and what may not be done is told as a problem too."""
    async with api_world(tmp_path) as api:
        for method, path in (("GET", "/"), ("GET", "/api"), ("POST", "/api/none"), ("GET", "/%ff%00")):
            (await api.ask(method, path)).problem(404, "not_found")
        for method, path in (
            ("PUT", "/api/sessions"),
            ("POST", "/health"),
            ("POST", "/api/tasks/t_1"),
            ("PATCH", "/api/sessions/s_1"),
        ):
            answer = await api.ask(method, path)
            answer.problem(405, "method_not_allowed")
            assert answer.headers["Allow"]
        head = await api.ask("HEAD", "/api/sessions")
        assert (head.status, head.raw) == (405, b"")
        assert head.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    "change",
    [
        {"task_type": SECRET},
        {"model_id": ""},
        {"model_id": SECRET * 20},
        {"model_id": {"x": SECRET}},
        {"task_difficulty": SECRET},
        {"metadata": SECRET},
        {"metadata": [SECRET]},
        {"timeout_seconds": SECRET},
        {"timeout_seconds": 0},
        {"timeout_seconds": -1},
        {"timeout_seconds": "5"},
        {"timeout_seconds": True},
        {"session_id": 5},
        {"session_id": ""},
        {"another": SECRET},
        {"x" * 100_000: SECRET},
    ],
    ids=lambda change: repr(change)[:40],
)
async def test_mistakes_do_not_echo(tmp_path: Path, change: dict[str, Any]) -> None:
    """A body that is not valid is refused with the place of each mistake, never with what stood there."""
    async with api_world(tmp_path) as api:
        answer = await api.submit(**change)
        problem = answer.problem(422, "invalid_request")
        (name,) = change
        assert [error["where"] for error in problem["errors"]] == [f"body.{name[:64]}"]
        assert problem["errors"][0]["what"]
        assert SECRET.encode() not in answer.raw
        assert len(answer.raw) < 2000


@pytest.mark.parametrize(
    ("content", "kind"), [(b"{bad", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain")]
)
async def test_a_body_that_is_no_object(tmp_path: Path, content: bytes, kind: str) -> None:
    """What is wrong with the whole of it is said so."""
    async with api_world(tmp_path) as api:
        headers = {"Content-Type": kind}
        answer = await api.ask("POST", "/api/tasks/submit", data=content, headers=headers)
        told = answer.problem(422, "invalid_request")["detail"]
        assert told == "the body must be a JSON object, sent with Content-Type: application/json"


async def test_mistakes_are_bounded(tmp_path: Path) -> None:
    """However many mistakes there are, the answer stays small: of unknown fields it tells the first."""
    async with api_world(tmp_path) as api:
        answer = await api.submit(**{f"f{n}": n for n in range(1000)})
        (error,) = answer.problem(422, "invalid_request")["errors"]
        assert error["where"] == "body.f0"


@pytest.mark.parametrize("last", ["-1", "x", "1.5", "1" * 16, ""])
async def test_last_event_id(tmp_path: Path, last: str) -> None:
    """A `Last-Event-ID` that is no event's number is refused."""
    async with api_world(tmp_path) as api:
        answer = await api.ask("GET", "/api/tasks/t_1/events", headers={"Last-Event-ID": last})
        answer.problem(422, "invalid_request")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model_id": "unknown"}, 404, "model_not_found"),
        ({"task_preset": "unknown"}, 404, "preset_not_found"),
        ({"task_preset": "exec"}, 422, "preset_not_supported"),
        ({"task_preset": "forbidden"}, 403, "image_not_allowed"),
        ({"task_preset": "nine"}, 422, "no_such_capacity"),
        ({"session_id": "s_unknown"}, 404, "session_not_found"),
        ({"timeout_seconds": 3601}, 422, "timeout_out_of_range"),
        ({"session_id": "s_1", "task_type": "oneoff"}, 422, "invalid_request"),
    ],
)
async def test_refused_tasks(tmp_path: Path, change: dict[str, Any], status: int, code: str) -> None:
    """Each refusal of a task has its own status and code, and leaves nothing behind."""
    async with api_world(tmp_path) as api:
        (await api.submit(**change)).problem(status, code)
        assert len(api.world.engine.streams) == 0


async def test_refused_by_a_session(tmp_path: Path) -> None:
    """What a session refuses: other presets, other difficulties, too many tasks, anything after its end."""
    async with api_world(tmp_path, settings={"session_queue_max_size": 0}) as api:
        session_id = await api.session()
        for change in ({"task_preset": "q"}, {"task_difficulty": "high"}):
            answer = await api.submit(session_id=session_id, **change)
            problem = answer.problem(409, "session_mismatch")
            assert problem["session_id"] == session_id
        api.world.workers[session_id].on_task = hold
        task_id, _ = api.world.submit(session_id)
        await api.world.saw(task_id, "held")
        full = await api.submit(session_id=session_id)
        full.problem(429, "session_queue_full")
        assert int(full.headers["Retry-After"]) > 0
        assert (await api.ask("DELETE", f"/api/sessions/{session_id}")).status == 200
        (await api.submit(session_id=session_id)).problem(409, "session_closed")
        (await api.ask("POST", f"/api/sessions/{session_id}/keepalive")).problem(409, "session_closed")


async def _occupied(api: Api) -> None:
    for _ in range(4):
        await api.session()


async def test_refused_by_the_line(tmp_path: Path) -> None:
    """Where nobody may wait the refusal says that no GPU is free; a full line says so."""
    async with api_world(tmp_path, settings={"gpu_wait_max_seconds": 0}) as api:
        await _occupied(api)
        answer = await api.submit()
        answer.problem(503, "no_available_gpu")
        assert int(answer.headers["Retry-After"]) > 0
    async with api_world(tmp_path, rules=Rules(gpu_wait_max_tasks=0)) as api:
        await _occupied(api)
        answer = await api.submit()
        answer.problem(429, "gpu_wait_line_full")
        assert int(answer.headers["Retry-After"]) > 0


async def test_shutting_down(tmp_path: Path) -> None:
    """A service that stops takes nothing more."""
    async with api_world(tmp_path) as api:
        await api.world.engine.shut_down(1)
        (await api.submit()).problem(503, "shutting_down")
        body = {"model_id": "m", "task_preset": "p"}
        (await api.ask("POST", "/api/sessions", body)).problem(503, "shutting_down")


async def test_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash is answered as a problem without a word of what it was."""
    async with api_world(tmp_path) as api:

        def crash() -> None:
            raise RuntimeError(SECRET)

        monkeypatch.setattr(api.world.engine.node, "live_sessions", crash)
        with capture_logs() as lines:
            answer = await api.ask("GET", "/health")
        assert [line["event"] for line in lines] == ["request.crashed"]
        answer.problem(500, "internal")
        assert SECRET.encode() not in answer.raw


async def test_a_broken_service(tmp_path: Path) -> None:
    """A service that has met a bug in a decision refuses everything that would need another."""
    async with api_world(tmp_path) as api:
        api.world.engine.broken = "a bug"
        (await api.submit()).problem(500, "internal")
