"""Admission: whether a request may change anything at all. Reads the node, never writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.events import SessionRequested, TaskSubmitted
from gpu_server.core.sessions import RequestKey, Session, Task, TaskType, Workload
from gpu_server.core.slots import Tier

if TYPE_CHECKING:
    from gpu_server.core.node import Node

RETRY_AFTER_SECONDS = 5


def owned_session(node: Node, session_id: str, tenant: str) -> Session:
    """The tenant's session; another tenant's session is as unknown as one that never was."""
    session = node.sessions.get(session_id)
    if session is None or session.tenant != tenant:
        raise Refusal(RefusalCode.SESSION_NOT_FOUND, f"no session {session_id}", session_id=session_id)
    return session


def owned_task(node: Node, task_id: str, tenant: str) -> Task:
    """The tenant's task; another tenant's task is as unknown as one that never was."""
    task = node.tasks.get(task_id)
    if task is None or task.tenant != tenant:
        raise Refusal(RefusalCode.TASK_NOT_FOUND, f"no task {task_id}", task_id=task_id)
    return task


def known_request(
    known: Mapping[tuple[str, str], str],
    entities: Mapping[str, Session] | Mapping[str, Task],
    tenant: str,
    key: RequestKey,
) -> str | None:
    """What this tenant's request with this key made before, or None. Raises `Refusal` when the key came with
    another body then. A body that cannot be compared any more counts as the same: nothing is done twice."""
    entity_id = known.get((tenant, key.name))
    if entity_id is None:
        return None
    before = entities[entity_id].key
    if before is not None and before.fingerprint and before.fingerprint != key.fingerprint:
        raise Refusal(
            RefusalCode.IDEMPOTENCY_MISMATCH,
            f"Idempotency-Key {key.name} came with another body before, and made {entity_id} then",
        )
    return entity_id


def admit_task(node: Node, event: TaskSubmitted) -> Session | None:
    """The session this task joins, or None when it gets a new one. Raises `Refusal`."""
    _refuse_when_shutting_down(node)
    if event.session_id is None:
        if event.task_type is TaskType.SESSION and not event.workload.serves_sessions:
            raise Refusal(
                RefusalCode.PRESET_NOT_SUPPORTED,
                f"preset {event.workload.task_preset} of {event.workload.model_id} has the exec contract,"
                " which serves one-off tasks only",
            )
        _admit_to_line(node, event.workload, event.tier)
        return None
    session = owned_session(node, event.session_id, event.tenant)
    if not session.accepts_tasks:
        raise Refusal(
            RefusalCode.SESSION_CLOSED,
            f"session {session.id} is {session.state} ({session.close_reason})",
            session_id=session.id,
        )
    if session.task_type is TaskType.ONEOFF:
        raise Refusal(
            RefusalCode.SESSION_MISMATCH,
            f"session {session.id} is that of one one-off task, which takes no others",
            session_id=session.id,
        )
    mine = (session.workload.model_id, session.workload.task_preset)
    theirs = (event.workload.model_id, event.workload.task_preset)
    if mine != theirs or session.task_type is not event.task_type:
        raise Refusal(
            RefusalCode.SESSION_MISMATCH,
            f"session {session.id} is a {session.task_type} of {mine[0]}/{mine[1]},"
            f" the task asks for a {event.task_type} of {theirs[0]}/{theirs[1]}",
            session_id=session.id,
        )
    if event.tier is not None and event.tier is not session.tier:
        raise Refusal(
            RefusalCode.SESSION_MISMATCH,
            f"session {session.id} has task_difficulty {session.tier}, the task asks for {event.tier}",
            session_id=session.id,
        )
    if not has_room(node, session):
        raise Refusal(
            RefusalCode.SESSION_QUEUE_FULL,
            f"session {session.id} has {len(session.queue)} tasks waiting; the most is"
            f" {node.rules.session_queue_max}",
            retry_after=RETRY_AFTER_SECONDS,
            session_id=session.id,
        )
    return session


def has_room(node: Node, session: Session) -> bool:
    """Whether one more task may wait in this session, or start there at once."""
    places = session.workload.max_concurrent_tasks - len(session.busy)
    return len(session.queue) < node.rules.session_queue_max + places


def admit_session(node: Node, event: SessionRequested) -> None:
    """Whether a session may be made ahead of its first task. Raises `Refusal`."""
    _refuse_when_shutting_down(node)
    if not event.workload.serves_sessions:
        raise Refusal(
            RefusalCode.PRESET_NOT_SUPPORTED,
            f"preset {event.workload.task_preset} of {event.workload.model_id} has the exec contract,"
            " which serves one-off tasks only",
        )
    _admit_to_line(node, event.workload, event.tier)


def _refuse_when_shutting_down(node: Node) -> None:
    if node.shutting_down:
        raise Refusal(RefusalCode.SHUTTING_DOWN, "the service is shutting down", retry_after=30)


def _admit_to_line(node: Node, workload: Workload, asked: Tier | None) -> None:
    """A new session must be able to start some day, and now if nobody is allowed to wait."""
    tier, rules = asked or Tier.LOW, node.rules
    if node.slots.serving(tier) < workload.gpus:
        raise Refusal(
            RefusalCode.NO_SUCH_CAPACITY,
            f"the preset needs {workload.gpus} slot(s) that serve difficulty {tier};"
            f" this node has {node.slots.serving(tier)}",
        )
    if node.runtime_doubt is None and node.line.could_start(workload.gpus, tier, node.slots):
        return
    if rules.gpu_wait_max <= 0 and node.runtime_doubt is not None:
        message = f"no session can be started now: {node.runtime_doubt}"
        raise Refusal(RefusalCode.RUNTIME_UNREACHABLE, message, retry_after=RETRY_AFTER_SECONDS)
    if rules.gpu_wait_max <= 0:
        raise Refusal(
            RefusalCode.NO_AVAILABLE_GPU,
            f"no GPU of difficulty {tier} is free, and waiting is switched off",
            retry_after=RETRY_AFTER_SECONDS,
        )
    if len(node.line) >= rules.gpu_wait_max_tasks:
        raise Refusal(
            RefusalCode.GPU_WAIT_LINE_FULL,
            f"{len(node.line)} sessions are waiting for a GPU; the most is {rules.gpu_wait_max_tasks}",
            retry_after=RETRY_AFTER_SECONDS,
        )
