"""What is written of each decision: enough for another life of the service, and little else."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import CertificateRejected, Refusal
from gpu_server.core.node import Node
from gpu_server.core.rows import Change, Table, certificate_row
from gpu_server.core.sessions import Rules, TaskState
from gpu_server.core.state import FENCE
from tests.core.hunt import HISTORIES
from tests.core.invariants import check, durable
from tests.core.journal import Journal, check_cut
from tests.core.machine import NodeMachine
from tests.core.papers import judge, paper_for
from tests.core.story import Story, device, only, work

FENCE_ROW = (Table.NODE, FENCE)
G0, S1 = (Table.SLOTS, "g0"), (Table.SESSIONS, "s1")
T1, T2 = (Table.TASKS, "t1"), (Table.TASKS, "t2")


class CutEverywhere(NodeMachine):
    """The service could be killed after each step, and the next life would find all that was decided."""

    cut = True


def test_every_decision_is_written_in_full() -> None:
    """After every step of some histories, a node that is made of the journal is the node that wrote it."""
    run_state_machine_as_test(CutEverywhere, settings=settings(HISTORIES, max_examples=150, derandomize=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_decision_is_written_in_full_in_new_histories() -> None:
    """The same in many histories, new ones in every run."""
    run_state_machine_as_test(CutEverywhere, settings=settings(HISTORIES, max_examples=1000))


# -- how much is written


def touched(story: Story, event: ev.Event) -> set[tuple[Table, str]]:
    """The rows that one decision writes."""
    story.node.handle(event, story.now)
    check(story.node)
    return taken(story)


def taken(story: Story) -> set[tuple[Table, str]]:
    changes = story.node.take_changes()
    story.journal.write(changes)
    check_cut(story.node, story.journal)
    return {(change.table, change.id) for change in changes}


def crowd() -> Story:
    """Session `s1` at work on one task with another in its queue, and three sessions that are none of its
    business: one ready, one that waits and one that is over."""
    story = Story("g0", "g1")
    story.ask("s1")
    story.ready("s1")
    story.ask("s2")
    story.ready("s2")
    story.ask("s3")
    story.ask("s4")
    story.kill("s4")
    story.submit("t1", to="s1")
    story.submit("t2", to="s1")
    return story


def test_a_task_that_joins_a_queue_writes_two_rows() -> None:
    """Its own, and its session's; not those of the tasks before it."""
    story = crowd()
    event = ev.TaskSubmitted(
        task_id="t3",
        tenant="ann",
        task_type=story.session().task_type,
        tier=None,
        workload=work(),
        session_id="s1",
        new_session_id="s9",
        timeout=60.0,
    )
    assert touched(story, event) == {S1, (Table.TASKS, "t3")}


def test_a_task_that_ends_writes_the_next_one_too() -> None:
    """The one that has ended, the one that starts, and their session."""
    event = ev.TaskEnded(session_id="s1", task_id="t1", state=TaskState.COMPLETED)
    assert touched(crowd(), event) == {S1, T1, T2}


def test_a_lease_writes_the_fence_and_its_slots() -> None:
    """So that no other life gives the same fence, or the same slot, to another session."""
    story = Story("g0", "g1")
    story.node.handle(
        ev.SessionRequested(session_id="s1", tenant="ann", tier=None, workload=work()), story.now
    )
    assert taken(story) == {FENCE_ROW, G0, S1}


def test_a_session_that_ends_writes_what_it_held() -> None:
    """Its tasks, its slots and itself."""
    event = ev.SessionKillRequested(session_id="s1", tenant="ann")
    assert touched(crowd(), event) == {S1, T1, T2, G0}


