"""Server-sent event frames: encoding the service's own, and checking every byte a worker sends.

The grammar of worker frames is in docs/worker-contract.md; it is a strict subset of the event stream format
of the HTML standard (section 9.2), so that one regular expression decides what a frame is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson

from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.sessions import TaskState

MAX_FRAME_BYTES = 1 << 20
MAX_END_BYTES = 16 * 1024

_FRAME = re.compile(rb"(?:id: ([1-9][0-9]{0,14})\n)?(event: ([a-z_]{1,32})\ndata: (\{[^\r\n]*\})\n\n)")
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
SEALED_END_CODES = frozenset({FailureCode.TASK_FAILED, FailureCode.REQUEST_REFUSED})
"""What the plain end of a sealed task may say of a failure: the sealed stream says all else."""


class ProtocolFault(Exception):
    """A worker sent what the contract does not allow."""


class FrameSink(Protocol):
    """Where checked frames go: a task's stream."""

    def relay(self, bodies: list[bytes]) -> None:
        """Numbered events, each from its `event:` line to the empty line that ends it."""

    def note(self, event: str, data: Mapping[str, Any]) -> None:
        """An event without a number."""

    def miss(self, count: int) -> None:
        """The worker dropped `count` events that nobody will get any more; numbers go on behind them."""


def encode(event: str, data: Mapping[str, Any]) -> bytes:
    """A frame without its `id:` line."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(data))


def _text(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda data: all(type(data.get(name)) is str for name in names)


def _is_progress(data: dict[str, Any]) -> bool:
    return (
        type(data.get("stage")) is str
        and type(data.get("done")) in (int, float)
        and type(data.get("total")) in (int, float, type(None))
    )


def _is_end(data: dict[str, Any]) -> bool:
    error, usage = data.get("error"), data.get("usage")
    return (
        data.get("status") in ("completed", "failed", "cancelled")
        and (error is None or (type(error) is dict and _text("code", "message")(error)))
        and (usage is None or type(usage) is dict)
    )


def _is_sealed(data: dict[str, Any]) -> bool:
    """Nothing but base64, in full: a text beside it would be a tenant's, in the clear."""
    chunk = data.get("data")
    return len(data) == 1 and type(chunk) is str and chunk != "" and _BASE64.fullmatch(chunk) is not None


WORKER_EVENTS: Mapping[str, Callable[[dict[str, Any]], bool]] = {
    "text_delta": lambda data: type(data.get("delta")) is str,
    "text": _text("text"),
    "logs": lambda data: data.get("stream") in ("stdout", "stderr") and type(data.get("line")) is str,
    "artifact": _text("name", "media_type", "data"),
    "progress": _is_progress,
    "error": _text("code", "message"),
}
"""Every event that a worker may emit, and whether its data is what the contract says."""

SEALED_EVENTS: Mapping[str, Callable[[dict[str, Any]], bool]] = {"sealed": _is_sealed}
"""Those of the worker of a sealed session, which may emit no other."""


def _with_end(
    events: Mapping[str, Callable[[dict[str, Any]], bool]],
) -> Mapping[bytes, Callable[[dict[str, Any]], bool]]:
    return {**{name.encode(): check for name, check in events.items()}, b"end": _is_end}


_CHECKS, _SEALED_CHECKS = _with_end(WORKER_EVENTS), _with_end(SEALED_EVENTS)


_PASSED_ON_AS_VALUES = frozenset({b"progress", b"end"})  # every other event goes out as the bytes it came in


def is_encodable(data: Mapping[str, Any]) -> bool:
    """Whether `encode` can write what was read: orjson reads nesting of 1,024 levels, and writes 254."""
    try:
        orjson.dumps(data)
    except orjson.JSONEncodeError:
        return False
    return True


