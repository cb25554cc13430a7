"""The event history of one task: bounded replay, then live.

One writer (the engine for the service's own events, the worker link for the worker's) and any number of
readers, none of which can slow the writer or each other. Events are kept encoded, in segments: what came in
one piece is stored, in memory and in the spool, and written to a reader, in one piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

from gpu_server.drivers.spool import History, Record
from gpu_server.frames import encode

MAX_WRITE_BYTES = 256 * 1024
# Bytes of Python objects around a segment's own bytes, so that the bounds hold.
_SEGMENT_OVERHEAD = 208


class Budget:
    """Bytes kept by all streams together."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0


class Stream:
    """One task's events, numbered from 1. `max_bytes` bounds what is kept for replay.

    Events without a number (`queue`, `progress`) repeat the last number, go to whoever reads at the time, and
    are not replayed; only those that came since the last numbered event are shown to a new reader, because
    they are the present state.

    A numbered event is in `file` before any reader can see it, so that another life of the service goes on
    with the same numbers (`restore`). When the file cannot be written, `on_fault` hears of it once, and the
    stream goes on in memory.
    """

    def __init__(
        self,
        max_bytes: int,
        budget: Budget | None = None,
        file: History | None = None,
        on_fault: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        self.last_id = 0
        self.finished = False
        self.size = 0
        self._max_bytes = max_bytes
        self._budget = budget or Budget()
        self._file, self._on_fault = file, on_fault
        self._told = 0  # how many of the events so far were the service's own
        # One that is unnumbered has its `first` behind its `last`.
        self._segments: list[Record] = []
        self._head = 0  # index of the first segment that is kept
        self._dropped = 0  # its serial number: how many were dropped before it
        self._notes: dict[str, bytes] = {}
        self._readers: set[asyncio.Event] = set()
        self._readers_closed = False

    # -- writing ------------------------------------------------------------------------------------------

    def publish(self, event: str, data: Mapping[str, Any]) -> None:
        """Append a numbered event of the service's own; after `task_finish` the stream takes nothing more."""
        if self.finished:
            return
        body = encode(event, data)
        self._told += 1
        self._write([body], own=True)
        self.finished = event == "task_finish"

    def relay(self, bodies: list[bytes]) -> None:
        """Append events of the worker that are encoded but for their `id:` line."""
        if not self.finished and bodies:
            self._write(bodies, own=False)

    def miss(self, count: int) -> None:
        """The worker has dropped `count` events: the numbers go on behind them, and readers get a `gap`."""
        if not self.finished:
            self.last_id += count
            self._notes.clear()

    def note(self, event: str, data: Mapping[str, Any]) -> None:
        """Tell the present readers something that has no number."""
        if self.finished:
            return
        frame = b"id: %d\n%b" % (self.last_id, encode(event, data))
        self._notes[event] = frame
        if self._readers:
            self._keep(Record(True, self._told, self.last_id + 1, self.last_id, frame))

    def mirror(self, file: History) -> None:
        """Write what is kept into a new file, and go on with it. Raises OSError."""
        self.close_file()
        for segment in self._segments[self._head :]:
            if segment.first <= segment.last:
                file.append(segment)
        self._file = file

    def close_file(self) -> None:
        """Let go of the file. What is written from here on is in memory alone."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, bodies: list[bytes], *, own: bool) -> None:
        first = self.last_id + 1
        last = self.last_id + len(bodies)
        data = b"".join([b"id: %d\n%b" % (number, body) for number, body in enumerate(bodies, first)])
        segment = Record(own, self._told, first, last, data)
        if self._file is not None:
            try:
                self._file.append(segment)
            except OSError as error:
                self.close_file()
                self._on_fault(error)
        self.last_id = last
        self._notes.clear()
        self._keep(segment)

    # -- keeping ------------------------------------------------------------------------------------------

    @property
    def worker_seq(self) -> int:
        """The worker's own number of its last event that is here, or was missed; 0 when there is none."""
        return self.last_id - self._told

    def worker_frames(self) -> bytes:
        """The worker's numbered events, as far back as they are kept."""
        return b"".join(
            segment.data
            for segment in self._segments[self._head :]
            if not segment.own and segment.first <= segment.last
        )

    def restore(self, records: Iterable[Record], told: int = 0) -> None:
        """Take up, in a new stream, what an earlier life has recorded, as far back as `max_bytes` allow.

        `told` is how many events of its own the service has published. Those of them that are in no record
        are lost to readers, but keep their numbers.
        """
        last: Record | None = None
        for last in records:
            self._keep(last)
        if last is not None:
            self.last_id, self._told = last.last, last.told
            self.finished = last.own and last.data.startswith(b"id: %d\nevent: task_finish\n" % last.last)
        if told > self._told and not self.finished:
            self.last_id += told - self._told
            self._told = told

    def forget(self) -> Record:
        """Drop the history of a finished task but its last event, which is returned."""
        self._trim(0)
        return self._segments[-1]

    def _keep(self, segment: Record) -> None:
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
        {from, to} and goes on behind it. One that knows of more than is here, which a lost file can bring
        about, gets nothing that it has already; but the end it gets in any case. `close_readers` ends this
        before the end.
        """
        wake = asyncio.Event()
        self._readers.add(wake)
        try:
            last, serial, live_from = after, self._dropped, self._end
            notes, notes_id = b"".join(self._notes.values()), self.last_id
            while not self._readers_closed:
                pieces: list[bytes] = []
                size = 0
                serial = max(serial, self._dropped)
                while size < MAX_WRITE_BYTES:
                    if serial == self._end and last < self.last_id:  # nothing is left that would tell
                        pieces.append(_gap(last, self.last_id))
                        last = self.last_id
                    if notes and serial >= live_from:
                        # Here they belong: behind what was there when the reader came, before what is live.
                        if last == notes_id and serial == live_from:
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
                    if segment.first > segment.last == last:
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
                    if last > self.last_id:
                        yield self._segments[-1].data
                    return
                wake.clear()
                await wake.wait()
        finally:
            self._readers.discard(wake)

    def close_readers(self) -> None:
        """End every `read`, now and from here on, wherever it is. Writing goes on."""
        self._readers_closed = True
        for wake in self._readers:
            wake.set()


def _gap(last: int, to: int) -> bytes:
    return b"id: %d\n%b" % (last, encode("gap", {"from": last + 1, "to": to}))


def _tail(segment: Record, after: int) -> bytes:
    """The events of a segment that come after number `after`."""
    data, position = segment.data, 0
    for _ in range(after - segment.first + 1):
        position = data.index(b"\n\n", position) + 2
    return data[position:]
