"""Attendants: starts, broken connections, refusals and deaths, with workers that may be hostile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_server import attendant, relay
from gpu_server.core import events as ev
from gpu_server.core.sessions import Rules
from gpu_server.ports import Output, RuntimeUnreachable, StartRefused, WorkerSpec
from gpu_server.presets import Preset
from tests.app.played_worker import Call, PlayedWorker, TaskScript, end, frame, hold
from tests.app.world import EXEC, IMAGE, PRESET, World, engine_world
from tests.fakes.runtime import FakeScript


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; an exit, and what was written before it, is waited for until it is there."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 20.0)
    monkeypatch.setattr(attendant, "LOADING_POLL_SECONDS", 0.005)
    monkeypatch.setattr(attendant, "REATTACH_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(attendant, "UNREACHABLE_TRIES", 3)


@pytest.fixture
def _no_exit(_short_waits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells of an exit here, so waiting for that is in vain, and short."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 0.05)


def delta(number: int) -> bytes:
    return frame(number, "text_delta", delta=f"d{number}")


def deltas(events: list[Any]) -> list[str]:
    return [event.data["delta"] for event in events if event.name == "text_delta"]


async def run(
    world: World, on_task: TaskScript, on_attach: TaskScript | None = None
) -> tuple[list[Any], str]:
    """The events of one task with a worker that behaves so, and its session."""

    def prepare(worker: PlayedWorker) -> None:
        worker.on_task, worker.on_attach = on_task, on_attach

    world.prepare = prepare
    task_id, session_id = world.submit()
    return await world.events(task_id), session_id


# -- broken connections: what they do to the session; test_relay.py has what they do to the task -----------


@pytest.mark.usefixtures("_no_exit")
async def test_no_progress_ends_the_session(tmp_path: Path) -> None:
    """A worker that gives nothing more, however often it is asked, loses its session."""

    async def nothing(worker: PlayedWorker, call: Call) -> None:
        await call.stream(delta(1) if call.method == "POST" else b"")
        await call.done()

    async with engine_world(tmp_path) as world:
        events, session_id = await run(world, nothing, nothing)
        assert deltas(events) == ["d1"]
        assert events[-1].data["error"]["code"] == "worker_unreachable"
        assert world.session(session_id).close_reason == "worker_misbehaved"
        attaches = [
            path for method, path in world.workers[session_id].calls if method == "GET" and "tasks" in path
        ]
        assert len(attaches) == relay.REATTACH_TRIES
        await world.free()


@pytest.mark.usefixtures("_no_exit")
@pytest.mark.parametrize("status", [404, 410])
async def test_a_worker_that_has_forgotten(tmp_path: Path, status: int) -> None:
    """A worker that does not know its own task any more loses its session."""

    async def breaks(worker: PlayedWorker, call: Call) -> None:
        await call.stream(delta(1))
        await call.done()

    async def forgot(worker: PlayedWorker, call: Call) -> None:
        await call.answer(status, {})

    async with engine_world(tmp_path) as world:
        events, session_id = await run(world, breaks, forgot)
        assert events[-1].data["error"]["code"] == "worker_protocol"
        assert world.session(session_id).close_reason == "worker_misbehaved"


async def test_end_and_then_a_broken_stream(tmp_path: Path) -> None:
    """A task that has said its end is over, whatever becomes of the connection and of the worker."""

    async def ends_and_dies(worker: PlayedWorker, call: Call) -> None:
        await call.stream(delta(1) + end(2))
        call.cut()

    async with engine_world(tmp_path) as world:
        events, session_id = await run(world, ends_and_dies)
        assert events[-1].data["status"] == "completed"
        world.exit(session_id)
        await world.until(lambda: world.session(session_id).ended)
        assert world.session(session_id).close_reason == "worker_exited"


# -- refusals and faults ----------------------------------------------------------------------------------


async def test_a_refused_task(tmp_path: Path) -> None:
    """A task that the worker does not take fails, and the session goes on."""

    async def refuse(worker: PlayedWorker, call: Call) -> None:
        worker.on_task = hold
        await call.answer(500, {})

    async with engine_world(tmp_path) as world:
        events, session_id = await run(world, refuse)
        assert events[-1].data["status"] == "failed"
        assert events[-1].data["error"]["code"] == "worker_protocol"
        assert "500" in events[-1].data["error"]["message"]
        assert world.session(session_id).state == "ready"


async def test_a_protocol_fault_ends_the_session(tmp_path: Path) -> None:
    """A worker that breaks the contract loses its session; what it sent properly before is kept."""

    async def misbehave(worker: PlayedWorker, call: Call) -> None:
        await call.stream(delta(1), frame(1, "task_finish", status="completed"))
        await worker.released.wait()

    async with engine_world(tmp_path) as world:
        events, session_id = await run(world, misbehave)
        assert deltas(events) == ["d1"]
        assert events[-1].data["error"]["code"] == "worker_protocol"
        assert world.session(session_id).close_reason == "worker_misbehaved"
        await world.free()
        assert world.broke == []


async def test_a_failed_task_keeps_the_workers_own_code(tmp_path: Path) -> None:
    """The worker's failure is the task's, and its usage is kept."""

    async def fail(worker: PlayedWorker, call: Call) -> None:
        await call.stream(end(1, "failed", error={"code": "too_hot", "message": "42 C"}, usage={"n": 1}))
        await call.done()

    async with engine_world(tmp_path) as world:
        events, session_id = await run(world, fail)
        assert events[-2].name == "error"
        assert events[-1].data["error"] == {"code": "too_hot", "message": "42 C"}
        assert events[-1].data["usage"] == {"n": 1}
        assert world.session(session_id).state == "ready"


async def test_run_folder(tmp_path: Path) -> None:
    """A worker that fills its run folder loses its session when that is looked at."""
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        task_id, session_id = world.submit()
        await world.saw(task_id, "held")
        attendant_ = world.engine.attendants[session_id]
        attendant_.check_folder()
        assert world.told(ev.WorkerLost) == []
        (world.run_dir / session_id / "share" / "big").write_bytes(b"x" * (2 << 20))
        attendant_.check_folder()
        assert (await world.events(task_id))[-1].data["error"]["code"] == "run_folder_fault"


# -- starting ---------------------------------------------------------------------------------------------


async def failed_start(world: World, preset: Any = PRESET) -> tuple[str, str, str]:
    """Code and message of a task whose worker cannot start, and its session's close reason."""
    task_id, session_id = world.submit(preset=preset)
    error = (await world.events(task_id))[-1].data["error"]
    reason = world.session(session_id).close_reason
    await world.free()
    assert world.machine.containers == {}
    assert world.broke == []
    return error["code"], error["message"], str(reason)


