"""The `exec` worker contract: lines on stdout that are events become events, everything else becomes logs."""

from __future__ import annotations

from typing import Any, Literal

import orjson

from gpu_server.frames import MAX_FRAME_BYTES, WORKER_EVENTS, encode, is_encodable
from gpu_server.ports import Output
from gpu_server.stream import Stream

MAX_LOG_LINE_BYTES = 64 * 1024


class ExecOutput:
    """Cuts output into lines and writes each into the task's stream. A line that is too long is cut up."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._rest: dict[Literal["stdout", "stderr"], bytearray] = {
            "stdout": bytearray(),
            "stderr": bytearray(),
        }

    def feed(self, piece: Output) -> None:
        """Take some bytes as they came."""
        rest = self._rest[piece.stream]
        *lines, last = piece.data.split(b"\n")
        if lines:
            lines[0] = bytes(rest) + lines[0]
            rest.clear()
        rest += last
        if len(rest) > MAX_FRAME_BYTES:
            lines.append(bytes(rest))
            rest.clear()
        bodies: list[bytes] = []
        for line in lines:
            bodies = self._take(piece.stream, line, bodies)
        self._stream.relay(bodies)

    def close(self) -> None:
        """The output is over; what has no line end is a line too."""
        for stream, rest in self._rest.items():
            if rest:
                self._stream.relay(self._take(stream, bytes(rest), []))

    def _take(self, stream: Literal["stdout", "stderr"], line: bytes, bodies: list[bytes]) -> list[bytes]:
        """Add one line's event to `bodies`; `progress` has no number, so it goes out behind what is there."""
        event = _event_of(line) if stream == "stdout" else None
        if event is None:
            bodies.extend(_logs(stream, line))
            return bodies
        name, data = event
        if name != "progress":
            bodies.append(encode(name, data))
            return bodies
        self._stream.relay(bodies)
        self._stream.note(name, data)
        return []


def _event_of(line: bytes) -> tuple[str, dict[str, Any]] | None:
    if not line.startswith(b"{") or len(line) > MAX_FRAME_BYTES:
        return None
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    name = data.pop("event", None)
    check = WORKER_EVENTS.get(name) if isinstance(name, str) else None
    return (name, data) if check is not None and check(data) and is_encodable(data) else None


def _logs(stream: str, line: bytes) -> list[bytes]:
    text = line.rstrip(b"\r")
    pieces = [text[i : i + MAX_LOG_LINE_BYTES] for i in range(0, len(text), MAX_LOG_LINE_BYTES)]
    return [encode("logs", {"stream": stream, "line": p.decode(errors="replace")}) for p in pieces or [b""]]
