"""Places that block."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gpu_server.drivers.residue_thread import Halt, InThread, in_thread
from gpu_server.ports import EndedLease, WashUnreachable

LEASE = EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",))


class PlayedPlace:
    """Waits for `gate` before each step, of which it has two."""

    name = "place"

    def __init__(self) -> None:
        self.gate, self.begun, self.over = threading.Event(), threading.Event(), threading.Event()
        self.steps = 0

    def look(self, lease: EndedLease, halt: Halt) -> int:
        return 7

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        try:
            for _ in range(2):
                self.begun.set()
                assert self.gate.wait(60)
                halt()
                self.steps += 1
        finally:
            self.over.set()


async def test_it_runs_in_a_thread() -> None:
    """Its answer comes back, its work is done, and its errors are the caller's."""
    place = PlayedPlace()
    place.gate.set()
    cleaner = InThread(place)
    assert (cleaner.name, await cleaner.look(LEASE)) == ("place", 7)
    await cleaner.remove(LEASE)
    assert place.steps == 2

    def fail(halt: Halt) -> None:
        raise OSError(16, "busy")

    with pytest.raises(OSError, match="busy"):
        await in_thread(fail, name="place")


async def test_work_that_was_given_up_stops_at_its_next_step() -> None:
    """After the limit, and after a cancellation: by then the slot may be somebody else's."""
    for cancelled in (False, True):
        place = PlayedPlace()
        cleaner = InThread(place, limit=60 if cancelled else 0.01)
        async with asyncio.TaskGroup() as tasks:
            removal = tasks.create_task(_given_up(cleaner))
            await asyncio.to_thread(place.begun.wait, 60)
            if cancelled:
                removal.cancel()
        place.gate.set()
        assert await asyncio.to_thread(place.over.wait, 60)
        assert place.steps == 0


async def _given_up(cleaner: InThread) -> None:
    with pytest.raises(WashUnreachable, match="place: not done within"):
        await cleaner.remove(LEASE)
