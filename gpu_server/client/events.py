"""A task's events, and how they are read from an event stream (HTML standard, section 9.2.6, as far as this
service uses it)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import aiohttp
import orjson

MAX_FRAME_BYTES: Final = 4 << 20
"""What is kept of a frame that does not end. The service's own limit for one is 1 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """One event. `id` is None for one without. `sealed`: it came out of a sealed stream, so the session's
    worker wrote it; of any other, the service did, or whoever is between."""

    id: int | None
    event: str
    data: dict[str, Any]
    sealed: bool = False


class Unreadable(aiohttp.ClientError):
    """What came is not what this interface sends. Asking again would not help."""


class Pieces(Protocol):
    """The body of an answer, in the pieces in which it comes."""

    def iter_any(self) -> AsyncIterator[bytes]: ...


class EventParser:
    """Cuts bytes, in whatever pieces they come, into events. Comments are left out."""

    def __init__(self, *, sealed: bool = False) -> None:
        self._sealed, self._rest = sealed, bytearray()

    @property
    def in_frame(self) -> bool:
        """Whether the bytes so far end within a frame."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[TaskEvent]:
        """The events that end in `data`. Raises `Unreadable`."""
        looked_at = max(len(self._rest) - 1, 0)  # not again: a long frame may come in very small pieces
        self._rest += data
        frames: list[bytes] = []
        if self._rest.find(b"\n\n", looked_at) >= 0:
            *frames, rest = bytes(self._rest).split(b"\n\n")
            self._rest = bytearray(rest)
        if len(self._rest) > MAX_FRAME_BYTES:
            raise Unreadable("an event is too long")
        return [event for frame in frames if (event := self._event(frame)) is not None]

    def _event(self, frame: bytes) -> TaskEvent | None:
        try:
            fields = dict(
                line.split(b": ", 1) for line in frame.split(b"\n") if line and not line.startswith(b":")
            )
            if b"data" not in fields:
                return None
            number, data = fields.get(b"id"), orjson.loads(fields[b"data"])
            event = TaskEvent(
                id=int(number) if number else None,
                event=fields[b"event"].decode(),
                data=data,
                sealed=self._sealed,
            )
        except (ValueError, KeyError):
            # Without its cause, which would quote it.
            raise Unreadable("what came is no event stream") from None
        if not isinstance(data, dict):
            raise Unreadable("an event's data are no object")
        return event


async def read_events(content: Pieces) -> AsyncGenerator[TaskEvent, None]:
    """The events of a body. Raises `Unreadable`."""
    parser = EventParser()
    async for piece in content.iter_any():
        for event in parser.feed(piece):
            yield event
