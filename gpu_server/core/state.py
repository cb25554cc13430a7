"""The state of one node: everything that decisions read and write, and what of it has changed.

Each change of something that a row holds is touched here, so that the rows of one decision can be written
together (`take_changes`) and read again by another life of the service (`restore`).
"""

from __future__ import annotations

from collections.abc import Iterator

from gpu_server.core import effects as fx
from gpu_server.core import rows
from gpu_server.core.notices import UNNUMBERED
from gpu_server.core.rows import Change, Rows, RowsUnusable, Table
from gpu_server.core.sessions import Rules, Session, SessionState, Task, TaskState
from gpu_server.core.slots import Certificate, Slots, SlotState
from gpu_server.core.timers import SESSION_ALARMS, TASK_ALARMS, Alarm, Timers
from gpu_server.core.waitline import WaitLine

FENCE = "fence"
LIFE = "life"  # written by whoever knows the clocks: the boot, and the time of day
# Readers come back by themselves after a restart, or not: their deadline begins anew.
_NOT_IN_ROWS = frozenset({Alarm.DISCONNECT})
_SESSION_ALARMS = frozenset(SESSION_ALARMS)


class NodeState:
    """Others may read `slots`, `sessions`, `tasks` and `line`; `core/node.py` alone writes.

    `first_fence` must be higher than any fence of an earlier life whose rows are lost.
    """

    def __init__(self, rules: Rules, *, first_fence: int = 1) -> None:
        self.rules = rules
        self.slots = Slots()
        self.sessions: dict[str, Session] = {}
        self.tasks: dict[str, Task] = {}
        self.line = WaitLine()
        self.shutting_down = False
        self.runtime_doubt: str | None = None
        self.task_keys: dict[tuple[str, str], str] = {}
        self.session_keys: dict[tuple[str, str], str] = {}
        self._live: dict[str, Session] = {}
        self._ended_tasks: dict[str, None] = {}
        self._ended_sessions: dict[str, None] = {}
        self._timers = Timers()
        self._next_fence = first_fence
        self._out: list[fx.Effect] = []
        self._touched: dict[tuple[Table, str], None] = {}
        self._issued: dict[str, Certificate] = {}
        self._adopting = False  # while what an earlier life left is taken up

    def next_deadline(self) -> float | None:
        """When `Tick` is due next, or None."""
        return self._timers.next()

    def live_sessions(self) -> Iterator[Session]:
        return iter(self._live.values())

    # -- changing -------------------------------------------------------------------------------------------

    def _add_session(self, session: Session) -> None:
        self.sessions[session.id] = session
        if not session.ended:
            self._live[session.id] = session
        if session.key is not None:
            self.session_keys[session.tenant, session.key.name] = session.id
        self._touch_session(session.id)

    def _add_task(self, task: Task) -> None:
        self.tasks[task.id] = task
        if task.key is not None:
            self.task_keys[task.tenant, task.key.name] = task.id
        self._touch_task(task.id)

    def _drop_session(self, session_id: str) -> None:
        self._forget_key(self.sessions.pop(session_id), self.session_keys)
        self._touch_session(session_id)

    def _drop_task(self, task_id: str) -> None:
        self._forget_key(self.tasks.pop(task_id), self.task_keys)
        self._touch_task(task_id)

    @staticmethod
    def _forget_key(entity: Session | Task, keys: dict[tuple[str, str], str]) -> None:
        if entity.key is not None:
            del keys[entity.tenant, entity.key.name]
            entity.key = None

    def _touch_session(self, session_id: str) -> None:
        self._touched[Table.SESSIONS, session_id] = None

    def _touch_task(self, task_id: str) -> None:
        self._touched[Table.TASKS, task_id] = None

    def _set_alarm(self, alarm: Alarm, entity_id: str, when: float) -> None:
        self._timers.set(alarm, entity_id, when)
        self._touch_alarm(alarm, entity_id)

    def _cancel_alarm(self, alarm: Alarm, entity_id: str) -> None:
        if self._timers.cancel(alarm, entity_id):
            self._touch_alarm(alarm, entity_id)

    def _touch_alarm(self, alarm: Alarm, entity_id: str) -> None:
        if alarm not in _NOT_IN_ROWS:
            table = Table.SESSIONS if alarm in _SESSION_ALARMS else Table.TASKS
            self._touched[table, entity_id] = None

    def _keep_certificate(self, certificate: Certificate) -> None:
        """Write it down. The node forgets it then, but for its hashes: its row is for others to read."""
        name = certificate.record_hash.hex()
        self._issued[name] = certificate
        self._touched[Table.CERTIFICATES, name] = None

    def _take_fence(self) -> int:
        fence, self._next_fence = self._next_fence, self._next_fence + 1
        self._touched[Table.NODE, FENCE] = None
        return fence

    def _tell(self, *notices: fx.Publish) -> None:
        for notice in notices:
            if notice.event not in UNNUMBERED:
                self.tasks[notice.task_id].told += 1
                self._touch_task(notice.task_id)
        self._out.extend(notices)

    # -- rows -----------------------------------------------------------------------------------------------

    def take_changes(self) -> list[Change]:
        """Every row that has changed since this was asked last. One decision's are to be written together."""
        for slot_id in self.slots.touched:
            self._touched[Table.SLOTS, slot_id] = None
        self.slots.touched.clear()
        changes = [Change(table=table, id=name, row=self._row(table, name)) for table, name in self._touched]
        self._touched.clear()
        self._issued.clear()
        return changes

    def _row(self, table: Table, name: str) -> rows.Row | None:
        match table:
            case Table.NODE:
                return {"next": self._next_fence}
            case Table.SLOTS:
                return rows.slot_row(self.slots[name]) if name in self.slots else None
            case Table.SESSIONS:
                session = self.sessions.get(name)
                return rows.session_row(session, self._alarms_of(name, SESSION_ALARMS)) if session else None
            case Table.TASKS:
                task = self.tasks.get(name)
                return rows.task_row(task, self._alarms_of(name, TASK_ALARMS)) if task else None
            case Table.CERTIFICATES:
                return rows.certificate_row(self._issued[name])

    def _alarms_of(self, entity_id: str, alarms: tuple[Alarm, ...]) -> rows.Alarms:
        return {
            alarm: when
            for alarm in alarms
            if alarm not in _NOT_IN_ROWS and (when := self._timers.get(alarm, entity_id)) is not None
        }

    def restore(self, kept: Rows) -> None:
        """Be what an earlier life was when it wrote these rows. Raises `RowsUnusable`."""
        try:
            self._restore(kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RowsUnusable(f"the rows do not fit together: {error!r}") from error
        self._touched.clear()
        self.slots.touched.clear()

    def _restore(self, kept: Rows) -> None:
        if (fence := kept[Table.NODE].get(FENCE)) is not None:
            self._next_fence = max(self._next_fence, int(fence["next"]))
        for slot_id, row in kept[Table.SLOTS].items():
            self.slots.restore(rows.slot_of(slot_id, row))
        for session_id, row in kept[Table.SESSIONS].items():
            session = rows.session_of(session_id, row)
            self._add_session(session)
            if session.state is SessionState.WAITING:
                self.line.join(session)
            for alarm, when in rows.alarms_of(row).items():
                self._timers.set(alarm, session_id, when)
        for task_id, row in kept[Table.TASKS].items():
            task = rows.task_of(task_id, row)
            self._add_task(task)
            for alarm, when in rows.alarms_of(row).items():
                self._timers.set(alarm, task_id, when)
        self._must_fit_together()
        ended_tasks = [task for task in self.tasks.values() if task.ended]
        ended_sessions = [session for session in self.sessions.values() if session.ended]
        self._ended_tasks = dict.fromkeys(t.id for t in sorted(ended_tasks, key=lambda t: t.finished_at or 0))
        self._ended_sessions = dict.fromkeys(
            s.id for s in sorted(ended_sessions, key=lambda s: s.closed_at or 0)
        )

    def _must_fit_together(self) -> None:
        """Raises ValueError unless sessions hold what is leased, and have the tasks that have not ended."""
        live, tasks = self._live.values(), self.tasks.values()
        held = {(slot_id, s.id) for s in live if not s.tearing_down for slot_id in s.slot_ids}
        leased = {(slot.spec.id, slot.holder) for slot in self.slots if slot.state is SlotState.LEASED}
        queues = {(task_id, s.id) for s in live for task_id in s.queue}
        queued = {(task.id, task.session_id) for task in tasks if task.state is TaskState.QUEUED}
        workers = {(task_id, s.id) for s in live for task_id in s.busy}
        running = {(task.id, task.session_id) for task in tasks if task.state is TaskState.RUNNING}
        ended = {(task.id, task.session_id) for task in tasks if task.ended}
        odd = (held ^ leased) | (queues ^ queued) | (running - workers) | (workers - running - ended)
        if odd:
            raise ValueError(f"these do not belong together: {odd}")
