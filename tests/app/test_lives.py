"""Restarts, in process: whenever the service goes, and however, the next life goes on and nobody loses
anything."""

from __future__ import annotations

import asyncio
import shutil
from base64 import b64encode
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpu_server import attendant
from gpu_server.core import events as ev
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import Grant, RequestKey, Sealing, TaskType
from gpu_server.engine import Submission
from tests.app.mortal import Caller, Death, Killed, live, mortal_histories
from tests.app.played_worker import echo, frame, hold
from tests.app.world import IMAGE, PRESET, World, machine_world, slot_specs
from tests.fakes.journal import MemoryJournal
from tests.fakes.runtime import FakeScript, Output


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 20.0)
    monkeypatch.setattr(attendant, "LOADING_POLL_SECONDS", 0.005)
    monkeypatch.setattr(attendant, "REATTACH_PAUSE_SECONDS", 0.005)


@pytest.fixture(autouse=True)
async def _one_thread() -> None:
    """So that what a life has given to a thread ends before what the next one gives."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


SEALING = Sealing(kms_key_arn="arn:aws:kms:eu-central-1:111122223333:key/k", pool="chat")
GRANT = Grant(epoch="", wrapped_key="", grant="")

Story = Callable[[], Awaitable[None]]


class SessionStory:
    """Two tasks of one session, and one of another tenant that waits for its slot."""

    def __init__(self, world: World) -> None:
        self.world, self.worker = world, world.remembers()
        world.prepare = lambda worker: worker.released.set()
        self.first, self.second = Caller(world, "a"), Caller(world, "a", "second")
        self.other = Caller(world, "b")

    async def __call__(self) -> None:
        """All of it, or what of it is still to come."""
        world = self.world
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(self.first.call())
            await asyncio.sleep(0)
            group.create_task(self.second.call(self.first.session_id))
            await asyncio.sleep(0)
            group.create_task(self.other.call())
            await world.until(lambda: self.second.ended)
            if not world.session(self.first.session_id).tearing_down:
                kill = ev.SessionKillRequested(session_id=self.first.session_id, tenant="a")
                world.engine.decide(kill)

    async def check(self) -> None:
        world = self.world
        callers = (self.first, self.second, self.other)
        for caller in callers:
            await caller.saw_everything_once()
            assert caller.seen[-1].data["status"] == "completed"
            said = [event.data["delta"] for event in caller.seen if event.name == "text_delta"]
            assert said == [f"d{n}" for n in range(1, 7)]
        assert self.worker.ran == [caller.task_id for caller in callers]
        assert world.started == [self.first.session_id, self.other.session_id]
        assert world.session(self.first.session_id).tasks_done == 2


class ProgramStory:
    """One program, that writes and exits."""

    def __init__(self, world: World) -> None:
        said = tuple(Output("stdout", b"line %d\n" % n) for n in range(5))
        world.machine.images[IMAGE] = FakeScript(output=said, exit_code=0)
        self.world, self.caller = world, Caller(world, "a")

    async def __call__(self) -> None:
        async with asyncio.timeout(20):
            await self.caller.call(preset="exec")

    async def check(self) -> None:
        await self.caller.saw_everything_once()
        said = [event.data["line"] for event in self.caller.seen if event.name == "logs"]
        assert said == [f"line {n}" for n in range(5)]
        assert self.caller.seen[-1].data["status"] == "completed"
        assert self.world.started == [self.caller.session_id]


class SealedCaller(Caller):
    """Submits its one task sealed, as bytes that it sends again and again."""

    def submit(self, session_id: str | None = None, *, preset: str = "p") -> None:
        if self.world.killed:
            raise Killed
        if not self.task_id:
            assert session_id is not None
            self.session_id = session_id
            self.task_id = self.world.engine.submit(
                Submission(
                    task_id="t_1",
                    tenant="a",
                    task_type=TaskType.SESSION,
                    tier=None,
                    model_id="m",
                    task_preset=preset,
                    session_id=session_id,
                    new_session_id="s_none",
                    timeout=100.0,
                    body=b"sealed",
                    key=self.key,
                    psk_id="psk",
                )
            )


class SealedStory:
    """A sealed session that is made, opened and given a task; its client repeats whatever got no answer."""

    def __init__(self, world: World) -> None:
        world.health["sealed_key"] = b64encode(bytes(32)).decode()
        world.prepare = lambda worker: worker.released.set()
        self.world = world
        self.worker = world.remembers(says=lambda n: frame(n, "sealed", data=f"AA{n:02}"))
        self.caller = SealedCaller(world, "a", "sealed s_1 r-1")

    async def __call__(self) -> None:
        world = self.world
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            if not self.caller.ended:
                group.create_task(self.ask(world))
            await world.until(lambda: self.caller.ended)
            if not world.session("s_1").tearing_down:
                world.engine.decide(ev.SessionKillRequested(session_id="s_1", tenant="a"))

    async def ask(self, world: World) -> None:
        if world.killed:
            raise Killed
        key = RequestKey(name="the session", fingerprint="f")
        world.engine.request_session(
            "s_1", tenant="a", tier=None, model_id="m", task_preset="p", key=key, sealing=SEALING
        )
        session = world.session("s_1")
        await world.until(lambda: session.worker_key is not None)
        if world.killed:
            raise Killed  # there is nobody who could answer
        if "psk" not in session.grants:
            world.engine.open_session("s_1", tenant="a", psk_id="psk", grant=GRANT)
        await self.caller.call("s_1")

    async def check(self) -> None:
        await self.caller.saw_everything_once()
        assert self.caller.seen[-1].data["status"] == "completed"
        sealed = [event.data["data"] for event in self.caller.seen if event.name == "sealed"]
        assert sealed == [f"AA{n:02}" for n in range(1, 7)]
        assert self.worker.ran == [self.caller.task_id]
        session = self.world.session("s_1")
        assert (self.world.started, session.sealed_tasks) == (["s_1"], 1)
        assert list(session.grants) == ["psk"]


STORIES = [SessionStory, ProgramStory, SealedStory]


def to_its_end(world: World, story: Story) -> Story:
    """The story, and then an orderly end."""

    async def told() -> None:
        await story()
        await story.check()
        assert await world.engine.shut_down(60)
        assert world.machine.containers == {}
        assert world.folders.names() == ()
        assert world.broke == []

    return told


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("story", STORIES)
async def test_killed_at_any_decision(tmp_path: Path, story: type[Story], written: bool) -> None:
    """A service that is killed at whichever decision, before it is written or right behind that: the next one
    goes on, tasks run once, and their clients see each event once."""
    async with machine_world(tmp_path / "all") as world:
        death = Death(world)
        assert await live(world, to_its_end(world, story(world)), death)
    for at in range(1, death.count + 1):
        async with machine_world(tmp_path / str(at)) as world:
            telling = to_its_end(world, story(world))
            assert not await live(world, telling, Death(world, at, written))
            assert await live(world, telling)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("story", STORIES)
async def test_killed_at_any_event(tmp_path: Path, story: type[Story], written: bool) -> None:
    """The same, where it is killed as it writes an event down, its own or a worker's."""
    async with machine_world(tmp_path / "all") as world:
        death = Death(world)
        with mortal_histories(death):
            assert await live(world, to_its_end(world, story(world)))
    for at in range(1, death.count + 1):
        async with machine_world(tmp_path / str(at)) as world:
            telling = to_its_end(world, story(world))
            with mortal_histories(Death(world, at, written)):
                assert not await live(world, telling)
            assert await live(world, telling)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("story", STORIES)
