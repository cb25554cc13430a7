"""The node, told as small stories: each docstring is a promise; the state is checked after every event."""

from __future__ import annotations

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import CertificateRejected, Failure, FailureCode, Refusal
from gpu_server.core.node import Node
from gpu_server.core.sessions import CloseReason, Expiry, Rules, SessionState, TaskState, TaskType
from gpu_server.core.slots import NO_CERTIFICATE, SlotState, Tier, WashTier
from gpu_server.core.timers import Alarm
from tests.core.invariants import snapshot
from tests.core.papers import judge
from tests.core.story import EXEC, Story, busy, device, only, warm, work

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})
PAIR = work(gpus=2)
BATCHED = work(max_concurrent_tasks=3)


# -- a task's way


def test_a_task_on_a_cold_node_goes_all_the_way() -> None:
    """Lease, start, run, finish: the effects go out in order, and the stream tells it from first to last."""
    story = Story("g0")
    (start,) = only(story.submit("t1"), fx.StartWorker)
    assert (start.session_id, start.fence, start.slot_ids) == ("s1", 1, ("g0",))
    story.tell(ev.StageReached(session_id="s1", stage="model", done=1.0, total=2.0))
    story.tell(ev.WorkerCreated(session_id="s1", container_id="c1"))
    story.tell(ev.StageReached(session_id="s1", stage="loading", done=0.0, total=None))
    story.tell(ev.StageReached(session_id="s1", stage="loading", done=1.0, total=None))
    (send,) = only(story.tell(ev.WorkerReady(session_id="s1")), fx.SendTask)
    assert (send.session_id, send.task_id) == ("s1", "t1")
    story.now += 2.5
    story.tell(ev.TaskEnded(session_id="s1", task_id="t1", state=TaskState.COMPLETED, usage={"tokens": 3}))
    assert story.names() == [
        "connection:allocated",
        "progress:model",
        "worker:created",
        "worker:loading",
        "progress:loading",
        "progress:loading",
        "connection:session_ready",
        "worker:working",
        "worker:waiting",
        "task_finish:completed",
    ]
    assert story.last() == {"status": "completed", "elapsed_seconds": 2.5, "usage": {"tokens": 3}}
    assert story.session().state is SessionState.READY
    assert story.session().tasks_done == 1


def test_a_task_on_a_warm_session_starts_at_once() -> None:
    """Nothing stands between a ready session and its task."""
    story = warm()
    assert only(story.submit("t1", to="s1"), fx.SendTask)
    assert story.names() == ["connection:session_ready", "worker:working"]
    assert story.session().state is SessionState.WORKING


def test_tasks_of_a_session_run_first_come_first_served() -> None:
    """One at a time, in the order of submission."""
    story = busy("t1", "t2", "t3")
    assert story.names("t2") == ["connection:queued", "queue:1"]
    assert [send.task_id for send in only(story.end("t1"), fx.SendTask)] == ["t2"]
    assert [send.task_id for send in only(story.end("t2", TaskState.FAILED), fx.SendTask)] == ["t3"]
    story.end("t3")
    assert story.session().state is SessionState.READY
    assert story.session().tasks_done == 3


def test_a_batching_worker_gets_as_many_as_it_takes() -> None:
    """Three at once and no more; a place that becomes free goes to the next."""
    story = Story("g0")
    for number in range(1, 6):
        to = None if number == 1 else "s1"
        story.submit(f"t{number}", to=to, workload=BATCHED)
    assert [send.task_id for send in only(story.ready(), fx.SendTask)] == ["t1", "t2", "t3"]
    assert [send.task_id for send in only(story.end("t2"), fx.SendTask)] == ["t4"]
    assert list(story.session().busy) == ["t1", "t3", "t4"]


def test_a_place_in_the_queue_is_told_when_it_changes_and_only_then() -> None:
    """Each task hears each of its places once."""
    story = busy("t1", "t2", "t3")
    story.end("t1")
    story.keep_alive()
    story.cancel("t2")
    story.end("t2", TaskState.CANCELLED)
    assert story.names("t3") == [
        "connection:queued",
        "queue:2",
        "queue:1",
        "connection:session_ready",
        "worker:working",
    ]


def test_a_task_that_leaves_the_queue_moves_those_behind_it() -> None:
    """A queued task that is cancelled makes the next one's place better at once."""
    story = busy("t1", "t2", "t3")
    assert not only(story.cancel("t2"), fx.CancelTask)
    assert story.names("t3")[-1] == "queue:1"
    assert story.names("t2")[-1] == "task_finish:cancelled"


def test_the_failure_of_a_task_is_its_own() -> None:
    """A failed task says why, and its session goes on."""
    story = busy("t1")
    story.end("t1", TaskState.FAILED, Failure(code="out_of_tokens", message="the prompt is too long"))
    assert story.names()[-2:] == ["error:out_of_tokens", "task_finish:failed"]
    assert story.session().state is SessionState.READY


