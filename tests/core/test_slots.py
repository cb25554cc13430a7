"""Slots: allocation by tier, and the one way back to free."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from gpu_server.core.errors import CertificateRejected, ImpossibleTransition
from gpu_server.core.slots import (
    BOTH_TIERS,
    NO_CERTIFICATE,
    SLOT_TRANSITIONS,
    Need,
    Slots,
    SlotState,
    Tier,
    WashTier,
)
from tests.core.papers import certificate_for
from tests.core.story import device

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})


ANN = Need(count=1, tier=Tier.LOW, tenant="ann", sealed=False)
BOB = replace(ANN, tenant="bob")
SEALED_ANN = replace(ANN, sealed=True)


def need(count: int, tier: Tier = Tier.LOW) -> Need:
    return Need(count=count, tier=tier, tenant="ann", sealed=False)


def passes(slots: Slots, slot_id: str = "g0", **lies: object) -> None:
    """The wash of this slot passes, and its certificate is on the disk."""
    slots.secure(slot_id, slots.issue(certificate_for(slots[slot_id], **lies)).prev)


def clean(**tiers: frozenset[Tier]) -> Slots:
    """Free slots of these ids and tiers."""
    slots = Slots()
    for slot_id, serves in tiers.items():
        slots.add(device(slot_id, serves))
        passes(slots, slot_id)
    return slots


def ended(fence: int = 3, tier: WashTier = WashTier.FULL) -> Slots:
    """One slot `g0`, which is washed after a lease of ann's."""
    slots = clean(g0=BOTH_TIERS)
    slots.lease(["g0"], "s1", fence, "ann")
    slots.wash(["g0"], tier, "over")
    return slots


def slot_in(state: SlotState) -> Slots:
    """One slot `g0`, brought to this state by the usual way."""
    slots = Slots()
    slots.add(device("g0"))
    if state is SlotState.QUARANTINED:
        slots.quarantine("g0", "memory is in use")
    elif state is not SlotState.WASHING:
        passes(slots)
        if state is SlotState.LEASED:
            slots.lease(["g0"], "s1", 1, "ann")
    return slots


@pytest.mark.parametrize(("state", "to"), list(itertools.product(SlotState, SlotState)))
def test_a_slot_follows_its_table(state: SlotState, to: SlotState) -> None:
    """Every move is either in the table or an error that tells the slot's story."""
    slots = slot_in(state)
    if to in SLOT_TRANSITIONS[state]:
        slots._move("g0", to, "test")
        assert slots["g0"].state is to
        assert slots["g0"].history[-1] == f"{state}->{to}: test"
        return
    with pytest.raises(ImpossibleTransition, match=f"slot g0: {state} -> {to} is impossible") as raised:
        slots._move("g0", to, "test")
    assert all(move in str(raised.value) for move in slots["g0"].history)
    assert slots["g0"].state is state


def test_only_washing_leads_to_free() -> None:
    """The table itself knows no other way to free, and none from quarantine but by a wash."""
    assert [state for state, to in SLOT_TRANSITIONS.items() if SlotState.FREE in to] == [SlotState.WASHING]
    assert SLOT_TRANSITIONS[SlotState.QUARANTINED] == {SlotState.WASHING}


def test_a_new_slot_is_not_free() -> None:
    """Nobody knows what a device holds when the node starts, so it waits for its first certificate."""
    slots = Slots()
    slots.add(device("g0"))
    assert slots["g0"].state is SlotState.WASHING
    assert slots.free_count == 0
    assert slots.choose(need(1, Tier.LOW)) == ()
    passes(slots)
    assert slots.choose(need(1, Tier.LOW)) == ("g0",)


