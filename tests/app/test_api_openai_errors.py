"""Below /v1 everything that goes wrong is told as OpenAI tells it, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gpu_server.api.openai_errors import failed, refused
from gpu_server.core.errors import FailureCode, Refusal, RefusalCode
from tests.app.api_world import Answer, Api, api_world
from tests.app.text_worker import HELLO

CHAT = "/v1/chat/completions"
SECRET = "my-grandmothers-recipe"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_world(tmp_path) as found:
        yield found


def error(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The answer's error, which must be this one and in the promised form."""
    assert answer.headers["Content-Type"] == "application/json"
    assert list(answer.json) == ["error"]
    told = answer.json["error"]
    assert (answer.status, told["code"]) == (status, code), told
    assert list(told) == ["message", "type", "param", "code"]
    assert told["message"]
    assert answer.headers["x-should-retry"] in ("true", "false")
    return dict(told)


async def test_unknown_routes_and_methods(api: Api) -> None:
    """What is not there, such as a route that only OpenAI has, is told in the shape that its clients read."""
    for path in ("/v1/embeddings", "/v1/", "/v1/chat"):
        error(await api.ask("POST", path, {}), 404, "not_found")
    answer = await api.ask("GET", CHAT)
    error(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "POST"
    (await api.ask("GET", "/v1")).problem(404, "not_found")
    (await api.ask("POST", "/v2/chat", {})).problem(404, "not_found")


async def test_keys(api: Api) -> None:
    """Every route needs a key; a Bearer token is one."""
    for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/org/chat"), ("POST", CHAT)):
        answer = await api.ask(method, path, tenant=None)
        assert error(answer, 401, "invalid_api_key")["type"] == "invalid_request_error"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        wrong = await api.ask(method, path, tenant=None, headers={"Authorization": "Bearer wrong"})
        error(wrong, 401, "invalid_api_key")
    right = {"Authorization": f"Bearer {api.service.internal_key}"}
    assert (await api.ask("GET", "/v1/models", tenant=None, headers=right)).status == 200
    twice = await api.ask("GET", "/v1/models", headers={"X-Tenant-ID": "not a tenant"})
    error(twice, 400, "invalid_request")


@pytest.mark.parametrize("data", [b"", b"{", b"5", b"null", b"[]", b'{"model":', b"\xff", b'{"a":NaN}'])
async def test_bodies_that_are_none(api: Api, data: bytes) -> None:
    """What is no JSON object is refused, and told as any other mistake."""
    headers = {"Content-Type": "application/json"}
    answer = await api.ask("POST", CHAT, data=data, headers=headers)
    told = error(answer, 400, "invalid_value")
    assert (told["type"], told["param"]) == ("invalid_request_error", None)
    assert told["message"] == "the body must be a JSON object, with Content-Type: application/json"


async def test_a_body_that_is_no_json(api: Api) -> None:
    """A body of another type is told the same, even if it looks right."""
    right = json.dumps(HELLO).encode()
    answer = await api.ask("POST", CHAT, data=right, headers={"Content-Type": "text/plain"})
    assert error(answer, 400, "invalid_value")["param"] is None


async def test_mistakes_do_not_echo(api: Api) -> None:
    """A mistake is told with its parameter and never with what stood there; it stays small."""
    for change in (
        {"messages": [{"role": "user", "content": {"x": SECRET}}]},
        {"temperature": SECRET},
        {"x" * 100_000: SECRET},
        {"tools": [SECRET]},
    ):
        answer = await api.ask("POST", CHAT, {**HELLO, **change})
        assert answer.status == 400
        assert SECRET.encode() not in answer.raw
        assert len(answer.raw) < 1000
    param = (await api.ask("POST", CHAT, {**HELLO, "temperature": 3})).json["error"]["param"]
    assert param == "temperature"


async def test_bounds(tmp_path: Path) -> None:
    """A body that is too large or nested too deep is refused before it is looked into."""
    async with api_world(tmp_path, settings={"max_body_bytes": 2000, "metadata_max_depth": 8}) as api:
        large = await api.ask("POST", CHAT, {**HELLO, "user": "x" * 2000})
        error(large, 413, "body_too_large")
        deep: Any = {}
        for _ in range(20):
            deep = {"a": deep}
        answer = await api.ask("POST", CHAT, {**HELLO, "logit_bias": deep})
        assert error(answer, 400, "metadata_too_deep")["message"] == "the body is nested too deep"
        headers = {"Idempotency-Key": "a b"}
        error(await api.ask("POST", CHAT, HELLO, headers=headers), 400, "invalid_request")
        answer = await api.ask("POST", CHAT, HELLO, headers={"X-Session-ID": "s" * 200})
        assert error(answer, 400, "invalid_value")["param"] == "X-Session-ID"


async def test_a_bug(api: Api) -> None:
    """A bug is told as one, without its details, and is not tried again."""
    api.app.state.service = None
    with capture_logs() as lines:
        answer = await api.ask("GET", "/v1/models")
    assert [line["event"] for line in lines] == ["request.crashed"]
    assert error(answer, 500, "internal")["type"] == "server_error"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("code", RefusalCode)
def test_every_refusal(code: RefusalCode) -> None:
    """Each has a status; a client tries again by itself exactly where waiting helps."""
    told = refused(Refusal(code, "why"))
    assert HTTPStatus(told.status).value >= 400
    assert told.headers()["x-should-retry"] == "false"
    again = refused(Refusal(code, "why", retry_after=7))
    assert again.headers()["x-should-retry"] == "true"
    assert again.headers()["Retry-After"] == "7"


@pytest.mark.parametrize("code", [*FailureCode, "out_of_cheese", "engine_dead", "invalid_request"])
def test_every_failure(code: str) -> None:
    """So has each failure of a task, also one that only its worker knows."""
    told = failed(code, "why")
    assert told.status >= 400
    assert (told.headers()["x-should-retry"] == "true") is (told.status == 503)
    assert ("Retry-After" in told.headers()) is (told.status == 503)