# -- one-off tasks


def test_a_oneoff_task_takes_its_session_with_it() -> None:
    """The session closes after its one task, and its slot is washed."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF, workload=EXEC)
    story.ready()
    (wash,) = only(story.end("t1"), fx.WashSlots)
    assert (wash.session_id, wash.slot_ids, wash.grace) == ("s1", ("g0",), 10.0)
    assert story.names()[-1] == "task_finish:completed"
    assert "worker:waiting" not in story.names()
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (SessionState.CLOSED, "oneoff_done")
    assert story.slot().state is SlotState.FREE


@pytest.mark.parametrize("started", [False, True])
def test_a_oneoff_task_that_is_cancelled_ends_its_session(started: bool) -> None:
    """There is nothing to wait for: no cancel is sent, the container is taken down."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF)
    if started:
        story.ready()
    effects = story.cancel("t1")
    assert only(effects, fx.WashSlots)
    assert not only(effects, fx.CancelTask)
    assert story.names()[-1] == "task_finish:cancelled"


def test_a_oneoff_task_that_waits_leaves_the_line_when_it_is_cancelled() -> None:
    """Its session never had a container, so there is nothing to wash."""
    story = Story("g0")
    story.ask("s1")
    story.submit("t2", kind=TaskType.ONEOFF)
    assert not only(story.cancel("t2"), fx.WashSlots)
    assert story.session("s2").state is SessionState.CLOSED


# -- the idle clock and keepalive


def test_the_idle_clock_runs_only_while_there_is_nothing_to_do() -> None:
    """It starts when the session is ready and empty, stands still at work, and starts anew after it."""
    story = Story("g0")
    story.ask("s1")
    assert story.session().idle_deadline is None
    story.ready()
    assert story.session().idle_deadline == story.now + 300
    story.after(200)
    story.submit("t1", to="s1", timeout=5000.0)
    assert story.session().idle_deadline is None
    story.after(1000)
    assert story.session().state is SessionState.WORKING
    story.end("t1")
    assert story.session().idle_deadline == story.now + 300


def test_an_idle_session_closes() -> None:
    """After the idle timeout, not before it, and nothing has failed."""
    story = warm()
    assert not only(story.after(299.9), fx.WashSlots)
    assert only(story.after(0.1), fx.WashSlots)
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (SessionState.CLOSED, "idle_timeout")
    assert story.session().failure is None


def test_a_keepalive_renews_the_idle_deadline() -> None:
    """From now, by the full idle timeout."""
    story = warm()
    story.after(200)
    story.keep_alive()
    assert story.session().idle_deadline == story.now + 300


def test_a_keepalive_never_shortens() -> None:
    """A deadline that is further away than the renewal stays where it is."""
    story = warm()
    further = story.now + 1000
    story.node._set_idle(story.session(), further)
    story.keep_alive()
    assert story.session().idle_deadline == further


def test_a_keepalive_never_passes_the_lifetime() -> None:
    """However often it is renewed, a session ends with its lifetime, and says that this was the reason."""
    story = warm(max_lifetime=400)
    born = story.now
    for _ in range(3):
        story.after(130)
        story.keep_alive()
    assert story.session().idle_deadline == story.session().max_deadline == born + 400
    story.after(10)
    assert story.session().close_reason is CloseReason.MAX_LIFETIME


def test_a_keepalive_at_work_or_before_the_start_changes_nothing() -> None:
    """There is no idle clock to renew, and none is started."""
    story = Story("g0")
    story.ask("s1")
    before = snapshot(story.node)
    story.keep_alive()
    assert snapshot(story.node) == before
    story.ready()
    story.submit("t1", to="s1")
    story.keep_alive()
    assert story.session().idle_deadline is None


def test_the_expiry_says_which_clock_will_end_the_session() -> None:
    """One object: the wait for a GPU, the lifetime, idling, the lifetime again at work, and then nothing."""
    story = Story("g0")
    born = story.now
    story.ask("s0")
    story.ask("s1")

    def expiry() -> Expiry:
        return story.node.expiry(story.session("s1"))

    assert (expiry().effective, expiry().reason) == (born + 600, "no_available_gpu")
    assert (expiry().idle_deadline, expiry().max_deadline) == (None, None)
    story.kill("s0")
    story.clean_up("s0")
    assert (expiry().effective, expiry().reason) == (born + 3600, "max_lifetime")
    story.ready("s1")
    assert (expiry().effective, expiry().reason) == (born + 300, "idle_timeout")
    assert (expiry().idle_deadline, expiry().max_deadline) == (born + 300, born + 3600)
    story.submit("t1", to="s1")
    assert (expiry().effective, expiry().reason) == (born + 3600, "max_lifetime")
    story.kill("s1")
    story.clean_up("s1")
    assert expiry() == Expiry(idle_deadline=None, max_deadline=None, effective=None, reason=None)


# -- the lifetime