def test_a_leased_slot_knows_its_holder_and_fence() -> None:
    """Who holds a slot, and under which fence, is written on the slot."""
    slots = clean(g0=BOTH_TIERS, g1=BOTH_TIERS)
    slots.lease(["g1"], "s1", 7, "ann")
    assert (slots["g1"].holder, slots["g1"].fence) == ("s1", 7)
    assert slots.free_count == 1
    slots.wash(["g1"], WashTier.FULL, "over")
    passes(slots, "g1")
    assert (slots["g1"].holder, slots.free_count) == (None, 2)


def test_slots_of_one_tier_go_first() -> None:
    """A slot that serves both tiers stays open for the other as long as one of this tier alone is free."""
    slots = clean(both=BOTH_TIERS, low=LOW, high=HIGH)
    assert slots.choose(need(1, Tier.LOW)) == ("low",)
    assert slots.choose(need(1, Tier.HIGH)) == ("high",)
    assert slots.choose(need(2, Tier.HIGH)) == ("high", "both")
    assert slots.choose(need(3, Tier.HIGH)) == ("high", "both")


def test_reserved_slots_are_not_chosen() -> None:
    """What is kept for someone else is not there."""
    slots = clean(g0=BOTH_TIERS, g1=BOTH_TIERS)
    assert slots.choose(need(2, Tier.LOW), frozenset({"g0"})) == ("g1",)


def test_serving_counts_slots_in_any_state() -> None:
    """What could ever serve a tier does not depend on who holds it now."""
    slots = clean(a=LOW, b=BOTH_TIERS, c=HIGH, d=HIGH)
    slots.lease(["a"], "s1", 1, "ann")
    slots.report_check("c", "ecc", None)
    assert (slots.serving(Tier.LOW), slots.serving(Tier.HIGH)) == (2, 3)


def test_slots_can_be_asked_for() -> None:
    """The collection knows its size, its members and their order."""
    slots = clean(a=LOW, b=HIGH)
    assert len(slots) == 2
    assert "a" in slots
    assert "z" not in slots
    assert [slot.spec.id for slot in slots] == ["a", "b"]


# -- from washing to free


@pytest.mark.parametrize(
    ("lies", "why"),
    [
        ({"slot_id": "g9"}, "no such slot"),
        ({"slot_uuid": "GPU-g1"}, "it names device GPU-g1"),
        ({"fence": 2}, "fence 2, ordered was 3"),
        ({"fence": 4}, "fence 4, ordered was 3"),
        ({"prev": NO_CERTIFICATE}, "it follows 0000"),
        ({"tier": WashTier.LIGHT}, "a light wash, ordered was full"),
    ],
)
def test_a_certificate_of_something_else_is_rejected(lies: dict[str, Any], why: str) -> None:
    """It must be for this device, for the wash that was ordered, and the next one of this slot's chain."""
    slots = ended(fence=3)
    before = repr(slots["g0"])
    with pytest.raises(CertificateRejected, match=why):
        slots.issue(certificate_for(slots["g0"], **lies))
    assert repr(slots["g0"]) == before
    assert slots.free_count == 0


@pytest.mark.parametrize("state", [SlotState.FREE, SlotState.LEASED, SlotState.QUARANTINED])
def test_a_certificate_without_a_wash_is_rejected(state: SlotState) -> None:
    """A slot that nobody washes cannot be freed, whatever the paper says."""
    slots = slot_in(state)
    with pytest.raises(CertificateRejected, match=f"the slot is {state}, no wash was ordered"):
        slots.issue(certificate_for(slots["g0"]))
    assert slots["g0"].state is state


def test_a_certificate_frees_its_slot_when_it_is_on_the_disk() -> None:
    """Until then the slot is washing, and takes no other; afterwards it is the newest of the chain."""
    slots = ended()
    first, certificate = slots["g0"].prev, certificate_for(slots["g0"])
    assert slots.prevs(["g0"]) == (first,)
    slot = slots.issue(certificate)
    assert (slot.state, slot.pending, slot.holder) == (SlotState.WASHING, certificate.hash, "s1")
    assert (slot.prev, slot.head) == (certificate.hash, certificate.record_hash)
    assert slots.choose(ANN) == ()
    with pytest.raises(CertificateRejected, match="this wash has its certificate"):
        slots.issue(certificate_for(slot))
    slots.secure("g0", certificate.hash)
    assert (slot.state, slot.pending, slot.holder) == (SlotState.FREE, None, None)
    assert slots.choose(ANN) == ("g0",)


