"""The reaper: deadlines are kept, and what nobody reports is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpu_server import attendant
from gpu_server.core import events as ev
from gpu_server.core.sessions import Rules
from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.residue import Residue
from gpu_server.ports import Dirty, RuntimeUnreachable, SlotReading, WashUnreachable
from gpu_server.reaper import FOLDER_CHECK_SECONDS, PING_SECONDS, RECONCILE_EVERY, Reaper
from tests.app.played_worker import hold
from tests.app.world import World, engine_world, slot_specs
from tests.worker_specs import TEST_UID, worker_spec


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that vanished has left nobody who closes its output: that is not waited for."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 0.05)


class Inventory:
    """Devices that say what the test wants."""

    def __init__(self, specs: tuple[SlotSpec, ...]) -> None:
        self.specs, self.reads = specs, 0
        self.faults: dict[str, str] = {}
        self.lost: set[str] = set()

    async def discover(self) -> tuple[SlotSpec, ...]:
        return self.specs

    async def readings(self) -> Mapping[str, SlotReading]:
        self.reads += 1
        return {
            spec.id: SlotReading(memory_used_mb=7, fault=self.faults.get(spec.id))
            for spec in self.specs
            if spec.id not in self.lost
        }


@asynccontextmanager
async def reaped(
    tmp_path: Path, *, slots: tuple[SlotSpec, ...] = slot_specs(2), rules: Rules | None = None
) -> AsyncIterator[tuple[World, Reaper, Inventory]]:
    """A world with a reaper whose loops the test starts itself."""
    inventory = Inventory(slots)
    async with engine_world(tmp_path, slots=slots, rules=rules) as world:
        reaper = Reaper(world.engine, inventory, reading_interval=10.0)
        decided = world.engine.on_decided

        def both() -> None:
            decided()
            world.decided()

        world.engine.on_decided = both
        yield world, reaper, inventory


async def test_ticks_at_deadlines(tmp_path: Path) -> None:
    """A deadline is acted on when it comes, and not before."""
    async with reaped(tmp_path, rules=Rules(idle_timeout=50)) as (world, reaper, _):
        world.engine.spawn("ticks", reaper.ticks())
        task_id, session_id = world.submit()
        await world.events(task_id)
        idle = world.session(session_id).idle_deadline
        assert idle == world.clock.now() + 50
        world.clock.advance(49.9)
        await world.clock.until_slept_to(idle)
        assert world.session(session_id).state == "ready"
        world.clock.advance(0.2)
        await world.until(lambda: world.session(session_id).ended)
        assert world.session(session_id).close_reason == "idle_timeout"


async def test_wakes_for_an_earlier_deadline(tmp_path: Path) -> None:
    """A decision that sets an earlier deadline than the one slept to is not slept through."""
    async with reaped(tmp_path) as (world, reaper, _):
        world.engine.spawn("ticks", reaper.ticks())
        await world.clock.until_slept_to(None)
        world.on_task = hold
        first, session_id = world.submit(timeout=80)
        await world.saw(first, "held")
        await world.until(lambda: world.session(session_id).state == "working")
        second, _ = world.submit(timeout=3)
        await world.saw(second, "held")
        deadline = world.clock.now() + 3
        assert world.engine.node.next_deadline() == deadline
        await world.clock.until_slept_to(deadline)
        world.clock.advance(3)
        assert (await world.events(second))[-1].data["status"] == "timeout"
        assert world.task(first).state == "running"


async def test_ticks_end_with_a_broken_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in a deadline's decision is told once and does not spin."""
    async with reaped(tmp_path) as (world, reaper, _):
        monkeypatch.setattr(world.engine.node, "next_deadline", lambda: 0.0)

        def crash(event: ev.Event, now: float) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(world.engine.node, "handle", crash)
        await asyncio.wait([world.engine.spawn("ticks", reaper.ticks())], timeout=10)
        assert len(world.broke) == 1


async def rounds(world: World, count: int) -> None:
    """Let `count` rounds pass."""
    for _ in range(count):
        when = world.clock.now() + FOLDER_CHECK_SECONDS
        await world.clock.until_slept_to(when)
        world.clock.advance(FOLDER_CHECK_SECONDS)
    await world.clock.until_slept_to(world.clock.now() + FOLDER_CHECK_SECONDS)


async def test_rounds(tmp_path: Path) -> None:
    """Folders are looked at every round, devices and containers in longer intervals."""
    async with reaped(tmp_path) as (world, reaper, inventory):
        task_id, session_id = world.submit()
        await world.events(task_id)
        world.runtime.calls.clear()
        world.engine.spawn("rounds", reaper.rounds())
        await rounds(world, RECONCILE_EVERY - 2)
        assert inventory.reads == 1 + int((RECONCILE_EVERY - 2) * FOLDER_CHECK_SECONDS / 10)
        assert ("list_workers", "") not in world.runtime.calls
        await rounds(world, 1)
        assert world.runtime.calls.count(("list_workers", "")) == 2
        (world.run_dir / session_id / "share" / "big").write_bytes(b"x" * (2 << 20))
        await rounds(world, 1)
        await world.until(lambda: world.session(session_id).ended)
        failure = world.session(session_id).failure
        assert failure is not None
        assert failure.code == "run_folder_fault"


