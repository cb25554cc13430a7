"""A node driven through random histories by a world that keeps its own books.

`World` plays everything around the core: it starts workers (or never does), runs tasks, washes slots, loses
things, comes late and says things twice. Its books are what it believes, learnt only from the events sent and
the effects seen; they share no state with the node, so the two can disagree, and then `Broken` is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import CertificateRejected, Failure, FailureCode, Refusal
from gpu_server.core.node import Node
from gpu_server.core.sessions import CloseReason, Rules, TaskState, TaskType, Workload
from gpu_server.core.slots import BOTH_TIERS, Certificate, SlotSpec, SlotState, Tier
from tests.core.invariants import Broken, check, must, snapshot

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})
NODES: list[tuple[frozenset[Tier], ...]] = [
    (BOTH_TIERS,),
    (BOTH_TIERS, BOTH_TIERS),
    (LOW, HIGH),
    (BOTH_TIERS, LOW, HIGH),
    (BOTH_TIERS, BOTH_TIERS, LOW, BOTH_TIERS),
]
RULES = [
    Rules(idle_timeout=50, max_lifetime=200, session_queue_max=2, gpu_wait_max=90, gpu_wait_max_tasks=4),
    Rules(idle_timeout=20, max_lifetime=60, session_queue_max=5, gpu_wait_max=300, gpu_wait_max_tasks=8),
    Rules(idle_timeout=300, max_lifetime=400, session_queue_max=1, gpu_wait_max=0),
    Rules(session_queue_max=3, gpu_wait_max=120, cancel_grace=30, task_retention=5, tombstone_retention=7),
    Rules(session_queue_max=0, lifetime_grace=0, max_lifetime=100, cancel_grace=15, task_retention=0),
    Rules(idle_timeout=25, max_lifetime=30, lifetime_grace=20, cancel_grace=8, disconnect_grace=60),
]
WORKLOADS = [
    Workload(model_id="m", task_preset="chat", start_timeout=40),
    Workload(model_id="m", task_preset="batched", max_concurrent_tasks=3, start_timeout=40),
    Workload(model_id="m", task_preset="pair", max_concurrent_tasks=2, gpus=2, start_timeout=150),
    Workload(model_id="m", task_preset="batch", serves_sessions=False, start_timeout=40),
    Workload(model_id="m", task_preset="big", gpus=3),
]
TENANTS = ["ann", "bob"]
ENDS = [TaskState.COMPLETED, TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.TIMEOUT]
LOSSES = [CloseReason.START_FAILED, CloseReason.WORKER_EXITED, CloseReason.WORKER_MISBEHAVED]
REQUESTS = (
    ev.TaskSubmitted,
    ev.SessionRequested,
    ev.SessionKillRequested,
    ev.KeepaliveRequested,
    ev.TaskCancelRequested,
    ev.SlotWashOrdered,
)
OOPS = Failure(code=FailureCode.WORKER_EXITED, message="exit code 1")


@dataclass
class SlotBook:
    spec: SlotSpec
    state: SlotState = SlotState.WASHING
    holder: str | None = None
    wash: int | None = None  # the wash that was ordered last, while it may still pass
    faulty: bool = False


@dataclass
class TaskBook:
    session_id: str
    tenant: str
    sent: bool = False
    heard: int = 0
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
    joined: int
    joined_at: float
    gave_up: bool = False
    fence: int = 0
    leased_at: float | None = None
    created: bool = False
    is_ready: bool = False
    washed: bool = False
    quiet_since: float = 0.0
    order: list[str] = field(default_factory=list)  # its unfinished tasks, as they were submitted
    in_worker: list[str] = field(default_factory=list)


@dataclass
class Wash:
    """A wash that was ordered and is not over."""

    number: int
    session_id: str | None
    fence: int
    left: list[str]
    gone: bool = False


class World:
    """The surroundings of one node, and the books on it."""

    def __init__(self, node: Node, specs: list[SlotSpec], *, inspect: bool) -> None:
        self.node = node
        self.inspect = inspect
        self.now = 1000.0
        self.slots = {spec.id: SlotBook(spec) for spec in specs}
        self.tasks: dict[str, TaskBook] = {}
        self.sessions: dict[str, SessionBook] = {}
        self.washes: list[Wash] = []
        self.past: list[tuple[ev.Event, int | None]] = []
        self.fence = 0
        self.started: dict[tuple[int, Tier], int] = {}
        self.submitted = 0
        self.wash_count = 0
        self.shutting_down = False
        self.broken = False
        self.send(ev.NodeStarted(slots=tuple(specs)))

    # -- one step

    def send(self, event: ev.Event, wash: int | None = None) -> bool:
        """Let something happen, and compare the node's answer with the books. False: it was refused."""
        try:
            return self._send(event, wash)
        except Exception:
            self.broken = True
            raise

    def _send(self, event: ev.Event, wash: int | None) -> bool:
        may_be_refused = isinstance(event, (*REQUESTS, ev.WashPassed))
        before = snapshot(self.node) if may_be_refused else ""
        try:
            effects = self.node.handle(event, self.now)
        except Refusal:
            must(snapshot(self.node) == before, "a refused request changed something:", event)
            return False
        except CertificateRejected:
            must(snapshot(self.node) == before, "a rejected certificate changed something:", event)
            assert isinstance(event, ev.WashPassed)
            current = self.slots[event.certificate.slot_id].wash
            must(wash is None or wash != current, "a good certificate was rejected:", event)
            return False
        busy_before = {s for s, book in self.sessions.items() if book.order or book.in_worker}
        self._book_event(event, wash)
        leases: list[fx.StartWorker] = []
        for effect in effects:
            self._book_effect(effect, busy_before)
            if isinstance(effect, fx.StartWorker):
                leases.append(effect)
        self._compare(event, leases)
        return True

    # -- books: what an event that was accepted means

    def _book_event(self, event: ev.Event, wash: int | None) -> None:
        match event:
            case ev.TaskSubmitted():
                self.submitted += 1
                session_id = event.session_id or event.new_session_id
                if event.session_id is None:
                    tier = event.tier or Tier.LOW
                    self._book_session(session_id, event.tenant, event.workload, event.task_type, tier)
                self.tasks[event.task_id] = TaskBook(session_id, event.tenant)
                self.sessions[session_id].order.append(event.task_id)
                must(self.sessions[session_id].tenant == event.tenant, "a task in another's session:", event)
            case ev.SessionRequested():
                tier = event.tier or Tier.LOW
                self._book_session(event.session_id, event.tenant, event.workload, TaskType.SESSION, tier)
                self.sessions[event.session_id].asked_for = True
            case ev.SessionKillRequested():
                must(self.sessions[event.session_id].tenant == event.tenant, "killed by another:", event)
                self.sessions[event.session_id].gave_up = True
            case ev.ShutdownOrdered():
                self.shutting_down = True
            case ev.Tick():
                for book in self.sessions.values():
                    book.gave_up |= self.now >= book.joined_at + self.node.rules.gpu_wait_max
            case ev.KeepaliveRequested():
                must(self.sessions[event.session_id].tenant == event.tenant, "kept by another:", event)
                self.sessions[event.session_id].quiet_since = self.now
            case ev.TaskCancelRequested():
                must(self.tasks[event.task_id].tenant == event.tenant, "cancelled by another:", event)
            case ev.WorkerReady():
                book = self.sessions[event.session_id]
                if book.leased_at is not None and not book.washed and not book.is_ready:
                    book.is_ready, book.quiet_since = True, self.now
            case ev.TaskEnded():
                book = self.sessions[event.session_id]
                if event.task_id in book.in_worker:
                    book.in_worker.remove(event.task_id)
                    book.quiet_since = self.now
            case ev.WashPassed():
                slot = self.slots[event.certificate.slot_id]
                fits = wash is not None and slot.wash == wash and slot.state is SlotState.WASHING
                must(fits, "a slot was freed by a certificate of no wash that runs:", event, slot)
                slot.state = SlotState.QUARANTINED if slot.faulty else SlotState.FREE
                slot.wash = slot.holder = None
            case ev.WashFailed():
                for slot_id in event.slot_ids:
                    slot = self.slots[slot_id]
                    if slot.wash == wash and slot.state is SlotState.WASHING:
                        slot.state, slot.faulty, slot.wash, slot.holder = (
                            SlotState.QUARANTINED,
                            True,
                            None,
                            None,
                        )
            case ev.SlotChecked():
                slot = self.slots[event.slot_id]
                if slot.state is not SlotState.QUARANTINED:
                    slot.faulty = event.fault is not None
                    if slot.faulty and slot.state is SlotState.FREE:
                        slot.state = SlotState.QUARANTINED
            case ev.SlotWashOrdered():
                slot = self.slots[event.slot_id]
                must(slot.state is SlotState.QUARANTINED, "washed out of turn:", slot)
                slot.faulty = False

    def _book_session(
        self, session_id: str, tenant: str, workload: Workload, task_type: TaskType, tier: Tier
    ) -> None:
        self.sessions[session_id] = SessionBook(
            tenant=tenant,
            workload=workload,
            task_type=task_type,
            tier=tier,
            asked_for=False,
            joined=len(self.sessions),
            joined_at=self.now,
        )

    def line(self) -> list[tuple[str, SessionBook]]:
        """Who still waits for slots, in the order of joining."""
        if self.shutting_down:
            return []
        return [
            (session_id, book)
            for session_id, book in self.sessions.items()
            if book.leased_at is None and not book.gave_up and (book.order or book.asked_for)
        ]

    # -- books: what an effect means

    def _book_effect(self, effect: fx.Effect, busy_before: set[str]) -> None:
        match effect:
            case fx.StartWorker():
                self._book_lease(effect)
            case fx.WashSlots():
                self._book_wash(effect, busy_before)
            case fx.SendTask():
                self._book_sent(effect)
            case fx.CancelTask():
                at_work = effect.task_id in self.sessions[effect.session_id].in_worker
                must(at_work, "a task is cancelled in a worker that does not have it:", effect)
            case fx.Publish():
                self._book_published(effect)
            case fx.ForgetTask():
                task = self.tasks[effect.task_id]
                must(task.finished and not task.forgotten, "forgotten too soon or twice:", effect)
                task.forgotten = True

    def _book_lease(self, effect: fx.StartWorker) -> None:
        session = self.sessions[effect.session_id]
        must(session.leased_at is None and not session.washed, "a session was started twice:", effect)
        must(not self.shutting_down, "a session was started in the shutdown:", effect)
        must(effect.fence > self.fence, "the fence did not grow:", effect, self.fence)
        must(len(set(effect.slot_ids)) == session.workload.gpus, "not the slots asked for:", effect)
        for slot_id in effect.slot_ids:
            slot = self.slots[slot_id]
            must(slot.state is SlotState.FREE, "a slot was leased that is not free:", effect, slot)
            must(session.tier in slot.spec.tiers, "a slot of the wrong tier:", effect, slot)
            slot.state, slot.holder = SlotState.LEASED, effect.session_id
        need = (session.workload.gpus, session.tier)
        in_order = self.started.get(need, -1) < session.joined
        must(in_order, "the line was overtaken by one with the same needs:", effect, session)
        self.started[need] = session.joined
        session.leased_at, session.fence, self.fence = self.now, effect.fence, effect.fence

    def _book_wash(self, effect: fx.WashSlots, busy_before: set[str]) -> None:
        self.wash_count += 1
        self.washes.append(Wash(self.wash_count, effect.session_id, effect.fence, list(effect.slot_ids)))
        for slot_id in effect.slot_ids:
            slot = self.slots[slot_id]
            if effect.session_id is not None:
                must(effect.fence == self.sessions[effect.session_id].fence, "another's fence:", effect)
                held = slot.state is SlotState.LEASED and slot.holder == effect.session_id
                must(held, "a slot is washed after someone who did not hold it:", effect, slot)
            else:
                must(slot.state is not SlotState.LEASED, "a leased slot is washed:", effect, slot)
            slot.state, slot.wash = SlotState.WASHING, self.wash_count
        if effect.session_id is None:
            return
        session = self.sessions[effect.session_id]
        held_slots = [slot for slot in self.slots.values() if slot.holder == effect.session_id]
        must(all(s.state is SlotState.WASHING for s in held_slots), "not all are washed:", effect)
        must(not session.washed, "washed twice:", effect)
        must(not session.order, "a session is taken down with tasks that nobody ended:", effect, session)
        session.washed = True
        session.in_worker.clear()
        if self.node.sessions[effect.session_id].close_reason is CloseReason.IDLE_TIMEOUT:
            must(effect.session_id not in busy_before, "a session idled out at work:", effect, session)
            quiet = self.now - session.quiet_since
            must(quiet >= self.node.rules.idle_timeout, f"it idled out after {quiet} s:", effect)

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
        if effect.event == "task_finish":
            task.finished = True
            session = self.sessions[task.session_id]
            session.order.remove(effect.task_id)
            session.quiet_since = self.now

    # -- books against node

    def _compare(self, event: ev.Event, leases: list[fx.StartWorker]) -> None:
        if self.inspect:
            check(self.node)
        for slot_id, slot in self.slots.items():
            seen = self.node.slots[slot_id].state
            must(seen is slot.state, f"slot {slot_id} is {seen}, the books say {slot.state}:", event)
        unfinished = {task_id for task_id, task in self.tasks.items() if not task.finished}
        kept = {task_id for task_id, task in self.node.tasks.items() if not task.ended}
        must(unfinished == kept, "tasks without an end are not the tasks at work:", unfinished ^ kept, event)
        finished = sum(task.finished for task in self.tasks.values())
        must(self.submitted == len(unfinished) + finished, "the totals are not conserved:", event)
        if isinstance(event, ev.TaskSubmitted):
            must(self.tasks[event.task_id].heard > 0, "an admitted task heard nothing:", event)
        for lease in leases:
            self._check_nobody_was_overtaken(lease)
        self._check_nothing_lags()
        if isinstance(event, ev.Tick):
            for session_id, session in self.sessions.items():
                if session.leased_at is not None and not session.washed and not session.in_worker:
                    over = self.now >= session.leased_at + self.node.rules.max_lifetime
                    must(not over, "a session outlives its lifetime:", session_id, session)

    def _check_nobody_was_overtaken(self, lease: fx.StartWorker) -> None:
        """Whoever joined earlier and still waits could not have used any of these slots."""
        joined = self.sessions[lease.session_id].joined
        for session_id, book in self.line():
            if book.joined < joined:
                useful = [s for s in lease.slot_ids if book.tier in self.slots[s].spec.tiers]
                must(not useful, "slots were taken from one who waits for them:", lease, session_id)

    def _check_nothing_lags(self) -> None:
        """The first of the line has no choice of slots, and tasks wait only for a worker that is full."""
        for session_id, book in self.line()[:1]:
            free = [s for s in self.slots.values() if s.state is SlotState.FREE and book.tier in s.spec.tiers]
            must(len(free) < book.workload.gpus, "the first of the line could start:", session_id, free)
        for session_id, book in self.sessions.items():
            if book.is_ready and not book.washed and len(book.in_worker) < book.workload.max_concurrent_tasks:
                waiting = [task_id for task_id in book.order if not self.tasks[task_id].sent]
                must(not waiting, "tasks wait while the worker has room:", session_id, waiting)

    # -- what the world does

    def fact(self, event: ev.Event, wash: int | None = None) -> bool:
        """A fact, kept so that it can be told again, too late."""
        self.past = [*self.past[-30:], (event, wash)]
        return self.send(event, wash)

    def read(self, task_id: str) -> None:
        self.tasks[task_id].readers += 1
        self.send(ev.ReaderCame(task_id=task_id))

    def certificate(self, wash: Wash, slot_id: str) -> Certificate:
        uuid = self.slots[slot_id].spec.uuid
        return Certificate(kind="teardown", slot_id=slot_id, slot_uuid=uuid, fence=wash.fence)

    def container_gone(self, wash: Wash) -> None:
        if not wash.gone and wash.session_id is not None:
            self.fact(ev.ContainerGone(session_id=wash.session_id))
        wash.gone = True

    def wash_passes(self, wash: Wash, slot_id: str) -> None:
        wash.left.remove(slot_id)
        self.fact(ev.WashPassed(certificate=self.certificate(wash, slot_id)), wash.number)
        self.forget_finished_washes()

    def wash_fails(self, wash: Wash, slot_ids: list[str]) -> None:
        wash.left = [slot_id for slot_id in wash.left if slot_id not in slot_ids]
        event = ev.WashFailed(
            session_id=wash.session_id, slot_ids=tuple(slot_ids), fence=wash.fence, reason="memory is in use"
        )
        self.fact(event, wash.number)
        self.forget_finished_washes()

    def forget_finished_washes(self) -> None:
        self.washes = [wash for wash in self.washes if wash.left or not wash.gone]

    def unfinished(self) -> list[str]:
        return [task_id for task_id, book in self.tasks.items() if not book.finished]

    def takes_tasks(self) -> list[str]:
        return [
            session_id
            for session_id, book in self.sessions.items()
            if book.task_type is TaskType.SESSION and not book.washed and not book.gave_up
        ]

    def starting(self) -> list[str]:
        return [
            session_id
            for session_id, book in self.sessions.items()
            if book.leased_at is not None and not book.is_ready and not book.washed
        ]

    def serving(self) -> list[str]:
        return [s for s, book in self.sessions.items() if book.leased_at is not None and not book.washed]

    def at_work(self) -> list[tuple[str, str]]:
        return [(s, task_id) for s, book in self.sessions.items() for task_id in book.in_worker]

    def finish(self) -> None:
        """Let the world come to rest: what was lost stays lost, washes pass, and every deadline passes."""
        for _ in range(2000):
            for wash in list(self.washes):
                self.container_gone(wash)
                for slot_id in list(wash.left):
                    self.wash_passes(wash, slot_id)
            self.forget_finished_washes()
            for slot_id, slot in self.slots.items():
                if slot.state is SlotState.QUARANTINED:
                    self.send(ev.SlotWashOrdered(slot_id=slot_id))
                elif slot.faulty:
                    self.send(ev.SlotChecked(slot_id=slot_id, fault=None))
            due = self.node.next_deadline()
            if due is None and not self.washes:
                break
            if due is not None:
                self.now = max(self.now, due)
                self.send(ev.Tick())
        self._must_be_at_rest()

    def _must_be_at_rest(self) -> None:
        must(not list(self.node.live_sessions()), "sessions live for ever:", self.node.sessions)
        for task_id, task in self.tasks.items():
            must(task.finished, "a task never heard its task_finish:", task_id, task)
            must(task.forgotten, "a task is kept for ever:", task_id)
        must(
            not self.node.sessions and not self.node.tasks, "something is kept for ever:", self.node.sessions
        )
        for slot in self.node.slots:
            must(slot.state is SlotState.FREE, "a slot did not come back:", slot)