def test_old_news_of_the_disk_frees_nothing() -> None:
    """Of another certificate, another slot, or a wash that was begun anew since."""
    slots = ended()
    before = slots["g0"].prev
    slots.secure("g0", before)
    certificate = certificate_for(slots["g0"])
    slots.secure("g0", certificate.hash)
    slots.issue(certificate)
    slots.secure("g0", before)
    slots.secure("g9", certificate.hash)
    assert slots["g0"].state is SlotState.WASHING
    slots.wash_again(["g0"])
    slots.secure("g0", certificate.hash)
    assert slots["g0"].state is SlotState.WASHING
    passes(slots)
    slots.secure("g0", certificate.hash)
    assert slots["g0"].state is SlotState.FREE


def test_bad_news_between_the_certificate_and_the_disk() -> None:
    """A slot that is locked away stays so; one that is found faulty is locked away in the end."""
    slots = ended()
    certificate = certificate_for(slots["g0"])
    slots.issue(certificate)
    slots.quarantine("g0", "the second look")
    slots.secure("g0", certificate.hash)
    assert (slots["g0"].state, slots["g0"].pending) == (SlotState.QUARANTINED, None)
    slots.rewash("g0", 9, "asked")
    certificate = certificate_for(slots["g0"])
    slots.issue(certificate)
    slots.report_check("g0", "xid 79", None)
    slots.secure("g0", certificate.hash)
    assert (slots["g0"].state, slots["g0"].fault) == (SlotState.QUARANTINED, "xid 79")


# -- light washes


def test_a_light_wash_keeps_the_slot_for_its_tenant() -> None:
    """Only she may have it next, and not for what is sealed; whoever else needs it must have it washed."""
    slots = ended(tier=WashTier.LIGHT)
    passes(slots)
    assert (slots["g0"].state, slots["g0"].kept_for) == (SlotState.FREE, "ann")
    assert (slots.choose(ANN), slots.choose(BOB), slots.choose(SEALED_ANN)) == (("g0",), (), ())
    assert slots.claim(BOB).kept == slots.claim(SEALED_ANN).kept == ("g0",)
    assert slots.free_count == 1
    slots.rewash("g0", 4, "bob waits")
    assert (slots["g0"].state, slots["g0"].kept_for) == (SlotState.WASHING, None)
    assert slots.claim(BOB).coming == ("g0",)
    with pytest.raises(CertificateRejected, match="a light wash"):
        passes(slots, tier=WashTier.LIGHT)
    passes(slots)
    assert slots.choose(BOB) == slots.choose(SEALED_ANN) == ("g0",)


def test_a_full_wash_may_answer_the_order_for_a_light_one() -> None:
    """And then the slot is anyone's."""
    slots = ended(tier=WashTier.LIGHT)
    passes(slots, tier=WashTier.FULL)
    assert (slots["g0"].kept_for, slots.choose(BOB)) == (None, ("g0",))


def test_the_next_lease_ends_the_keeping() -> None:
    """It is of the tenant who had it last, whoever had it before."""
    slots = ended(tier=WashTier.LIGHT)
    passes(slots)
    slots.lease(["g0"], "s2", 4, "ann")
    slots.wash(["g0"], WashTier.FULL, "over")
    passes(slots)
    slots.lease(["g0"], "s3", 5, "bob")
    slots.wash(["g0"], WashTier.LIGHT, "over")
    passes(slots)
    assert slots["g0"].kept_for == "bob"


