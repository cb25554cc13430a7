"""The random histories are only worth their time if they find faults: here are some, and each is found.

Every planted node is wrong in one way. For `BY_THE_BOOKS` its own state is not inspected: what it does must
give it away. For `BY_INSPECTION` the state contradicts itself before anyone outside could tell.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import Failure, Refusal
from gpu_server.core.node import Node
from gpu_server.core.sessions import CloseReason, Session, Task, TaskState
from gpu_server.core.slots import Need, Slots, SlotState
from gpu_server.core.timers import Alarm
from gpu_server.core.waitline import WaitLine
from tests.core.hunt import CAUGHT, MakeNode, hunt, names, with_line, with_slots

pytestmark = pytest.mark.timeout(300)  # some faults show in the thousandth history only

# -- slots


class LeasesTwice(Slots):
    """A leased slot stays in the index of free ones."""

    def lease(self, slot_ids: Any, session_id: str, fence: int, tenant: str) -> None:
        for slot_id in slot_ids:
            slot = self[slot_id]
            slot.state, slot.holder, slot.fence = SlotState.LEASED, session_id, fence


class ForgetsFaults(Slots):
    """Only free slots are quarantined: bad news of a leased one is lost."""

    def report_check(self, slot_id: str, fault: str | None, doubt: str | None) -> None:
        if self[slot_id].state is SlotState.FREE:
            super().report_check(slot_id, fault, doubt)


class IgnoresTiers(Slots):
    """A lease takes any free slot when its own tier has too few."""

    def choose(self, need: Need, reserved: Set[str] = frozenset()) -> tuple[str, ...]:
        chosen = super().choose(need, reserved)
        if len(chosen) == need.count:
            return chosen
        free = [
            slot.spec.id
            for slot in self
            if slot.state is SlotState.FREE and slot.kept_for is None and slot.spec.id not in reserved
        ]
        return tuple(free[: need.count])


class LeasesWithoutFence(Node):
    """Every lease has the same fence."""

    def _take_fence(self) -> int:
        return 1


# -- the line


class LastComeFirstServed(WaitLine):
    """The newest of the line starts first."""

    def next_start(self, slots: Slots) -> tuple[Session, tuple[str, ...]] | None:
        self._line = dict(reversed(self._line.items()))
        try:
            return super().next_start(slots)
        finally:
            self._line = dict(reversed(self._line.items()))


class SmallOnesFirst(WaitLine):
    """Whoever fits starts: a lease of many slots starves behind leases of one."""

    def next_start(self, slots: Slots) -> tuple[Session, tuple[str, ...]] | None:
        for session in self:
            chosen = slots.choose(session.need)
            if len(chosen) == session.workload.gpus:
                return session, chosen
        return None


class OnlyTheFirst(WaitLine):
    """Nobody starts before the first of the line has; then the next look is forgotten."""

    def next_start(self, slots: Slots) -> tuple[Session, tuple[str, ...]] | None:
        return super().next_start(slots) if len(self) == 1 else None


class ShutsDownFrontFirst(Node):
    """In the shutdown, whoever is ended lets the next one of the line start."""

    def _shutdown_ordered(self, event: ev.ShutdownOrdered, now: float) -> None:
        self.shutting_down = True
        for session in list(self.live_sessions()):
            self._end(session, CloseReason.SHUTDOWN, Failure(code="shutdown", message=""), now)


# -- tasks


def is_finish(effect: fx.Effect, task_id: str) -> bool:
    """Whether this tells the end of the task."""
    return isinstance(effect, fx.Publish) and (effect.task_id, effect.event) == (task_id, "task_finish")


class NewestTaskFirst(Node):
    """A worker gets the newest of its tasks."""

    def _start_tasks(self, session: Session, now: float, *, announced: str | None = None) -> None:
        if announced is None:
            session.queue.reverse()
        super()._start_tasks(session, now, announced=announced)


class LosesFinishOfQueued(Node):
    """Tasks that fail in the queue end without a word."""

    def _finish(self, task: Task, state: TaskState, now: float, *rest: Any) -> None:
        unheard = task.state is TaskState.QUEUED and state is TaskState.FAILED
        super()._finish(task, state, now, *rest)
        if unheard:
            self._out = [e for e in self._out if not is_finish(e, task.id)]


class LosesFinishInGrace(Node):
    """A task that completes in the grace of its session's lifetime ends without a word."""

    def _task_ended(self, event: ev.TaskEnded, now: float) -> None:
        session = self.sessions.get(event.session_id)
        in_grace = session is not None and session.close_reason is CloseReason.MAX_LIFETIME
        super()._task_ended(event, now)
        if in_grace:
            self._out = [e for e in self._out if not is_finish(e, event.task_id)]


class FinishesTwice(Node):
    """A cancelled task is finished again when its worker reports."""

    def _task_ended(self, event: ev.TaskEnded, now: float) -> None:
        task, session = self.tasks.get(event.task_id), self.sessions.get(event.session_id)
        again = task is not None and task.ended and session is not None and task.id in session.busy
        super()._task_ended(event, now)
        if again:
            self._out.append(fx.Publish(task_id=event.task_id, event="task_finish", data={}))


class SilentStart(Node):
    """A task that starts at once is not told that it is connected."""

    def _task_submitted(self, event: ev.TaskSubmitted, now: float) -> None:
        super()._task_submitted(event, now)
        self._out = [e for e in self._out if not isinstance(e, fx.Publish) or e.event != "connection"]


class TrustsCancel(Node):
    """A cancelled task's place is given away before the worker has let go of it."""

    def _stop_task(self, task: Task, *rest: Any) -> None:
        super()._stop_task(task, *rest)
        session = self.sessions.get(task.session_id)
        if session is not None and session.state.value == "working" and task.id in session.busy:
            del session.busy[task.id]
            self._timers.cancel(Alarm.CANCEL, task.id)
            self._start_tasks(session, rest[-1])


