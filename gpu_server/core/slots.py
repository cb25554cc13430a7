"""Slots: what can be leased, who holds it, and the only way back to free.

A slot is one GPU (or a CPU stand-in). Its machine is the table below, and at start `begin_wash`. From washing
to free it takes two steps: `Slots.issue` accepts the `Certificate` of the wash that was ordered, and
`Slots.secure` frees the slot when that certificate is on the disk. A flag frees nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from gpu_server.core.errors import CertificateRejected, ImpossibleTransition


class Tier(StrEnum):
    """Difficulty tier of a task, and of the slots that may serve it."""

    LOW = "low"
    HIGH = "high"


BOTH_TIERS = frozenset(Tier)

NO_CERTIFICATE: Final = bytes(32)
"""Stands for the certificate before a slot's first one, and for its record."""


class WashTier(StrEnum):
    """How much a wash does. A light one leaves out the scrub of the device, so that only the tenant who was
    there may come next."""

    FULL = "full"
    LIGHT = "light"


class SlotState(StrEnum):
    FREE = "free"
    LEASED = "leased"
    WASHING = "washing"
    QUARANTINED = "quarantined"


SLOT_TRANSITIONS: Mapping[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.LEASED, SlotState.WASHING, SlotState.QUARANTINED}),
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
    """Proof that the wash of one slot passed, read and verified by a `Judge`: only this value frees a slot.

    `raw` is all of it, signed; `hash` is SHA-256 of that, and `record_hash` SHA-256 of the record in it.
    `fence` is that of the lease that ended, or of the order of a wash without one. `prev` is the hash of the
    slot's certificate before, `NO_CERTIFICATE` for the first.
    """

    raw: bytes
    hash: bytes
    record_hash: bytes
    slot_id: str
    slot_uuid: str
    fence: int
    prev: bytes
    tier: WashTier


