"""The car wash: no certificate without proof, patience with what cannot be reached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_server.carwash import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS, CarWash, worker_name
from gpu_server.core import events as ev
from gpu_server.core.effects import WashSlots
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import RuntimeUnreachable
from tests.app.world import IMAGE, slot_specs
from tests.fakes.clock import FakeClock
from tests.fakes.runtime import FakeEngine, FakeRuntime, FakeScript
from tests.worker_specs import TEST_UID, worker_spec

GPUS = slot_specs(2, gpu=True)


class Laundry:
    """A car wash and what it works on."""

    def __init__(self, root: Path, give_up: float = 60.0) -> None:
        self.machine = FakeEngine(images={IMAGE: FakeScript()})
        self.runtime, self.clock, self.folders = FakeRuntime(self.machine), FakeClock(), RunFolders(root)
        self.serving: dict[str, str] = {}
        self.wash = CarWash(
            self.runtime, self.folders, self.clock, give_up=give_up, served_by=self.serving.get
        )
        self.wash.swept = True

    async def worker(self, session_id: str, fence: int = 1, *, runtime: FakeRuntime | None = None) -> str:
        """A running worker with its folder; its container's name."""
        folder = self.folders.create(session_id, TEST_UID, None)
        name = worker_name(session_id, fence)
        runtime = runtime or self.runtime
        await runtime.create(replace(worker_spec(folder, image=IMAGE), name=name))
        await runtime.start(name)
        return name

    def order(self, session_id: str | None = "s_1", fence: int = 1) -> WashSlots:
        return WashSlots(
            session_id=session_id, fence=fence, slot_ids=tuple(slot.id for slot in GPUS), grace=10.0
        )

    def run(self, order: WashSlots) -> AsyncIterator[ev.Event]:
        return self.wash.run(order, GPUS)


@pytest.fixture
def laundry(tmp_path: Path) -> Laundry:
    return Laundry(tmp_path / "run")


async def outcomes(run: AsyncIterator[ev.Event]) -> list[tuple[str, Any]]:
    """What a wash yielded: kinds, with the slot or slots concerned."""
    found: list[tuple[str, Any]] = []
    async for event in run:
        match event:
            case ev.WashPassed(certificate=certificate):
                found.append(("passed", certificate.slot_id))
            case ev.WashFailed(slot_ids=slot_ids):
                found.append(("failed", slot_ids))
            case ev.ContainerGone():
                found.append(("gone", event.session_id))
    return found


async def test_certificates(laundry: Laundry) -> None:
    """A wash takes down container and folder, then certifies each slot by device and fence."""
    await laundry.worker("s_1", 7)
    events = [event async for event in laundry.run(laundry.order(fence=7))]
    assert laundry.machine.containers == {}
    assert laundry.folders.names() == ()
    assert events[0] == ev.ContainerGone(session_id="s_1")
    certificates = [event.certificate for event in events[1:] if isinstance(event, ev.WashPassed)]
    assert [(c.kind, c.slot_id, c.slot_uuid, c.fence) for c in certificates] == [
        ("teardown", slot.id, slot.uuid, 7) for slot in GPUS
    ]


