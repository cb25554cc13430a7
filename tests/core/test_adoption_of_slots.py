"""Adoption: what becomes of the slots, and of devices that come and go, when the service is restarted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import CertificateRejected, Refusal
from gpu_server.core.sessions import CloseReason, SessionState
from gpu_server.core.slots import NO_CERTIFICATE, SlotState, Tier, WashTier
from tests.core.story import Story, busy, device, only, own_washes, warm, work

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})
PAIR = work(gpus=2)


# -- slots


def test_a_session_that_was_taken_down_is_taken_down_again() -> None:
    """A wash whose end nobody saw does not count: its slots come back by a certificate of this life."""
    story = warm("g0", "g1")
    story.kill()
    assert own_washes(story.restart()) == [
        fx.WashSlots(
            session_id="s1",
            fence=1,
            slot_ids=("g0",),
            grace=10.0,
            tier=WashTier.FULL,
            prevs=(story.slot("g0").prev,),
            tenant="ann",
        )
    ]
    story.clean_up()
    assert (story.session().state, story.slot("g0").state) == (SessionState.CLOSED, SlotState.FREE)


def test_only_what_it_still_holds_is_washed_again() -> None:
    """Where one of its slots had its certificate, and was leased again, that one is another's."""
    story = Story("g0", "g1")
    story.submit("t1", workload=PAIR)
    story.ready()
    story.submit("t2")
    story.kill("s1")
    story.passes("g0")
    effects = story.restart()
    assert [(wash.session_id, wash.slot_ids) for wash in own_washes(effects)] == [("s1", ("g1",))]
    assert [adopt.session_id for adopt in only(effects, fx.AdoptWorker)] == ["s2"]


def test_a_wash_that_was_interrupted_is_still_that_of_its_lease() -> None:
    """Also where the session had closed: its container was seen gone, the certificate had not come yet. The
    redone wash carries its fence and its tenant, and `washed_after` gets the certificate."""
    story = warm("g0", "g1")
    story.kill()
    story.gone()
    washes = only(story.restart(), fx.WashSlots)
    told = [(wash.session_id, wash.tenant, wash.fence, wash.slot_ids, wash.tier) for wash in washes]
    assert told == [
        ("s1", "ann", 1, ("g0",), WashTier.FULL),
        (None, None, 2, ("g1",), WashTier.FULL),
    ]
    story.passes("g0")
    assert story.slot("g0").state is SlotState.FREE
    assert story.session().washed_after == (story.slot("g0").head.hex(),)
    (wash,) = only(story.restart(), fx.WashSlots)
    assert (wash.session_id, set(wash.slot_ids)) == (None, {"g0", "g1"})


def test_an_interrupted_wash_of_a_session_that_is_forgotten() -> None:
    """Nobody could ask for its certificate any more: it becomes the wash at the start."""
    story = warm("g0", ended_sessions_max=1)
    story.kill()
    story.gone()
    story.ask("s2")
    story.kill("s2")
    assert "s1" not in story.node.sessions
    (wash,) = only(story.restart(), fx.WashSlots)
    assert (wash.session_id, wash.fence, wash.slot_ids) == (None, 2, ("g0",))


def test_a_free_slot_is_washed_before_it_is_leased() -> None:
    """Nobody knows what happened to it meanwhile: one wash for all, under its own fence; then the
    line moves."""
    story = Story("g0", "g1")
    (wash,) = only(story.restart(), fx.WashSlots)
    assert (wash.session_id, wash.fence, set(wash.slot_ids)) == (None, 1, {"g0", "g1"})
    assert not only(story.submit("t1"), fx.StartWorker)
    assert [start.session_id for start in only(story.passes("g1"), fx.StartWorker)] == ["s1"]


def test_quarantine_survives() -> None:
    """With its reason; only an operator's wash brings the slot back."""
    story = Story("g0", "g1")
    story.is_faulty("g0", "xid 79")
    (wash,) = only(story.restart(), fx.WashSlots)
    assert wash.slot_ids == ("g1",)
    assert (story.slot("g0").state, story.slot("g0").fault) == (SlotState.QUARANTINED, "xid 79")
    story.order_wash("g0")
    story.passes("g0")
    assert story.slot("g0").state is SlotState.FREE


def test_a_fault_of_a_leased_slot_survives() -> None:
    """It waits for the end of the lease, however many lives that takes."""
    story = warm("g0")
    story.is_faulty("g0", "xid 79")
    story.restart()
    story.kill()
    story.clean_up()
    assert story.slot("g0").state is SlotState.QUARANTINED


