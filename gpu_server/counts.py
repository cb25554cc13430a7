"""Counts of what this life of the service has decided, and of the washes that it has carried out.

The former are taken from the decisions themselves, so they are exact. All begin at nothing with each start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.sessions import CloseReason, TaskState


@dataclass(slots=True)
class Loads:
    """The starts of one model's workers. `seconds` is what those that came up took together."""

    ready: int = 0
    failed: int = 0
    seconds: float = 0.0

    @property
    def average(self) -> float | None:
        """Seconds from the lease to a ready worker; None where none came up."""
        return self.seconds / self.ready if self.ready else None


TOTAL: Final = "total"
"""From the order to wash a slot until it is free, among the steps."""
BUCKETS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Seconds: upper bounds, each included."""


@dataclass(slots=True)
class Durations:
    """How long something took, each time. `counts` are by `BUCKETS`, not added up, and one more for what was
    longer; `sum` is in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    @property
    def total(self) -> int:
        """How often."""
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        """Once more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


@dataclass(slots=True)
class Counts:
    """`note` is told of every decision. `run_seconds` is what completed tasks took from start to end,
    together.

    Washes are counted by those who wash, each slot for itself: those that failed by the step that did; how
    long they took by the step, and in `TOTAL`.
    """

    submitted: int = 0
    ended: Counter[TaskState] = field(default_factory=Counter)
    run_seconds: float = 0.0
    loads: dict[str, Loads] = field(default_factory=lambda: defaultdict(Loads))
    washes_passed: int = 0
    washes_failed: Counter[str] = field(default_factory=Counter)
    wash_seconds: dict[str, Durations] = field(default_factory=lambda: defaultdict(Durations))
    _starting: dict[str, float] = field(default_factory=dict)

    def note(self, event: ev.Event, effects: Sequence[fx.Effect], node: Node, now: float) -> None:
        """Take what this decision was: after it, before its effects."""
        if isinstance(event, ev.TaskSubmitted):
            self.submitted += 1
        elif isinstance(event, ev.WorkerReady):
            self._note_ready(event.session_id, node, now)
        for effect in effects:
            match effect:
                case fx.FinishTask():
                    self._note_end(effect, node)
                case fx.StartWorker(session_id=session_id):
                    self._starting[session_id] = now
                case fx.WashSlots(session_id=str(session_id)):
                    self._note_wash(session_id, node)

    def _note_end(self, effect: fx.FinishTask, node: Node) -> None:
        self.ended[effect.state] += 1
        task = node.tasks.get(effect.task_id)
        if effect.state is TaskState.COMPLETED and task is not None:
            assert task.started_at is not None
            assert task.finished_at is not None
            self.run_seconds += task.finished_at - task.started_at

    def _note_ready(self, session_id: str, node: Node, now: float) -> None:
        session = node.sessions.get(session_id)
        if session is None or session.tearing_down or session_id not in self._starting:
            return
        loads = self.loads[session.workload.model_id]
        loads.ready += 1
        loads.seconds += now - self._starting.pop(session_id)

    def _note_wash(self, session_id: str, node: Node) -> None:
        """A worker that is taken down before it was ready: that is a failure only if it was not asked for."""
        if self._starting.pop(session_id, None) is None:
            return
        session = node.sessions[session_id]
        if session.close_reason in (CloseReason.START_FAILED, CloseReason.WORKER_MISBEHAVED):
            self.loads[session.workload.model_id].failed += 1