@pytest.mark.parametrize(
    ("method", "error", "code"),
    [
        ("require_image", StartRefused("image_missing", "no such image"), "image_missing"),
        ("create", StartRefused("start_failed", "no"), "start_failed"),
        ("start", StartRefused("start_failed", "no"), "start_failed"),
        ("create", OSError(28, "No space left on device"), "start_failed"),
        ("start", ZeroDivisionError("a bug"), "internal"),
    ],
)
async def test_a_start_that_is_refused(tmp_path: Path, method: str, error: Exception, code: str) -> None:
    """A start that fails at the runtime fails the session with the runtime's reason."""
    async with engine_world(tmp_path) as world:
        world.runtime.wrong[method] = error
        expected = "worker_misbehaved" if code == "internal" else "start_failed"
        found, message, reason = await failed_start(world)
        assert (found, reason) == (code, expected)
        assert str(error.args[-1]) in message


async def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    """The same holds for programs of the exec contract."""
    async with engine_world(tmp_path) as world:
        world.runtime.wrong["start"] = StartRefused("start_failed", "no")
        assert (await failed_start(world, EXEC))[0] == "start_failed"


@pytest.mark.parametrize("method", ["require_image", "create", "start"])
async def test_a_runtime_that_stays_away(tmp_path: Path, method: str) -> None:
    """A start that the runtime does not answer to is tried again a few times, and then fails."""
    async with engine_world(tmp_path) as world:
        world.runtime.wrong[method] = RuntimeUnreachable("gone")
        assert (await failed_start(world))[::2] == ("runtime_unreachable", "start_failed")
        assert [name for name, _ in world.runtime.calls].count(method) == attendant.UNREACHABLE_TRIES
        assert world.started == []


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("preset", [PRESET, EXEC])
@pytest.mark.parametrize("method", ["require_image", "create", "start"])
async def test_a_runtime_that_is_away_for_a_while(
    tmp_path: Path, method: str, preset: Preset, arrives: bool
) -> None:
    """A start goes on when the runtime answers again, whether it had taken the last order or not; the worker
    is started once. Meanwhile it is known that nobody else can be started."""
    async with engine_world(tmp_path) as world:
        world.machine.images[IMAGE] = FakeScript(exit_code=0 if preset is EXEC else None)
        order = getattr(world.runtime, method)
        tries: list[Any] = []

        async def order_or_not(*args: Any) -> Any:
            tries.append(args)
            if len(tries) < 3:
                if arrives and len(tries) == 1:
                    await order(*args)
                raise RuntimeUnreachable("gone")
            return await order(*args)

        setattr(world.runtime, method, order_or_not)
        task_id, session_id = world.submit(preset=preset)
        assert (await world.events(task_id))[-1].data["status"] == "completed"
        assert world.started == [session_id]
        assert len(tries) == (1 if arrives and method == "start" else 3)
        if preset is PRESET or method != "start":
            assert world.told(ev.RuntimeChecked)
        assert world.told(ev.WorkerLost) == []


