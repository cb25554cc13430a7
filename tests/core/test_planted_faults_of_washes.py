"""Planted faults in what frees a slot, and for whom. Each is found by what the node does."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import CertificateRejected
from gpu_server.core.node import Node
from gpu_server.core.rows import Row, Table
from gpu_server.core.sessions import Session, TaskState
from gpu_server.core.slots import NO_CERTIFICATE, Certificate, Need, Slot, Slots, SlotState, WashTier
from gpu_server.core.waitline import WaitLine
from tests.core.hunt import CAUGHT, MakeNode, hunt, names, with_line, with_slots

# -- certificates


class TakesAnyFence(Slots):
    """A certificate of an earlier wash counts in the middle of this one."""

    def issue(self, certificate: Certificate) -> Slot:
        slot = self._slots.get(certificate.slot_id)
        fence = slot.fence if slot is not None else 0
        return super().issue(replace(certificate, fence=fence))


class TakesAnyDevice(Slots):
    """A certificate of another device counts."""

    def issue(self, certificate: Certificate) -> Slot:
        slot = self._slots.get(certificate.slot_id)
        uuid = slot.spec.uuid if slot is not None else ""
        return super().issue(replace(certificate, slot_uuid=uuid))


class TakesAnyPrev(Slots):
    """Nobody looks at which certificate was before."""

    def issue(self, certificate: Certificate) -> Slot:
        slot = self._slots.get(certificate.slot_id)
        prev = slot.prev if slot is not None else b""
        return super().issue(replace(certificate, prev=prev))


class TakesAnySlot(Slots):
    """A certificate of a slot that is not there is taken for one that waits for its own."""

    def issue(self, certificate: Certificate) -> Slot:
        waiting = [slot.spec.id for slot in self if slot.state is SlotState.WASHING]
        if certificate.slot_id not in self and waiting:
            certificate = replace(certificate, slot_id=waiting[0], slot_uuid=self[waiting[0]].spec.uuid)
        return super().issue(certificate)


class TakesLightForFull(Slots):
    """A light wash is enough for every order."""

    def issue(self, certificate: Certificate) -> Slot:
        slot = self._slots.get(certificate.slot_id)
        if slot is not None and slot.state is SlotState.WASHING:
            slot.tier = certificate.tier
        return super().issue(certificate)


class TakesOldOnes(Slots):
    """A certificate that was good once is good again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def issue(self, certificate: Certificate) -> Slot:
        slot = self._slots.get(certificate.slot_id)
        if slot is not None and certificate.hash in self.seen:
            certificate = replace(certificate, fence=slot.fence, prev=slot.prev)
        self.seen.add(certificate.hash)
        return super().issue(certificate)


class BelievesAnything(Node):
    """A certificate that is not one frees whatever is being washed."""

    def _certificate_issued(self, event: ev.CertificateIssued, now: float) -> None:
        try:
            super()._certificate_issued(event, now)
        except CertificateRejected:
            washing = [slot for slot in self.slots if slot.state is SlotState.WASHING and not slot.fault]
            for slot in washing[:1]:
                self.slots._move(slot.spec.id, SlotState.FREE, "surely clean")
                slot.holder = None


class ForgetsTheChain(Slots):
    """Every wash begins the slot's chain anew."""

    def prevs(self, slot_ids: object) -> tuple[bytes, ...]:
        found = super().prevs(slot_ids)  # type: ignore[arg-type]
        return tuple(NO_CERTIFICATE for _ in found)


# -- from the certificate to free


class FreesWithoutCertificate(Node):
    """Once the container is gone its slots are taken for clean."""

    def _container_gone(self, event: ev.ContainerGone, now: float) -> None:
        super()._container_gone(event, now)
        session = self.sessions.get(event.session_id)
        if session is None:
            return
        for slot_id in session.slot_ids:
            slot = self.slots[slot_id]
            if slot.state is SlotState.WASHING and slot.fence == session.fence and slot.fault is None:
                self.slots._move(slot_id, SlotState.FREE, "surely clean by now")
                slot.holder = None
        self._assign(now)


