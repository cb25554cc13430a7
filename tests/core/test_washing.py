"""Washing: which wash is ordered when, what its certificate is good for, and who waits for it."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import CertificateRejected, Refusal, RefusalCode
from gpu_server.core.sessions import CloseReason, SessionState, TaskType
from gpu_server.core.slots import NO_CERTIFICATE, SlotState, WashTier
from tests.core.invariants import snapshot
from tests.core.papers import judge, paper_for
from tests.core.story import SEALING, Story, busy, only, own_washes, sealed, warm, work

ONCE = work(wash_per_task=True)
PAIR = work(gpus=2)


def kept(*slots: str, **rules: float) -> Story:
    """Slot `g0` was ann's, and is kept for her; others are free."""
    story = warm(*(slots or ("g0",)), light_wash=True, **rules)
    story.kill()
    story.clean_up()
    assert story.slot("g0").kept_for == "ann"
    return story


# -- certificates


@pytest.mark.parametrize(
    "lies",
    [
        {"slot_id": "g1"},
        {"slot_id": "g9"},
        {"slot_uuid": "GPU-g1"},
        {"fence": 0},
        {"fence": 2},
        {"prev": NO_CERTIFICATE},
        {"tier": WashTier.LIGHT},
        {"result": "failed"},
    ],
)
def test_a_certificate_of_something_else_frees_nothing(lies: dict[str, Any]) -> None:
    """Another slot, device, order or chain, less than was ordered, or a wash that did not pass: it is
    rejected, and nothing has changed."""
    story = warm("g0", "g1")
    story.kill("s1")
    before = snapshot(story.node)
    with pytest.raises(CertificateRejected):
        story.tell(ev.CertificateIssued(certificate=paper_for(story.slot("g0"), **lies).signed()))
    assert snapshot(story.node) == before


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff" * 100])
def test_what_is_no_certificate_frees_nothing(raw: bytes) -> None:
    """The judge says so, and the slot is as it was."""
    story = Story("g0", washed=False)
    with pytest.raises(CertificateRejected, match=r"slot \?"):
        story.tell(ev.CertificateIssued(certificate=raw))
    assert story.slot().state is SlotState.WASHING


def test_a_certificate_counts_once() -> None:
    """In its wash, and in every later one."""
    story = warm()
    story.kill("s1")
    story.gone()
    certificate = ev.CertificateIssued(certificate=story.certificate("g0"))
    story.tell(certificate)
    with pytest.raises(CertificateRejected, match="this wash has its certificate"):
        story.tell(certificate)
    story.secured("g0")
    with pytest.raises(CertificateRejected, match="no wash was ordered"):
        story.tell(certificate)
    story.ask("s2")
    story.kill("s2")
    with pytest.raises(CertificateRejected, match="fence 1, ordered was 2"):
        story.tell(certificate)


def test_a_slot_is_free_when_its_certificate_is_on_the_disk() -> None:
    """The decision asks for that, and until the answer comes nobody gets the slot."""
    story = warm()
    story.ask("s2")
    story.kill("s1")
    story.gone()
    certificate = judge(story.certificate("g0"))
    (secure,) = story.issued("g0")
    assert secure == fx.SecureCertificate(slot_id="g0", certificate_hash=certificate.hash)
    assert certificate.record_hash.hex() in story.journal.certificates()
    assert story.session("s2").state is SessionState.WAITING
    story.tell(ev.CertificateSecured(slot_id="g0", certificate_hash=certificate.prev))
    assert story.slot().state is SlotState.WASHING
    assert [start.session_id for start in only(story.secured("g0"), fx.StartWorker)] == ["s2"]
    assert story.session("s2").washed_before == (certificate.record_hash.hex(),)
    assert story.session("s1").washed_after == (certificate.record_hash.hex(),)


def test_a_wash_that_fails_in_the_end_frees_nothing() -> None:
    """What was found after the certificate has the last word."""
    story = warm()
    story.kill("s1")
    story.issued("g0")
    story.fails("g0")
    story.secured("g0")
    assert (story.slot().state, story.slot().pending) == (SlotState.QUARANTINED, None)


