"""The engine: the single writer. Each event goes through `Node.handle` with no await, then its effects start.

Deciding is synchronous, so whoever asks (a request, an attendant, the reaper) has its answer at once and no
two decisions can interleave. Effects run as tasks that the engine owns and come back as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from gpu_server.attendant import Attendant
from gpu_server.carwash import CarWash
from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.admission import RETRY_AFTER_SECONDS, known_request
from gpu_server.core.errors import CertificateRejected, Refusal, RefusalCode
from gpu_server.core.node import Node
from gpu_server.core.notices import UNNUMBERED
from gpu_server.core.rows import Change, Table
from gpu_server.core.sessions import Grant, RequestKey, Sealing, TaskState, TaskType
from gpu_server.core.slots import Tier
from gpu_server.counts import Counts
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.drivers.spool import Spool
from gpu_server.inputs import Inputs
from gpu_server.launch import Launcher
from gpu_server.ports import (
    Clock,
    ContainerRuntime,
    Journal,
    JournalFailing,
    SlotReading,
    WorkerExit,
    worker_name,
)
from gpu_server.prefetches import Prefetches
from gpu_server.slot_wash import Equipment
from gpu_server.stream import Stream
from gpu_server.streams import Streams
from gpu_server.wash_steps import WashView
from gpu_server.washes import Washes

HANDOVER_SECONDS = 1
PRUNE_EVERY = 100
"""So many certificates may be there beyond those that are kept."""
_GRANTED = (ev.TaskSubmitted, ev.SessionRequested)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A task as the edge hands it over. `body` is what the worker gets, encoded. A sealed one names the grant
    that opens it (`psk_id`, hex)."""

    task_id: str
    tenant: str
    task_type: TaskType
    tier: Tier | None
    model_id: str
    task_preset: str
    session_id: str | None
    new_session_id: str
    timeout: float
    body: bytes
    detached: bool = False
    key: RequestKey | None = None
    psk_id: str | None = None


