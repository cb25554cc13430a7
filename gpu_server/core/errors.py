"""Every way this service says no, each with a stable code.

Two families. A `Refusal` is raised: the request changed nothing. A `FailureCode` is published: a task or
session that existed ended badly, and the code says why. The HTTP edge maps codes to statuses; nothing here
knows about HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RefusalCode(StrEnum):
    """Codes of refused requests. Clients match on these; they never change their meaning."""

    UNAUTHORIZED = "unauthorized"
    INVALID_REQUEST = "invalid_request"
    BODY_TOO_LARGE = "body_too_large"
    METADATA_TOO_DEEP = "metadata_too_deep"
    TIMEOUT_OUT_OF_RANGE = "timeout_out_of_range"
    MODEL_NOT_FOUND = "model_not_found"
    PRESET_NOT_FOUND = "preset_not_found"
    PRESET_NOT_SUPPORTED = "preset_not_supported"
    IMAGE_NOT_ALLOWED = "image_not_allowed"
    SESSION_NOT_FOUND = "session_not_found"
    SESSION_CLOSED = "session_closed"
    SESSION_MISMATCH = "session_mismatch"
    SESSION_QUEUE_FULL = "session_queue_full"
    TASK_NOT_FOUND = "task_not_found"
    NO_AVAILABLE_GPU = "no_available_gpu"
    NO_SUCH_CAPACITY = "no_such_capacity"
    GPU_WAIT_LINE_FULL = "gpu_wait_line_full"
    TOO_MUCH_QUEUED = "too_much_queued"
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch"
    STORAGE_FAILING = "storage_failing"
    EVENTS_GONE = "events_gone"
    POOL_NOT_FOUND = "pool_not_found"
    SEALED_REQUIRED = "sealed_required"
    SEALED_NOT_SUPPORTED = "sealed_not_supported"
    SESSION_NOT_READY = "session_not_ready"
    SESSION_NOT_OPEN = "session_not_open"
    REPLAY = "replay"
    ENCLAVE_UNAVAILABLE = "enclave_unavailable"
    ENCLAVE_BUSY = "enclave_busy"
    ENCLAVE_REFUSED = "enclave_refused"
    ATTESTATION_FAILED = "attestation_failed"
    DECRYPT_FAILED = "decrypt_failed"
    KMS_DENIED = "kms_denied"
    KMS_DOWN = "kms_down"
    OPERATOR_ONLY = "operator_only"
    SLOT_NOT_FOUND = "slot_not_found"
    SLOT_NOT_QUARANTINED = "slot_not_quarantined"
    CERTIFICATE_NOT_FOUND = "certificate_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    RUNTIME_UNREACHABLE = "runtime_unreachable"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


class FailureCode(StrEnum):
    """Codes of tasks and sessions that ended badly, as `error.code` in events and in their JSON."""

    TASK_TIMEOUT = "task_timeout"
    TASK_CANCELLED = "task_cancelled"
    CLIENT_GONE = "client_gone"
    TASK_FAILED = "task_failed"
    REQUEST_REFUSED = "request_refused"
    DECRYPT_FAILED = "decrypt_failed"
    REPLAY = "replay"
    EVENTS_GONE = "events_gone"
    GPU_WAIT_TIMEOUT = "gpu_wait_timeout"
    SESSION_KILLED = "session_killed"
    SESSION_LIFETIME = "session_lifetime"
    CANCEL_IGNORED = "cancel_ignored"
    IMAGE_MISSING = "image_missing"
    MODEL_MISSING = "model_missing"
    MODEL_DAMAGED = "model_damaged"
    MODEL_FETCH_FAILED = "model_fetch_failed"
    START_FAILED = "start_failed"
    START_TIMEOUT = "start_timeout"
    WORKER_EXITED = "worker_exited"
    WORKER_PROTOCOL = "worker_protocol"
    WORKER_UNREACHABLE = "worker_unreachable"
    RUN_FOLDER_FAULT = "run_folder_fault"
    RUNTIME_UNREACHABLE = "runtime_unreachable"
    SERVICE_RESTARTED = "service_restarted"
    NODE_RESTARTED = "node_restarted"
    SLOT_LOST = "slot_lost"
    STORAGE_FAILING = "storage_failing"
    NOT_CLEANED = "not_cleaned"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a task or a session ended badly: a stable code and a message a user can act on.

    `code` is a `FailureCode`, or the worker's own code where the worker reported the failure. `from_worker`:
    the message holds the worker's own words, and so perhaps a tenant's data: it is never written to a disk.
    It is always text that can be encoded: it may quote a file's name, which need not be.
    """

    code: str
    message: str
    from_worker: bool = False

    def __post_init__(self) -> None:
        plain = self.message.encode("utf-8", "backslashreplace").decode("utf-8")
        object.__setattr__(self, "message", plain)


class Refusal(Exception):
    """The request was refused, and nothing has changed.

    `ids` names what it concerns (task_id, session_id, ...); `retry_after` is in seconds where waiting helps.
    """

    def __init__(
        self, code: RefusalCode, message: str, *, retry_after: int | None = None, **ids: str | None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.ids = {name: value for name, value in ids.items() if value is not None}


class ImpossibleTransition(Exception):
    """A state machine was asked for a move that its table does not hold: a bug, told with its story."""

    def __init__(self, kind: str, entity_id: str, state: str, to: str, history: list[str]) -> None:
        story = "; ".join(history) or "no moves yet"
        super().__init__(f"{kind} {entity_id}: {state} -> {to} is impossible (history: {story})")


class CertificateRejected(Exception):
    """A certificate was offered that is none, or not for the wash that was ordered. The slot stays as it is.

    `slot_id` is "?" where the certificate could not be read.
    """

    def __init__(self, slot_id: str, why: str) -> None:
        super().__init__(f"slot {slot_id}: certificate rejected: {why}")
        self.slot_id = slot_id
        self.why = why
