"""More planted faults: in what is written down, what follows from it in another life, drains and doubts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.rows import Rows, Table
from gpu_server.core.sessions import Session, Task
from gpu_server.core.slots import Slots, SlotState
from gpu_server.core.timers import Alarm
from tests.core.hunt import CAUGHT, MakeNode, hunt, names, with_slots

pytestmark = pytest.mark.timeout(300)  # some faults show in the thousandth history only

# -- what is written


class ForgetsTheQueue(Node):
    """A session's row does not hear of a task that joins its queue."""

    def _task_submitted(self, event: ev.TaskSubmitted, now: float) -> None:
        super()._task_submitted(event, now)
        if event.session_id is not None:
            self._touched.pop((Table.SESSIONS, event.session_id), None)


class CountsNothing(Node):
    """Nobody counts what a task was told."""

    def _tell(self, *notices: fx.Publish) -> None:
        self._out.extend(notices)


class CountsInItsHead(Node):
    """What a task was told is counted, and not written down."""

    def _tell(self, *notices: fx.Publish) -> None:
        touched = dict(self._touched)
        super()._tell(*notices)
        self._touched = touched


class DeadlinesRunInRows(Node):
    """A deadline that has passed stays in its row."""

    def _tick(self, event: ev.Tick, now: float) -> None:
        while (due := self._timers.pop_due(now)) is not None:
            self._alarms[due[0]](due[1], now)


class WritesForReaders(Node):
    """A row is written when a reader comes."""

    def _reader_came(self, event: ev.ReaderCame, now: float) -> None:
        super()._reader_came(event, now)
        self._touch_task(event.task_id)


class WritesRefusals(Node):
    """A refused request is written down."""

    def _keepalive_requested(self, event: ev.KeepaliveRequested, now: float) -> None:
        self._touch_session(event.session_id)
        super()._keepalive_requested(event, now)


# -- what is read again


class LosesQuarantine(Node):
    """A slot that was locked away is only washed in the next life."""

    def restore(self, kept: Rows) -> None:
        super().restore(kept)
        for slot in self.slots:
            if slot.state is SlotState.QUARANTINED:
                self.slots.rewash(slot.spec.id, slot.fence, "why not")
        self.slots.touched.clear()


class ForgetsFences(Node):
    """Each life counts its leases from one."""

    def restore(self, kept: Rows) -> None:
        super().restore(kept)
        self._next_fence = 1


class ForgetsKeys(Node):
    """A request that comes again after a restart is a new one."""

    def restore(self, kept: Rows) -> None:
        super().restore(kept)
        for task in self.tasks.values():
            task.key = None
        self.task_keys.clear()


class TurnsTheLineRound(Node):
    """Who came last is the first after a restart."""

    def restore(self, kept: Rows) -> None:
        super().restore(kept)
        self.line._line = dict(reversed(self.line._line.items()))


class GivesASecondLife(Node):
    """A restart begins every lifetime anew."""

    def restore(self, kept: Rows) -> None:
        super().restore(kept)
        for session in self.live_sessions():
            if session.max_deadline is not None and not session.tearing_down:
                session.max_deadline += self.rules.max_lifetime
                self._timers.set(Alarm.LIFETIME, session.id, session.max_deadline)


# -- what follows


class TrustsOldWashes(Slots):
    """A slot that was free is leased again without a wash."""

    def begin_wash(self, slot_id: str, fence: int) -> None:
        if self[slot_id].state is not SlotState.FREE:
            super().begin_wash(slot_id, fence)


class Adopts(Node):
    """A node whose adoption is looked over once more."""

    def _node_started(self, event: ev.NodeStarted, now: float) -> None:
        super()._node_started(event, now)
        self._out = [other for effect in self._out if (other := self.instead(effect)) is not None]

    def instead(self, effect: fx.Effect) -> fx.Effect | None:
        return effect


class SendsAgain(Adopts):
    """What runs already is sent to its worker once more."""

    def instead(self, effect: fx.Effect) -> fx.Effect | None:
        if isinstance(effect, fx.ResumeTask):
            return fx.SendTask(session_id=effect.session_id, task_id=effect.task_id)
        return effect


class ForgetsCancels(Adopts):
    """A task that was cancelled before the restart runs on."""

    def instead(self, effect: fx.Effect) -> fx.Effect | None:
        return None if isinstance(effect, fx.CancelTask) else effect


class LeavesResidue(Adopts):
    """A session that was being taken down stays so for ever."""

    def instead(self, effect: fx.Effect) -> fx.Effect | None:
        own = isinstance(effect, fx.WashSlots) and effect.session_id is not None
        return None if own else effect


