"""Counts of what was decided: each thing once, whatever became of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.node import Node
from gpu_server.core.sessions import CloseReason, Rules, TaskState
from gpu_server.counts import BUCKETS, Counts, Durations
from tests.core.hunt import HISTORIES
from tests.core.machine import NodeMachine
from tests.core.papers import judge
from tests.core.story import SEALING, Story


class Counted(Story):
    """A story whose decisions are counted."""

    def __init__(self, *slots: str, **rules: float) -> None:
        self.counts = Counts()
        super().__init__(*slots, **rules)

    def tell(self, event: ev.Event) -> list[object]:  # type: ignore[override]
        effects = super().tell(event)
        self.counts.note(event, effects, self.node, self.now)
        return effects  # type: ignore[return-value]


def test_tasks() -> None:
    """Each task is counted when it is taken, and once more in the way it ended; waiting is no run time."""
    story = Counted()
    story.ask("s1")
    story.ready("s1")
    for task_id, state in (
        ("t1", TaskState.COMPLETED),
        ("t2", TaskState.COMPLETED),
        ("t3", TaskState.FAILED),
    ):
        story.submit(task_id, to="s1")
        story.now += 2.0
        story.end(task_id, state)
    story.submit("t4", to="s1")
    story.submit("t5", to="s1")
    story.cancel("t5")
    assert story.counts.submitted == 5
    assert story.counts.ended == {"completed": 2, "failed": 1, "cancelled": 1}
    assert story.counts.run_seconds == 4.0


def test_loads() -> None:
    """A load lasts from the lease to a ready worker; one that fails or misbehaves before that has failed."""
    story = Counted("g0", "g1", "g2", "g3")
    for session_id in ("s1", "s2", "s3", "s4"):
        story.ask(session_id)
    story.now += 3.0
    story.ready("s1")
    story.ready("s1")
    story.lose("s2", CloseReason.START_FAILED, failure=Failure(code=FailureCode.IMAGE_MISSING, message=""))
    story.kill("s3")
    story.lose("s1")
    loads = story.counts.loads["m"]
    assert (loads.ready, loads.failed, loads.seconds, loads.average) == (1, 1, 3.0, 3.0)
    story.after(600.0)  # the start of the fourth is over
    assert loads.failed == 2


def test_a_worker_that_is_ready_and_no_use() -> None:
    """One of a sealed session that comes up without a key has not come up."""
    story = Counted("0")
    story.ask("s1", sealing=SEALING)
    story.ready("s1")
    loads = story.counts.loads["m"]
    assert (loads.ready, loads.failed) == (0, 1)


def test_nothing_yet() -> None:
    """An average of nothing is none."""
    assert Counts().loads["m"].average is None


def test_durations() -> None:
    """Each is in the first bucket whose bound it does not exceed, or in the last."""
    durations = Durations()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] + 0.001, BUCKETS[-1], BUCKETS[-1] + 1):
        durations.add(seconds)
    assert durations.counts == [2, 1, *[0] * (len(BUCKETS) - 3), 1, 1]
    assert (durations.total, durations.sum) == (5, pytest.approx(2 * sum((BUCKETS[0], BUCKETS[-1])) + 1.001))


class CountedNode(Node):
    """A node whose decisions are counted, in every one of its lives."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules, judge=judge)
        self.counts = Counts()

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        effects = super().handle(event, now)
        self.counts.note(event, effects, self, now)
        assert len(self.counts._starting) <= len(list(self.slots))
        return effects


def test_any_history() -> None:
    """Whatever happens, counting does not fail, which would be the end of the service, and does not grow."""
    make_node = staticmethod(CountedNode)
    machine = type("Counting", (NodeMachine,), {"make_node": make_node, "inspect": False, "cut": False})
    run_state_machine_as_test(machine, settings=settings(HISTORIES, max_examples=50, derandomize=True))
