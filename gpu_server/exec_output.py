"""The `exec` worker contract: lines on stdout that are events become events, everything else becomes logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import orjson

from gpu_server.frames import MAX_FRAME_BYTES, WORKER_EVENTS, encode, is_encodable
from gpu_server.ports import Output
from gpu_server.stream import Stream

MAX_LINE_BYTES = MAX_FRAME_BYTES
MAX_LOG_LINE_BYTES = 64 * 1024

Name = Literal["stdout", "stderr"]
_NAMES: Final[tuple[Name, ...]] = ("stdout", "stderr")


def count_by_stream(frames: bytes) -> dict[Name, int]:
    """How many numbered events of a program came from which of its streams, by their encoded frames.

    Only stderr makes a `logs` event that names it, which begins as `_logs` writes it; and a line break within
    an event's data is escaped, so what is found behind one is a frame's own line.
    """
    events = frames.count(b"\nevent: ") - frames.count(b"\nevent: progress\n")
    stderr = frames.count(b'\nevent: logs\ndata: {"stream":"stderr",')
    return {"stdout": events - stderr, "stderr": stderr}


class ExecOutput:
    """Cuts output into lines and writes each into the task's stream. A line that is too long is cut up.

    `skip` is for output that is read again from its beginning: as many numbered events of each stream are not
    given out again, nor the unnumbered ones before them. So what comes out of a stream may not depend on the
    pieces in which it is read.
    """

    def __init__(self, stream: Stream, skip: Mapping[Name, int] | None = None) -> None:
        self._stream = stream
        self._skip = dict.fromkeys(_NAMES, 0) | dict(skip or {})
        self._rest: dict[Name, bytearray] = {name: bytearray() for name in _NAMES}
        self._cut: set[Name] = set()  # the streams in the middle of a line that is too long

    def feed(self, piece: Output) -> None:
        """Take some bytes as they came."""
        name, rest = piece.stream, self._rest[piece.stream]
        bodies: list[bytes] = []
        *lines, last = piece.data.split(b"\n")
        for line in lines:
            if rest or len(line) > MAX_LINE_BYTES:
                rest += line
                bodies = self._cut_up(name, bodies)
                line = bytes(rest)
                rest.clear()
            bodies = self._take(name, line, bodies)
            self._cut.discard(name)
        rest += last
        self._stream.relay(self._cut_up(name, bodies))

    def close(self) -> None:
        """The output is over; what has no line end is a line too."""
        for name, rest in self._rest.items():
            if rest:
                self._stream.relay(self._take(name, bytes(rest), []))

    def _cut_up(self, name: Name, bodies: list[bytes]) -> list[bytes]:
        """Give out the beginning of a line that is too long, always after the same number of bytes."""
        rest = self._rest[name]
        while len(rest) > MAX_LINE_BYTES:
            self._cut.add(name)
            bodies = self._take(name, bytes(rest[:MAX_LINE_BYTES]), bodies)
            del rest[:MAX_LINE_BYTES]
        return bodies

    def _take(self, name: Name, line: bytes, bodies: list[bytes]) -> list[bytes]:
        """Add a line's events to `bodies`; `progress` has no number, so it goes out behind what is there."""
        event = _event_of(line) if name == "stdout" and name not in self._cut else None
        if event is not None and event[0] == "progress":
            if not self._skip[name]:
                self._stream.relay(bodies)
                self._stream.note(*event)
                bodies = []
            return bodies
        new = _logs(name, line) if event is None else [encode(*event)]
        skipped = min(self._skip[name], len(new))
        self._skip[name] -= skipped
        bodies.extend(new[skipped:])
        return bodies


def _event_of(line: bytes) -> tuple[str, dict[str, Any]] | None:
    if not line.startswith(b"{"):
        return None
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    name = data.pop("event", None)
    check = WORKER_EVENTS.get(name) if isinstance(name, str) else None
    if check is None or not check(data) or not is_encodable(data):
        return None
    return None if name == "logs" and data["stream"] != "stdout" else (name, data)


def _logs(stream: Name, line: bytes) -> list[bytes]:
    text = line.rstrip(b"\r")
    pieces = [text[i : i + MAX_LOG_LINE_BYTES] for i in range(0, len(text), MAX_LOG_LINE_BYTES)]
    return [encode("logs", {"stream": stream, "line": p.decode(errors="replace")}) for p in pieces or [b""]]