async def test_the_order(laundry: Laundry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container is gone before its folder is touched, and both before anything is certified."""
    await laundry.worker("s_1")
    steps: list[str] = []
    remove_folder = laundry.folders.remove

    def remove(session_id: str) -> None:
        steps.append(f"folder, containers {len(laundry.machine.containers)}")
        remove_folder(session_id)

    monkeypatch.setattr(laundry.folders, "remove", remove)
    async for event in laundry.run(laundry.order()):
        steps.append(f"{type(event).__name__}, folders {len(laundry.folders.names())}")
    calls = [method for method, _ in laundry.runtime.calls]
    assert calls[-2:] == ["remove", "foreign_gpu_holders"]
    assert steps == ["folder, containers 0", "ContainerGone, folders 0", *["WashPassed, folders 0"] * 2]


async def test_only_this_lease_is_taken_down(laundry: Laundry) -> None:
    """A wash removes the container of its own fence and no other session's."""
    other = await laundry.worker("s_2")
    assert ("gone", "s_1") in await outcomes(laundry.run(laundry.order()))
    assert list(laundry.machine.containers) == [other]
    assert laundry.folders.names() == ("s_2",)


async def unreachable(laundry: Laundry) -> None:
    laundry.runtime.unreachable = True


async def folder_stuck(laundry: Laundry) -> None:
    def remove(session_id: str) -> None:
        raise OSError(16, "Device or resource busy")

    laundry.folders.remove = remove


async def holders_unknown(laundry: Laundry) -> None:
    laundry.runtime.wrong["foreign_gpu_holders"] = RuntimeUnreachable("no answer")


async def collect(run: AsyncIterator[ev.Event], into: list[ev.Event]) -> None:
    async for event in run:
        into.append(event)


@pytest.mark.parametrize("trouble", [unreachable, folder_stuck, holders_unknown])
async def test_giving_up(laundry: Laundry, trouble: Callable[[Laundry], Awaitable[None]]) -> None:
    """What cannot be reached is tried again with growing pauses, and only then locked away: no certificate
    without proof."""
    await laundry.worker("s_1")
    await trouble(laundry)
    events: list[ev.Event] = []
    async with asyncio.TaskGroup() as group:
        washing = group.create_task(collect(laundry.run(laundry.order()), events))
        pauses, began = [], laundry.clock.now()
        while not washing.done():
            when = await next_sleep(laundry.clock, washing)
            if when is None:
                break
            pauses.append(when - laundry.clock.now())
            assert not any(isinstance(event, ev.WashPassed | ev.WashFailed) for event in events)
            laundry.clock.advance(pauses[-1])
    assert pauses[0] == pytest.approx(FIRST_RETRY_SECONDS)
    assert pauses[1] == pytest.approx(2 * FIRST_RETRY_SECONDS)
    assert max(pauses) == pytest.approx(LAST_RETRY_SECONDS)
    assert 60 <= laundry.clock.now() - began <= 60 + LAST_RETRY_SECONDS
    assert isinstance(events[-1], ev.WashFailed)
    assert events[-1].slot_ids == ("0", "1")
    assert "could not be washed within 60 s" in events[-1].reason
    gone = [event for event in events if isinstance(event, ev.ContainerGone)]
    assert len(gone) == (trouble is holders_unknown)
    assert not any(isinstance(event, ev.WashPassed) for event in events)


async def next_sleep(clock: FakeClock, washing: asyncio.Task[None]) -> float | None:
    """What the wash sleeps to, or None when it is done."""
    async with asyncio.timeout(30):
        while not clock.slept_to and not washing.done():  # noqa: ASYNC110 (either of two, and soon)
            await asyncio.sleep(0)
    return clock.slept_to[0] if clock.slept_to else None


async def test_trouble_that_passes(laundry: Laundry) -> None:
    """A wash goes on where it was when the engine answers again, and tells of the container's end once."""
    await laundry.worker("s_1")
    await holders_unknown(laundry)
    events: list[ev.Event] = []
    async with asyncio.TaskGroup() as group:
        washing = group.create_task(collect(laundry.run(laundry.order()), events))
        for _ in range(3):
            when = await next_sleep(laundry.clock, washing)
            assert when is not None
            laundry.clock.advance(when - laundry.clock.now())
        laundry.runtime.wrong.clear()
        when = await next_sleep(laundry.clock, washing)
        laundry.clock.advance(10)
    assert [type(event) for event in events] == [ev.ContainerGone, ev.WashPassed, ev.WashPassed]
    assert [method for method, _ in laundry.runtime.calls].count("remove") == 1


async def test_a_foreign_holder(laundry: Laundry) -> None:
    """A container that is not ours quarantines the slot whose GPU it has, and no other; it is left alone."""
    laundry.machine.holders[GPUS[1].uuid] = "somebody/notebook (abc123)"
    events = [event async for event in laundry.run(laundry.order())]
    assert [type(event) for event in events] == [ev.ContainerGone, ev.WashPassed, ev.WashFailed]
    failed = events[2]
    assert isinstance(failed, ev.WashFailed)
    assert failed.slot_ids == ("1",)
    assert "somebody/notebook" in failed.reason


async def test_a_foreign_holder_of_all(laundry: Laundry) -> None:
    """A foreign container that was given every GPU quarantines every slot."""
    laundry.machine.holders["all"] = "somebody"
    assert await outcomes(laundry.run(laundry.order())) == [
        ("gone", "s_1"),
        ("failed", ("0",)),
        ("failed", ("1",)),
    ]


async def test_stand_ins_have_no_holders(laundry: Laundry) -> None:
    """Slots without a GPU do not ask who holds GPUs."""
    laundry.machine.holders["all"] = "somebody"
    slots = slot_specs(1)
    order = WashSlots(session_id="s_1", fence=1, slot_ids=("0",), grace=0.0)
    assert await outcomes(laundry.wash.run(order, slots)) == [("gone", "s_1"), ("passed", "0")]
    assert "foreign_gpu_holders" not in {method for method, _ in laundry.runtime.calls}


async def test_residue(laundry: Laundry) -> None:
    """The wash at start removes the containers and folders of a former life, leaves live sessions and other
    instances alone, and certifies."""
    await laundry.worker("s_old", 3)
    laundry.folders.create("s_older", TEST_UID, None)
    live = await laundry.worker("s_live", 4)
    laundry.serving["s_live"] = live
    elsewhere = Laundry(laundry.folders._root.parent / "other")
    theirs = await elsewhere.worker("s_theirs", runtime=FakeRuntime(laundry.machine, instance="other"))
    found = await outcomes(laundry.run(laundry.order(None, 0)))
    assert found == [("passed", "0"), ("passed", "1")]
    assert set(laundry.machine.containers) == {live, theirs}
    assert laundry.folders.names() == ("s_live",)


async def test_a_former_container_of_a_session_that_has_another(laundry: Laundry) -> None:
    """Only the container that serves a session now is its own: one of an earlier lease is residue. The folder
    is the session's, whichever container uses it."""
    old = await laundry.worker("s_1", 3)
    now = await laundry.worker("s_1", 4)
    laundry.serving["s_1"] = now
    assert set(laundry.machine.containers) == {old, now}
    assert await laundry.wash.remove_residue() == 1
    assert set(laundry.machine.containers) == {now}
    assert laundry.folders.names() == ("s_1",)


async def test_residue_that_cannot_be_removed(laundry: Laundry) -> None:
    """Nothing is certified at start while something of a former life is left."""
    await laundry.worker("s_old")
    laundry.runtime.wrong["remove"] = RuntimeUnreachable("no answer")
    events: list[ev.Event] = []
    async with asyncio.TaskGroup() as group:
        washing = group.create_task(collect(laundry.run(laundry.order(None, 0)), events))
        await next_sleep(laundry.clock, washing)
        assert events == []
        laundry.runtime.wrong.clear()
        laundry.clock.advance(1)
    assert [type(event) for event in events] == [ev.WashPassed] * 2


async def test_count_of_residue(laundry: Laundry) -> None:
    """`remove_residue` says how much it removed, and nothing the second time."""
    await laundry.worker("s_1")
    assert await laundry.wash.remove_residue() == 2
    assert await laundry.wash.remove_residue() == 0


async def test_no_slot_is_free_before_residue_is_gone(laundry: Laundry) -> None:
    """A container that no row knows may be on any slot: the first wash of a life waits until it is gone,
    whatever it was ordered for."""
    laundry.wash.swept = False
    await laundry.worker("s_1")
    unknown = await laundry.worker("s_unknown")
    async for outcome in laundry.run(laundry.order()):
        if isinstance(outcome, ev.WashPassed):
            assert unknown not in laundry.machine.containers
    assert laundry.wash.swept
