"""Work that goes out. The engine starts each effect after the decision; it comes back as an event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_server.core.sessions import TaskState
from gpu_server.core.slots import WashTier


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Something to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker(Effect):
    """Bring up the session's container on these slots: StageReached, WorkerCreated, then WorkerReady or
    WorkerLost."""

    session_id: str
    fence: int
    slot_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptWorker(Effect):
    """Take up the session's container again, which an earlier life of the service started: WorkerReady, or
    WorkerLost. One that was not `ready` then may not exist yet, and is then started."""

    session_id: str
    fence: int
    slot_ids: tuple[str, ...]
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeTask(Effect):
    """Follow a task that an earlier life sent, or was about to send, to the session's worker: TaskEnded or
    WorkerLost. It never runs twice."""

    session_id: str
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTask(Effect):
    """Give the task to the session's worker: TaskEnded or WorkerLost."""

    session_id: str
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTask(Effect):
    """Ask the worker to stop this task; it answers with TaskEnded, or the cancel deadline passes."""

    session_id: str
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WashSlots(Effect):
    """Take down the session's container (SIGTERM, `grace` seconds, SIGKILL), wash, certify: ContainerGone,
    then CertificateIssued or WashFailed for each slot. `session_id` None: no lease has ended here.

    `prevs` are what the slots' certificates must name as their predecessors, in the order of `slot_ids`.
    `tenant` is the session's."""

    session_id: str | None
    fence: int
    slot_ids: tuple[str, ...]
    grace: float
    tier: WashTier
    prevs: tuple[bytes, ...]
    tenant: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureCertificate(Effect):
    """Force the journal to the disk, this certificate in it, however long that takes: CertificateSecured."""

    slot_id: str
    certificate_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchModel(Effect):
    """The session will start when washes that are under way have ended: fetch its public weights meanwhile.
    Nothing comes of it."""

    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish(Effect):
    """Put one of the service's own events into a task's stream, before the decision is journalled: readers
    see it only afterwards. `task_finish` ends the stream."""

    task_id: str
    event: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishTask(Effect):
    """The task has ended, and that is journalled: its input is not needed any more."""

    task_id: str
    state: TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetTask(Effect):
    """The task's retention is over."""

    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetSession(Effect):
    """The session's tombstone is gone."""

    session_id: str