def test_a_certificate_is_written_with_its_slot() -> None:
    """In one decision, and it is no row of the state: the node does not read it again. That it is on the disk
    writes the slot once more."""
    story = Story("g0", "g1", washed=False)
    certificate = judge(story.certificate("g0"))
    name = (Table.CERTIFICATES, certificate.record_hash.hex())
    assert touched(story, ev.CertificateIssued(certificate=certificate.raw)) == {G0, name}
    assert story.journal.certificates() == {name[1]: certificate_row(certificate)}
    assert story.journal.rows()[Table.SLOTS]["g0"]["prev"] == certificate.hash.hex()
    secured = ev.CertificateSecured(slot_id="g0", certificate_hash=certificate.hash)
    assert touched(story, secured) == {G0}
    assert touched(story, secured) == set()


def test_a_certificate_after_a_lease_is_in_its_session() -> None:
    """Where the session is remembered still: what came before its lease, and what after it."""
    story = Story("g0")
    before = story.slot().head.hex()
    story.ask("s1")
    story.kill()
    story.gone()
    certificate = judge(story.certificate("g0"))
    name = (Table.CERTIFICATES, certificate.record_hash.hex())
    assert touched(story, ev.CertificateIssued(certificate=certificate.raw)) == {G0, S1, name}
    assert story.session().washed_before == (before,)
    assert story.session().washed_after == (certificate.record_hash.hex(),)


def test_what_is_forgotten_is_removed() -> None:
    """The row of a task whose retention is over is None, and the journal does without it."""
    story = crowd()
    story.end("t1")
    story.now += 700
    story.node.handle(ev.Tick(), story.now)
    changes = story.node.take_changes()
    assert Change(table=Table.TASKS, id="t1", row=None) in changes


def test_changes_are_taken_once() -> None:
    """What was taken has been written; the next decision begins with nothing."""
    story = Story("g0")
    story.node.handle(
        ev.SessionRequested(session_id="s1", tenant="ann", tier=None, workload=work()), story.now
    )
    assert story.node.take_changes()
    assert story.node.take_changes() == []


def test_a_row_is_as_the_decision_left_it() -> None:
    """A row that changes twice in one decision is written once, as it is in the end."""
    story = Story("g0")
    event = ev.SessionRequested(session_id="s1", tenant="ann", tier=None, workload=work())
    story.node.handle(event, story.now)
    (row,) = [change.row for change in story.node.take_changes() if change.table is Table.SESSIONS]
    assert row is not None
    assert (row["state"], row["slot_ids"], row["fence"]) == ("preparing", ["g0"], 1)


# -- what writes nothing


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(ev.ReaderCame(task_id="t1"), id="a reader comes"),
        pytest.param(ev.ReaderLeft(task_id="t1"), id="the last reader leaves"),
        pytest.param(ev.Tick(), id="nothing is due"),
        pytest.param(ev.SlotChecked(slot_id="g0", fault=None), id="a device is well"),
        pytest.param(ev.SlotChecked(slot_id="g0", fault=None, doubt="no answer"), id="a device in doubt"),
        pytest.param(ev.RuntimeChecked(doubt="no answer"), id="the runtime in doubt"),
        pytest.param(ev.RuntimeChecked(doubt=None), id="the runtime is well"),
        pytest.param(ev.WorkerReady(session_id="s1"), id="old news of a worker"),
        pytest.param(ev.ContainerGone(session_id="s1"), id="a container that still serves"),
        pytest.param(ev.TaskEnded(session_id="s1", task_id="t2", state=TaskState.COMPLETED), id="not begun"),
        pytest.param(ev.StageReached(session_id="s1", stage="loading", done=1.0, total=2.0), id="old stage"),
    ],
)
def test_what_decides_nothing_writes_nothing(event: ev.Event) -> None:
    """These come often, and a write for each would be for nothing."""
    assert touched(crowd(), event) == set()


@pytest.mark.parametrize(
    "request_",
    [
        ev.SessionKillRequested(session_id="s1", tenant="bob"),
        ev.TaskCancelRequested(task_id="t1", tenant="bob"),
        ev.KeepaliveRequested(session_id="s4", tenant="ann"),
        ev.SlotWashOrdered(slot_id="g0"),
        ev.SlotWashOrdered(slot_id="g9"),
        ev.SessionRequested(session_id="s9", tenant="ann", tier=None, workload=work(gpus=3)),
    ],
)
def test_a_refused_request_writes_nothing(request_: ev.Request) -> None:
    """Nothing has changed, so there is nothing to write."""
    story = crowd()
    with pytest.raises(Refusal):
        story.node.handle(request_, story.now)
    assert taken(story) == set()


