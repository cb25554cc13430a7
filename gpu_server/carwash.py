"""The car wash: what happens to slots between two leases, and the only place that issues certificates.

The worker is taken down, and that is told at once; then each slot is washed by itself (`slot_wash.py`), at
the same time as the others. What comes of it is a certificate, which the node has to accept, or a reason why
there is none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

import structlog

from gpu_server.core import events as ev
from gpu_server.core.effects import WashSlots
from gpu_server.core.slots import Slot, SlotState
from gpu_server.counts import Counts
from gpu_server.drivers.residue_uids import workers_uids
from gpu_server.ports import (
    Belongings,
    Clock,
    ContainerRuntime,
    EndedLease,
    Journal,
    worker_name,
)
from gpu_server.sealed.wash import Figures, hash_of
from gpu_server.slot_wash import CERTIFICATE, Equipment, LastMade, SlotWash
from gpu_server.wash_steps import Done, Progress, Steps, Times, WashStopped, WashView

Tell = Callable[[ev.Event], None]

_EVERYONE: Final = EndedLease(session_id=None, fence=0, slot_ids=())
"""The lease of whatever serves no session now."""

log = structlog.get_logger()


class CarWash:
    """Washes slots. `uid_base` is the uid of the workers in the first slot, `wall` the time of day in seconds
    since 1970."""

    def __init__(
        self,
        runtime: ContainerRuntime,
        journal: Journal,
        clock: Clock,
        counts: Counts,
        equipment: Equipment,
        *,
        uid_base: int,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._runtime, self._clock, self._counts, self._equipment = runtime, clock, counts, equipment
        self._uid_base, self._wall = uid_base, wall
        self._last_made = LastMade(journal)
        self.swept = False
        """Whether this life has seen, once, that an earlier one left nothing; no slot is free before that."""
        self._sweeping = asyncio.Lock()
        self._ending: dict[str, str] = {}
        self._progress: dict[str, Progress] = {}

    @property
    def washing(self) -> Mapping[str, WashView]:
        """Slot id -> what its wash is at, until `over`."""
        return {slot_id: progress.view for slot_id, progress in self._progress.items()}

    def progress(self, slot_id: str) -> Progress:
        """To be kept by those who do the rest."""
        return self._progress.setdefault(slot_id, Progress(self._clock.now()))

    def over(self, slot_id: str) -> None:
        """The slot is not being washed any more."""
        self._progress.pop(slot_id, None)

    def ends(self, session_id: str) -> str | None:
        """The name of the worker that a wash of the session's own is taking down, with what it left."""
        return self._ending.get(session_id)

    async def run(self, order: WashSlots, slots: Iterable[Slot], tell: Tell) -> None:
        """Wash, and tell: ContainerGone, then CertificateIssued or WashFailed for each slot."""
        slots, since = tuple(slots), self._clock.now()
        for slot in slots:
            self._progress[slot.spec.id] = Progress(since)
        if order.session_id is not None:
            self._ending[order.session_id] = worker_name(order.session_id, order.fence)
        try:
            await self._run(order, slots, since, tell)
        finally:
            self._ending.pop(order.session_id or "", None)

    async def _run(self, order: WashSlots, slots: tuple[Slot, ...], since: float, tell: Tell) -> None:
        times, limit = Times(self._clock, self._wall), self._equipment.step_seconds
        of_all = self._steps(slots, since)
        found: list[Belongings] = []
        try:
            teardown = await of_all.figures(
                "teardown", lambda: self._tear_down(order, found), limit=limit + order.grace
            )
        except WashStopped as stopped:
            self._fail(order, order.slot_ids, stopped, tell)
            return
        if order.session_id is None:
            teardown = replace(teardown, result="not_applicable")
        else:
            tell(ev.ContainerGone(session_id=order.session_id))
        lease = EndedLease(
            session_id=order.session_id,
            fence=order.fence,
            slot_ids=order.slot_ids,
            uids=workers_uids(self._uid_base, (slot.number for slot in slots)),
            belongings=found[0] if found else None,
        )

        def unfinished() -> EndedLease:
            # Another's worker may run as the uid of a slot that is free by now.
            numbers = (s.number for s in slots if s.state is SlotState.WASHING and s.fence == order.fence)
            return replace(lease, uids=workers_uids(self._uid_base, numbers))

        async def clean() -> Done | WashStopped:
            try:
                return await of_all.figures(
                    "residue", lambda: self._equipment.residue.clean(lease), limit=limit
                )
            except WashStopped as stopped:
                log.error("wash.residue_left", session_id=order.session_id, reason=str(stopped))
                return stopped

        async with asyncio.TaskGroup() as group:
            cleaning = group.create_task(clean())

            async def residue() -> Done:
                # Shielded: a slot that stops waiting must not stop it for the others.
                done = await asyncio.shield(cleaning)
                if isinstance(done, WashStopped):
                    raise WashStopped(done.step, str(done)) from done
                return done

            for slot, prev in zip(slots, order.prevs, strict=True):
                wash = SlotWash(
                    spec=slot.spec,
                    order=order,
                    prev=prev,
                    lease=unfinished,
                    teardown=teardown,
                    residue=residue,
                    runtime=self._runtime,
                    equipment=self._equipment,
                    steps=self._steps((slot,), since),
                    times=times,
                    last_made=self._last_made,
                )
                self.progress(slot.spec.id).held_up = wash.held_up
                group.create_task(self._wash_slot(slot, wash, tell))

    async def _wash_slot(self, slot: Slot, wash: SlotWash, tell: Tell) -> None:
        order, slot_ids = wash.order, (slot.spec.id,)
        try:
            certificate = await wash.run()
        except WashStopped as stopped:
            self._fail(order, slot_ids, stopped, tell)
            return
        tell(ev.CertificateIssued(certificate=certificate))
        if slot.pending != hash_of(certificate) and slot.state is SlotState.WASHING:
            # It was judged, and the log says why it was rejected. Nobody else would end this wash.
            self.failed(order, slot_ids, CERTIFICATE, "the node has rejected its certificate", tell)

    def _steps(self, slots: tuple[Slot, ...], since: float) -> Steps:
        ids = tuple(slot.spec.id for slot in slots)
        return Steps(
            self._clock,
            self._counts,
            [self.progress(slot_id) for slot_id in ids],
            since=since,
            give_up=self._equipment.give_up,
            slots=ids,
        )

    def _fail(self, order: WashSlots, slot_ids: tuple[str, ...], stopped: WashStopped, tell: Tell) -> None:
        self.failed(order, slot_ids, stopped.step, str(stopped), tell)

    def failed(self, order: WashSlots, slot_ids: tuple[str, ...], step: str, reason: str, tell: Tell) -> None:
        """The wash of these slots has come to nothing."""
        self._counts.washes_failed[step] += len(slot_ids)
        for slot_id in slot_ids:
            self.over(slot_id)
        tell(ev.WashFailed(session_id=order.session_id, slot_ids=slot_ids, fence=order.fence, reason=reason))

    async def _tear_down(self, order: WashSlots, found: list[Belongings]) -> Figures:
        """The worker removed and seen gone; what it had outside is in `found`, asked for before that.

        Raises what the runtime and the residue do.
        """
        figures: dict[str, int | str | bytes] = {}
        if order.session_id is not None:
            name = worker_name(order.session_id, order.fence)
            if not found and (belongings := await self._runtime.belongings(name)) is not None:
                found.append(belongings)
            await self._runtime.remove(name, grace=order.grace)
            figures["containers"] = len(found)
        if not self.swept:
            # A container that no row knows, started while the journal failed, may be on any of the slots.
            figures["swept"] = await self._sweep()
        return figures

    async def _sweep(self) -> int:
        async with self._sweeping:
            if self.swept:  # by another wash meanwhile, and scrubs may run by now
                return 0
            removed = await self._remove_residue()
            if self._equipment.scrubber is not None:
                removed += await self._equipment.scrubber.sweep()
            self.swept = True
            return removed

    async def remove_residue(self) -> int:
        """Remove every worker and run folder of this instance that serves no session now; how many.

        Raises `Dirty`, `WashUnreachable`, `RuntimeUnreachable` or OSError.
        """
        async with self._sweeping:
            return await self._remove_residue()

    async def _remove_residue(self) -> int:
        figures = await self._equipment.residue.clean(_EVERYONE)
        return sum(count for count in figures.values() if isinstance(count, int))