async def test_a_vanished_container(tmp_path: Path) -> None:
    """A worker that is gone without a word is heard as an exit."""
    async with reaped(tmp_path) as (world, reaper, _):
        task_id, session_id = world.submit()
        await world.events(task_id)
        await reaper.reconcile()
        assert world.session(session_id).state == "ready"
        del world.machine.containers[world.container(session_id)]
        world.playing[session_id].cancel()
        await reaper.reconcile()
        await world.until(lambda: world.session(session_id).ended)
        assert world.session(session_id).close_reason == "worker_exited"
        assert len(world.told(ev.WorkerLost)) == 1


async def test_a_start_is_not_mistaken_for_a_vanished_container(tmp_path: Path) -> None:
    """A session whose container is being made has not lost it, and what it has is not residue."""
    async with reaped(tmp_path) as (world, reaper, _):
        gate = world.runtime.gates["create"] = asyncio.Event()
        task_id, session_id = world.submit()
        await world.until(lambda: world.session(session_id).stage == "container")
        await reaper.reconcile()
        gate.set()
        assert (await world.events(task_id))[-1].data["status"] == "completed"


async def test_an_orphan(tmp_path: Path) -> None:
    """A container and a folder that belong to no session are removed; live ones are left."""
    async with reaped(tmp_path) as (world, reaper, _):
        task_id, session_id = world.submit()
        await world.events(task_id)
        folder = world.folders.create("s_orphan", TEST_UID, None)
        await world.runtime.create(worker_spec(folder, image=next(iter(world.machine.images))))
        await reaper.reconcile()
        assert list(world.machine.containers) == [world.container(session_id)]
        assert world.folders.names() == (session_id,)


async def test_reconciling_without_an_engine(tmp_path: Path) -> None:
    """While the runtime cannot be reached nothing is concluded."""
    async with reaped(tmp_path) as (world, reaper, _):
        task_id, session_id = world.submit()
        await world.events(task_id)
        world.runtime.unreachable = True
        await reaper.reconcile()
        await reaper.read_devices()
        assert world.session(session_id).state == "ready"
        world.runtime.unreachable = False


@pytest.mark.parametrize(
    "error", [Dirty("1 still there"), WashUnreachable("no answer"), OSError(5, "I/O error")]
)
async def test_residue_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What cannot be removed now is tried again the next time, and costs nobody anything until then."""
    async with reaped(tmp_path) as (world, reaper, _):

        async def clean(*_: object) -> None:
            raise error

        monkeypatch.setattr(Residue, "clean", clean)
        await reaper.reconcile()
        assert world.broke == []


async def test_rounds_tend_the_storage(tmp_path: Path) -> None:
    """What could not be written is tried again each round, and the journal is tidied up when it asks."""
    async with reaped(tmp_path) as (world, reaper, _):
        journal = world.journal
        journal.refuse = "disk full"
        world.engine.report(ev.SlotChecked(slot_id="0", fault="it smokes"))
        world.engine.spawn("rounds", reaper.rounds())
        await rounds(world, 1)
        assert world.engine.storage_doubt == "disk full"
        journal.refuse = None
        await rounds(world, 1)
        assert world.engine.storage_doubt is None
        journal.wants_checkpoint = True
        await rounds(world, 2)
        assert journal.checkpoints == 1


async def test_faults_come_and_go(tmp_path: Path) -> None:
    """A device's fault quarantines a free slot at once; of a leased one it is noted, and forgotten again."""
    async with reaped(tmp_path, slots=slot_specs(3, gpu=True)) as (world, reaper, inventory):
        task_id, session_id = world.submit()
        await world.events(task_id)
        slots = world.engine.node.slots
        await reaper.read_devices()
        assert world.engine.readings["0"].memory_used_mb == 7
        assert [slot.fault for slot in slots] == [None] * 3
        inventory.faults = {"0": "2 uncorrected ECC errors", "1": "2 uncorrected ECC errors"}
        inventory.lost = {"2"}
        await reaper.read_devices()
        assert (slots["0"].state, slots["0"].fault) == ("leased", "2 uncorrected ECC errors")
        assert (slots["1"].state, slots["2"].state) == ("quarantined", "free")
        assert slots["2"].doubt == "the device is not listed any more"
        inventory.faults, inventory.lost = {}, set()
        checks = len(world.told(ev.SlotChecked))
        await reaper.read_devices()
        await reaper.read_devices()
        assert (slots["0"].fault, slots["2"].doubt) == (None, None)
        assert len(world.told(ev.SlotChecked)) == checks + 2
        assert slots["1"].state == "quarantined"
        assert world.session(session_id).state == "ready"


