"""`/api/sessions`: start, list, look, keep alive, kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_server.core import events as ev
from tests.app.api_world import api_world
from tests.app.sealed_world import sealed_world
from tests.fakes.enclave import FakeEnclave
from tests.fakes.key_service import ARN

START = {"model_id": "m", "task_preset": "p"}


async def test_start(tmp_path: Path) -> None:
    """A session is started without a task, becomes ready, and takes tasks."""
    async with api_world(tmp_path) as api:
        answer = await api.ask("POST", "/api/sessions", {**START, "task_difficulty": "high"})
        assert answer.status == 201
        started = answer.json
        assert (started["state"], started["task_difficulty"]) == ("preparing", "high")
        await api.world.ready(started["session_id"])
        shown = (await api.ask("GET", f"/api/sessions/{started['session_id']}")).json
        assert (shown["state"], shown["stage"]) == ("ready", None)
        events = (await api.submit(session_id=started["session_id"])).events
        assert events[0].data["status"] == "session_ready"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model_id": "unknown"}, 404, "model_not_found"),
        ({"task_preset": "unknown"}, 404, "preset_not_found"),
        ({"task_preset": "exec"}, 422, "preset_not_supported"),
        ({"task_preset": "forbidden"}, 403, "image_not_allowed"),
        ({"task_preset": "nine"}, 422, "no_such_capacity"),
        ({"task_difficulty": "medium"}, 422, "invalid_request"),
        ({"model_id": None}, 422, "invalid_request"),
        ({"task_preset": None}, 422, "invalid_request"),
        ({"model_id": None, "task_preset": None}, 422, "invalid_request"),
        ({"pool": "default"}, 422, "invalid_request"),
        ({"model_id": None, "task_preset": None, "pool": "unknown"}, 404, "pool_not_found"),
        ({"task_preset": "closed"}, 403, "sealed_required"),
        ({"kms_key_arn": ARN}, 503, "enclave_unavailable"),
        ({"metadata": {}}, 422, "invalid_request"),
    ],
)
async def test_refused_starts(tmp_path: Path, change: dict[str, object], status: int, code: str) -> None:
    """A start is refused for the same reasons as a task."""
    async with api_world(tmp_path) as api:
        (await api.ask("POST", "/api/sessions", {**START, **change})).problem(status, code)
        assert api.world.engine.node.sessions == {}


async def test_list(tmp_path: Path) -> None:
    """The list holds the tenant's own sessions, oldest first, ended ones until their retention is over."""
    async with api_world(tmp_path, settings={"tombstone_retention_seconds": 50}) as api:
        assert (await api.ask("GET", "/api/sessions")).json == {"sessions": []}
        mine = [await api.session("a"), await api.session("a")]
        await api.session("b")
        await api.ask("DELETE", f"/api/sessions/{mine[0]}")
        await api.world.until(lambda: api.world.session(mine[0]).ended)
        listed = (await api.ask("GET", "/api/sessions")).json["sessions"]
        assert [session["session_id"] for session in listed] == mine
        assert [session["state"] for session in listed] == ["closed", "ready"]
        for session in listed:
            assert session == (await api.ask("GET", f"/api/sessions/{session['session_id']}")).json | {
                name: session[name] for name in ("created_at", "closed_at", "expiry")
            }
        api.world.clock.advance(51)
        api.world.engine.report(ev.Tick())
        listed = (await api.ask("GET", "/api/sessions")).json["sessions"]
        assert [session["session_id"] for session in listed] == mine[1:]


async def test_kill(tmp_path: Path) -> None:
    """A killed session ends with its container; killing it twice is killing it once."""
    async with api_world(tmp_path) as api:
        session_id = await api.session()
        killed = await api.ask("DELETE", f"/api/sessions/{session_id}")
        assert killed.status == 200
        assert (killed.json["state"], killed.json["close_reason"]) == ("draining", "killed")
        await api.world.until(lambda: api.world.session(session_id).ended)
        again = await api.ask("DELETE", f"/api/sessions/{session_id}")
        assert (again.status, again.json["state"], again.json["close_reason"]) == (200, "closed", "killed")
        assert api.world.machine.containers == {}


async def test_keepalive(tmp_path: Path) -> None:
    """Keepalive renews the idle deadline; it never shortens it and never passes the lifetime."""
    settings = {"session_idle_timeout_seconds": 100, "session_max_lifetime_seconds": 250}
    async with api_world(tmp_path, settings=settings) as api:
        session_id = await api.session()
        session, clock = api.world.session(session_id), api.world.clock
        born = clock.now()
        assert session.idle_deadline == born + 100
        for passed, deadline in ((90, 190), (90, 250), (60, 250)):
            clock.advance(passed)
            answer = await api.ask("POST", f"/api/sessions/{session_id}/keepalive")
            assert answer.status == 200
            assert session.idle_deadline == born + deadline
            assert answer.json["expiry"]["reason"] == ("idle_timeout" if deadline < 250 else "max_lifetime")