def test_at_the_lifetime_running_tasks_get_a_grace_and_queued_ones_a_reason() -> None:
    """Nothing is dropped in silence: queued tasks fail with a clear code, the running one may end well."""
    story = busy("t1", "t2", "t3", max_lifetime=500)
    assert not only(story.after(500), fx.WashSlots)
    assert story.session().state is SessionState.DRAINING
    for task_id in ("t2", "t3"):
        assert story.names(task_id)[-2:] == ["error:session_lifetime", "task_finish:failed"]
    assert story.task("t1").state is TaskState.RUNNING
    story.after(20)
    effects = story.end("t1")
    assert story.names("t1")[-1] == "task_finish:completed"
    assert only(effects, fx.WashSlots)
    assert not only(effects, fx.SendTask)
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (SessionState.CLOSED, "max_lifetime")


def test_the_grace_ends() -> None:
    """A task that still runs when the grace is over fails with `session_lifetime`."""
    story = busy("t1", max_lifetime=500)
    story.after(529.9)
    assert story.task("t1").state is TaskState.RUNNING
    assert only(story.after(0.1), fx.WashSlots)
    assert story.names("t1")[-2:] == ["error:session_lifetime", "task_finish:failed"]


def test_a_session_in_its_grace_takes_no_more() -> None:
    """It drains: tasks and keepalives are refused, a kill is not."""
    story = busy("t1", max_lifetime=500)
    story.after(500)
    with pytest.raises(Refusal, match=r"draining \(max_lifetime\)"):
        story.submit("t2", to="s1")
    with pytest.raises(Refusal, match=r"draining \(max_lifetime\)"):
        story.keep_alive()
    assert only(story.kill(), fx.WashSlots)
    assert story.names("t1")[-1] == "task_finish:cancelled"
    assert story.session().close_reason is CloseReason.MAX_LIFETIME


def test_several_tasks_share_one_grace() -> None:
    """The session goes when the last of them has ended."""
    story = Story("g0", max_lifetime=500)
    story.submit("t1", workload=BATCHED, timeout=900.0)
    story.submit("t2", to="s1", workload=BATCHED, timeout=900.0)
    story.ready()
    story.after(500)
    assert not only(story.end("t1"), fx.WashSlots)
    assert only(story.end("t2"), fx.WashSlots)


def test_a_session_without_tasks_needs_no_grace() -> None:
    """One that is still starting at its lifetime ends at once."""
    story = Story("g0", max_lifetime=100)
    story.submit("t1")
    assert only(story.after(100), fx.WashSlots)
    assert story.names()[-2:] == ["error:session_lifetime", "task_finish:failed"]


def test_the_lifetime_counts_from_the_lease() -> None:
    """Waiting in the line takes nothing from a session's life."""
    story = Story("g0", max_lifetime=500)
    story.ask("s1")
    story.ask("s2")
    story.after(200)
    story.kill("s1")
    story.clean_up("s1")
    assert story.session("s2").max_deadline == story.now + 500


# -- killing and cancelling


def test_a_killed_session_ends_its_tasks_and_gives_up_its_slots() -> None:
    """Running and queued tasks are cancelled with `session_killed`."""
    story = busy("t1", "t2")
    assert only(story.kill(), fx.WashSlots)
    for task_id in ("t1", "t2"):
        assert story.names(task_id)[-1] == "task_finish:cancelled"
        assert story.last(task_id)["error"]["code"] == "session_killed"
    assert story.slot().state is SlotState.WASHING


def test_killing_twice_is_killing_once() -> None:
    """Also when the session is over; it is no error and does nothing."""
    story = busy("t1")
    story.kill()
    before = snapshot(story.node)
    assert story.kill() == []
    assert snapshot(story.node) == before
    story.clean_up()
    assert story.kill() == []
    assert story.session().close_reason is CloseReason.KILLED


def test_a_cancelled_task_keeps_its_place_until_the_worker_lets_go() -> None:
    """The client hears at once; the next task starts only when the worker says that it has stopped."""
    story = busy("t1", "t2")
    effects = story.cancel("t1")
    assert only(effects, fx.CancelTask) == [fx.CancelTask(session_id="s1", task_id="t1")]
    assert not only(effects, fx.SendTask)
    assert story.names("t1")[-1] == "task_finish:cancelled"
    assert only(story.end("t1", TaskState.CANCELLED), fx.SendTask)
    assert story.names("t1").count("task_finish:cancelled") == 1
    assert story.task("t2").state is TaskState.RUNNING


def test_a_worker_that_ignores_a_cancel_loses_its_session() -> None:
    """After the cancel grace the session ends as `worker_misbehaved`, with its other tasks."""
    story = busy("t1", "t2")
    story.cancel("t1")
    assert not only(story.after(9.9), fx.WashSlots)
    assert only(story.after(0.1), fx.WashSlots)
    assert story.names("t2")[-2:] == ["error:cancel_ignored", "task_finish:failed"]
    story.clean_up()
    session = story.session()
    assert (session.state, session.close_reason) == (SessionState.FAILED, "worker_misbehaved")
    assert session.failure is not None
    assert session.failure.code is FailureCode.CANCEL_IGNORED