async def test_loading(tmp_path: Path) -> None:
    """How far a worker's loading is reaches those who wait; then it is ready."""
    async with engine_world(tmp_path) as world:
        world.health = {"status": "loading", "progress": {"stage": "weights", "done": 1, "total": 2}}
        task_id, session_id = world.submit()
        await world.until(lambda: any(e.done == 1 for e in world.told(ev.StageReached)))
        world.workers[session_id].health = {"status": "loading", "progress": {"stage": "x", "done": 2}}
        await world.until(lambda: any(e.done == 2 for e in world.told(ev.StageReached)))
        world.workers[session_id].health = {"status": "ready"}
        assert (await world.events(task_id))[-1].data["status"] == "completed"
        stages = [event.stage for event in world.told(ev.StageReached)]
        assert stages == ["model", "image", "container", "loading", "loading", "loading"]


async def test_a_worker_that_could_not_load(tmp_path: Path) -> None:
    """A worker that says `failed` ends the start with its own message."""
    async with engine_world(tmp_path) as world:
        world.health = {"status": "failed", "message": "no weights in /models"}
        assert await failed_start(world) == ("start_failed", "no weights in /models", "start_failed")


@pytest.mark.parametrize(
    "health",
    [{"status": "ready", "session_id": "s_other"}, {"status": "perfect"}, {"status": ["ready"]}],
)
async def test_a_wrong_health_answer(tmp_path: Path, health: dict[str, Any]) -> None:
    """A socket that answers for another session, or with what the contract does not know, ends the start."""
    async with engine_world(tmp_path) as world:
        world.health = health
        assert (await failed_start(world))[::2] == ("worker_protocol", "start_failed")


def a_file(spec: WorkerSpec) -> None:
    spec.folder.socket.write_text("not a socket")


def a_link(spec: WorkerSpec) -> None:
    spec.folder.socket.symlink_to("/run/docker.sock")


def a_folder(spec: WorkerSpec) -> None:
    spec.folder.socket.mkdir()


@pytest.mark.parametrize("trick", [a_file, a_link, a_folder])
async def test_no_socket(tmp_path: Path, trick: Callable[[WorkerSpec], None]) -> None:
    """A worker that puts something else where its socket belongs is not spoken to."""
    async with engine_world(tmp_path) as world:
        world.runtime.on_start = trick
        assert (await failed_start(world))[::2] == ("run_folder_fault", "start_failed")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs workers under other uids")
async def test_a_foreign_listener(tmp_path: Path) -> None:
    """A socket on which another uid than the worker's listens is not spoken to."""
    async with engine_world(tmp_path) as world:
        world.runtime.name = "docker"
        code, message, _ = await failed_start(world)
        assert code == "worker_protocol"
        assert "uid 0 listens" in message
        assert all(worker.calls == [] for worker in world.workers.values())


