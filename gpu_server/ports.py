"""Every seam of the service, on one page.

Each Protocol has a real driver in `drivers/`, a fake in `tests/fakes`, and one contract suite in
`tests/contracts` that both must pass. A driver's own errors never cross a seam: it raises the errors here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

from gpu_server.core.rows import Change, Row, Rows
from gpu_server.core.slots import SlotSpec
from gpu_server.sealed.grant import Binding
from gpu_server.sealed.wash import Figures


class Contract(StrEnum):
    """How the service talks to a worker."""

    HTTP = "http"
    EXEC = "exec"


# -- errors -----------------------------------------------------------------------------------------------


class RuntimeUnreachable(Exception):
    """The engine did not answer, so nothing is known. Retry; never conclude that a container is gone."""


class StartUnanswered(RuntimeUnreachable):
    """A worker was ordered to start, and no answer came: it may run, or have run."""


class StartRefused(Exception):
    """The engine answered, and the worker cannot start. `code` is a `FailureCode` value."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class OutputLost(Exception):
    """What a worker wrote cannot be read again from its beginning: it was not kept, or not all of it."""


class RunFolderFault(Exception):
    """What a worker left in its run folder is not what the contract allows (no socket, a link, too big)."""


# -- containers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The folder of one session under RUN_DIR, at the same path inside and outside the service's container.

    `share` is the only place the worker's uid may write (mounted at /run/gpu-worker); `task` holds input.json
    for `exec` workers and is mounted read-only at /task.
    """

    session_id: str
    path: Path
    share: Path
    task: Path

    @property
    def socket(self) -> Path:
        return self.share / "worker.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one worker may use. Sizes in bytes, `cpus` in cores."""

    memory: int
    cpus: float
    pids: int
    tmp_size: int
    tmp_exec: bool
    shm_size: int


def worker_name(session_id: str, fence: int) -> str:
    """A container's name: creating it twice is creating it once."""
    return f"gpu-server-{session_id}-{fence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All a runtime needs to create one worker. `name` holds session and fence, so creating is idempotent."""

    name: str
    session_id: str
    fence: int
    tenant: str
    task_id: str | None
    contract: Contract
    image: str
    command: tuple[str, ...] | None
    process_command: tuple[str, ...] | None
    env: Mapping[str, str]
    gpu_uuids: tuple[str, ...]
    uid: int
    model_path: Path | None
    folder: RunFolder
    limits: Limits
    sealed: bool = False
    """What this worker writes may be what a tenant has sealed: nobody ever reads it, and its `output` is
    empty."""


@dataclass(frozen=True, slots=True)
class Output:
    """Some bytes that a worker wrote, as they came (not cut at lines)."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class WorkerOutput(Protocol):
    """What one worker writes, for one reader; it ends with the worker."""

    def __aiter__(self) -> AsyncIterator[Output]: ...

    async def __anext__(self) -> Output: ...

    def close(self) -> None:
        """Let go of it. A reader that waits sees the end; closing twice is closing once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedWorker:
    """A worker that has not started yet. `output` was attached before the start and ends with the worker."""

    name: str
    container_id: str
    output: WorkerOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """A worker's process has ended. `exit_code` is the shell's convention: 128 + n for signal n."""

    name: str
    session_id: str
    exit_code: int
    oom_killed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundWorker(CreatedWorker):
    """A worker that was started before, by an earlier life of the service for one, taken up again.

    `exit` is set when it has ended meanwhile (which `heard_exit` has told too, or will); then `output` ends
    without waiting.
    """

    exit: WorkerExit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenWorker:
    """A worker of this instance that the runtime found, running or not."""

    name: str
    container_id: str
    session_id: str
    fence: int
    running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """What a worker has outside its own namespaces: asked for while it is there, to see it gone later.

    `volumes` are the names of those that it may write to.
    """

    container_id: str
    volumes: tuple[str, ...] = ()


