"""Slots: what can be leased, who holds it, and the only way back to free.

A slot is one GPU (or a CPU stand-in). Its machine is the table below, and at start `begin_wash`. `Slots.free`
is the one function that leads from washing to free, and it takes a `Certificate`, never a flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gpu_server.core.errors import CertificateRejected, ImpossibleTransition


class Tier(StrEnum):
    """Difficulty tier of a task, and of the slots that may serve it."""

    LOW = "low"
    HIGH = "high"


BOTH_TIERS = frozenset(Tier)


class SlotState(StrEnum):
    FREE = "free"
    LEASED = "leased"
    WASHING = "washing"
    QUARANTINED = "quarantined"


SLOT_TRANSITIONS: Mapping[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.LEASED, SlotState.QUARANTINED}),
    SlotState.LEASED: frozenset({SlotState.WASHING}),
    SlotState.WASHING: frozenset({SlotState.FREE, SlotState.QUARANTINED}),
    SlotState.QUARANTINED: frozenset({SlotState.WASHING}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSpec:
    """What the inventory found: one allocatable device.

    `uuid` is the device's own ("GPU-..." from NVML, "CPU-..." for a stand-in); containers get it by this
    name, never by count or index. `memory_mb` is in MiB, 0 where unknown.
    """

    id: str
    uuid: str
    name: str
    memory_mb: int
    is_gpu: bool
    tiers: frozenset[Tier] = BOTH_TIERS

    def is_meant_by(self, name: str) -> bool:
        """Whether another container's name for a GPU means this one: UUID or its prefix, index, or `all`."""
        return self.is_gpu and (name in ("all", self.id) or (len(name) > 4 and self.uuid.startswith(name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Proof that the wash of one slot passed. Only this value frees a slot.

    `kind` says what was verified: "teardown" means that the container and its run folder are gone.
    `fence` is that of the lease that ended or of the operator's wash, 0 for the wash at start.
    """

    kind: str
    slot_id: str
    slot_uuid: str
    fence: int


@dataclass(slots=True, kw_only=True)
class Slot:
    """One slot's state, written by `Slots` alone. Born washing: nobody knows what it holds.

    `number` is the slot's own as long as its device is there, whatever other devices come and go: what is
    derived from it (the uid of its workers) is never another slot's at the same time.
    """

    spec: SlotSpec
    number: int
    state: SlotState = SlotState.WASHING
    holder: str | None = None
    fence: int = 0
    fault: str | None = None
    doubt: str | None = None
    history: list[str] = field(default_factory=list)


class Slots:
    """The slots of this node. Free ones are indexed by their tiers, so allocation reads no others.

    `touched` gathers the ids of slots whose row has changed, until somebody clears it.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._free: dict[frozenset[Tier], dict[str, None]] = {}
        self._serving: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self.touched: dict[str, None] = {}

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __getitem__(self, slot_id: str) -> Slot:
        return self._slots[slot_id]

    def __contains__(self, slot_id: str) -> bool:
        return slot_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free_count(self) -> int:
        return sum(map(len, self._free.values()))

    def add(self, spec: SlotSpec) -> Slot:
        """Take a device into service. It starts in washing and waits for its first certificate."""
        taken = {slot.number for slot in self}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        return self.restore(Slot(spec=spec, number=number))

    def restore(self, slot: Slot) -> Slot:
        """Take a slot in as it is: an earlier life of the service left it so."""
        self._slots[slot.spec.id] = slot
        self._index(slot, +1)
        self.touched[slot.spec.id] = None
        return slot

    def remove(self, slot_id: str) -> None:
        """The device is not there any more."""
        self._index(self._slots.pop(slot_id), -1)
        self.touched[slot_id] = None

    def describe(self, spec: SlotSpec) -> None:
        """The same device, perhaps with other tiers than before."""
        slot = self._slots[spec.id]
        self._index(slot, -1)
        slot.spec = spec
        self._index(slot, +1)
        self.touched[spec.id] = None

    def begin_wash(self, slot_id: str) -> None:
        """At start, whatever is not leased or in quarantine is washed: nobody knows what happened to it
        meanwhile. That wash has fence 0, which no lease has."""
        slot = self._slots[slot_id]
        if slot.state is SlotState.FREE:
            del self._free[slot.spec.tiers][slot_id]
        slot.state, slot.holder, slot.fence = SlotState.WASHING, None, 0
        slot.history.append("washing: the service has started")
        self.touched[slot_id] = None

    def _index(self, slot: Slot, step: int) -> None:
        """Count a slot in (1) or out (-1)."""
        for tier in slot.spec.tiers:
            self._serving[tier] += step
        if slot.state is SlotState.FREE:
            free = self._free.setdefault(slot.spec.tiers, {})
            if step > 0:
                free[slot.spec.id] = None
            else:
                del free[slot.spec.id]

    def serving(self, tier: Tier) -> int:
        """How many slots could ever serve `tier`, whatever state they are in."""
        return self._serving[tier]

    def choose(self, count: int, tier: Tier, reserved: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """The free slots a lease of `count` would take, or as many as there are: the caller compares lengths.

        Slots that serve this tier alone go first, so that the ones that serve both stay open for either.
        """
        found: list[str] = []
        for tiers in (frozenset({tier}), BOTH_TIERS):
            for slot_id in self._free.get(tiers, ()):
                if len(found) == count:
                    return tuple(found)
                if slot_id not in reserved and self._slots[slot_id].doubt is None:
                    found.append(slot_id)
        return tuple(found)

    def lease(self, slot_ids: Iterable[str], session_id: str, fence: int) -> None:
        """Give free slots to a session under a fence."""
        for slot_id in slot_ids:
            slot = self._move(slot_id, SlotState.LEASED, f"lease {fence} of {session_id}")
            slot.holder, slot.fence = session_id, fence

    def wash(self, slot_ids: Iterable[str], why: str) -> None:
        """Take slots away from their holder; they are nobody's until a certificate comes."""
        for slot_id in slot_ids:
            self._move(slot_id, SlotState.WASHING, why)

    def free(self, certificate: Certificate) -> None:
        """Free the slot that this certificate proves clean.

        Raises `CertificateRejected` when it is for another device, another lease or a slot that is not being
        washed. A slot whose health went bad meanwhile goes to quarantine instead.
        """
        slot = self._slots.get(certificate.slot_id)
        if slot is None:
            raise CertificateRejected(certificate.slot_id, "no such slot")
        if slot.state is not SlotState.WASHING:
            raise CertificateRejected(slot.spec.id, f"the slot is {slot.state}, no wash was ordered")
        if certificate.slot_uuid != slot.spec.uuid:
            raise CertificateRejected(slot.spec.id, f"it names device {certificate.slot_uuid}")
        if certificate.fence != slot.fence:
            raise CertificateRejected(slot.spec.id, f"fence {certificate.fence}, ordered was {slot.fence}")
        if slot.fault is not None:
            self.quarantine(slot.spec.id, slot.fault)
            return
        self._move(slot.spec.id, SlotState.FREE, f"certificate {certificate.kind} for {certificate.fence}")
        slot.holder = None

    def quarantine(self, slot_id: str, reason: str) -> None:
        """Lock a slot away after a negative finding; only a wash that passes brings it back."""
        slot = self._move(slot_id, SlotState.QUARANTINED, reason)
        slot.fault, slot.holder = reason, None

    def report_check(self, slot_id: str, fault: str | None, doubt: str | None) -> None:
        """Note what a health check found. A fault quarantines a free slot at once, others after their wash; a
        doubt (the device did not answer) only keeps the slot from being leased while it lasts."""
        slot = self._slots[slot_id]
        slot.doubt = doubt
        if slot.state is SlotState.QUARANTINED or doubt is not None:
            return
        if fault != slot.fault:
            self.touched[slot_id] = None
        slot.fault = fault
        if fault is not None and slot.state is SlotState.FREE:
            self.quarantine(slot_id, fault)

    def rewash(self, slot_id: str, fence: int) -> None:
        """An operator asks for another wash of a quarantined slot. It has a fence of its own: a late
        certificate of an earlier wash must not free the slot in the middle of this one."""
        slot = self._move(slot_id, SlotState.WASHING, f"operator asked for wash {fence}")
        slot.fault, slot.fence = None, fence

    def _move(self, slot_id: str, to: SlotState, why: str) -> Slot:
        slot = self._slots[slot_id]
        if to not in SLOT_TRANSITIONS[slot.state]:
            raise ImpossibleTransition("slot", slot_id, slot.state, to, slot.history)
        if slot.state is SlotState.FREE:
            del self._free[slot.spec.tiers][slot_id]
        elif to is SlotState.FREE:
            self._free.setdefault(slot.spec.tiers, {})[slot_id] = None
        slot.history.append(f"{slot.state}->{to}: {why}")
        del slot.history[:-16]
        slot.state = to
        self.touched[slot_id] = None
        return slot