async def test_a_start_that_is_cancelled(tmp_path: Path) -> None:
    """A session that is killed before its container was made never gets one."""
    async with engine_world(tmp_path) as world:
        world.runtime.gates["require_image"] = asyncio.Event()
        task_id, session_id = world.submit()
        await world.until(lambda: world.session(session_id).stage == "image")
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        await world.events(task_id)
        await world.free()
        assert "create" not in {method for method, _ in world.runtime.calls}
        assert world.folders.names() == ()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_creation_under_way_is_waited_for(tmp_path: Path, fails: bool) -> None:
    """The wash of a session that is killed during its creation begins when the creation has ended: no
    container appears behind the wash."""
    async with engine_world(tmp_path) as world:
        gate = world.runtime.gates["create"] = asyncio.Event()
        task_id, session_id = world.submit()
        await world.until(lambda: world.session(session_id).stage == "container")
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        assert (await world.events(task_id))[-1].data["status"] == "cancelled"
        for _ in range(20):
            await asyncio.sleep(0)
        assert "remove" not in {method for method, _ in world.runtime.calls}
        assert world.engine.node.slots["0"].state == "washing"
        if fails:
            world.runtime.wrong["create"] = StartRefused("start_failed", "no")
        gate.set()
        await world.free()
        methods = [method for method, _ in world.runtime.calls]
        assert methods.index("remove") > methods.index("create")
        assert "start" not in methods
        assert world.machine.containers == {}
        assert world.folders.names() == ()
        assert world.session(session_id).state == "closed"
        assert world.session(session_id).close_reason == "killed"


# -- the end of the worker --------------------------------------------------------------------------------


async def test_a_worker_that_dies_while_it_works(tmp_path: Path) -> None:
    """A worker that exits while its stream is open is reported once, with what it wrote last; its events
    until then are kept."""
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        task_id, session_id = world.submit()
        await world.saw(task_id, "held")
        name = world.container(session_id)
        world.machine.say(name, b"Traceback:\n")
        world.machine.say(name, b"CUDA error: out of luck\n", "stderr")
        world.exit(session_id, 134)
        events = await world.events(task_id)
        assert deltas(events) == ["held"]
        message = "the worker exited with code 134: CUDA error: out of luck"
        assert events[-1].data["error"] == {"code": "worker_exited", "message": message}
        (lost,) = world.told(ev.WorkerLost)
        assert lost.log_tail == "Traceback:\nCUDA error: out of luck\n"
        await world.free()
        session = world.session(session_id)
        assert (session.state, session.close_reason) == ("failed", "worker_exited")
        assert session.log_tail == lost.log_tail
        assert len(world.told(ev.WorkerLost)) == 1


@pytest.mark.usefixtures("_no_exit")
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("away", [False, True])
async def test_a_worker_whose_exit_is_heard_late(tmp_path: Path, away: bool, stopping: bool) -> None:
    """Where the engine goes away with its workers, a worker's exit is heard long after its connections broke,
    or it said that it is stopping: it did not misbehave, and its task hears how it ended."""
    async with engine_world(tmp_path) as world:
        tries = 0

        async def late(worker: PlayedWorker, call: Call) -> None:
            nonlocal tries
            tries += 1
            name = world.container(worker.session_id)
            world.runtime.unreachable = away
            if tries == 2 * relay.REATTACH_TRIES:
                world.runtime.unreachable = False
                world.machine.exit(name, 143)
            elif not away and tries == 1:
                listeners, world.machine.listeners = world.machine.listeners, []
                world.machine.exit(name, 143)  # the engine knows, and has not told
                world.machine.listeners = listeners
            if stopping:
                await call.answer(503, {})
            else:
                call.cut()

        events, session_id = await run(world, late, late)
        assert events[-1].data["error"] == {
            "code": "worker_exited",
            "message": "the worker exited with code 143",
        }
        assert world.session(session_id).close_reason == "worker_exited"
        await world.free()


async def test_several_tasks_die_with_their_worker(tmp_path: Path) -> None:
    """Every task of a worker that dies hears of it, and the loss is still reported once."""
    preset = PRESET.model_copy(update={"max_concurrent_tasks": 3})
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        first, session_id = world.submit(preset=preset)
        await world.ready(session_id)
        others = [world.submit(session_id, preset=preset)[0] for _ in range(3)]
        await world.saw(first, "held")
        world.exit(session_id, 1)
        for task_id in (first, *others):
            assert (await world.events(task_id))[-1].data["error"]["code"] == "worker_exited"
        assert len(world.told(ev.WorkerLost)) == 1