Judge = Callable[[bytes], Certificate]
"""Reads a certificate and verifies all that it says of itself. Raises `CertificateRejected`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a session needs in order to start: so many slots of one difficulty, for whom."""

    count: int
    tier: Tier
    tenant: str
    sealed: bool

    def may_follow(self, tenant: str | None) -> bool:
        """Whether it may come next where that tenant was and the device was not scrubbed."""
        return tenant == self.tenant and not self.sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The slots that are set aside for one `Need`: free ones that it may take, ones whose wash will make them
    so, and ones that are kept for others until they are washed fully."""

    free: tuple[str, ...]
    coming: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.free + self.coming + self.kept


@dataclass(slots=True, kw_only=True)
class Slot:
    """One slot's state, written by `Slots` alone. Born washing: nobody knows what it holds.

    `number` is the slot's own as long as its device is there, whatever other devices come and go: what is
    derived from it (the uid of its workers) is never another slot's at the same time.

    `prev` is the hash of its newest certificate and `head` that of the record in it; `pending` is the former
    while that certificate is not known to be on the disk. `tier` is that of the wash under way, or of the
    last one. `tenant` had the last lease; `kept_for` is the only one who may have the next.
    """

    spec: SlotSpec
    number: int
    state: SlotState = SlotState.WASHING
    holder: str | None = None
    fence: int = 0
    fault: str | None = None
    doubt: str | None = None
    prev: bytes = NO_CERTIFICATE
    head: bytes = NO_CERTIFICATE
    pending: bytes | None = None
    tier: WashTier = WashTier.FULL
    tenant: str | None = None
    kept_for: str | None = None
    history: list[str] = field(default_factory=list)


FreeKey = tuple[frozenset[Tier], str | None]


class Slots:
    """The slots of this node. Free ones are indexed by their tiers and by whom they are kept for, so
    allocation reads no others.

    `touched` gathers the ids of slots whose row has changed, until somebody clears it.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._free: dict[FreeKey, dict[str, None]] = {}
        self._washing: dict[str, None] = {}
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

    @property
    def washing_count(self) -> int:
        return len(self._washing)

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

    def begin_wash(self, slot_id: str, fence: int) -> None:
        """At start, whatever is not leased or in quarantine is washed: nobody knows what happened to it
        meanwhile."""
        slot = self._slots[slot_id]
        self._index(slot, -1)
        slot.state, slot.fence = SlotState.WASHING, fence
        _order(slot, WashTier.FULL)
        slot.holder = None
        slot.history.append(f"washing: the service has started, wash {fence}")
        self._index(slot, +1)
        self.touched[slot_id] = None

    def _index(self, slot: Slot, step: int) -> None:
        """Count a slot in (1) or out (-1)."""
        for tier in slot.spec.tiers:
            self._serving[tier] += step
        if step > 0:
            self._list(slot)
        else:
            self._unlist(slot)

    def _list(self, slot: Slot) -> None:
        if slot.state is SlotState.FREE:
            self._free.setdefault((slot.spec.tiers, slot.kept_for), {})[slot.spec.id] = None
        elif slot.state is SlotState.WASHING:
            self._washing[slot.spec.id] = None

    def _unlist(self, slot: Slot) -> None:
        if slot.state is SlotState.FREE:
            key = (slot.spec.tiers, slot.kept_for)
            del self._free[key][slot.spec.id]
            if not self._free[key]:
                del self._free[key]
        elif slot.state is SlotState.WASHING:
            del self._washing[slot.spec.id]

    def serving(self, tier: Tier) -> int:
        """How many slots could ever serve `tier`, whatever state they are in."""
        return self._serving[tier]

    def choose(self, need: Need, reserved: Set[str] = frozenset()) -> tuple[str, ...]:
        """The free slots that a lease would take, or as many as there are: the caller compares lengths.

        Slots that serve this tier alone go first, so that the ones that serve both stay open for either; of
        each kind those that are kept for this tenant, so that the others stay open for everyone.
        """
        keepers = (None,) if need.sealed else (need.tenant, None)
        keys = [(tiers, keeper) for tiers in (frozenset({need.tier}), BOTH_TIERS) for keeper in keepers]
        return self._usable(need.count, [self._free.get(key, {}) for key in keys], reserved)

    def claim(self, need: Need, reserved: Set[str] = frozenset()) -> Claim:
        """What would serve this need soonest: free slots, then slots that are being washed, and then, for as
        many as are missing still, slots that are kept for others."""
        free = self.choose(need, reserved)
        missing = need.count - len(free)
        if missing == 0:
            return Claim(free=free)
        fitting = (slot_id for slot_id in self._washing if self._will_do(self._slots[slot_id], need))
        coming = self._usable(missing, [fitting], reserved)
        others = (
            found
            for (tiers, keeper), found in self._free.items()
            if need.tier in tiers and keeper is not None and not need.may_follow(keeper)
        )
        return Claim(free=free, coming=coming, kept=self._usable(missing - len(coming), others, reserved))

    def _usable(self, count: int, groups: Iterable[Iterable[str]], reserved: Set[str]) -> tuple[str, ...]:
        found: list[str] = []
        for group in groups:
            for slot_id in group:
                if len(found) == count:
                    return tuple(found)
                if slot_id not in reserved and self._slots[slot_id].doubt is None:
                    found.append(slot_id)
        return tuple(found)

    @staticmethod
    def _will_do(slot: Slot, need: Need) -> bool:
        """Whether the wash under way, where it passes, makes this slot one that may be taken."""
        open_to_it = slot.tier is WashTier.FULL or need.may_follow(slot.tenant)
        return need.tier in slot.spec.tiers and slot.fault is None and open_to_it

    def lease(self, slot_ids: Iterable[str], session_id: str, fence: int, tenant: str) -> None:
        """Give free slots to a session under a fence."""
        for slot_id in slot_ids:
            slot = self._move(slot_id, SlotState.LEASED, f"lease {fence} of {session_id}")
            slot.holder, slot.fence, slot.tenant, slot.kept_for = session_id, fence, tenant, None

    def wash(self, slot_ids: Iterable[str], tier: WashTier, why: str) -> None:
        """Take slots away from their holder; they are nobody's until a certificate comes."""
        for slot_id in slot_ids:
            _order(self._move(slot_id, SlotState.WASHING, why), tier)

    def wash_again(self, slot_ids: Iterable[str]) -> None:
        """The wash of these slots was interrupted. It begins anew, and leaves nothing out."""
        for slot_id in slot_ids:
            _order(self._slots[slot_id], WashTier.FULL)
            self.touched[slot_id] = None

    def prevs(self, slot_ids: Iterable[str]) -> tuple[bytes, ...]:
        """What the next certificate of each of these slots must name as the one before it."""
        return tuple(self._slots[slot_id].prev for slot_id in slot_ids)

    def issue(self, certificate: Certificate) -> Slot:
        """Take the certificate of the wash that was ordered as the slot's newest. The slot is still washing.

        Raises `CertificateRejected` when it is for another device, another order or another place in the
        slot's chain, when it leaves out what was ordered, or when no certificate is awaited.
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
        if slot.pending is not None:
            raise CertificateRejected(slot.spec.id, f"this wash has its certificate, {slot.pending.hex()}")
        if certificate.prev != slot.prev:
            raise CertificateRejected(
                slot.spec.id, f"it follows {certificate.prev.hex()}, the newest is {slot.prev.hex()}"
            )
        if slot.tier is WashTier.FULL and certificate.tier is not WashTier.FULL:
            raise CertificateRejected(slot.spec.id, f"a {certificate.tier} wash, ordered was {slot.tier}")
        slot.tier = certificate.tier
        slot.prev = slot.pending = certificate.hash
        slot.head = certificate.record_hash
        slot.history.append(f"certificate {slot.prev.hex()} issued for {slot.fence}")
        del slot.history[:-16]
        self.touched[slot.spec.id] = None
        return slot

    def secure(self, slot_id: str, certificate_hash: bytes) -> None:
        """Free the slot whose certificate is now on the disk; old news is ignored. A slot whose health went
        bad meanwhile goes to quarantine instead."""
        slot = self._slots.get(slot_id)
        if slot is None or slot.state is not SlotState.WASHING or slot.pending != certificate_hash:
            return
        if slot.fault is not None:
            self.quarantine(slot_id, slot.fault)
            return
        slot.kept_for = slot.tenant if slot.tier is WashTier.LIGHT else None
        self._move(slot_id, SlotState.FREE, f"certificate {certificate_hash.hex()} for {slot.fence}")
        slot.holder = slot.pending = None

    def quarantine(self, slot_id: str, reason: str) -> None:
        """Lock a slot away after a negative finding; only a wash that passes brings it back."""
        slot = self._move(slot_id, SlotState.QUARANTINED, reason)
        slot.fault, slot.holder, slot.pending, slot.kept_for = reason, None, None, None

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

    def rewash(self, slot_id: str, fence: int, why: str) -> None:
        """A full wash that follows no lease: of a quarantined slot, or of one that was kept for a tenant. It
        has a fence of its own: a late certificate of an earlier wash must not free the slot in the middle of
        this one."""
        slot = self._move(slot_id, SlotState.WASHING, f"{why}: wash {fence}")
        slot.fault, slot.fence = None, fence
        _order(slot, WashTier.FULL)

    def _move(self, slot_id: str, to: SlotState, why: str) -> Slot:
        slot = self._slots[slot_id]
        if to not in SLOT_TRANSITIONS[slot.state]:
            raise ImpossibleTransition("slot", slot_id, slot.state, to, slot.history)
        self._unlist(slot)
        slot.history.append(f"{slot.state}->{to}: {why}")
        del slot.history[:-16]
        slot.state = to
        self._list(slot)
        self.touched[slot_id] = None
        return slot


def _order(slot: Slot, tier: WashTier) -> None:
    slot.tier, slot.pending, slot.kept_for = tier, None, None
