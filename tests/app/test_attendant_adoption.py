"""Attendants that take up what an earlier life of the service started: nothing runs twice, nothing is lost,
and what cannot be followed ends with its reason."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpu_server import attendant
from gpu_server.core import events as ev
from gpu_server.ports import RuntimeUnreachable
from tests.app.played_worker import Call, PlayedWorker
from tests.app.reading import Event, numbered_without_a_hole
from tests.app.world import World, engine_life, machine_world


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; an exit, and what was written before it, is waited for until it is there."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 20.0)
    monkeypatch.setattr(attendant, "LOADING_POLL_SECONDS", 0.005)
    monkeypatch.setattr(attendant, "REATTACH_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(attendant, "CANCEL_RETRY_SECONDS", 0.005)


def deltas(events: list[Event]) -> list[str]:
    return [event.data["delta"] for event in events if event.name == "text_delta"]


def calls(world: World, *methods: str) -> list[str]:
    """Which of these methods of the runtime were called in this life, in order."""
    return [method for method, _ in world.runtime.calls if method in methods]


async def warm(world: World) -> str:
    """A first life that leaves a session whose worker is ready and idle."""
    async with engine_life(world):
        await world.free()
        world.request("s_1")
        await world.ready("s_1")
    return "s_1"


async def working(world: World, saw: str = "d3", **how: Any) -> tuple[str, str]:
    """A first life that leaves a task in the middle of its events."""
    async with engine_life(world):
        await world.free()
        task_id, session_id = world.submit(**how)
        await world.saw(task_id, saw)
    return task_id, session_id


# -- workers that wait ------------------------------------------------------------------------------------


async def test_a_ready_worker(tmp_path: Path) -> None:
    """An idle worker serves on: it is found, not started."""
    async with machine_world(tmp_path) as world:
        session_id = await warm(world)
        async with engine_life(world):
            await world.until(lambda: world.told(ev.WorkerReady))
            assert world.session(session_id).state == "ready"
            assert calls(world, "reattach", "create", "start") == ["reattach"]
            task_id, _ = world.submit(session_id, prompt="still here")
            assert deltas(await world.events(task_id)) == ["still here"]
            assert world.started == [session_id]
            world.machine.say(world.container(session_id), b"heard again\n")
            world.exit(session_id, 3)
            await world.until(lambda: world.session(session_id).ended)
            assert world.session(session_id).log_tail == "heard again\n"


async def test_a_worker_that_loads(tmp_path: Path) -> None:
    """A start goes on where it is, and those who wait for it hear how far it is."""
    async with machine_world(tmp_path) as world:
        world.health = {"status": "loading"}
        async with engine_life(world):
            await world.free()
            task_id, session_id = world.submit(prompt="x")
            await world.until(lambda: world.session(session_id).stage == "loading")
        async with engine_life(world):
            await world.until(lambda: any(e.stage == "loading" for e in world.told(ev.StageReached)))
            assert world.session(session_id).state == "preparing"
            world.workers[session_id].health = {"status": "ready"}
            events = await world.events(task_id)
            assert events[-1].data["status"] == "completed"
            assert numbered_without_a_hole(events)
            assert [event.data.get("status") for event in events].count("created") == 1
            assert calls(world, "create", "start") == []


async def test_a_worker_that_could_not_load_meanwhile(tmp_path: Path) -> None:
    """It says so to whoever asks, and the session ends as it would have without a restart."""
    async with machine_world(tmp_path) as world:
        world.health = {"status": "loading"}
        async with engine_life(world):
            await world.free()
            _, session_id = world.submit()
            await world.until(lambda: world.session(session_id).stage == "loading")
        world.workers[session_id].health = {"status": "failed", "message": "no weights"}
        async with engine_life(world):
            assert await world.ended(session_id) == ("failed", "start_failed", "start_failed")


@pytest.mark.parametrize("gate", ["require_image", "start"])
async def test_a_worker_that_was_never_started(tmp_path: Path, gate: str) -> None:
    """A session whose worker was still to come, or was made and not started, gets it now, once."""
    async with machine_world(tmp_path) as world:
        async with engine_life(world):
            await world.free()
            world.runtime.gates[gate] = asyncio.Event()
            task_id, session_id = world.submit(prompt="x")
            stage = "image" if gate == "require_image" else "container"
            await world.until(lambda: world.session(session_id).stage == stage)
            if gate == "start":
                await world.until(lambda: world.told(ev.WorkerCreated))
        assert world.started == []
        async with engine_life(world):
            events = await world.events(task_id)
            assert events[-1].data["status"] == "completed"
            assert numbered_without_a_hole(events)
            assert (world.started, len(world.machine.containers)) == ([session_id], 1)


# -- tasks that run ---------------------------------------------------------------------------------------


async def test_a_running_task_is_followed_further(tmp_path: Path) -> None:
    """It goes on behind the last event that is known, with the numbers that it had, and runs once."""
    async with machine_world(tmp_path) as world:
        remembering = world.remembers()
        task_id, session_id = await working(world)
        async with engine_life(world):
            world.workers[session_id].released.set()
            events = await world.events(task_id)
            assert deltas(events) == [f"d{n}" for n in range(1, 7)]
            assert numbered_without_a_hole(events)
            assert events[-1].data["status"] == "completed"
            assert remembering.ran == [task_id]
            tasks = [call for call in world.workers[session_id].calls if "/tasks/" in call[1]]
            assert tasks == [("POST", f"/tasks/{task_id}"), ("GET", f"/tasks/{task_id}/events?after=3")]
            assert world.session(session_id).state == "ready"


async def test_a_task_that_ended_meanwhile(tmp_path: Path) -> None:
    """What its worker said while nobody listened is taken when somebody does again."""
    async with machine_world(tmp_path) as world:
        world.remembers()
        task_id, session_id = await working(world)
        world.workers[session_id].released.set()
        async with engine_life(world):
            assert deltas(await world.events(task_id)) == [f"d{n}" for n in range(1, 7)]


async def test_a_task_that_never_arrived(tmp_path: Path) -> None:
    """A task that was on its way is sent again, with its input: the worker runs it once."""
    async with machine_world(tmp_path) as world:

        async def swallow(worker: PlayedWorker, call: Call) -> None:
            await worker.released.wait()

        world.on_task = swallow
        async with engine_life(world):
            await world.free()
            task_id, session_id = world.submit(prompt="x")
            await world.until(lambda: session_id in world.workers)
            await world.workers[session_id].got_task.wait()
            assert world.inputs.get(task_id) == b'{"metadata":{"prompt":"x"}}'
        worker = world.workers[session_id]
        worker.on_task = remembering = world.remembers()
        async with engine_life(world):
            worker.released.set()
            events = await world.events(task_id)
            assert events[-1].data["status"] == "completed"
            assert remembering.ran == [task_id]
            assert [method for method, path in worker.calls if "/tasks/" in path] == ["POST", "POST"]
            assert world.inputs.get(task_id) is None


async def test_a_task_that_its_worker_has_forgotten(tmp_path: Path) -> None:
    """It fails with the restart as its reason; its session goes on, with the next task."""
    async with machine_world(tmp_path) as world:
        remembering = world.remembers()
        async with engine_life(world):
            await world.free()
            first, session_id = world.submit()
            second, _ = world.submit(session_id)
            await world.saw(first, "d3")
        remembering.ran.clear()
        world.workers[session_id].released.set()
        async with engine_life(world):
            end = (await world.events(first))[-1].data
            assert (end["status"], end["error"]["code"]) == ("failed", "service_restarted")
            assert (await world.events(second))[-1].data["status"] == "completed"
            assert remembering.ran == [second]


async def test_events_that_the_worker_has_dropped(tmp_path: Path) -> None:
    """Readers get a gap in their place, and what comes behind it."""
    async with machine_world(tmp_path) as world:
        remembering = world.remembers()
        task_id, session_id = await working(world)
        remembering.oldest = 6
        world.workers[session_id].released.set()
        async with engine_life(world):
            events = await world.events(task_id)
            assert deltas(events) == ["d1", "d2", "d3", "d6"]
            (gap,) = [event for event in events if event.name == "gap"]
            before = [event.number for event in events if event.data.get("delta") == "d3"]
            assert gap.data == {"from": before[0] + 1, "to": before[0] + 2}
            assert events[-1].data["status"] == "completed"


async def test_a_task_that_was_cancelled_before(tmp_path: Path) -> None:
    """Its worker is asked again to let go of it, and its place is free when it has."""
    async with machine_world(tmp_path) as world:
        world.remembers()
        world.prepare = lambda worker: setattr(worker, "unknown_to_cancel", 1_000_000)
        async with engine_life(world):
            await world.free()
            task_id, session_id = world.submit()
            await world.saw(task_id, "d3")
            world.engine.decide(ev.TaskCancelRequested(task_id=task_id, tenant="a"))
            assert (await world.events(task_id))[-1].data["status"] == "cancelled"
            assert world.session(session_id).state == "working"
        worker = world.workers[session_id]
        worker.unknown_to_cancel = 0
        async with engine_life(world):
            await world.until(lambda: world.session(session_id).state == "ready")
            assert worker.cancelled == [task_id]
            assert (await world.events(task_id))[-1].data["status"] == "cancelled"


# -- workers that are gone --------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True])
async def test_a_worker_that_is_gone(tmp_path: Path, busy: bool) -> None:
    """A worker of which nothing is left ends its session and its task. The restart is the reason: nobody can
    tell why it went."""
    async with machine_world(tmp_path) as world:
        world.remembers()
        task_id, session_id = await working(world) if busy else ("", await warm(world))
        del world.machine.containers[world.container(session_id)]
        world.playing[session_id].cancel()
        async with engine_life(world):
            found = await world.ended(session_id)
            assert found == ("failed", "worker_exited", "service_restarted")
            if busy:
                error = (await world.events(task_id))[-1].data["error"]
                assert error["code"] == "service_restarted"
            assert calls(world, "create", "start") == []


@pytest.mark.parametrize("state", ["idle", "busy", "loading"])
async def test_a_worker_that_exited_meanwhile(tmp_path: Path, state: str) -> None:
    """Its exit is told with its code, as if it had been heard."""
    async with machine_world(tmp_path) as world:
        world.remembers()
        if state == "loading":
            world.health = {"status": "loading"}
            async with engine_life(world):
                await world.free()
                task_id, session_id = world.submit()
                await world.until(lambda: world.session(session_id).stage == "loading")
        else:
            task_id, session_id = await working(world) if state == "busy" else ("", await warm(world))
        world.exit(session_id, 3)
        async with engine_life(world):
            reason = "start_failed" if state == "loading" else "worker_exited"
            assert await world.ended(session_id) == ("failed", reason, "worker_exited")
            failure = world.session(session_id).failure
            assert failure is not None
            assert failure.message == "the worker exited with code 3"
            if task_id:
                assert (await world.events(task_id))[-1].data["error"]["code"] == "worker_exited"
            assert len(world.told(ev.WorkerLost)) == 1


async def test_an_exit_that_nobody_told_of(tmp_path: Path) -> None:
    """Whoever takes up a worker sees that it has ended, also where the news of that came too early for it."""
    async with machine_world(tmp_path) as world:
        session_id = await warm(world)
        async with engine_life(world):
            world.machine.listeners.clear()
            world.exit(session_id, 3)
            assert await world.ended(session_id) == ("failed", "worker_exited", "worker_exited")


async def test_an_engine_that_does_not_answer_yet(tmp_path: Path) -> None:
    """Until the runtime answers nothing is concluded; then all goes on."""
    async with machine_world(tmp_path) as world:
        world.remembers()
        task_id, session_id = await working(world)
        async with engine_life(world):
            world.runtime.wrong["reattach"] = RuntimeUnreachable("not yet")
            async with asyncio.timeout(20):
                while len(calls(world, "reattach")) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await world.engine.wash.remove_residue()  # what is not found yet is still not residue
            assert world.session(session_id).state == "working"
            del world.runtime.wrong["reattach"]
            world.workers[session_id].released.set()
            assert (await world.events(task_id))[-1].data["status"] == "completed"


async def test_a_worker_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was ready and lets itself not be spoken to any more loses its session."""
    monkeypatch.setattr(attendant, "ADOPTION_SECONDS", 0.05)
    async with machine_world(tmp_path) as world:
        session_id = await warm(world)
        world.playing[session_id].cancel()
        await asyncio.wait([world.playing[session_id]])
        async with engine_life(world):
            assert (await world.ended(session_id))[::2] == ("failed", "worker_unreachable")


async def test_a_run_folder_that_is_gone(tmp_path: Path) -> None:
    """Without its folder a worker cannot be reached, and its session ends."""
    async with machine_world(tmp_path) as world:
        session_id = await warm(world)
        shutil.rmtree(world.run_dir / session_id)
        async with engine_life(world):
            assert (await world.ended(session_id))[::2] == ("failed", "run_folder_fault")


async def test_a_worker_that_is_swapped(tmp_path: Path) -> None:
    """Who answers for another session is not this one's worker, however it came to its socket."""
    async with machine_world(tmp_path) as world:
        session_id = await warm(world)
        world.workers[session_id].health = {"status": "ready", "session_id": "s_other"}
        async with engine_life(world):
            assert (await world.ended(session_id))[::2] == ("failed", "worker_protocol")
