"""The wait line: first come, first served, and nobody overtakes at another's cost."""

from __future__ import annotations

import pytest

from gpu_server.core.sessions import Session, TaskType
from gpu_server.core.slots import BOTH_TIERS, Certificate, Slots, Tier
from gpu_server.core.waitline import WaitLine
from tests.core.story import device, work

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})


def session(name: str, gpus: int = 1, tier: Tier = Tier.LOW) -> Session:
    return Session(
        id=name,
        tenant="ann",
        workload=work(gpus=gpus),
        tier=tier,
        task_type=TaskType.SESSION,
        created_at=0.0,
        asked_for=True,
    )


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
        slots.free(Certificate(kind="teardown", slot_id=spec.id, slot_uuid=spec.uuid, fence=0))
    return slots


def starts(line: WaitLine, slots: Slots) -> list[tuple[str, tuple[str, ...]]]:
    """Who starts, one after the other, until nobody can."""
    started = []
    while (start := line.next_start(slots)) is not None:
        who, slot_ids = start
        line.leave(who.id)
        slots.lease(slot_ids, who.id, 1)
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
    assert line.could_start(gpus, tier, free_slots(BOTH_TIERS, HIGH)) is could


def test_could_start_with_nobody_before() -> None:
    """An empty line leaves every free slot, and no free slot is no start."""
    assert WaitLine().could_start(1, Tier.LOW, free_slots(BOTH_TIERS))
    assert not WaitLine().could_start(2, Tier.LOW, free_slots(BOTH_TIERS))
    assert not line_of(session("a")).could_start(1, Tier.LOW, free_slots())
