"""Sessions and tasks as JSON: every promised field, times that can be parsed."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gpu_server.api.views import LOG_TAIL_LINES
from tests.app.api_world import Api, api_world
from tests.app.played_worker import hold
from tests.app.world import slot_specs

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")


class Shown:
    """What the interface shows of something, and between which moments it was asked."""

    def __init__(self, began: datetime, fields: Any) -> None:
        self._began, self._ended, self.fields = began, datetime.now(UTC), fields

    @classmethod
    async def of(cls, api: Api, path: str) -> Shown:
        began = datetime.now(UTC)
        return cls(began, (await api.ask("GET", path)).json)

    def is_from_then(self, text: Any, seconds: float = 0) -> bool:
        """Whether a time, which must be RFC 3339 in UTC, is so many seconds from when it was asked for."""
        assert RFC3339.fullmatch(text), text
        then = datetime.fromisoformat(text) - timedelta(seconds=seconds)
        return self._began - timedelta(milliseconds=2) <= then <= self._ended


async def test_session(tmp_path: Path) -> None:
    """A session has its identity, its place, its expiry, its queue and its end."""
    settings = {"session_idle_timeout_seconds": 100, "session_max_lifetime_seconds": 1000}
    async with api_world(tmp_path, settings=settings) as api:
        session_id = await api.session(preset="two")
        asked = await Shown.of(api, f"/api/sessions/{session_id}")
        shown = asked.fields
        assert asked.is_from_then(shown.pop("created_at"))
        expiry = shown.pop("expiry")
        slots = api.world.session(session_id).slot_ids
        assert len({*slots}) == 2
        assert asked.is_from_then(expiry["idle_deadline"], 100)
        assert asked.is_from_then(expiry["max_deadline"], 1000)
        assert (expiry["effective"], expiry["reason"]) == (expiry["idle_deadline"], "idle_timeout")
        assert shown == {
            "session_id": session_id,
            "tenant": "a",
            "model_id": "m",
            "task_preset": "two",
            "task_difficulty": "low",
            "state": "ready",
            "stage": None,
            "sealed": False,
            "pool": None,
            "kms_key_arn": None,
            "worker_key": None,
            "gpu_ids": list(slots),
            "fence": api.world.session(session_id).fence,
            "washed_before": [api.world.engine.node.slots[slot].head.hex() for slot in slots],
            "washed_after": [],
            "container_id": f"fake-{api.world.container(session_id)}",
            "closed_at": None,
            "queue": {"running": 0, "waiting": 0, "max": 5},
            "tasks_done": 0,
            "close_reason": None,
            "error": None,
            "log_tail": [],
        }


async def test_queue(tmp_path: Path) -> None:
    """A session tells how many tasks run and wait; a waiting task tells its place; the idle clock stands."""
    async with api_world(tmp_path) as api:
        api.world.on_task = hold
        running, session_id = api.world.submit(tenant="a")
        await api.world.saw(running, "held")
        waiting = [api.world.submit(session_id, tenant="a")[0] for _ in range(2)]
        shown = (await api.ask("GET", f"/api/sessions/{session_id}")).json
        assert shown["queue"] == {"running": 1, "waiting": 2, "max": 5}
        assert shown["expiry"]["idle_deadline"] is None
        assert shown["expiry"]["reason"] == "max_lifetime"
        places = [
            (await api.ask("GET", f"/api/tasks/{task}")).json["position"] for task in (running, *waiting)
        ]
        assert places == [None, 1, 2]


async def test_ended_session(tmp_path: Path) -> None:
    """A session that failed shows when, why and what its worker said last, and expires no more."""
    async with api_world(tmp_path) as api:
        session_id = await api.session()
        lines = "".join(f"line {n}\n" for n in range(100))
        api.world.machine.say(api.world.container(session_id), lines.encode())
        api.world.exit(session_id, 3)
        await api.world.until(lambda: api.world.session(session_id).ended)
        asked = await Shown.of(api, f"/api/sessions/{session_id}")
        shown = asked.fields
        assert (shown["state"], shown["close_reason"]) == ("failed", "worker_exited")
        assert shown["error"] == {
            "code": "worker_exited",
            "message": "the worker exited with code 3: line 99",
        }
        assert shown["log_tail"] == [f"line {n}" for n in range(100 - LOG_TAIL_LINES, 100)]
        assert shown["expiry"] == dict.fromkeys(shown["expiry"])
        assert asked.is_from_then(shown["closed_at"])


async def test_washes(tmp_path: Path) -> None:
    """A session that waits was given no slot yet; one that has ended tells the washes behind it."""
    async with api_world(tmp_path, slots=slot_specs(1)) as api:
        first = await api.session()
        waiting = (await api.ask("POST", "/api/sessions", {"model_id": "m", "task_preset": "p"})).json
        assert (waiting["fence"], waiting["washed_before"], waiting["washed_after"]) == (0, [], [])
        before = (await api.ask("GET", f"/api/sessions/{first}")).json["washed_before"]
        await api.ask("DELETE", f"/api/sessions/{first}")
        await api.world.ready(waiting["session_id"])
        ended, second = [
            (await api.ask("GET", f"/api/sessions/{one}")).json for one in (first, waiting["session_id"])
        ]
        assert ended["washed_before"] == before
        assert ended["washed_after"] == second["washed_before"] != before
        assert ended["fence"] < second["fence"]


async def test_task(tmp_path: Path) -> None:
    """A task has its identity, its times and its end."""
    async with api_world(tmp_path) as api:
        task_id, session_id = api.world.submit(tenant="a", oneoff=True)
        await api.world.events(task_id)
        asked = await Shown.of(api, f"/api/tasks/{task_id}")
        shown = asked.fields
        for name in ("created_at", "started_at", "finished_at"):
            assert asked.is_from_then(shown.pop(name))
        assert shown == {
            "task_id": task_id,
            "session_id": session_id,
            "state": "completed",
            "task_type": "oneoff",
            "model_id": "m",
            "task_preset": "p",
            "position": None,
            "eta_seconds": None,
            "error": None,
        }


async def test_times_do_not_wander(tmp_path: Path) -> None:
    """The node's time moves on and what has happened keeps its distance to now."""
    async with api_world(tmp_path) as api:
        session_id = await api.session()
        api.world.clock.advance(60)
        asked = await Shown.of(api, f"/api/sessions/{session_id}")
        assert asked.is_from_then(asked.fields["created_at"], -60)
