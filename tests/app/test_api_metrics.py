"""`/metrics`: true figures in both forms, and null where nobody can know."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_server.api import metrics
from gpu_server.core.slots import SlotSpec
from gpu_server.ports import SlotReading
from tests.app.api_world import api_world
from tests.app.played_worker import echo, hold
from tests.app.sealed_world import sealed_world
from tests.app.world import slot_specs

PROMETHEUS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"


async def test_before_anything(tmp_path: Path) -> None:
    """A node that has done nothing says so, and what it cannot know is null."""
    async with api_world(tmp_path, settings={"fsx_mount_point": tmp_path / "nowhere"}) as api:
        assert (await api.ask("GET", "/metrics")).json == {
            "gpu_stats": {
                "gpu_available": False,
                "gpu_memory_total_mb": None,
                "gpu_memory_used_mb": None,
                "gpu_memory_usage_pct": None,
                "total_requests": 0,
                "failed_requests": 0,
                "success_rate": None,
                "avg_inference_time_seconds": None,
            },
            "model_stats": {
                "fsx_available": False,
                "loaded_models": 0,
                "available_models": 0,
                "total_loads": 0,
                "failed_loads": 0,
                "avg_load_time_seconds": None,
                "models": {},
            },
            "wash_stats": {"passed": 4, "failed": {}, "avg_seconds": 0.0, "quarantined_slots": 0},
            "enclave_connected": False,
        }


async def test_what_was_done(tmp_path: Path) -> None:
    """Tasks and loads as they went, the clock's own seconds."""
    async with api_world(tmp_path) as api:
        (tmp_path / "models" / "big").mkdir(parents=True)
        (tmp_path / "models" / "big" / "config.json").write_text("{}")
        api.world.on_task = hold
        session_id = await api.session()
        api.world.on_task = echo
        task_id, _ = api.world.submit(session_id)
        await api.world.saw(task_id, "held")
        api.world.clock.advance(4)
        api.world.workers[session_id].released.set()
        await api.world.until(lambda: api.world.task(task_id).ended)
        await api.submit(task_preset="q", metadata={"prompt": "x"})
        found = (await api.ask("GET", "/metrics")).json
        stats, models = found["gpu_stats"], found["model_stats"]
        assert (stats["total_requests"], stats["failed_requests"], stats["success_rate"]) == (2, 0, 100.0)
        assert stats["avg_inference_time_seconds"] == 2.0
        assert (models["loaded_models"], models["available_models"], models["total_loads"]) == (1, 1, 2)
        assert models["models"] == {
            "m": {"sessions": 2, "loads": 2, "failed_loads": 0, "avg_load_time_seconds": 0.0}
        }


@pytest.mark.parametrize(
    ("readings", "used", "percent"),
    [
        ({"0": SlotReading(memory_used_mb=500), "1": SlotReading(memory_used_mb=0)}, 500, 25.0),
        ({"0": SlotReading(memory_used_mb=500)}, None, None),
        (
            {"0": SlotReading(memory_used_mb=5), "1": SlotReading(memory_used_mb=0, doubt="gone")},
            None,
            None,
        ),
    ],
)
async def test_memory(
    tmp_path: Path, readings: dict[str, SlotReading], used: int | None, percent: float | None
) -> None:
    """The memory of all GPUs, or null where one of them cannot be read."""
    specs = tuple(_with_memory(spec) for spec in slot_specs(2, gpu=True))
    async with api_world(tmp_path, slots=specs) as api:
        api.world.engine.readings = readings
        stats = (await api.ask("GET", "/metrics")).json["gpu_stats"]
        assert stats["gpu_available"] is True
        assert stats["gpu_memory_total_mb"] == 2000
        assert (stats["gpu_memory_used_mb"], stats["gpu_memory_usage_pct"]) == (used, percent)


def _with_memory(spec: SlotSpec) -> SlotSpec:
    return replace(spec, memory_mb=1000)