async def test_a_foreign_holder(tmp_path: Path) -> None:
    """A GPU that someone else uses is at fault while they do, and the slot is not leased."""
    gpus = slot_specs(2, gpu=True)
    async with reaped(tmp_path, slots=gpus) as (world, reaper, _):
        task_id, _ = world.submit()
        await world.events(task_id)
        slots = world.engine.node.slots
        world.machine.holders = {gpu.uuid: "somebody" for gpu in gpus}
        await reaper.read_devices()
        assert slots["0"].fault == "in use by a container that is not ours: somebody"
        assert slots["1"].state == "quarantined"
        world.machine.holders = {}
        await reaper.read_devices()
        assert slots["0"].fault is None


async def test_stand_ins_ask_for_no_holders(tmp_path: Path) -> None:
    """A node without a GPU does not ask who uses GPUs."""
    async with reaped(tmp_path) as (world, reaper, _):
        world.runtime.wrong["foreign_gpu_holders"] = RuntimeUnreachable("not asked")
        await reaper.read_devices()
        assert "foreign_gpu_holders" not in {method for method, _ in world.runtime.calls}


# -- the runtime itself -----------------------------------------------------------------------------------


@asynccontextmanager
async def watched(tmp_path: Path) -> AsyncIterator[tuple[World, Callable[[], Awaitable[None]]]]:
    """A world whose runtime is watched, and what lets the next ping be over."""
    async with reaped(tmp_path) as (world, reaper, _):

        async def pinged() -> None:
            world.clock.advance(PING_SECONDS)
            await world.clock.until_slept_to(world.clock.now() + PING_SECONDS)

        watching = world.engine.spawn("runtime", reaper.watch_runtime())
        await world.clock.until_slept_to(world.clock.now() + PING_SECONDS)
        yield world, pinged
        watching.cancel()


def calls(world: World, *methods: str) -> list[str]:
    return [method for method, _ in world.runtime.calls if method in methods]


async def test_doubt_is_told_once_and_taken_back(tmp_path: Path) -> None:
    """A runtime that does not answer is in doubt until it answers; then it is looked what has happened
    meanwhile."""
    async with watched(tmp_path) as (world, pinged):
        assert world.told(ev.RuntimeChecked) == []
        world.runtime.wrong["ping"] = RuntimeUnreachable("no answer")
        for _ in range(3):
            await pinged()
        told = "the container runtime does not answer: no answer"
        assert world.told(ev.RuntimeChecked) == [ev.RuntimeChecked(doubt=told)]
        assert world.engine.node.runtime_doubt == told
        looked = len(calls(world, "list_workers"))
        del world.runtime.wrong["ping"]
        for _ in range(3):
            await pinged()
        assert world.told(ev.RuntimeChecked)[1:] == [ev.RuntimeChecked(doubt=None)]
        assert world.engine.node.runtime_doubt is None
        assert len(calls(world, "list_workers")) > looked


async def test_a_runtime_that_hangs(tmp_path: Path) -> None:
    """A runtime that gives no answer at all is as good as away."""
    async with reaped(tmp_path) as (world, reaper, _):
        world.runtime.gates["ping"] = asyncio.Event()
        ping = world.runtime.ping
        world.runtime.ping = lambda: ping(0.01)
        world.engine.spawn("runtime", reaper.watch_runtime())
        await world.until(lambda: world.engine.node.runtime_doubt)


async def test_nobody_is_started_without_a_runtime(tmp_path: Path) -> None:
    """Who comes meanwhile waits in line, though slots are free, and starts when the runtime answers again;
    who has a worker is served on."""
    async with watched(tmp_path) as (world, pinged):
        first, session_id = world.submit()
        await world.events(first)
        world.runtime.wrong["ping"] = RuntimeUnreachable("no answer")
        await pinged()
        served, _ = world.submit(session_id)
        assert (await world.events(served))[-1].data["status"] == "completed"
        waiting, waits_in = world.submit(tenant="b")
        assert world.session(waits_in).state == "waiting"
        assert world.started == [session_id]
        del world.runtime.wrong["ping"]
        await pinged()
        assert (await world.events(waiting))[-1].data["status"] == "completed"
        assert world.started == [session_id, waits_in]


async def test_what_happened_while_the_runtime_was_away(tmp_path: Path) -> None:
    """A worker that is gone when the runtime answers again is found out at once."""
    async with watched(tmp_path) as (world, pinged):
        task_id, session_id = world.submit()
        await world.events(task_id)
        world.runtime.wrong["ping"] = RuntimeUnreachable("no answer")
        await pinged()
        del world.machine.containers[world.container(session_id)]
        world.playing[session_id].cancel()
        del world.runtime.wrong["ping"]
        world.clock.advance(PING_SECONDS)
        await world.until(lambda: world.session(session_id).ended)
        assert world.session(session_id).close_reason == "worker_exited"