def test_a_wash_that_an_operator_ordered_becomes_that_of_the_start() -> None:
    """Its certificate, should it still come, frees nothing."""
    story = Story("g0")
    story.is_faulty("g0")
    story.order_wash("g0")
    late = story.certificate("g0")
    (wash,) = only(story.restart(), fx.WashSlots)
    assert (wash.fence, wash.slot_ids) == (2, ("g0",))
    with pytest.raises(CertificateRejected, match="fence 1, ordered was 2"):
        story.tell(ev.CertificateIssued(certificate=late))


def test_fences_go_on() -> None:
    """A lease of this life has a higher fence than any before it."""
    story = warm("g0", "g1")
    story.restart()
    story.passes("g1")
    assert only(story.ask("s2"), fx.StartWorker)[0].fence == 3


def test_a_certificate_that_was_not_on_the_disk_counts_for_nothing_but_the_chain() -> None:
    """It was issued, and then the service was killed: the slot is washed again, and the next certificate
    names that one as the one before it."""
    story = warm("g0")
    story.kill()
    story.gone()
    again = story.certificate("g0")
    story.issued("g0")
    first = story.slot().prev
    (wash,) = own_washes(story.restart())
    assert (wash.slot_ids, wash.prevs, story.slot().pending) == (("g0",), (first,), None)
    story.tell(ev.CertificateSecured(slot_id="g0", certificate_hash=first))
    assert story.slot().state is SlotState.WASHING
    with pytest.raises(CertificateRejected, match="it follows"):
        story.tell(ev.CertificateIssued(certificate=again))
    story.passes("g0")
    assert story.slot().state is SlotState.FREE
    assert len(story.session().washed_after) == 2
    assert story.slot().prev not in (first, NO_CERTIFICATE)


def test_after_a_restart_every_wash_is_a_full_one() -> None:
    """Also where a light one was under way, or the slot was kept for a tenant."""
    story = warm("g0", "g1", light_wash=True)
    story.ask("s2")
    for name in ("s1", "s2"):
        assert own_washes(story.kill(name))[0].tier is WashTier.LIGHT
    story.gone("s2")
    story.passes("g1")
    assert story.slot("g1").kept_for == "ann"
    washes = only(story.restart(), fx.WashSlots)
    assert [(wash.slot_ids, wash.tier) for wash in washes] == [
        (("g0",), WashTier.FULL),
        (("g1",), WashTier.FULL),
    ]
    for slot_id in ("g0", "g1"):
        with pytest.raises(CertificateRejected, match="a light wash, ordered was full"):
            story.issued(slot_id, tier=WashTier.LIGHT)
        story.passes(slot_id)
        assert story.slot(slot_id).kept_for is None


def test_who_waits_through_a_restart_is_fetched_for_again() -> None:
    """The slots are being washed, and what was fetched before is not remembered."""
    story = warm("g0")
    story.ask("s2")
    (first,) = only(story.kill("s1"), fx.PrefetchModel)
    (again,) = only(story.restart(), fx.PrefetchModel)
    assert first.session_id == again.session_id == "s2"


def test_a_device_that_comes_back_is_not_freed_by_what_it_had_before() -> None:
    """Its chain begins anew, and even the first certificate of the old one is of another order."""
    story = Story("g0", "g1", washed=False)
    first = story.certificate("g0")
    story.passes("g0")
    story.restart("g1")
    story.restart("g0", "g1")
    assert story.slot("g0").prev == NO_CERTIFICATE
    with pytest.raises(CertificateRejected, match="fence 0, ordered was 2"):
        story.tell(ev.CertificateIssued(certificate=first))


# -- devices


def test_a_lost_device_ends_its_session() -> None:
    """With `slot_lost`; what is left of its slots is washed after it, and its tasks say why they failed."""
    story = Story("g0", "g1")
    story.submit("t1", workload=PAIR)
    story.ready()
    story.submit("t2", to="s1", workload=PAIR)
    effects = story.restart("g1")
    (wash,) = own_washes(effects)
    assert (wash.session_id, wash.fence, wash.slot_ids, wash.grace) == ("s1", 1, ("g1",), 10.0)
    assert wash.prevs == (story.slot("g1").prev,)
    assert not only(effects, fx.AdoptWorker)
    for task_id in ("t1", "t2"):
        assert story.names(task_id)[-2:] == ["error:slot_lost", "task_finish:failed"]
    story.clean_up()
    session = story.session()
    assert (session.state, session.close_reason) == (SessionState.FAILED, CloseReason.SLOT_LOST)
    assert session.failure is not None
    assert session.failure.message == "the device of slot g0 is not there any more"
    assert "g0" not in story.node.slots


