"""Facts that come in: requests (which may be refused) and what became of earlier effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_server.core.errors import Failure
from gpu_server.core.sessions import CloseReason, TaskState, TaskType, Workload
from gpu_server.core.slots import Certificate, SlotSpec, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""


# -- requests: `Node.handle` raises `Refusal` for these, and then nothing has changed ----------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSubmitted(Event):
    """`session_id` None asks for a new session, which takes `new_session_id`. `tier` None means the session's
    own, `low` for a new one. `timeout` counts from the start of the task, in seconds."""

    task_id: str
    tenant: str
    task_type: TaskType
    tier: Tier | None
    workload: Workload
    session_id: str | None
    new_session_id: str
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequested(Event):
    session_id: str
    tenant: str
    tier: Tier | None
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionKillRequested(Event):
    session_id: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepaliveRequested(Event):
    session_id: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCancelRequested(Event):
    task_id: str
    tenant: str


# -- facts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStarted(Event):
    """The slots of this machine. Each starts in washing, so nothing left over from before is leased."""

    slots: tuple[SlotSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderCame(Event):
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderLeft(Event):
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReached(Event):
    """Progress of a start: stage `model`, `image`, `container` or `loading`."""

    session_id: str
    stage: str
    done: float
    total: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCreated(Event):
    session_id: str
    container_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady(Event):
    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost(Event):
    """The worker cannot serve any more. `reason` is START_FAILED, WORKER_EXITED or WORKER_MISBEHAVED."""

    session_id: str
    reason: CloseReason
    failure: Failure
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnded(Event):
    """The worker has finished with a task, in whichever way: its place in the worker is free again."""

    session_id: str
    task_id: str
    state: TaskState
    failure: Failure | None = None
    usage: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerGone(Event):
    """The session's container and run folder are verified gone. `log_tail` is what it wrote last."""

    session_id: str
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WashPassed(Event):
    certificate: Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class WashFailed(Event):
    """A wash found something wrong, or could not reach what it must see until it gave up."""

    session_id: str | None
    slot_ids: tuple[str, ...]
    fence: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotChecked(Event):
    """What a health check says: a negative finding in `fault`, or in `doubt` why nothing is known."""

    slot_id: str
    fault: str | None
    doubt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWashOrdered(Event):
    """An operator wants a quarantined slot washed again."""

    slot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownOrdered(Event):
    """End everything; new work is refused from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Event):
    """Time has passed: act on the deadlines that are due."""
