"""Adoption: what to do with the state that an earlier life of the service left, once the devices are known.

Nothing of what was under way is written down but the state itself; what follows from it is decided anew:

 1. Slots keep their leases and their quarantine as long as their device is there.
 2. A session that was being torn down is washed again, and so are the slots that one which has closed has
    left in their wash: a wash that nobody saw the end of never counts.
 3. A session that lost a slot, or the machine under it, ends.
 4. Every other session with a container is adopted, its running tasks followed further, cancelled ones
    cancelled again. Their deadlines have kept running; what may have ended in time meanwhile gets a moment.
 5. Those who wait still wait, in their order.
 6. Every slot that nobody holds is washed before it is leased again. Every wash ordered now is a full one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_server.core import effects as fx
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.events import NodeStarted
from gpu_server.core.sessions import CloseReason, Session, SessionState
from gpu_server.core.slots import SlotSpec
from gpu_server.core.timers import Alarm
from gpu_server.core.washing import begin_to_wash, look_ahead, wash_again

if TYPE_CHECKING:
    from gpu_server.core.node import Node


def adopt(node: Node, event: NodeStarted, now: float) -> None:
    """Take the state up again. The numbers are those of the list above."""
    node._adopting = True
    gone = _take_devices(node, event.slots)  # 1
    washed = begin_to_wash(node)  # 6, first of all: where one session ends another must not start on them
    for task in node.tasks.values():
        node._await_reader(task, now)
    for session in list(node.live_sessions()):
        if session.tearing_down:
            node._out.append(wash_again(node, session))  # 2
            continue
        lost = gone.intersection(session.slot_ids)
        _keep_only(session, set(session.slot_ids) - lost)
        if event.rebooted:
            node._end(session, CloseReason.NODE_RESTARTED, _REBOOTED, now)  # 3
        elif lost:
            node._end(session, CloseReason.SLOT_LOST, _slot_lost(lost), now)
        elif session.state is not SessionState.WAITING:
            _take_up(node, session, now)  # 4
    node._tell_positions(node.line)  # 5
    node._out += washed  # 6
    node._adopting = False
    look_ahead(node)


def _take_devices(node: Node, specs: tuple[SlotSpec, ...]) -> set[str]:
    """Bring the slots in line with the devices; the ids of slots whose device is not there any more."""
    found = {spec.id: spec for spec in specs}
    gone = {
        slot.spec.id
        for slot in node.slots
        if slot.spec.id not in found or found[slot.spec.id].uuid != slot.spec.uuid
    }
    for slot_id in gone:
        node.slots.remove(slot_id)
    for spec in specs:
        if spec.id in node.slots:
            node.slots.describe(spec)
        else:
            node.slots.add(spec)
    return gone


def _keep_only(session: Session, slot_ids: set[str]) -> None:
    before = zip(session.slot_ids, session.washed_before, strict=True)
    session.washed_before = tuple(head for slot_id, head in before if slot_id in slot_ids)
    session.slot_ids = tuple(slot_id for slot_id in session.slot_ids if slot_id in slot_ids)


def _take_up(node: Node, session: Session, now: float) -> None:
    ready = session.state is not SessionState.PREPARING
    node._out.append(
        fx.AdoptWorker(session_id=session.id, fence=session.fence, slot_ids=session.slot_ids, ready=ready)
    )
    soon = now + node.rules.adoption_grace
    _no_sooner(node, Alarm.START, session.id, soon)
    _no_sooner(node, Alarm.DRAIN, session.id, soon)
    for task_id in session.busy:
        node._out.append(fx.ResumeTask(session_id=session.id, task_id=task_id))
        if node.tasks[task_id].ended:
            node._out.append(fx.CancelTask(session_id=session.id, task_id=task_id))
            node._set_alarm(Alarm.CANCEL, task_id, now + node.rules.cancel_grace)
        _no_sooner(node, Alarm.TASK, task_id, soon)
    node._tell_positions([session])


def _no_sooner(node: Node, alarm: Alarm, entity_id: str, when: float) -> None:
    due = node._timers.get(alarm, entity_id)
    if due is not None and due < when:
        node._set_alarm(alarm, entity_id, when)


def _slot_lost(slot_ids: set[str]) -> Failure:
    names = ", ".join(sorted(slot_ids))
    return Failure(code=FailureCode.SLOT_LOST, message=f"the device of slot {names} is not there any more")


_REBOOTED = Failure(code=FailureCode.NODE_RESTARTED, message="the machine was restarted")