class FrameReader:
    """Reads one task's stream from its worker, in whatever pieces it comes, and passes it on in bulk.

    `seq` is the number of the last event taken, from which a broken connection is taken up again; a reader
    may begin behind events that another one took.

    Of a `sealed` session's worker it takes `sealed` events and the end, and of the end the status and a code:
    whatever else came would be in the clear.
    """

    def __init__(self, sink: FrameSink, seq: int = 0, *, sealed: bool = False) -> None:
        self.seq = seq
        self._sealed = sealed
        self._checks = _SEALED_CHECKS if sealed else _CHECKS
        self.end: tuple[TaskState, Failure | None, Mapping[str, Any] | None] | None = None
        self._sink = sink
        self._rest = bytearray()

    def reconnected(self) -> None:
        """A new connection starts at a frame's beginning."""
        self._rest.clear()

    def skip_to(self, seq: int) -> None:
        """The worker has dropped what lies between the last event taken and event `seq`, and that one too."""
        if seq <= self.seq:
            raise ValueError(f"event {seq} is not ahead of {self.seq}")
        missed, self.seq = seq - self.seq, seq
        self._sink.miss(missed)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `ProtocolFault`; what came before the fault is passed on."""
        if self._rest:
            # Look at what is new alone, so that a frame that trickles in byte by byte costs no more.
            seam = max(0, len(self._rest) - 1)
            self._rest += chunk
            if self._rest.find(b"\n\n", seam) < 0:
                self._check_length(len(self._rest))
                return
            chunk = bytes(self._rest)
            self._rest.clear()
        self._read(chunk)

    def _read(self, buffer: bytes) -> None:
        position, seq = 0, self.seq
        bodies: list[bytes] = []
        try:
            while (match := _FRAME.match(buffer, position)) is not None:
                number, body, name, raw = match.groups()
                data = self._check(name, raw)
                self._check_length(match.end() - position)
                if (name == b"progress") is not (number is None):
                    raise ProtocolFault("every event but `progress` has an id")
                position = match.end()
                if number is None:
                    self._pass_on(bodies, seq)
                    bodies = []
                    self._sink.note("progress", data)
                    continue
                if int(number) != seq + 1:
                    raise ProtocolFault(f"event id {int(number)} came after {seq}")
                seq += 1
                if name == b"end":
                    if len(raw) > MAX_END_BYTES:
                        raise ProtocolFault(f"the data of `end` is longer than {MAX_END_BYTES} bytes")
                    self.end = _sealed_end_of(data) if self._sealed else _end_of(data)
                else:
                    bodies.append(body)
        finally:
            self._pass_on(bodies, seq)
        if buffer.find(b"\n\n", position) >= 0:
            raise ProtocolFault("bytes that are no frame: " + repr(buffer[position : position + 80]))
        self._check_length(len(buffer) - position)
        self._rest += buffer[position:]

    @staticmethod
    def _check_length(length: int) -> None:
        if length > MAX_FRAME_BYTES:
            raise ProtocolFault(f"a frame is longer than {MAX_FRAME_BYTES} bytes")

    def _pass_on(self, bodies: list[bytes], seq: int) -> None:
        self.seq = seq
        if bodies:
            self._sink.relay(bodies)

    def _check(self, name: bytes, raw: bytes) -> dict[str, Any]:
        if self.end is not None:
            raise ProtocolFault("an event came after `end`")
        check = self._checks.get(name)
        if check is None:
            raise ProtocolFault(f"workers may not emit {name.decode()!r}")
        try:
            data = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise ProtocolFault(f"the data of {name.decode()!r} is not JSON: {error}") from None
        if not check(data):
            raise ProtocolFault(f"the data of {name.decode()!r} lacks a field or has one of a wrong type")
        if name in _PASSED_ON_AS_VALUES and not is_encodable(data):
            raise ProtocolFault(f"the data of {name.decode()!r} is nested too deep")
        return data  # type: ignore[no-any-return]  # the pattern admits an object only


def _end_of(data: dict[str, Any]) -> tuple[TaskState, Failure | None, Mapping[str, Any] | None]:
    """A code that is no code is replaced: codes outlive the task, the worker's own words must not."""
    state = TaskState(data["status"])
    error = data.get("error")
    if state is TaskState.COMPLETED:
        failure = None
    elif error is not None:
        code = error["code"] if _CODE.fullmatch(error["code"]) else FailureCode.TASK_FAILED
        failure = Failure(code=code, message=error["message"], from_worker=True)
    else:
        code = FailureCode.TASK_FAILED if state is TaskState.FAILED else FailureCode.TASK_CANCELLED
        failure = Failure(code=code, message=f"the worker ended the task as {state}")
    return state, failure, data.get("usage")


def _sealed_end_of(data: dict[str, Any]) -> tuple[TaskState, Failure | None, None]:
    """Without the worker's words, and without its usage, which could be made to hold any."""
    state, failure, _ = _end_of(data)
    if failure is None:
        return state, None, None
    if state is TaskState.CANCELLED:
        return state, Failure(code=FailureCode.TASK_CANCELLED, message="the worker cancelled the task"), None
    code = failure.code if failure.code in SEALED_END_CODES else FailureCode.TASK_FAILED
    return state, Failure(code=code, message="the task failed: the sealed stream says why"), None