class FreesBeforeTheDisk(Node):
    """A certificate frees its slot though it is not on the disk."""

    def _certificate_issued(self, event: ev.CertificateIssued, now: float) -> None:
        super()._certificate_issued(event, now)
        certificate = self.judge(event.certificate)
        self.slots.secure(certificate.slot_id, certificate.hash)


class AnyDiskWillDo(Slots):
    """News of any certificate of the slot frees it."""

    def secure(self, slot_id: str, certificate_hash: bytes) -> None:
        slot = self._slots.get(slot_id)
        super().secure(slot_id, (slot.pending if slot is not None else None) or certificate_hash)


class ForgetsWhatIsPending(Slots):
    """A wash that failed does not stop its certificate."""

    def quarantine(self, slot_id: str, reason: str) -> None:
        pending = self[slot_id].pending
        if pending is None:
            super().quarantine(slot_id, reason)


class NeverWrites(Node):
    """Certificates are not written down."""

    def _keep_certificate(self, certificate: Certificate) -> None:
        pass


class WritesAnother(Node):
    """What is written is not the certificate that is asked to be on the disk."""

    def _row(self, table: Table, name: str) -> Row | None:
        row = super()._row(table, name)
        if table is Table.CERTIFICATES and row is not None:
            return {**row, "hash": NO_CERTIFICATE.hex()}
        return row


# -- tiers


class AlwaysLight(Slots):
    """Every wash after a lease is a light one."""

    def wash(self, slot_ids: object, tier: WashTier, why: str) -> None:
        super().wash(slot_ids, WashTier.LIGHT, why)  # type: ignore[arg-type]


class OrdersLightAfterSealed(Node):
    """What a sealed session leaves is washed lightly."""

    def _end(self, session: Session, *rest: object, **more: object) -> None:
        sealing, session.sealing = session.sealing, None
        super()._end(session, *rest, **more)  # type: ignore[arg-type]
        session.sealing = sealing


class KeepsForNobody(Slots):
    """What a light wash has freed is anyone's."""

    def secure(self, slot_id: str, certificate_hash: bytes) -> None:
        if (slot := self._slots.get(slot_id)) is not None and slot.pending == certificate_hash:
            slot.tier = WashTier.FULL
        super().secure(slot_id, certificate_hash)


class IgnoresKeptFor(Slots):
    """A slot that is kept for one tenant is given to another."""

    def choose(self, need: Need, reserved: Set[str] = frozenset()) -> tuple[str, ...]:
        keys = [key for key in self._free if need.tier in key[0]]
        return self._usable(need.count, [self._free[key] for key in keys], reserved)


class LetsSealedFollow(Slots):
    """A slot that is kept for a tenant is given to a sealed session of hers."""

    def choose(self, need: Need, reserved: Set[str] = frozenset()) -> tuple[str, ...]:
        return super().choose(replace(need, sealed=False), reserved)


class KeepsForGood(Node):
    """Nobody washes what is kept, whoever waits for it."""

    def _assign(self, now: float) -> None:
        super()._assign(now)
        self._out = [
            effect
            for effect in self._out
            if not (isinstance(effect, fx.WashSlots) and effect.session_id is None and len(self.line))
        ]


class LetsTheTenantGoRound(WaitLine):
    """What is kept is no claim of anybody before."""

    def next_start(self, slots: Slots) -> tuple[Session, tuple[str, ...]] | None:
        reserved: set[str] = set()
        for session in self:
            chosen = slots.choose(session.need, reserved)
            if len(chosen) == session.workload.gpus:
                return session, chosen
            reserved |= set(chosen)
        return None


# -- once for each task


class TakesASecondTask(Node):
    """A session that is washed after every task takes another one."""

    def _task_submitted(self, event: ev.TaskSubmitted, now: float) -> None:
        session = self.sessions.get(event.session_id or "")
        taken = session.tasks_taken if session is not None else 0
        if session is not None:
            session.tasks_taken = 0
        try:
            super()._task_submitted(event, now)
        finally:
            if session is not None:
                session.tasks_taken += taken


class StaysAfterItsTask(Node):
    """It idles when its task has ended."""

    def _task_ended(self, event: ev.TaskEnded, now: float) -> None:
        session = self.sessions.get(event.session_id)
        if session is None:
            return
        workload = session.workload
        session.workload = replace(workload, wash_per_task=False)
        super()._task_ended(event, now)
        session.workload = workload


