"""Deadlines as data: set, moved and cancelled by name, popped when due. Nothing here reads a clock."""

from __future__ import annotations

import heapq
from enum import StrEnum


class Alarm(StrEnum):
    """What a deadline is for."""

    GPU_WAIT = "gpu_wait"
    START = "start"
    IDLE = "idle"
    LIFETIME = "lifetime"
    DRAIN = "drain"
    TASK = "task"
    CANCEL = "cancel"
    DISCONNECT = "disconnect"
    FORGET_TASK = "forget_task"
    FORGET_SESSION = "forget_session"


SESSION_ALARMS = (
    Alarm.GPU_WAIT,
    Alarm.START,
    Alarm.IDLE,
    Alarm.LIFETIME,
    Alarm.DRAIN,
    Alarm.FORGET_SESSION,
)
TASK_ALARMS = (Alarm.TASK, Alarm.CANCEL, Alarm.DISCONNECT, Alarm.FORGET_TASK)

Key = tuple[Alarm, str]


class Timers:
    """A heap with lazy deletion: every operation is O(log n), however many sessions there are."""

    def __init__(self) -> None:
        self._when: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def __len__(self) -> int:
        return len(self._when)

    def get(self, alarm: Alarm, entity_id: str) -> float | None:
        return self._when.get((alarm, entity_id))

    def set(self, alarm: Alarm, entity_id: str, when: float) -> None:
        """Set or move a deadline."""
        key = (alarm, entity_id)
        if self._when.get(key) == when:
            return
        self._when[key] = when
        heapq.heappush(self._heap, (when, key))
        if len(self._heap) > 64 + 4 * len(self._when):
            self._heap = [(due, key) for key, due in self._when.items()]
            heapq.heapify(self._heap)

    def cancel(self, alarm: Alarm, entity_id: str) -> bool:
        """Whether there was such a deadline."""
        return self._when.pop((alarm, entity_id), None) is not None

    def next(self) -> float | None:
        """The earliest deadline, or None."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> Key | None:
        """Take one deadline that is due at `now`, the earliest first, or None."""
        self._drop_stale()
        if not self._heap or self._heap[0][0] > now:
            return None
        _, key = heapq.heappop(self._heap)
        del self._when[key]
        return key

    def _drop_stale(self) -> None:
        while self._heap and self._when.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
