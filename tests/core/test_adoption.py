"""Adoption: what becomes of a node's work when the service is restarted; each docstring is a promise."""

from __future__ import annotations

from gpu_server.core import effects as fx
from gpu_server.core.errors import FailureCode
from gpu_server.core.sessions import CloseReason, SessionState, TaskState, TaskType
from gpu_server.core.slots import SlotState, Tier
from gpu_server.core.timers import Alarm
from tests.core.story import EXEC, Story, busy, only, own_washes, warm, work

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})
PAIR = work(gpus=2)


def due(story: Story, alarm: Alarm, name: str) -> float | None:
    return story.node._timers.get(alarm, name)


# -- sessions that live


def test_a_ready_session_is_adopted() -> None:
    """Under its own fence, on its own slots; it takes the next task as if nothing had happened."""
    story = warm("g0", "g1")
    (adopt,) = only(story.restart(after=5), fx.AdoptWorker)
    assert adopt == fx.AdoptWorker(session_id="s1", fence=1, slot_ids=("g0",), ready=True)
    assert story.slot("g0").state is SlotState.LEASED
    assert only(story.submit("t1", to="s1"), fx.SendTask)


def test_a_running_task_is_followed() -> None:
    """It is resumed, not sent again; what is queued behind it keeps its place and starts after it."""
    story = busy("t1", "t2", "t3")
    effects = story.restart()
    assert only(effects, fx.ResumeTask) == [fx.ResumeTask(session_id="s1", task_id="t1")]
    assert not only(effects, fx.SendTask)
    assert [story.task(task_id).position for task_id in ("t1", "t2", "t3")] == [None, 1, 2]
    assert [send.task_id for send in only(story.end("t1"), fx.SendTask)] == ["t2"]
    assert story.names("t1")[-1] == "task_finish:completed"


def test_all_tasks_of_a_batching_worker_are_followed() -> None:
    """In the order in which it got them, each once."""
    story = Story("g0")
    for number in range(1, 5):
        to = None if number == 1 else "s1"
        story.submit(f"t{number}", to=to, workload=work(max_concurrent_tasks=3))
    story.ready()
    story.end("t1")
    followed = only(story.restart(), fx.ResumeTask)
    assert [resume.task_id for resume in followed] == ["t2", "t3", "t4"]


def test_a_worker_that_died_meanwhile_ends_its_session() -> None:
    """Whoever takes it up finds out, and then it is as lost as any."""
    story = busy("t1")
    story.restart()
    assert own_washes(story.lose())
    assert story.names("t1")[-2:] == ["error:worker_exited", "task_finish:failed"]


def test_a_session_that_was_starting_is_started_further() -> None:
    """It is not ready, perhaps it does not even exist; its task starts when it is."""
    story = Story("g0")
    story.submit("t1")
    (adopt,) = only(story.restart(), fx.AdoptWorker)
    assert not adopt.ready
    assert [send.task_id for send in only(story.ready(), fx.SendTask)] == ["t1"]


def test_a_start_that_fails_after_the_restart_is_a_failed_start() -> None:
    """As it would have been before it."""
    story = Story("g0")
    story.submit("t1")
    story.restart()
    assert own_washes(story.lose(reason=CloseReason.START_FAILED))
    story.clean_up()
    assert story.session().state is SessionState.FAILED


