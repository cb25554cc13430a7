"""What a lease leaves: the order of removing and looking again, and workers that nobody serves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpu_server.drivers.residue import Residue, StrayWorkers, residue_of
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import (
    Belongings,
    Cleaner,
    Dirty,
    EndedLease,
    NotSeen,
    RuntimeUnreachable,
    WashUnreachable,
)
from tests.fakes.runtime import FakeRuntime, FakeScript
from tests.worker_specs import TEST_UID, worker_spec

LEASE = EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",))
NO_LEASE = EndedLease(session_id=None, fence=6, slot_ids=("cpu-0",))


@dataclass
class PlayedCleaner:
    """Finds `there`, of which `stuck` cannot be removed; raises `wrong` at a look, `refused` at a removal."""

    name: str
    there: int = 0
    stuck: int = 0
    wrong: Exception | None = None
    refused: Exception | None = None
    calls: list[str] = field(default_factory=list)

    async def look(self, lease: EndedLease) -> int:
        self.calls.append("look")
        if self.wrong is not None:
            raise self.wrong
        return self.there

    async def remove(self, lease: EndedLease) -> None:
        self.calls.append("remove")
        if self.refused is not None:
            raise self.refused
        self.there = self.stuck


async def test_what_is_found_is_removed_and_looked_for_again() -> None:
    """The figures say how much there was, place by place; where there is nothing, nothing is removed."""
    full, empty = PlayedCleaner("full", there=3), PlayedCleaner("empty")
    assert await Residue((full, empty)).clean(LEASE) == {"full": 3, "empty": 0}
    assert full.calls == ["look", "remove", "look"]
    assert empty.calls == ["look"]


async def test_what_is_still_there_is_dirty() -> None:
    """A removal is not believed. The other places are cleaned all the same, and nothing hides the finding."""
    first = PlayedCleaner("first", wrong=OSError("not now"))
    stuck, last = PlayedCleaner("stuck", there=3, stuck=2), PlayedCleaner("last", there=1)
    with pytest.raises(Dirty, match=r"^stuck: 2 still there after removing them$"):
        await Residue((first, stuck, last)).clean(LEASE)
    assert last.there == 0


async def test_what_cannot_be_seen_is_said() -> None:
    """It is neither zero nor an error."""
    blind = PlayedCleaner("blind", wrong=NotSeen("it is dark"))
    residue = Residue((blind, PlayedCleaner("other")))
    assert await residue.clean(LEASE) == {"blind": "not seen: it is dark", "other": 0}
    await residue.second_look(LEASE)


async def test_what_was_found_is_not_unseen() -> None:
    """A place that shows something, and then nothing any more, is not clean."""
    found = PlayedCleaner("found", there=2, refused=NotSeen("it is dark"))
    with pytest.raises(WashUnreachable, match=r"^found: 2 found, and then not seen: it is dark$"):
        await Residue((found,)).clean(LEASE)


@pytest.mark.parametrize(
    "error", [RuntimeUnreachable("away"), WashUnreachable("not done"), OSError(16, "busy"), ValueError("bug")]
)
async def test_what_fails_is_no_clean_slot(error: Exception) -> None:
    """Whatever a cleaner raises arrives, for a retry or as a bug, after the other places were cleaned."""
    broken, other = PlayedCleaner("broken", wrong=error), PlayedCleaner("other", there=1)
    with pytest.raises(type(error)):
        await Residue((broken, other)).clean(LEASE)
    assert other.there == (1 if isinstance(error, ValueError) else 0)
    with pytest.raises(type(error)):
        await Residue((broken,)).second_look(LEASE)


async def test_the_second_look_removes_nothing() -> None:
    """It is for what came back: that is dirty, and stays where it is."""
    back = PlayedCleaner("back", there=1)
    with pytest.raises(Dirty, match=r"^back: 1 found on the second look$"):
        await Residue((back,)).second_look(LEASE)
    assert back.calls == ["look"]


# -- workers that serve no session ------------------------------------------------------------------------


@pytest.fixture
async def runtime(tmp_path: Path) -> FakeRuntime:
    """Four workers: two of session s_1 (fences 4 and 6), one of s_2 and one of s_3."""
    runtime = FakeRuntime()
    runtime.engine.images["image"] = FakeScript()
    folders = RunFolders(tmp_path)
    await runtime.open(lambda worker_exit: None)
    for session_id, fence in (("s_1", 4), ("s_1", 6), ("s_2", 1), ("s_3", 2)):
        spec = worker_spec(
            folders.create(session_id, TEST_UID, None),
            image="image",
            name=f"{session_id}-{fence}",
            fence=fence,
        )
        await runtime.create(spec)
        runtime.engine.volumes[f"fake-{spec.name}"] = {f"of-{spec.name}"}
    return runtime


async def left(runtime: FakeRuntime) -> list[str]:
    return sorted(worker.name for worker in await runtime.list_workers())


async def test_a_lease_takes_its_own_workers(runtime: FakeRuntime) -> None:
    """Those of its session up to its fence, with their volumes; a younger one is another lease's."""
    stray = StrayWorkers(runtime, {"s_2": "s_2-1"}.get)
    assert await Residue((stray,)).clean(LEASE) == {"workers": 1}
    assert await left(runtime) == ["s_1-6", "s_2-1", "s_3-2"]
    assert not runtime.engine.volumes["fake-s_1-4"]
    assert runtime.engine.volumes["fake-s_1-6"]


