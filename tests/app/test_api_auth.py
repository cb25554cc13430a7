"""Who may ask, and on whose behalf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_server.api import auth
from tests.app.api_world import KEY, TASK, api_world

ROUTES = [
    ("POST", "/api/tasks/submit"),
    ("GET", "/api/tasks/t_1"),
    ("GET", "/api/tasks/t_1/events"),
    ("DELETE", "/api/tasks/t_1"),
    ("GET", "/api/sessions"),
    ("POST", "/api/sessions"),
    ("GET", "/api/sessions/s_1"),
    ("DELETE", "/api/sessions/s_1"),
    ("POST", "/api/sessions/s_1/keepalive"),
    ("POST", "/api/sessions/s_1/open"),
    ("POST", "/inference"),
    ("GET", "/metrics"),
    ("GET", "/api/slots"),
    ("GET", "/api/slots/0/certificates"),
    ("POST", "/api/slots/0/wash"),
    ("GET", "/api/certificates/h"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
]

WRONG = [
    {},
    {"X-API-Key": "wrong"},
    {"X-API-Key": ""},
    {"X-API-Key": KEY + "x"},
    {"X-API-Key": KEY[:-1]},
    {"X-API-Key": "k\u00e4y"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": "Bearer"},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"X-API-Key": "wrong", "Authorization": f"Bearer {KEY}"},
]


async def test_every_route_needs_a_key(tmp_path: Path) -> None:
    """Without a key, and with a wrong one, every route but the open ones answers 401, whatever the body."""
    async with api_world(tmp_path) as api:
        listed = {
            (
                method.upper(),
                path.replace("{task_id}", "t_1")
                .replace("{session_id}", "s_1")
                .replace("{slot_id}", "0")
                .replace("{record_hash}", "h"),
            )
            for path, methods in api.app.openapi()["paths"].items()
            for method in methods
        }
        assert listed == {*ROUTES, ("GET", "/health")}
        for method, path in ROUTES:
            body = TASK if path.endswith("submit") else {"model_id": "m", "task_preset": "p"}
            for wrong in WRONG if path == "/api/sessions" else WRONG[:2]:
                answer = await api.ask(method, path, body, tenant=None, headers=wrong)
                if path.startswith("/v1/"):
                    assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
                else:
                    answer.problem(401, "unauthorized")
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert KEY.encode() not in answer.raw
        assert api.world.engine.node.tasks == {}


async def test_keys(tmp_path: Path) -> None:
    """The key may come in either header, the scheme in any case."""
    async with api_world(tmp_path) as api:
        for right in (
            {"X-API-Key": KEY},
            {"Authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer  {KEY}"},
        ):
            assert (await api.ask("GET", "/api/sessions", tenant=None, headers=right)).status == 200


async def test_open_routes(tmp_path: Path) -> None:
    """Health and docs are open to all; a key that is sent must still be right."""
    async with api_world(tmp_path) as api:
        for path in ("/health", "/docs", "/openapi.json"):
            assert (await api.ask("GET", path, tenant=None)).status == 200
        wrong = await api.ask("GET", "/health", tenant=None, headers={"X-API-Key": "wrong"})
        wrong.problem(401, "unauthorized")


async def test_tenants(tmp_path: Path) -> None:
    """The tenant is the header's, `default` without one, and never the body's."""
    async with api_world(tmp_path) as api:
        session_id = await api.session("org/team:a.b-c_1")
        assert api.world.session(session_id).tenant == "org/team:a.b-c_1"
        own = {"X-API-Key": KEY}
        answer = await api.ask("POST", "/api/tasks/submit", {**TASK, "tenant": "b"}, tenant=None, headers=own)
        answer.problem(422, "invalid_request")
        first = (
            await api.ask("POST", "/api/tasks/submit", {**TASK, "task_type": "oneoff"}, tenant="b")
        ).events[0]
        assert api.world.task(first.data["task_id"]).tenant == "b"
        for tenant in ("", "a b", "x" * 129, "\u00e4", "a;b"):
            headers = {"X-API-Key": KEY, "X-Tenant-ID": tenant}
            refused = await api.ask("GET", "/api/sessions", tenant=None, headers=headers)
            refused.problem(422, "invalid_request")


async def test_other_tenants_are_unknown(tmp_path: Path) -> None:
    """What belongs to another tenant answers exactly like what never was."""
    async with api_world(tmp_path) as api:
        session_id = await api.session("a")
        events = (await api.submit("a", session_id=session_id)).events
        task_id = events[0].data["task_id"]
        for method, path, code in (
            ("GET", "/api/tasks/{}", "task_not_found"),
            ("GET", "/api/tasks/{}/events", "task_not_found"),
            ("DELETE", "/api/tasks/{}", "task_not_found"),
            ("GET", "/api/sessions/{}", "session_not_found"),
            ("DELETE", "/api/sessions/{}", "session_not_found"),
            ("POST", "/api/sessions/{}/keepalive", "session_not_found"),
        ):
            real = task_id if "task" in code else session_id
            theirs = (await api.ask(method, path.format(real), tenant="b")).problem(404, code)
            never = (await api.ask(method, path.format("x" * len(real)), tenant="b")).problem(404, code)
            assert {k: str(v).replace(real, "") for k, v in theirs.items()} == {
                k: str(v).replace("x" * len(real), "") for k, v in never.items()
            }
        (await api.submit("b", session_id=session_id)).problem(404, "session_not_found")
        assert (await api.ask("GET", "/api/sessions", tenant="b")).json == {"sessions": []}
        assert api.world.session(session_id).state == "ready"


async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are compared by `hmac.compare_digest`, over values whose length says nothing of the key's."""
    compared: list[tuple[Any, Any]] = []

    def compare(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return bool(one == other)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    assert auth._same(KEY, KEY)
    for given in ("", "x", KEY[:-1], KEY * 100, "\u00e4"):
        assert not auth._same(given, KEY)
    assert {len(value) for pair in compared for value in pair} == {32}
    assert len(compared) == 6
