"""What must be true of a node after every event. `check` reads the whole state and changes nothing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gpu_server.core.errors import Failure
from gpu_server.core.node import Node
from gpu_server.core.sessions import CloseReason, Session, SessionState, Task, TaskState, TaskType
from gpu_server.core.slots import NO_CERTIFICATE, Slot, SlotState, Tier, WashTier
from gpu_server.core.timers import Alarm

SESSION_ALARMS = {Alarm.GPU_WAIT, Alarm.START, Alarm.IDLE, Alarm.LIFETIME, Alarm.DRAIN, Alarm.FORGET_SESSION}
TASK_ALARMS = set(Alarm) - SESSION_ALARMS

LEASING = {SessionState.PREPARING, SessionState.READY, SessionState.WORKING}


class Broken(AssertionError):
    """An invariant does not hold."""


def must(holds: bool, what: str, *about: object) -> None:
    if not holds:
        raise Broken(" ".join([what, *(repr(thing) for thing in about)]))


def check(node: Node) -> None:
    """Raises `Broken` when any part of the node's state disagrees with another part."""
    for session in node.sessions.values():
        _check_session(node, session)
    for task in node.tasks.values():
        _check_task(node, task)
    _check_slots(node)
    _check_line(node)
    _check_places(node)
    _check_keys(node)
    _check_timers_have_owners(node)


def holds_slots(session: Session) -> bool:
    """Whether the slots of this session are leased to it now."""
    in_grace = session.state is SessionState.DRAINING and not session.tearing_down
    return session.state in LEASING or in_grace


def snapshot(node: Node) -> str:
    """The whole state in words, so that two moments can be compared for equality."""
    return repr(
        (
            list(node.slots),
            {key: list(ids) for key, ids in node.slots._free.items()},
            (list(node.slots._washing), list(node._issued)),
            node.sessions,
            node.tasks,
            [session.id for session in node.line],
            node.shutting_down,
            node.runtime_doubt,
            (node.task_keys, node.session_keys),
            (list(node._live), list(node._ended_tasks), list(node._ended_sessions)),
            node._next_fence,
            sorted(node._timers._when.items()),
        )
    )


def durable(node: Node) -> dict[str, Any]:
    """What another life of the service must find. The rest comes back otherwise, or is not needed there:
    stages, places, readers and their deadlines, stories, doubts, workers' words, the order of free slots."""
    return {
        "slots": {slot.spec.id: _kept(slot) for slot in node.slots},
        "free slots": {key: set(ids) for key, ids in node.slots._free.items()},
        "washing slots": set(node.slots._washing),
        "slots that serve": {tier: node.slots.serving(tier) for tier in Tier},
        "sessions": [_kept(session) for session in node.sessions.values()],
        "tasks": [_kept(task) for task in node.tasks.values()],
        "line": [session.id for session in node.line],
        "live sessions": [session.id for session in node.live_sessions()],
        "ended tasks": set(node._ended_tasks),
        "ended sessions": set(node._ended_sessions),
        "keys": (node.task_keys, node.session_keys),
        "next fence": node._next_fence,
        "deadlines": {key: at for key, at in node._timers._when.items() if key[0] is not Alarm.DISCONNECT},
    }


_NOT_KEPT = {
    Slot: {"doubt", "pending", "history"},
    Session: {"stage", "log_tail", "prefetched", "history"},
    Task: {"position", "readers", "history"},
}
_KEPT = {kind: [f.name for f in fields(kind) if f.name not in out] for kind, out in _NOT_KEPT.items()}


def _kept(entity: Slot | Session | Task) -> list[Any]:
    values = [getattr(entity, name) for name in _KEPT[type(entity)]]
    return [_without_words(value) for value in values]


def _without_words(value: Any) -> Any:
    if isinstance(value, Failure) and value.from_worker:
        return ("from a worker", value.code)
    return list(value.items()) if isinstance(value, dict) else value  # the order of a worker's tasks matters