class Engine:
    """Owns the node, the attendants and every task that works for them; works inside `running()`.

    `on_broken` is called once if a decision fails with a bug: the state can no longer be trusted, so nothing
    more is decided, and the process should end.
    """

    def __init__(
        self,
        node: Node,
        *,
        journal: Journal,
        spool: Spool,
        streams: Streams,
        runtime: ContainerRuntime,
        folders: RunFolders,
        inputs: Inputs,
        launcher: Launcher,
        clock: Clock,
        equipment: Equipment,
        certificates_kept: int = 1000,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.node, self.streams, self.clock, self.runtime = node, streams, clock, runtime
        self.broken: str | None = None
        self.handed_over = False
        self.readings: Mapping[str, SlotReading] = {}
        self.counts = Counts()
        self.journal = journal
        self.wash = CarWash(runtime, journal, clock, self.counts, equipment, uid_base=launcher.uid_base)
        self._washes = Washes(self, self.wash, journal, clock, self.counts)
        self._prefetches = Prefetches(self, launcher)
        self.on_decided: Callable[[], None] = lambda: None
        self.attendants: dict[str, Attendant] = {}
        self._spool, self._folders = spool, folders
        self._inputs, self._launcher, self._on_broken = inputs, launcher, on_broken
        self._certificates_kept, self._since_pruned = certificates_kept, PRUNE_EVERY
        self._decided = asyncio.Event()
        self._not_sent: list[fx.SendTask] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own all work until the block ends, then stop it; `shut_down` before that leaves nothing behind.
        Without it containers are left as they are, for the next life to adopt."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self.runtime.open(self.heard_exit)
            try:
                yield
            finally:
                for attendant in list(self.attendants.values()):
                    await attendant.close()
                for task in list(self._tasks):
                    task.cancel()
                await self.runtime.close()

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task that the engine owns. A crash in it is a bug, and stops the service."""
        assert self._group is not None, "the engine is not running"
        task = self._group.create_task(self._guard(name, work), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(
            lambda _: work.close()
        )  # it has not begun where the task was cancelled at once
        return task

    async def _guard(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  # nothing above this but the task group of everyone
            self._break(f"{name}: {error!r}")

    # -- deciding -------------------------------------------------------------------------------------------

    def decide(self, event: ev.Event) -> None:
        """Decide on one event and start what follows. Raises `Refusal` for a request that is not granted.

        1. The node decides. 2. What readers are told is put into its streams, in the spool first. 3. All rows
        that changed are journalled, in one transaction. 4. Everything else starts. No reader sees (2) before
        (3), since nothing here waits; a process that dies between them has told nobody.
        """
        if self.broken is not None:
            raise Refusal(RefusalCode.INTERNAL, "the service has met a bug and is stopping")
        if self.handed_over and isinstance(event, ev.Request):
            message = "the service is being replaced by another version"
            raise Refusal(RefusalCode.SHUTTING_DOWN, message, retry_after=HANDOVER_SECONDS)
        try:
            now = self.clock.now()
            effects = self.node.handle(event, now)
            self.counts.note(event, effects, self.node, now)
            for effect in effects:
                if isinstance(effect, fx.Publish):
                    self._publish(effect)
            self.save()
            refused = self.journal.failing is not None and isinstance(event, _GRANTED)
            for effect in effects:
                if refused and isinstance(effect, fx.SendTask):
                    self._not_sent.append(effect)  # it will be withdrawn: no worker must see it
                elif not isinstance(effect, fx.Publish):
                    self._start(effect)
        except Refusal:
            raise
        except CertificateRejected as rejected:
            log.error("certificate.rejected", reason=str(rejected))
            return
        except Exception as error:
            self._break(f"{type(event).__name__}: {error!r}")
            raise
        self._prefetches.review()
        self._decided.set()
        self.on_decided()

    def report(self, event: ev.Event) -> None:
        """Take a fact. Once the engine is broken, facts change nothing any more."""
        if self.broken is None:
            self.decide(event)

    def _break(self, why: str) -> None:
        log.critical("engine.broken", why=why, exc_info=True)
        if self.broken is None:
            self.broken = why
            self._decided.set()  # a drain need not wait any longer
            self._on_broken()

    # -- remembering ----------------------------------------------------------------------------------------

    @property
    def storage_doubt(self) -> str | None:
        """Why what is decided now would not outlive this process, or None."""
        return self.journal.failing or self.streams.fault

    def save(self) -> None:
        """Journal what has changed, and what could not be written before. While that fails the service goes
        on with the work it has; `submit` and `request_session` take no more."""
        if self.broken is not None:
            return  # what a bug left half-made is not to outlive it
        changes = self.node.take_changes()
        self._keep_words(changes)
        failing = self.journal.failing
        try:
            self.journal.write(changes)
        except JournalFailing as error:
            if failing is None:
                log.error("journal.failing", reason=str(error))
        else:
            if failing is not None:
                log.warning("journal.recovered")

    async def tend_storage(self) -> None:
        """Now and then: try again what could not be written, and let neither the journal's log nor its
        certificates grow for ever."""
        self.streams.mend()
        if self.journal.failing is not None:
            self.save()
            return
        if self._since_pruned >= PRUNE_EVERY:
            self._since_pruned = 0
            try:
                self.journal.prune(self._certificates_kept)
            except JournalFailing as error:
                log.warning("journal.not_pruned", reason=str(error))
        if self.journal.wants_checkpoint:
            await asyncio.to_thread(self.journal.checkpoint)

    def _keep_words(self, changes: list[Change]) -> None:
        """What workers said about their ends: never on a disk, but in the spool beside their events."""
        for change in changes:
            words: dict[str, str] = {}
            if change.table is Table.SESSIONS and (session := self.node.sessions.get(change.id)) is not None:
                if session.log_tail:
                    words["log_tail"] = session.log_tail
                failure = session.failure
            elif change.table is Table.TASKS and (task := self.node.tasks.get(change.id)) is not None:
                failure = task.failure
            else:
                continue
            if failure is not None and failure.from_worker:
                words["message"] = failure.message
            if words:
                try:
                    self._spool.put_note(change.id, words)
                except OSError as error:
                    log.warning("words.not_kept", id=change.id, reason=str(error))

    def _require_storage(self) -> None:
        """Raises `Refusal` while a request that was granted might be forgotten."""
        if self.journal.failing is not None:
            self.save()
        self.streams.mend()
        if (doubt := self.storage_doubt) is not None:
            raise _not_stored(doubt)

    def _withdraw_unless_stored(self, *, task_id: str | None, session_id: str | None) -> None:
        """A request that was granted and could not be journalled is taken back. Raises `Refusal` then."""
        if (doubt := self.journal.failing) is not None:
            self.decide(ev.RequestWithdrawn(task_id=task_id, session_id=session_id))
            not_sent, self._not_sent = self._not_sent, []
            for order in not_sent:
                self.report(
                    ev.TaskEnded(
                        session_id=order.session_id, task_id=order.task_id, state=TaskState.CANCELLED
                    )
                )
            raise _not_stored(doubt)  # also where this was written: what is withdrawn was not granted

    # -- requests -------------------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> str:
        """Admit a task: afterwards its stream is in `streams`. The task's id, which is that of an earlier one
        when its key is known. Raises `Refusal`, and then nothing is kept."""
        node, task_id, session_id = self.node, submission.task_id, submission.new_session_id
        if submission.key is not None:
            known = known_request(node.task_keys, node.tasks, submission.tenant, submission.key)
            if known is not None:
                return known
        preset = self._launcher.find_preset(submission.model_id, submission.task_preset)
        self._require_storage()
        self._inputs.put(task_id, submission.body)
        try:
            self.streams.open(task_id)
            self.decide(
                ev.TaskSubmitted(
                    task_id=task_id,
                    tenant=submission.tenant,
                    task_type=submission.task_type,
                    tier=submission.tier,
                    workload=preset.workload(submission.model_id, submission.task_preset),
                    session_id=submission.session_id,
                    new_session_id=session_id,
                    timeout=submission.timeout,
                    detached=submission.detached,
                    key=submission.key,
                    psk_id=submission.psk_id,
                )
            )
        except BaseException:
            self.streams.forget(task_id)
            self._inputs.drop(task_id)
            raise
        self._withdraw_unless_stored(
            task_id=task_id, session_id=session_id if submission.session_id is None else None
        )
        log.info("task.accepted", task_id=task_id, session_id=node.tasks[task_id].session_id)
        return task_id

    def request_session(
        self,
        session_id: str,
        *,
        tenant: str,
        tier: Tier | None,
        model_id: str,
        task_preset: str,
        key: RequestKey | None = None,
        sealing: Sealing | None = None,
    ) -> str:
        """Make a session ahead of its first task; its id, or that of an earlier one when its key is known.
        With a `sealing` it is a sealed one. Raises `Refusal`."""
        if key is not None:
            known = known_request(self.node.session_keys, self.node.sessions, tenant, key)
            if known is not None:
                return known
        workload = self._launcher.find_preset(model_id, task_preset).workload(model_id, task_preset)
        self._spool.probe()  # nothing of the request itself is kept there, so nothing else would tell
        self._require_storage()
        self.decide(
            ev.SessionRequested(
                session_id=session_id,
                tenant=tenant,
                tier=tier,
                workload=workload,
                key=key,
                sealing=sealing,
            )
        )
        self._withdraw_unless_stored(task_id=None, session_id=session_id)
        log.info("session.accepted", session_id=session_id)
        return session_id

    def open_session(self, session_id: str, *, tenant: str, psk_id: str, grant: Grant) -> None:
        """Keep a grant of the enclave for a session. Raises `Refusal`, also where it could not be journalled:
        what a client was told must be known after a restart."""
        self._require_storage()
        self.decide(ev.SessionOpened(session_id=session_id, tenant=tenant, psk_id=psk_id, grant=grant))
        if (doubt := self.journal.failing) is not None:
            raise _not_stored(doubt)  # the grant stays, unused: it can be asked for again
        log.info("session.opened", session_id=session_id)

    # -- the end --------------------------------------------------------------------------------------------

    async def drain(self, patience: float) -> None:
        """Take no more work, and let what was accepted end, for `patience` seconds at most."""
        self.report(ev.DrainOrdered())
        until = self.clock.now() + patience
        while self.broken is None and self.clock.now() < until:
            if not any(session.busy or session.queue for session in self.node.live_sessions()):
                return
            self._decided.clear()
            await self.clock.sleep_until(until, wake=self._decided)

    async def shut_down(self, patience: float) -> bool:
        """End every session and wait for the washes, `patience` seconds at most; whether nothing is left."""
        self.report(ev.ShutdownOrdered())
        await self._washes.settle(patience)
        # What is still being washed then has no container, and the next life washes it from the beginning.
        return self.broken is None and self.wash.swept and not any(self.node.live_sessions())

    def hand_over(self) -> None:
        """Leave everything to the next life of the service: requests are refused, and streams end where they
        are, to be taken up again there."""
        self.handed_over = True
        self.streams.close_readers()

    # -- effects --------------------------------------------------------------------------------------------

    def _start(self, effect: fx.Effect) -> None:
        match effect:
            case fx.StartWorker(session_id=session_id):
                log.info("session.starting", session_id=session_id, slots=effect.slot_ids, fence=effect.fence)
                self._attend(session_id, effect.slot_ids).start()
            case fx.AdoptWorker(session_id=session_id):
                log.info("session.adopting", session_id=session_id, slots=effect.slot_ids, fence=effect.fence)
                self._attend(session_id, effect.slot_ids).adopt(ready=effect.ready)
            case fx.SendTask(session_id=session_id, task_id=task_id):
                self.attendants[session_id].send(task_id, self._inputs.get(task_id), self._stream(task_id))
            case fx.ResumeTask(session_id=session_id, task_id=task_id):
                stream = self.streams.get(task_id) or Stream(max_bytes=0)  # over, and its history is gone
                self.attendants[session_id].send(task_id, self._inputs.get(task_id), stream)
            case fx.CancelTask(session_id=session_id, task_id=task_id):
                self.attendants[session_id].cancel(task_id)
            case fx.WashSlots():
                self._washes.begin(effect)
            case fx.SecureCertificate():
                self._since_pruned += 1
                self._washes.secure(effect)
            case fx.PrefetchModel(session_id=session_id):
                self._prefetches.begin(session_id)
            case fx.FinishTask(task_id=task_id):
                self._inputs.drop(task_id)
                self.streams.finished(task_id)
                log.info("task.finished", task_id=task_id, status=effect.state)
            case fx.ForgetTask(task_id=task_id):
                self.streams.forget(task_id)
                self._spool.drop_note(task_id)
            case fx.ForgetSession(session_id=session_id):
                self._spool.drop_note(session_id)
            case _:
                raise AssertionError(f"no one handles {effect}")

    def _publish(self, effect: fx.Publish) -> None:
        stream = self._stream(effect.task_id)
        if effect.event in UNNUMBERED:
            stream.note(effect.event, effect.data)
        else:
            stream.publish(effect.event, effect.data)

    def _stream(self, task_id: str) -> Stream:
        stream = self.streams.get(task_id)
        assert stream is not None, f"{task_id} has no stream"
        return stream

    def _attend(self, session_id: str, slot_ids: tuple[str, ...]) -> Attendant:
        session, slots = self.node.sessions[session_id], [self.node.slots[slot_id] for slot_id in slot_ids]
        attendant = self.attendants[session_id] = Attendant(
            self._launcher.plan(session, slots), self.runtime, self._folders, self
        )
        return attendant

    def delivered(self, task_id: str) -> None:
        """A worker has this task for certain: its input is not needed here any more."""
        self._inputs.drop(task_id)

    async def let_go(self, session_id: str) -> str:
        """Nobody attends the session any more; what its worker wrote last. An earlier life may have ended it:
        then nobody attends it in this one."""
        attendant = self.attendants.get(session_id)
        if attendant is None:
            return ""
        await attendant.close()
        return attendant.log_tail

    def forget(self, session_id: str) -> None:
        """The session's worker is gone, or left to the reaper."""
        self.attendants.pop(session_id, None)

    @property
    def washing(self) -> Mapping[str, WashView]:
        """Slot id -> what its wash is at, of those that are being washed."""
        return self._washes.washing

    # -- what the runtime and the reaper ask ----------------------------------------------------------------

    def heard_exit(self, exit_: WorkerExit) -> None:
        """A worker's process has ended."""
        attendant = self.attendants.get(exit_.session_id)
        if attendant is not None and attendant.name == exit_.name:
            attendant.heard_exit(exit_)

    def served_by(self, session_id: str) -> str | None:
        """The name of the container that serves this session now; any other of that session is residue. One
        that is being taken down by the session's own wash, with its grace, counts too."""
        if (attendant := self.attendants.get(session_id)) is not None:
            return attendant.name
        session = self.node.sessions.get(session_id)
        if session is not None and session.tearing_down and not session.ended:
            return worker_name(session.id, session.fence)
        return self.wash.ends(session_id)


def _not_stored(doubt: str) -> Refusal:
    message = f"nothing new is taken while it could not be kept: {doubt}"
    return Refusal(RefusalCode.STORAGE_FAILING, message, retry_after=RETRY_AFTER_SECONDS)
