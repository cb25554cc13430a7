"""The service's own end: killed, started again, started twice, asked to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.harness import STOP_SECONDS, Caller, Service, Services, only_process, until


@pytest.fixture
def own(services: Services) -> Iterator[Service]:
    """A running service of this test's own."""
    service = services.own(CPU_SLOTS=3, DISCONNECT_GRACE_SECONDS=60, SHUTDOWN_GRACE_SECONDS=1)
    yield service.start()
    service.close()
    assert service.residue() == []
    assert service.errors() == []


async def test_a_killed_service_leaves_everything_to_the_next(own: Service) -> None:
    """kill -9 with live sessions: every worker is taken up as it is, and no slot changes hands."""
    async with own.caller("tenant-a") as caller:
        working = await caller.working(hang=True)
        idle = await caller.warm()
        starting = await caller.started("short_start", prompt="begun before")
        await starting.until("worker", status="loading")
        sessions = (working.session_id, idle, starting.session_id)
        before = {session_id: await caller.session(session_id) for session_id in sessions}
        own.crash()
        if own.runtime == "process":
            # One that is in the middle of exec has no environment to be known by.
            await until("all workers are seen", lambda: len(own.worker_pids()) == len(sessions))
        left = own.residue()
        assert all(session_id in str(left) for session_id in sessions)

        own.launch()

        async def states() -> bool:
            health = await asyncio.to_thread(own.health)
            assert health is None or {slot["state"] for slot in health["gpus"]} == {"leased"}, health
            return health is not None and health["ready"]

        await until("it takes work again", states)
        assert own.residue() == left
        assert (await starting.finish())["status"] == "completed"
        for session_id in sessions:
            session = await caller.session(session_id)
            assert session["container_id"] == before[session_id]["container_id"]
            assert session["gpu_ids"] == before[session_id]["gpu_ids"]
        assert (await caller.task(working.task_id))["state"] == "running"
        assert (await caller.run(session=idle, prompt="a new life")).text == "a new life"


async def test_a_service_killed_again_and_again(own: Service) -> None:
    """Killed at whatever moment of its workers' start, the next life brings them up."""
    async with own.caller("tenant-a") as caller:
        for stage in ("model", "container", "loading", None):
            for _ in range(3):
                session_id = (await caller.open("short_start"))["session_id"]
            if stage != "model":
                await until("it is under way", partial(_has_come, caller, session_id, stage))
            await own.restart()
            sessions = await _live_sessions(caller)
            assert len(sessions) == 3
            for session_id in sessions:
                await caller.in_state(session_id, "ready")
            assert len(own.run_folders()) == 3
            assert len(own.containers()) == (3 if own.runtime == "docker" else 0)
            for session_id in sessions:
                await caller.kill(session_id)
            await until("all slots are free", lambda: own.is_all_free(own.health()))
            assert own.residue() == []


async def test_a_service_killed_in_its_own_start(own: Service) -> None:
    """Whatever it has done by then, the next start does the rest."""
    async with own.caller("tenant-a") as caller:
        task = await caller.working(count=250, delay_ms=20)
        own.crash()
        for sign in ("", "service.recovered", "session.adopting", "service.started"):
            seen = own.log_text().count(sign)
            own.launch()
            if sign:
                await until(f"it says {sign}", lambda s=sign, n=seen: own.log_text().count(s) > n)
            own.crash()
        own.launch()
        await own.serving()
        assert (await task.finish())["status"] == "completed"
        assert task.text == "".join(f"tok{n} " for n in range(250))


async def _live_sessions(caller: Caller) -> list[str]:
    sessions = (await caller.client.call("GET", "/api/sessions"))["sessions"]
    return [s["session_id"] for s in sessions if s["state"] not in ("closed", "failed")]


async def _has_come(caller: Caller, session_id: str, stage: str | None) -> bool:
    """Whether the start has come as far as this stage, or further: a short one may never be seen."""
    session = await caller.session(session_id)
    if stage is None:
        return session["container_id"] is not None
    stages = ("model", "image", "container", "loading")
    return session["state"] == "ready" or stages.index(session["stage"] or "model") >= stages.index(stage)


async def test_sigterm_ends_everything_in_order(own: Service) -> None:
    """Open streams end with `task_finish` and code `shutdown`; the exit status is 0; nothing is left, and the
    next life begins with every slot free."""
    async with own.caller() as caller:
        running = await caller.working(hang=True)
        stubborn = await caller.working(hang=True, ignore_cancel=True)
        queued = await caller.started(session=running.session_id, prompt="x")
        starting = await caller.started("slow_start")
        waiting = await caller.started(prompt="x")
        assert waiting.of("connection")[0]["status"] == "queued"
        assert own.process is not None
        own.process.send_signal(signal.SIGTERM)
        tasks = (running, stubborn, queued, starting, waiting)
        for task in tasks:
            end = await task.finish()
            assert (end["status"], end["error"]["code"]) == ("failed", "shutdown")
        assert own.process.wait(STOP_SECONDS) == 0
        assert own.residue() == []
        own.start()
        for task in tasks:
            assert (await caller.task(task.task_id))["error"]["code"] == "shutdown"
            assert (await caller.session(task.session_id))["close_reason"] == "shutdown"
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


async def test_a_start_that_cannot_serve_ends_nothing(own: Service) -> None:
    """On a port that is taken the service exits, and what it had adopted lives on for the next start."""
    async with own.caller("tenant-a") as caller:
        session_id = await caller.warm()
    own.crash()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", own.port))
        taken.listen()
        assert own.launch().wait(STOP_SECONDS) != 0
    own.launch()
    await until("it serves", lambda: own.health() is not None)
    async with own.caller("tenant-a") as caller:
        assert (await caller.session(session_id))["state"] == "ready"
        assert (await caller.run(session=session_id, prompt="still here")).text == "still here"
        await caller.kill(session_id)
    assert len(own.errors()) == 1
    own.log.write_text("")  # of that error nobody needs to hear again


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