class ContainerRuntime(Protocol):
    """Starts and removes workers. Holds no state of its own: the containers and their labels are the truth.

    Every method may raise `RuntimeUnreachable`.
    """

    name: Literal["docker", "process"]
    warnings: tuple[str, ...]

    @property
    def interruptions(self) -> int:
        """How often the engine was lost: an output that was attached before that may lack its end."""

    async def open(self, heard_exit: Callable[[WorkerExit], None]) -> None:
        """Connect and start listening for exits; `heard_exit` is called on the event loop, once for each exit
        (again after a reconnect only for exits that were missed)."""

    async def close(self) -> None:
        """Stop listening. Workers are left as they are."""

    async def ping(self, limit: float = 5.0) -> None:
        """Ask for a sign of life, open or not. Raises `RuntimeUnreachable` within `limit` seconds."""

    async def require_image(self, image: str) -> None:
        """Make sure that `image` can be started here. Raises `StartRefused("image_missing", ...)`."""

    async def create(self, spec: WorkerSpec) -> CreatedWorker:
        """Create, do not start; attach to its output. A worker of that name that exists and never started is
        replaced. Raises `StartRefused`."""

    async def start(self, name: str) -> None:
        """Start a created worker, once: one that runs is left alone. Raises `StartRefused`, also for one that
        ran and has ended: a program never runs twice; and `StartUnanswered`, after which a new engine may not
        know that an old one has started it."""

    async def reattach(self, name: str, *, from_start: bool = False) -> FoundWorker | None:
        """Take up a worker that an earlier life started; None if there is none, or it never started.

        Its output comes from now on, or with `from_start` from its very first byte, which needs a runtime
        that keeps what `exec` workers write: then each stream is in order, but how the two interleave may
        differ from what an attached reader saw. An output that was attached before ends.

        Raises `OutputLost` when `from_start` cannot be had. Reading such an output raises it too, once the
        worker has written so much that the runtime may have dropped some.
        """

    async def remove(self, name: str, *, grace: float) -> None:
        """SIGTERM, up to `grace` seconds, SIGKILL, remove with anonymous volumes. Returns only when the
        runtime confirms that no such worker is there any more; one that never was is no error."""

    async def list_workers(self) -> tuple[SeenWorker, ...]:
        """All workers of this instance, started or not, running or not."""

    async def foreign_gpu_holders(self) -> Mapping[str, str]:
        """Name of a GPU (`SlotSpec.is_meant_by`) -> a running container that is not ours and was given it."""

    async def belongings(self, name: str) -> Belongings | None:
        """What this worker of this instance has, running or not; None if there is no such worker."""

    def cleaners(self) -> tuple[Cleaner, ...]:
        """Those for what this runtime's workers may leave behind `remove`, in the order of their work."""


# -- the rest ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotReading:
    """What the device says now. `fault` is a negative finding (uncorrected ECC errors, ...), `doubt` says why
    the device could not be read."""

    memory_used_mb: int
    fault: str | None = None
    doubt: str | None = None


class SlotInventory(Protocol):
    """The devices of this machine."""

    async def discover(self) -> tuple[SlotSpec, ...]:
        """The slots to serve, limited and tiered by the settings. Raises `InventoryError`."""

    async def readings(self) -> Mapping[str, SlotReading]:
        """Slot id -> reading. A device that cannot be read has a `doubt`."""


class InventoryError(Exception):
    """The devices cannot be listed with certainty; the service must not start (fail closed)."""


class ModelStore(Protocol):
    """Model folders on this machine."""

    def names(self) -> tuple[str, ...]:
        """The ids of the models that are there."""

    async def prepare(self, model_id: str, tell: Callable[[int, int | None], None]) -> Path:
        """The real folder of a model, inside the store for certain, and as its manifest says. One that is not
        there is fetched first, where that is allowed, once for all who wait for it; `tell` hears of bytes
        done and in all. Raises `StartRefused`."""

    async def hydrate(self, folder: Path) -> None:
        """Read a model's files ahead, so that its loader finds them in the page cache. Best effort: raises
        nothing, and may be cancelled at any time."""


class EnclaveDown(Exception):
    """The enclave is not there now, or does not answer. The message says why."""