def test_slots_that_are_kept_for_a_tenant_go_first() -> None:
    """So that those that are open stay open for everyone; the tier comes before that."""
    slots = clean(open=BOTH_TIERS, kept=BOTH_TIERS, low=LOW)
    slots.lease(["kept"], "s1", 1, "ann")
    slots.wash(["kept"], WashTier.LIGHT, "over")
    passes(slots, "kept")
    assert slots.choose(need(3)) == ("low", "kept", "open")
    assert slots.choose(replace(BOB, count=3)) == ("low", "open")


def test_a_claim_is_no_larger_than_its_need() -> None:
    """First what is free, then what is being washed, and what is kept for others only where that is too
    little."""
    slots = clean(free=BOTH_TIERS, kept=BOTH_TIERS, also=BOTH_TIERS)
    for fence, slot_id in enumerate(("kept", "also"), 1):
        slots.lease([slot_id], "s1", fence, "bob")
        slots.wash([slot_id], WashTier.LIGHT, "over")
        passes(slots, slot_id)
    slots.add(device("new"))
    claims = [slots.claim(need(count)) for count in (1, 2, 3, 9)]
    assert [claim.free for claim in claims] == [("free",)] * 4
    assert [claim.coming for claim in claims] == [(), ("new",), ("new",), ("new",)]
    assert [claim.kept for claim in claims] == [(), (), ("kept",), ("kept", "also")]
    assert slots.claim(need(2), {"free", "new"}).all == ("kept", "also")
    slots.report_check("kept", None, "NVML did not answer")
    assert slots.claim(need(3)).kept == ("also",)


# -- health


def test_a_free_slot_with_a_fault_is_quarantined_at_once() -> None:
    """A bad device is not leased from the moment it is known to be bad."""
    slots = clean(g0=BOTH_TIERS)
    slots.report_check("g0", "xid 79", None)
    assert slots["g0"].state is SlotState.QUARANTINED
    assert slots.choose(need(1, Tier.LOW)) == ()


@pytest.mark.parametrize("state", [SlotState.LEASED, SlotState.WASHING])
def test_a_slot_in_use_with_a_fault_is_quarantined_after_its_wash(state: SlotState) -> None:
    """Bad news waits for the wash, and then a good certificate does not help."""
    slots = slot_in(state)
    slots.report_check("g0", "xid 79", None)
    assert slots["g0"].state is state
    if state is SlotState.LEASED:
        slots.wash(["g0"], WashTier.FULL, "over")
    passes(slots)
    assert slots["g0"].state is SlotState.QUARANTINED
    assert slots["g0"].fault == "xid 79"


def test_a_fault_that_went_away_is_forgotten() -> None:
    """A slot that is found healthy before its wash is over comes back."""
    slots = slot_in(SlotState.WASHING)
    slots.report_check("g0", "too hot", None)
    slots.report_check("g0", None, None)
    passes(slots)
    assert slots["g0"].state is SlotState.FREE


def test_good_news_does_not_end_a_quarantine() -> None:
    """Only a wash that passes brings a quarantined slot back."""
    slots = slot_in(SlotState.QUARANTINED)
    slots.report_check("g0", None, None)
    assert slots["g0"].state is SlotState.QUARANTINED
    assert slots["g0"].fault == "memory is in use"


def test_a_second_wash_has_a_fence_of_its_own() -> None:
    """A late certificate of the first wash does not free the slot in the middle of the second."""
    slots = slot_in(SlotState.QUARANTINED)
    slots.rewash("g0", 5, "asked")
    with pytest.raises(CertificateRejected, match="ordered was 5"):
        slots.issue(certificate_for(slots["g0"], fence=0))
    passes(slots)
    assert slots["g0"].state is SlotState.FREE


def test_a_slot_remembers_its_last_moves_only() -> None:
    """The history helps to explain and does not grow without end."""
    slots = clean(g0=BOTH_TIERS)
    for fence in range(1, 20):
        slots.lease(["g0"], "s1", fence, "ann")
        slots.wash(["g0"], WashTier.FULL, "over")
        passes(slots)
    assert len(slots["g0"].history) == 16


