"""Sessions and tasks: their states, tables and fields. `node.py` is their only writer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gpu_server.core.errors import Failure, ImpossibleTransition
from gpu_server.core.slots import Need, Tier


class SessionState(StrEnum):
    WAITING = "waiting"
    PREPARING = "preparing"
    READY = "ready"
    WORKING = "working"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


# A session that had a container always goes through draining: it ends only when the container is gone.
SESSION_TRANSITIONS: Mapping[SessionState, frozenset[SessionState]] = {
    SessionState.WAITING: frozenset({SessionState.PREPARING, SessionState.CLOSED, SessionState.FAILED}),
    SessionState.PREPARING: frozenset({SessionState.READY, SessionState.DRAINING}),
    SessionState.READY: frozenset({SessionState.WORKING, SessionState.DRAINING}),
    SessionState.WORKING: frozenset({SessionState.READY, SessionState.DRAINING}),
    SessionState.DRAINING: frozenset({SessionState.CLOSED, SessionState.FAILED}),
    SessionState.CLOSED: frozenset(),
    SessionState.FAILED: frozenset(),
}


class CloseReason(StrEnum):
    IDLE_TIMEOUT = "idle_timeout"
    MAX_LIFETIME = "max_lifetime"
    KILLED = "killed"
    ONEOFF_DONE = "oneoff_done"
    WORKER_EXITED = "worker_exited"
    WORKER_MISBEHAVED = "worker_misbehaved"
    START_FAILED = "start_failed"
    NO_AVAILABLE_GPU = "no_available_gpu"
    ABANDONED = "abandoned"
    SEALED_TASKS_SPENT = "sealed_tasks_spent"
    TASK_DONE = "task_done"
    SLOT_LOST = "slot_lost"
    NODE_RESTARTED = "node_restarted"
    SHUTDOWN = "shutdown"


FAILED_REASONS = frozenset(
    {
        CloseReason.WORKER_EXITED,
        CloseReason.WORKER_MISBEHAVED,
        CloseReason.START_FAILED,
        CloseReason.NO_AVAILABLE_GPU,
        CloseReason.SLOT_LOST,
        CloseReason.NODE_RESTARTED,
    }
)


class TaskState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


ENDED = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.TIMEOUT, TaskState.CANCELLED})

TASK_TRANSITIONS: Mapping[TaskState, frozenset[TaskState]] = {
    TaskState.QUEUED: frozenset(
        {TaskState.RUNNING, TaskState.FAILED, TaskState.TIMEOUT, TaskState.CANCELLED}
    ),
    TaskState.RUNNING: ENDED,
    **{state: frozenset() for state in ENDED},
}


class TaskType(StrEnum):
    """`session` tasks run in a session that outlives them, `oneoff` tasks in one that closes after them."""

    SESSION = "session"
    ONEOFF = "oneoff"


class SealedUse(StrEnum):
    """Whether a preset takes sealed requests (docs/sealed.md), and whether it takes any other."""

    REQUIRED = "required"
    ALLOWED = "allowed"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the decisions need to know of a preset. `wash_per_task`: a session of it takes one task in its
    life, so that its slots are washed after every task."""

    model_id: str
    task_preset: str
    serves_sessions: bool = True
    gpus: int = 1
    max_concurrent_tasks: int = 1
    start_timeout: float = 600.0
    sealed: SealedUse = SealedUse.ALLOWED
    wash_per_task: bool = False

    def need(self, tier: Tier, tenant: str, *, sealed: bool) -> Need:
        """What a session of this preset needs in order to start."""
        return Need(count=self.gpus, tier=tier, tenant=tenant, sealed=sealed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealing:
    """What a sealed session was made for: one key of the tenant's key service, and a pool. Its worker takes
    grants of data keys under these two alone."""

    kms_key_arn: str
    pool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A data key that the enclave has released to a session's worker, each part in base64: which life of the
    enclave it was, the data key as the key service wrapped it, and what only that worker can open."""

    epoch: str
    wrapped_key: str
    grant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """An `Idempotency-Key` and a keyed hash of the body it came with; "" where that cannot be compared any
    more, and then the key alone decides: nothing is done twice."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The limits that the decisions follow. Times in seconds.

    `adoption_grace` is how long starts and tasks have at least after a restart of the service, so that what
    ended in time while nobody looked is not called late.
    The last two bound what is remembered of the past, whatever the retention times say: the oldest go first.

    `sealed_tasks_max` is how many sealed tasks a session takes in its life: its worker remembers each, so
    that none runs twice. `grants_max` is how many grants of a session are kept: the oldest goes first.

    `light_wash`: the next lease of a slot to the same tenant may do without the scrub of its device. Never
    where a session was or will be sealed, nor for a preset that is washed after every task.
    """

    idle_timeout: float = 300.0
    max_lifetime: float = 3600.0
    session_queue_max: int = 5
    gpu_wait_max: float = 600.0
    gpu_wait_max_tasks: int = 100
    stop_grace: float = 10.0
    cancel_grace: float = 10.0
    lifetime_grace: float = 30.0
    adoption_grace: float = 5.0
    disconnect_grace: float = 30.0
    task_retention: float = 600.0
    tombstone_retention: float = 3600.0
    ended_tasks_max: int = 10_000
    ended_sessions_max: int = 1_000
    sealed_tasks_max: int = 65_536
    grants_max: int = 8
    light_wash: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """When a session will end if nothing happens, in the node's seconds; None: that clock stands still."""

    idle_deadline: float | None
    max_deadline: float | None
    effective: float | None
    reason: str | None


@dataclass(slots=True, kw_only=True)
class Session:
    """A container, its lease, its queue and its deadlines; one tenant's.

    A sealed one has a `sealing`. `worker_key` is what its worker has shown, in base64: X25519, public.
    `grants` are by the id of the key that they release (hex of `psk_id`), the newest last.
    `washed_before` is the newest certificate of each of its slots when it got them, in their order, and
    `washed_after` those of the washes that its end has ordered: the hashes of their records, in hex.
    """

    id: str
    tenant: str
    workload: Workload
    tier: Tier
    task_type: TaskType
    created_at: float
    asked_for: bool  # made by its own request, not by a first task: it waits and idles without tasks
    state: SessionState = SessionState.WAITING
    stage: str | None = None
    fence: int = 0
    slot_ids: tuple[str, ...] = ()
    container_id: str | None = None
    idle_deadline: float | None = None
    max_deadline: float | None = None
    queue: deque[str] = field(default_factory=deque)
    busy: dict[str, None] = field(default_factory=dict)
    tearing_down: bool = False
    tasks_done: int = 0
    close_reason: CloseReason | None = None
    failure: Failure | None = None
    closed_at: float | None = None
    log_tail: str = ""
    key: RequestKey | None = None
    sealing: Sealing | None = None
    worker_key: str | None = None
    grants: dict[str, Grant] = field(default_factory=dict)
    sealed_tasks: int = 0
    tasks_taken: int = 0
    washed_before: tuple[str, ...] = ()
    washed_after: tuple[str, ...] = ()
    prefetched: bool = False
    history: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in (SessionState.CLOSED, SessionState.FAILED)

    @property
    def accepts_tasks(self) -> bool:
        return not self.ended and self.state is not SessionState.DRAINING

    @property
    def need(self) -> Need:
        return self.workload.need(self.tier, self.tenant, sealed=self.sealing is not None)

    def move(self, to: SessionState, why: str) -> None:
        """Follow the table; raises `ImpossibleTransition` with the recent history otherwise."""
        if to not in SESSION_TRANSITIONS[self.state]:
            raise ImpossibleTransition("session", self.id, self.state, to, self.history)
        self.history.append(f"{self.state}->{to}: {why}")
        del self.history[:-16]
        self.state = to


@dataclass(slots=True, kw_only=True)
class Task:
    """One request. Its input and its output live elsewhere; this is what the decisions need.

    `detached` tasks need no reader. `told` is how many numbered events the service itself has published for
    it: what of them is found after a restart beyond that number was never decided.
    """

    id: str
    session_id: str
    tenant: str
    task_type: TaskType
    timeout: float
    created_at: float
    detached: bool = False
    key: RequestKey | None = None
    state: TaskState = TaskState.QUEUED
    started_at: float | None = None
    finished_at: float | None = None
    position: int | None = None
    readers: int = 0
    told: int = 0
    failure: Failure | None = None
    history: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def move(self, to: TaskState, why: str) -> None:
        """Follow the table; raises `ImpossibleTransition` with the recent history otherwise."""
        if to not in TASK_TRANSITIONS[self.state]:
            raise ImpossibleTransition("task", self.id, self.state, to, self.history)
        self.history.append(f"{self.state}->{to}: {why}")
        self.state = to
