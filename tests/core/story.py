"""A node told as a story: who does what, and when. After every event the state is checked, and whether
another life of the service would find it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.node import Node
from gpu_server.core.sessions import (
    CloseReason,
    Grant,
    RequestKey,
    Rules,
    Sealing,
    Session,
    Task,
    TaskState,
    TaskType,
    Workload,
)
from gpu_server.core.slots import BOTH_TIERS, Slot, SlotSpec, Tier
from tests.core.invariants import check
from tests.core.journal import Journal, check_cut
from tests.core.papers import judge, paper_for

WORK = Workload(model_id="m", task_preset="chat")
EXIT = Failure(code=FailureCode.WORKER_EXITED, message="exit code 137")
SEALING = Sealing(kms_key_arn="arn:aws:kms:eu-central-1:111122223333:key/k", pool="chat")
GRANT = Grant(epoch="the enclave's", wrapped_key="the tenant's", grant="the worker's")
EXEC = Workload(model_id="m", task_preset="batch", serves_sessions=False)


def work(**changes: Any) -> Workload:
    """The usual preset, with changes."""
    return Workload(**{"model_id": "m", "task_preset": "chat", **changes})


def device(slot_id: str, tiers: frozenset[Tier] = BOTH_TIERS) -> SlotSpec:
    """A GPU in the slot of this id."""
    return SlotSpec(id=slot_id, uuid=f"GPU-{slot_id}", name="L40S", memory_mb=46068, is_gpu=True, tiers=tiers)


def devices(slots: Iterable[str | SlotSpec]) -> tuple[SlotSpec, ...]:
    """A GPU in each of these slots."""
    return tuple(device(slot) if isinstance(slot, str) else slot for slot in slots)


class Story:
    """A node with some slots, its clock, and everything it has said.

    A task `t1` that gets a new session gets session `s1`. The wash at the start has the first fence: 0, so
    that the first lease has 1.
    """

    def __init__(
        self, *slots: str | SlotSpec, washed: bool = True, first_fence: int = 0, **rules: float
    ) -> None:
        self.make_node = partial(Node, judge=judge, first_fence=first_fence)
        self.node = self.make_node(Rules(**rules))  # type: ignore[arg-type]
        self.now = 1000.0
        self.said: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        self.journal = Journal()
        self.specs = devices(slots or ("g0",))
        self.tell(ev.NodeStarted(slots=self.specs))
        if washed:
            for spec in self.specs:
                self.passes(spec.id)

    def tell(self, event: ev.Event) -> list[fx.Effect]:
        """Something happens now."""
        effects = self.node.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, fx.Publish):
                self.said[effect.task_id].append((effect.event, dict(effect.data)))
        check(self.node)
        self.journal.write(self.node.take_changes())
        check_cut(self.node, self.journal, self.make_node)
        return effects

    def after(self, seconds: float) -> list[fx.Effect]:
        """Time passes, and every deadline on the way is met on time."""
        until, effects = self.now + seconds, []
        while (due := self.node.next_deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            effects += self.tell(ev.Tick())
        self.now = until
        return effects

    def restart(self, *slots: str | SlotSpec, rebooted: bool = False, after: float = 0.0) -> list[fx.Effect]:
        """The service is killed. Another begins `after` seconds later, with these slots or the same."""
        self.now += after
        self.node = self.make_node(self.node.rules)
        self.node.restore(self.journal.rows())
        self.specs = devices(slots) if slots else self.specs
        return self.tell(ev.NodeStarted(slots=self.specs, rebooted=rebooted))

    # -- requests

    def submit(
        self,
        task_id: str = "t1",
        *,
        to: str | None = None,
        tenant: str = "ann",
        kind: TaskType = TaskType.SESSION,
        tier: Tier | None = None,
        workload: Workload = WORK,
        timeout: float = 60.0,
        read: bool = True,
        detached: bool = False,
        key: RequestKey | None = None,
        psk_id: str | None = None,
    ) -> list[fx.Effect]:
        """A tenant submits a task, and reads its stream unless told otherwise."""
        effects = self.tell(
            ev.TaskSubmitted(
                task_id=task_id,
                tenant=tenant,
                task_type=kind,
                tier=tier,
                workload=workload,
                session_id=to,
                new_session_id=task_id.replace("t", "s", 1),
                timeout=timeout,
                detached=detached,
                key=key,
                psk_id=psk_id,
            )
        )
        if read:
            self.read(task_id)
        return effects

    def ask(
        self,
        session_id: str = "s1",
        *,
        tenant: str = "ann",
        tier: Tier | None = None,
        workload: Workload = WORK,
        key: RequestKey | None = None,
        sealing: Sealing | None = None,
    ) -> list[fx.Effect]:
        """A tenant asks for a session ahead of its first task."""
        return self.tell(
            ev.SessionRequested(
                session_id=session_id,
                tenant=tenant,
                tier=tier,
                workload=workload,
                key=key,
                sealing=sealing,
            )
        )

    def open(
        self, psk_id: str = "psk", session_id: str = "s1", tenant: str = "ann", grant: Grant = GRANT
    ) -> list[fx.Effect]:
        """The enclave has granted a data key to this session's worker."""
        return self.tell(ev.SessionOpened(session_id=session_id, tenant=tenant, psk_id=psk_id, grant=grant))

    def kill(self, session_id: str = "s1", tenant: str = "ann") -> list[fx.Effect]:
        return self.tell(ev.SessionKillRequested(session_id=session_id, tenant=tenant))

    def keep_alive(self, session_id: str = "s1", tenant: str = "ann") -> list[fx.Effect]:
        return self.tell(ev.KeepaliveRequested(session_id=session_id, tenant=tenant))

    def cancel(self, task_id: str = "t1", tenant: str = "ann") -> list[fx.Effect]:
        return self.tell(ev.TaskCancelRequested(task_id=task_id, tenant=tenant))

    def read(self, task_id: str = "t1") -> list[fx.Effect]:
        return self.tell(ev.ReaderCame(task_id=task_id))

    def leave(self, task_id: str = "t1") -> list[fx.Effect]:
        return self.tell(ev.ReaderLeft(task_id=task_id))

    def order_wash(self, slot_id: str = "g0") -> list[fx.Effect]:
        return self.tell(ev.SlotWashOrdered(slot_id=slot_id))

    def drain(self) -> list[fx.Effect]:
        return self.tell(ev.DrainOrdered())

    def shut_down(self) -> list[fx.Effect]:
        return self.tell(ev.ShutdownOrdered())

    def doubt(self, doubt: str | None = "no answer") -> list[fx.Effect]:
        """The container runtime is asked, and does not answer; or it does again."""
        return self.tell(ev.RuntimeChecked(doubt=doubt))

    # -- what became of effects

    def ready(self, session_id: str = "s1") -> list[fx.Effect]:
        """The worker of this session comes up."""
        self.tell(ev.WorkerCreated(session_id=session_id, container_id=f"c-{session_id}"))
        return self.tell(ev.WorkerReady(session_id=session_id))

    def shows(self, key: str = "key", session_id: str = "s1") -> list[fx.Effect]:
        """The worker of this session shows its public key."""
        return self.tell(ev.WorkerKeyShown(session_id=session_id, key=key))

    def lose(
        self,
        session_id: str = "s1",
        reason: CloseReason = CloseReason.WORKER_EXITED,
        log_tail: str = "",
        failure: Failure = EXIT,
    ) -> list[fx.Effect]:
        return self.tell(
            ev.WorkerLost(session_id=session_id, reason=reason, failure=failure, log_tail=log_tail)
        )

    def end(
        self, task_id: str = "t1", state: TaskState = TaskState.COMPLETED, failure: Failure | None = None
    ) -> list[fx.Effect]:
        """The worker says that it is done with a task."""
        session_id = self.task(task_id).session_id
        return self.tell(ev.TaskEnded(session_id=session_id, task_id=task_id, state=state, failure=failure))

    def certificate(self, slot_id: str = "g0", **lies: object) -> bytes:
        """The certificate that would free this slot now, but for these lies."""
        return paper_for(self.node.slots[slot_id], **lies).signed()

    def issued(self, slot_id: str = "g0", **lies: object) -> list[fx.Effect]:
        """The wash of this slot has passed, and its certificate is not on the disk yet."""
        return self.tell(ev.CertificateIssued(certificate=self.certificate(slot_id, **lies)))

    def secured(self, slot_id: str = "g0") -> list[fx.Effect]:
        """The newest certificate of this slot is on the disk."""
        return self.tell(ev.CertificateSecured(slot_id=slot_id, certificate_hash=self.slot(slot_id).prev))

    def passes(self, slot_id: str) -> list[fx.Effect]:
        """The wash of this slot passes, and its certificate is on the disk."""
        return self.issued(slot_id) + self.secured(slot_id)

    def fails(
        self, *slot_ids: str, session_id: str | None = "s1", fence: int | None = None
    ) -> list[fx.Effect]:
        """The wash of these slots fails."""
        if fence is None:
            fence = self.slot(slot_ids[0]).fence
        return self.tell(
            ev.WashFailed(session_id=session_id, slot_ids=slot_ids, fence=fence, reason="memory is in use")
        )

    def is_faulty(self, slot_id: str = "g0", fault: str | None = "xid 79") -> list[fx.Effect]:
        return self.tell(ev.SlotChecked(slot_id=slot_id, fault=fault))

    def gone(self, session_id: str = "s1") -> list[fx.Effect]:
        return self.tell(ev.ContainerGone(session_id=session_id))

    def clean_up(self, session_id: str = "s1") -> list[fx.Effect]:
        """The session's container is gone, and its slots are clean."""
        slot_ids = self.session(session_id).slot_ids
        return self.gone(session_id) + [effect for slot_id in slot_ids for effect in self.passes(slot_id)]

    # -- what there is to see

    def session(self, session_id: str = "s1") -> Session:
        return self.node.sessions[session_id]

    def task(self, task_id: str = "t1") -> Task:
        return self.node.tasks[task_id]

    def slot(self, slot_id: str = "g0") -> Slot:
        return self.node.slots[slot_id]

    def names(self, task_id: str = "t1") -> list[str]:
        """The events of a task so far: `connection:queued`, `queue:2`, `task_finish:completed`, ..."""
        keys = {"connection": "status", "worker": "status", "queue": "position", "progress": "stage"}
        keys |= {"task_finish": "status", "error": "code"}
        return [f"{event}:{data[keys[event]]}" for event, data in self.said[task_id]]

    def last(self, task_id: str = "t1") -> dict[str, Any]:
        """The data of the last event of a task."""
        return self.said[task_id][-1][1]


def only(effects: list[fx.Effect], kind: type[fx.Effect]) -> list[Any]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def own_washes(effects: list[fx.Effect]) -> list[fx.WashSlots]:
    """The washes of sessions, without those of slots that nobody held."""
    return [wash for wash in only(effects, fx.WashSlots) if wash.session_id is not None]


def warm(*slots: str, **rules: float) -> Story:
    """Session `s1` of ann, ready and without tasks."""
    story = Story(*slots, **rules)
    story.ask("s1")
    story.ready("s1")
    return story


def sealed(*slots: str, **rules: float) -> Story:
    """Session `s1` of ann, sealed, ready and open to what is sealed with `psk`."""
    story = Story(*slots, **rules)
    story.ask("s1", sealing=SEALING)
    story.shows()
    story.open()
    story.ready("s1")
    return story


def busy(*tasks: str, **rules: float) -> Story:
    """Session `s1` of ann, with the first of these tasks running and the others queued."""
    story = warm(**rules)
    for task_id in tasks or ("t1",):
        story.submit(task_id, to="s1", timeout=10_000.0)
    return story
