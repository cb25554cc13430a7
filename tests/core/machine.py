"""A node driven through random histories: the rules by which the world around it (`world.py`) moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gpu_server.core import events as ev
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.node import Node
from gpu_server.core.rows import Table
from gpu_server.core.sessions import (
    CloseReason,
    Grant,
    RequestKey,
    Rules,
    SealedUse,
    Sealing,
    TaskState,
    TaskType,
    Workload,
)
from gpu_server.core.slots import BOTH_TIERS, SlotSpec, Tier, WashTier
from tests.core.next_life import DEVICES, Death
from tests.core.papers import judge
from tests.core.world import World

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})
NODES: list[tuple[frozenset[Tier], ...]] = [
    (BOTH_TIERS,),
    (BOTH_TIERS, BOTH_TIERS),
    (LOW, HIGH),
    (BOTH_TIERS, LOW, HIGH),
    (BOTH_TIERS, BOTH_TIERS, LOW, BOTH_TIERS),
]
FEW = {"sealed_tasks_max": 3, "grants_max": 2}
RULES = [
    Rules(
        idle_timeout=50, max_lifetime=200, session_queue_max=2, gpu_wait_max=90, gpu_wait_max_tasks=4, **FEW
    ),
    Rules(idle_timeout=20, max_lifetime=60, session_queue_max=5, gpu_wait_max=300, gpu_wait_max_tasks=8),
    Rules(idle_timeout=300, max_lifetime=400, session_queue_max=1, gpu_wait_max=0, **FEW),
    Rules(session_queue_max=3, gpu_wait_max=120, cancel_grace=30, task_retention=5, tombstone_retention=7),
    Rules(session_queue_max=0, lifetime_grace=0, max_lifetime=100, cancel_grace=15, task_retention=0),
    Rules(idle_timeout=25, max_lifetime=30, lifetime_grace=20, cancel_grace=8, disconnect_grace=60),
    Rules(max_lifetime=150, ended_tasks_max=3, ended_sessions_max=2, disconnect_grace=10),
    Rules(max_lifetime=400, task_retention=50, **FEW),
    Rules(max_lifetime=200, idle_timeout=30, light_wash=True, **FEW),
    Rules(max_lifetime=90, gpu_wait_max=60, gpu_wait_max_tasks=3, light_wash=True),
    Rules(max_lifetime=200, gpu_wait_max=0, light_wash=True),
]
WORKLOADS = [
    Workload(model_id="m", task_preset="chat", start_timeout=40),
    Workload(model_id="m", task_preset="batched", max_concurrent_tasks=3, start_timeout=40),
    Workload(model_id="m", task_preset="pair", max_concurrent_tasks=2, gpus=2, start_timeout=150),
    Workload(
        model_id="m", task_preset="batch", serves_sessions=False, start_timeout=40, sealed=SealedUse.OFF
    ),
    Workload(model_id="m", task_preset="big", gpus=3, sealed=SealedUse.OFF),
    Workload(model_id="m", task_preset="closed", start_timeout=40, sealed=SealedUse.REQUIRED),
    Workload(model_id="m", task_preset="once", start_timeout=40, max_concurrent_tasks=2, wash_per_task=True),
]
SEALING = Sealing(kms_key_arn="arn:aws:kms:eu-central-1:111122223333:key/k", pool="chat")
TENANTS = ["ann", "bob"]
KEYS = [None] * 4 + [RequestKey(name=name, fingerprint=body) for name, body in ("1a", "1b", "2a")]
ENDS = [TaskState.COMPLETED, TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.TIMEOUT]
LOSSES = [CloseReason.START_FAILED, CloseReason.WORKER_EXITED, CloseReason.WORKER_MISBEHAVED]
OOPS = Failure(code=FailureCode.WORKER_EXITED, message="exit code 1", from_worker=True)

PICK = st.integers(0, 7)

LIES: dict[str, dict[str, Any]] = {
    "fence before": {},
    "fence after": {},
    "device": {"slot_uuid": "GPU-other"},
    "slot": {"slot_id": "g9"},
    "prev": {"prev": bytes(31) + b"1"},
    "step": {"result": "failed"},
    "tier": {"tier": WashTier.LIGHT},
    "signature": {},
    "cut off": {},
}


def new_node(rules: Rules) -> Node:
    return Node(rules, judge=judge)


class NodeMachine(RuleBasedStateMachine):
    """The rules by which the world moves. `make_node` and `inspect` are for planted faults; with `cut` the
    node is compared with its journal after every step."""

    make_node: ClassVar[Callable[[Rules], Node]] = staticmethod(new_node)
    inspect: ClassVar[bool] = True
    cut: ClassVar[bool] = False
    light: ClassVar[bool] = False  # only histories in which slots are kept for tenants

    world: World

    @initialize(tiers=st.sampled_from(NODES), rules=st.sampled_from(RULES), clean=PICK)
    def start(self, tiers: tuple[frozenset[Tier], ...], rules: Rules, clean: int) -> None:
        specs = [
            SlotSpec(id=f"g{i}", uuid=f"GPU-{i}", name="L40S", memory_mb=46068, is_gpu=True, tiers=serves)
            for i, serves in enumerate(tiers)
        ]
        if self.light:
            rules = replace(rules, light_wash=True, gpu_wait_max=90.0, session_queue_max=2)
        self.world = World(type(self).make_node, rules, specs, inspect=self.inspect, cut=self.cut)
        self.names = 0
        if clean:
            self.world.wash_to_the_end(self.world.washes[0])

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
        key=st.sampled_from(KEYS),
    )
    def submits_a_task(
        self, tenant: str, work: Workload, tier: Tier | None, oneoff: int, key: RequestKey | None
    ) -> None:
        kind = TaskType.ONEOFF if oneoff > 5 or not work.serves_sessions else TaskType.SESSION
        self.submit(tenant, work, tier, kind, None, key)

    @precondition(lambda self: self.world.sessions)
    @rule(pick=PICK, times=st.integers(1, 4), odd=st.integers(0, 15), work=st.sampled_from(WORKLOADS))
    def submits_to_a_session(self, pick: int, times: int, odd: int, work: Workload) -> None:
        session_id = self.pick(self.world.takes_tasks() or list(self.world.sessions), pick)
        book = self.world.sessions[session_id]
        tenant = "eve" if odd == 0 else book.tenant
        kind = TaskType.ONEOFF if odd == 1 else book.task_type
        tier = Tier.HIGH if odd == 2 else None
        psk_id = (book.grants or [None])[pick % (len(book.grants) or 1)] if odd != 4 else "of another"
        for _ in range(times):
            self.submit(tenant, work if odd == 3 else book.workload, tier, kind, session_id, psk_id=psk_id)

    def submit(
        self,
        tenant: str,
        work: Workload,
        tier: Tier | None,
        kind: TaskType,
        session_id: str | None,
        key: RequestKey | None = None,
        psk_id: str | None = None,
    ) -> None:
        if key is not None and self.world.knows(Table.TASKS, tenant, key):
            return
        task_id, new_session_id = self.name("t"), self.name("s")
        admitted = self.world.send(
            ev.TaskSubmitted(
                task_id=task_id,
                tenant=tenant,
                task_type=kind,
                tier=tier,
                workload=work,
                session_id=session_id,
                new_session_id=new_session_id,
                timeout=500.0 if self.names % 3 else 25.0,
                detached=self.names % 5 == 0,
                key=key,
                psk_id=psk_id,
            )
        )
        if admitted and self.names % 13 == 0:  # it could not be stored
            new = None if session_id is not None else new_session_id
            self.withdraw(task_id, new)
        elif admitted and self.names % 4:  # most tasks have a reader
            self.world.read(task_id)

    def withdraw(self, task_id: str | None, session_id: str | None) -> None:
        self.world.send(ev.RequestWithdrawn(task_id=task_id, session_id=session_id))

    @rule(
        tenant=st.sampled_from(TENANTS),
        work=st.sampled_from(WORKLOADS),
        tier=st.sampled_from([None, Tier.LOW, Tier.HIGH]),
        key=st.sampled_from(KEYS),
        sealing=st.sampled_from([None, SEALING]),
    )
    def asks_for_a_session(
        self,
        tenant: str,
        work: Workload,
        tier: Tier | None,
        key: RequestKey | None,
        sealing: Sealing | None,
    ) -> None:
        if key is not None and self.world.knows(Table.SESSIONS, tenant, key):
            return
        name = self.name("s")
        admitted = self.world.send(
            ev.SessionRequested(
                session_id=name, tenant=tenant, tier=tier, workload=work, key=key, sealing=sealing
            )
        )
        if admitted and self.names % 7 == 0:
            self.withdraw(None, name)

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
        at_work = odd < 4 and [task_id for _, task_id in self.world.at_work()]
        task_id = self.pick(at_work or (odd < 6 and self.world.unfinished()) or list(self.world.tasks), pick)
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
        if far > 1 and far != 3:  # some never show one
            self.show_key(session_id)
        if far > 1:
            self.world.fact(ev.WorkerReady(session_id=session_id))

    @precondition(lambda self: self.world.starting())
    @rule()
    def every_worker_comes_up(self) -> None:
        """Those that are up already say so again, as after an adoption."""
        for session_id in self.world.serving():
            self.show_key(session_id)
            self.world.fact(ev.WorkerReady(session_id=session_id))

    @rule(tenant=st.sampled_from(TENANTS), grants=st.integers(1, 3), tasks=st.integers(0, 3))
    def a_sealed_session_comes_up(self, tenant: str, grants: int, tasks: int) -> None:
        """As tenants use them: it is made, opened and given some tasks, one behind the other."""
        name = self.name("s")
        asked = ev.SessionRequested(
            session_id=name, tenant=tenant, tier=None, workload=WORKLOADS[0], sealing=SEALING
        )
        if not self.world.send(asked) or name not in self.world.starting():
            return
        self.show_key(name)
        for which in range(grants):
            grant = Grant(epoch="epoch", wrapped_key=f"key {which}", grant=name)
            psk_id = f"{which} of {name}"
            opened = ev.SessionOpened(session_id=name, tenant=tenant, psk_id=psk_id, grant=grant)
            if not self.world.send(opened):
                return
        self.world.fact(ev.WorkerReady(session_id=name))
        for _ in range(tasks):
            psk_id = f"{grants - 1} of {name}"
            self.submit(tenant, WORKLOADS[0], None, TaskType.SESSION, name, psk_id=psk_id)
            for session_id, task_id in self.world.at_work():
                if session_id == name:
                    ended = ev.TaskEnded(session_id=name, task_id=task_id, state=TaskState.COMPLETED)
                    self.world.fact(ended)

    def show_key(self, session_id: str, key: str | None = None) -> None:
        """The worker of a sealed session has a key of its own; an attendant tells of no other's."""
        if self.world.sessions[session_id].sealing is not None:
            self.world.fact(ev.WorkerKeyShown(session_id=session_id, key=key or f"key of {session_id}"))

    @precondition(lambda self: self.world.serving())
    @rule(pick=PICK, other=PICK)
    def a_worker_shows_its_key(self, pick: int, other: int) -> None:
        """Its own, as when it is adopted; or another one, by which it gives itself away."""
        session_id = self.pick(self.world.serving(), pick)
        self.show_key(session_id, "another key" if other == 7 else None)

    @precondition(lambda self: self.world.sessions)
    @rule(pick=PICK, odd=st.integers(0, 15), which=st.integers(0, 3))
    def a_session_is_opened(self, pick: int, odd: int, which: int) -> None:
        """With a data key or another; also one that is plain, has ended, shows no key or is another's."""
        book = self.world.sessions
        sealed = [name for name in self.world.serving() if book[name].sealing is not None]
        session_id = self.pick((odd > 2 and sealed) or list(book), pick)
        grant = Grant(epoch="epoch", wrapped_key=f"key {which}", grant=f"{session_id}")
        self.world.send(
            ev.SessionOpened(
                session_id=session_id,
                tenant="eve" if odd == 15 else book[session_id].tenant,
                psk_id=f"{which} of {session_id}",
                grant=grant,
            )
        )

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

    @precondition(lambda self: self.world.serving())
    @rule(pick=PICK, then=st.sampled_from([*TENANTS, None]), sealing=st.sampled_from([None, SEALING]))
    def a_session_ends_well(self, pick: int, then: str | None, sealing: Sealing | None) -> None:
        """Its slots are clean at once, and perhaps somebody asks for them."""
        session_id = self.pick(self.world.serving(), pick)
        tenant = self.world.sessions[session_id].tenant
        self.world.send(ev.SessionKillRequested(session_id=session_id, tenant=tenant))
        for wash in [wash for wash in self.world.washes if wash.session_id == session_id]:
            self.world.wash_to_the_end(wash)
        if then is not None:
            self.asks(then, WORKLOADS[0], sealing)

    def asks(self, tenant: str, work: Workload, sealing: Sealing | None) -> None:
        asked = ev.SessionRequested(
            session_id=self.name("s"), tenant=tenant, tier=None, workload=work, sealing=sealing
        )
        self.world.send(asked)

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
            if pick % 2:
                self.world.secure_all()
        self.world.forget_finished_washes()

    @precondition(lambda self: self.world.washes)
    @rule()
    def every_wash_passes(self) -> None:
        for wash in list(self.world.washes):
            self.world.wash_to_the_end(wash)

    @rule(pick=PICK, what=st.sampled_from(["well", "well", "faulty", "wash", "wash"]))
    def a_slot_is_looked_at(self, pick: int, what: str) -> None:
        slot_id = self.pick(list(self.world.slots), pick)
        if what == "wash":
            self.world.send(ev.SlotWashOrdered(slot_id=slot_id))
        else:
            fault = "ecc errors" if what == "faulty" else None
            self.world.send(ev.SlotChecked(slot_id=slot_id, fault=fault))

    @precondition(lambda self: self.world.washes)
    @rule(pick=PICK, lie=st.sampled_from(list(LIES)))
    def a_certificate_is_wrong(self, pick: int, lie: str) -> None:
        """In one thing, where all others are as they should be."""
        wash = self.pick(self.world.washes, pick)
        for slot_id in wash.left:
            good = self.world.paper(wash, slot_id)
            if lie == "tier" and wash.tier is WashTier.LIGHT:
                continue
            wrong = replace(good, **LIES[lie])
            if lie == "fence before":
                wrong = replace(good, fence=good.fence - 1)
            elif lie == "fence after":
                wrong = replace(good, fence=good.fence + 1)
            raw = wrong.signed(b"another's") if lie == "signature" else wrong.signed()
            self.world.send(ev.CertificateIssued(certificate=raw[:-9] if lie == "cut off" else raw))

    @precondition(lambda self: self.world.old_papers)
    @rule(pick=st.integers(0, 40))
    def an_old_certificate_comes_again(self, pick: int) -> None:
        """Good when it came first, in this life of the service or another."""
        self.world.send(ev.CertificateIssued(certificate=self.pick(self.world.old_papers, pick)))

    @precondition(lambda self: self.world.reality.unsecured)
    @rule(pick=PICK, how=st.sampled_from(["well", "well", "another slot", "another hash", "fails"]))
    def the_disk_answers(self, pick: int, how: str) -> None:
        """At last; or of something that nobody asked for; or the wash is given up meanwhile."""
        order = self.pick(self.world.reality.unsecured, pick)
        slot_id, hash_ = order.slot_id, order.certificate_hash
        if how == "well":
            self.world.secure(order)
        elif how == "fails":
            fence = self.world.node.slots[slot_id].fence
            failed = ev.WashFailed(session_id=None, slot_ids=(slot_id,), fence=fence, reason="it was found")
            self.world.fact(failed, self.world.slots[slot_id].wash)
        elif how == "another slot":
            for other in [name for name in self.world.slots if name != slot_id]:
                self.world.fact(ev.CertificateSecured(slot_id=other, certificate_hash=hash_))
        else:
            self.world.fact(ev.CertificateSecured(slot_id=slot_id, certificate_hash=hash_[::-1]))

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

    @precondition(lambda self: len(self.world.line()) > 1 or self.world.shutting_down)
    @rule(really=PICK)
    def the_node_shuts_down(self, really: int) -> None:
        if really >= 5:
            self.world.send(ev.ShutdownOrdered())

    @precondition(lambda self: self.world.serving() and not self.world.shutting_down)
    @rule(really=PICK)
    def the_node_drains(self, really: int) -> None:
        if really >= 6:
            self.world.send(ev.DrainOrdered())

    @rule(answers=st.integers(0, 5))
    def the_runtime_is_asked(self, answers: int) -> None:
        well = answers > 1 if self.world.doubt else answers > 0
        self.world.send(ev.RuntimeChecked(doubt=None if well else "no answer"))

    @precondition(lambda self: self.world.submitted > 0)
    @rule(
        devices=st.sampled_from(DEVICES),
        which=PICK,
        pause=st.sampled_from([0.0, 0.0, 4.0, 28.0, 70.0]),
        how=st.sampled_from(["between decisions", "in a decision", "in a decision", "in a cancel", "twice"]),
        rebooted=PICK,
        really=st.booleans(),
    )
    def the_service_is_killed(
        self, devices: str, which: int, pause: float, how: str, rebooted: int, really: bool
    ) -> None:
        """At once, or when the next decision is written and before any of it is carried out."""
        death = Death(devices, which, pause, rebooted=rebooted == 7, again=how == "twice")
        if not really:
            return
        if how in ("between decisions", "twice"):
            self.world.die(death)
            return
        self.world.doom = death
        at_work = self.world.at_work()
        if how == "in a cancel" and at_work:
            task_id = self.pick(at_work, which)[1]
            tenant = self.world.tasks[task_id].tenant
            self.world.send(ev.TaskCancelRequested(task_id=task_id, tenant=tenant))

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        if world is not None and not world.broken:
            world.finish()
