"""The books on a node: what is believed of it, learnt only from the events sent and the effects seen.

They share no state with the node, so the two can disagree, and then `Broken` is raised. What was decided is
in the books also where nobody carried it out any more: another life of the service finds it in the journal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import FailureCode
from gpu_server.core.node import Node
from gpu_server.core.sessions import (
    FAILED_REASONS,
    CloseReason,
    RequestKey,
    SealedUse,
    Sealing,
    TaskType,
    Workload,
)
from gpu_server.core.slots import NO_CERTIFICATE, SlotSpec, SlotState, Tier, WashTier
from tests.core.invariants import must
from tests.core.papers import judge

STATE_OF_NOW = ("queue", "progress")  # events without a number


@dataclass
class SlotBook:
    spec: SlotSpec
    number: int | None = None
    state: SlotState = SlotState.WASHING
    holder: str | None = None
    wash: int | None = None  # the wash that was ordered last, while it may still pass
    faulty: bool = False
    prev: bytes = NO_CERTIFICATE  # its newest certificate, and the record in it
    head: bytes = NO_CERTIFICATE
    pending: bytes | None = None  # what is to be on the disk before the slot is free
    tier: WashTier = WashTier.FULL  # of the wash that was ordered, then of its certificate
    kept_for: str | None = None
    tenant: str | None = None  # who had it last

    def will_serve(self, who: SessionBook) -> bool:
        """Whether this session could have it, once its wash has passed where it is being washed."""
        last = self.kept_for if self.state is SlotState.FREE else self.tenant if self.is_light else None
        return who.tier in self.spec.tiers and last in (None, who.only_after) and not self.faulty

    @property
    def is_light(self) -> bool:
        return self.tier is WashTier.LIGHT


@dataclass
class TaskBook:
    session_id: str
    tenant: str
    detached: bool
    key: RequestKey | None
    sent: bool = False
    heard: int = 0
    told: int = 0
    finished: bool = False
    forgotten: bool = False
    readers: int = 0


@dataclass
class SessionBook:
    tenant: str
    workload: Workload
    task_type: TaskType
    tier: Tier
    asked_for: bool
    key: RequestKey | None
    joined: int
    joined_at: float
    gave_up: bool = False
    fence: int = 0
    slot_ids: tuple[str, ...] = ()
    leased_at: float | None = None
    created: bool = False
    is_ready: bool = False
    washed: bool = False
    closed: bool = False
    forgotten: bool = False
    sealing: Sealing | None = None
    worker_key: str | None = None
    grants: list[str] = field(default_factory=list)  # what they open, the newest last
    sealed_tasks: int = 0
    must_end: bool = False  # its worker is not the one that things can be sealed to
    quiet_since: float = 0.0
    order: list[str] = field(default_factory=list)  # its unfinished tasks, as they were submitted
    in_worker: list[str] = field(default_factory=list)
    taken: int = 0  # tasks, in its life
    washed_before: tuple[str, ...] = ()
    washed_after: tuple[str, ...] = ()
    prefetched: bool = False  # in this life of the service

    @property
    def only_after(self) -> str | None:
        """Whose slots it may have that were not scrubbed."""
        return self.tenant if self.sealing is None else None


@dataclass
class Wash:
    """A wash that was ordered and is not over."""

    number: int
    session_id: str | None
    fence: int
    left: list[str]
    tier: WashTier
    prevs: dict[str, bytes]
    gone: bool = False


class Books:
    """The books on one node. `node` is asked for its rules, and why it has ended a session, and no more."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.now = 1000.0
        self.slots: dict[str, SlotBook] = {}
        self.tasks: dict[str, TaskBook] = {}
        self.sessions: dict[str, SessionBook] = {}
        self.washes: list[Wash] = []
        self.fence = 0
        self.started: dict[tuple[object, ...], int] = {}
        self.submitted = 0
        self.wash_count = 0
        self.shutting_down = False
        self.doubt = False
        self.event: ev.Event | None = None  # what is being decided

    # -- who is where

    def line(self) -> list[tuple[str, SessionBook]]:
        """Who still waits for slots, in the order of joining."""
        return [
            (session_id, book)
            for session_id, book in self.sessions.items()
            if book.leased_at is None and not book.gave_up and (book.order or book.asked_for)
            if book.order or not (book.workload.wash_per_task and book.taken)
        ]

    def unfinished(self) -> list[str]:
        return [task_id for task_id, book in self.tasks.items() if not book.finished]

    def takes_tasks(self) -> list[str]:
        return [
            session_id
            for session_id, book in self.sessions.items()
            if book.task_type is TaskType.SESSION and not book.washed and not book.gave_up
        ]

    def starting(self) -> list[str]:
        return [session_id for session_id in self.serving() if not self.sessions[session_id].is_ready]

    def serving(self) -> list[str]:
        return [s for s, book in self.sessions.items() if book.leased_at is not None and not book.washed]

    def at_work(self) -> list[tuple[str, str]]:
        return [(s, task_id) for s, book in self.sessions.items() for task_id in book.in_worker]

    # -- what an event that was accepted means

    def book_event(self, event: ev.Event, wash: int | None) -> None:
        match event:
            case ev.TaskSubmitted():
                self._book_task(event)
            case ev.SessionRequested():
                must(not self.shutting_down, "work was taken in the shutdown:", event)
                self._book_session(event.session_id, event, TaskType.SESSION, asked_for=True, key=event.key)
                self._book_sealing(event)
            case ev.SessionOpened():
                self._book_opened(event)
            case ev.SessionKillRequested():
                must(self.sessions[event.session_id].tenant == event.tenant, "killed by another:", event)
                self.sessions[event.session_id].gave_up = True
            case ev.KeepaliveRequested():
                must(self.sessions[event.session_id].tenant == event.tenant, "kept by another:", event)
                self.sessions[event.session_id].quiet_since = self.now
            case ev.TaskCancelRequested():
                must(self.tasks[event.task_id].tenant == event.tenant, "cancelled by another:", event)
            case ev.RequestWithdrawn():
                if event.task_id is not None:
                    self.tasks[event.task_id].key = None
                if event.session_id is not None:
                    self.sessions[event.session_id].key = None
                    self.sessions[event.session_id].gave_up = True
            case ev.RuntimeChecked():
                self.doubt = event.doubt is not None
            case ev.DrainOrdered() | ev.ShutdownOrdered():
                for _, book in self.line():
                    book.gave_up = True
                self.shutting_down = True
            case ev.Tick():
                for book in self.sessions.values():
                    book.gave_up |= self.now >= book.joined_at + self.node.rules.gpu_wait_max
            case ev.WorkerKeyShown():
                book = self.sessions[event.session_id]
                if book.sealing is not None and book.leased_at is not None and not book.washed:
                    if book.worker_key is None:
                        book.worker_key = event.key
                    book.must_end |= book.worker_key != event.key
            case ev.WorkerReady():
                book = self.sessions[event.session_id]
                if book.leased_at is not None and not book.washed and not book.is_ready:
                    book.must_end |= book.sealing is not None and book.worker_key is None
                    book.is_ready, book.quiet_since = not book.must_end, self.now
            case ev.TaskEnded():
                book = self.sessions[event.session_id]
                if event.task_id in book.in_worker:
                    book.in_worker.remove(event.task_id)
                    book.quiet_since = self.now
            case ev.ContainerGone():
                book = self.sessions[event.session_id]
                book.closed |= book.washed
            case _:
                self._book_slot_event(event, wash)

    def _book_task(self, event: ev.TaskSubmitted) -> None:
        self.submitted += 1
        must(not self.shutting_down, "work was taken in the shutdown:", event)
        session_id = event.session_id or event.new_session_id
        if event.session_id is None:
            self._book_session(session_id, event, event.task_type, asked_for=False, key=None)
        self.tasks[event.task_id] = TaskBook(session_id, event.tenant, event.detached, event.key)
        self.sessions[session_id].order.append(event.task_id)
        self.sessions[session_id].taken += 1
        per_task = event.workload.wash_per_task and self.sessions[session_id].taken > 1
        must(not per_task, "a second task without a wash between them:", event, self.sessions[session_id])
        self._book_sealed_task(event, self.sessions[session_id])
        must(self.sessions[session_id].tenant == event.tenant, "a task in another's session:", event)

    def _book_sealed_task(self, event: ev.TaskSubmitted, session: SessionBook) -> None:
        must(
            (event.psk_id is None) == (session.sealing is None), "sealed and plain are mixed:", event, session
        )
        if event.psk_id is None:
            must(event.workload.sealed is not SealedUse.REQUIRED, "a plain task of a sealed preset:", event)
            return
        must(event.psk_id in session.grants, "a task that its worker cannot open:", event, session)
        session.sealed_tasks += 1
        most = self.node.rules.sealed_tasks_max
        must(session.sealed_tasks <= most, f"a session remembers {most} sealed tasks:", event, session)

    def _book_sealing(self, event: ev.SessionRequested) -> None:
        use = event.workload.sealed
        must(event.sealing is not None or use is not SealedUse.REQUIRED, "it had to be sealed:", event)
        must(event.sealing is None or use is not SealedUse.OFF, "it may not be sealed:", event)
        self.sessions[event.session_id].sealing = event.sealing

    def _book_opened(self, event: ev.SessionOpened) -> None:
        session = self.sessions[event.session_id]
        must(session.tenant == event.tenant, "opened by another:", event)
        must(session.sealing is not None and session.worker_key is not None, "granted to nobody:", event)
        must(not session.washed, "granted to one that ends:", event, session)
        grants = [psk_id for psk_id in session.grants if psk_id != event.psk_id]
        session.grants = [*grants, event.psk_id][-self.node.rules.grants_max :]

    def _book_session(
        self,
        session_id: str,
        event: ev.TaskSubmitted | ev.SessionRequested,
        task_type: TaskType,
        *,
        asked_for: bool,
        key: RequestKey | None,
    ) -> None:
        self.sessions[session_id] = SessionBook(
            tenant=event.tenant,
            workload=event.workload,
            task_type=task_type,
            tier=event.tier or Tier.LOW,
            asked_for=asked_for,
            key=key,
            joined=len(self.sessions),
            joined_at=self.now,
        )

    def _book_slot_event(self, event: ev.Event, wash: int | None) -> None:
        match event:
            case ev.CertificateIssued():
                self._book_certificate(event, wash)
            case ev.CertificateSecured():
                slot = self.slots[event.slot_id]
                if slot.state is SlotState.WASHING and slot.pending == event.certificate_hash:
                    slot.state = SlotState.QUARANTINED if slot.faulty else SlotState.FREE
                    if slot.state is SlotState.FREE and slot.is_light:
                        slot.kept_for = slot.tenant
                    slot.wash = slot.holder = slot.pending = None
            case ev.WashFailed():
                for slot_id in event.slot_ids:
                    slot = self.slots[slot_id]
                    if slot.wash == wash and slot.state is SlotState.WASHING:
                        slot.state, slot.faulty = SlotState.QUARANTINED, True
                        slot.wash = slot.holder = slot.pending = None
                if event.session_id is not None:
                    self.sessions[event.session_id].closed = True
            case ev.SlotChecked():
                slot = self.slots[event.slot_id]
                if slot.state is not SlotState.QUARANTINED:
                    slot.faulty = event.fault is not None
                    if slot.faulty and slot.state is SlotState.FREE:
                        slot.state, slot.kept_for = SlotState.QUARANTINED, None
            case ev.SlotWashOrdered():
                slot = self.slots[event.slot_id]
                must(slot.state is SlotState.QUARANTINED, "washed out of turn:", slot)
                slot.faulty = False

    def _book_certificate(self, event: ev.CertificateIssued, wash: int | None) -> None:
        certificate = judge(event.certificate)
        must(certificate.slot_id in self.slots, "a certificate of no wash that runs was taken:", event)
        slot = self.slots[certificate.slot_id]
        fits = wash is not None and slot.wash == wash and slot.state is SlotState.WASHING
        must(fits, "a certificate of no wash that runs was taken:", event, slot)
        must(slot.pending is None, "a second certificate for one wash:", event, slot)
        must(certificate.slot_uuid == slot.spec.uuid, "another device's certificate:", event, slot)
        must(certificate.prev == slot.prev, "the slot's chain is broken:", event, slot)
        enough = slot.is_light or certificate.tier is WashTier.FULL
        must(enough, "less was washed than was ordered:", event, slot)
        slot.tier, slot.head = certificate.tier, certificate.record_hash
        slot.prev = slot.pending = certificate.hash
        if slot.holder is not None:
            self.sessions[slot.holder].washed_after += (certificate.record_hash.hex(),)

    # -- what an effect means

    def book_effect(self, effect: fx.Effect, busy_before: set[str]) -> None:
        """`busy_before` are the sessions that had anything to do when this was decided."""
        match effect:
            case fx.StartWorker():
                self._book_lease(effect)
            case fx.WashSlots():
                self._book_wash(effect, busy_before)
            case fx.SendTask():
                self._book_sent(effect)
            case fx.SecureCertificate():
                slot = self.slots[effect.slot_id]
                must(slot.pending == effect.certificate_hash, "nobody waits for this:", effect, slot)
            case fx.CancelTask():
                at_work = effect.task_id in self.sessions[effect.session_id].in_worker
                must(at_work, "a task is cancelled in a worker that does not have it:", effect)
            case fx.AdoptWorker() | fx.ResumeTask():
                must(False, "something is adopted that was never left alone:", effect)
            case _:
                self.book_news(effect)

    def book_news(self, effect: fx.Effect) -> None:
        """What somebody hears, or what is not needed any more."""
        match effect:
            case fx.PrefetchModel():
                session = self.sessions[effect.session_id]
                must(session.leased_at is None, "fetched ahead for one who does not wait:", effect)
                must(not session.prefetched, "fetched ahead twice:", effect)
                session.prefetched = True
            case fx.Publish():
                self._book_published(effect)
            case fx.FinishTask():
                must(self.tasks[effect.task_id].finished, "over before its task_finish:", effect)
            case fx.ForgetTask():
                task = self.tasks[effect.task_id]
                must(task.finished and not task.forgotten, "forgotten too soon or twice:", effect)
                task.forgotten = True
            case fx.ForgetSession():
                session = self.sessions[effect.session_id]
                must(not session.forgotten and not session.order, "forgotten too soon or twice:", effect)
                session.forgotten = True

    def _book_lease(self, effect: fx.StartWorker) -> None:
        session = self.sessions[effect.session_id]
        must(session.leased_at is None and not session.washed, "a session was started twice:", effect)
        must(not self.shutting_down, "a session was started in the shutdown:", effect)
        must(not self.doubt, "a session was started while the runtime does not answer:", effect)
        must(effect.fence > self.fence, "the fence did not grow:", effect, self.fence)
        must(len(set(effect.slot_ids)) == session.workload.gpus, "not the slots asked for:", effect)
        for slot_id in effect.slot_ids:
            slot = self.slots[slot_id]
            must(slot.state is SlotState.FREE, "a slot was leased that is not free:", effect, slot)
            must(session.tier in slot.spec.tiers, "a slot of the wrong tier:", effect, slot)
            kept = slot.kept_for not in (None, session.only_after)
            must(not kept, "a slot that is kept for somebody else:", effect, slot)
            slot.state, slot.holder = SlotState.LEASED, effect.session_id
            slot.tenant, slot.kept_for = session.tenant, None
        session.washed_before = tuple(self.slots[slot_id].head.hex() for slot_id in effect.slot_ids)
        # Where slots are kept for tenants, their needs differ by that too.
        need: tuple[object, ...] = (session.workload.gpus, session.tier)
        need += (session.only_after,) if self.node.rules.light_wash else ()
        in_order = self.started.get(need, -1) < session.joined
        must(in_order, "the line was overtaken by one with the same needs:", effect, session)
        self.started[need] = session.joined
        session.leased_at, session.slot_ids = self.now, effect.slot_ids
        session.fence = self.fence = effect.fence

    def _book_wash(self, effect: fx.WashSlots, busy_before: set[str]) -> None:
        for slot_id in effect.slot_ids:
            slot = self.slots[slot_id]
            if effect.session_id is not None:
                must(effect.fence == self.sessions[effect.session_id].fence, "another's fence:", effect)
                held = slot.state is SlotState.LEASED and slot.holder == effect.session_id
                must(held, "a slot is washed after someone who did not hold it:", effect, slot)
            else:
                must(slot.state is not SlotState.LEASED, "a leased slot is washed:", effect, slot)
                must(effect.fence > self.fence, "the fence did not grow:", effect, self.fence)
                if slot.state is SlotState.FREE:
                    self._must_be_asked_for(effect, slot)
        must(effect.prevs == self.prevs(effect.slot_ids), "not what these slots' chains end with:", effect)
        if effect.session_id is None:
            self.fence = effect.fence
            must(effect.tier is WashTier.FULL and effect.tenant is None, "a light wash after nobody:", effect)
        else:
            session = self.sessions[effect.session_id]
            must(effect.tier is self.tier_after(effect.session_id), "washed otherwise than ordered:", effect)
            must(effect.tenant == session.tenant, "washed after another tenant:", effect)
            if self.node.sessions[effect.session_id].close_reason is CloseReason.TASK_DONE:
                done = session.workload.wash_per_task and session.taken and not session.order
                must(bool(done), "it has not had its task:", effect, session)
            must(not session.washed, "washed twice:", effect)
            if isinstance(self.event, ev.DrainOrdered):
                must(effect.session_id not in busy_before, "a drain cut work off:", effect, session)
            if self.node.sessions[effect.session_id].close_reason is CloseReason.SEALED_TASKS_SPENT:
                spent = session.sealed_tasks == self.node.rules.sealed_tasks_max
                must(spent and not session.order, "it was not spent:", effect, session)
            if self.node.sessions[effect.session_id].close_reason is CloseReason.IDLE_TIMEOUT:
                must(effect.session_id not in busy_before, "a session idled out at work:", effect, session)
                quiet = self.now - session.quiet_since
                must(quiet >= self.node.rules.idle_timeout, f"it idled out after {quiet} s:", effect)
        self.wash_begins(effect)

    def _must_be_asked_for(self, effect: fx.WashSlots, slot: SlotBook) -> None:
        kept_from = [
            session_id
            for session_id, book in self.line()
            if slot.kept_for not in (None, book.only_after) and book.tier in slot.spec.tiers
        ]
        must(bool(kept_from), "a free slot is washed for nobody:", effect, slot)

    def prevs(self, slot_ids: tuple[str, ...]) -> tuple[bytes, ...]:
        return tuple(self.slots[slot_id].prev for slot_id in slot_ids)

    def tier_after(self, session_id: str) -> WashTier:
        """How the slots of this session are to be washed at its end."""
        rules, session = self.node.rules, self.sessions[session_id]
        kept = rules.light_wash and rules.gpu_wait_max > 0 and rules.gpu_wait_max_tasks > 0
        plain = session.sealing is None and not session.workload.wash_per_task
        failed = self.node.sessions[session_id].close_reason in FAILED_REASONS
        return WashTier.LIGHT if kept and plain and not failed else WashTier.FULL

    def wash_begins(self, effect: fx.WashSlots) -> None:
        self.wash_count += 1
        prevs = dict(zip(effect.slot_ids, effect.prevs, strict=True))
        wash = Wash(self.wash_count, effect.session_id, effect.fence, list(prevs), effect.tier, prevs)
        self.washes.append(wash)
        for slot_id in effect.slot_ids:
            slot = self.slots[slot_id]
            slot.state, slot.wash, slot.tier = SlotState.WASHING, self.wash_count, effect.tier
            slot.pending = slot.kept_for = None
        if effect.session_id is not None:
            session = self.sessions[effect.session_id]
            held_slots = [slot for slot in self.slots.values() if slot.holder == effect.session_id]
            must(all(s.state is SlotState.WASHING for s in held_slots), "not all are washed:", effect)
            must(not session.order, "a session is taken down with tasks that nobody ended:", effect, session)
            session.washed = True
            session.in_worker.clear()

    def _book_sent(self, effect: fx.SendTask) -> None:
        session, task = self.sessions[effect.session_id], self.tasks[effect.task_id]
        must(session.is_ready and not session.washed, "a task for a worker that is not there:", effect)
        must(task.session_id == effect.session_id, "a task in the wrong session:", effect)
        must(not task.sent and not task.finished, "a task was sent twice or after its end:", effect)
        waiting = [task_id for task_id in session.order if not self.tasks[task_id].sent]
        must(waiting[0] == effect.task_id, "a task overtook another:", effect, waiting)
        task.sent = True
        session.in_worker.append(effect.task_id)
        most = session.workload.max_concurrent_tasks
        must(len(session.in_worker) <= most, f"the worker takes {most}:", effect, session.in_worker)

    def _book_published(self, effect: fx.Publish) -> None:
        task = self.tasks[effect.task_id]
        must(not task.finished, "an event after task_finish:", effect)
        must((task.heard > 0) or effect.event == "connection", "the first event is not connection:", effect)
        task.heard += 1
        task.told += effect.event not in STATE_OF_NOW
        if effect.event == "task_finish":
            code = effect.data.get("error", {}).get("code")
            needless = task.detached and code == FailureCode.CLIENT_GONE
            must(not needless, "a task that needs no reader is missed one:", effect)
            task.finished = True
            session = self.sessions[task.session_id]
            session.order.remove(effect.task_id)
            session.quiet_since = self.now
