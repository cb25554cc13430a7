"""The frames of one task: numbered, kept up to a bound, and read by any number of streams.

The task may run in a thread; the streams run on the event loop. One lock guards the state. Whoever must wait
is handed a future that was made under that lock, waits for it, and asks again.

A frame that was written to a connection can still be lost with a reader that dies. So the newest eighth of
the bound is kept even when it was taken.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future

from gpu_worker.frames import Status

_PASSING_MAX = 64  # unnumbered frames that wait for one reader; when full the oldest goes
_ID_ROOM = 16


class Dropped(Exception):
    """The frames asked for are no longer kept. `oldest` is the first id that is."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"events before {oldest} were dropped")
        self.oldest = oldest


class History:
    """Made on the event loop. `size` and `limit` are bytes; ids begin at 1."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.last = 0
        self.ended = False
        self._frames: list[bytes] = []
        self._base = 1  # the id of _frames[0]
        self._dropped = 0  # how many of _frames, from the left, were dropped
        self._taken = 0  # the highest id that some reader was sent
        self._taken_size = 0  # bytes of the kept frames up to _taken
        self._margin = limit // 8
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._readers: set[Reader] = set()
        self._asleep = False  # some reader waits for a frame
        self._waiting: list[Future[None]] = []

    @property
    def oldest(self) -> int:
        """The first id that is still kept."""
        return self._base + self._dropped

    # -- the writing side: any thread ---------------------------------------------------------------------

    def add(self, frame: bytes) -> Future[None] | None:
        """Number and keep a frame. Where untaken frames leave no room it keeps nothing and returns a future:
        wait for it and try again."""
        with self._lock:
            if not self._keep(frame):
                return self._wait()
        if self._asleep:
            self._wake()
        return None

    def offer(self, frame: bytes) -> bool:
        """Like `add` for those who will not wait: False where there is no room, or the task has ended."""
        with self._lock:
            if self.ended or not self._keep(frame):
                return False
        if self._asleep:
            self._wake()
        return True

    def pass_by(self, data: bytes) -> None:
        """Give bytes to the readers of this moment. They are not numbered and not kept."""
        with self._lock:
            for reader in self._readers:
                reader.passing.append((self.last, data))
        if self._asleep:
            self._wake()

    def unflushed(self) -> Future[None] | None:
        """None when every reader of this moment was sent everything; else a future, as `add` does."""
        with self._lock:
            if all(reader.caught_up for reader in self._readers):
                return None
            return self._wait()

    # -- the loop's side ----------------------------------------------------------------------------------

    def end(self, *frames: bytes, status: Status) -> None:
        """Add the last frames, which need no room. Nothing can be added after them, not even another end.
        `status` is what they say."""
        with self._lock:
            if self.ended:
                return
            self._close(frames, status)
            self.ended = True
        self._wake()
        self.release()

    def release(self) -> None:
        """Let everyone who waits look again."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def reader(self, after: int) -> Reader:
        """A reader from id `after + 1` on; use it as a context. Raises `Dropped`."""
        with self._lock:
            if after + 1 < self.oldest:
                raise Dropped(self.oldest)
            self._mark_taken(min(after, self.last))
            reader = Reader(self, after)
            self._readers.add(reader)
        self.release()
        return reader

    # -- with the lock held -------------------------------------------------------------------------------

    def _keep(self, frame: bytes) -> bool:
        if self.ended:
            raise RuntimeError("the task has ended and can emit no more")
        wanted = len(frame) + _ID_ROOM
        if self.size + wanted > self.limit and not self._make_room(wanted):
            return False
        self._append(frame)
        return True

    def _close(self, last: tuple[bytes, ...], status: Status) -> None:
        for frame in last:
            self._append(frame)

    def _settle(self) -> None:
        """A reader is about to take all there is."""

    def _has_all(self, sent: int) -> bool:
        """Whether a reader that was sent everything up to id `sent` was sent all there is."""
        return sent >= self.last

    def _append(self, frame: bytes) -> None:
        self.last += 1
        frame = b"id: %d\n%b" % (self.last, frame)
        self._frames.append(frame)
        self.size += len(frame)

    def _make_room(self, wanted: int) -> bool:
        """Drop taken frames, oldest first. A task never waits for readers that took everything, so one frame
        may then go beyond the bound."""
        while self.size + wanted > self.limit and self._taken_size:
            length = len(self._frames[self._dropped])
            if self._taken_size - length < self._margin:
                break
            self._frames[self._dropped] = b""
            self._dropped += 1
            self.size -= length
            self._taken_size -= length
        if self._dropped > 500 and self._dropped * 2 > len(self._frames):
            del self._frames[: self._dropped]
            self._base += self._dropped
            self._dropped = 0
        return self.size + wanted <= self.limit or self._has_all(self._taken)

    def _mark_taken(self, upto: int) -> None:
        if upto > self._taken:
            frames = self._frames[self._taken + 1 - self._base : upto + 1 - self._base]
            self._taken_size += sum(map(len, frames))
            self._taken = upto

    def _wait(self) -> Future[None]:
        future: Future[None] = Future()
        self._waiting.append(future)
        return future

    # -- waking the readers -------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._asleep = False
        if threading.get_ident() == self._loop_thread:
            self._wake_readers()
        else:
            self._loop.call_soon_threadsafe(self._wake_readers)

    def _wake_readers(self) -> None:
        for reader in self._readers:
            reader.wake()


class Reader:
    """One stream's view of a history; lives on the event loop."""

    def __init__(self, history: History, after: int) -> None:
        self.passing: deque[tuple[int, bytes]] = deque(maxlen=_PASSING_MAX)
        self._history = history
        self._sent = after  # the last id that was sent
        self._sending = after  # the last id in the bytes that are being sent
        self._busy = False
        self._sleeper: asyncio.Future[None] | None = None

    async def ready(self) -> bytes:
        """Everything that is ready, waiting for the first of it; b"" after the end. Call `took` when the
        bytes are sent. Raises `Dropped` when others made this reader's next frame disappear."""
        history = self._history
        while True:
            with history._lock:
                data = self._collect()
                if data:
                    self._busy = True
                    return data
                if history.ended:
                    return b""
                self._sleeper = history._loop.create_future()
                history._asleep = True
            await self._sleeper

    def took(self) -> None:
        """The bytes that `ready` gave were sent."""
        with self._history._lock:
            self._busy = False
            self._sent = self._sending
            self._history._mark_taken(min(self._sent, self._history.last))
            waiting = bool(self._history._waiting)
        if waiting:
            self._history.release()

    @property
    def caught_up(self) -> bool:
        return not self._busy and not self.passing and self._history._has_all(self._sent)

    def wake(self) -> None:
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._history._lock:
            self._history._readers.discard(self)
        self._history.release()

    def _collect(self) -> bytes:
        history = self._history
        history._settle()
        pieces: list[bytes] = []
        while self.passing:
            before, data = self.passing.popleft()
            self._gather(before, pieces)
            pieces.append(data)
        self._gather(history.last, pieces)
        return b"".join(pieces)

    def _gather(self, upto: int, pieces: list[bytes]) -> None:
        history = self._history
        if upto <= self._sending:
            return
        start = self._sending + 1 - history._base
        if start < history._dropped:
            raise Dropped(history.oldest)
        pieces += history._frames[start : upto + 1 - history._base]
        self._sending = upto