class EnclaveRefused(Exception):
    """The enclave answered, and said no. `code` is one of those in docs/sealed.md (BUSY, POLICY, ...)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveHealth:
    """`reason` says why it is not healthy. `epoch` names this life of the enclave: 16 bytes; None while there
    is none."""

    healthy: bool
    reason: str | None
    epoch: bytes | None


class Renewal(Protocol):
    """One wash's part in a restart of the enclave that several washes may share.

    A wait that is cancelled is left. After an `EnclaveDown` nothing comes of it any more, and the wash begins
    another one.
    """

    async def booted(self) -> Figures:
        """The old enclave is seen gone, and a fresh one answers that has no key yet. Raises `EnclaveDown` and
        `RuntimeUnreachable`."""

    async def attest(self, slot_id: str, record_hash: bytes) -> bytes:
        """Hand in the slot's newest record hash (32 bytes); a document of the fresh enclave that lists it,
        with it as nonce. Waits until all washes of this restart have handed in all their slots, or left, but
        not long for those that are late: so the slots of one wash are handed in at once, not one by one.
        May be called again. Raises `EnclaveDown`, `EnclaveRefused` and `RuntimeUnreachable`."""

    def leave(self) -> None:
        """This wash is over, one way or the other, and nobody waits for it. Leaving twice is leaving once."""


class Enclave(Protocol):
    """The one enclave of this node, which moves keys and never sees a request (docs/sealed.md)."""

    mode: Literal["simulated", "nitro"]
    restarts: int
    """How often it was started again since the service began."""

    @property
    def health(self) -> EnclaveHealth:
        """What was last seen of it."""

    async def attest(self, nonce: bytes) -> bytes:
        """An attestation document with this nonce (32 bytes) and the enclave's public key in it. Raises
        `EnclaveDown` and `EnclaveRefused`."""

    async def grant(self, binding: Binding, for_recipient: bytes) -> bytes:
        """A key grant to the binding's worker, from what KMS encrypted for this enclave (`for_recipient`, the
        `CiphertextForRecipient`). Raises `EnclaveDown`, also where the binding's epoch has passed, and
        `EnclaveRefused`."""

    def renew(self, slot_ids: tuple[str, ...]) -> Renewal:
        """Have it end and start again with a new key, for a wash of these slots: in a restart whose key is
        not being made yet, else in another after that. Sessions that are open go on; `attest` and `grant`
        raise `EnclaveDown` meanwhile. Whoever calls it calls `leave` in the end."""


class KeyServiceDenied(Exception):
    """The key service answered, and does not release the key. The message is for the tenant."""


class KeyServiceDown(Exception):
    """The key service did not answer, or not as it should. Retry later."""


class KeyService(Protocol):
    """AWS KMS, as far as the service uses it: it never gets a key in the clear."""

    async def release(
        self, *, kms_key_arn: str, wrapped_key: bytes, context: Mapping[str, str], document: bytes
    ) -> bytes:
        """`Decrypt` with `Recipient`: the data key in `wrapped_key`, encrypted for the enclave of this
        attestation document alone (`CiphertextForRecipient`). Raises `KeyServiceDenied` and
        `KeyServiceDown`; an answer that holds the key in the clear is the latter."""


class Clock(Protocol):
    """Time that does not jump: CLOCK_BOOTTIME, in seconds."""

    def now(self) -> float: ...

    async def sleep_until(self, when: float | None, *, wake: asyncio.Event | None = None) -> None:
        """Sleep to `when` (None: for ever), or until `wake` is set."""


# -- washing ----------------------------------------------------------------------------------------------


class Dirty(Exception):
    """A step of a wash has found something wrong: the slot is locked away. The message is for an operator,
    and holds no name that a worker chose."""


class WashUnreachable(Exception):
    """A step of a wash could not be carried out now: nothing is known. Retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedLease:
    """A lease whose worker is gone, for those who look after what it left.

    `session_id` is None for slots that are washed without a lease (at start, or by an operator's order); then
    what serves no session is residue. `uids` are those of the slots' workers, empty where they are not the
    workers' alone. `belongings` were asked for before the worker was removed; None where there was none.
    """

    session_id: str | None
    fence: int
    slot_ids: tuple[str, ...]
    uids: tuple[int, ...] = ()
    belongings: Belongings | None = None


