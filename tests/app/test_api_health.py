"""`/health`: every state of the node, and who may see what."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gpu_server.core import events as ev
from gpu_server.ports import SlotReading
from tests.app.api_world import KEY, Api, api_world
from tests.app.played_worker import hold
from tests.app.world import slot_specs
from tests.fakes.enclave import FakeEnclave


async def health(api: Api, tenant: str | None = None) -> tuple[int, dict[str, Any]]:
    answer = await api.ask("GET", "/health", tenant=tenant)
    assert answer.headers["Content-Type"] == "application/json"
    return answer.status, answer.json


async def state(api: Api) -> tuple[int, str, bool]:
    status, report = await health(api)
    return status, report["status"], report["ready"]


async def test_ok(tmp_path: Path) -> None:
    """A node that is free reports every slot, open to all; its warnings are for those who have a key."""
    async with api_world(tmp_path, slots=slot_specs(2, gpu=True), warnings=("careful",)) as api:
        api.world.engine.readings = {"0": SlotReading(memory_used_mb=5, fault=None)}
        status, report = await health(api)
        slots = report.pop("gpus")
        assert (status, report) == (
            200,
            {
                "status": "ok",
                "ready": True,
                "runtime": "process",
                "node_public_key": api.world.seal.public_key.hex(),
                "enclave_healthy": None,
                "enclave": None,
                "gpu_healthy": True,
                "models_loaded": 0,
                "runtime_reachable": True,
                "storage_healthy": True,
                "active_sessions": 0,
                "active_tasks": 0,
                "waiting_sessions": 0,
                "warnings": ["ask with an API key"],
            },
        )
        assert slots[0] == {
            "id": "0",
            "uuid": "GPU-0000",
            "name": "GPU",
            "kind": "gpu",
            "tiers": ["high", "low"],
            "state": "free",
            "fault": None,
            "memory_total_mb": 0,
            "memory_used_mb": 5,
            "held_by": None,
            "wash": None,
            "certificate": api.world.engine.node.slots["0"].head.hex(),
        }
        assert (slots[1]["id"], slots[1]["memory_used_mb"]) == ("1", None)


async def test_starting(tmp_path: Path) -> None:
    """Until the first wash is through the node does not serve."""
    async with api_world(tmp_path, slots=slot_specs(1), washed=False) as api:
        api.world.runtime.gates["list_workers"] = gate = asyncio.Event()
        assert await state(api) == (503, "starting", False)
        gate.set()
        await api.world.free()
        assert await state(api) == (200, "ok", True)


async def test_a_wash(tmp_path: Path) -> None:
    """A slot that is being washed tells which step it is at, and, to those who have a key, why one is tried
    again; afterwards it tells the hash of its record."""
    async with api_world(tmp_path, slots=slot_specs(2)) as api:
        session_id = await api.session()
        (slot_id,) = api.world.session(session_id).slot_ids
        before = api.world.engine.node.slots[slot_id].head.hex()
        api.world.runtime.gates["remove"] = gate = asyncio.Event()
        api.world.runtime.unreachable = True
        await api.ask("DELETE", f"/api/sessions/{session_id}")
        async with asyncio.timeout(20):
            while not any(view.reason for view in api.world.engine.washing.values()):  # noqa: ASYNC110
                await asyncio.sleep(0)
        _, report = await health(api, "anyone")
        slot, other = sorted(report["gpus"], key=lambda one: one["id"] != slot_id)
        assert (slot["state"], slot["certificate"], other["wash"]) == ("washing", before, None)
        assert slot["wash"]["steps"] == ["teardown"]
        assert slot["wash"]["reason"].startswith("teardown: ")
        assert datetime.fromisoformat(slot["wash"]["since"]).tzinfo is not None
        _, report = await health(api)
        assert report["gpus"][int(slot_id)]["wash"]["reason"] == "ask with an API key"
        api.world.runtime.unreachable = False
        gate.set()
        api.world.clock.advance(10)
        await api.world.free()
        _, report = await health(api)
        slot = report["gpus"][int(slot_id)]
        assert slot["wash"] is None
        assert slot["certificate"] == api.world.session(session_id).washed_after[0] != before


async def test_busy(tmp_path: Path) -> None:
    """A node all of whose slots are leased or being washed after a lease still serves."""
    async with api_world(tmp_path, slots=slot_specs(1)) as api:
        session_id = await api.session()
        waiting, _ = api.world.submit()
        assert await state(api) == (200, "ok", True)
        _, report = await health(api)
        assert (report["active_sessions"], report["waiting_sessions"]) == (1, 1)
        assert (report["active_tasks"], report["models_loaded"]) == (1, 1)
        gate = api.world.runtime.gates["remove"] = asyncio.Event()
        await api.ask("DELETE", f"/api/sessions/{session_id}")
        assert await state(api) == (200, "ok", True)
        gate.set()
        await api.world.events(waiting)


async def test_degraded(tmp_path: Path) -> None:
    """A node that has lost some of its slots serves with the others; one that has lost all does not."""
    async with api_world(tmp_path, slots=slot_specs(2)) as api:
        api.world.engine.report(ev.SlotChecked(slot_id="0", fault="it smokes"))
        assert await state(api) == (200, "degraded", True)
        _, report = await health(api)
        assert report["gpu_healthy"] is False
        hidden = "ask with an API key"
        assert (report["gpus"][0]["state"], report["gpus"][0]["fault"]) == ("quarantined", hidden)
        _, report = await health(api, "anyone")
        assert report["gpus"][0]["fault"] == "it smokes"
        api.world.engine.report(ev.SlotChecked(slot_id="1", fault="it smokes too"))
        assert await state(api) == (503, "unhealthy", False)


async def test_failed(tmp_path: Path) -> None:
    """A node that has met a bug in a decision does not serve."""
    async with api_world(tmp_path) as api:
        api.world.engine.broken = "a bug"
        assert await state(api) == (503, "failed", False)


async def test_stopping(tmp_path: Path) -> None:
    """A node that stops does not serve."""
    async with api_world(tmp_path) as api:
        api.world.engine.report(ev.ShutdownOrdered())
        assert await state(api) == (503, "stopping", False)


async def test_handed_over(tmp_path: Path) -> None:
    """A node whose service is being replaced takes nothing more."""
    async with api_world(tmp_path) as api:
        api.world.engine.hand_over()
        assert await state(api) == (503, "stopping", False)


async def test_without_a_runtime(tmp_path: Path) -> None:
    """While the runtime does not answer the node serves on, less well; why is for those who have a key."""
    async with api_world(tmp_path) as api:
        api.world.engine.report(ev.RuntimeChecked(doubt="no answer from the engine"))
        assert await state(api) == (200, "degraded", True)
        _, report = await health(api)
        assert (report["runtime_reachable"], report["storage_healthy"]) == (False, True)
        assert report["warnings"] == ["ask with an API key"]
        assert (await health(api, "anyone"))[1]["warnings"] == ["no answer from the engine"]
        api.world.engine.report(ev.RuntimeChecked(doubt=None))
        assert await state(api) == (200, "ok", True)


@pytest.mark.parametrize("part", ["journal", "spool"])
async def test_without_storage(tmp_path: Path, part: str) -> None:
    """A node that cannot remember takes nothing new, whichever of its two memories it is."""
    async with api_world(tmp_path) as api:
        place = api.world.journal if part == "journal" else api.world.spool
        fault = "failing" if part == "journal" else "fault"
        setattr(place, fault, "no space left on device")
        assert await state(api) == (503, "unhealthy", False)
        _, report = await health(api)
        assert (report["runtime_reachable"], report["storage_healthy"]) == (True, False)
        assert (await health(api, "anyone"))[1]["warnings"] == ["no space left on device"]
        setattr(place, fault, None)
        assert await state(api) == (200, "ok", True)


async def test_holders(tmp_path: Path) -> None:
    """Who holds a slot, and with which tasks, is shown to that tenant alone."""
    async with api_world(tmp_path) as api:
        api.world.on_task = hold
        task_id, session_id = api.world.submit(tenant="a")
        await api.world.saw(task_id, "held")
        queued, _ = api.world.submit(session_id, tenant="a")
        other, _ = api.world.submit(tenant="b")
        await api.world.saw(other, "held")
        _, report = await health(api, "a")
        held = [slot["held_by"] for slot in report["gpus"]]
        assert held == [{"session_id": session_id, "task_ids": [task_id, queued]}, None, None, None]
        for stranger in (None, "c"):
            answer = await api.ask("GET", "/health", tenant=stranger)
            assert [slot["state"] for slot in answer.json["gpus"]] == ["leased", "leased", "free", "free"]
            for secret in (session_id, task_id, queued, other, KEY):
                assert secret not in answer.raw.decode()


# -- the enclave ------------------------------------------------------------------------------------------


async def test_the_enclave(tmp_path: Path) -> None:
    """Its mode, and whether it is there: a node whose enclave is away serves on, and is not quite well."""
    enclave = FakeEnclave()
    async with api_world(tmp_path, enclave=enclave) as api:
        report = (await api.ask("GET", "/health")).json
        epoch = enclave.epoch.hex()
        assert (report["status"], report["enclave_healthy"]) == ("ok", True)
        assert report["enclave"] == {"mode": "simulated", "healthy": True, "reason": None, "epoch": epoch}
        enclave.down = "exit code 1"
        answer = await api.ask("GET", "/health")
        assert (answer.status, answer.json["status"]) == (200, "degraded")
        assert answer.json["enclave"] == {
            "mode": "simulated",
            "healthy": False,
            "reason": "exit code 1",
            "epoch": None,
        }
        hidden = (await api.ask("GET", "/health", tenant=None)).json
        assert hidden["enclave_healthy"] is False
        assert hidden["enclave"]["reason"] == "ask with an API key"