def test_cancelling_what_has_ended_does_nothing() -> None:
    """A second cancel, or one that comes after the end, is no error."""
    story = busy("t1")
    story.cancel("t1")
    assert story.cancel("t1") == []
    story.end("t1", TaskState.CANCELLED)
    assert story.cancel("t1") == []


def test_a_result_that_comes_after_the_cancel_is_not_told() -> None:
    """The stream of a cancelled task is closed, whatever the worker says then."""
    story = busy("t1")
    story.cancel("t1")
    story.end("t1", TaskState.COMPLETED)
    assert story.task("t1").state is TaskState.CANCELLED
    assert story.names("t1")[-1] == "task_finish:cancelled"


def test_a_session_whose_only_task_is_cancelled_while_it_starts_becomes_ready() -> None:
    """It was nearly there, and the next task of its tenant may use it."""
    story = Story("g0")
    story.submit("t1")
    story.cancel("t1")
    story.ready()
    assert story.session().state is SessionState.READY
    assert story.session().idle_deadline is not None


# -- readers


def test_a_task_that_nobody_reads_is_cancelled() -> None:
    """It gets the disconnect grace from its submission, in case its reader is slow to come."""
    story = warm()
    story.submit("t1", to="s1", read=False)
    story.after(29.9)
    assert story.task("t1").state is TaskState.RUNNING
    assert only(story.after(0.1), fx.CancelTask)
    assert story.last("t1")["error"]["code"] == "client_gone"


def test_a_reader_that_comes_back_in_time_saves_its_task() -> None:
    """The grace starts when the last reader leaves, and is forgotten when one comes."""
    story = busy("t1")
    story.after(100)
    story.leave("t1")
    story.after(29)
    story.read("t1")
    story.after(100)
    assert story.task("t1").state is TaskState.RUNNING
    story.leave("t1")
    story.after(30)
    assert story.task("t1").state is TaskState.CANCELLED


def test_one_of_two_readers_may_go() -> None:
    """Only a task without any reader is at risk."""
    story = busy("t1")
    story.read("t1")
    story.leave("t1")
    story.after(100)
    assert story.task("t1").state is TaskState.RUNNING


def test_readers_of_tasks_that_are_over_change_nothing() -> None:
    """They may read what is kept, and what is forgotten is nobody's concern."""
    story = busy("t1")
    story.end("t1")
    story.read("t1")
    story.leave("t1")
    story.leave("t1")
    assert story.read("t9") == []
    assert story.leave("t9") == []


def test_a_reader_that_leaves_while_its_task_waits_gives_up_its_place() -> None:
    """The session that was made for this task leaves the line with it."""
    story = Story("g0")
    story.ask("s1")
    story.submit("t2")
    story.leave("t2")
    story.after(30)
    assert story.names("t2")[-1] == "task_finish:cancelled"
    assert story.session("s2").close_reason is CloseReason.ABANDONED


# -- timeouts


def test_a_task_that_runs_too_long_times_out() -> None:
    """The clock counts from its start; then its worker is asked to stop it."""
    story = busy("t1")
    story.submit("t2", to="s1", timeout=50.0)
    story.after(200)
    story.end("t1")
    story.after(49.9)
    assert story.task("t2").state is TaskState.RUNNING
    assert only(story.after(0.1), fx.CancelTask)
    assert story.names("t2")[-2:] == ["error:task_timeout", "task_finish:timeout"]
    assert story.last("t2")["elapsed_seconds"] == 50.0


def test_a_oneoff_task_that_runs_too_long_takes_its_session_with_it() -> None:
    """No cancel is sent: the container goes."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF, timeout=50.0)
    story.ready()
    effects = story.after(50)
    assert only(effects, fx.WashSlots)
    assert not only(effects, fx.CancelTask)
    assert story.names()[-1] == "task_finish:timeout"


def test_a_session_that_does_not_get_ready_fails() -> None:
    """Its preset says how long a start may take; the message says how far it came."""
    story = Story("g0")
    story.submit("t1", workload=work(start_timeout=40.0))
    story.tell(ev.StageReached(session_id="s1", stage="loading", done=0.0, total=None))
    assert only(story.after(40), fx.WashSlots)
    assert story.names()[-2:] == ["error:start_timeout", "task_finish:failed"]
    assert "(stage loading)" in story.last()["error"]["message"]
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (SessionState.FAILED, "start_failed")


def test_deadlines_that_are_late_are_met_in_their_order() -> None:
    """When the clock jumps past the lifetime and a task's timeout, the earlier of them decides."""
    story = warm(max_lifetime=500)
    story.submit("t1", to="s1", timeout=100.0)
    story.submit("t2", to="s1")
    story.now += 1000
    effects = story.tell(ev.Tick())
    assert story.names("t1")[-1] == "task_finish:timeout"
    assert story.names("t2")[-2:] == ["error:session_lifetime", "task_finish:failed"]
    assert only(effects, fx.CancelTask)
    assert not only(effects, fx.WashSlots)
    assert only(story.after(10), fx.WashSlots)