PICK = st.integers(0, 7)


class NodeMachine(RuleBasedStateMachine):
    """The rules by which the world moves. `make_node` and `inspect` are for planted faults."""

    make_node: ClassVar[Callable[[Rules], Node]] = Node
    inspect: ClassVar[bool] = True

    world: World

    @initialize(tiers=st.sampled_from(NODES), rules=st.sampled_from(RULES), clean=PICK)
    def start(self, tiers: tuple[frozenset[Tier], ...], rules: Rules, clean: int) -> None:
        specs = [
            SlotSpec(id=f"g{i}", uuid=f"GPU-{i}", name="L40S", memory_mb=46068, is_gpu=True, tiers=serves)
            for i, serves in enumerate(tiers)
        ]
        self.world = World(type(self).make_node(rules), specs, inspect=self.inspect)
        self.names = 0
        if clean:
            for slot_id in list(self.world.slots):
                self.world.wash_passes(self.world.washes[0], slot_id)
            self.world.washes.clear()

    def name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def pick(self, things: list[Any], index: int) -> Any:
        return things[-1 - index % len(things)]  # the newest first: that is where things happen

    # -- requests

    @rule(
        tenant=st.sampled_from(TENANTS),
        work=st.sampled_from(WORKLOADS),
        tier=st.sampled_from([None, None, Tier.LOW, Tier.HIGH]),
        oneoff=PICK,
    )
    def submits_a_task(self, tenant: str, work: Workload, tier: Tier | None, oneoff: int) -> None:
        kind = TaskType.ONEOFF if oneoff > 5 or not work.serves_sessions else TaskType.SESSION
        self.submit(tenant, work, tier, kind, None)

    @precondition(lambda self: self.world.sessions)
    @rule(pick=PICK, times=st.integers(1, 4), odd=st.integers(0, 15), work=st.sampled_from(WORKLOADS))
    def submits_to_a_session(self, pick: int, times: int, odd: int, work: Workload) -> None:
        session_id = self.pick(self.world.takes_tasks() or list(self.world.sessions), pick)
        book = self.world.sessions[session_id]
        tenant = "eve" if odd == 0 else book.tenant
        kind = TaskType.ONEOFF if odd == 1 else book.task_type
        tier = Tier.HIGH if odd == 2 else None
        for _ in range(times):
            self.submit(tenant, work if odd == 3 else book.workload, tier, kind, session_id)

    def submit(
        self, tenant: str, work: Workload, tier: Tier | None, kind: TaskType, session_id: str | None
    ) -> None:
        task_id = self.name("t")
        admitted = self.world.send(
            ev.TaskSubmitted(
                task_id=task_id,
                tenant=tenant,
                task_type=kind,
                tier=tier,
                workload=work,
                session_id=session_id,
                new_session_id=self.name("s"),
                timeout=500.0 if self.names % 3 else 25.0,
            )
        )
        if admitted and self.names % 4:  # most tasks have a reader
            self.world.read(task_id)

    @rule(
        tenant=st.sampled_from(TENANTS),
        work=st.sampled_from(WORKLOADS),
        tier=st.sampled_from([None, Tier.LOW, Tier.HIGH]),
    )
    def asks_for_a_session(self, tenant: str, work: Workload, tier: Tier | None) -> None:
        name = self.name("s")
        self.world.send(ev.SessionRequested(session_id=name, tenant=tenant, tier=tier, workload=work))

    @precondition(lambda self: self.world.sessions)
    @rule(pick=PICK, what=st.integers(0, 4), odd=PICK)
    def kills_or_keeps_a_session(self, pick: int, what: int, odd: int) -> None:
        session_id = self.pick((odd < 6 and self.world.serving()) or list(self.world.sessions), pick)
        tenant = "eve" if odd == 0 else self.world.sessions[session_id].tenant
        if what == 0:
            self.world.send(ev.SessionKillRequested(session_id=session_id, tenant=tenant))
        else:
            self.world.send(ev.KeepaliveRequested(session_id=session_id, tenant=tenant))

    @precondition(lambda self: self.world.tasks)
    @rule(pick=PICK, odd=PICK)
    def cancels_a_task(self, pick: int, odd: int) -> None:
        task_id = self.pick((odd < 6 and self.world.unfinished()) or list(self.world.tasks), pick)
        tenant = "eve" if odd == 0 else self.world.tasks[task_id].tenant
        self.world.send(ev.TaskCancelRequested(task_id=task_id, tenant=tenant))

    @precondition(lambda self: self.world.tasks)
    @rule(pick=PICK, comes=st.booleans())
    def a_reader_comes_or_goes(self, pick: int, comes: bool) -> None:
        task_id = self.pick(list(self.world.tasks), pick)
        task = self.world.tasks[task_id]
        if comes or task.readers == 0:
            self.world.read(task_id)
        else:
            task.readers -= 1
            self.world.send(ev.ReaderLeft(task_id=task_id))

    # -- workers

    @precondition(lambda self: self.world.starting())
    @rule(pick=PICK, far=st.integers(0, 5))
    def a_worker_comes_up(self, pick: int, far: int) -> None:
        session_id = self.pick(self.world.starting(), pick)
        if far == 0:
            stage = ev.StageReached(session_id=session_id, stage="loading", done=1.0, total=None)
            self.world.fact(stage)
            return
        if not self.world.sessions[session_id].created:
            self.world.sessions[session_id].created = True
            self.world.fact(ev.WorkerCreated(session_id=session_id, container_id=f"c-{session_id}"))
        if far > 1:
            self.world.fact(ev.WorkerReady(session_id=session_id))

    @precondition(lambda self: self.world.starting())
    @rule()
    def every_worker_comes_up(self) -> None:
        for session_id in self.world.starting():
            self.world.fact(ev.WorkerReady(session_id=session_id))

    @precondition(lambda self: self.world.serving())
    @rule(pick=PICK, reason=st.sampled_from(LOSSES), really=st.integers(0, 3))
    def a_worker_is_lost(self, pick: int, reason: CloseReason, really: int) -> None:
        if really == 0:
            session_id = self.pick(self.world.serving(), pick)
            self.world.fact(ev.WorkerLost(session_id=session_id, reason=reason, failure=OOPS))

    @precondition(lambda self: self.world.at_work())
    @rule(pick=PICK, state=st.sampled_from(ENDS))
    def a_task_ends(self, pick: int, state: TaskState) -> None:
        session_id, task_id = self.pick(self.world.at_work(), pick)
        failure = None if state is TaskState.COMPLETED else OOPS
        self.world.fact(ev.TaskEnded(session_id=session_id, task_id=task_id, state=state, failure=failure))

    @precondition(lambda self: self.world.at_work())
    @rule()
    def every_task_ends(self) -> None:
        for session_id, task_id in self.world.at_work():
            self.world.fact(ev.TaskEnded(session_id=session_id, task_id=task_id, state=TaskState.COMPLETED))

    # -- slots

    @precondition(lambda self: self.world.washes)
    @rule(pick=PICK, how=st.sampled_from(["gone", "passes", "passes", "one passes", "one fails", "fails"]))
    def a_wash_goes_on(self, pick: int, how: str) -> None:
        wash = self.pick(self.world.washes, pick)
        if how == "gone" or "passes" in how:
            self.world.container_gone(wash)
        if how == "fails":
            self.world.wash_fails(wash, list(wash.left))
        elif how == "one fails":
            self.world.wash_fails(wash, wash.left[:1])
        elif how != "gone":
            for slot_id in wash.left[:1] if how == "one passes" else list(wash.left):
                self.world.wash_passes(wash, slot_id)
        self.world.forget_finished_washes()

    @precondition(lambda self: self.world.washes)
    @rule()
    def every_wash_passes(self) -> None:
        for wash in list(self.world.washes):
            self.world.container_gone(wash)
            for slot_id in list(wash.left):
                self.world.wash_passes(wash, slot_id)
        self.world.forget_finished_washes()

    @rule(pick=PICK, what=st.sampled_from(["well", "well", "faulty", "wash", "wash"]))
    def a_slot_is_looked_at(self, pick: int, what: str) -> None:
        slot_id = self.pick(list(self.world.slots), pick)
        if what == "wash":
            self.world.send(ev.SlotWashOrdered(slot_id=slot_id))
        else:
            fault = "ecc errors" if what == "faulty" else None
            self.world.send(ev.SlotChecked(slot_id=slot_id, fault=fault))

    @precondition(lambda self: self.world.washes)
    @rule(pick=PICK, lie=st.sampled_from(["fence", "uuid", "slot"]))
    def a_certificate_is_wrong(self, pick: int, lie: str) -> None:
        wash = self.pick(self.world.washes, pick)
        for slot_id in wash.left:
            good = self.world.certificate(wash, slot_id)
            self.world.send(
                ev.WashPassed(
                    certificate=Certificate(
                        kind="teardown",
                        slot_id=slot_id,
                        slot_uuid="GPU-other" if lie == "uuid" else good.slot_uuid,
                        fence=good.fence + (1 if lie == "fence" else -1 if lie == "slot" else 0),
                    )
                )
            )

    # -- time, and things out of time

    @precondition(lambda self: self.world.past)
    @rule(pick=st.integers(0, 30))
    def something_is_said_again(self, pick: int) -> None:
        event, wash = self.pick(self.world.past, pick)
        self.world.send(event, wash)

    @rule(seconds=st.sampled_from([None, None, 0.0, 0.5, 3.0, 5.0, 11.0, 16.0, 31.0, 100.0]), heard=PICK)
    def time_passes(self, seconds: float | None, heard: int) -> None:
        """Some time, or until the next deadline; the node hears of it at once, or with what comes next."""
        due = self.world.node.next_deadline()
        if seconds is not None:
            self.world.now += seconds
        elif due is not None:
            self.world.now = max(self.world.now, due)
        if heard:
            self.world.send(ev.Tick())

    @precondition(lambda self: self.world.at_work())
    @rule(pick=PICK, ends=st.booleans())
    def a_lifetime_passes(self, pick: int, ends: bool) -> None:
        """A session at work reaches the end of its lifetime, and perhaps its task ends in the grace."""
        session_id, task_id = self.pick(self.world.at_work(), pick)
        leased_at = self.world.sessions[session_id].leased_at
        assert leased_at is not None
        self.world.now = max(self.world.now, leased_at + self.world.node.rules.max_lifetime)
        self.world.send(ev.Tick())
        if ends:
            self.world.fact(ev.TaskEnded(session_id=session_id, task_id=task_id, state=TaskState.COMPLETED))

    @precondition(lambda self: self.world.submitted > 2 and not self.world.shutting_down)
    @rule(really=PICK)
    def the_node_shuts_down(self, really: int) -> None:
        if really == 7:
            self.world.send(ev.ShutdownOrdered())

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        if world is not None and not world.broken:
            world.finish()


__all__ = ["Broken", "NodeMachine", "World"]