def test_every_slot_has_a_chain_of_its_own() -> None:
    """Each order names the newest certificate of each of its slots."""
    story = Story("g0", "g1")
    story.ask("s1", workload=PAIR)
    (first,) = own_washes(story.kill())
    assert first.prevs == (story.slot("g0").prev, story.slot("g1").prev)
    assert len({NO_CERTIFICATE, *first.prevs}) == 3
    story.clean_up()
    story.ask("s2", workload=PAIR)
    (second,) = own_washes(story.kill("s2"))
    assert not set(first.prevs) & set(second.prevs)
    assert (second.tier, second.tenant) == (WashTier.FULL, "ann")


def test_a_tombstone_that_is_forgotten_misses_nothing() -> None:
    """A wash may last longer than its session is remembered."""
    story = warm(tombstone_retention=5)
    story.kill()
    story.gone()
    story.after(10)
    assert "s1" not in story.node.sessions
    story.passes("g0")
    assert story.slot().state is SlotState.FREE


# -- light and full


@pytest.mark.parametrize(
    ("rules", "tier"),
    [
        ({}, WashTier.FULL),
        ({"light_wash": True}, WashTier.LIGHT),
        ({"light_wash": True, "gpu_wait_max": 0}, WashTier.FULL),
        ({"light_wash": True, "gpu_wait_max_tasks": 0}, WashTier.FULL),
    ],
)
def test_a_light_wash_is_a_setting(rules: dict[str, Any], tier: WashTier) -> None:
    """Which has no use where nobody may wait: a slot that is kept for one would be lost to all others."""
    (wash,) = own_washes(warm(**rules).kill())
    assert wash.tier is tier


def test_what_is_sealed_is_always_washed_fully() -> None:
    """Whatever the setting says."""
    (wash,) = own_washes(sealed(light_wash=True).kill())
    assert wash.tier is WashTier.FULL


def test_a_session_that_failed_is_washed_fully() -> None:
    """Nobody knows in what state it has left its device."""
    (wash,) = own_washes(warm(light_wash=True).lose())
    assert wash.tier is WashTier.FULL


def test_a_kept_slot_is_its_tenants_at_once() -> None:
    """That is what it is kept for."""
    story = kept()
    assert only(story.ask("s2"), fx.StartWorker)
    assert story.slot().kept_for is None


@pytest.mark.parametrize(("tenant", "sealing"), [("bob", None), ("ann", SEALING)])
def test_a_kept_slot_is_washed_for_whoever_else_waits(tenant: str, sealing: Any) -> None:
    """Fully, under a new fence, for no session; a certificate of a light wash is no longer enough."""
    story = kept()
    effects = story.ask("s2", tenant=tenant, sealing=sealing)
    (wash,) = only(effects, fx.WashSlots)
    assert (wash.session_id, wash.slot_ids, wash.tier, wash.tenant) == (None, ("g0",), WashTier.FULL, None)
    assert wash.fence == 2
    assert only(effects, fx.StartWorker) == []
    with pytest.raises(CertificateRejected, match="a light wash, ordered was full"):
        story.issued("g0", tier=WashTier.LIGHT)
    assert [start.session_id for start in only(story.passes("g0"), fx.StartWorker)] == ["s2"]


def test_no_more_is_washed_than_is_missing() -> None:
    """And nothing twice, however often the line is looked at."""
    story = Story("g0", "g1", "g2", light_wash=True)
    for number in (1, 2, 3):
        story.ask(f"s{number}")
    for number in (1, 2):
        story.kill(f"s{number}")
        story.clean_up(f"s{number}")
    (wash,) = only(story.ask("s4", tenant="bob"), fx.WashSlots)
    assert wash.slot_ids == ("g0",)
    assert not only(story.is_faulty("g1", None), fx.WashSlots)
    assert story.slot("g1").kept_for == "ann"
    (more,) = only(story.ask("s5", tenant="bob"), fx.WashSlots)
    assert more.slot_ids == ("g1",)


def test_when_that_wash_fails_another_kept_slot_is_washed() -> None:
    """Whoever waits does not wait for the operator."""
    story = Story("g0", "g1", light_wash=True)
    for number in (1, 2):
        story.ask(f"s{number}")
    for number in (1, 2):
        story.kill(f"s{number}")
        story.clean_up(f"s{number}")
    story.ask("s3", tenant="bob")
    (wash,) = only(story.fails("g0", session_id=None), fx.WashSlots)
    assert wash.slot_ids == ("g1",)