class OneTooMany(Node):
    """A worker gets one task more than it takes."""

    def _start_tasks(self, session: Session, now: float, *, announced: str | None = None) -> None:
        super()._start_tasks(session, now, announced=announced)
        if session.queue:
            held = session.busy.popitem()[0]
            super()._start_tasks(session, now)
            session.busy[held] = None


class WaitsForATick(Node):
    """When a task has ended the next one is not started."""

    def _task_ended(self, event: ev.TaskEnded, now: float) -> None:
        session = self.sessions.get(event.session_id)
        queue = list(session.queue) if session else []
        if session is not None and len(session.busy) > 1 and event.task_id in session.busy:
            session.queue.clear()
        super()._task_ended(event, now)
        if session is not None and queue and not session.queue and not session.tearing_down:
            session.queue.extend(
                task_id for task_id in queue if self.tasks[task_id].state is TaskState.QUEUED
            )


# -- time


class IdlesAtWork(Node):
    """The idle clock, once it runs, is not stopped by work."""

    def _set_idle(self, session: Session, deadline: float | None) -> None:
        if deadline is not None or session.tearing_down:
            super()._set_idle(session, deadline)


class IdlesPastLifetime(Node):
    """A keepalive carries a session past its lifetime."""

    def _keepalive_requested(self, event: ev.KeepaliveRequested, now: float) -> None:
        super()._keepalive_requested(event, now)
        session = self.sessions[event.session_id]
        if session.max_deadline is not None:
            session.max_deadline += self.rules.idle_timeout
            self._timers.set(Alarm.LIFETIME, session.id, session.max_deadline)
            if session.idle_deadline is not None:
                self._set_idle(session, now + self.rules.idle_timeout)


class NeverWakes(Node):
    """A session that is ready has no deadline at all."""

    def _start_tasks(self, session: Session, now: float, *, announced: str | None = None) -> None:
        super()._start_tasks(session, now, announced=announced)
        for alarm in (Alarm.IDLE, Alarm.LIFETIME):
            self._timers.cancel(alarm, session.id)


class WaitsForCancelForEver(Node):
    """Nobody asks whether a cancelled task has stopped."""

    def _stop_task(self, task: Task, *rest: Any) -> None:
        super()._stop_task(task, *rest)
        self._timers.cancel(Alarm.CANCEL, task.id)


# -- requests


class RefusalLeavesTraces(Node):
    """A refused task has already taken something."""

    def _task_submitted(self, event: ev.TaskSubmitted, now: float) -> None:
        try:
            super()._task_submitted(event, now)
        except Refusal:
            self._take_fence()
            raise


class KillsForAnyone(Node):
    """Any tenant may kill any session."""

    def _session_kill_requested(self, event: ev.SessionKillRequested, now: float) -> None:
        owner = self.sessions[event.session_id].tenant if event.session_id in self.sessions else event.tenant
        super()._session_kill_requested(
            ev.SessionKillRequested(session_id=event.session_id, tenant=owner), now
        )


BY_THE_BOOKS: list[tuple[MakeNode, str]] = [
    (with_slots(LeasesTwice), "a slot was leased that is not free|do not belong together"),
    (with_slots(ForgetsFaults), "the books say quarantined|leased that is not free"),
    (with_slots(IgnoresTiers), "a slot of the wrong tier"),
    (LeasesWithoutFence, "the fence did not grow"),
    (
        with_line(LastComeFirstServed),
        "slots were taken from one who waits|the line was overtaken|could start",
    ),
    (with_line(SmallOnesFirst), "slots were taken from one who waits"),
    (with_line(OnlyTheFirst), "the first of the line could start"),
    (ShutsDownFrontFirst, "a session was started in the shutdown"),
    (NewestTaskFirst, "a task overtook another"),
    (LosesFinishOfQueued, "over before its task_finish"),
    (LosesFinishInGrace, "over before its task_finish"),
    (FinishesTwice, "an event after task_finish"),
    (SilentStart, "the first event is not connection|an admitted task heard nothing"),
    (TrustsCancel, "the worker takes|idled out at work|does not follow|a drain cut work off"),
    (OneTooMany, "the worker takes"),
    (WaitsForATick, "tasks wait while the worker has room"),
    (IdlesAtWork, "a session idled out at work"),
    (IdlesPastLifetime, "a session outlives its lifetime"),
    (NeverWakes, "sessions live for ever|a session outlives its lifetime"),
    (RefusalLeavesTraces, "a refused request or certificate changed something"),
    (KillsForAnyone, "killed by another"),
]
BY_INSPECTION: list[tuple[MakeNode, str]] = [
    (with_slots(LeasesTwice), "the index of free slots is wrong|leased that is not free|do not belong"),
    (IdlesAtWork, "deadlines|the idle clock runs"),
    (NeverWakes, "needs deadlines"),
    (WaitsForCancelForEver, "needs deadlines"),
]


@pytest.mark.parametrize(("make_node", "complaint"), BY_THE_BOOKS, ids=names(BY_THE_BOOKS))
def test_a_planted_fault_is_seen_from_outside(make_node: MakeNode, complaint: str) -> None:
    """What the node does gives the fault away, without a look at its state."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node, inspect=False)


@pytest.mark.parametrize(("make_node", "complaint"), BY_INSPECTION, ids=names(BY_INSPECTION))
def test_a_planted_fault_is_seen_in_the_state(make_node: MakeNode, complaint: str) -> None:
    """The state contradicts itself as soon as the fault has been at work."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node, inspect=True)