def test_a_grace_that_starts_late_is_as_long() -> None:
    """A clock that jumps past lifetime and grace takes nothing from the task that runs."""
    story = busy("t1", max_lifetime=500)
    story.now += 1000
    assert not only(story.tell(ev.Tick()), fx.WashSlots)
    assert not only(story.after(29), fx.WashSlots)
    assert only(story.after(1), fx.WashSlots)


# -- workers


def test_a_worker_that_is_lost_fails_its_tasks_and_leaves_its_last_words() -> None:
    """Running and queued tasks hear why; the log tail stays with the session."""
    story = busy("t1", "t2")
    assert only(story.lose(log_tail="out of memory"), fx.WashSlots)
    for task_id in ("t1", "t2"):
        assert story.names(task_id)[-2:] == ["error:worker_exited", "task_finish:failed"]
    story.clean_up()
    session = story.session()
    assert (session.state, session.close_reason) == (SessionState.FAILED, "worker_exited")
    assert session.log_tail == "out of memory"
    assert session.failure is not None


def test_a_worker_lost_while_it_starts_is_a_failed_start() -> None:
    """The reason that comes with the loss is the session's close reason."""
    story = Story("g0")
    story.submit("t1")
    story.lose(reason=CloseReason.START_FAILED)
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (SessionState.FAILED, "start_failed")


def test_the_container_of_a_session_that_ends_is_expected_to_go() -> None:
    """Its loss during the wash is no failure of the session."""
    story = busy("t1")
    story.kill()
    assert story.lose() == []
    story.clean_up()
    assert (story.session().state, story.session().failure) == (SessionState.CLOSED, None)


@pytest.mark.parametrize("ended", ["draining", "closed", "forgotten"])
def test_news_of_a_session_that_has_moved_on_is_old_news(ended: str) -> None:
    """Late, doubled or lost in between: such events find nothing to do and change nothing."""
    story = busy("t1", tombstone_retention=60, task_retention=50)
    story.kill()
    if ended != "draining":
        story.clean_up()
    if ended == "forgotten":
        story.after(60)
    before = snapshot(story.node)
    late = [
        ev.StageReached(session_id="s1", stage="loading", done=1.0, total=None),
        ev.WorkerCreated(session_id="s1", container_id="c2"),
        ev.WorkerReady(session_id="s1"),
        ev.TaskEnded(session_id="s1", task_id="t1", state=TaskState.COMPLETED),
        ev.WorkerLost(
            session_id="s1",
            reason=CloseReason.WORKER_EXITED,
            failure=Failure(code=FailureCode.WORKER_EXITED, message=""),
        ),
    ]
    if ended != "draining":
        late.append(ev.ContainerGone(session_id="s1"))
        late.append(ev.WashFailed(session_id="s1", slot_ids=("g0",), fence=1, reason="late"))
    for event in late:
        assert story.tell(event) == []
        assert snapshot(story.node) == before


def test_a_worker_is_ready_once() -> None:
    """A second `WorkerReady` neither restarts the idle clock nor sends anything."""
    story = warm()
    before = snapshot(story.node)
    story.now += 5
    assert story.tell(ev.WorkerReady(session_id="s1")) == []
    assert snapshot(story.node) == before


def test_a_task_ends_once_and_in_its_own_session() -> None:
    """The end of a task that is not at work in that session is not believed."""
    story = busy("t1", "t2")
    story.end("t1")
    for task_id in ("t1", "t9"):
        event = ev.TaskEnded(session_id="s1", task_id=task_id, state=TaskState.FAILED)
        assert story.tell(event) == []
    assert story.task("t1").state is TaskState.COMPLETED
    assert story.task("t2").state is TaskState.RUNNING


# -- the wait line


def test_who_waits_hears_its_place_and_then_its_devices() -> None:
    """`queued` and a place, each change of it once, then `allocated` with the slot."""
    story = Story("g0")
    story.ask("s1")
    for task_id in ("t2", "t3"):
        story.submit(task_id)
    assert story.names("t3") == ["connection:queued", "queue:2"]
    story.kill("s1")
    story.clean_up("s1")
    assert story.names("t2") == ["connection:queued", "queue:1", "connection:allocated"]
    assert story.last("t2")["gpu_ids"] == ["g0"]
    assert story.names("t3") == ["connection:queued", "queue:2", "queue:1"]


def test_tasks_wait_with_the_session_that_was_asked_for() -> None:
    """A session in the line takes tasks; they count from its place, and starting takes them along."""
    story = Story("g0")
    for session_id in ("s1", "s2", "s3"):
        story.ask(session_id)
    story.submit("t1", to="s3")
    story.submit("t2", to="s3")
    assert story.names("t1") == ["connection:queued", "queue:2"]
    assert story.names("t2") == ["connection:queued", "queue:3"]
    story.kill("s2")
    assert story.names("t2")[-1] == "queue:2"
    story.kill("s1")
    story.clean_up("s1")
    assert story.names("t1")[-1] == "connection:allocated"


