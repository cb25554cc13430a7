"""Recovery: another life knows what the last one decided, has what it told, and nothing that it did not."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpu_server.core import events as ev
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.node import Node
from gpu_server.core.rows import WORDS_LOST, Change, RowsUnusable, Table
from gpu_server.core.sessions import RequestKey, Rules
from gpu_server.core.state import LIFE
from gpu_server.drivers.journal import SqliteJournal
from gpu_server.drivers.spool import Record, Spool
from gpu_server.engine import Engine
from gpu_server.frames import encode
from gpu_server.inputs import Inputs
from gpu_server.recovery import recover
from gpu_server.stream import Stream
from gpu_server.streams import Streams
from tests.app.played_worker import Call, PlayedWorker, end, frame, hold
from tests.app.reading import parse
from tests.app.world import EXEC, World, engine_life, machine_world, slot_specs
from tests.fakes.runtime import FakeScript

NOTHING_TO_READ = 0.05


# -- lives ------------------------------------------------------------------------------------------------


@contextmanager
def journal_in(root: Path) -> Iterator[SqliteJournal]:
    """The journal of STATE_DIR, closed behind the life that uses it."""
    (root / "state").mkdir(exist_ok=True)
    journal = SqliteJournal(root / "state" / "journal.db")
    journal.open()
    try:
        yield journal
    finally:
        journal.close()


@asynccontextmanager
async def life(world: World, *, washed: bool = False) -> AsyncIterator[Engine]:
    """A life of the service on a real journal. At the end all is left as it is."""
    with journal_in(world.root) as journal:
        async with engine_life(world, journal=journal) as engine:
            if washed:
                await world.free()
            yield engine


@dataclass
class Recovered:
    """What another life begins with."""

    node: Node
    streams: Streams
    inputs: Inputs
    spool: Spool
    rebooted: bool

    def stream(self, task_id: str) -> Stream:
        stream = self.streams.get(task_id)
        assert stream is not None
        return stream


def recovered(world: World, *, boot_id: str = "this boot", wall_offset: float = 0.0) -> Recovered:
    """Recover, and let nothing of it happen."""
    spool = Spool(world.spool_root)
    spool.open()
    node, inputs = Node(Rules(), judge=world.seal.judge), Inputs(spool)
    streams = Streams(max_bytes_each=1 << 20, max_bytes_total=1 << 24, spool=spool)
    with journal_in(world.root) as journal:
        rebooted = recover(
            node,
            journal=journal,
            spool=spool,
            streams=streams,
            inputs=inputs,
            boot_id=boot_id,
            wall_offset=wall_offset,
        )
    return Recovered(node, streams, inputs, spool, rebooted)


def rows_of(world: World) -> dict[Table, dict[str, Any]]:
    with journal_in(world.root) as journal:
        return journal.load()


def write_rows(world: World, *changes: Change) -> None:
    with journal_in(world.root) as journal:
        journal.write(changes)


async def told(stream: Stream, after: int = 0) -> bytes:
    """All that is there for a reader; the stream may go on."""
    raw = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(NOTHING_TO_READ):
            async for chunk in stream.read(after):
                raw += chunk
    return raw


async def fail(worker: PlayedWorker, call: Call) -> None:
    error = {"code": "too_hot", "message": "42 degrees in my secret kitchen"}
    await call.stream(frame(1, "text_delta", delta="x"), end(2, "failed", error=error))
    await call.done()


# -- what is there again ----------------------------------------------------------------------------------


async def test_the_first_life(tmp_path: Path) -> None:
    """Where nothing is kept there is nothing to take up, and no machine was restarted."""
    async with machine_world(tmp_path) as world:
        first = recovered(world, boot_id="")
        assert (first.rebooted, first.node.sessions, first.node.tasks) == (False, {}, {})


async def test_after_an_orderly_life(tmp_path: Path) -> None:
    """Sessions and tasks that have ended can be looked at and read, byte for byte."""
    async with machine_world(tmp_path) as world:
        async with life(world, washed=True) as engine:
            task_id, session_id = world.submit(prompt="hello")
            await world.events(task_id)
            assert await engine.shut_down(10)
            raw = await told(engine.streams.get(task_id))
            task, session = world.task(task_id), world.session(session_id)
        again = recovered(world)
        assert not again.rebooted
        assert list(again.node.live_sessions()) == []
        assert await told(again.stream(task_id)) == raw
        assert parse(raw)[-1].name == "task_finish"
        same = ("state", "failure", "told", "created_at", "started_at", "finished_at", "tenant")
        assert [getattr(again.node.tasks[task_id], name) for name in same] == [
            getattr(task, name) for name in same
        ]
        same = ("state", "close_reason", "tasks_done", "created_at", "closed_at", "fence", "container_id")
        assert [getattr(again.node.sessions[session_id], name) for name in same] == [
            getattr(session, name) for name in same
        ]


async def test_in_the_middle_of_everything(tmp_path: Path) -> None:
    """What runs, what is queued with its input, and what waits is there again, with the same numbers."""
    async with machine_world(tmp_path) as world:
        world.on_task = hold
        async with life(world, washed=True) as engine:
            running, session_id = world.submit(prompt="1")
            await world.saw(running, "held")
            queued, _ = world.submit(session_id, prompt="2")
            waiting, waits_in = world.submit(tenant="b", prompt="3")
            raw = await told(engine.streams.get(running))
            deadline = engine.node.next_deadline()
        again = recovered(world)
        tasks, sessions = again.node.tasks, again.node.sessions
        assert [tasks[t].state for t in (running, queued, waiting)] == ["running", "queued", "queued"]
        assert (sessions[session_id].state, sessions[waits_in].state) == ("working", "waiting")
        assert (list(sessions[session_id].busy), list(sessions[session_id].queue)) == ([running], [queued])
        assert [session.id for session in again.node.line] == [waits_in]
        assert again.node.slots["0"].holder == session_id
        assert again.node.next_deadline() >= deadline
        assert await told(again.stream(running)) == raw
        assert (again.stream(running).last_id, again.stream(running).worker_seq) == (6, 1)
        assert again.inputs.get(running) is None
        assert again.inputs.get(queued) == b'{"metadata":{"prompt":"2"}}'
        assert again.inputs.get(waiting) == b'{"metadata":{"prompt":"3"}}'


@pytest.mark.parametrize("behind", [0, 2])
async def test_events_that_no_decision_has_counted(tmp_path: Path, behind: int) -> None:
    """What the spool has of a decision that was never written was shown to nobody, and is not there: nor what
    came behind it. Its numbers are given out again."""
    async with machine_world(tmp_path) as world:
        world.on_task = hold
        async with life(world, washed=True) as engine:
            task_id, _ = world.submit()
            await world.saw(task_id, "held")
            stream = engine.streams.get(task_id)
            raw, last, count = await told(stream), stream.last_id, world.task(task_id).told
        history = Spool(world.spool_root).history(task_id, 1 << 20)
        for number in range(1 + behind):
            body = b"id: %d\n%b" % (last + 1 + number, encode("worker", {"status": "waiting"}))
            history.append(Record(number == 0, count + 1, last + 1 + number, last + 1 + number, body))
        history.close()
        again = recovered(world).stream(task_id)
        assert await told(again) == raw
        assert again.last_id == last
        again.publish("worker", {"status": "another"})
        (event,) = parse(await told(again, after=last))
        assert (event.number, event.data) == (last + 1, {"status": "another"})


async def test_what_belongs_to_nobody_is_dropped(tmp_path: Path) -> None:
    """Inputs, events and words of what nobody knows any more are not kept for ever; the others stay."""
    async with machine_world(tmp_path) as world:
        world.on_task = hold
        async with life(world, washed=True):
            running, session_id = world.submit()
            await world.saw(running, "held")
            queued, _ = world.submit(session_id)
        spool = Spool(world.spool_root)
        spool.put_input("t_gone", b"{}")
        spool.history("t_gone", 1 << 20).close()
        spool.put_note("s_gone", {"log_tail": "x"})
        assert spool.known() == {running, queued, "t_gone", "s_gone"}
        assert recovered(world).spool.known() == {running, queued}


async def test_an_input_that_outlived_its_task(tmp_path: Path) -> None:
    """A service that died right after a task's end may have left its input, which nobody needs."""
    async with machine_world(tmp_path) as world:
        async with life(world, washed=True):
            task_id, _ = world.submit()
            await world.events(task_id)
        Spool(world.spool_root).put_input(task_id, b"a prompt")
        again = recovered(world)
        assert again.inputs.get(task_id) is None
        assert parse(await told(again.stream(task_id)))[-1].name == "task_finish"


