"""Attendants of programs: whatever becomes of the service or the engine meanwhile, a program runs once and
all that it wrote comes once, or it fails and says why."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from gpu_server import attendant
from gpu_server.core import events as ev
from gpu_server.ports import CreatedWorker, OutputLost, RuntimeUnreachable, StartUnanswered, WorkerSpec
from tests.app.reading import Event, numbered_without_a_hole
from tests.app.world import EXEC, World, engine_life, machine_world


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; an exit, and what was written before it, is waited for until it is there."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 20.0)
    monkeypatch.setattr(attendant, "REATTACH_PAUSE_SECONDS", 0.005)


def lines(events: list[Event]) -> list[str]:
    return [event.data["line"] for event in events if event.name == "logs"]


# -- restarts of the service ------------------------------------------------------------------------------


async def program(world: World, *said: tuple[str, bytes]) -> tuple[str, str]:
    """A first life that leaves a program which has written this."""
    async with engine_life(world):
        await world.free()
        task_id, session_id = world.submit(preset=EXEC, prompt="x")
        await world.until(lambda: session_id in world.started)
        name = world.container(session_id)
        for where, data in said:
            world.machine.say(name, data, where)
        await world.until_seq(task_id, sum(data.count(b"\n") for _, data in said))
    return task_id, session_id


async def test_a_running_program_is_read_again(tmp_path: Path) -> None:
    """All that it wrote is in its stream once, what it wrote meanwhile too; and it runs once."""
    async with machine_world(tmp_path) as world:
        event = b'{"event":"text","text":"t"}\n'
        task_id, session_id = await program(world, ("stdout", b"1\n" + event + b"2\nhal"), ("stderr", b"e\n"))
        name = world.container(session_id)
        world.machine.say(name, b"f\n3\n")
        async with engine_life(world):
            world.machine.say(name, b"4\n")
            world.machine.exit(name, 0)
            events = await world.events(task_id)
            assert lines(events) == ["1", "2", "e", "half", "3", "4"]
            assert [event.data for event in events if event.name == "text"] == [{"text": "t"}]
            assert numbered_without_a_hole(events)
            assert events[-1].data["status"] == "completed"
            assert world.started == [session_id]


@pytest.mark.parametrize(("code", "status"), [(0, "completed"), (3, "failed")])
async def test_a_program_that_exited_meanwhile(tmp_path: Path, code: int, status: str) -> None:
    """Its output is read to the end, and its exit code decides."""
    async with machine_world(tmp_path) as world:
        task_id, session_id = await program(world, ("stdout", b"1\n"))
        name = world.container(session_id)
        world.machine.say(name, b"2\n")
        world.machine.exit(name, code)
        async with engine_life(world):
            events = await world.events(task_id)
            assert lines(events) == ["1", "2"]
            assert events[-1].data["status"] == status
            await world.until(lambda: world.session(session_id).ended)
            assert world.session(session_id).close_reason == "oneoff_done"
            assert world.told(ev.WorkerLost) == []


async def test_a_program_whose_output_is_lost(tmp_path: Path) -> None:
    """A program that cannot be read again from its beginning fails: what it wrote may be missing."""
    async with machine_world(tmp_path) as world:
        task_id, session_id = await program(world, ("stdout", b"1\n"))
        async with engine_life(world):
            world.runtime.wrong["reattach"] = OutputLost("not kept")
            assert await world.ended(session_id) == ("failed", "worker_exited", "service_restarted")
            events = await world.events(task_id)
            assert lines(events) == ["1"]
            assert events[-1].data["error"] == {"code": "service_restarted", "message": "not kept"}


async def test_a_program_of_which_the_beginning_is_not_kept(tmp_path: Path) -> None:
    """Where nobody knows how much of its output was taken it cannot be followed further either."""
    async with machine_world(tmp_path) as world:
        line = b"x" * 60_000 + b"\n"
        task_id, session_id = await program(world, *[("stdout", line)] * 50)
        async with engine_life(world):
            assert await world.ended(session_id) == ("failed", "worker_exited", "service_restarted")
            assert (await world.events(task_id))[-1].data["error"]["code"] == "service_restarted"


@pytest.mark.parametrize("gate", ["require_image", "start"])
async def test_a_program_that_was_never_started(tmp_path: Path, gate: str) -> None:
    """It is started now, with its input, once."""
    async with machine_world(tmp_path) as world:
        async with engine_life(world):
            await world.free()
            world.runtime.gates[gate] = asyncio.Event()
            task_id, session_id = world.submit(preset=EXEC, prompt="x")
            if gate == "start":
                await world.until(lambda: world.task(task_id).state == "running")
            else:
                await world.until(lambda: world.session(session_id).stage == "image")
        assert world.started == []
        async with engine_life(world):
            await world.until(lambda: session_id in world.started)
            container = world.machine.containers[world.container(session_id)]
            content = (container.spec.folder.task / "input.json").read_bytes()
            assert content == b'{"metadata":{"prompt":"x"}}'
            world.machine.exit(container.spec.name, 0)
            events = await world.events(task_id)
            assert events[-1].data["status"] == "completed"
            assert numbered_without_a_hole(events)
            assert world.started == [session_id]


async def test_a_program_that_was_never_started_and_an_engine_that_comes_and_goes(tmp_path: Path) -> None:
    """Also where what was made of it before is gone when the engine answers again."""
    async with machine_world(tmp_path) as world:
        async with engine_life(world):
            await world.free()
            world.runtime.gates["start"] = asyncio.Event()
            task_id, session_id = world.submit(preset=EXEC)
            await world.until(lambda: world.task(task_id).state == "running")
        async with engine_life(world):
            create = world.runtime.create

            async def gone_once(spec: WorkerSpec) -> CreatedWorker:
                world.runtime.create = create
                world.machine.containers.clear()
                raise RuntimeUnreachable("gone")

            world.runtime.create = gone_once
            await world.until(lambda: session_id in world.started)
            world.machine.exit(world.container(session_id), 0)
            assert (await world.events(task_id))[-1].data["status"] == "completed"
            assert world.started == [session_id]


async def test_a_program_that_was_never_started_and_has_no_input(tmp_path: Path) -> None:
    """Where its input was lost with RUN_DIR it fails, and is not started without."""
    async with machine_world(tmp_path) as world:
        async with engine_life(world):
            await world.free()
            world.runtime.gates["start"] = asyncio.Event()
            task_id, session_id = world.submit(preset=EXEC)
            await world.until(lambda: world.task(task_id).state == "running")
        shutil.rmtree(world.spool_root)
        async with engine_life(world):
            assert (await world.ended(session_id))[2] == "service_restarted"
            assert (await world.events(task_id))[-1].data["error"]["code"] == "service_restarted"
            assert world.started == []


async def test_a_program_that_is_gone(tmp_path: Path) -> None:
    """A program of which nothing is left is not started a second time."""
    async with machine_world(tmp_path) as world:
        task_id, session_id = await program(world, ("stdout", b"1\n"))
        del world.machine.containers[world.container(session_id)]
        async with engine_life(world):
            assert await world.ended(session_id) == ("failed", "worker_exited", "service_restarted")
            assert lines(await world.events(task_id)) == ["1"]
            assert world.started == [session_id]


# -- engines that are gone for a while --------------------------------------------------------------------


async def lost_engine(world: World, session_id: str) -> None:
    """The engine goes away: what was attached ends, and exits go unheard. When it is back it says so."""
    world.machine.listeners.clear()
    world.machine.containers[world.container(session_id)].output.end()
    world.runtime.interruptions += 1


async def test_a_program_goes_on_without_its_engine(tmp_path: Path) -> None:
    """A program that outlives its engine is read again from its beginning, and what it wrote comes once."""
    async with machine_world(tmp_path) as world, engine_life(world):
        await world.free()
        task_id, session_id = world.submit(preset=EXEC)
        await world.until(lambda: session_id in world.started)
        name = world.container(session_id)
        world.machine.say(name, b"1\nha")
        await world.until_seq(task_id, 1)
        listeners = list(world.machine.listeners)
        await lost_engine(world, session_id)
        world.machine.say(name, b"lf\n2\n")
        await world.until_seq(task_id, 3)
        world.machine.listeners += listeners
        world.machine.say(name, b"3\n")
        world.machine.exit(name, 0)
        events = await world.events(task_id)
        assert lines(events) == ["1", "half", "2", "3"]
        assert events[-1].data["status"] == "completed"
        assert world.started == [session_id]


@pytest.mark.parametrize("left", ["its exit", "nothing"])
async def test_a_program_that_ends_with_its_engine(tmp_path: Path, left: str) -> None:
    """A program that ended while its engine was away fails, whatever its exit code: what it wrote last went
    with the engine that was to read it."""
    async with machine_world(tmp_path) as world, engine_life(world):
        await world.free()
        task_id, session_id = world.submit(preset=EXEC)
        await world.until(lambda: session_id in world.started)
        name = world.container(session_id)
        world.machine.say(name, b"1\n")
        await world.until_seq(task_id, 1)
        await lost_engine(world, session_id)
        if left == "nothing":
            del world.machine.containers[name]
        else:
            world.machine.exit(name, 0)
        assert await world.ended(session_id) == ("failed", "worker_exited", "service_restarted")
        assert lines(await world.events(task_id)) == ["1"]


@pytest.mark.parametrize(
    ("error", "is_new", "runs"),
    [(StartUnanswered, True, False), (StartUnanswered, False, True), (RuntimeUnreachable, True, True)],
)
async def test_a_program_whose_start_was_not_answered(
    tmp_path: Path, error: type[RuntimeUnreachable], is_new: bool, runs: bool
) -> None:
    """A new engine may not know that the one which died had started it: it is not started again. It is where
    the engine is the same, or was not asked."""
    async with machine_world(tmp_path) as world, engine_life(world):
        await world.free()
        start = world.runtime.start

        async def fails_once(name: str) -> None:
            world.runtime.start = start
            world.runtime.interruptions += is_new
            raise error("gone")

        world.runtime.start = fails_once
        task_id, session_id = world.submit(preset=EXEC)
        if runs:
            await world.until(lambda: session_id in world.started)
            world.machine.exit(world.container(session_id), 0)
            assert (await world.events(task_id))[-1].data["status"] == "completed"
            assert world.started == [session_id]
        else:
            assert await world.ended(session_id) == ("failed", "worker_exited", "service_restarted")
            assert (await world.events(task_id))[-1].data["error"]["code"] == "service_restarted"
            assert world.started == []
