"""The events of a sealed task: opens what its worker sealed, and says what came from whom. No I/O."""

from __future__ import annotations

import binascii
from collections.abc import Callable
from typing import Final

from gpu_server.client.events import EventParser, TaskEvent, Unreadable
from gpu_server.sealed.errors import SealedError, StreamBroken
from gpu_server.sealed.response import ResponseOpener

HINTS: Final = frozenset({"connection", "queue", "progress", "worker", "error"})
"""What the service itself may tell of a sealed task."""

ENDED_BADLY: Final = frozenset({"failed", "timeout", "cancelled"})
"""How the service itself may say that a task ended."""


class SealedStreamBroken(StreamBroken):
    """The answer is not whole, or not the worker's: something in it was cut, changed, doubled or added."""


class SealedStream:
    """Takes a task's events as the service sends them, and gives those that a client may see.

    What comes out of sealed chunks has `sealed=True`. The service's own events (`HINTS`) pass and prove
    nothing; any other would be a worker's, and a worker's are sealed. The last is `task_finish`: the sealed
    one, held back until the service's stream is over, so that whatever comes behind it is seen; or the
    service's own word that the task did not complete. `answer` makes the opener of the response from the
    worker's salt.
    """

    def __init__(self, answer: Callable[[bytes], ResponseOpener]) -> None:
        self._answer = answer
        self._opener: ResponseOpener | None = None
        self._inner = EventParser(sealed=True)
        self._end: list[TaskEvent] = []

    @property
    def complete(self) -> bool:
        """Whether the final chunk was opened: there is nothing left to come back for."""
        return self._opener is not None and self._opener.finished

    def take(self, event: TaskEvent) -> list[TaskEvent]:
        """What is to be given out for one event of the service. Raises `SealedStreamBroken`."""
        if event.event == "sealed":
            return self._open(_bytes_of(event))
        if event.event == "task_finish":
            return self._finish(event)
        if event.event not in HINTS:
            # A gap, or words that somebody put into a stream whose words are all sealed.
            raise SealedStreamBroken(f"an event that is no part of a sealed answer: {event.event[:40]}")
        return [] if self.complete else [event]

    def close(self) -> list[TaskEvent]:
        """The service's stream is over without its `task_finish`. Raises `SealedStreamBroken` unless the
        sealed end is there all the same."""
        if not self.complete:
            raise SealedStreamBroken("the answer ended without its sealed end")
        return self._end

    def _finish(self, event: TaskEvent) -> list[TaskEvent]:
        status = event.data.get("status")
        if not self.complete and isinstance(status, str) and status in ENDED_BADLY:
            return [event]  # as far as the service says: the worker died, for one
        return self.close()

    def _open(self, data: bytes) -> list[TaskEvent]:
        try:
            if self._opener is None:
                self._opener = self._answer(data)
                return []
            if self._opener.finished:
                raise SealedStreamBroken("the answer goes on behind its final chunk")
            events = self._inner.feed(self._opener.open(data))
        except (SealedError, Unreadable) as error:
            if isinstance(error, SealedStreamBroken):
                raise
            raise SealedStreamBroken(f"a chunk of the answer cannot be used: {error}") from None
        last = events.pop() if self._opener.finished and events else None
        if self._opener.finished:
            if last is None or last.event != "end" or self._inner.in_frame:
                raise SealedStreamBroken("the final chunk does not end with the worker's end")
            self._end = _finish_of(last)
        if any(event.event == "end" for event in events):
            raise SealedStreamBroken("the worker's end comes before the final chunk")
        return events


def _bytes_of(event: TaskEvent) -> bytes:
    try:
        return binascii.a2b_base64(event.data["data"], strict_mode=True)
    except (KeyError, TypeError, ValueError):
        raise SealedStreamBroken("a sealed event is not base64") from None


def _finish_of(end: TaskEvent) -> list[TaskEvent]:
    """What a task's readers are told for the worker's `end`: `error`, where something went wrong, and
    `task_finish`, as the service does for a plain task."""
    status, error = end.data.get("status"), end.data.get("error")
    if status not in ("completed", "failed", "cancelled"):
        raise SealedStreamBroken("the worker's end has no status")
    told = []
    if status == "failed" and isinstance(error, dict):
        told.append(TaskEvent(id=end.id, event="error", data=error, sealed=True))
    return [*told, TaskEvent(id=end.id, event="task_finish", data=end.data, sealed=True)]
