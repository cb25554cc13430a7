"""The wait line: first come, first served, and nobody overtakes at another's cost."""

from __future__ import annotations

import pytest

from gpu_server.core.sessions import Session, TaskType
from gpu_server.core.slots import BOTH_TIERS, Need, Slots, Tier, WashTier
from gpu_server.core.waitline import WaitLine
from tests.core.papers import certificate_for
from tests.core.story import SEALING, device, work

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})


def session(name: str, gpus: int = 1, tier: Tier = Tier.LOW, tenant: str = "ann") -> Session:
    return Session(
        id=name,
        tenant=tenant,
        workload=work(gpus=gpus),
        tier=tier,
        task_type=TaskType.SESSION,
        created_at=0.0,
        asked_for=True,
    )


def need(count: int, tier: Tier = Tier.LOW, tenant: str = "ann", *, sealed: bool = False) -> Need:
    return Need(count=count, tier=tier, tenant=tenant, sealed=sealed)


def line_of(*sessions: Session) -> WaitLine:
    line = WaitLine()
    for one in sessions:
        line.join(one)
    return line


def free_slots(*tiers: frozenset[Tier]) -> Slots:
    """Free slots g0, g1, ... that serve these tiers."""
    slots = Slots()
    for index, serves in enumerate(tiers):
        spec = slots.add(device(f"g{index}", serves)).spec
        pass_wash(slots, spec.id)
    return slots


def pass_wash(slots: Slots, slot_id: str) -> None:
    slots.secure(slot_id, slots.issue(certificate_for(slots[slot_id])).prev)


def keep(slots: Slots, slot_id: str, tenant: str) -> None:
    """Lease a free slot to this tenant, and wash it lightly afterwards."""
    slots.lease([slot_id], "before", 1, tenant)
    slots.wash([slot_id], WashTier.LIGHT, "over")
    pass_wash(slots, slot_id)


def starts(line: WaitLine, slots: Slots) -> list[tuple[str, tuple[str, ...]]]:
    """Who starts, one after the other, until nobody can."""
    started = []
    while (start := line.next_start(slots)) is not None:
        who, slot_ids = start
        line.leave(who.id)
        slots.lease(slot_ids, who.id, 1, who.tenant)
        started.append((who.id, slot_ids))
    return started


def test_the_line_keeps_the_order_of_joining() -> None:
    """Who joins is at the end, who leaves is gone, and leaving twice is leaving once."""
    line = line_of(session("a"), session("b"), session("c"))
    line.leave("b")
    line.leave("b")
    assert [one.id for one in line] == ["a", "c"]
    assert len(line) == 2
    assert "a" in line
    assert "b" not in line


def test_first_come_first_served() -> None:
    """With two slots for three, the first two start."""
    line = line_of(session("a"), session("b"), session("c"))
    assert starts(line, free_slots(BOTH_TIERS, BOTH_TIERS)) == [("a", ("g0",)), ("b", ("g1",))]


def test_a_large_lease_is_not_starved() -> None:
    """A lease of two keeps the one free slot from the lease of one behind it."""
    line = line_of(session("pair", gpus=2), session("one"))
    assert starts(line, free_slots(BOTH_TIERS)) == []


def test_slots_that_nobody_before_can_use_are_taken_at_once() -> None:
    """A high task does not wait behind low ones for a slot that serves high alone."""
    line = line_of(session("pair", gpus=2), session("fast", tier=Tier.HIGH))
    assert starts(line, free_slots(BOTH_TIERS, HIGH)) == [("fast", ("g1",))]


def test_a_slot_of_both_tiers_goes_to_the_first() -> None:
    """Whoever came first reserves what it would take, also from the other tier."""
    line = line_of(session("pair", gpus=2), session("fast", tier=Tier.HIGH))
    assert starts(line, free_slots(BOTH_TIERS)) == []