def test_a_oneoff_task_takes_its_session_with_it_after_a_restart() -> None:
    """The session of a one-off task closes when it ends, whichever life it ends in."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF, workload=EXEC)
    story.ready()
    story.restart()
    assert own_washes(story.end("t1"))
    assert story.session().close_reason is CloseReason.ONEOFF_DONE


def test_a_session_in_its_grace_keeps_it() -> None:
    """Its task is followed, and the end of the grace is where it was."""
    story = busy("t1", max_lifetime=100)
    story.after(100)
    effects = story.restart(after=20)
    assert only(effects, fx.AdoptWorker)[0].ready
    assert only(effects, fx.ResumeTask)
    assert not own_washes(story.after(9.9))
    assert own_washes(story.after(0.1))


# -- cancels


def test_a_cancelled_task_is_cancelled_again() -> None:
    """The worker may never have heard of it; it gets the full cancel grace anew, and no longer than that."""
    story = busy("t1", "t2", cancel_grace=10)
    story.cancel("t1")
    story.after(8)
    effects = story.restart(after=60)
    assert only(effects, fx.ResumeTask) == [fx.ResumeTask(session_id="s1", task_id="t1")]
    assert only(effects, fx.CancelTask) == [fx.CancelTask(session_id="s1", task_id="t1")]
    assert not own_washes(story.after(9.9))
    assert own_washes(story.after(0.1))
    assert story.session().close_reason is CloseReason.WORKER_MISBEHAVED


def test_a_cancelled_task_keeps_its_place_until_the_worker_lets_go() -> None:
    """Also over a restart: the next one starts only then, and the client hears nothing twice."""
    story = busy("t1", "t2")
    story.cancel("t1")
    assert not only(story.restart(), fx.SendTask)
    assert [send.task_id for send in only(story.end("t1", TaskState.CANCELLED), fx.SendTask)] == ["t2"]
    assert story.names("t1").count("task_finish:cancelled") == 1


# -- the line


def test_who_waits_keeps_the_place() -> None:
    """The line is as it was, each task hears its place anew, and nobody starts before a wash."""
    story = Story("g0")
    story.ask("s0")
    for number in (1, 2, 3):
        story.submit(f"t{number}")
    story.submit("t4", to="s2")
    effects = story.restart()
    assert [session.id for session in story.node.line] == ["s1", "s2", "s3"]
    assert [story.names(f"t{number}")[-1] for number in (1, 2, 3, 4)] == [
        "queue:1",
        "queue:2",
        "queue:3",
        "queue:3",
    ]
    assert not only(effects, fx.StartWorker)
    story.kill("s0")
    assert [start.session_id for start in only(story.clean_up("s0"), fx.StartWorker)] == ["s1"]


def test_waiting_for_a_gpu_has_the_same_end() -> None:
    """A restart does not prolong it."""
    story = Story("g0", gpu_wait_max=100)
    story.ask("s0")
    story.submit("t1")
    story.after(60)
    story.restart(after=39)
    story.after(0.9)
    assert story.task().state is TaskState.QUEUED
    story.after(0.1)
    assert story.task().state is TaskState.TIMEOUT


# -- deadlines


def test_a_task_that_is_overdue_gets_a_moment() -> None:
    """It may have ended in time while nobody looked; one that has time left gets no more of it."""
    story = Story("g0", "g1", adoption_grace=5)
    for number, timeout in ((1, 20.0), (2, 100.0)):
        story.submit(f"t{number}", timeout=timeout)
        story.ready(f"s{number}")
    began = story.now
    story.restart(after=50)
    assert (due(story, Alarm.TASK, "t1"), due(story, Alarm.TASK, "t2")) == (story.now + 5, began + 100)
    story.after(4.9)
    story.end("t1")
    assert story.task("t1").state is TaskState.COMPLETED


def test_a_start_that_is_overdue_gets_a_moment() -> None:
    """Its worker may be ready by now."""
    story = Story("g0", adoption_grace=5)
    story.ask("s1", workload=work(start_timeout=40))
    story.restart(after=50)
    assert not own_washes(story.after(4.9))
    assert own_washes(story.after(0.1))
    assert story.session().failure is not None
    assert story.session().failure.code is FailureCode.START_TIMEOUT


def test_a_lifetime_that_is_over_is_over() -> None:
    """It has kept running, and ends at once."""
    story = warm("g0", max_lifetime=100, idle_timeout=1000)
    story.restart(after=101)
    assert own_washes(story.after(0))
    assert story.session().close_reason is CloseReason.MAX_LIFETIME


def test_a_grace_that_is_over_gets_a_moment() -> None:
    """A task that ended in the grace of its session's lifetime, while nobody looked, has ended in time."""
    story = busy()
    story.after(story.node.rules.max_lifetime)
    story.restart(after=story.node.rules.lifetime_grace + 1)
    story.after(0)
    assert not story.task().ended
    story.end()
    assert story.task().state is TaskState.COMPLETED


def test_the_idle_clock_keeps_running() -> None:
    """A session that nobody used over the restart idles out when it would have."""
    story = warm("g0", idle_timeout=100)
    deadline = story.session().idle_deadline
    story.restart(after=60)
    assert story.session().idle_deadline == deadline
    assert not own_washes(story.after(39.9))
    assert own_washes(story.after(0.1))


def test_what_has_ended_is_forgotten_on_time() -> None:
    """Retention counts from the end, whichever life that was in."""
    story = busy("t1", task_retention=100, tombstone_retention=200)
    story.end("t1")
    story.kill()
    story.clean_up()
    story.restart(after=99)
    assert story.task("t1").state is TaskState.COMPLETED
    assert only(story.after(1), fx.ForgetTask)
    assert only(story.after(100), fx.ForgetSession)


# -- readers


def test_readers_have_a_while_to_come_back() -> None:
    """All are gone with the process. Who does not come back within the disconnect grace gives up the task."""
    story = busy("t1", "t2", disconnect_grace=30)
    story.restart(after=200)
    assert (story.task("t1").readers, story.task("t2").readers) == (0, 0)
    story.after(29.9)
    story.read("t2")
    assert only(story.after(0.1), fx.CancelTask) == [fx.CancelTask(session_id="s1", task_id="t1")]
    assert story.last("t1")["error"]["code"] == "client_gone"
    assert story.task("t2").state is TaskState.QUEUED


def test_a_task_that_needs_no_reader_needs_none_after_a_restart() -> None:
    """It was submitted to run by itself."""
    story = warm("g0")
    story.submit("t1", to="s1", timeout=500.0, read=False, detached=True)
    story.restart()
    story.after(400)
    assert story.task("t1").state is TaskState.RUNNING
