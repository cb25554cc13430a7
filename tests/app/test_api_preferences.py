"""`Idempotency-Key` and `Prefer: respond-async`."""

from __future__ import annotations

from pathlib import Path

import pytest
from multidict import CIMultiDict

from gpu_server.api.preferences import Keys
from gpu_server.core import events as ev
from gpu_server.core.notices import UNNUMBERED
from tests.app.api_world import KEY, TASK, api_world
from tests.app.played_worker import hold
from tests.app.reading import Event

ASYNC = {"Prefer": "respond-async"}


def key(name: str) -> dict[str, str]:
    return {"Idempotency-Key": name}


def numbered(events: list[Event]) -> list[Event]:
    """What every reader gets: the rest is the present state, which may have passed."""
    return [event for event in events if event.name not in UNNUMBERED]


async def test_the_same_key_and_body_is_the_same_task(tmp_path: Path) -> None:
    """A submission that comes again joins the task of the first, from its first event."""
    async with api_world(tmp_path) as api:
        body = {**TASK, "metadata": {"a": 1, "b": [2]}}
        first = await api.ask("POST", "/api/tasks/submit", body, headers=key("k1"))
        again = {**TASK, "metadata": {"b": [2], "a": 1}}  # the order of names says nothing
        second = await api.ask("POST", "/api/tasks/submit", again, headers=key("k1"))
        assert numbered(second.events) == numbered(first.events)
        assert numbered(second.events)[-1].data["status"] == "completed"
        assert len(api.world.engine.node.tasks) == 1


async def test_another_body_is_refused(tmp_path: Path) -> None:
    """The same key with another body is a mistake of the client, and changes nothing."""
    async with api_world(tmp_path) as api:
        await api.ask("POST", "/api/tasks/submit", TASK, headers=key("k1"))
        changed = {**TASK, "metadata": {"other": True}}
        (await api.ask("POST", "/api/tasks/submit", changed, headers=key("k1"))).problem(
            409, "idempotency_mismatch"
        )
        (await api.ask("POST", "/api/tasks/submit", TASK, headers={**key("k1"), **ASYNC})).problem(
            409, "idempotency_mismatch"
        )
        assert len(api.world.engine.node.tasks) == 1


async def test_keys_belong_to_a_tenant_and_a_route(tmp_path: Path) -> None:
    """Another tenant's key is another key, and so is the same key for a session."""
    async with api_world(tmp_path) as api:
        mine = await api.ask("POST", "/api/tasks/submit", TASK, headers=key("k"))
        theirs = await api.ask("POST", "/api/tasks/submit", TASK, headers=key("k"), tenant="b")
        assert theirs.status == 200
        assert theirs.events[0].data["task_id"] != mine.events[0].data["task_id"]
        wish = {"model_id": "m", "task_preset": "p"}
        assert (await api.ask("POST", "/api/sessions", wish, headers=key("k"))).status == 201


async def test_a_session_is_made_once(tmp_path: Path) -> None:
    """The same key and body gives the same session; another body is refused."""
    async with api_world(tmp_path) as api:
        wish = {"model_id": "m", "task_preset": "p"}
        first = await api.ask("POST", "/api/sessions", wish, headers=key("s"))
        second = await api.ask("POST", "/api/sessions", wish, headers=key("s"))
        assert second.json["session_id"] == first.json["session_id"]
        other = {"model_id": "m", "task_preset": "q"}
        (await api.ask("POST", "/api/sessions", other, headers=key("s"))).problem(409, "idempotency_mismatch")


@pytest.mark.parametrize("bad", ["", "a b", "ä", "x" * 256])
async def test_a_bad_key_is_refused(tmp_path: Path, bad: str) -> None:
    """A key is 1 to 255 characters of visible ASCII."""
    async with api_world(tmp_path) as api:
        answer = await api.ask("POST", "/api/tasks/submit", TASK, headers=key(bad))
        answer.problem(422, "invalid_request")