# -- the words of workers ---------------------------------------------------------------------------------


async def test_the_words_of_workers_are_put_back(tmp_path: Path) -> None:
    """Why a task failed, and what a worker wrote last, is told in its own words again."""
    async with machine_world(tmp_path, slots=slot_specs(2)) as world:
        async with life(world, washed=True):
            world.on_task = fail
            task_id, _ = world.submit()
            await world.events(task_id)
            _, session_id = world.submit(tenant="b")
            await world.ready(session_id)
            world.machine.say(world.container(session_id), b"Traceback\nout of luck\n")
            world.exit(session_id, 3)
            await world.until(lambda: world.session(session_id).ended)
            failures = (world.task(task_id).failure, world.session(session_id).failure)
        again = recovered(world)
        found = (again.node.tasks[task_id].failure, again.node.sessions[session_id].failure)
        assert found == failures
        assert found[0].message == "42 degrees in my secret kitchen"
        assert found[1].message == "the worker exited with code 3: out of luck"
        assert again.node.sessions[session_id].log_tail == "Traceback\nout of luck\n"

        shutil.rmtree(world.spool_root)
        lost = recovered(world)
        found = (lost.node.tasks[task_id].failure, lost.node.sessions[session_id].failure)
        assert [failure.code for failure in found] == ["too_hot", "worker_exited"]
        assert [failure.message for failure in found] == [WORDS_LOST] * 2
        assert lost.node.sessions[session_id].log_tail == ""
        assert lost.streams.get(task_id) is None