def _check_session(node: Node, session: Session) -> None:
    state, alarms = session.state, _alarms_of(node, session.id) & SESSION_ALARMS
    needed = {
        SessionState.WAITING: {Alarm.GPU_WAIT},
        SessionState.PREPARING: {Alarm.START, Alarm.LIFETIME},
        SessionState.READY: {Alarm.IDLE, Alarm.LIFETIME},
        SessionState.WORKING: {Alarm.LIFETIME},
        SessionState.DRAINING: set() if session.tearing_down else {Alarm.DRAIN},
        SessionState.CLOSED: {Alarm.FORGET_SESSION},
        SessionState.FAILED: {Alarm.FORGET_SESSION},
    }[state]
    must(alarms == needed, f"a {state} session needs deadlines {needed}, it has {alarms}:", session)
    must(session.idle_deadline == node._timers.get(Alarm.IDLE, session.id), "two idle deadlines:", session)
    if session.idle_deadline is not None:
        must(state is SessionState.READY, "the idle clock runs in a session that is not ready:", session)
        must(not session.queue and not session.busy, "the idle clock runs beside work:", session)
        must(session.max_deadline is not None, "idling without a lifetime:", session)
        assert session.max_deadline is not None
        must(session.idle_deadline <= session.max_deadline, "idling outlasts the lifetime:", session)
    if Alarm.LIFETIME in alarms:
        same = session.max_deadline == node._timers.get(Alarm.LIFETIME, session.id)
        must(same, "two lifetime deadlines:", session)

    must(len(session.busy) <= session.workload.max_concurrent_tasks, "more runs than may run:", session)
    must(not session.busy or state in (SessionState.WORKING, SessionState.DRAINING), "busy:", session)
    must(bool(session.busy) or state is not SessionState.WORKING, "working on nothing:", session)
    if state is SessionState.READY:
        must(not session.queue, "a ready session lets tasks wait:", session)
    if state is SessionState.WORKING and session.queue:
        full = len(session.busy) == session.workload.max_concurrent_tasks
        must(full, "a working session has room and lets tasks wait:", session)
    if state is SessionState.DRAINING:
        must(not session.queue, "tasks are queued in a session that drains:", session)
        must(session.close_reason is not None, "it drains for no reason:", session)
        if session.tearing_down:
            must(not session.busy, "tasks are busy in a container that is being taken down:", session)
        else:
            must(bool(session.busy), "a grace period for nothing:", session)
            must(session.close_reason is CloseReason.MAX_LIFETIME, "grace for another reason:", session)
    if session.ended:
        must(not session.queue and not session.busy, "work in a session that has ended:", session)
        must(session.close_reason is not None and session.closed_at is not None, "no reason:", session)
    else:
        must(session.closed_at is None, "closed while alive:", session)
    if session.sealing is None:
        sealed = session.worker_key or session.grants or session.sealed_tasks
        must(not sealed, "a plain session with something sealed:", session)
    elif state in (SessionState.READY, SessionState.WORKING):
        must(session.worker_key is not None, "a sealed session serves without a key:", session)
    must(not session.grants or session.worker_key is not None, "a grant to nobody:", session)
    must(len(session.grants) <= node.rules.grants_max, "more grants than are kept:", session)
    must(session.sealed_tasks <= node.rules.sealed_tasks_max, "more sealed tasks than it takes:", session)
    must(len(session.washed_before) == len(session.slot_ids), "not a certificate for each slot:", session)
    if session.workload.wash_per_task:
        must(session.tasks_taken <= 1, "it is washed after every task, and took more:", session)
        left = session.queue or session.busy or session.tearing_down or session.ended
        must(bool(left) or session.tasks_taken == 0, "it has had its task:", session)
    if session.task_type is TaskType.ONEOFF:
        must(len(session.queue) + len(session.busy) <= 1, "a one-off session with two tasks:", session)

    if holds_slots(session):
        must(len(session.slot_ids) == session.workload.gpus, "fewer slots than asked for:", session)
        for slot_id in session.slot_ids:
            slot = node.slots[slot_id]
            leased = slot.state is SlotState.LEASED and slot.holder == session.id
            must(leased, "a session runs on a slot that is not leased to it:", session, slot)
            must(slot.fence == session.fence, "the fences differ:", session, slot)
    if node.shutting_down and not (session.ended or session.tearing_down):
        must(state is not SessionState.WAITING, "it waits in the shutdown:", session)
        must(bool(session.busy or session.queue), "it lives through the shutdown without work:", session)


def _check_task(node: Node, task: Task) -> None:
    alarms = _alarms_of(node, task.id) & TASK_ALARMS
    session = node.sessions.get(task.session_id)
    queued = session is not None and task.id in session.queue
    busy = session is not None and task.id in session.busy
    if task.ended:
        must(not queued, "an ended task is queued:", task)
        needed = {Alarm.FORGET_TASK, Alarm.CANCEL} if busy else {Alarm.FORGET_TASK}
        must(alarms == needed, f"an ended task needs deadlines {needed}, it has {alarms}:", task)
        must(task.finished_at is not None and task.position is None, "half ended:", task)
        return
    must(session is not None and not session.ended, "a task outlives its session:", task)
    assert session is not None
    must(not session.tearing_down, "a task outlives its session's container:", task, session)
    running = task.state is TaskState.RUNNING
    must((queued, busy) == (not running, running), "the task is in the wrong place:", task, session)
    must(session.queue.count(task.id) == int(not running), "queued twice:", task, session)
    needed = ({Alarm.TASK} if running else set()) | (
        set() if task.readers > 0 or task.detached else {Alarm.DISCONNECT}
    )
    must(alarms == needed, f"a {task.state} task needs deadlines {needed}, it has {alarms}:", task)