async def test_a_key_is_sent_once(tmp_path: Path) -> None:
    """Two keys, or one key twice, are no key."""
    async with api_world(tmp_path) as api:
        for second in ("k2", "k1"):
            headers = CIMultiDict({"X-API-Key": KEY, "X-Tenant-ID": "a", "Idempotency-Key": "k1"})
            headers.add("Idempotency-Key", second)
            async with api.http.post("/api/tasks/submit", json=TASK, headers=headers) as answer:
                assert (answer.status, (await answer.json())["code"]) == (422, "invalid_request")
        assert api.world.engine.node.tasks == {}


def test_fingerprints() -> None:
    """A fingerprint tells requests apart, whatever the order of names in them, and says nothing to whoever
    has not the secret."""
    keys = Keys("k", b"secret")
    made = keys.key_of("task", {"a": 1, "b": 2}, False)
    assert made == keys.key_of("task", {"b": 2, "a": 1}, False)
    others = [
        keys.key_of("task", {"a": 1, "b": 3}, False),
        keys.key_of("task", {"a": 1, "b": 2}, True),
        keys.key_of("session", {"a": 1, "b": 2}, False),
        Keys("k", b"another").key_of("task", {"a": 1, "b": 2}, False),
    ]
    assert len({key.fingerprint for key in (made, *others)}) == 5
    assert Keys(None, b"secret").key_of("task", {}) is None


async def test_a_request_that_cannot_be_kept(tmp_path: Path) -> None:
    """It is refused with a time to wait, in whichever way it came, and its key is as new then."""
    async with api_world(tmp_path) as api:
        api.world.journal.refuse = "disk full"
        for headers in (key("k"), {**key("k"), **ASYNC}):
            answer = await api.ask("POST", "/api/tasks/submit", TASK, headers=headers)
            answer.problem(503, "storage_failing")
            assert int(answer.headers["Retry-After"]) > 0
        wish = {"model_id": "m", "task_preset": "p"}
        answer = await api.ask("POST", "/api/sessions", wish, headers=key("k"))
        answer.problem(503, "storage_failing")
        api.world.journal.refuse = None
        again = await api.ask("POST", "/api/tasks/submit", TASK, headers=key("k"))
        assert again.events[-1].data["status"] == "completed"


@pytest.mark.parametrize(
    "prefer", ["respond-async", "wait=5, Respond-Async; now", "handling=lenient,respond-async"]
)
async def test_respond_async(tmp_path: Path, prefer: str) -> None:
    """202 with the task and its URL, and the task goes on without a reader."""
    async with api_world(tmp_path, settings={"disconnect_grace_seconds": 1}) as api:
        answer = await api.ask("POST", "/api/tasks/submit", TASK, headers={"Prefer": prefer})
        assert answer.status == 202
        task_id = answer.json["task_id"]
        assert answer.headers["Location"] == f"/api/tasks/{task_id}"
        assert answer.headers["Preference-Applied"] == "respond-async"
        events = await api.ask("GET", f"/api/tasks/{task_id}/events")
        assert events.events[-1].data["status"] == "completed"


async def test_other_preferences_change_nothing(tmp_path: Path) -> None:
    """A preference that is not known is ignored, as RFC 7240 wants it."""
    async with api_world(tmp_path) as api:
        answer = await api.ask(
            "POST", "/api/tasks/submit", TASK, headers={"Prefer": "respond-asynchronously"}
        )
        assert answer.status == 200


async def test_a_detached_task_is_not_cancelled(tmp_path: Path) -> None:
    """It has no reader, and no deadline for one."""
    async with api_world(tmp_path) as api:
        session_id = await api.session()
        api.world.workers[session_id].on_task = hold
        attached = {**TASK, "session_id": session_id}
        answer = await api.ask("POST", "/api/tasks/submit", attached, headers=ASYNC)
        task = api.world.task(answer.json["task_id"])
        await api.world.saw(task.id, "held")
        api.world.clock.advance(api.world.engine.node.rules.disconnect_grace + 1)
        api.world.engine.report(ev.Tick())
        assert task.state == "running"
