"""The reaper: makes time pass for the node, and looks regularly at what nobody reports.

`ticks` sleeps to the next deadline and posts `Tick`. `rounds` checks run folders, devices and containers: a
worker that vanished without a word, a container that belongs to no session, a GPU that someone else uses.
"""

from __future__ import annotations

import asyncio

import structlog

from gpu_server.core import events as ev
from gpu_server.core.slots import SlotState
from gpu_server.engine import Engine
from gpu_server.ports import Dirty, RuntimeUnreachable, SlotInventory, WashUnreachable, WorkerExit
from gpu_server.wash_steps import reason_of

FOLDER_CHECK_SECONDS = 2.0
RECONCILE_EVERY = 15  # rounds
EXIT_NEWS_SECONDS = 0.2
PING_SECONDS = 5.0

log = structlog.get_logger()


class Reaper:
    """Two loops over one engine, each run as a task of its own."""

    def __init__(self, engine: Engine, inventory: SlotInventory, *, reading_interval: float) -> None:
        self._engine, self._inventory = engine, inventory
        self._reading_interval = reading_interval
        self._sleeping_to: float | None = None
        self._wake = asyncio.Event()
        engine.on_decided = self._on_decided

    def _on_decided(self) -> None:
        """Wake up when a decision has set a deadline that comes before the one slept to."""
        deadline = self._engine.node.next_deadline()
        if deadline is not None and (self._sleeping_to is None or deadline < self._sleeping_to):
            self._wake.set()

    async def ticks(self) -> None:
        """Post `Tick` at each deadline, for ever."""
        clock = self._engine.clock
        while self._engine.broken is None:
            deadline = self._engine.node.next_deadline()
            if deadline is not None and deadline <= clock.now():
                self._engine.report(ev.Tick())
                continue
            self._sleeping_to = deadline
            self._wake.clear()
            await clock.sleep_until(deadline, wake=self._wake)

    async def rounds(self) -> None:
        """Look at folders every round, at devices and containers in longer intervals, for ever."""
        clock, number, read_at = self._engine.clock, 0, self._engine.clock.now()
        while self._engine.broken is None:
            number += 1
            for attendant in list(self._engine.attendants.values()):
                attendant.check_folder()
            if clock.now() >= read_at:
                read_at = clock.now() + self._reading_interval
                await self.read_devices()
            if number % RECONCILE_EVERY == 0:
                await self.reconcile()
            await self._engine.tend_storage()
            await clock.sleep_until(clock.now() + FOLDER_CHECK_SECONDS)

    async def watch_runtime(self) -> None:
        """Ask the runtime for a sign of life every few seconds, for ever: while it gives none, nobody is
        started."""
        engine = self._engine
        while engine.broken is None:
            try:
                await engine.runtime.ping()
                doubt = None
            except RuntimeUnreachable as error:
                doubt = f"the container runtime does not answer: {error}"
            if (doubt is None) is not (engine.node.runtime_doubt is None):
                log.warning("runtime.unreachable" if doubt else "runtime.reachable", reason=doubt)
                engine.report(ev.RuntimeChecked(doubt=doubt))
                if doubt is None:
                    await self.reconcile()
            await engine.clock.sleep_until(engine.clock.now() + PING_SECONDS)

    async def read_devices(self) -> None:
        """Health and memory of every slot, and who else is on its GPU."""
        engine = self._engine
        engine.readings = readings = await self._inventory.readings()
        try:
            gpus = any(slot.spec.is_gpu for slot in engine.node.slots)
            holders = await engine.runtime.foreign_gpu_holders() if gpus else {}
        except RuntimeUnreachable as error:
            log.warning("runtime.unreachable", reason=str(error))
            return
        for slot in engine.node.slots:
            reading = readings.get(slot.spec.id)
            fault = reading.fault if reading is not None else None
            doubt = reading.doubt if reading is not None else "the device is not listed any more"
            holder = next((who for name, who in holders.items() if slot.spec.is_meant_by(name)), None)
            if fault is None and holder is not None:
                fault = f"in use by a container that is not ours: {holder}"
            changed = doubt != slot.doubt or (doubt is None and fault != slot.fault)
            if changed and slot.state is not SlotState.QUARANTINED:
                log.warning("slot.checked", slot=slot.spec.id, fault=fault, doubt=doubt)
                engine.report(ev.SlotChecked(slot_id=slot.spec.id, fault=fault, doubt=doubt))

    async def reconcile(self) -> None:
        """Hold the containers against the sessions: end what vanished, remove what nobody owns."""
        engine = self._engine
        expected = {a.name: s for s, a in engine.attendants.items() if a.is_started}
        try:
            seen = {worker.name: worker for worker in await engine.runtime.list_workers()}
            gone = [name for name in expected if name and not (name in seen and seen[name].running)]
            if gone:
                await asyncio.sleep(EXIT_NEWS_SECONDS)  # the exit itself, with its code, may be on its way
            for name in gone:
                engine.heard_exit(
                    WorkerExit(name=name, session_id=expected[name], exit_code=-1, oom_killed=False)
                )
            await engine.wash.remove_residue()
        except (Dirty, WashUnreachable, RuntimeUnreachable, OSError) as error:
            log.warning("reconcile.unreachable", reason=reason_of(error))
