"""The engine and what it keeps: written before anybody learns of it, and no promise while it cannot be."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpu_server.core import events as ev
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.rows import Change, Table
from gpu_server.core.sessions import RequestKey, TaskState
from gpu_server.drivers import spool
from gpu_server.wash_steps import FIRST_RETRY_SECONDS
from tests.app.played_worker import Call, PlayedWorker, end, hold
from tests.app.reading import parse
from tests.app.world import PRESET, World, engine_life, engine_world, machine_world, slot_specs
from tests.fakes.journal import MemoryJournal

FULL = "database or disk is full"
KEY = RequestKey(name="k", fingerprint="f")


class WatchedJournal(MemoryJournal):
    """A journal that lets somebody look around at each write, and that can fail a few times."""

    def __init__(self) -> None:
        super().__init__()
        self.at_write: Callable[[list[Change]], None] = lambda changes: None
        self.fails = 0

    def write(self, changes: Iterable[Change]) -> None:
        changes = list(changes)
        self.at_write(changes)
        self.refuse = FULL if self.fails > 0 and (changes or self.failing) else None
        self.fails -= self.refuse is not None
        super().write(changes)


@contextmanager
def no_room() -> Iterator[None]:
    """RUN_DIR is full: what is written to the spool is written in part, and then fails."""

    def write(descriptor: int, content: bytes) -> None:
        os.write(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_write", write)
        yield


def is_refused(request: Callable[[], object]) -> None:
    """The request is refused since nothing can be kept, and may come again."""
    with pytest.raises(Refusal) as refused:
        request()
    assert refused.value.code is RefusalCode.STORAGE_FAILING
    assert refused.value.retry_after


def state_on_disk(world: World, task_id: str) -> str | None:
    """The task's state as another life would read it, or None where it would not know of it."""
    row = MemoryJournal(world.journal.disk).load()[Table.TASKS].get(task_id)
    return row and row["state"]


# -- the order --------------------------------------------------------------------------------------------


async def test_a_decision_is_written_before_anybody_learns_of_it(tmp_path: Path) -> None:
    """When a decision is written, what it tells is in the spool, no reader has seen it, and nothing that it
    starts has begun."""
    journal = WatchedJournal()
    async with engine_world(tmp_path, journal=journal) as world:
        seen: list[int] = []
        looks: list[tuple[str, int]] = []

        async def read(task_id: str) -> None:
            async for chunk in world.engine.streams.get(task_id).read():
                seen.extend(event.number for event in parse(chunk) if event.name not in ("progress", "queue"))

        def look(changes: list[Change]) -> None:
            for change in changes:
                if change.table is not Table.TASKS or change.row is None:
                    continue
                task = world.engine.node.tasks[change.id]
                kept = [record for record in world.spool.read_history(change.id) if record.own]
                assert kept[-1].told == task.told == change.row["told"]
                assert max(seen, default=0) <= kept[-1].last - 1
                if change.row["state"] == "queued" and task.told == 1:
                    assert world.spool.input(change.id) == b'{"metadata":{"prompt":"x"}}'
                    assert world.engine.attendants == {}
                if change.row["state"] == "running":
                    (worker,) = world.workers.values()
                    assert ("POST", f"/tasks/{change.id}") not in worker.calls
                looks.append((change.row["state"], task.told))

        journal.at_write = look
        task_id, _ = world.submit(prompt="x")
        reading = world.group.create_task(read(task_id))
        await world.events(task_id)
        await reading
        assert [state for state, _ in looks][:: len(looks) - 1] == ["queued", "completed"]
        assert len(looks) > 4
        assert seen == list(range(1, looks[-1][1] + 2))


async def test_one_decision_is_one_write(tmp_path: Path) -> None:
    """All rows of a decision are written together: whatever is read back, is a state that there was."""
    journal = WatchedJournal()
    async with engine_world(tmp_path, journal=journal) as world:
        writes: list[set[Table]] = []
        journal.at_write = lambda changes: writes.append({change.table for change in changes})
        world.submit()
        assert writes == [{Table.NODE, Table.SLOTS, Table.SESSIONS, Table.TASKS}]


# -- the journal cannot be written ------------------------------------------------------------------------


async def is_not_secured(world: World) -> None:
    """The slot's wash waits for the disk, and says so: its certificate may be forgotten."""
    await world.clock.until_slept_to(world.clock.now() + FIRST_RETRY_SECONDS)
    assert world.engine.node.slots["0"].state == "washing"
    assert world.engine.washing["0"].steps == ("disk",)
    assert FULL in (world.engine.washing["0"].reason or "")