class TakesAllForReady(Adopts):
    """A worker that was being started is taken for one that serves."""

    def instead(self, effect: fx.Effect) -> fx.Effect | None:
        return replace(effect, ready=True) if isinstance(effect, fx.AdoptWorker) else effect


class KeepsLostSlots(Node):
    """A session goes on though one of its devices is not there any more."""

    def _node_started(self, event: ev.NodeStarted, now: float) -> None:
        there = {spec.id for spec in event.slots}
        lost = [slot.spec for slot in self.slots if slot.holder and slot.spec.id not in there]
        super()._node_started(replace(event, slots=(*event.slots, *lost)), now)


# -- drains, doubts, readers


class DrainsForEver(Node):
    """A session that has nothing to do any more stays through the drain."""

    def _end_if_drained(self, session: Session, now: float) -> None:
        if not self.shutting_down:  # one that has had all its sealed tasks ends in any case
            super()._end_if_drained(session, now)


class CutsOff(Node):
    """A drain is a shutdown."""

    def _drain_ordered(self, event: ev.DrainOrdered, now: float) -> None:
        self._shutdown_ordered(ev.ShutdownOrdered(), now)


class StartsInDoubt(Node):
    """A session is started also where the runtime does not answer."""

    def _assign(self, now: float) -> None:
        doubt, self.runtime_doubt = self.runtime_doubt, None
        super()._assign(now)
        self.runtime_doubt = doubt


class WaitsForNews(Node):
    """When the runtime answers again nobody looks at the line."""

    def _runtime_checked(self, event: ev.RuntimeChecked, now: float) -> None:
        self.runtime_doubt = event.doubt


class MissesReaders(Node):
    """Also a task that needs no reader is cancelled without one."""

    def _await_reader(self, task: Task, now: float) -> None:
        task.detached, detached = False, task.detached
        super()._await_reader(task, now)
        task.detached = detached


DOES_NOT_FOLLOW = "this does not follow from what was left"
BY_THE_BOOKS: list[tuple[MakeNode, str]] = [
    (ForgetsTheQueue, "these do not belong together"),
    (CountsNothing, "was told [0-9]+ events, and 0 are counted"),
    (CountsInItsHead, "was told [0-9]+ events, and [0-9]+ are counted"),
    (WritesForReaders, "a reader changed a row"),
    (WritesRefusals, "a refused request or certificate touched a row"),
    (LosesQuarantine, DOES_NOT_FOLLOW),
    (ForgetsFences, f"the fence did not grow|{DOES_NOT_FOLLOW}"),
    (ForgetsKeys, "a key stands for something else"),
    (TurnsTheLineRound, "line was overtaken|slots were taken from one who waits|could start|fetched ahead"),
    (GivesASecondLife, "a session outlives its lifetime|it idled out after"),
    (with_slots(TrustsOldWashes), "is free, the books say washing"),
    (SendsAgain, DOES_NOT_FOLLOW),
    (ForgetsCancels, DOES_NOT_FOLLOW),
    (LeavesResidue, DOES_NOT_FOLLOW),
    (TakesAllForReady, DOES_NOT_FOLLOW),
    (KeepsLostSlots, DOES_NOT_FOLLOW),
    (DrainsForEver, "a session lives through the shutdown without work|takes no more tasks idles"),
    (CutsOff, "a drain cut work off"),
    (StartsInDoubt, "a session was started while the runtime does not answer"),
    (WaitsForNews, "the first of the line could start"),
    (MissesReaders, "a task that needs no reader is missed one"),
]
BY_CUTS: list[tuple[MakeNode, str]] = [
    (ForgetsTheQueue, "these do not belong together"),
    (DeadlinesRunInRows, "deadlines would not survive"),
    (CountsInItsHead, "tasks would not survive"),
    (LosesQuarantine, "slots would not survive"),
    (TurnsTheLineRound, "line would not survive"),
]


@pytest.mark.parametrize(("make_node", "complaint"), BY_THE_BOOKS, ids=names(BY_THE_BOOKS))
def test_a_planted_fault_is_seen_from_outside(make_node: MakeNode, complaint: str) -> None:
    """What the node does in this life or the next gives the fault away, without a look at its state."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node)


@pytest.mark.parametrize(("make_node", "complaint"), BY_CUTS, ids=names(BY_CUTS))
def test_a_planted_fault_is_seen_where_the_life_is_cut(make_node: MakeNode, complaint: str) -> None:
    """What the journal holds is not the node, and that is seen at the next cut."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node, cut=True)
