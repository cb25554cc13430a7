"""The engine: decisions are carried out, refused requests leave nothing, and a bug breaks it closed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpu_server import inputs
from gpu_server.core import events as ev
from gpu_server.core.effects import Effect
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import Rules
from gpu_server.ports import WorkerExit
from gpu_server.presets import Preset
from tests.app.played_worker import hold
from tests.app.world import EXEC, IMAGE, PRESET, World, engine_world, slot_specs


def kept(world: World) -> tuple[int, ...]:
    """How much the engine holds: streams, bytes of inputs, files in the spool, attendants, washes, bytes."""
    engine = world.engine
    return (
        len(engine.streams),
        world.inputs._total,
        len(world.spool.known()),
        len(engine.attendants),
        len(engine._washes),
        engine.streams.kept_bytes,
    )


async def test_a_task_from_start_to_finish(tmp_path: Path) -> None:
    """A task brings up a worker, its events come through in order and numbered, and it finishes."""
    async with engine_world(tmp_path) as world:
        task_id, session_id = world.submit(prompt="hello")
        events = await world.events(task_id)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        told = [(event.name, event.data.get("status")) for event in events]
        assert told == [
            ("connection", "allocated"),
            ("worker", "created"),
            ("worker", "loading"),
            ("connection", "session_ready"),
            ("worker", "working"),
            ("text_delta", None),
            ("worker", "waiting"),
            ("task_finish", "completed"),
        ]
        assert events[5].data == {"delta": "hello"}
        again, _ = world.submit(session_id, prompt="again")
        assert [event.data.get("delta") for event in await world.events(again)][-3] == "again"
        assert world.session(session_id).tasks_done == 2


async def test_an_ended_session_leaves_nothing(tmp_path: Path) -> None:
    """After a session and its retention nothing is kept, in memory, on the disk or in the runtime."""
    async with engine_world(tmp_path) as world:
        task_id, session_id = world.submit(oneoff=True)
        await world.events(task_id)
        await world.until(lambda: world.session(session_id).ended)
        await world.free()
        assert world.machine.containers == {}
        assert world.folders.names() == ()
        world.clock.advance(100_000)
        world.engine.report(ev.Tick())
        await asyncio.sleep(0)
        assert kept(world) == (0,) * 6
        assert world.engine.node.sessions == world.engine.node.tasks == {}


@pytest.mark.parametrize(
    ("preset", "session_id", "code"),
    [
        (PRESET, "s_unknown", RefusalCode.SESSION_NOT_FOUND),
        (Preset(docker_image=IMAGE, model="none", gpus=9), None, RefusalCode.NO_SUCH_CAPACITY),
    ],
)
async def test_a_refused_task_leaves_nothing(
    tmp_path: Path, preset: Preset, session_id: str | None, code: RefusalCode
) -> None:
    """A refused submission keeps no stream, no input and no file."""
    async with engine_world(tmp_path) as world:
        with pytest.raises(Refusal) as refused:
            world.submit(session_id, preset=preset)
        assert refused.value.code is code
        assert kept(world) == (0,) * 6


async def test_a_refused_session_leaves_nothing(tmp_path: Path) -> None:
    """A refused start of a session keeps nothing either."""
    async with engine_world(tmp_path) as world:
        with pytest.raises(Refusal, match="exec contract"):
            world.request("s_1", preset="exec")
        assert kept(world) == (0,) * 6


async def test_a_session_ahead_of_its_first_task(tmp_path: Path) -> None:
    """A requested session starts its worker and waits for tasks."""
    async with engine_world(tmp_path) as world:
        world.request("s_1")
        await world.ready("s_1")
        task_id, _ = world.submit("s_1", prompt="x")
        first = (await world.events(task_id))[0]
        assert (first.name, first.data["status"]) == ("connection", "session_ready")


async def test_cancel(tmp_path: Path) -> None:
    """A cancelled task ends at once; its place is free when the worker has stopped."""
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        task_id, session_id = world.submit()
        await world.saw(task_id, "held")
        world.engine.decide(ev.TaskCancelRequested(task_id=task_id, tenant="a"))
        assert (await world.events(task_id))[-1].data["status"] == "cancelled"
        await world.until(lambda: world.session(session_id).state == "ready")
        assert world.workers[session_id].cancelled == [task_id]


async def test_exec(tmp_path: Path) -> None:
    """A program runs once: its lines are its events, its exit code decides."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        for code, status in ((0, "completed"), (3, "failed")):
            task_id, session_id = world.submit(preset=EXEC, prompt="x")
            await world.until(lambda s=session_id: s in world.started)
            spec = world.machine.containers[world.container(session_id)].spec
            assert spec.task_id == task_id
            assert (spec.folder.task / "input.json").read_bytes() == b'{"metadata":{"prompt":"x"}}'
            name = world.container(session_id)
            world.machine.say(name, b'{"event":"text","text":"a"}\nplain\n')
            world.machine.exit(name, code)
            events = await world.events(task_id)
            assert [event.name for event in events if event.name in ("text", "logs")] == ["text", "logs"]
            assert events[-1].data["status"] == status
            if code:
                assert events[-1].data["error"] == {
                    "code": "worker_exited",
                    "message": "the worker exited with code 3: plain",
                }