def test_waiting_for_a_gpu_has_an_end() -> None:
    """After the longest wait the tasks time out, and the session failed for want of a GPU."""
    story = Story("g0", gpu_wait_max=90)
    story.ask("s1")
    story.submit("t2")
    story.submit("t3")
    story.after(90)
    assert story.names("t2")[-2:] == ["error:gpu_wait_timeout", "task_finish:timeout"]
    assert story.session("s2").state is SessionState.FAILED
    assert story.session("s2").close_reason is CloseReason.NO_AVAILABLE_GPU
    assert len(story.node.line) == 0


def test_a_session_that_is_not_asked_for_leaves_the_line_with_its_last_task() -> None:
    """Nobody waits for it any more; one that was asked for by its own request stays."""
    story = Story("g0")
    story.ask("s1")
    story.submit("t2")
    story.ask("s3")
    story.submit("t4", to="s3")
    for task_id in ("t2", "t4"):
        story.cancel(task_id)
    assert story.session("s2").close_reason is CloseReason.ABANDONED
    assert story.session("s3").state is SessionState.WAITING


def test_a_session_in_the_line_keeps_its_place_for_its_other_tasks() -> None:
    """Only the last task to go takes the session out of the line."""
    story = Story("g0")
    story.ask("s1")
    story.submit("t2")
    story.submit("t3", to="s2")
    story.cancel("t2")
    assert story.session("s2").state is SessionState.WAITING
    assert story.names("t3")[-1] == "queue:1"


def test_a_lease_of_several_gathers_its_slots_and_is_not_starved() -> None:
    """The first slot that becomes free is kept for the pair, though one behind it could use it."""
    story = Story("g0", "g1")
    story.ask("s1")
    story.ask("s2")
    story.submit("t3", workload=PAIR)
    story.submit("t4")
    story.kill("s1")
    assert not only(story.clean_up("s1"), fx.StartWorker)
    assert story.slot("g0").state is SlotState.FREE
    story.kill("s2")
    (start,) = only(story.clean_up("s2"), fx.StartWorker)
    assert (start.session_id, start.slot_ids) == ("s3", ("g0", "g1"))
    assert story.last("t3")["gpu_ids"] == ["g0", "g1"]


def test_what_was_kept_is_given_on_when_nobody_wants_it_any_more() -> None:
    """When the pair gives up waiting, the slot that it gathered goes to the next."""
    story = Story("g0", "g1")
    story.ask("s1")
    story.submit("t2", workload=PAIR)
    story.submit("t3")
    assert story.session("s3").state is SessionState.WAITING
    assert [start.session_id for start in only(story.cancel("t2"), fx.StartWorker)] == ["s3"]


def test_slots_of_a_lease_of_several_come_back_one_by_one() -> None:
    """Each certificate frees its own slot, and the line moves with each."""
    story = Story("g0", "g1")
    story.ask("s1", workload=PAIR)
    story.submit("t2")
    story.submit("t3")
    story.kill("s1")
    story.gone("s1")
    assert [start.session_id for start in only(story.passes("g1"), fx.StartWorker)] == ["s2"]
    assert story.slot("g0").state is SlotState.WASHING
    assert [start.session_id for start in only(story.passes("g0"), fx.StartWorker)] == ["s3"]


def test_a_task_gets_a_slot_of_its_difficulty() -> None:
    """A high task waits for a high slot while a low one is free, and goes past low ones in the line."""
    story = Story(device("a", LOW), device("b", HIGH))
    assert only(story.submit("t1", tier=Tier.HIGH), fx.StartWorker)[0].slot_ids == ("b",)
    assert not only(story.submit("t2", tier=Tier.HIGH), fx.StartWorker)
    assert only(story.submit("t3", tier=Tier.LOW), fx.StartWorker)[0].slot_ids == ("a",)
    story.submit("t4", tier=Tier.LOW)
    story.kill("s3")
    assert [start.session_id for start in only(story.clean_up("s3"), fx.StartWorker)] == ["s4"]


def test_fences_grow() -> None:
    """Every lease has a higher fence than all before it, also those of an earlier life of the node."""
    story = Story("g0", "g1", first_fence=41)
    fences = [only(story.ask(name), fx.StartWorker)[0].fence for name in ("s1", "s2")]
    assert fences == [42, 43]  # the wash at the start had 41


# -- washing, certificates, quarantine


def test_a_node_leases_nothing_before_its_slots_are_washed() -> None:
    """At start every slot is washed, and the line waits for the certificates."""
    story = Story("g0", washed=False)
    story.submit("t1")
    assert story.session().state is SessionState.WAITING
    assert only(story.passes("g0"), fx.StartWorker)


