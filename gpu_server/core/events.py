"""Facts that come in: requests (which may be refused) and what became of earlier effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_server.core.errors import Failure
from gpu_server.core.sessions import (
    CloseReason,
    Grant,
    RequestKey,
    Sealing,
    TaskState,
    TaskType,
    Workload,
)
from gpu_server.core.slots import SlotSpec, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Event):
    """Somebody wants something: `Node.handle` may raise `Refusal`, and then nothing has changed."""


# -- requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSubmitted(Request):
    """`session_id` None asks for a new session, which takes `new_session_id`. `tier` None means the session's
    own, `low` for a new one. `timeout` counts from the start of the task, in seconds. A `detached` task needs
    no reader. `key` was looked up before: it is new. A sealed task names the grant that opens it (`psk_id`,
    hex), and always its session."""

    task_id: str
    tenant: str
    task_type: TaskType
    tier: Tier | None
    workload: Workload
    session_id: str | None
    new_session_id: str
    timeout: float
    detached: bool = False
    key: RequestKey | None = None
    psk_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequested(Request):
    """With a `sealing` the session is a sealed one, and stays so."""

    session_id: str
    tenant: str
    tier: Tier | None
    workload: Workload
    key: RequestKey | None = None
    sealing: Sealing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened(Request):
    """The enclave has released a data key to this session's worker. `psk_id`, hex, names what it opens."""

    session_id: str
    tenant: str
    psk_id: str
    grant: Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionKillRequested(Request):
    session_id: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepaliveRequested(Request):
    session_id: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCancelRequested(Request):
    task_id: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestWithdrawn(Event):
    """A request was admitted and could not be made durable, so its client is told no: end what it made.
    `session_id` only where it made the session too. Its key is forgotten: the request may come again."""

    task_id: str | None
    session_id: str | None


# -- facts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStarted(Event):
    """The slots of this machine. What an earlier life left is taken up again; `rebooted` says that the
    machine itself was restarted, so that nothing of it runs any more."""

    slots: tuple[SlotSpec, ...]
    rebooted: bool = False


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
class WorkerKeyShown(Event):
    """The worker of a sealed session shows its public key, in base64. A session never gets a second one."""

    session_id: str
    key: str


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
    """The session's container is verified gone. `log_tail` is what it wrote last."""

    session_id: str
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateIssued(Event):
    """A wash has passed, and this is its certificate, as it was signed. It frees nothing yet."""

    certificate: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSecured(Event):
    """A certificate that the node has accepted is on the disk: its slot may be free."""

    slot_id: str
    certificate_hash: bytes


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
class SlotWashOrdered(Request):
    """An operator wants a quarantined slot washed again."""

    slot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeChecked(Event):
    """Whether the container runtime answers: `doubt` says why it cannot be relied on now."""

    doubt: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOrdered(Event):
    """Finish what has begun; new work is refused from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownOrdered(Event):
    """End everything; new work is refused from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Event):
    """Time has passed: act on the deadlines that are due."""
