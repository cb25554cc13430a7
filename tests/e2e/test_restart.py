"""The service's own end: killed, started again, started twice, asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.harness import STOP_SECONDS, Caller, Service, Services, only_process, until


@pytest.fixture
def own(services: Services) -> Iterator[Service]:
    """A running service of this test's own."""
    service = services.own(CPU_SLOTS=3)
    yield service.start()
    service.close()
    assert service.residue() == []
    assert service.errors() == []


async def test_a_killed_service_leaves_nothing_to_the_next(own: Service) -> None:
    """kill -9 with live sessions: what they left is removed before any slot is free again."""
    async with own.caller("tenant-a") as caller:
        working = await caller.working(hang=True)
        idle = await caller.warm()
        starting = (await caller.open("slow_start"))["session_id"]
        await until("the third worker is made", lambda: starting in str(own.residue()))
        own.crash()
    left = own.residue()
    for session_id in (working.session_id, idle, starting):
        assert session_id in str(left)
    if own.runtime == "process":
        assert own.worker_pids()

    own.launch()

    def first_sight_of_a_free_slot() -> bool:
        health = own.health()
        if health is None or all(slot["state"] != "free" for slot in health["gpus"]):
            assert health is None or (health["ready"], health["status"]) == (False, "starting")
            return False
        assert own.residue() == [], "a slot was free before the last life's leftovers were gone"
        return True

    await until("a slot is free", first_sight_of_a_free_slot)
    async with own.caller("tenant-a") as caller:
        assert await caller.client.call("GET", "/api/sessions") == {"sessions": []}
        assert (await caller.run(prompt="a new life")).text == "a new life"


async def test_a_service_killed_again_and_again(own: Service) -> None:
    """Killed at whatever moment of its workers' start, the next life cleans up."""
    for stage in ("model", "container", "loading", None):
        async with own.caller("tenant-a") as caller:
            for _ in range(3):
                session_id = (await caller.open("slow_start"))["session_id"]
            if stage != "model":
                await until("it is under way", partial(_has_come, caller, session_id, stage))
            own.crash()
        own.start()
        assert own.residue() == []


async def _has_come(caller: Caller, session_id: str, stage: str | None) -> bool:
    """Whether the start has come as far as this stage, or further: a short one may never be seen."""
    session = await caller.session(session_id)
    if stage is None:
        return session["container_id"] is not None
    stages = ("model", "image", "container", "loading")
    return session["state"] == "ready" or stages.index(session["stage"] or "model") >= stages.index(stage)


async def test_sigterm_ends_everything_in_order(own: Service) -> None:
    """Open streams end with `task_finish` and code `shutdown`; the exit status is 0; nothing is left."""
    async with own.caller() as caller:
        running = await caller.working(hang=True)
        stubborn = await caller.working(hang=True, ignore_cancel=True)
        queued = await caller.started(session=running.session_id, prompt="x")
        starting = await caller.started("slow_start")
        waiting = await caller.started(prompt="x")
        assert waiting.of("connection")[0]["status"] == "queued"
        assert own.process is not None
        own.process.send_signal(signal.SIGTERM)
        for task in (running, stubborn, queued, starting, waiting):
            end = await task.finish()
            assert (end["status"], end["error"]["code"]) == ("failed", "shutdown")
    assert own.process.wait(STOP_SECONDS) == 0
    assert own.residue() == []
    own.start()
    async with own.caller() as caller:
        assert (await caller.run(prompt="again")).text == "again"


async def test_a_second_service_on_the_same_state_is_refused(own: Service, services: Services) -> None:
    """It exits with 2 and says why; the first one does not notice."""
    async with own.caller() as caller:
        task = await caller.working(hang=True)
        second = services.own()
        second.state_dir, second.run_dir = own.state_dir, own.run_dir
        assert second.launch().wait(STOP_SECONDS) == 2
        said = " ".join(second.log_text().split())
        assert "The service did not start" in said
        assert "another service uses STATE_DIR" in said
        assert (await caller.task(task.task_id))["state"] == "running"


@only_process
async def test_a_port_that_is_taken(own: Service, services: Services) -> None:
    """The service exits with an error and names the address."""
    second = services.own()
    second.port = own.port
    assert second.launch().wait(STOP_SECONDS) != 0
    assert "address already in use" in second.log_text()


@only_process
async def test_its_own_key(services: Services) -> None:
    """Without INTERNAL_API_KEY a key is made once, is kept, and is not in the log."""
    service = services.own(INTERNAL_API_KEY=None)
    path = service.state_dir / "internal_api_key"
    service.start()
    service.key = path.read_text().strip()
    assert len(service.key) >= 32
    assert os.stat(path).st_mode & 0o777 == 0o600
    async with service.caller() as caller:
        assert await caller.client.call("GET", "/api/sessions") == {"sessions": []}
    assert service.key not in service.log_text()
    assert str(path) in service.log_text()
    service.close()