def test_the_wash_at_the_start_is_ordered() -> None:
    """One order for all slots, for no session, without a grace, under a fence that no lease will have."""
    node = Node(Rules(), judge=judge)
    effects = node.handle(ev.NodeStarted(slots=(device("g0"), device("g1"))), 0.0)
    assert effects == [
        fx.WashSlots(
            session_id=None,
            fence=1,
            slot_ids=("g0", "g1"),
            grace=0.0,
            tier=WashTier.FULL,
            prevs=(NO_CERTIFICATE, NO_CERTIFICATE),
            tenant=None,
        )
    ]


def test_a_slot_stays_in_the_wash_until_its_certificate_comes() -> None:
    """That the container is gone closes the session, and frees nothing."""
    story = warm()
    story.ask("s2")
    story.kill("s1")
    assert not only(story.gone("s1"), fx.StartWorker)
    assert story.session("s1").state is SessionState.CLOSED
    assert story.slot().state is SlotState.WASHING
    story.after(500)
    assert story.slot().state is SlotState.WASHING
    assert only(story.passes("g0"), fx.StartWorker)


def test_a_wash_that_fails_fails_the_session_and_locks_the_slot_away() -> None:
    """The session says `not_cleaned`, the slot is leased no more, and the line waits on."""
    story = warm()
    story.ask("s2")
    story.kill("s1")
    assert not only(story.fails("g0"), fx.StartWorker)
    session = story.session("s1")
    assert (session.state, session.close_reason) == (SessionState.FAILED, "killed")
    assert session.failure is not None
    assert session.failure.code is FailureCode.NOT_CLEANED
    assert (story.slot().state, story.slot().fault) == (SlotState.QUARANTINED, "memory is in use")
    assert story.gone("s1") == []
    assert session.state is SessionState.FAILED


def test_a_wash_that_fails_after_the_container_is_gone_blames_the_slot_alone() -> None:
    """The session was over; only the slot that was found bad stays behind."""
    story = Story("g0", "g1")
    story.ask("s1", workload=PAIR)
    story.kill("s1")
    story.gone("s1")
    story.fails("g1")
    story.passes("g0")
    assert story.session("s1").state is SessionState.CLOSED
    assert (story.slot("g0").state, story.slot("g1").state) == (SlotState.FREE, SlotState.QUARANTINED)


def test_bad_news_of_an_earlier_wash_is_not_believed() -> None:
    """A slot that has been leased again since is not quarantined by it."""
    story = warm()
    story.kill("s1")
    story.clean_up("s1")
    story.ask("s2")
    story.fails("g0", session_id=None, fence=1)
    story.kill("s2")
    story.fails("g0", session_id=None, fence=1)
    assert story.slot().state is SlotState.WASHING


def test_the_wash_at_the_start_can_fail() -> None:
    """The slot is in quarantine from the first day, and no session is concerned."""
    story = Story("g0", washed=False)
    story.fails("g0", session_id=None)
    assert story.slot().state is SlotState.QUARANTINED


def test_an_operator_brings_a_slot_back_by_another_wash() -> None:
    """From quarantine to washing under a new fence, and to free by a certificate with that fence."""
    story = Story("g0")
    story.ask("s1")
    story.kill("s1")
    story.fails("g0")
    late = story.certificate("g0")
    story.ask("s2")
    (wash,) = only(story.order_wash("g0"), fx.WashSlots)
    assert (wash.session_id, wash.fence, wash.slot_ids) == (None, 2, ("g0",))
    with pytest.raises(CertificateRejected):
        story.tell(ev.CertificateIssued(certificate=late))
    assert [start.session_id for start in only(story.passes("g0"), fx.StartWorker)] == ["s2"]


def test_a_fault_of_a_free_slot_locks_it_away_at_once() -> None:
    """The next request waits for another slot."""
    story = Story("g0")
    story.is_faulty("g0")
    assert story.slot().state is SlotState.QUARANTINED
    story.submit("t1")
    assert story.session().state is SessionState.WAITING


def test_a_fault_of_a_leased_slot_waits_for_the_wash() -> None:
    """The session goes on; after it, a certificate that is good does not help."""
    story = busy("t1")
    story.is_faulty("g0")
    story.end("t1")
    assert story.session().state is SessionState.READY
    story.kill("s1")
    story.clean_up("s1")
    assert (story.slot().state, story.slot().fault) == (SlotState.QUARANTINED, "xid 79")


def test_a_slot_that_is_not_there_has_no_health() -> None:
    """A check of an unknown device changes nothing."""
    story = Story("g0")
    before = snapshot(story.node)
    assert story.is_faulty("g9") == []
    assert snapshot(story.node) == before


# -- the shutdown, and what is kept