def test_a_replaced_device_is_a_lost_one_and_a_new_one() -> None:
    """The new one has the old one's place, nothing of its state, and is washed before it serves."""
    story = busy("t1")
    new = replace(device("g0"), uuid="GPU-new")
    effects = story.restart(new)
    assert [wash.slot_ids for wash in only(effects, fx.WashSlots)] == [(), ("g0",)]
    assert story.names("t1")[-2:] == ["error:slot_lost", "task_finish:failed"]
    old = story.certificate("g0", slot_uuid="GPU-g0")
    with pytest.raises(CertificateRejected, match="it names device GPU-g0"):
        story.tell(ev.CertificateIssued(certificate=old))
    story.gone()
    assert only(story.submit("t2"), fx.StartWorker) == []
    assert only(story.passes("g0"), fx.StartWorker)


def test_a_device_that_was_locked_away_and_replaced_is_a_new_one() -> None:
    """The quarantine was the old one's."""
    story = Story("g0")
    story.is_faulty("g0")
    story.restart(replace(device("g0"), uuid="GPU-new"))
    assert (story.slot("g0").state, story.slot("g0").fault) == (SlotState.WASHING, None)


def test_a_device_lost_under_a_session_that_is_taken_down() -> None:
    """There is nothing left to certify; the session closes when its container is gone."""
    story = warm("g0")
    story.kill()
    (wash,) = own_washes(story.restart("g1"))
    assert wash.slot_ids == ()
    story.gone()
    assert story.session().state is SessionState.CLOSED


def test_numbers_stay_with_their_devices() -> None:
    """Other devices come and go, and nobody's number changes; a number that is free again is given again."""
    story = Story("g0", "g1", "g2")
    assert [story.slot(name).number for name in ("g0", "g1", "g2")] == [0, 1, 2]
    story.restart("g2", "g1")
    assert [story.slot(name).number for name in ("g1", "g2")] == [1, 2]
    story.restart("g5", "g2", "g1", "g6")
    assert [story.slot(name).number for name in ("g1", "g2", "g5", "g6")] == [1, 2, 0, 3]


def test_tiers_may_change_between_two_lives() -> None:
    """The devices serve what the settings say now; a session that runs is not asked again."""
    story = Story(device("g0", LOW), device("g1", LOW))
    story.submit("t1")
    story.ready()
    effects = story.restart(device("g0", HIGH), device("g1", HIGH))
    assert only(effects, fx.AdoptWorker)
    with pytest.raises(Refusal, match="serve difficulty low; this node has 0"):
        story.ask("s2", tier=Tier.LOW)
    story.passes("g1")
    assert only(story.ask("s3", tier=Tier.HIGH), fx.StartWorker)[0].slot_ids == ("g1",)


# -- reboots


def test_a_reboot_ends_all_sessions() -> None:
    """Nothing of them runs any more: with `node_restarted`, also for those that waited."""
    story = Story("g0", "g1", "g2")
    for number, kind in ((1, work()), (2, PAIR), (3, work(gpus=3))):
        story.submit(f"t{number}", workload=kind)
    story.ready("s1")
    effects = story.restart(rebooted=True)
    assert not only(effects, fx.AdoptWorker)
    assert [wash.session_id for wash in own_washes(effects)] == ["s1", "s2"]
    for number in (1, 2, 3):
        assert story.names(f"t{number}")[-2:] == ["error:node_restarted", "task_finish:failed"]
    story.clean_up("s1")
    story.clean_up("s2")
    assert {session.close_reason for session in story.node.sessions.values()} == {CloseReason.NODE_RESTARTED}
    assert not list(story.node.live_sessions())


def test_a_reboot_starts_nobody() -> None:
    """Who waits behind one that ends does not get a slot that nobody has washed."""
    story = Story("g0", "g1")
    story.ask("s1")
    story.ask("s2", workload=PAIR)
    story.ask("s3")
    story.ask("s4")
    effects = story.restart(rebooted=True)
    assert not only(effects, fx.StartWorker)
    assert [wash.slot_ids for wash in only(effects, fx.WashSlots)] == [("g0",), ("g1",)]


def test_a_device_may_be_lost_in_a_reboot() -> None:
    """The session ends for the reboot, and what is left of its slots is washed."""
    story = Story("g0", "g1")
    story.submit("t1", workload=PAIR)
    story.ready()
    (wash,) = own_washes(story.restart("g1", rebooted=True))
    assert wash.slot_ids == ("g1",)
    assert story.session().close_reason is CloseReason.NODE_RESTARTED
