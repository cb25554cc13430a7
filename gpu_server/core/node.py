"""The node: every decision about slots, sessions and tasks, and their only writer.

Events in, effects out; `now` is an argument, in seconds on a clock that never goes back. `handle` either
raises `Refusal` and has changed nothing, or changes the state and returns what there is to do. The engine
calls it, one event at a time.

How a session lives:

 1. It joins the wait line, and leaves it with slots leased to it (`_assign`, `_lease`), under a new fence.
 2. `StartWorker` brings up its container; `WorkerReady` makes it ready.
 3. Its tasks start first come, first served, as many at once as its worker takes (`_start_tasks`).
 4. It ends for one `CloseReason` (`_end`): its tasks are ended, its slots are washed (`WashSlots`).
 5. `ContainerGone` closes it; a certificate for each slot, once it is on the disk, frees that slot, and the
    line moves (1). What is washed when is in `core/washing.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core import notices, washing
from gpu_server.core.admission import (
    admit_opening,
    admit_session,
    admit_task,
    owned_session,
    owned_task,
)
from gpu_server.core.adoption import adopt
from gpu_server.core.errors import Failure, FailureCode, Refusal, RefusalCode
from gpu_server.core.sessions import (
    FAILED_REASONS,
    CloseReason,
    Expiry,
    RequestKey,
    Rules,
    Sealing,
    Session,
    SessionState,
    Task,
    TaskState,
    TaskType,
    Workload,
)
from gpu_server.core.slots import Judge, Tier
from gpu_server.core.state import NodeState
from gpu_server.core.timers import Alarm
from gpu_server.core.waitline import WaitLine


class Node(NodeState):
    """The decisions, over the state of one node. Only `handle` writes. `judge` reads certificates."""

    def __init__(self, rules: Rules, *, judge: Judge, first_fence: int = 1) -> None:
        super().__init__(rules, first_fence=first_fence)
        self.judge = judge
        self._on: Mapping[type[ev.Event], Callable[[Any, float], None]] = {
            ev.NodeStarted: self._node_started,
            ev.TaskSubmitted: self._task_submitted,
            ev.SessionRequested: self._session_requested,
            ev.SessionOpened: self._session_opened,
            ev.SessionKillRequested: self._session_kill_requested,
            ev.KeepaliveRequested: self._keepalive_requested,
            ev.TaskCancelRequested: self._task_cancel_requested,
            ev.RequestWithdrawn: self._request_withdrawn,
            ev.ReaderCame: self._reader_came,
            ev.ReaderLeft: self._reader_left,
            ev.StageReached: self._stage_reached,
            ev.WorkerCreated: self._worker_created,
            ev.WorkerKeyShown: self._worker_key_shown,
            ev.WorkerReady: self._worker_ready,
            ev.WorkerLost: self._worker_lost,
            ev.TaskEnded: self._task_ended,
            ev.ContainerGone: self._container_gone,
            ev.CertificateIssued: self._certificate_issued,
            ev.CertificateSecured: self._certificate_secured,
            ev.WashFailed: self._wash_failed,
            ev.SlotChecked: self._slot_checked,
            ev.SlotWashOrdered: self._slot_wash_ordered,
            ev.RuntimeChecked: self._runtime_checked,
            ev.DrainOrdered: self._drain_ordered,
            ev.ShutdownOrdered: self._shutdown_ordered,
            ev.Tick: self._tick,
        }
        self._alarms: Mapping[Alarm, Callable[[str, float], None]] = {
            Alarm.GPU_WAIT: self._gpu_wait_over,
            Alarm.START: self._start_over,
            Alarm.IDLE: self._idle_over,
            Alarm.LIFETIME: self._lifetime_over,
            Alarm.DRAIN: self._drain_over,
            Alarm.TASK: self._task_over,
            Alarm.CANCEL: self._cancel_over,
            Alarm.DISCONNECT: self._disconnect_over,
            Alarm.FORGET_TASK: self._forget_task,
            Alarm.FORGET_SESSION: self._forget_session,
        }

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Decide. Raises `Refusal` for a request that is not granted and `CertificateRejected` for a
        certificate that frees nothing; the state is then as it was. `ImpossibleTransition` is a bug."""
        self._out = []
        self._on[type(event)](event, now)
        return self._out

    def expiry(self, session: Session) -> Expiry:
        """The one statement of when this session will end if nothing happens."""
        if session.ended:
            return Expiry(idle_deadline=None, max_deadline=None, effective=None, reason=None)
        if session.state is SessionState.DRAINING:
            return Expiry(
                idle_deadline=None,
                max_deadline=session.max_deadline,
                effective=self._timers.get(Alarm.DRAIN, session.id),
                reason=session.close_reason,
            )
        wait = self._timers.get(Alarm.GPU_WAIT, session.id)
        clocks = [
            (when, reason)
            for when, reason in (
                (session.max_deadline, CloseReason.MAX_LIFETIME),
                (session.idle_deadline, CloseReason.IDLE_TIMEOUT),
                (wait, CloseReason.NO_AVAILABLE_GPU),
            )
            if when is not None
        ]
        effective, reason = min(clocks, key=lambda clock: clock[0]) if clocks else (None, None)
        return Expiry(
            idle_deadline=session.idle_deadline,
            max_deadline=session.max_deadline,
            effective=effective,
            reason=reason,
        )

    # -- requests -----------------------------------------------------------------------------------------

    def _task_submitted(self, event: ev.TaskSubmitted, now: float) -> None:
        session = admit_task(self, event)
        if session is None:
            session = self._new_session(
                event.new_session_id,
                event.tenant,
                event.workload,
                event.tier or Tier.LOW,
                event.task_type,
                now,
            )
        task = Task(
            id=event.task_id,
            session_id=session.id,
            tenant=event.tenant,
            task_type=event.task_type,
            timeout=event.timeout,
            created_at=now,
            detached=event.detached,
            key=event.key,
        )
        self._add_task(task)
        session.tasks_taken += 1
        session.sealed_tasks += event.psk_id is not None
        session.queue.append(task.id)
        self._touch_session(session.id)
        self._await_reader(task, now)
        if session.state is SessionState.WAITING and session.id not in self.line:
            self._join_line(session, now)
            return
        if session.state in (SessionState.READY, SessionState.WORKING):
            starts_now = len(session.busy) < session.workload.max_concurrent_tasks
            self._tell(notices.connection(task.id, "session_ready" if starts_now else "queued", session))
            self._start_tasks(session, now, announced=task.id)
            self._tell_positions([session])
            return
        waits = session.state is SessionState.WAITING
        self._tell(notices.connection(task.id, "queued" if waits else "allocated", session))
        self._tell_positions(self.line if waits else [session])

    def _session_requested(self, event: ev.SessionRequested, now: float) -> None:
        admit_session(self, event)
        tier = event.tier or Tier.LOW
        session = self._new_session(
            event.session_id,
            event.tenant,
            event.workload,
            tier,
            TaskType.SESSION,
            now,
            asked_for=True,
            key=event.key,
            sealing=event.sealing,
        )
        self._join_line(session, now)

    def _session_opened(self, event: ev.SessionOpened, now: float) -> None:
        session = admit_opening(self, event.session_id, event.tenant)
        session.grants.pop(event.psk_id, None)
        session.grants[event.psk_id] = event.grant
        while len(session.grants) > self.rules.grants_max:
            del session.grants[next(iter(session.grants))]
        self._touch_session(session.id)

    def _session_kill_requested(self, event: ev.SessionKillRequested, now: float) -> None:
        session = owned_session(self, event.session_id, event.tenant)
        self._end(session, CloseReason.KILLED, _KILLED, now, tasks_become=TaskState.CANCELLED)

    def _keepalive_requested(self, event: ev.KeepaliveRequested, now: float) -> None:
        session = owned_session(self, event.session_id, event.tenant)
        if not session.accepts_tasks:
            raise Refusal(
                RefusalCode.SESSION_CLOSED,
                f"session {session.id} is {session.state} ({session.close_reason}); it cannot be kept alive",
                session_id=session.id,
            )
        if session.idle_deadline is not None:
            self._set_idle(session, max(session.idle_deadline, now + self.rules.idle_timeout))

    def _task_cancel_requested(self, event: ev.TaskCancelRequested, now: float) -> None:
        task = owned_task(self, event.task_id, event.tenant)
        self._stop_task(task, TaskState.CANCELLED, _CANCELLED, now)

    def _request_withdrawn(self, event: ev.RequestWithdrawn, now: float) -> None:
        if event.task_id is not None:
            task = self.tasks[event.task_id]
            self._forget_key(task, self.task_keys)
            self._touch_task(task.id)
            self._stop_task(task, TaskState.FAILED, _NOT_STORED, now)
        if event.session_id is not None:
            session = self.sessions[event.session_id]
            self._forget_key(session, self.session_keys)
            self._touch_session(session.id)
            self._end(session, CloseReason.KILLED, _NOT_STORED, now)

    # -- readers ------------------------------------------------------------------------------------------

    def _reader_came(self, event: ev.ReaderCame, now: float) -> None:
        if (task := self.tasks.get(event.task_id)) is not None:
            task.readers += 1
            self._cancel_alarm(Alarm.DISCONNECT, task.id)

    def _reader_left(self, event: ev.ReaderLeft, now: float) -> None:
        if (task := self.tasks.get(event.task_id)) is not None:
            task.readers -= 1
            self._await_reader(task, now)

    def _await_reader(self, task: Task, now: float) -> None:
        """A task that nobody reads is cancelled after a while, unless it was submitted to run by itself."""
        if task.readers == 0 and not task.ended and not task.detached:
            self._set_alarm(Alarm.DISCONNECT, task.id, now + self.rules.disconnect_grace)

    def _disconnect_over(self, task_id: str, now: float) -> None:
        self._stop_task(self.tasks[task_id], TaskState.CANCELLED, _CLIENT_GONE, now)

    # -- slots and the line -------------------------------------------------------------------------------

    def _node_started(self, event: ev.NodeStarted, now: float) -> None:
        adopt(self, event, now)

    def _join_line(self, session: Session, now: float) -> None:
        self.line.join(session)
        self._assign(now)
        if session.state is SessionState.WAITING:
            self._set_alarm(Alarm.GPU_WAIT, session.id, now + self.rules.gpu_wait_max)
            for task_id in session.queue:
                self._tell(notices.connection(task_id, "queued", session))
            self._tell_positions([session], ahead=len(self.line) - 1)

    def _assign(self, now: float) -> None:
        """Start whoever may start now, in the order of the line, and look ahead for the others. While the
        runtime does not answer nobody does: a start that is bound to fail would cost a session."""
        if self.runtime_doubt is not None:
            return
        moved = False
        while (start := self.line.next_start(self.slots)) is not None:
            session, slot_ids = start
            self.line.leave(session.id)
            self._lease(session, slot_ids, now)
            moved = True
        if moved:
            self._tell_positions(self.line)
        washing.look_ahead(self)

    def _lease(self, session: Session, slot_ids: tuple[str, ...], now: float) -> None:
        session.fence = self._take_fence()
        session.slot_ids = slot_ids
        session.washed_before = tuple(self.slots[slot_id].head.hex() for slot_id in slot_ids)
        self.slots.lease(slot_ids, session.id, session.fence, session.tenant)
        session.move(SessionState.PREPARING, f"leased {', '.join(slot_ids)} under fence {session.fence}")
        session.max_deadline = now + self.rules.max_lifetime
        self._cancel_alarm(Alarm.GPU_WAIT, session.id)
        self._set_alarm(Alarm.LIFETIME, session.id, session.max_deadline)
        self._set_alarm(Alarm.START, session.id, now + session.workload.start_timeout)
        for task_id in session.queue:
            self._tell(notices.connection(task_id, "allocated", session))
        self._tell_positions([session])
        self._out.append(fx.StartWorker(session_id=session.id, fence=session.fence, slot_ids=slot_ids))

    def _gpu_wait_over(self, session_id: str, now: float) -> None:
        session = self.sessions[session_id]
        failure = Failure(
            code=FailureCode.GPU_WAIT_TIMEOUT,
            message=f"no GPU became free within {self.rules.gpu_wait_max:g} s"
            + (f"; {self.runtime_doubt}" if self.runtime_doubt else ""),
        )
        self._end(session, CloseReason.NO_AVAILABLE_GPU, failure, now, tasks_become=TaskState.TIMEOUT)

    def _certificate_issued(self, event: ev.CertificateIssued, now: float) -> None:
        washing.issue(self, event)
        washing.look_ahead(self)  # it may say more than was ordered

    def _certificate_secured(self, event: ev.CertificateSecured, now: float) -> None:
        self.slots.secure(event.slot_id, event.certificate_hash)
        self._assign(now)

    def _wash_failed(self, event: ev.WashFailed, now: float) -> None:
        washing.lock_away(self, event, now)
        self._assign(now)

    def _slot_checked(self, event: ev.SlotChecked, now: float) -> None:
        if event.slot_id in self.slots:
            self.slots.report_check(event.slot_id, event.fault, event.doubt)
            self._assign(now)

    def _slot_wash_ordered(self, event: ev.SlotWashOrdered, now: float) -> None:
        washing.wash_by_order(self, event)
        self._assign(now)

    # -- workers ------------------------------------------------------------------------------------------

    def _stage_reached(self, event: ev.StageReached, now: float) -> None:
        session = self._session_in(event.session_id, SessionState.PREPARING)
        if session is None:
            return
        if event.stage == "loading" and session.stage != "loading":
            self._tell(*(notices.worker(t, "loading", session) for t in session.queue))
        session.stage = event.stage
        self._tell(*(notices.progress(t, event.stage, event.done, event.total) for t in session.queue))

    def _worker_created(self, event: ev.WorkerCreated, now: float) -> None:
        session = self._session_in(event.session_id, SessionState.PREPARING)
        if session is not None and session.container_id != event.container_id:
            session.container_id = event.container_id
            self._touch_session(session.id)
            self._tell(*(notices.worker(t, "created", session) for t in session.queue))

    def _worker_ready(self, event: ev.WorkerReady, now: float) -> None:
        session = self._session_in(event.session_id, SessionState.PREPARING)
        if session is None:
            return
        if session.sealing is not None and session.worker_key is None:
            self._end(session, CloseReason.START_FAILED, _NO_WORKER_KEY, now)
            return
        session.stage = None
        self._cancel_alarm(Alarm.START, session.id)
        session.move(SessionState.READY, "worker is ready")
        self._touch_session(session.id)
        self._start_tasks(session, now)
        self._tell_positions([session])

    def _worker_key_shown(self, event: ev.WorkerKeyShown, now: float) -> None:
        """What was sealed to one key cannot be opened with another, so whoever shows another is not the
        worker that the tenant has trusted."""
        session = self.sessions.get(event.session_id)
        if session is None or session.ended or session.tearing_down or session.sealing is None:
            return
        if session.worker_key is None and session.state is SessionState.PREPARING:
            session.worker_key = event.key
            self._touch_session(session.id)
        elif session.worker_key != event.key:
            self._end(session, CloseReason.WORKER_MISBEHAVED, _OTHER_WORKER_KEY, now)

    def _worker_lost(self, event: ev.WorkerLost, now: float) -> None:
        session = self.sessions.get(event.session_id)
        if session is None or session.ended or session.tearing_down:
            return
        session.log_tail = event.log_tail
        self._end(session, event.reason, event.failure, now)

    def _container_gone(self, event: ev.ContainerGone, now: float) -> None:
        session = self._session_in(event.session_id, SessionState.DRAINING)
        if session is not None:
            session.log_tail = session.log_tail or event.log_tail
            failed = session.close_reason in FAILED_REASONS
            self._close(session, SessionState.FAILED if failed else SessionState.CLOSED, now)

    def _start_over(self, session_id: str, now: float) -> None:
        session = self.sessions[session_id]
        failure = Failure(
            code=FailureCode.START_TIMEOUT,
            message=f"the worker was not ready after {session.workload.start_timeout:g} s"
            f" (stage {session.stage})",
        )
        self._end(session, CloseReason.START_FAILED, failure, now)

    # -- sessions -----------------------------------------------------------------------------------------

    def _new_session(
        self,
        session_id: str,
        tenant: str,
        workload: Workload,
        tier: Tier,
        task_type: TaskType,
        now: float,
        *,
        asked_for: bool = False,
        key: RequestKey | None = None,
        sealing: Sealing | None = None,
    ) -> Session:
        session = Session(
            id=session_id,
            tenant=tenant,
            workload=workload,
            tier=tier,
            task_type=task_type,
            created_at=now,
            asked_for=asked_for,
            key=key,
            sealing=sealing,
        )
        self._add_session(session)
        return session

    def _set_idle(self, session: Session, deadline: float | None) -> None:
        """Run or stop the idle clock. The lifetime has the last word: idling cannot outlast it."""
        if deadline is None or session.max_deadline is None:
            session.idle_deadline = None
            self._cancel_alarm(Alarm.IDLE, session.id)
            return
        session.idle_deadline = min(deadline, session.max_deadline)
        self._set_alarm(Alarm.IDLE, session.id, session.idle_deadline)

    def _idle_over(self, session_id: str, now: float) -> None:
        session = self.sessions[session_id]
        at_lifetime = session.idle_deadline == session.max_deadline
        reason = CloseReason.MAX_LIFETIME if at_lifetime else CloseReason.IDLE_TIMEOUT
        self._end(session, reason, _LIFETIME, now)

    def _lifetime_over(self, session_id: str, now: float) -> None:
        session = self.sessions[session_id]
        if session.state is not SessionState.WORKING:
            self._end(session, CloseReason.MAX_LIFETIME, _LIFETIME, now)
            return
        session.close_reason = CloseReason.MAX_LIFETIME
        session.move(SessionState.DRAINING, "lifetime over, running tasks have their grace")
        for task_id in list(session.queue):
            self._finish(self.tasks[task_id], TaskState.FAILED, now, _LIFETIME)
        self._set_alarm(Alarm.DRAIN, session.id, now + self.rules.lifetime_grace)

    def _drain_over(self, session_id: str, now: float) -> None:
        self._end(self.sessions[session_id], CloseReason.MAX_LIFETIME, _LIFETIME, now)

    def _end(
        self,
        session: Session,
        reason: CloseReason,
        failure: Failure,
        now: float,
        *,
        tasks_become: TaskState = TaskState.FAILED,
    ) -> None:
        """End a session: its tasks now, its container and slots by the wash. Ending twice is ending once."""
        if session.ended or session.tearing_down:
            return
        session.close_reason = session.close_reason or reason
        if session.close_reason in FAILED_REASONS:
            session.failure = failure
        session.tearing_down = True
        self._touch_session(session.id)
        for task_id in [*session.busy, *session.queue]:
            self._finish(self.tasks[task_id], tasks_become, now, failure)
            self._cancel_alarm(Alarm.CANCEL, task_id)
        session.busy.clear()
        for alarm in (Alarm.GPU_WAIT, Alarm.START, Alarm.LIFETIME, Alarm.DRAIN):
            self._cancel_alarm(alarm, session.id)
        self._set_idle(session, None)
        if session.state is SessionState.WAITING:
            self.line.leave(session.id)
            self._close(session, SessionState.FAILED if session.failure else SessionState.CLOSED, now)
            self._assign(now)
            self._tell_positions(self.line)
            return
        if session.state is not SessionState.DRAINING:
            session.move(SessionState.DRAINING, f"{session.close_reason}")
        washing.wash_lease(self, session)
        washing.look_ahead(self)

    def _close(self, session: Session, state: SessionState, now: float) -> None:
        session.move(state, f"{session.close_reason}")
        session.closed_at = now
        del self._live[session.id]
        self._ended_sessions[session.id] = None
        self._set_alarm(Alarm.FORGET_SESSION, session.id, now + self.rules.tombstone_retention)
        if len(self._ended_sessions) > self.rules.ended_sessions_max:
            self._forget_session(next(iter(self._ended_sessions)), now)

    def _forget_session(self, session_id: str, now: float) -> None:
        del self._ended_sessions[session_id]
        self._drop_session(session_id)
        self._cancel_alarm(Alarm.FORGET_SESSION, session_id)
        self._out.append(fx.ForgetSession(session_id=session_id))

    # -- tasks --------------------------------------------------------------------------------------------

    def _start_tasks(self, session: Session, now: float, *, announced: str | None = None) -> None:
        """Start queued tasks, oldest first, while the worker has room; then set the state and the idle clock.

        `announced` is the task whose `session_ready` is already published.
        """
        while session.queue and len(session.busy) < session.workload.max_concurrent_tasks:
            task = self.tasks[session.queue.popleft()]
            session.busy[task.id] = None
            self._touch_session(session.id)
            task.move(TaskState.RUNNING, f"sent to {session.id}")
            task.started_at, task.position = now, None
            self._set_alarm(Alarm.TASK, task.id, now + task.timeout)
            if task.id != announced:
                self._tell(notices.connection(task.id, "session_ready", session))
            self._tell(notices.worker(task.id, "working", session))
            self._out.append(fx.SendTask(session_id=session.id, task_id=task.id))
        if session.busy and session.state is SessionState.READY:
            session.move(SessionState.WORKING, "a task runs")
            self._set_idle(session, None)
        elif not session.busy:
            if session.state is SessionState.WORKING:
                session.move(SessionState.READY, "no task is left")
            self._set_idle(session, now + self.rules.idle_timeout)
            self._end_if_drained(session, now)

    def _task_ended(self, event: ev.TaskEnded, now: float) -> None:
        session, task = self.sessions.get(event.session_id), self.tasks.get(event.task_id)
        if session is None or task is None or event.task_id not in session.busy:
            return
        del session.busy[event.task_id]
        self._touch_session(session.id)
        self._cancel_alarm(Alarm.CANCEL, event.task_id)
        oneoff, per_task = session.task_type is TaskType.ONEOFF, session.workload.wash_per_task
        survives = session.state is SessionState.WORKING and not oneoff and not per_task
        if not task.ended:
            if survives:
                self._tell(notices.worker(task.id, "waiting", session))
            self._finish(task, event.state, now, event.failure, event.usage)
        if survives:
            self._start_tasks(session, now)
            self._tell_positions([session])
        elif not session.busy:
            reason = CloseReason.TASK_DONE if per_task and not oneoff else CloseReason.ONEOFF_DONE
            self._end(session, reason, _LIFETIME, now)

    def _stop_task(self, task: Task, state: TaskState, failure: Failure, now: float) -> None:
        """End a task from outside. Its place in the worker is free only when the worker says so."""
        if task.ended:
            return
        session = self.sessions[task.session_id]
        was_running = task.state is TaskState.RUNNING
        self._finish(task, state, now, failure)
        if session.task_type is TaskType.ONEOFF:
            self._end(session, CloseReason.ONEOFF_DONE, failure, now)
        elif was_running:
            self._out.append(fx.CancelTask(session_id=session.id, task_id=task.id))
            self._set_alarm(Alarm.CANCEL, task.id, now + self.rules.cancel_grace)
        elif session.state is SessionState.WAITING and not session.queue and not session.asked_for:
            self._end(session, CloseReason.ABANDONED, failure, now)
        else:
            self._tell_positions(self.line if session.state is SessionState.WAITING else [session])
            self._end_if_drained(session, now)

    def _task_over(self, task_id: str, now: float) -> None:
        task = self.tasks[task_id]
        message = f"the task ran longer than its {task.timeout:g} s"
        failure = Failure(code=FailureCode.TASK_TIMEOUT, message=message)
        self._stop_task(task, TaskState.TIMEOUT, failure, now)

    def _cancel_over(self, task_id: str, now: float) -> None:
        session = self.sessions[self.tasks[task_id].session_id]
        failure = Failure(
            code=FailureCode.CANCEL_IGNORED,
            message=f"the worker did not stop task {task_id} within {self.rules.cancel_grace:g} s",
        )
        self._end(session, CloseReason.WORKER_MISBEHAVED, failure, now)

    def _finish(
        self,
        task: Task,
        state: TaskState,
        now: float,
        failure: Failure | None = None,
        usage: Mapping[str, Any] | None = None,
    ) -> None:
        """The one place where a task ends, and so the one place that publishes `task_finish`."""
        if task.ended:
            return
        if task.state is TaskState.QUEUED:
            self.sessions[task.session_id].queue.remove(task.id)
        task.move(state, failure.code if failure else "done")
        task.finished_at, task.failure, task.position = now, failure, None
        self.sessions[task.session_id].tasks_done += 1
        self._touch_session(task.session_id)
        self._cancel_alarm(Alarm.TASK, task.id)
        self._cancel_alarm(Alarm.DISCONNECT, task.id)
        self._set_alarm(Alarm.FORGET_TASK, task.id, now + self.rules.task_retention)
        self._tell(*notices.finish(task, usage))
        self._out.append(fx.FinishTask(task_id=task.id, state=state))
        self._ended_tasks[task.id] = None
        if len(self._ended_tasks) > self.rules.ended_tasks_max:
            self._forget_task(next(iter(self._ended_tasks)), now)

    def _forget_task(self, task_id: str, now: float) -> None:
        session = self.sessions.get(self.tasks[task_id].session_id)
        if session is not None and task_id in session.busy:
            del self._ended_tasks[task_id]  # to the end: its worker has not let go of it yet
            self._ended_tasks[task_id] = None
            later = max(self.rules.task_retention, self.rules.cancel_grace)
            self._set_alarm(Alarm.FORGET_TASK, task_id, now + later)
            return
        del self._ended_tasks[task_id]
        self._drop_task(task_id)
        self._cancel_alarm(Alarm.FORGET_TASK, task_id)
        self._out.append(fx.ForgetTask(task_id=task_id))

    # -- time and the end ---------------------------------------------------------------------------------

    def _tick(self, event: ev.Tick, now: float) -> None:
        while (due := self._timers.pop_due(now)) is not None:
            alarm, entity_id = due
            self._touch_alarm(alarm, entity_id)
            self._alarms[alarm](entity_id, now)

    def _runtime_checked(self, event: ev.RuntimeChecked, now: float) -> None:
        self.runtime_doubt = event.doubt
        self._assign(now)

    def _drain_ordered(self, event: ev.DrainOrdered, now: float) -> None:
        """Sessions that have a worker, or will have one, finish their tasks; all others end now."""
        self.shutting_down = True
        for session in reversed(list(self.live_sessions())):  # so that nobody moves up the line meanwhile
            if session.state is SessionState.WAITING:
                self._end(session, CloseReason.SHUTDOWN, _SHUTDOWN, now)
            self._end_if_drained(session, now)

    def _end_if_drained(self, session: Session, now: float) -> None:
        """End a session that takes no more tasks and has none left."""
        if session.busy or session.queue:
            return
        if self.shutting_down:
            self._end(session, CloseReason.SHUTDOWN, _SHUTDOWN, now)
        elif session.sealed_tasks >= self.rules.sealed_tasks_max:
            self._end(session, CloseReason.SEALED_TASKS_SPENT, _SPENT, now)
        elif session.workload.wash_per_task and session.tasks_taken:
            self._end(session, CloseReason.TASK_DONE, _TASK_DONE, now)

    def _shutdown_ordered(self, event: ev.ShutdownOrdered, now: float) -> None:
        self.shutting_down = True
        for session in reversed(list(self.live_sessions())):  # so that nobody moves up the line meanwhile
            self._end(session, CloseReason.SHUTDOWN, _SHUTDOWN, now)

    # -- small things -------------------------------------------------------------------------------------

    def _tell_positions(self, sessions: WaitLine | list[Session], ahead: int = 0) -> None:
        """Tell queued tasks their place where it has changed: in the line, or in their session's queue.

        `ahead` is how many sessions of the line stand before the first of `sessions`.
        """
        for place, session in enumerate(sessions, ahead):
            waits = session.state is SessionState.WAITING
            # Where the session has room, its first tasks are next without a place.
            before = place if waits else len(session.busy) - session.workload.max_concurrent_tasks
            for index, task_id in enumerate(session.queue, 1):
                task = self.tasks[task_id]
                position = index + before if index + before > 0 else None
                if task.position != position:
                    task.position = position
                    if position is not None:
                        self._tell(notices.queue(task))

    def _session_in(self, session_id: str, state: SessionState) -> Session | None:
        """The session, if it is in `state`; news for a session that has moved on is old news."""
        session = self.sessions.get(session_id)
        return session if session is not None and session.state is state else None


_KILLED = Failure(code=FailureCode.SESSION_KILLED, message="the session was killed")
_CANCELLED = Failure(code=FailureCode.TASK_CANCELLED, message="the task was cancelled")
_CLIENT_GONE = Failure(code=FailureCode.CLIENT_GONE, message="no client was reading the task's events")
_NOT_STORED = Failure(code=FailureCode.STORAGE_FAILING, message="the request could not be written down")
_LIFETIME = Failure(code=FailureCode.SESSION_LIFETIME, message="the session reached its maximum lifetime")
_NO_WORKER_KEY = Failure(
    code=FailureCode.START_FAILED,
    message="the worker became ready without showing a key, so nothing can be sealed to it:"
    " its image does not speak the sealed part of the worker contract",
)
_OTHER_WORKER_KEY = Failure(
    code=FailureCode.WORKER_PROTOCOL, message="the worker shows another key than the one it began with"
)
_SPENT = Failure(code=FailureCode.SESSION_LIFETIME, message="the session has taken all its sealed tasks")
_TASK_DONE = Failure(code=FailureCode.SESSION_LIFETIME, message="the session has had its one task")
_SHUTDOWN = Failure(code=FailureCode.SHUTDOWN, message="the service is shutting down")
