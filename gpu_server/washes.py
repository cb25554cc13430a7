"""The washes under way: each belongs to the engine, which hears what came of it.

A wash that crashes has not proven anything. A certificate frees its slot only when it is on the disk, however
long that takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

import structlog

from gpu_server.carwash import CarWash
from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.slots import SlotState
from gpu_server.counts import TOTAL, Counts
from gpu_server.ports import Clock, Journal, JournalFailing
from gpu_server.wash_steps import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS, Progress, WashView, at

DISK: Final = "disk"
"""What comes after the certificate: it is forced there."""

log = structlog.get_logger()


class Host(Protocol):
    """What washes need of the engine."""

    node: Node

    def report(self, event: ev.Event) -> None: ...

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...

    async def let_go(self, session_id: str) -> str: ...

    def forget(self, session_id: str) -> None: ...


class Washes:
    """Carries out the orders to wash, and to secure what came of that."""

    def __init__(self, host: Host, wash: CarWash, journal: Journal, clock: Clock, counts: Counts) -> None:
        self._host, self._wash, self._journal = host, wash, journal
        self._clock, self._counts = clock, counts
        self._running: set[asyncio.Task[None]] = set()
        self._to_secure: list[fx.SecureCertificate] = []
        self._securing = False

    def __len__(self) -> int:
        return len(self._running)

    @property
    def washing(self) -> Mapping[str, WashView]:
        """Slot id -> what its wash is at."""
        return self._wash.washing

    def begin(self, order: fx.WashSlots) -> None:
        """Wash; comes back as ContainerGone, and CertificateIssued or WashFailed for each slot."""
        self._spawn(f"wash {order.fence} {order.session_id}", self._carry_out(order))

    def secure(self, order: fx.SecureCertificate) -> None:
        """Have a certificate on the disk; comes back as CertificateSecured. Those that come while others are
        being secured are so together, in their order."""
        self._to_secure.append(order)
        if not self._securing:
            self._securing = True
            self._spawn("secure", self._secure_all())

    async def settle(self, patience: float) -> None:
        """Wait for all that is under way, and for what follows from it, `patience` seconds at most."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while self._running and loop.time() < until:
            await asyncio.wait(set(self._running), timeout=until - loop.time())
            await asyncio.sleep(0)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._host.spawn(name, work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _carry_out(self, order: fx.WashSlots) -> None:
        node, tail = self._host.node, ""

        def tell(event: ev.Event) -> None:
            if isinstance(event, ev.ContainerGone):
                self._host.forget(event.session_id)
                event = replace(event, log_tail=tail)
            elif isinstance(event, ev.WashFailed):
                log.error("slot.quarantined", slots=event.slot_ids, reason=event.reason)
            self._host.report(event)

        try:
            if order.session_id is not None:
                tail = await self._host.let_go(order.session_id)
            await self._wash.run(order, [node.slots[slot_id] for slot_id in order.slot_ids], tell)
        except Exception as error:  # whatever it is, the answer is quarantine and a log line
            log.exception("wash.crashed", slots=order.slot_ids)
            reason = f"the wash crashed: {type(error).__name__}"
            self._wash.failed(order, order.slot_ids, "crash", reason, tell)
        finally:
            # What could not be removed belongs to nobody from here on: the reaper tries again.
            if order.session_id is not None:
                self._host.forget(order.session_id)
        log.info("wash.done", session_id=order.session_id, slots=order.slot_ids, fence=order.fence)

    async def _secure_all(self) -> None:
        try:
            while self._to_secure:
                orders, self._to_secure = self._to_secure, []
                started = self._clock.now()
                await self._secure([self._wash.progress(order.slot_id) for order in orders])
                for order in orders:
                    self._counts.wash_seconds[DISK].add(self._clock.now() - started)
                    self._is_secured(order)
        finally:
            self._securing = False

    async def _secure(self, progress: list[Progress]) -> None:
        """Until it succeeds: these slots are washing as long, and what is being washed says why."""
        pause, why = FIRST_RETRY_SECONDS, ""
        with at(progress, DISK) as note:
            while True:
                try:
                    await asyncio.to_thread(self._journal.secure)
                    return
                except JournalFailing as error:
                    if str(error) != why:
                        why = str(error)
                        log.error("certificate.not_secured", reason=why)
                        note(why)
                await self._clock.sleep_until(self._clock.now() + pause)
                pause = min(2 * pause, LAST_RETRY_SECONDS)

    def _is_secured(self, order: fx.SecureCertificate) -> None:
        took = self._clock.now() - self._wash.progress(order.slot_id).since
        self._wash.over(order.slot_id)
        slot = self._host.node.slots[order.slot_id]
        if slot.pending == order.certificate_hash and slot.fault is None:
            self._counts.washes_passed += 1
            self._counts.wash_seconds[TOTAL].add(took)
            # Before the decision, which may give the slot to the next: the log tells it in this order.
            record, milliseconds = slot.head.hex(), round(took * 1000)
            log.info("wash.passed", slot=order.slot_id, record=record, milliseconds=milliseconds)
        self._host.report(
            ev.CertificateSecured(slot_id=order.slot_id, certificate_hash=order.certificate_hash)
        )
        if slot.state is SlotState.QUARANTINED:  # its health went bad meanwhile
            log.error("slot.quarantined", slots=[order.slot_id], reason=slot.fault)
