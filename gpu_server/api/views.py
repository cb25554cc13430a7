"""Sessions and tasks as the JSON that clients see."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from pydantic import BaseModel

from gpu_server.core.errors import Failure
from gpu_server.core.sessions import Session, Task
from gpu_server.service import Service


class ErrorView(BaseModel):
    code: str
    message: str


class ExpiryView(BaseModel):
    idle_deadline: str | None
    max_deadline: str | None
    effective: str | None
    reason: str | None


class QueueView(BaseModel):
    running: int
    waiting: int
    max: int


class SessionView(BaseModel):
    """`pool`, `kms_key_arn` and `worker_key` (base64, null until the worker has shown it) are those of a
    sealed session, and null for any other.

    `fence` is that of its lease, 0 before it. `washed_before` are the newest wash records of its slots when
    it got them, in the order of `gpu_ids`, and `washed_after` those of the washes behind it, as they were
    made: hashes in hex, for `GET /api/certificates/{hash}`.
    """

    session_id: str
    tenant: str
    model_id: str
    task_preset: str
    task_difficulty: str
    state: str
    stage: str | None
    sealed: bool
    pool: str | None
    kms_key_arn: str | None
    worker_key: str | None
    gpu_ids: list[str]
    fence: int
    washed_before: list[str]
    washed_after: list[str]
    container_id: str | None
    created_at: str
    closed_at: str | None
    expiry: ExpiryView
    queue: QueueView
    tasks_done: int
    close_reason: str | None
    error: ErrorView | None
    log_tail: list[str]


class SessionList(BaseModel):
    sessions: list[SessionView]


class TaskView(BaseModel):
    task_id: str
    session_id: str
    state: str
    task_type: str
    model_id: str | None
    task_preset: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    position: int | None
    eta_seconds: float | None
    error: ErrorView | None


LOG_TAIL_LINES = 50


def session_view(service: Service, session: Session, *, log_tail: bool = True) -> SessionView:
    """One session, as its tenant sees it; lists leave out the log tail."""
    node, at = service.engine.node, _Wall(service)
    expiry, workload = node.expiry(session), session.workload
    return SessionView(
        session_id=session.id,
        tenant=session.tenant,
        model_id=workload.model_id,
        task_preset=workload.task_preset,
        task_difficulty=session.tier,
        state=session.state,
        stage=session.stage,
        sealed=session.sealing is not None,
        pool=session.sealing.pool if session.sealing else None,
        kms_key_arn=session.sealing.kms_key_arn if session.sealing else None,
        worker_key=session.worker_key,
        gpu_ids=list(session.slot_ids),
        fence=session.fence,
        washed_before=list(session.washed_before),
        washed_after=list(session.washed_after),
        container_id=session.container_id,
        created_at=at.time(session.created_at),
        closed_at=at.maybe(session.closed_at),
        expiry=ExpiryView(
            idle_deadline=at.maybe(expiry.idle_deadline),
            max_deadline=at.maybe(expiry.max_deadline),
            effective=at.maybe(expiry.effective),
            reason=expiry.reason,
        ),
        queue=QueueView(
            running=len(session.busy), waiting=len(session.queue), max=node.rules.session_queue_max
        ),
        tasks_done=session.tasks_done,
        close_reason=session.close_reason,
        error=_error(session.failure),
        log_tail=session.log_tail.splitlines()[-LOG_TAIL_LINES:] if log_tail else [],
    )


def task_view(service: Service, task: Task) -> TaskView:
    """One task, as its tenant sees it."""
    at, session = _Wall(service), service.engine.node.sessions.get(task.session_id)
    return TaskView(
        task_id=task.id,
        session_id=task.session_id,
        state=task.state,
        task_type=task.task_type,
        model_id=session.workload.model_id if session else None,
        task_preset=session.workload.task_preset if session else None,
        created_at=at.time(task.created_at),
        started_at=at.maybe(task.started_at),
        finished_at=at.maybe(task.finished_at),
        position=task.position,
        eta_seconds=None,
        error=_error(task.failure),
    )


def unix_time(service: Service, when: float) -> float:
    """A moment in the node's seconds as seconds since 1970, by what the two clocks say now."""
    return when + time.time() - service.clock.now()


def rfc3339(seconds: float) -> str:
    """Seconds since 1970 as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _error(failure: Failure | None) -> ErrorView | None:
    return ErrorView(code=failure.code, message=failure.message) if failure else None


class _Wall:
    """The node's seconds as RFC 3339 UTC, by what the two clocks say now."""

    def __init__(self, service: Service) -> None:
        self._offset = unix_time(service, 0.0)

    def time(self, when: float) -> str:
        return rfc3339(when + self._offset)

    def maybe(self, when: float | None) -> str | None:
        return None if when is None else self.time(when)
