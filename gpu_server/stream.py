"""Event histories of tasks: bounded replay, then live.

One writer (the engine for the service's own events, the worker link for the worker's) and any number of
readers, none of which can slow the writer or each other. Events are kept encoded, in segments: what came in
one piece is stored, and written to a reader, in one piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_server.frames import encode

MAX_WRITE_BYTES = 256 * 1024
_SEGMENT_OVERHEAD = 160  # bytes of Python objects around a segment's own bytes, so that the bounds hold


@dataclass(frozen=True, slots=True)
class _Segment:
    """Some events, encoded: numbers `first` to `last`, or one unnumbered event (`first` > `last`)."""

    first: int
    last: int
    data: bytes


class _Budget:
    """Bytes kept by all streams together."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0


class Stream:
    """One task's events, numbered from 1 without holes. `max_bytes` bounds what is kept for replay.

    Events without a number (`queue`, `progress`) repeat the last number, go to whoever reads at the time, and
    are not replayed; only those that came since the last numbered event are shown to a new reader, because
    they are the present state.
    """

    def __init__(self, max_bytes: int, budget: _Budget | None = None) -> None:
        self.last_id = 0
        self.finished = False
        self.size = 0
        self._max_bytes = max_bytes
        self._budget = budget or _Budget()
        self._segments: list[_Segment] = []
        self._head = 0  # index of the first segment that is kept
        self._dropped = 0  # its serial number: how many were dropped before it
        self._notes: dict[str, bytes] = {}
        self._readers: set[asyncio.Event] = set()

    # -- writing ------------------------------------------------------------------------------------------

    def publish(self, event: str, data: Mapping[str, Any]) -> None:
        """Append one numbered event; after `task_finish` the stream takes nothing more."""
        if self.finished:
            return
        self.relay([encode(event, data)])
        self.finished = event == "task_finish"

    def relay(self, bodies: list[bytes]) -> None:
        """Append events that are encoded but for their `id:` line."""
        if self.finished or not bodies:
            return
        first = self.last_id + 1
        self.last_id += len(bodies)
        pieces = [b"id: %d\n%b" % (number, body) for number, body in enumerate(bodies, first)]
        self._notes.clear()
        self._append(_Segment(first, self.last_id, b"".join(pieces)))

    def note(self, event: str, data: Mapping[str, Any]) -> None:
        """Tell the present readers something that has no number."""
        if self.finished:
            return
        frame = b"id: %d\n%b" % (self.last_id, encode(event, data))
        self._notes[event] = frame
        if self._readers:
            self._append(_Segment(self.last_id + 1, self.last_id, frame))

    def forget(self) -> None:
        """Drop the history of a finished task but its last event."""
        self._trim(0)

    def _append(self, segment: _Segment) -> None:
        self._segments.append(segment)
        self._account(len(segment.data) + _SEGMENT_OVERHEAD)
        if self.size > self._max_bytes:
            self._trim(self._max_bytes)
        for wake in self._readers:
            wake.set()

    def _trim(self, max_bytes: int) -> None:
        while self.size > max_bytes and len(self._segments) - self._head > 1:
            self._account(-len(self._segments[self._head].data) - _SEGMENT_OVERHEAD)
            self._head += 1
            self._dropped += 1
            if self._head > len(self._segments) // 2:
                del self._segments[: self._head]
                self._head = 0

    @property
    def _end(self) -> int:
        """The serial number that the next segment will have."""
        return self._dropped + len(self._segments) - self._head

    def _account(self, size: int) -> None:
        self.size += size
        self._budget.used += size

    # -- reading ------------------------------------------------------------------------------------------

    async def read(self, after: int = 0) -> AsyncGenerator[bytes, None]:
        """Everything after event `after`, then live, until `task_finish` has been given out.

        Each item is one or more whole frames. A reader that has fallen out of the history gets `gap`
        {from, to} and goes on behind it.
        """
        wake = asyncio.Event()
        self._readers.add(wake)
        try:
            last, serial, live_from = after, self._dropped, self._end
            notes, notes_id = b"".join(self._notes.values()), self.last_id
            while True:
                pieces: list[bytes] = []
                size = 0
                serial = max(serial, self._dropped)
                while size < MAX_WRITE_BYTES:
                    if notes and serial >= live_from:
                        # Here they belong: behind what was there when the reader came, before what is live.
                        if last >= notes_id and serial == live_from:
                            pieces.append(notes)
                        notes = b""
                    if serial == self._end:
                        break
                    segment = self._segments[self._head + serial - self._dropped]
                    serial += 1
                    if segment.first > segment.last and serial <= live_from:
                        continue  # an unnumbered event of the past
                    if segment.first > last + 1:
                        pieces.append(_gap(last, segment.first - 1))
                        last = segment.first - 1
                    if segment.first > segment.last:
                        data = segment.data
                    elif segment.last <= last:
                        continue
                    else:
                        data = segment.data if segment.first > last else _tail(segment, last)
                        last = segment.last
                    pieces.append(data)
                    size += len(data)
                if pieces:
                    yield b"".join(pieces)
                    continue
                if self.finished:
                    return
                wake.clear()
                await wake.wait()
        finally:
            self._readers.discard(wake)


def _gap(last: int, to: int) -> bytes:
    return b"id: %d\n%b" % (last, encode("gap", {"from": last + 1, "to": to}))


def _tail(segment: _Segment, after: int) -> bytes:
    """The events of a segment that come after number `after`."""
    data, position = segment.data, 0
    for _ in range(after - segment.first + 1):
        position = data.index(b"\n\n", position) + 2
    return data[position:]


class Streams:
    """The streams of all tasks, within a bound for all of them together.

    When the bound is passed, finished tasks lose their history, the ones that finished first at first; a
    later reader of those gets a `gap` and the end.
    """

    def __init__(self, *, max_bytes_each: int, max_bytes_total: int) -> None:
        self._each, self._total = max_bytes_each, max_bytes_total
        self._budget = _Budget()
        self._streams: dict[str, Stream] = {}
        self._finished: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def kept_bytes(self) -> int:
        return self._budget.used

    def open(self, task_id: str) -> Stream:
        stream = self._streams[task_id] = Stream(self._each, self._budget)
        return stream

    def get(self, task_id: str) -> Stream | None:
        return self._streams.get(task_id)

    def finished(self, task_id: str) -> None:
        """A task has ended: its history may now be dropped when room is needed."""
        self._finished[task_id] = None
        while self._budget.used > self._total and self._finished:
            oldest = next(iter(self._finished))
            del self._finished[oldest]
            self._streams[oldest].forget()

    def forget(self, task_id: str) -> None:
        """The task's retention is over. Readers that are still there read to the end."""
        self._finished.pop(task_id, None)
        stream = self._streams.pop(task_id, None)
        if stream is not None:
            self._budget.used -= stream.size