def test_a_shutdown_ends_everything_and_starts_nothing() -> None:
    """Running, starting and waiting sessions end, their tasks hear it, and nobody moves up the line."""
    story = Story("g0", "g1", "g2")
    story.submit("t1")
    story.ready("s1")
    story.submit("t2")
    story.submit("t3", workload=PAIR)
    story.submit("t4")
    effects = story.shut_down()
    assert not only(effects, fx.StartWorker)
    assert sorted(wash.session_id for wash in only(effects, fx.WashSlots)) == ["s1", "s2"]
    for number in range(1, 5):
        assert story.names(f"t{number}")[-2:] == ["error:shutdown", "task_finish:failed"]
        assert story.session(f"s{number}").close_reason is CloseReason.SHUTDOWN
    for session_id in ("s1", "s2"):
        assert not only(story.clean_up(session_id), fx.StartWorker)
    assert not list(story.node.live_sessions())
    assert story.shut_down() == []


def test_a_tombstone_can_be_read_and_is_forgotten_in_the_end() -> None:
    """For its retention a session keeps its reason and last words; then it is gone, and that is said."""
    story = warm(tombstone_retention=100)
    story.lose(log_tail="out of memory")
    story.clean_up()
    story.after(99)
    assert (story.session().close_reason, story.session().log_tail) == ("worker_exited", "out of memory")
    assert only(story.after(1), fx.ForgetSession) == [fx.ForgetSession(session_id="s1")]
    assert story.node.sessions == {}
    with pytest.raises(Refusal, match="no session s1"):
        story.kill()


def test_an_ended_task_is_kept_for_its_retention() -> None:
    """Then it is forgotten, though its session lives on."""
    story = busy("t1", task_retention=100)
    story.end("t1")
    story.after(99)
    assert story.task("t1").state is TaskState.COMPLETED
    assert only(story.after(1), fx.ForgetTask) == [fx.ForgetTask(task_id="t1")]
    assert story.node.tasks == {}
    assert story.session().state is SessionState.READY


def test_a_task_is_not_forgotten_while_its_worker_holds_on_to_it() -> None:
    """A retention shorter than the cancel grace must not lose the place that the task still takes."""
    story = busy("t1", "t2", task_retention=0, cancel_grace=20)
    assert not only(story.cancel("t1"), fx.ForgetTask)
    assert not only(story.after(15), fx.ForgetTask)
    assert only(story.end("t1", TaskState.CANCELLED), fx.SendTask)
    assert only(story.after(10), fx.ForgetTask)


def test_a_node_with_nothing_to_do_has_no_deadline() -> None:
    """The reaper may sleep until it is woken."""
    story = Story("g0", tombstone_retention=10, task_retention=10)
    assert story.node.next_deadline() is None
    story.submit("t1")
    story.ready()
    assert story.node.next_deadline() == story.node._timers.get(Alarm.TASK, "t1")
    story.end("t1")
    story.kill()
    story.clean_up()
    story.after(10)
    assert story.node.next_deadline() is None


def test_a_worker_lost_in_the_lifetime_grace_does_not_make_the_session_failed() -> None:
    """A session has one reason and one end: over by its lifetime, whatever its worker did after that."""
    story = busy("t1", max_lifetime=500)
    story.after(500)
    story.lose()
    story.gone()
    session = story.session()
    assert (session.state, session.close_reason, session.failure) == ("closed", "max_lifetime", None)


def test_what_is_remembered_of_the_past_is_bounded() -> None:
    """However long retention is, the oldest ended tasks and sessions make room for new ones."""
    story = Story("g0", ended_tasks_max=2, ended_sessions_max=1)
    for number in range(4):
        story.submit(f"t{number}")
        story.kill(f"s{number}")
        story.clean_up(f"s{number}")
    assert (set(story.node.tasks), set(story.node.sessions)) == ({"t2", "t3"}, {"s3"})


def test_places_while_a_session_prepares_are_those_of_its_own_queue() -> None:
    """The first has no place, it is next; those behind it count from one, whatever the line was before."""
    story = Story("g0", washed=False)
    story.submit("t1")
    story.submit("t2", to="s1")
    assert [story.task(t).position for t in ("t1", "t2")] == [1, 2]
    story.passes("g0")
    assert [story.task(t).position for t in ("t1", "t2")] == [None, 1]


def test_a_device_in_doubt_is_leased_when_it_answers_again() -> None:
    """Who waits for it gets it then, without another event."""
    story = Story("g0")
    story.tell(ev.SlotChecked(slot_id="g0", fault=None, doubt="no answer"))
    story.submit("t1")
    assert story.session().state == "waiting"
    story.tell(ev.SlotChecked(slot_id="g0", fault=None))
    assert story.session().state == "preparing"


def test_the_expiry_of_a_session_in_its_grace_is_the_end_of_that() -> None:
    """A draining session says when its running task's grace is over, and why."""
    story = busy("t1", max_lifetime=500, lifetime_grace=30)
    story.after(500)
    expiry = story.node.expiry(story.session())
    assert (expiry.effective, expiry.reason) == (story.now + 30, "max_lifetime")
