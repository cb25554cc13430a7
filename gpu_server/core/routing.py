"""Routing: which session takes a task that names a model and no session. Reads the node, never writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_server.core.admission import RETRY_AFTER_SECONDS, has_room
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import Session, SessionState, TaskType
from gpu_server.core.slots import Need, Tier

if TYPE_CHECKING:
    from gpu_server.core.node import Node

_SERVING = frozenset({SessionState.READY, SessionState.WORKING})
_LAST_PART = 0.25
"""Of a lifetime. Only in that a session may be near its end, however long tasks may take."""


def choose_session(
    node: Node,
    tenant: str,
    model_id: str,
    task_preset: str,
    *,
    tier: Tier | None,
    timeout: float,
    now: float,
) -> str | None:
    """The session of this tenant that is to take a task for this preset, or None: a new one is to.

    1. Only sessions that take tasks, and have room for one more, are looked at.
    2. One that is near its end comes last: less is left of its life than the task may take, `timeout`, or
       than the last quarter of a lifetime, whichever is shorter.
    3. One that would start the task at once comes before one where it would wait.
    4. Of those the least busy one is chosen; of equally busy ones the oldest, near their end the youngest.
    5. Where there is none, a new session of this `tier`. Where others are there, and merely full or near
       their end, only if a new one could start at once: else a tenant that asks faster than it is served
       would fill the wait line.

    Raises `Refusal` where all are full and no new one could start. The answer is true only until anything
    else is decided, so the task must be submitted before the next await.
    """
    life_needed = min(timeout, node.rules.max_lifetime * _LAST_PART)

    def lacks(session: Session) -> float:
        """Seconds of its life that are missing."""
        return 0.0 if session.max_deadline is None else max(0.0, life_needed - (session.max_deadline - now))

    def rank(session: Session) -> tuple[bool, bool, int, float]:
        return lacks(session) > 0, not _starts_now(session), _load(session), lacks(session)

    mine = [session for session in node.live_sessions() if _serves(session, tenant, model_id, task_preset)]
    best = min((session for session in mine if has_room(node, session)), key=rank, default=None)
    if best is not None and not lacks(best):
        return best.id
    if not mine or _could_start(node, mine[0].workload.need(tier or Tier.LOW, tenant, sealed=False)):
        return None
    if best is None:
        raise Refusal(
            RefusalCode.SESSION_QUEUE_FULL,
            f"{len(mine)} session(s) of {model_id}/{task_preset} have {node.rules.session_queue_max} tasks"
            " waiting each, which is the most, and no other can start now",
            retry_after=RETRY_AFTER_SECONDS,
        )
    return best.id


def _serves(session: Session, tenant: str, model_id: str, task_preset: str) -> bool:
    workload = session.workload
    return (
        session.tenant == tenant
        and session.accepts_tasks
        and session.task_type is TaskType.SESSION
        and session.sealing is None
        and not workload.wash_per_task
        and (workload.model_id, workload.task_preset) == (model_id, task_preset)
    )


def _starts_now(session: Session) -> bool:
    return session.state in _SERVING and _load(session) < session.workload.max_concurrent_tasks


def _load(session: Session) -> int:
    return len(session.busy) + len(session.queue)


def _could_start(node: Node, need: Need) -> bool:
    return node.runtime_doubt is None and node.line.could_start(need, node.slots)