async def test_a_worker_that_dies_while_it_loads(tmp_path: Path) -> None:
    """A worker that exits before it is ready shows why in the failure of its start."""
    async with engine_world(tmp_path) as world:
        world.health = {"status": "loading"}
        task_id, session_id = world.submit()
        await world.until(lambda: session_id in world.workers)
        world.machine.say(world.container(session_id), b"ModuleNotFoundError: torch")
        world.exit(session_id, 1)
        error = (await world.events(task_id))[-1].data["error"]
        assert error["message"] == "the worker exited with code 1: ModuleNotFoundError: torch"
        await world.until(lambda: world.session(session_id).ended)
        assert world.session(session_id).close_reason == "start_failed"


async def test_out_of_memory(tmp_path: Path) -> None:
    """A worker that was killed for its memory is told so."""
    async with engine_world(tmp_path) as world:
        task_id, session_id = world.submit()
        await world.events(task_id)
        world.exit(session_id, 137, oom_killed=True)
        await world.until(lambda: world.session(session_id).ended)
        failure = world.session(session_id).failure
        assert failure is not None
        assert failure.message == "the worker was killed for using too much memory with code 137"


async def test_the_log_tail_is_bounded(tmp_path: Path) -> None:
    """Of a chatty worker the last 64 KiB are kept."""
    async with engine_world(tmp_path) as world:
        task_id, session_id = world.submit()
        await world.events(task_id)
        for number in range(200):
            world.machine.say(world.container(session_id), b"%04d" % number + b"x" * 1000 + b"\n")
        world.exit(session_id)
        await world.until(lambda: world.session(session_id).ended)
        tail = world.session(session_id).log_tail
        assert len(tail) == attendant.LOG_TAIL_BYTES
        assert tail.endswith("0199" + "x" * 1000 + "\n")


async def test_a_cancel_that_is_not_heard(tmp_path: Path) -> None:
    """A worker that does not answer to a cancel loses its session at the deadline; nothing else breaks."""

    async def deaf(worker: PlayedWorker, call: Call) -> None:
        await call.stream(delta(1))
        await asyncio.Event().wait()

    async with engine_world(tmp_path, rules=Rules(cancel_grace=5)) as world:
        world.on_task = deaf
        task_id, session_id = world.submit()
        await world.saw(task_id, "d1")
        world.workers[session_id].path.unlink()
        world.engine.decide(ev.TaskCancelRequested(task_id=task_id, tenant="a"))
        assert (await world.events(task_id))[-1].data["status"] == "cancelled"
        assert world.session(session_id).state == "working"
        world.clock.advance(5)
        world.engine.report(ev.Tick())
        await world.free()
        assert world.session(session_id).close_reason == "worker_misbehaved"


async def test_a_program_that_talks_to_the_end(tmp_path: Path) -> None:
    """All that a program wrote is in its stream before its end, also what came with its exit."""
    async with engine_world(tmp_path) as world:
        world.machine.images[PRESET.docker_image] = FakeScript(
            output=tuple(Output("stdout", b"line %d\n" % n) for n in range(50)), exit_code=0
        )
        task_id, session_id = world.submit(preset=EXEC)
        events = await world.events(task_id)
        assert [event.data["line"] for event in events if event.name == "logs"] == [
            f"line {n}" for n in range(50)
        ]
        assert events[-1].data["status"] == "completed"
        await world.free()
        assert world.session(session_id).close_reason == "oneoff_done"
        assert world.told(ev.WorkerLost) == []


# -- a worker within its rights ---------------------------------------------------------------------------


async def test_a_cancel_that_overtakes_its_task_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not know the task yet is asked again, and has then not ignored the cancel."""
    monkeypatch.setattr(attendant, "CANCEL_RETRY_SECONDS", 0.005)

    def prepare(worker: PlayedWorker) -> None:
        worker.on_task, worker.unknown_to_cancel = hold, 2

    async with engine_world(tmp_path) as world:
        world.prepare = prepare
        task_id, session_id = world.submit()
        await world.saw(task_id, "held")
        world.engine.decide(ev.TaskCancelRequested(task_id=task_id, tenant=world.task(task_id).tenant))
        assert (await world.events(task_id))[-1].data["status"] == "cancelled"
        await world.until(lambda: world.session(session_id).state == "ready")
        assert world.workers[session_id].cancelled == [task_id]