@pytest.mark.parametrize(
    ("name", "meant"),
    [("all", True), ("g0", True), ("GPU-g0", True), ("GPU-g", True), ("GPU-", False), ("g1", False)],
)
def test_a_gpu_has_several_names(name: str, meant: bool) -> None:
    """Its UUID, a prefix that says more than "GPU-", its index, or all of them."""
    assert device("g0").is_meant_by(name) is meant


def test_a_stand_in_is_nobodys_gpu() -> None:
    """Whoever asks for all GPUs does not mean a CPU."""
    assert not replace(device("g0"), is_gpu=False).is_meant_by("all")


def test_a_doubt_keeps_a_slot_from_being_leased_while_it_lasts() -> None:
    """A device that does not answer may be good or bad: nobody gets it until it answers."""
    slots = slot_in(SlotState.FREE)
    slots.report_check("g0", None, "NVML did not answer")
    assert (slots.choose(need(1, Tier.LOW)), slots["g0"].state) == ((), SlotState.FREE)
    slots.report_check("g0", None, None)
    assert slots.choose(need(1, Tier.LOW)) == ("g0",)


# -- devices that come and go


def test_a_new_slot_gets_the_lowest_number_that_is_free() -> None:
    """No two slots share one, and nobody's changes."""
    slots = clean(a=LOW, b=LOW, c=LOW)
    slots.remove("b")
    assert (slots.add(device("d")).number, slots.add(device("e")).number) == (1, 3)
    assert [slot.number for slot in slots] == [0, 2, 1, 3]


@pytest.mark.parametrize("state", list(SlotState))
def test_a_slot_that_is_removed_is_nowhere(state: SlotState) -> None:
    """Whatever state it was in: it is not chosen, and does not count."""
    slots = slot_in(state)
    slots.remove("g0")
    assert "g0" not in slots
    assert (slots.free_count, slots.serving(Tier.LOW), slots.choose(need(1, Tier.LOW))) == (0, 0, ())
    assert slots.washing_count == 0


@pytest.mark.parametrize("state", list(SlotState))
def test_a_slot_may_serve_other_tiers_than_before(state: SlotState) -> None:
    """It is the same slot in the same state, and is found where it serves now."""
    slots = slot_in(state)
    slots.describe(device("g0", HIGH))
    assert slots["g0"].state is state
    assert (slots.serving(Tier.LOW), slots.serving(Tier.HIGH)) == (0, 1)
    free = state is SlotState.FREE
    assert (slots.choose(need(1, Tier.LOW)), slots.choose(need(1, Tier.HIGH))) == (
        (),
        ("g0",) if free else (),
    )


@pytest.mark.parametrize("state", list(SlotState))
def test_the_wash_at_the_start_takes_a_slot_from_wherever_it_is(state: SlotState) -> None:
    """It is nobody's, under a fence of its own, and its certificate frees it."""
    slots = slot_in(state)
    slots.begin_wash("g0", 9)
    slot = slots["g0"]
    assert (slot.state, slot.holder, slot.fence, slots.free_count) == (SlotState.WASHING, None, 9, 0)
    assert (slots.washing_count, slot.tier, slot.pending) == (1, WashTier.FULL, None)
    if slot.fault is None:
        passes(slots)
        assert slots.choose(need(1, Tier.LOW)) == ("g0",)


def test_what_has_changed_is_gathered() -> None:
    """Each slot once, until somebody has asked; a check that finds nothing new changes nothing."""
    slots = clean(a=LOW, b=LOW)
    slots.touched.clear()
    slots.report_check("a", None, None)
    slots.report_check("a", None, "no answer")
    assert not slots.touched
    slots.lease(["b"], "s1", 1, "ann")
    slots.report_check("b", "xid 79", None)
    slots.wash(["b"], WashTier.FULL, "over")
    assert list(slots.touched) == ["b"]
    slots.remove("a")
    assert list(slots.touched) == ["b", "a"]