class StaysAfterACancel(Node):
    """It goes on where its task was cancelled in the queue."""

    def _stop_task(self, task: object, state: TaskState, *rest: object) -> None:
        session = self.sessions.get(task.session_id)  # type: ignore[attr-defined]
        if session is None:  # it is forgotten already, and the task is over with it
            return
        workload = session.workload
        session.workload = replace(workload, wash_per_task=False)
        super()._stop_task(task, state, *rest)  # type: ignore[arg-type]
        session.workload = workload


# -- fetching ahead


class NeverLooksAhead(Node):
    """Nobody is told who starts next."""

    def _assign(self, now: float) -> None:
        super()._assign(now)
        self._out = [effect for effect in self._out if not isinstance(effect, fx.PrefetchModel)]


class FetchesAgain(Node):
    """What was fetched ahead is fetched ahead once more."""

    def _certificate_secured(self, event: ev.CertificateSecured, now: float) -> None:
        for session in self.line:
            session.prefetched = False
        super()._certificate_secured(event, now)


class ForgetsWhatWasBefore(Node):
    """A session does not say what its slots' last certificates were."""

    def _lease(self, session: Session, slot_ids: tuple[str, ...], now: float) -> None:
        super()._lease(session, slot_ids, now)
        session.washed_before = tuple("" for _ in slot_ids)


NO_WASH = "a certificate of no wash that runs was taken|a second certificate for one wash"
TAKEN_EARLY = "the books say washing|leased that is not free"
FAULTS: list[tuple[MakeNode, str]] = [
    (with_slots(TakesAnyFence), NO_WASH),
    (with_slots(TakesAnyDevice), NO_WASH),
    (with_slots(TakesAnyPrev), NO_WASH),
    (with_slots(TakesAnySlot), "a certificate of no wash|KeyError|other certificates"),
    (with_slots(TakesLightForFull), NO_WASH),
    (with_slots(TakesOldOnes), NO_WASH),
    (BelievesAnything, "judge|books say washing|other certificates|no wash that runs"),
    (with_slots(ForgetsTheChain), "chains end with|does not follow"),
    (FreesWithoutCertificate, TAKEN_EARLY),
    (FreesBeforeTheDisk, TAKEN_EARLY),
    (with_slots(AnyDiskWillDo), TAKEN_EARLY),
    (with_slots(ForgetsWhatIsPending), "the books say quarantined"),
    (NeverWrites, "a certificate that nobody wrote"),
    (WritesAnother, "a certificate that nobody wrote"),
    (TakesASecondTask, "a second task without a wash"),
    (StaysAfterItsTask, "a session that takes no more tasks idles"),
    (StaysAfterACancel, "a session that takes no more tasks idles"),
    (NeverLooksAhead, "nothing was fetched ahead"),
    (FetchesAgain, "fetched ahead twice"),
    (ForgetsWhatWasBefore, "washed otherwise"),
]
FAULTS_OF_TIERS: list[tuple[MakeNode, str]] = [
    (with_slots(AlwaysLight), "other certificates|a good certificate|less was washed|fetched ahead"),
    (OrdersLightAfterSealed, "washed otherwise than ordered"),
    (with_slots(KeepsForNobody), "has other certificates"),
    (with_slots(IgnoresKeptFor), "a slot that is kept for somebody else"),
    (with_slots(LetsSealedFollow), "a slot that is kept for somebody else"),
    (KeepsForGood, "slots that are kept|has other certificates|books say"),
    (with_line(LetsTheTenantGoRound), "slots were taken from one who waits|nothing was fetched ahead"),
]


@pytest.mark.parametrize(("make_node", "complaint"), FAULTS, ids=names(FAULTS))
def test_a_planted_fault_is_found(make_node: MakeNode, complaint: str) -> None:
    """What the node does gives the fault away, without a look at its state."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node)


@pytest.mark.parametrize(("make_node", "complaint"), FAULTS_OF_TIERS, ids=names(FAULTS_OF_TIERS))
def test_a_planted_fault_is_found_where_slots_are_kept(make_node: MakeNode, complaint: str) -> None:
    """The same, in histories in which washes may be light."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node, light=True)
