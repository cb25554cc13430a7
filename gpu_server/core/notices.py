"""What the service itself tells a task's readers. Names and fields are the HTTP contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_server.core.effects import Publish
from gpu_server.core.sessions import Session, Task, TaskState

UNNUMBERED = frozenset({"queue", "progress"})
"""Events that tell the present state: they have no number of their own and are not replayed."""


def connection(task_id: str, status: str, session: Session) -> Publish:
    """`queued`, `allocated` or `session_ready`; the first event of every task is one of these."""
    gpu_ids = list(session.slot_ids)
    data = {
        "status": status,
        "task_id": task_id,
        "session_id": session.id,
        "gpu_id": gpu_ids[0] if gpu_ids else None,
        "gpu_ids": gpu_ids,
    }
    return Publish(task_id=task_id, event="connection", data=data)


def queue(task: Task) -> Publish:
    """The task's place, 1 being next. There is no estimate yet, and a guess would be worse than null."""
    return Publish(task_id=task.id, event="queue", data={"position": task.position, "eta_seconds": None})


def progress(task_id: str, stage: str, done: float, total: float | None) -> Publish:
    """How far the session's start has come."""
    return Publish(task_id=task_id, event="progress", data={"stage": stage, "done": done, "total": total})


def worker(task_id: str, status: str, session: Session) -> Publish:
    """`created`, `loading`, `working`, and `waiting` once it is free for the next task."""
    data = {"status": status, "container_id": session.container_id}
    return Publish(task_id=task_id, event="worker", data=data)


def finish(task: Task, usage: Mapping[str, Any] | None) -> Iterator[Publish]:
    """`error`, where something went wrong, and then the last event of the task."""
    elapsed = 0.0
    if task.started_at is not None and task.finished_at is not None:
        elapsed = round(task.finished_at - task.started_at, 6)
    data: dict[str, Any] = {"status": str(task.state), "elapsed_seconds": elapsed}
    if usage is not None:
        data["usage"] = usage
    if task.failure is not None:
        data["error"] = {"code": str(task.failure.code), "message": task.failure.message}
        if task.state in (TaskState.FAILED, TaskState.TIMEOUT):
            yield Publish(task_id=task.id, event="error", data=data["error"])
    yield Publish(task_id=task.id, event="task_finish", data=data)