async def test_a_mount_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures are null until it is well; all others are told in time, and few threads hang with it."""
    monkeypatch.setattr(metrics, "FILES_SECONDS", 0.05)
    hanging = threading.Event()
    async with api_world(tmp_path) as api:
        monkeypatch.setattr(type(api.service.models), "names", lambda _: hanging.wait() and ())
        found = (await api.ask("GET", "/metrics")).json["model_stats"]
        assert (found["fsx_available"], found["available_models"]) == (None, None)
        assert found["loaded_models"] == 0
        for _ in range(metrics.MAX_LOOKS + 2):
            assert (await api.ask("GET", "/metrics")).json["model_stats"]["fsx_available"] is None
        looks = [one for one in threading.enumerate() if one.name == "metrics-files"]
        hanging.set()
        for look in looks:
            look.join(20)
        assert len(looks) == metrics.MAX_LOOKS
        monkeypatch.setattr(metrics, "FILES_SECONDS", 20.0)
        assert (await api.ask("GET", "/metrics")).json["model_stats"]["fsx_available"] is not None


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/plain", "text/plain"),
        (PROMETHEUS, "application/openmetrics-text"),
    ],
)
async def test_the_form(tmp_path: Path, accept: str | None, kind: str) -> None:
    """Prometheus gets its own by what it accepts, everybody else JSON."""
    async with api_world(tmp_path) as api:
        headers = {} if accept is None else {"Accept": accept}
        answer = await api.ask("GET", "/metrics", headers=headers)
        assert answer.headers["Content-Type"].startswith(kind)
        assert answer.raw.startswith(b"{") is (kind == "application/json")


async def test_for_prometheus(tmp_path: Path) -> None:
    """Every family is there, with the figures of the state, and of the enclave and what it granted."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        await client.send(client.seal("x"))
        (await sealed.ask_to_open(client.session_id, b"x")).problem(403, "kms_denied")
        sealed.enclave.restart()
        answer = await sealed.api.ask("GET", "/metrics", headers={"Accept": "text/plain"})
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.raw.decode())
            for sample in family.samples
        }
        expected = {
            ("gpu_server_sessions", "ready"): 1,
            ("gpu_server_sessions", "waiting"): 0,
            ("gpu_server_slots", "leased"): 1,
            ("gpu_server_slots", "free"): 3,
            ("gpu_server_tasks_submitted_total",): 1,
            ("gpu_server_tasks_ended_total", "completed"): 1,
            ("gpu_server_tasks_ended_total", "failed"): 0,
            ("gpu_server_task_run_seconds_total",): 0,
            ("gpu_server_enclave_up",): 1,
            ("gpu_server_enclave_restarts_total",): 1,
            ("gpu_server_grants_total", "granted"): 1,
            ("gpu_server_grants_total", "kms_denied"): 1,
        }
        assert {name: found.get(name) for name in expected} == expected
        assert (await sealed.api.ask("GET", "/metrics")).json["enclave_connected"] is True
        sealed.enclave.down = "away"
        assert (await sealed.api.ask("GET", "/metrics")).json["enclave_connected"] is False


async def test_washes(tmp_path: Path) -> None:
    """Washes that passed, those that failed by their step, how long they took, and what is locked away."""
    async with api_world(tmp_path, slots=slot_specs(2, gpu=True)) as api:
        session_id = await api.session()
        (slot_id,) = api.world.session(session_id).slot_ids
        api.world.machine.holders[slot_id] = "a stranger"
        await api.ask("DELETE", f"/api/sessions/{session_id}")
        await api.world.until(lambda: api.world.engine.node.slots[slot_id].state == "quarantined")
        found = (await api.ask("GET", "/metrics")).json["wash_stats"]
        assert found == {"passed": 2, "failed": {"scrub": 1}, "avg_seconds": 0.0, "quarantined_slots": 1}
        answer = await api.ask("GET", "/metrics", headers={"Accept": "text/plain"})
        samples = {
            (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(answer.raw.decode())
            for sample in family.samples
        }
        assert samples["gpu_server_washes_passed_total",] == 2
        failed = {name[1]: value for name, value in samples.items() if "washes_failed_total" in name[0]}
        assert failed == {"teardown": 0, "residue": 0, "scrub": 1, "enclave": 0, "gates": 0}
        assert samples["gpu_server_wash_seconds_count", "total"] == 2
        assert samples["gpu_server_wash_seconds_sum", "total"] == 0
        assert samples["gpu_server_wash_seconds_bucket", "+Inf", "scrub"] == 2
        assert samples["gpu_server_wash_seconds_bucket", "0.01", "scrub"] == 2
        assert samples["gpu_server_slots", "quarantined"] == 1
