"""Sessions and tasks: each follows its table, and says how it got where it is."""

from __future__ import annotations

import itertools

import pytest

from gpu_server.core.errors import ImpossibleTransition
from gpu_server.core.sessions import (
    ENDED,
    SESSION_TRANSITIONS,
    TASK_TRANSITIONS,
    Session,
    SessionState,
    Task,
    TaskState,
    TaskType,
)
from gpu_server.core.slots import Tier
from tests.core.story import WORK


def session(state: SessionState = SessionState.WAITING) -> Session:
    return Session(
        id="s1",
        tenant="ann",
        workload=WORK,
        tier=Tier.LOW,
        task_type=TaskType.SESSION,
        created_at=0.0,
        asked_for=False,
        state=state,
        history=["earlier: it was made"],
    )


def task(state: TaskState = TaskState.QUEUED) -> Task:
    return Task(
        id="t1",
        session_id="s1",
        tenant="ann",
        task_type=TaskType.SESSION,
        timeout=60.0,
        created_at=0.0,
        state=state,
        history=["earlier: it was made"],
    )


@pytest.mark.parametrize(("state", "to"), list(itertools.product(SessionState, SessionState)))
def test_a_session_follows_its_table(state: SessionState, to: SessionState) -> None:
    """Every move is either in the table or an error that tells the session's story."""
    one = session(state)
    if to in SESSION_TRANSITIONS[state]:
        one.move(to, "test")
        assert one.state is to
        assert one.history[-1] == f"{state}->{to}: test"
        return
    with pytest.raises(ImpossibleTransition, match=f"session s1: {state} -> {to} .*earlier: it was made"):
        one.move(to, "test")
    assert one.state is state


@pytest.mark.parametrize(("state", "to"), list(itertools.product(TaskState, TaskState)))
def test_a_task_follows_its_table(state: TaskState, to: TaskState) -> None:
    """Every move is either in the table or an error that tells the task's story."""
    one = task(state)
    if to in TASK_TRANSITIONS[state]:
        one.move(to, "test")
        assert one.state is to
        assert one.history[-1] == f"{state}->{to}: test"
        return
    with pytest.raises(ImpossibleTransition, match=f"task t1: {state} -> {to} .*earlier: it was made"):
        one.move(to, "test")
    assert one.state is state


def test_the_tables_know_every_state() -> None:
    """A state without a row would be a KeyError in the night."""
    assert set(SESSION_TRANSITIONS) == set(SessionState)
    assert set(TASK_TRANSITIONS) == set(TaskState)


def test_the_end_is_the_end() -> None:
    """Nothing leads out of closed and failed, nor out of a task's four ends."""
    assert {state for state, to in SESSION_TRANSITIONS.items() if not to} == {
        SessionState.CLOSED,
        SessionState.FAILED,
    }
    assert {state for state, to in TASK_TRANSITIONS.items() if not to} == ENDED


def test_a_session_with_a_container_drains_before_it_ends() -> None:
    """Only a session that never had a container may end without draining."""
    ends = {SessionState.CLOSED, SessionState.FAILED}
    before = {state for state, to in SESSION_TRANSITIONS.items() if to & ends}
    assert before == {SessionState.WAITING, SessionState.DRAINING}


def test_a_completed_task_has_run() -> None:
    """Nothing completes from the queue."""
    assert TaskState.COMPLETED not in TASK_TRANSITIONS[TaskState.QUEUED]


@pytest.mark.parametrize("state", SessionState)
def test_who_has_ended_and_who_takes_tasks(state: SessionState) -> None:
    """Closed and failed sessions have ended; these and draining ones take no tasks."""
    ended = state in (SessionState.CLOSED, SessionState.FAILED)
    assert session(state).ended is ended
    assert session(state).accepts_tasks is not (ended or state is SessionState.DRAINING)


@pytest.mark.parametrize("state", TaskState)
def test_which_tasks_have_ended(state: TaskState) -> None:
    """All but queued and running."""
    assert task(state).ended is (state not in (TaskState.QUEUED, TaskState.RUNNING))


def test_a_session_remembers_its_last_moves_only() -> None:
    """A session that works and rests ten thousand times does not grow."""
    one = session(SessionState.READY)
    for _ in range(100):
        one.move(SessionState.WORKING, "a task runs")
        one.move(SessionState.READY, "no task is left")
    assert len(one.history) == 16
