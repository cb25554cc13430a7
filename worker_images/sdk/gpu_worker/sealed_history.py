"""The history of a sealed task: what its author emits is in clear only until a reader takes it.

When a reader takes what is ready, all of it becomes one sealed event, as the same bytes would go out in one
write for a plain task. So sealing costs by the batch, not by the event, and sizes tell little of tokens.
Numbers, bounds, waiting and replay of the sealed events are `History`'s own.
"""

from __future__ import annotations

import os
from typing import Protocol

from gpu_worker import frames
from gpu_worker.frames import Status
from gpu_worker.history import History

_CHUNK = 200_000  # bytes of clear text that surely fit into one chunk (which takes 256 KiB, padding included)
_AROUND_CHUNK = 256 + 64  # padding, length, flag and tag
_AROUND_EVENT = 64  # the lines of a sealed event
_ID_ROOM = 16

WITHHELD = ("task_failed", "the task failed; the reason is in the sealed answer")


class Sealer(Protocol):
    """Seals one answer: `gpu_server.sealed.response.ResponseSealer`."""

    @property
    def salt(self) -> bytes: ...

    def seal(self, plaintext: bytes, *, final: bool) -> list[bytes]: ...


class SealedHistory(History):
    """Made on the event loop, as `History` is. `limit` bounds what is sealed and what waits for it."""

    def __init__(self, limit: int, sealer: Sealer) -> None:
        super().__init__(limit)
        self._sealer = sealer
        self._process = os.getpid()
        self._clear: list[bytes] = []  # numbered, and in no sealed event yet
        self._clear_size = 0
        self._clear_last = 0  # the number of the author's last event
        self._progress: int | None = None  # its place in _clear, where it is the last there
        # What sealing adds to 4/3 of the clear text, which is base64's, at most.
        self._sealing = (limit // _CHUNK + 1) * (_AROUND_CHUNK * 4 // 3 + _AROUND_EVENT)
        self._append(frames.sealed(sealer.salt))
        self._measure()

    def pass_by(self, data: bytes) -> None:
        """Seal bytes that have no number, for the readers of this moment. Of several in a row the last one
        counts. They never wait: where there is no room, they are left out."""
        with self._lock:
            if self.ended or not self._readers or not self._has_room(self._clear_size + len(data)):
                return
            if self._progress is not None and self._progress == len(self._clear) - 1:
                self._clear_size -= len(self._clear.pop())
            self._progress = len(self._clear)
            self._hold(data)
        if self._asleep:
            self._wake()

    # -- with the lock held -------------------------------------------------------------------------------

    def _keep(self, frame: bytes) -> bool:
        if self.ended:
            raise RuntimeError("the task has ended and can emit no more")
        clear = self._clear_size + len(frame) + _ID_ROOM
        if clear > self._clear_most and not self._has_room(clear):
            return False
        self._number(frame)
        return True

    def _close(self, clear: tuple[bytes, ...], status: Status) -> None:
        for frame in clear:
            self._number(frame)
        self._seal(final=True)
        # All that may be known outside is how it ended: codes, messages and usage are the tenant's.
        self._append(frames.end(status, WITHHELD if status == "failed" else None))

    def _settle(self) -> None:
        if self._clear:
            self._seal(final=False)

    def _has_all(self, sent: int) -> bool:
        return sent >= self.last and not self._clear

    def _number(self, frame: bytes) -> None:
        self._clear_last += 1
        self._hold(b"id: %d\n%b" % (self._clear_last, frame))

    def _hold(self, data: bytes) -> None:
        self._clear.append(data)
        self._clear_size += len(data)

    def _seal(self, *, final: bool) -> None:
        # A forked child has the same key and the same next nonce: one of the two may use them.
        if os.getpid() != self._process:
            raise RuntimeError(
                "a fork of the worker cannot seal: its events go out in the process it came from"
            )
        chunks = self._sealer.seal(b"".join(self._clear), final=final)
        self._clear.clear()
        self._clear_size = 0
        self._progress = None
        for chunk in chunks:
            self._append(frames.sealed(chunk))
        self._measure()

    def _has_room(self, clear: int) -> bool:
        """Whether so many bytes in clear can be sealed within the bound, once what may go is gone."""
        wanted = clear * 4 // 3 + self._sealing
        has_room = self.size + wanted <= self.limit or self._make_room(wanted)
        self._measure()
        return has_room

    def _measure(self) -> None:
        """How many bytes in clear surely have room, so that `_keep` need not compute it for each event."""
        self._clear_most = (self.limit - self.size - self._sealing) * 3 // 4
