"""The car wash: what happens to slots between two leases, and the only place that issues certificates.

Today's wash is of kind `teardown`: container gone, run folder gone, nobody else on the device, each of them
verified by a second look. A finding that is wrong quarantines; what cannot be reached is tried again, with
backoff, until `give_up` seconds have passed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import structlog

from gpu_server.core import events as ev
from gpu_server.core.effects import WashSlots
from gpu_server.core.slots import Certificate, SlotSpec
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import Clock, ContainerRuntime, RuntimeUnreachable, worker_name

FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 5.0

log = structlog.get_logger()


class CarWash:
    """Washes slots. `served_by` gives the name of the container that serves a session now, or None: any other
    container, and the folder of any other session, is residue."""

    def __init__(
        self,
        runtime: ContainerRuntime,
        folders: RunFolders,
        clock: Clock,
        *,
        give_up: float,
        served_by: Callable[[str], str | None],
    ) -> None:
        self._runtime, self._folders, self._clock = runtime, folders, clock
        self._give_up, self._served_by = give_up, served_by
        self.swept = False
        """Whether this life has seen, once, that an earlier one left nothing; no slot is free before that."""
        self._sweeping = asyncio.Lock()

    async def run(self, order: WashSlots, slots: Iterable[SlotSpec]) -> AsyncIterator[ev.Event]:
        """Wash, and yield what came of it: ContainerGone, then WashPassed or WashFailed for each slot."""
        give_up_at, pause = self._clock.now() + self._give_up, FIRST_RETRY_SECONDS
        specs, gone = tuple(slots), False
        while True:
            try:
                if not gone:
                    await self._tear_down(order)
                    gone = True
                    if order.session_id is not None:
                        yield ev.ContainerGone(session_id=order.session_id)
                holders = await self._runtime.foreign_gpu_holders() if any(s.is_gpu for s in specs) else {}
                break
            except (RuntimeUnreachable, OSError) as error:
                why = reason_of(error)
                log.warning("wash.unreachable", session_id=order.session_id, reason=why)
                if self._clock.now() >= give_up_at:
                    reason = f"could not be washed within {self._give_up:g} s: {why}"
                    yield self._failed(order, order.slot_ids, reason)
                    return
                await self._clock.sleep_until(self._clock.now() + pause)
                pause = min(2 * pause, LAST_RETRY_SECONDS)
        for spec in specs:
            holder = next((who for name, who in holders.items() if spec.is_meant_by(name)), None)
            if holder is not None:
                yield self._failed(order, (spec.id,), f"in use by a container that is not ours: {holder}")
                continue
            certificate = Certificate(
                kind="teardown", slot_id=spec.id, slot_uuid=spec.uuid, fence=order.fence
            )
            yield ev.WashPassed(certificate=certificate)

    async def _tear_down(self, order: WashSlots) -> None:
        """Container and run folder removed and seen gone. Raises `RuntimeUnreachable` or `OSError`."""
        if order.session_id is not None:
            await self._runtime.remove(worker_name(order.session_id, order.fence), grace=order.grace)
            await asyncio.to_thread(self._folders.remove, order.session_id)
        if order.session_id is None or not self.swept:
            # A container that no row knows, started while the journal failed, may be on any of the slots.
            await self.remove_residue()
            self.swept = True

    async def remove_residue(self) -> int:
        """Remove every worker and run folder of this instance that serves no session now; how many.

        Raises `RuntimeUnreachable` or `OSError`.
        """
        async with self._sweeping:
            return await self._remove_residue()

    async def _remove_residue(self) -> int:
        removed = 0
        for worker in await self._runtime.list_workers():
            if self._served_by(worker.session_id) != worker.name:
                log.warning("wash.residue", container=worker.name, session_id=worker.session_id)
                await self._runtime.remove(worker.name, grace=0.0)
                removed += 1
        for session_id in self._folders.names():
            if self._served_by(session_id) is None:
                await asyncio.to_thread(self._folders.remove, session_id)
                removed += 1
        return removed

    @staticmethod
    def _failed(order: WashSlots, slot_ids: tuple[str, ...], reason: str) -> ev.WashFailed:
        return ev.WashFailed(session_id=order.session_id, slot_ids=slot_ids, fence=order.fence, reason=reason)


def reason_of(error: Exception) -> str:
    """What went wrong, without the names of files, which workers choose."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
