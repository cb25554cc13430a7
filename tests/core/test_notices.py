"""Notices: the names and fields of the service's own events are a contract with clients."""

from __future__ import annotations

import pytest

from gpu_server.core import notices
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.sessions import Session, Task, TaskState, TaskType
from gpu_server.core.slots import Tier
from tests.core.story import WORK


def session(*slot_ids: str) -> Session:
    return Session(
        id="s1",
        tenant="ann",
        workload=WORK,
        tier=Tier.LOW,
        task_type=TaskType.SESSION,
        created_at=0.0,
        asked_for=False,
        slot_ids=slot_ids,
        container_id="c1",
    )


def task(state: TaskState, failure: Failure | None = None, started_at: float | None = 10.0) -> Task:
    return Task(
        id="t1",
        session_id="s1",
        tenant="ann",
        task_type=TaskType.SESSION,
        timeout=60.0,
        created_at=0.0,
        state=state,
        started_at=started_at,
        finished_at=12.5,
        failure=failure,
    )


def test_connection() -> None:
    """The first event says where the task is, and on which devices once there are some."""
    told = notices.connection("t1", "allocated", session("g2", "g3"))
    assert (told.task_id, told.event) == ("t1", "connection")
    assert told.data == {
        "status": "allocated",
        "task_id": "t1",
        "session_id": "s1",
        "gpu_id": "g2",
        "gpu_ids": ["g2", "g3"],
    }
    waiting = notices.connection("t1", "queued", session())
    assert (waiting.data["gpu_id"], waiting.data["gpu_ids"]) == (None, [])


def test_queue_progress_and_worker() -> None:
    """Place, progress of the start, and what the worker does."""
    waiting = task(TaskState.QUEUED)
    waiting.position = 3
    assert notices.queue(waiting).data == {"position": 3, "eta_seconds": None}
    progress = notices.progress("t1", "model", 1.0, 4.0)
    assert (progress.event, progress.data) == ("progress", {"stage": "model", "done": 1.0, "total": 4.0})
    worker = notices.worker("t1", "loading", session("g0"))
    assert (worker.event, worker.data) == ("worker", {"status": "loading", "container_id": "c1"})


def test_a_completed_task_finishes_without_an_error() -> None:
    """One event, with the seconds since the task was sent, and what it used where the worker said so."""
    done = task(TaskState.COMPLETED)
    (finish,) = notices.finish(done, {"tokens": 7})
    assert finish.event == "task_finish"
    assert finish.data == {"status": "completed", "elapsed_seconds": 2.5, "usage": {"tokens": 7}}


@pytest.mark.parametrize("state", [TaskState.FAILED, TaskState.TIMEOUT])
def test_a_task_that_went_wrong_says_so_before_it_finishes(state: TaskState) -> None:
    """`error` first, then `task_finish` with the same error."""
    failure = Failure(code=FailureCode.TASK_TIMEOUT, message="too long")
    error, finish = notices.finish(task(state, failure), None)
    assert (error.event, error.data) == ("error", {"code": "task_timeout", "message": "too long"})
    assert (finish.event, finish.data["status"]) == ("task_finish", state.value)
    assert finish.data["error"] == error.data


def test_a_cancelled_task_is_no_error() -> None:
    """It got what was asked for; why is in `task_finish`."""
    failure = Failure(code=FailureCode.TASK_CANCELLED, message="cancelled")
    (finish,) = notices.finish(task(TaskState.CANCELLED, failure), None)
    assert finish.data["error"] == {"code": "task_cancelled", "message": "cancelled"}


def test_a_task_that_never_ran_took_no_time() -> None:
    """Waiting is not running."""
    failure = Failure(code=FailureCode.SESSION_KILLED, message="killed")
    (finish,) = notices.finish(task(TaskState.CANCELLED, failure, started_at=None), None)
    assert finish.data["elapsed_seconds"] == 0.0