# -- a restart of the machine -----------------------------------------------------------------------------


async def test_a_reboot_moves_times(tmp_path: Path) -> None:
    """The machine's clock begins anew: every moment stays the same moment of the day. That is written down,
    so that yet another life finds it so."""
    async with machine_world(tmp_path, rules=Rules(task_retention=600)) as world:
        world.wall_offset = 1_000_000.0
        world.on_task = hold
        async with life(world, washed=True):
            world.prepare = lambda worker: worker.released.set()
            ended, session_id = world.submit()
            await world.events(ended)
            world.workers[session_id].released.clear()
            running, _ = world.submit(session_id, timeout=50)
            await world.saw(running, "held")
            before = world.journal.load()
        world_now = 1_000_000.0 + world.clock.now()
        for boot, rebooted in (("another boot", True), ("another boot", False)):
            again = recovered(world, boot_id=boot, wall_offset=world_now - 5.0)  # 5 s after the boot
            assert again.rebooted is rebooted
            moved = 5.0 - world.clock.now()
            assert again.node.tasks[ended].finished_at == world.clock.now() + moved == 5.0
            after = rows_of(world)
            for table, name in ((Table.TASKS, ended), (Table.TASKS, running), (Table.SESSIONS, session_id)):
                old, new = before[table][name], after[table][name]
                assert new["created_at"] == old["created_at"] + moved
                assert new["alarms"] == {alarm: when + moved for alarm, when in old["alarms"].items()}
                assert new["alarms"]
            assert after[Table.NODE][LIFE] == {"boot_id": "another boot", "wall_offset": world_now - 5.0}


async def test_a_boot_without_a_name(tmp_path: Path) -> None:
    """Where the kernel gives its boots no names each start counts as one: nothing is taken for running."""
    async with machine_world(tmp_path) as world:
        async with life(world, washed=True):
            pass
        assert not recovered(world).rebooted
        assert recovered(world, boot_id="").rebooted
        assert recovered(world, boot_id="").rebooted
        assert recovered(world).rebooted


async def test_words_are_not_written_down_by_a_reboot(tmp_path: Path) -> None:
    """What is written anew is what was written before: without the words of workers."""
    async with machine_world(tmp_path) as world:
        world.on_task = fail
        async with life(world, washed=True):
            task_id, _ = world.submit()
            await world.events(task_id)
        again = recovered(world, boot_id="another boot", wall_offset=7.0)
        assert "kitchen" in again.node.tasks[task_id].failure.message
        assert "kitchen" not in str(rows_of(world))


# -- keys -------------------------------------------------------------------------------------------------