async def test_without_a_lease_whatever_serves_nobody_goes(runtime: FakeRuntime) -> None:
    """A worker counts as serving by its name, not by its session alone."""
    stray = StrayWorkers(runtime, {"s_1": "s_1-6", "s_2": "s_2-1"}.get)
    assert await Residue((stray,)).clean(NO_LEASE) == {"workers": 2}
    assert await left(runtime) == ["s_1-6", "s_2-1"]


async def test_what_a_stray_leaves_is_seen_to(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its volumes are removed and looked for as any other worker's."""
    cleaners = runtime.cleaners()

    def stuck() -> tuple[Cleaner, ...]:
        for cleaner in cleaners:
            vars(cleaner)["stuck"] = {"of-s_3-2"}
        return cleaners

    monkeypatch.setattr(runtime, "cleaners", stuck)
    with pytest.raises(Dirty, match="volumes"):
        await Residue((StrayWorkers(runtime, lambda _: None),)).clean(NO_LEASE)


async def test_what_a_stray_leaves_is_not_forgotten(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once the worker is gone, which could be listed no more: until what it left is gone too. It is the
    residue of its own lease, and of nobody's."""
    volumes = PlayedCleaner("volumes", there=1, refused=RuntimeUnreachable("away"))
    monkeypatch.setattr(runtime, "cleaners", lambda: (volumes,))
    residue = Residue((StrayWorkers(runtime, {"s_1": "s_1-6", "s_2": "s_2-1", "s_3": "s_3-2"}.get),))
    for _ in range(2):
        with pytest.raises(RuntimeUnreachable):
            await residue.clean(LEASE)
        assert await left(runtime) == ["s_1-6", "s_2-1", "s_3-2"]
    for lease in (LEASE, NO_LEASE):
        with pytest.raises(Dirty, match="1 found"):
            await residue.second_look(lease)
    await residue.second_look(EndedLease(session_id="s_9", fence=5, slot_ids=("cpu-0",)))
    volumes.refused = None
    assert await residue.clean(LEASE) == {"workers": 1}
    assert volumes.there == 0
    await residue.second_look(NO_LEASE)


async def test_a_machines_cleaners(tmp_path: Path) -> None:
    """Strays first, then what the runtime knows of, then this machine; every figure has a name of its own,
    and a lease with nothing behind it is clean."""
    residue = residue_of(FakeRuntime(), RunFolders(tmp_path), served_by=lambda _: None)
    names = [cleaner.name for cleaner in residue.cleaners]
    assert names[:3] == ["workers", "volumes", "processes"]
    assert len(set(names)) == len(names)
    lease = EndedLease(
        session_id="s_1", fence=1, slot_ids=("cpu-0",), belongings=Belongings(container_id="c")
    )
    async with asyncio.timeout(60):
        figures = await residue.clean(lease)
    assert set(figures) == set(names)
    # No uid was given, so nothing is concluded from one.
    assert [figures[name] for name in ("workers", "volumes", "run_folder")] == [0, 0, 0]
    assert all(str(figures[name]).startswith("not seen: ") for name in ("processes", "sysv", "dev_shm"))