class NotSeen(Exception):
    """A place cannot be looked at from here, now or later. The message, short ASCII, says why, and goes into
    the record of the wash."""


class Cleaner(Protocol):
    """One place where workers may leave something.

    Both methods raise `NotSeen`, `Dirty`, `WashUnreachable`, `RuntimeUnreachable` and OSError, and touch
    nothing that is another slot's, the service's or another program's.
    """

    @property
    def name(self) -> str:
        """The place, as a figure's name: `[a-z][a-z0-9_]*`."""

    async def look(self, lease: EndedLease) -> int:
        """How many things of this lease are there."""

    async def remove(self, lease: EndedLease) -> None:
        """Remove them; whether that worked is for the next look to say."""


class HostResidue(Protocol):
    """What a lease leaves on this machine outside the GPU."""

    async def clean(self, lease: EndedLease) -> Figures:
        """Remove it and look again. For each place how many things were found and removed, or, as a text, why
        it cannot be seen from here. Raises `Dirty` where something is still there after that, and
        `WashUnreachable`, `RuntimeUnreachable` or OSError where it could not be done now."""

    async def second_look(self, lease: EndedLease) -> None:
        """The same places once more, without removing. Raises as `clean`; `Dirty` where anything is there."""


class GpuScrubber(Protocol):
    """Writes and compares the memory of one GPU (worker_images/carwash)."""

    async def scrub(self, spec: SlotSpec, fence: int) -> Figures:
        """Scrub this GPU, which nobody uses; what was written and compared, in bytes. What an earlier wash of
        it left running is ended first, and nothing of this one runs on when it returns, raises or is
        cancelled. Raises `Dirty` and `WashUnreachable`."""

    async def sweep(self) -> int:
        """End and remove whatever an earlier life of the service has left; how many. Raises
        `WashUnreachable`."""

    def close(self) -> None:
        """Let go of the engine. Closing twice is closing once."""


class GpuGates(Protocol):
    """What the driver says of one GPU around a scrub. Both raise `Dirty` and `WashUnreachable`."""

    async def before(self, spec: SlotSpec) -> None:
        """Nobody uses it: a scrub may begin."""

    async def check(self, spec: SlotSpec) -> Figures:
        """It may be leased: no process, its memory back at the idle device's, no new fault. What was seen."""


# -- the journal ------------------------------------------------------------------------------------------


class JournalUnusable(Exception):
    """The file must not be used: damaged, newer than this program, another program's, or out of reach. The
    message says what to do. It has not been changed."""


class JournalFailing(Exception):
    """It could not be written now (disk full, I/O error). What was to be written is kept, and goes with the
    next write."""


class Journal(Protocol):
    """What the service has decided, so that another life of it can go on. Already open."""

    failing: str | None
    """Why the last write failed; None once one has succeeded."""

    @property
    def wants_checkpoint(self) -> bool:
        """Whether `checkpoint` is due."""

    def load(self) -> Rows:
        """All rows of a state that are written; within a table in the order in which they were first
        written. Certificates are no part of it."""

    def write(self, changes: Iterable[Change]) -> None:
        """Write these changes and all that are pending, all or none; does nothing where there is nothing.
        Raises `JournalFailing`."""

    def secure(self) -> None:
        """When this returns, all that was written before it began is on the disk, and stays there through a
        power cut. Blocks, and is called in a thread, while writing goes on. Raises `JournalFailing`, also
        while something waits to be written."""

    def certificate(self, record_hash: str) -> Row | None:
        """The row of the certificate of this record (its hash, in hex), or None. Raises `JournalFailing`."""

    def certificates(self, slot_id: str, limit: int) -> tuple[Row, ...]:
        """The rows of the newest certificates of a slot, `limit` at most, the newest last. Raises
        `JournalFailing`."""

    def prune(self, kept: int) -> None:
        """Drop all certificates but the newest `kept`, at least 1, of each slot. Raises `JournalFailing`, and
        what it has found to drop then goes with the next write."""

    def checkpoint(self) -> None:
        """Tidy up what writing left. Blocks, and is called in a thread, while writing goes on."""

    def close(self) -> None:
        """Tidy up and let go of it. Closing twice is closing once."""
