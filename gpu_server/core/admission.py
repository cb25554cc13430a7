"""Admission: whether a request may change anything at all. Reads the node, never writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.events import SessionRequested, TaskSubmitted
from gpu_server.core.sessions import Grant, RequestKey, SealedUse, Session, Task, TaskType, Workload
from gpu_server.core.slots import Need, Tier

if TYPE_CHECKING:
    from gpu_server.core.node import Node

RETRY_AFTER_SECONDS = 5
KEY_RETRY_AFTER_SECONDS = 1


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


def granted(session: Session, psk_id: str) -> Grant:
    """The grant that opens what is sealed with this key. Raises `Refusal` where the session has none."""
    if session.sealing is None:
        raise Refusal(
            RefusalCode.SEALED_NOT_SUPPORTED,
            f"session {session.id} is not sealed: it was made without kms_key_arn",
            session_id=session.id,
        )
    if (grant := session.grants.get(psk_id)) is None:
        raise Refusal(
            RefusalCode.SESSION_NOT_OPEN,
            f"session {session.id} has no grant of the key that this request is sealed with: open it first",
            session_id=session.id,
        )
    return grant


def admit_opening(node: Node, session_id: str, tenant: str) -> Session:
    """The session, if a data key may be released to its worker now. Raises `Refusal`."""
    session = owned_session(node, session_id, tenant)
    if session.sealing is None:
        raise Refusal(
            RefusalCode.SEALED_NOT_SUPPORTED,
            f"session {session.id} is not sealed: it was made without kms_key_arn",
            session_id=session.id,
        )
    _require_open_to_tasks(node, session)
    if session.worker_key is None:
        raise Refusal(
            RefusalCode.SESSION_NOT_READY,
            f"the worker of session {session.id} has not shown its key yet ({session.state})",
            retry_after=KEY_RETRY_AFTER_SECONDS,
            session_id=session.id,
        )
    return session


def _require_open_to_tasks(node: Node, session: Session) -> None:
    if not session.accepts_tasks:
        raise Refusal(
            RefusalCode.SESSION_CLOSED,
            f"session {session.id} is {session.state} ({session.close_reason})",
            session_id=session.id,
        )
    if session.sealed_tasks >= node.rules.sealed_tasks_max:
        raise Refusal(
            RefusalCode.SESSION_CLOSED,
            f"session {session.id} has taken {session.sealed_tasks} sealed tasks, which is the most",
            session_id=session.id,
        )
    if session.workload.wash_per_task and session.tasks_taken:
        raise Refusal(
            RefusalCode.SESSION_CLOSED,
            f"session {session.id} takes one task: its preset washes after every task",
            session_id=session.id,
        )


def admit_task(node: Node, event: TaskSubmitted) -> Session | None:
    """The session this task joins, or None when it gets a new one. Raises `Refusal`."""
    _refuse_when_shutting_down(node)
    if event.psk_id is None and event.workload.sealed is SealedUse.REQUIRED:
        raise _sealed_required(event.workload)
    if event.session_id is None:
        if event.task_type is TaskType.SESSION and not event.workload.serves_sessions:
            raise Refusal(
                RefusalCode.PRESET_NOT_SUPPORTED,
                f"preset {event.workload.task_preset} of {event.workload.model_id} has the exec contract,"
                " which serves one-off tasks only",
            )
        _admit_to_line(node, event.workload.need(event.tier or Tier.LOW, event.tenant, sealed=False))
        return None
    session = owned_session(node, event.session_id, event.tenant)
    _require_open_to_tasks(node, session)
    if event.psk_id is not None:
        granted(session, event.psk_id)
    elif session.sealing is not None:
        raise Refusal(
            RefusalCode.SESSION_MISMATCH,
            f"session {session.id} takes sealed tasks only",
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
    if event.sealing is None and event.workload.sealed is SealedUse.REQUIRED:
        raise _sealed_required(event.workload)
    if event.sealing is not None and event.workload.sealed is SealedUse.OFF:
        raise Refusal(
            RefusalCode.SEALED_NOT_SUPPORTED,
            f"preset {event.workload.task_preset} of {event.workload.model_id} takes no sealed requests",
        )
    sealed = event.sealing is not None
    _admit_to_line(node, event.workload.need(event.tier or Tier.LOW, event.tenant, sealed=sealed))


def _sealed_required(workload: Workload) -> Refusal:
    return Refusal(
        RefusalCode.SEALED_REQUIRED,
        f"preset {workload.task_preset} of {workload.model_id} takes sealed requests only:"
        " start a session with kms_key_arn",
    )


def _refuse_when_shutting_down(node: Node) -> None:
    if node.shutting_down:
        raise Refusal(RefusalCode.SHUTTING_DOWN, "the service is shutting down", retry_after=30)


def _admit_to_line(node: Node, need: Need) -> None:
    """A new session must be able to start some day, and now if nobody is allowed to wait."""
    tier, rules = need.tier, node.rules
    if node.slots.serving(tier) < need.count:
        raise Refusal(
            RefusalCode.NO_SUCH_CAPACITY,
            f"the preset needs {need.count} slot(s) that serve difficulty {tier};"
            f" this node has {node.slots.serving(tier)}",
        )
    if node.runtime_doubt is None and node.line.could_start(need, node.slots):
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