async def test_killed_again_and_again(tmp_path: Path, story: type[Story], written: bool) -> None:
    """A service of which each life is only a little longer than the last comes to the end all the same."""
    async with machine_world(tmp_path) as world:
        telling = to_its_end(world, story(world))
        lives = 1
        while not await live(world, telling, Death(world, lives, written)):
            lives += 1
        assert lives > 4


# -- handed over ------------------------------------------------------------------------------------------


async def hand_over(world: World, *callers: Caller) -> None:
    """Hand over while these read: their streams end where they are, and nothing new is taken."""
    engine = world.engine
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for caller in callers:
            group.create_task(caller.call())
        for _ in range(3):
            await asyncio.sleep(0)
        engine.hand_over()
    assert [caller.ended for caller in callers] == [False] * len(callers)
    requests = (
        lambda: world.submit(),
        lambda: world.request("s_new"),
        lambda: engine.decide(ev.TaskCancelRequested(task_id=callers[0].task_id, tenant="a")),
        lambda: engine.decide(ev.KeepaliveRequested(session_id=callers[0].session_id, tenant="a")),
    )
    for request in requests:
        with pytest.raises(Refusal) as refused:
            request()
        assert (refused.value.code, refused.value.retry_after) == (RefusalCode.SHUTTING_DOWN, 1)