async def test_a_task_that_could_not_be_written_is_withdrawn(tmp_path: Path) -> None:
    """A request that might be forgotten is refused, and what it made ends; its key may be used again."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        world.journal.refuse = FULL
        for number in (0, 1):
            is_refused(lambda: world.submit(key=KEY))
            assert len(world.engine.node.tasks) == 1, number  # the second one is not even tried
        assert world.engine.storage_doubt == FULL
        (task,), (session,) = world.engine.node.tasks.values(), world.engine.node.sessions.values()
        assert (task.state, task.failure.code) == ("failed", "storage_failing")
        await world.until(lambda: session.ended)
        await is_not_secured(world)
        assert world.machine.containers == {}
        assert world.spool.input(task.id) is None
        assert state_on_disk(world, task.id) is None
        world.journal.refuse = None
        again, _ = world.submit(key=KEY, prompt="again")
        assert again != task.id
        assert (await world.events(again))[-1].data["status"] == "completed"
        assert world.engine.storage_doubt is None
        assert state_on_disk(world, task.id) == "failed"


async def test_a_session_that_could_not_be_written_is_withdrawn(tmp_path: Path) -> None:
    """The same holds for a session that is asked for."""
    async with engine_world(tmp_path) as world:
        world.journal.refuse = FULL
        is_refused(lambda: world.request("s_1", key=KEY))
        await world.until(lambda: world.session("s_1").ended)
        await is_not_secured(world)
        is_refused(lambda: world.request("s_2", key=KEY))
        assert "s_2" not in world.engine.node.sessions
        world.journal.refuse = None
        assert world.request("s_3", key=KEY) == "s_3"
        assert world.session("s_3").state == "waiting"
        world.clock.advance(FIRST_RETRY_SECONDS)
        await world.ready("s_3")
        assert world.session("s_3").state == "ready"


async def test_a_task_of_a_session_is_withdrawn_alone(tmp_path: Path) -> None:
    """The session that it was for goes on, its worker has not seen it, and its place is free again."""
    async with engine_world(tmp_path) as world:
        first, session_id = world.submit()
        await world.events(first)
        world.workers[session_id].on_task = remembering = world.remembers()
        world.journal.refuse = FULL
        is_refused(lambda: world.submit(session_id))
        world.journal.refuse = None
        await world.until(lambda: world.session(session_id).state == "ready")
        world.workers[session_id].released.set()
        second, _ = world.submit(session_id)
        assert (await world.events(second))[-1].data["status"] == "completed"
        assert remembering.ran == [second]


async def test_what_is_withdrawn_stays_withdrawn(tmp_path: Path) -> None:
    """Also where the journal can be written again in the same moment: what has been ended was not granted."""
    journal = WatchedJournal()
    async with engine_world(tmp_path, journal=journal) as world:
        journal.fails = 1
        is_refused(world.submit)
        (task,) = world.engine.node.tasks.values()
        assert (task.state, state_on_disk(world, task.id)) == ("failed", "failed")
        await world.free()
        journal.fails = 1
        is_refused(lambda: world.request("s_9"))
        assert world.session("s_9").tearing_down


async def test_what_runs_goes_on(tmp_path: Path) -> None:
    """Tasks that were taken are served on while nothing can be written, and are written when it can be."""
    async with engine_world(tmp_path) as world:
        world.on_task = hold
        task_id, session_id = world.submit()
        await world.saw(task_id, "held")
        queued, _ = world.submit(session_id)
        world.journal.refuse = FULL
        world.workers[session_id].released.set()
        for taken in (task_id, queued):
            assert (await world.events(taken))[-1].data["status"] == "completed"
        assert [state_on_disk(world, taken) for taken in (task_id, queued)] == ["running", "queued"]
        await world.engine.tend_storage()
        assert world.engine.storage_doubt == FULL
        world.journal.refuse = None
        await world.engine.tend_storage()
        assert world.engine.storage_doubt is None
        assert [state_on_disk(world, taken) for taken in (task_id, queued)] == ["completed"] * 2
        assert world.broke == []


async def test_what_could_not_be_written_is_asked_for_again(tmp_path: Path) -> None:
    """A life that ends while nothing can be written leaves the next one an older state: what was told since
    is told as it is now, and no task runs twice."""
    async with machine_world(tmp_path) as world:
        remembering = world.remembers()
        async with engine_life(world):
            await world.free()
            task_id, session_id = world.submit()
            await world.saw(task_id, "d3")
            world.journal.refuse = FULL
            world.workers[session_id].released.set()
            await world.until(lambda: world.task(task_id).ended)
        async with engine_life(world):
            events = await world.events(task_id)
            assert [event.number for event in events] == list(range(1, len(events) + 1))
            assert events[-1].data["status"] == "completed"
            assert remembering.ran == [task_id]


# -- the spool cannot be written --------------------------------------------------------------------------


async def test_an_input_without_room(tmp_path: Path) -> None:
    """A task whose input cannot be kept is refused and leaves nothing; with room again it may come."""
    async with engine_world(tmp_path) as world:
        prompt = "x" * 10_000
        with no_room():
            is_refused(lambda: world.submit(prompt=prompt, key=KEY))
        assert (len(world.engine.streams), world.spool.known()) == (0, set())
        assert (world.engine.node.tasks, world.engine.node.sessions) == ({}, {})
        assert world.engine.storage_doubt is not None
        task_id, _ = world.submit(prompt=prompt, key=KEY)
        assert (await world.events(task_id))[-1].data["status"] == "completed"
        assert world.engine.storage_doubt is None


async def test_events_without_room(tmp_path: Path) -> None:
    """A stream that cannot be kept goes on for who reads it; that it may be lost is known."""
    async with engine_world(tmp_path) as world:
        world.remembers()
        task_id, session_id = world.submit()
        await world.saw(task_id, "d3")
        with no_room():
            world.workers[session_id].released.set()
            events = await world.events(task_id)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert events[-1].data["status"] == "completed"
        assert world.engine.storage_doubt is not None
        assert world.broke == []


async def test_doubt_ends_by_itself(tmp_path: Path) -> None:
    """A node that says it cannot keep anything is sent nothing, so it must find out itself that it can."""
    async with engine_world(tmp_path) as world:
        with no_room():
            is_refused(lambda: world.submit(prompt="x"))
            await world.engine.tend_storage()
            assert world.engine.storage_doubt is not None
        await world.engine.tend_storage()
        assert world.engine.storage_doubt is None
        assert os.listdir(world.spool_root) == [".secret"]


async def test_words_without_room(tmp_path: Path) -> None:
    """What a worker said about its end is told now, and lost with this life."""

    async def fail(worker: PlayedWorker, call: Call) -> None:
        await call.stream(end(1, "failed", error={"code": "too_hot", "message": "x" * 1000}))
        await call.done()

    async with engine_world(tmp_path) as world:
        world.on_task = fail
        task_id, session_id = world.submit()
        await world.until(lambda: session_id in world.started)
        with no_room():
            events = await world.events(task_id)
        assert events[-1].data["error"]["code"] == "too_hot"
        assert world.spool.note(task_id) is None
        assert world.broke == []


# -- tending ----------------------------------------------------------------------------------------------


async def test_checkpoints(tmp_path: Path) -> None:
    """The journal is tidied up when it asks for it, and not while it cannot be written."""
    async with engine_world(tmp_path) as world:
        await world.engine.tend_storage()
        assert world.journal.checkpoints == 0
        world.journal.wants_checkpoint = True
        world.journal.refuse = FULL
        world.engine.report(ev.SlotChecked(slot_id="0", fault="it smokes"))
        await world.engine.tend_storage()
        assert world.journal.checkpoints == 0
        world.journal.refuse = None
        for _ in range(3):
            await world.engine.tend_storage()
        assert world.journal.checkpoints == 1


# -- keys -------------------------------------------------------------------------------------------------


async def test_a_known_key_asks_for_nothing(tmp_path: Path) -> None:
    """What was made before is found again, whatever has become of presets, storage and service since."""
    async with engine_world(tmp_path) as world:
        task_id, session_id = world.submit(key=KEY)
        assert world.request("s_1", key=KEY) == "s_1"
        await world.events(task_id)
        world.presets.clear()
        world.journal.refuse = FULL
        world.engine.report(ev.SlotChecked(slot_id="0", fault="it smokes"))
        world.engine.hand_over()
        assert world.submit(preset=PRESET, key=KEY) == (task_id, session_id)
        assert world.request("s_2", key=KEY) == "s_1"
        other = RequestKey(name="k", fingerprint="g")
        for request in (lambda: world.submit(key=other), lambda: world.request("s_2", key=other)):
            with pytest.raises(Refusal) as refused:
                request()
            assert refused.value.code is RefusalCode.IDEMPOTENCY_MISMATCH
        assert len(world.engine.node.tasks) == 1


async def test_a_refused_request_has_not_used_its_key(tmp_path: Path) -> None:
    """The key of a request that was not granted is as new."""
    async with engine_world(tmp_path) as world:
        with pytest.raises(Refusal):
            world.submit("s_unknown", key=KEY)
        task_id, _ = world.submit(key=KEY)
        assert (await world.events(task_id))[-1].data["status"] == TaskState.COMPLETED


async def test_a_key_is_forgotten_with_its_task(tmp_path: Path) -> None:
    """After the retention the same key makes something new."""
    async with engine_world(tmp_path) as world:
        first, _ = world.submit(key=KEY)
        await world.events(first)
        world.clock.advance(world.rules.task_retention + 1)
        world.engine.report(ev.Tick())
        second, _ = world.submit(key=KEY)
        assert second != first
        await asyncio.sleep(0)