def test_a_rejected_certificate_writes_nothing() -> None:
    """The slot is as it was."""
    story = Story("g0", washed=False)
    for lies in ({"slot_uuid": "GPU-other"}, {"fence": 9}, {"result": "failed"}):
        wrong = ev.CertificateIssued(certificate=story.certificate("g0", **lies))
        with pytest.raises(CertificateRejected):
            story.node.handle(wrong, story.now)
    assert taken(story) == set()


def test_progress_is_written_once() -> None:
    """The first `loading` has a number in the stream, so it is counted; all other progress has none."""
    story = Story("g0")
    story.submit("t1")
    model = ev.StageReached(session_id="s1", stage="model", done=1.0, total=2.0)
    loading = ev.StageReached(session_id="s1", stage="loading", done=1.0, total=2.0)
    assert [touched(story, event) for event in (model, loading, loading)] == [set(), {T1}, set()]
    assert story.task().told == 2


# -- what was told


def test_numbered_events_are_counted() -> None:
    """As many as the service itself has published, without those that tell the present state."""
    story = Story("g0")
    story.submit("t1")
    story.submit("t2", to="s1")
    story.ready()
    story.end("t1")
    for task_id in ("t1", "t2"):
        numbered = [event for event, _ in story.said[task_id] if event not in ("queue", "progress")]
        assert story.task(task_id).told == len(numbered)
    assert any(event == "queue" for event, _ in story.said["t2"])


# -- reading


def test_a_first_life_begins_with_no_rows() -> None:
    """Rows of nothing are good rows."""
    node = Node(Rules(), judge=judge, first_fence=7)
    node.restore(Journal().rows())
    assert (list(node.sessions), list(node.tasks), len(node.slots), node._next_fence) == ([], [], 0, 7)


def test_a_restored_node_has_nothing_to_write() -> None:
    """It is what the journal holds."""
    story = crowd()
    node = Node(Rules(), judge=judge)
    node.restore(story.journal.rows())
    assert node.take_changes() == []
    assert durable(node) == durable(story.node)


@pytest.mark.parametrize(("first", "expected"), [(1, 4), (100, 101)])
def test_the_higher_fence_counts(first: int, expected: int) -> None:
    """That of the journal, or that of the clock where the journal is an old one."""
    story = Story("g0", "g1")
    story.ask("s1")
    story.ask("s2")
    node = Node(Rules(), judge=judge, first_fence=first)
    node.restore(story.journal.rows())
    node.handle(ev.NodeStarted(slots=(device("g0"), device("g1"), device("g2"))), story.now)
    fresh = paper_for(node.slots["g2"]).signed()
    (secure,) = node.handle(ev.CertificateIssued(certificate=fresh), story.now)
    assert isinstance(secure, fx.SecureCertificate)
    secured = ev.CertificateSecured(slot_id="g2", certificate_hash=secure.certificate_hash)
    node.handle(secured, story.now)
    event = ev.SessionRequested(session_id="s3", tenant="ann", tier=None, workload=work())
    (start,) = only(node.handle(event, story.now), fx.StartWorker)
    assert start.fence == expected


def test_the_oldest_are_forgotten_first_in_another_life_too() -> None:
    """What has ended is remembered in the order in which it ended, not in which it was made."""
    story = Story("g0", ended_tasks_max=2, ended_sessions_max=2)
    for number in (1, 2, 3):
        story.submit(f"t{number}")
    for number in (2, 1):
        story.now += 1
        story.kill(f"s{number}")
    story.clean_up("s1")
    story.now += 1
    story.restart()
    story.kill("s3")
    story.clean_up("s3")
    assert set(story.node.tasks) == {"t1", "t3"}
    assert set(story.node.sessions) == {"s1", "s3"}