def test_nothing_is_washed_for_the_line_while_the_runtime_does_not_answer() -> None:
    """Nobody could start, and the wash would hang."""
    story = kept()
    story.doubt()
    assert not only(story.ask("s2", tenant="bob"), fx.WashSlots)
    assert only(story.doubt(None), fx.WashSlots)


# -- a wash after every task


def test_a_session_that_is_washed_after_every_task_takes_one() -> None:
    """The second is refused, also while the first waits or runs, and nothing changes by it."""
    story = Story("g0")
    story.submit("t1", workload=ONCE)
    for _ in range(2):
        before = snapshot(story.node)
        with pytest.raises(Refusal, match="takes one task: its preset washes after every task") as refused:
            story.submit("t2", to="s1", workload=ONCE)
        assert refused.value.code is RefusalCode.SESSION_CLOSED
        assert snapshot(story.node) == before
        story.ready()


def test_it_ends_with_its_task() -> None:
    """For a reason of its own, and well; its worker is not told of as one that waits for more."""
    story = Story("g0")
    story.submit("t1", workload=ONCE)
    story.ready()
    (wash,) = own_washes(story.end("t1"))
    assert wash.tier is WashTier.FULL
    assert "worker:waiting" not in story.names("t1")
    assert story.names("t1")[-1] == "task_finish:completed"
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (
        SessionState.CLOSED,
        CloseReason.TASK_DONE,
    )


@pytest.mark.parametrize("ready", [False, True])
def test_it_ends_with_a_task_that_is_cancelled(ready: bool) -> None:
    """Where that runs, once its worker has let go of it."""
    story = Story("g0", light_wash=True)
    story.submit("t1", workload=ONCE)
    if ready:
        story.ready()
    effects = story.cancel()
    if ready:
        assert not own_washes(effects)
        effects = story.end("t1")
    (wash,) = own_washes(effects)
    assert (wash.tier, story.session().close_reason) == (WashTier.FULL, CloseReason.TASK_DONE)


def test_one_that_was_asked_for_waits_for_its_task() -> None:
    """It is ready, idles, and has its task then; cancelled in the line, it is over too."""
    story = Story("g0")
    story.ask("s1", workload=ONCE)
    story.ready()
    assert story.session().state is SessionState.READY
    story.ask("s2", workload=ONCE)
    story.submit("t2", to="s2", workload=ONCE)
    story.cancel("t2")
    assert story.session("s2").close_reason is CloseReason.TASK_DONE
    story.submit("t1", to="s1", workload=ONCE)
    assert own_washes(story.end("t1"))


def test_a_one_off_task_ends_as_ever() -> None:
    """Its session takes no other anyway."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF, workload=ONCE)
    story.ready()
    story.end("t1")
    assert story.session().close_reason is CloseReason.ONEOFF_DONE


# -- fetching ahead


def test_who_starts_next_is_said_once() -> None:
    """As soon as a slot for them is being washed; those behind them are not next."""
    story = busy("t1")
    assert not only(story.ask("s2"), fx.PrefetchModel)
    story.ask("s3")
    (ahead,) = only(story.kill("s1"), fx.PrefetchModel)
    assert ahead.session_id == "s2"
    assert not only(story.gone("s1") + story.issued("g0"), fx.PrefetchModel)
    started = story.secured("g0")
    assert [start.session_id for start in only(started, fx.StartWorker)] == ["s2"]
    assert not only(started, fx.PrefetchModel)


def test_who_joins_while_slots_are_washed_is_next_at_once() -> None:
    """Also at the first start; whoever needs more than is being washed is not."""
    story = Story("g0", washed=False)
    assert [one.session_id for one in only(story.submit("t1"), fx.PrefetchModel)] == ["s1"]
    other = Story("g0", "g1")
    other.ask("s0", tenant="bob")
    other.ask("s9", tenant="bob")
    other.ask("s1", workload=PAIR)
    assert not only(other.kill("s0", "bob"), fx.PrefetchModel)
    assert only(other.kill("s9", "bob"), fx.PrefetchModel)