async def test_model_that_is_not_there(tmp_path: Path) -> None:
    """A preset whose model folder is missing fails the task with its own code, whatever the id looks like."""
    async with engine_world(tmp_path) as world:
        world.presets["weights"] = Preset(docker_image=IMAGE)
        for model_id in ("m", "name:tag"):
            session_id = f"s_{model_id[0]}"
            world.request(session_id, model_id=model_id, preset="weights")
            await world.until(lambda s=session_id: world.session(s).ended)
            failure = world.session(session_id).failure
            assert failure is not None
            assert failure.code == "model_missing"
            await world.free()


# -- bugs -------------------------------------------------------------------------------------------------


def is_closed(world: World) -> None:
    """A broken engine has told so once, and decides nothing more."""
    assert len(world.broke) == 1
    assert world.engine.broken is not None
    slots = [(slot.state, slot.holder) for slot in world.engine.node.slots]
    for _ in range(2):
        with pytest.raises(Refusal) as refused:
            world.submit()
        assert refused.value.code is RefusalCode.INTERNAL
        world.engine.report(ev.Tick())
        world.engine.report(ev.NodeStarted(slots=slot_specs(3)))
    assert [(slot.state, slot.holder) for slot in world.engine.node.slots] == slots
    assert len(world.broke) == 1
    assert kept(world)[:3] == (0, 0, 0)


async def test_a_bug_in_a_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision that fails breaks the engine: told once, and everything after it is refused."""
    async with engine_world(tmp_path) as world:

        def crash(event: Any, now: float) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(world.engine.node, "handle", crash)
        with pytest.raises(KeyError):
            world.engine.decide(ev.Tick())
        is_closed(world)


@dataclass(frozen=True)
class Unheard(Effect):
    """An effect that nobody carries out."""


async def test_an_unknown_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An effect that cannot be carried out is a bug: the state says it happened, and it did not."""
    async with engine_world(tmp_path) as world:
        monkeypatch.setattr(world.engine.node, "handle", lambda event, now: [Unheard()])
        with pytest.raises(AssertionError, match="no one handles"):
            world.engine.decide(ev.Tick())
        is_closed(world)


async def test_a_crash_in_owned_work(tmp_path: Path) -> None:
    """Work of the engine's own that crashes breaks the engine, not the task group."""
    async with engine_world(tmp_path) as world:

        async def crash() -> None:
            raise ValueError("a bug")

        await asyncio.wait([world.engine.spawn("crash", crash())])
        assert world.broke == ["crash: ValueError('a bug')"]
        is_closed(world)


async def test_a_rejected_certificate(tmp_path: Path) -> None:
    """A certificate for nothing frees nothing and breaks nothing."""
    async with engine_world(tmp_path, washed=False) as world:
        await world.free()
        before = world.engine.node.slots["0"].prev
        world.engine.report(ev.CertificateIssued(certificate=b"no certificate"))
        assert (world.engine.node.slots["0"].prev, world.broke) == (before, [])


async def test_a_crash_in_a_wash(tmp_path: Path) -> None:
    """A wash that crashes has proven nothing: its slot goes to quarantine, the node goes on."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        task_id, session_id = world.submit(oneoff=True)
        world.runtime.wrong["remove"] = ZeroDivisionError("a bug in the driver")
        await world.events(task_id)
        await world.until(lambda: world.session(session_id).ended)
        slot = world.engine.node.slots["0"]
        assert slot.state == "quarantined"
        assert "the wash crashed" in (slot.fault or "")
        assert world.broke == []
        other, _ = world.submit(prompt="still serving")
        assert (await world.events(other))[-1].data["status"] == "completed"
        del world.runtime.wrong["remove"]


async def test_a_crash_in_a_creation(tmp_path: Path) -> None:
    """A bug in a driver's start ends that session, not the node."""
    async with engine_world(tmp_path) as world:
        world.runtime.wrong["create"] = TypeError("a bug in the driver")
        task_id, _session_id = world.submit()
        finish = (await world.events(task_id))[-1]
        assert finish.data["error"]["code"] == "internal"
        await world.free()
        assert world.broke == []


# -- the end ----------------------------------------------------------------------------------------------