async def test_handed_over(tmp_path: Path) -> None:
    """A service that hands over leaves every container as it is; the next one takes up all that was under
    way, and clients read on."""
    async with machine_world(tmp_path, slots=slot_specs(3)) as world:
        working, loading, program, waiting = (Caller(world, tenant) for tenant in "abcd")
        world.remembers()

        async def first() -> None:
            await world.free()
            working.submit()
            await world.saw(working.task_id, "d3")
            world.health = {"status": "loading"}
            loading.submit()
            await world.until(lambda: world.session(loading.session_id).stage == "loading")
            program.submit(preset="exec")
            await world.until(lambda: program.session_id in world.started)
            waiting.submit()
            await hand_over(world, working, loading, program, waiting)
            assert "remove" not in {method for method, _ in world.runtime.calls}

        async def second() -> None:
            await asyncio.gather(*(caller.call() for caller in (working, loading, program)))
            world.engine.decide(ev.SessionKillRequested(session_id=loading.session_id, tenant="b"))
            await waiting.call()
            for caller in (working, loading, program, waiting):
                await caller.saw_everything_once()
                assert caller.seen[-1].data["status"] == "completed"

        assert await live(world, first)
        assert len(world.machine.containers) == 3
        world.health = {"status": "ready"}
        world.prepare = lambda worker: worker.released.set()
        for worker in world.workers.values():
            worker.health = {"status": "ready"}
            worker.released.set()
        world.machine.say(world.container(program.session_id), b"a line\n")
        world.machine.exit(world.container(program.session_id), 0)
        assert await live(world, second)
        sessions = [caller.session_id for caller in (working, loading, program, waiting)]
        assert world.started == sessions


async def test_what_ends_while_the_service_leaves(tmp_path: Path) -> None:
    """Between the handover and the end of the process things happen, and the next life knows of them."""
    async with machine_world(tmp_path) as world:
        caller = Caller(world, "a")
        world.remembers()

        async def first() -> None:
            caller.submit()
            await world.saw(caller.task_id, "d3")
            await hand_over(world, caller)
            world.workers[caller.session_id].released.set()
            await world.until(lambda: world.task(caller.task_id).ended)

        assert await live(world, first)
        assert not caller.ended
        assert await live(world, caller.call)
        assert caller.ended


# -- and when more is gone than the service ---------------------------------------------------------------


async def test_a_reboot(tmp_path: Path) -> None:
    """The machine's restart takes workers and RUN_DIR: what was live fails and says why, what has ended is
    known, and so are keys."""
    async with machine_world(tmp_path, slots=slot_specs(2)) as world:
        done, running, waiting = Caller(world, "a"), Caller(world, "b"), Caller(world, "c")
        world.on_task = echo

        async def first() -> None:
            await done.call()
            world.on_task = hold
            running.submit()
            await world.saw(running.task_id, "held")
            waiting.submit(preset="two")

        async def second() -> None:
            for caller, state in ((running, "failed"), (waiting, "failed")):
                session = world.session(caller.session_id)
                await world.until(lambda s=session: s.ended)
                assert (session.state, session.close_reason) == (state, "node_restarted")
                events = await world.events(caller.task_id)
                assert [event.name for event in events] == ["gap", "error", "task_finish"]
                assert events[-1].data["error"]["code"] == "node_restarted"
            assert world.task(done.task_id).state == "completed"
            assert world.engine.streams.get(done.task_id) is None
            for caller in (done, running):
                assert world.submit(tenant=caller.tenant, key=caller.key)[0] == caller.task_id
            await world.free()
            assert world.folders.names() == ()

        world.presets["two"] = PRESET.model_copy(update={"gpus": 2})
        assert await live(world, first)
        for playing in world.playing.values():
            playing.cancel()
        world.machine.containers.clear()
        shutil.rmtree(world.spool_root)
        shutil.rmtree(world.run_dir)
        world.boot_id = "another boot"
        assert await live(world, second)


async def test_a_lost_journal(tmp_path: Path) -> None:
    """Without its journal the service knows of nothing, and all that it finds is washed away."""
    async with machine_world(tmp_path) as world:
        world.on_task = hold

        async def first() -> None:
            task_id, _ = world.submit()
            await world.saw(task_id, "held")

        async def second() -> None:
            assert (world.engine.node.tasks, world.engine.node.sessions) == ({}, {})
            await world.free()
            assert world.machine.containers == {}
            assert world.folders.names() == ()
            assert world.spool.known() == set()

        assert await live(world, first)
        world.disk = MemoryJournal().disk
        assert await live(world, second)


async def test_a_lost_device(tmp_path: Path) -> None:
    """A session whose device is not there any more ends, its worker is removed, and the others go on."""
    async with machine_world(tmp_path, slots=slot_specs(2)) as world:
        world.remembers()
        callers = [Caller(world, "a"), Caller(world, "b")]

        async def first() -> None:
            await world.free()
            for caller in callers:
                caller.submit()
                await world.saw(caller.task_id, "d3")

        async def second() -> None:
            for worker in world.workers.values():
                worker.released.set()
            for caller in callers:
                await caller.call()
                await caller.saw_everything_once()
            assert callers[0].seen[-1].data["status"] == "completed"
            assert callers[1].seen[-1].data["error"]["code"] == "slot_lost"
            await world.until(lambda: world.session(callers[1].session_id).ended)
            assert list(world.machine.containers) == [world.container(callers[0].session_id)]

        assert await live(world, first)
        world.slots = slot_specs(1)
        assert await live(world, second)