def _check_slots(node: Node) -> None:
    for slot in node.slots:
        indexed = [key for key, ids in node.slots._free.items() if slot.spec.id in ids]
        wanted = [(slot.spec.tiers, slot.kept_for)] if slot.state is SlotState.FREE else []
        must(indexed == wanted, "the index of free slots is wrong:", slot, indexed)
        washing = slot.state is SlotState.WASHING
        must((slot.spec.id in node.slots._washing) == washing, "the index of washing slots is wrong:", slot)
        must(slot.pending is None or washing, "a certificate is awaited of a slot that is not washed:", slot)
        must(slot.pending in (None, slot.prev), "another certificate is awaited than its newest:", slot)
        must((slot.prev == NO_CERTIFICATE) == (slot.head == NO_CERTIFICATE), "half a certificate:", slot)
        if slot.state is SlotState.FREE:
            must(slot.prev != NO_CERTIFICATE, "free without a certificate:", slot)
            light = slot.tier is WashTier.LIGHT
            must((slot.kept_for is not None) == light, "kept for the wrong one:", slot)
            must(slot.kept_for in (None, slot.tenant), "kept for one who was not there:", slot)
        else:
            must(slot.kept_for is None, "kept and not free:", slot)
        holders = [s.id for s in node.sessions.values() if holds_slots(s) and slot.spec.id in s.slot_ids]
        if slot.state is SlotState.LEASED:
            must(holders == [slot.holder], "a leased slot with other holders:", slot, holders)
        else:
            must(not holders, "a slot that is not leased has holders:", slot, holders)
        if slot.state in (SlotState.FREE, SlotState.QUARANTINED):
            must(slot.holder is None, "it belongs to nobody:", slot)
        must((slot.fault is not None) or slot.state is not SlotState.QUARANTINED, "no fault:", slot)
        must(slot.fault is None or slot.state is not SlotState.FREE, "free with a fault:", slot)
    must(all(node.slots._free.values()), "an empty part of the index:", node.slots._free)
    free = sum(slot.state is SlotState.FREE for slot in node.slots)
    must(free == node.slots.free_count, "the count of free slots is wrong:", free)
    numbers = [slot.number for slot in node.slots]
    must(len(numbers) == len(set(numbers)), "two slots share a number:", numbers)
    fences = [session.fence for session in node.sessions.values() if session.fence]
    must(len(fences) == len(set(fences)), "two sessions share a fence:", fences)


def _check_line(node: Node) -> None:
    waiting = [s.id for s in node.sessions.values() if s.state is SessionState.WAITING]
    in_line = [session.id for session in node.line]
    must(sorted(waiting) == sorted(in_line), "the line is not who waits:", waiting, in_line)
    if node.runtime_doubt is None:
        must(node.line.next_start(node.slots) is None, "someone waits who could start:", in_line)
    for session in node.line:
        must(bool(session.queue) or session.asked_for, "it waits for no task:", session)


def _check_places(node: Node) -> None:
    """Queued tasks know their place, in the line or in their session."""
    ahead = {session.id: place for place, session in enumerate(node.line)}
    for session in node.sessions.values():
        if session.state in (SessionState.WAITING, SessionState.READY, SessionState.WORKING):
            for index, task_id in enumerate(session.queue):
                place = ahead.get(session.id, 0) + index + 1
                must(node.tasks[task_id].position == place, f"place {place}:", node.tasks[task_id])
    for task in node.tasks.values():
        must(task.state is TaskState.QUEUED or task.position is None, "a place without a queue:", task)


def _check_keys(node: Node) -> None:
    tasks = {(task.tenant, task.key.name): task.id for task in node.tasks.values() if task.key}
    must(node.task_keys == tasks, "the keys are not those of the tasks:", node.task_keys, tasks)
    sessions = {(one.tenant, one.key.name): one.id for one in node.sessions.values() if one.key}
    must(
        node.session_keys == sessions, "the keys are not those of the sessions:", node.session_keys, sessions
    )


def _check_timers_have_owners(node: Node) -> None:
    for alarm, entity_id in node._timers._when:
        owners = node.sessions if alarm in SESSION_ALARMS else node.tasks
        must(entity_id in owners, f"deadline {alarm} of nobody:", entity_id)


def _alarms_of(node: Node, entity_id: str) -> set[Alarm]:
    return {alarm for alarm in Alarm if node._timers.get(alarm, entity_id) is not None}