# -- pools and sealed sessions ----------------------------------------------------------------------------


async def test_by_a_pool(tmp_path: Path) -> None:
    """A pool is another name for a preset, for plain sessions too."""
    async with api_world(tmp_path) as api:
        answer = await api.ask("POST", "/api/sessions", {"pool": "one"})
        assert answer.status == 201
        shown = answer.json
        assert (shown["model_id"], shown["task_preset"], shown["sealed"]) == ("m", "two", False)
        assert (shown["pool"], shown["kms_key_arn"], shown["worker_key"]) == (None, None, None)


@pytest.mark.parametrize(
    ("body", "pool", "preset"),
    [
        ({"pool": "default"}, "default", "p"),
        ({}, "default", "p"),  # DEFAULT_MODEL_POOL
        (START, "default", "p"),
        ({"pool": "closed"}, "closed", "closed"),
        ({"pool": "other"}, "other", "two"),
    ],
)
async def test_a_sealed_start(tmp_path: Path, body: dict[str, str], pool: str, preset: str) -> None:
    """It names a key, and has a pool whichever way its preset is named; it shows its worker's key."""
    async with sealed_world(tmp_path) as sealed:
        answer = await sealed.api.ask("POST", "/api/sessions", {**body, "kms_key_arn": ARN})
        started = answer.json
        assert (answer.status, started["sealed"], started["worker_key"]) == (201, True, None)
        assert (started["pool"], started["task_preset"], started["kms_key_arn"]) == (pool, preset, ARN)
        await sealed.api.world.ready(started["session_id"])
        shown = (await sealed.api.ask("GET", f"/api/sessions/{started['session_id']}")).json
        assert len(shown["worker_key"]) == 44


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"pool": "never"}, 422, "sealed_not_supported"),
        ({"pool": "unknown"}, 404, "pool_not_found"),
        ({"model_id": "m", "task_preset": "two"}, 422, "invalid_request"),  # two pools have it
        ({"model_id": "m", "task_preset": "q"}, 422, "invalid_request"),  # and none this
        ({"kms_key_arn": "key"}, 422, "invalid_request"),
        ({"kms_key_arn": ARN.replace(":key/", ":alias/")}, 422, "invalid_request"),
        ({"kms_key_arn": ARN + "\n"}, 422, "invalid_request"),
    ],
)
async def test_refused_sealed_starts(tmp_path: Path, body: dict[str, str], status: int, code: str) -> None:
    """A preset that may not be sealed, a pool that is none or not to be told, and what is no key of KMS."""
    async with sealed_world(tmp_path) as sealed:
        answer = await sealed.api.ask("POST", "/api/sessions", {"kms_key_arn": ARN, **body})
        answer.problem(status, code)
        assert sealed.api.world.engine.node.sessions == {}


async def test_an_enclave_that_is_away(tmp_path: Path) -> None:
    """A session may be started meanwhile: it is needed only when the session is opened."""
    enclave = FakeEnclave()
    enclave.down = "it is being started"
    async with api_world(tmp_path, enclave=enclave) as api:
        answer = await api.ask("POST", "/api/sessions", {"pool": "default", "kms_key_arn": ARN})
        assert answer.status == 201


NONCE, WRAPPED = "A" * 43 + "=", "AQID"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"nonce": NONCE},
        {"nonce": NONCE[4:], "wrapped_key": WRAPPED},
        {"nonce": "A" * 48, "wrapped_key": WRAPPED},
        {"nonce": NONCE[:-1] + "*", "wrapped_key": WRAPPED},
        {"nonce": NONCE, "wrapped_key": ""},
        {"nonce": NONCE, "wrapped_key": "AQI"},
        {"nonce": NONCE, "wrapped_key": "A" * 8196},
        {"nonce": NONCE, "wrapped_key": WRAPPED, "worker_key": NONCE},
        {"nonce": 1, "wrapped_key": WRAPPED},
    ],
)
async def test_wrong_bodies_of_an_opening(tmp_path: Path, body: dict[str, object]) -> None:
    """The nonce has 32 bytes, the wrapped key 1 to 6,144, both in base64, and there is nothing else."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        answer = await sealed.api.ask("POST", f"/api/sessions/{session_id}/open", body)
        answer.problem(422, "invalid_request")
        assert sealed.enclave.calls == []