def test_what_is_left_over_goes_to_the_next() -> None:
    """Three slots: two for the pair, and the third for whoever comes then."""
    line = line_of(session("pair", gpus=2), session("a"), session("b"))
    slots = free_slots(BOTH_TIERS, BOTH_TIERS, BOTH_TIERS)
    assert starts(line, slots) == [("pair", ("g0", "g1")), ("a", ("g2",))]


@pytest.mark.parametrize(
    ("gpus", "tier", "could"),
    [(1, Tier.HIGH, True), (1, Tier.LOW, False), (2, Tier.HIGH, False)],
)
def test_could_start_asks_from_the_end_of_the_line(gpus: int, tier: Tier, could: bool) -> None:
    """Someone new could start only with what those in the line leave over."""
    line = line_of(session("pair", gpus=2))
    assert line.could_start(need(gpus, tier), free_slots(BOTH_TIERS, HIGH)) is could


def test_could_start_with_nobody_before() -> None:
    """An empty line leaves every free slot, and no free slot is no start."""
    assert WaitLine().could_start(need(1), free_slots(BOTH_TIERS))
    assert not WaitLine().could_start(need(2), free_slots(BOTH_TIERS))
    assert not line_of(session("a")).could_start(need(1), free_slots())


# -- slots that are kept for a tenant


@pytest.mark.parametrize(
    ("tenant", "sealed", "could"), [("ann", False, True), ("ann", True, False), ("bob", False, False)]
)
def test_a_kept_slot_is_for_its_tenant_alone(tenant: str, sealed: bool, could: bool) -> None:
    """And for nothing sealed."""
    slots = free_slots(BOTH_TIERS)
    keep(slots, "g0", "ann")
    who = session("a", tenant=tenant)
    who.sealing = SEALING if sealed else None
    assert WaitLine().could_start(need(1, tenant=tenant, sealed=sealed), slots) is could
    assert starts(line_of(who), slots) == ([("a", ("g0",))] if could else [])


def test_its_tenant_does_not_overtake_whom_a_kept_slot_is_washed_for() -> None:
    """Whoever comes first and lacks a slot has a claim to it: one tenant's leases do not go round and round
    before a lease of two."""
    slots = free_slots(BOTH_TIERS, BOTH_TIERS)
    keep(slots, "g0", "ann")
    line = line_of(session("pair", gpus=2, tenant="bob"), session("one", tenant="ann"))
    assert starts(line, slots) == []
    assert not line.could_start(need(1), slots)
    (first, claim), *rest = line.claims(slots)
    assert (first.id, claim.free, claim.coming, claim.kept) == ("pair", ("g1",), (), ("g0",))
    assert rest == []


def test_a_kept_slot_that_nobody_before_needs_may_be_taken() -> None:
    """Where enough is being washed for the first of the line already, the second takes what is its own."""
    slots = free_slots(BOTH_TIERS, BOTH_TIERS)
    keep(slots, "g0", "ann")
    slots.lease(["g1"], "before", 2, "eve")
    slots.wash(["g1"], WashTier.FULL, "over")
    line = line_of(session("first", tenant="bob"), session("second", tenant="ann"))
    assert starts(line, slots) == [("second", ("g0",))]
    ((first, claim),) = line.claims(slots)
    assert (first.id, claim.coming, claim.kept) == ("first", ("g1",), ())


@pytest.mark.parametrize(("tier", "coming"), [(WashTier.FULL, ("g0",)), (WashTier.LIGHT, ())])
def test_a_light_wash_helps_nobody_else(tier: WashTier, coming: tuple[str, ...]) -> None:
    """Only what will be free for a session counts as coming; one that is known to be bad will not."""
    slots = free_slots(BOTH_TIERS)
    slots.lease(["g0"], "before", 1, "ann")
    slots.wash(["g0"], tier, "over")
    (claim,) = [claim for _, claim in line_of(session("b", tenant="bob")).claims(slots)]
    assert claim.coming == coming
    (own,) = [claim for _, claim in line_of(session("a", tenant="ann")).claims(slots)]
    assert own.coming == ("g0",)
    slots.report_check("g0", "xid 79", None)
    assert [claim.all for _, claim in line_of(session("a")).claims(slots)] == [()]