async def test_shut_down(tmp_path: Path) -> None:
    """Shutting down ends every session, waits for the washes, and refuses what comes later."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        world.on_task = hold
        tasks = [world.submit()[0] for _ in range(3)]
        for task_id in tasks[:2]:
            await world.saw(task_id, "held")
        gate = world.runtime.gates["remove"] = asyncio.Event()
        stopping = world.group.create_task(world.engine.shut_down(60))
        for task_id in tasks:
            finish = (await world.events(task_id))[-1]
            assert (finish.data["status"], finish.data["error"]["code"]) == ("failed", "shutdown")
        with pytest.raises(Refusal) as refused:
            world.submit()
        assert refused.value.code is RefusalCode.SHUTTING_DOWN
        await world.until(lambda: all(slot.state == "washing" for slot in world.engine.node.slots))
        assert not stopping.done()
        gate.set()
        await stopping
        assert world.machine.containers == {}
        assert world.folders.names() == ()
        assert kept(world)[3:5] == (0, 0)


async def test_shut_down_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A wash that hangs holds the shutdown no longer than asked."""
    async with engine_world(tmp_path) as world:
        _, session_id = world.submit()
        await world.ready(session_id)
        world.runtime.gates["remove"] = asyncio.Event()
        await world.engine.shut_down(0.01)
        assert world.session(session_id).state == "draining"


async def test_drain_ends_with_the_work(tmp_path: Path) -> None:
    """What has a session ends in its own time, the queue of a session too; who waits or idles ends at once,
    and nobody new comes in."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        world.remembers()
        idle = world.request("s_idle")
        await world.ready(idle)
        running, session_id = world.submit()
        await world.saw(running, "d3")
        queued, _ = world.submit(session_id)
        waiting, _ = world.submit(tenant="b")
        draining = world.group.create_task(world.engine.drain(60))
        assert (await world.events(waiting))[-1].data["error"]["code"] == "shutdown"
        await world.until(lambda: world.session(idle).ended)
        assert [world.task(task_id).state for task_id in (running, queued)] == ["running", "queued"]
        for request in (lambda: world.submit(session_id), world.submit, lambda: world.request("s_new")):
            with pytest.raises(Refusal) as refused:
                request()
            assert refused.value.code is RefusalCode.SHUTTING_DOWN
        assert not draining.done()
        world.workers[session_id].released.set()
        for task_id in (running, queued):
            assert (await world.events(task_id))[-1].data["status"] == "completed"
        await draining
        await world.until(lambda: world.session(session_id).ended)
        assert world.session(session_id).close_reason == "shutdown"
        assert world.clock.now() == 1000.0


async def test_drain_ends_after_its_patience(tmp_path: Path) -> None:
    """Work that does not end is not waited for any longer; it still runs then."""
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        task_id, session_id = world.submit(timeout=1000)
        await world.saw(task_id, "held")
        draining = world.group.create_task(world.engine.drain(60))
        await world.clock.until_slept_to(world.clock.now() + 60)
        world.engine.report(ev.StageReached(session_id="s_other", stage="x", done=0, total=None))
        world.clock.advance(59)
        await world.clock.until_slept_to(world.clock.now() + 1)
        assert not draining.done()
        world.clock.advance(1)
        await draining
        assert world.session(session_id).state == "working"


@pytest.mark.parametrize("idle", [False, True])
async def test_drain_of_an_idle_node(tmp_path: Path, idle: bool) -> None:
    """Where no task is there is nothing to wait for."""
    async with engine_world(tmp_path) as world:
        if idle:
            await world.ready(world.request("s_1"))
        async with asyncio.timeout(20):
            await world.engine.drain(60)
        assert world.clock.slept_to == ()


async def test_drain_of_a_broken_engine(tmp_path: Path) -> None:
    """An engine that has met a bug while it drains ends nothing more, so that is not waited for."""
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        task_id, _ = world.submit()
        await world.saw(task_id, "held")
        draining = world.group.create_task(world.engine.drain(60))
        await world.clock.until_slept_to(world.clock.now() + 60)
        world.engine._break("a bug")
        async with asyncio.timeout(20):
            await draining


async def test_shut_down_tells_what_is_left(tmp_path: Path) -> None:
    """Whether all is gone: only then nothing has to be left to another life."""
    async with engine_world(tmp_path) as world:
        await world.ready(world.request("s_1"))
        gate = world.runtime.gates["remove"] = asyncio.Event()
        assert not await world.engine.shut_down(0.01)
        gate.set()
        assert await world.engine.shut_down(60)
        assert world.machine.containers == {}


async def test_exit_of_a_former_worker(tmp_path: Path) -> None:
    """An exit is heard by its own container's attendant only."""
    async with engine_world(tmp_path, rules=Rules(idle_timeout=50)) as world:
        task_id, session_id = world.submit()
        await world.events(task_id)
        for name, owner in ((f"gpu-server-{session_id}-999", session_id), ("x", "s_unknown")):
            world.engine.heard_exit(WorkerExit(name=name, session_id=owner, exit_code=1, oom_killed=False))
        await asyncio.sleep(0)
        assert world.session(session_id).state == "ready"


async def test_the_inputs_of_queued_tasks_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused task keeps nothing, and room comes back when an input was handed on."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        first, _ = world.submit()
        await world.events(first)
        monkeypatch.setattr(inputs, "MAX_BYTES", 1)
        with pytest.raises(Refusal) as refused:
            world.submit()
        assert refused.value.code is RefusalCode.TOO_MUCH_QUEUED
        monkeypatch.setattr(inputs, "MAX_BYTES", 1000)
        second, _ = world.submit()
        assert (await world.events(second))[-1].data["status"] == "completed"