async def test_keys_survive_what_they_were_hashed_with(tmp_path: Path) -> None:
    """A key still leads to its task. Once the secret is lost no body can be compared any more, in this life
    and in all to come: nothing is done twice."""
    first, other = RequestKey(name="k", fingerprint="f1"), RequestKey(name="k", fingerprint="f2")
    async with machine_world(tmp_path) as world:
        async with life(world, washed=True):
            task_id, _ = world.submit(key=first)
            await world.events(task_id)
            world.request("s_asked", key=first)
        async with life(world):
            assert world.submit(key=first)[0] == task_id
            with pytest.raises(Refusal) as refused:
                world.submit(key=other)
            assert refused.value.code is RefusalCode.IDEMPOTENCY_MISMATCH
        shutil.rmtree(world.spool_root)
        for _ in range(2):
            async with life(world):
                for key in (first, other):
                    assert world.submit(key=key)[0] == task_id
                    assert world.request("s_another", key=key) == "s_asked"


# -- rows that cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"session_id": "s_none", "state": "running"},
        {"session_id": ["s_none"], "alarms": {}},
    ],
)
async def test_rows_that_do_not_fit(tmp_path: Path, row: dict[str, Any]) -> None:
    """Rows that are not a state of this program are refused, and stay as they are."""
    async with machine_world(tmp_path) as world:
        async with life(world, washed=True):
            task_id, _ = world.submit()
            await world.events(task_id)
        good = rows_of(world)[Table.TASKS][task_id]
        odd = {**good, **row} if row else row
        write_rows(world, Change(table=Table.TASKS, id=task_id, row=odd))
        before = rows_of(world)
        with pytest.raises(RowsUnusable):
            recovered(world, boot_id="another boot", wall_offset=7.0)
        assert rows_of(world) == before


# -- secrets ----------------------------------------------------------------------------------------------

CANARY = "the-canary-"


async def test_nothing_that_was_said_is_on_the_disk(tmp_path: Path) -> None:
    """No byte of STATE_DIR is of a prompt, an output, a worker's message or its log, in whichever way they
    came to an end; what is looked for can be found, since the ids of tasks are."""
    error = {"code": "refused", "message": CANARY + "message"}
    async with machine_world(tmp_path, slots=slot_specs(8)) as world:
        world.machine.images["talks"] = FakeScript()
        ids: list[str] = []

        async def says(worker: PlayedWorker, call: Call) -> None:
            assert CANARY.encode() in call.body
            await call.stream(frame(1, "text_delta", delta=CANARY + "output"))
            await call.send(end(2, "failed", error=error, usage={"note": CANARY + "usage"}))
            await call.done()

        async def breaks(worker: PlayedWorker, call: Call) -> None:
            await call.stream(b"event: " + CANARY.encode() + b"\n\n")

        async with life(world, washed=True) as engine:
            for script in (says, breaks, hold):
                world.prepare = lambda worker, script=script: setattr(worker, "on_task", script)
                task_id, session_id = world.submit(prompt=CANARY + "prompt")
                ids += [task_id, session_id]
                if script is not hold:
                    await world.events(task_id)
                await world.until(lambda s=session_id: s in world.started)
                if script is says:
                    world.machine.say(world.container(session_id), CANARY.encode() + b"log\n")
                    world.exit(session_id)
                    await world.until(lambda s=session_id: world.session(s).ended)
            ids.append(world.submit(session_id, prompt=CANARY + "queued")[0])

            world.health = {"status": "failed", "message": CANARY + "health"}
            task_id, session_id = world.submit(prompt=CANARY + "prompt")
            await world.events(task_id)

            task_id, session_id = world.submit(preset=EXEC, prompt=CANARY + "prompt")
            await world.until(lambda: session_id in world.started)
            world.machine.say(world.container(session_id), CANARY.encode() + b"out\n")
            world.machine.say(world.container(session_id), CANARY.encode() + b"err\n", "stderr")
            world.machine.exit(world.container(session_id), 5)
            assert CANARY in (await world.events(task_id))[-1].data["error"]["message"]
            await world.until(lambda: world.session(session_id).ended)
            ids += [task_id, session_id]

            while_open = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
            assert {"journal.db", "journal.db-wal", "journal.db-shm"} <= set(while_open)
            engine.report(ev.Tick())
        recovered(world, boot_id="another boot", wall_offset=7.0)
        at_the_end = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
        for content in (while_open, at_the_end):
            everything = b"".join(content.values())
            assert CANARY.encode() not in everything
            for known in ids:
                assert known.encode() in everything
        spooled = b"".join(path.read_bytes() for path in world.spool_root.iterdir())
        assert CANARY.encode() in spooled
