"""The drain: what has begun is finished, nothing new begins; each docstring is a promise."""

from __future__ import annotations

import pytest

from gpu_server.core import effects as fx
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import CloseReason, SessionState, TaskState, TaskType
from tests.core.story import EXEC, Story, busy, only, own_washes, warm, work


def ended_by_the_drain(story: Story, session_id: str = "s1") -> bool:
    session = story.session(session_id)
    return session.tearing_down and session.close_reason is CloseReason.SHUTDOWN


def test_an_idle_session_ends_at_once() -> None:
    """There is nothing to wait for, and nothing has failed."""
    story = warm()
    assert own_washes(story.drain())
    story.clean_up()
    assert (story.session().state, story.session().close_reason) == (SessionState.CLOSED, "shutdown")


def test_a_session_that_starts_for_nobody_ends_at_once() -> None:
    """It was asked for ahead of its first task, which would be refused now."""
    story = Story("g0")
    story.ask("s1")
    assert own_washes(story.drain())


def test_who_waits_for_a_slot_fails() -> None:
    """With `shutdown`, without a container to wash; and nobody moves up into the slots of who ends."""
    story = warm("g0")
    story.submit("t2")
    story.submit("t3")
    effects = story.drain()
    assert not only(effects, fx.StartWorker)
    assert [wash.session_id for wash in own_washes(effects)] == ["s1"]
    for task_id in ("t2", "t3"):
        assert story.names(task_id)[-2:] == ["error:shutdown", "task_finish:failed"]
    assert not only(story.clean_up(), fx.StartWorker)
    assert not list(story.node.live_sessions())


def test_tasks_of_a_session_run_to_their_end() -> None:
    """Also those that are queued in it, one after the other; then the session ends."""
    story = busy("t1", "t2")
    assert not own_washes(story.drain())
    effects = story.end("t1")
    assert [send.task_id for send in only(effects, fx.SendTask)] == ["t2"]
    assert not own_washes(effects)
    assert own_washes(story.end("t2"))
    assert [story.names(task_id)[-1] for task_id in ("t1", "t2")] == ["task_finish:completed"] * 2
    assert ended_by_the_drain(story)


def test_the_last_of_several_tasks_ends_the_session() -> None:
    """A batching worker is needed as long as it has one."""
    story = Story("g0")
    story.submit("t1", workload=work(max_concurrent_tasks=2))
    story.submit("t2", to="s1", workload=work(max_concurrent_tasks=2))
    story.ready()
    story.drain()
    assert not own_washes(story.end("t1"))
    assert own_washes(story.end("t2", TaskState.FAILED))


def test_a_session_that_starts_for_a_task_goes_on() -> None:
    """Its task was accepted and has its slots, so it runs."""
    story = Story("g0")
    story.submit("t1")
    assert not own_washes(story.drain())
    assert only(story.ready(), fx.SendTask)
    assert own_washes(story.end("t1"))
    assert ended_by_the_drain(story)


def test_a_task_that_goes_away_while_its_session_starts_ends_it() -> None:
    """Nobody will ever use that worker."""
    story = Story("g0")
    story.submit("t1")
    story.submit("t2", to="s1")
    story.drain()
    assert not own_washes(story.cancel("t1"))
    assert own_washes(story.cancel("t2"))
    assert ended_by_the_drain(story)


def test_a_cancelled_task_is_waited_for() -> None:
    """The session ends when its worker has let go of the task, or at the cancel deadline."""
    story = busy("t1")
    story.drain()
    assert not own_washes(story.cancel("t1"))
    assert own_washes(story.end("t1", TaskState.CANCELLED))
    assert ended_by_the_drain(story)


def test_a_oneoff_task_ends_as_ever() -> None:
    """Its session closes after it for its own reason."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF, workload=EXEC)
    story.ready()
    assert not own_washes(story.drain())
    assert own_washes(story.end("t1"))
    assert story.session().close_reason is CloseReason.ONEOFF_DONE


def test_deadlines_are_met_in_the_drain() -> None:
    """A task that runs too long does not hold it up for ever, nor does a start that never ends."""
    story = Story("g0", "g1", cancel_grace=10)
    story.submit("t1", timeout=50.0)
    story.ready("s1")
    story.submit("t2", workload=work(start_timeout=100))
    story.drain()
    story.after(60)
    assert story.names("t1")[-2:] == ["error:task_timeout", "task_finish:timeout"]
    assert story.session("s1").close_reason is CloseReason.WORKER_MISBEHAVED
    story.after(40)
    assert story.names("t2")[-2:] == ["error:start_timeout", "task_finish:failed"]


def test_new_work_is_refused() -> None:
    """In a new session and in one that goes on; what has begun may be cancelled and killed."""
    story = busy("t1", "t2")
    story.drain()
    requests = (lambda: story.submit("t3"), lambda: story.submit("t3", to="s1"), lambda: story.ask("s3"))
    for request in requests:
        with pytest.raises(Refusal) as refused:
            request()
        assert refused.value.code is RefusalCode.SHUTTING_DOWN
    story.cancel("t2")
    assert own_washes(story.kill())


def test_a_shutdown_ends_what_a_drain_has_left() -> None:
    """When patience is over, the tasks that still run fail with `shutdown`."""
    story = busy("t1", "t2")
    story.drain()
    assert own_washes(story.shut_down())
    for task_id in ("t1", "t2"):
        assert story.names(task_id)[-2:] == ["error:shutdown", "task_finish:failed"]
    story.clean_up()
    assert not list(story.node.live_sessions())


def test_a_drain_twice_is_a_drain_once() -> None:
    """The second one finds nothing to end, also after a shutdown."""
    story = busy("t1")
    story.drain()
    assert story.drain() == []
    story.shut_down()
    assert story.drain() == []


def test_a_drain_does_not_outlive_its_process() -> None:
    """Another life takes new work; what was still running in the drain goes on in it."""
    story = busy("t1")
    story.drain()
    story.restart()
    story.submit("t2", to="s1")
    assert only(story.end("t1"), fx.SendTask)
    story.end("t2")
    assert story.session().state is SessionState.READY
