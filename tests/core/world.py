"""Everything around a node: it carries out what the node decides, and says what became of it.

`World` starts workers (or never does), runs tasks, washes slots, loses things, comes late and says things
twice. After each decision it compares the node with its books, and with what is really there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.admission import known_request
from gpu_server.core.errors import CertificateRejected, Refusal
from gpu_server.core.node import Node
from gpu_server.core.rows import Table, without_fingerprints
from gpu_server.core.sessions import RequestKey, Rules
from gpu_server.core.slots import SlotSpec, SlotState, WashTier
from tests.core.books import Books, SessionBook, SlotBook, TaskBook, Wash
from tests.core.invariants import check, must, snapshot
from tests.core.journal import Journal, check_cut
from tests.core.next_life import (
    Death,
    by_session,
    check_deadlines,
    devices_after,
    must_follow,
    turn_the_page,
)
from tests.core.papers import Paper, judge


@dataclass
class Left:
    """What a session has left on a device. `tidied`: a light wash has been there."""

    tenant: str
    sealed: bool
    tidied: bool = False


class Reality:
    """What is there, whoever knows of it: containers on devices, and the tasks that they were given."""

    def __init__(self) -> None:
        self.containers: dict[str, set[str]] = {}
        self.attended: set[str] = set()  # sessions whose container this life of the service looks after
        self.given: set[str] = set()
        self.left: dict[str, Left] = {}  # on which device
        self.unsecured: list[fx.SecureCertificate] = []

    def carry_out(
        self,
        effects: Iterable[fx.Effect],
        slots: Mapping[str, SlotBook],
        sessions: Mapping[str, SessionBook],
    ) -> None:
        for effect in effects:
            match effect:
                case fx.SecureCertificate():
                    self.unsecured.append(effect)
                case fx.StartWorker(session_id=session_id) | fx.AdoptWorker(session_id=session_id):
                    self.attended.add(session_id)
                    ready = isinstance(effect, fx.AdoptWorker) and effect.ready
                    must(not ready or session_id in self.containers, "there is no such worker:", effect)
                    if session_id not in self.containers:
                        devices = {slots[slot_id].spec.uuid for slot_id in effect.slot_ids}
                        self._bring_up(session_id, devices, sessions[session_id])
                case fx.SendTask():
                    must(effect.task_id not in self.given, "a task runs twice:", effect)
                    self.given.add(effect.task_id)
                case fx.ResumeTask():
                    must(effect.session_id in self.containers, "there is no such worker:", effect)
                    self.given.add(effect.task_id)

    def _bring_up(self, session_id: str, devices: set[str], book: SessionBook) -> None:
        for device in devices:
            left = self.left.get(device)
            plain = book.sealing is None and left is not None and not left.sealed
            met = left is None or (plain and left.tidied and left.tenant == book.tenant)
            must(met, "somebody meets what another has left:", session_id, device, left, book)
            self.left[device] = Left(book.tenant, sealed=book.sealing is not None)
        for other, theirs in self.containers.items():
            must(not devices & theirs, "two containers have one device:", session_id, other, devices)
        self.containers[session_id] = devices

    def wash(self, device: str, tier: WashTier) -> None:
        """This device has been washed: a full wash leaves nothing."""
        if tier is WashTier.FULL:
            self.left.pop(device, None)
        elif device in self.left:
            self.left[device].tidied = True

    def take_down(self, session_id: str) -> None:
        self.containers.pop(session_id, None)
        self.attended.discard(session_id)

    def take_down_the_rest(self) -> None:
        """As every wash does that is not a session's own: what nobody looks after is removed."""
        self.containers = {name: on for name, on in self.containers.items() if name in self.attended}


class World(Books):
    """The surroundings of one node, its journal, and the books on it.

    `inspect` looks into the node's state, `cut` compares it with what its journal holds, after each step.
    """

    def __init__(
        self,
        make_node: Callable[[Rules], Node],
        rules: Rules,
        specs: Sequence[SlotSpec],
        *,
        inspect: bool,
        cut: bool = False,
    ) -> None:
        super().__init__(make_node(rules))
        self.make_node, self.inspect, self.cut = make_node, inspect, cut
        self.journal = Journal()
        self.reality = Reality()
        self.past: list[tuple[ev.Event, int | None]] = []
        self.doom: Death | None = None  # when the next decision is written, nothing of it is carried out
        self.deaths = 0
        self.broken = False
        self.kept_before: dict[str, str | None] = {}
        self.ever = {(spec.id, spec.uuid): spec for spec in specs}
        self.old_papers: list[bytes] = []  # of all lives
        self.begin(specs, rebooted=False)

    # -- one step

    def send(self, event: ev.Event, wash: int | None = None) -> bool:
        """Let something happen, and compare the node's answer with the books. False: it was refused, or
        nobody was left to answer."""
        try:
            return self._send(event, wash)
        except Exception:
            self.broken = True
            raise

    def _send(self, event: ev.Event, wash: int | None) -> bool:
        may_be_refused = isinstance(event, ev.Request | ev.CertificateIssued)
        before = snapshot(self.node) if may_be_refused else ""
        self.event = event
        try:
            effects = self.node.handle(event, self.now)
        except Refusal:
            self._check_untouched(event, before)
            return False
        except CertificateRejected:
            self._check_untouched(event, before)
            slots = [slot for slot in self.slots.values() if slot.wash == wash and slot.pending is None]
            must(
                wash is None or not self._is_awaited(event, slots), "a good certificate was rejected:", event
            )
            return False
        self._write(event)
        busy_before = {s for s, book in self.sessions.items() if book.order or book.in_worker}
        self.book_event(event, wash)
        self.kept_before = {slot_id: slot.kept_for for slot_id, slot in self.slots.items()}
        for effect in effects:
            self.book_effect(effect, busy_before)
        self._compare(event, [effect for effect in effects if isinstance(effect, fx.StartWorker)])
        if self.doom is not None:
            death, self.doom = self.doom, None
            self._die(death)
            return False
        self.reality.carry_out(effects, self.slots, self.sessions)
        return True

    def _is_awaited(self, event: ev.Event, slots: list[SlotBook]) -> bool:
        assert isinstance(event, ev.CertificateIssued)
        return judge(event.certificate).slot_id in {slot.spec.id for slot in slots}

    def _check_untouched(self, event: ev.Event, before: str) -> None:
        must(snapshot(self.node) == before, "a refused request or certificate changed something:", event)
        must(not self.node.take_changes(), "a refused request or certificate touched a row:", event)

    def _write(self, event: ev.Event) -> None:
        changes = self.node.take_changes()
        self.journal.write(changes)
        tables = {change.table for change in changes}
        if isinstance(event, ev.ReaderCame | ev.ReaderLeft):
            must(not tables, "a reader changed a row:", event, changes)
        if isinstance(event, ev.StageReached):
            must(tables <= {Table.TASKS}, "progress changed more than what was told:", event, changes)
        if self.cut:
            check_cut(self.node, self.journal, self.make_node)

    # -- lives of the service

    def die(self, death: Death) -> None:
        """The service is killed between two decisions, and begins again."""
        try:
            self._die(death)
        except Exception:
            self.broken = True
            raise

    def _die(self, death: Death) -> None:
        self.deaths += 1
        self.now += death.pause
        specs = [slot.spec for slot in self.slots.values()]
        specs = devices_after(specs, death, f"n{self.deaths}", self.ever.values())
        self.ever |= {(spec.id, spec.uuid): spec for spec in specs}
        self._restore(rebooted=death.rebooted)
        self.begin(specs, rebooted=death.rebooted, carried_out=not death.again)
        if death.again:
            self._restore(rebooted=False)
            self.begin(specs, rebooted=False)

    def _restore(self, *, rebooted: bool) -> None:
        if self.inspect:
            check_cut(self.node, self.journal, self.make_node)
        if rebooted:  # what the fingerprints were made with is gone
            self.journal.replace(without_fingerprints(self.journal.rows()))
            for book in (*self.tasks.values(), *self.sessions.values()):
                book.key = book.key and RequestKey(name=book.key.name, fingerprint="")
            self.reality.containers.clear()
        self.reality.attended.clear()
        self.reality.unsecured.clear()
        self.past.clear()
        self.node = self.make_node(self.node.rules)
        self.node.restore(self.journal.rows())

    def begin(self, specs: Sequence[SlotSpec], *, rebooted: bool, carried_out: bool = True) -> None:
        """A life of the service begins, the first one or another: what was left is taken up."""
        event = ev.NodeStarted(slots=tuple(specs), rebooted=rebooted)
        follows, deadlines = must_follow(self, specs, rebooted=rebooted), dict(self.node._timers._when)
        effects = self.node.handle(event, self.now)
        done = by_session(effects)
        must(done == follows, "this does not follow from what was left:", done, "should be", follows)
        self._write(event)
        turn_the_page(self, specs, rebooted=rebooted)
        for effect in effects:
            self.book_news(effect)
        for effect in effects:
            if isinstance(effect, fx.WashSlots):
                self.fence = max(self.fence, effect.fence)
                self.wash_begins(effect)
        self._compare(event, [])
        if self.inspect:
            check_deadlines(self.node, deadlines, self.now)
        if carried_out:
            self.reality.carry_out(effects, self.slots, self.sessions)

    # -- books against node

    def _compare(self, event: ev.Event, leases: list[fx.StartWorker]) -> None:
        if self.inspect:
            check(self.node)
        self._compare_slots(event)
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
        self._compare_sealed(event)
        if isinstance(event, ev.Tick):
            for session_id in self.serving():
                session = self.sessions[session_id]
                if not session.in_worker and session.leased_at is not None:
                    over = self.now >= session.leased_at + self.node.rules.max_lifetime
                    must(not over, "a session outlives its lifetime:", session_id, session)
        for task_id, task in self.node.tasks.items():
            told = self.tasks[task_id].told
            must(task.told == told, f"{task_id} was told {told} events, and {task.told} are counted:", event)

    def _compare_slots(self, event: ev.Event) -> None:
        there = {slot.spec.id: slot for slot in self.node.slots}
        must(there.keys() == self.slots.keys(), "other slots than there are:", event, set(there))
        for slot_id, slot in self.slots.items():
            seen = there[slot_id]
            must(seen.spec == slot.spec, "not the device that is there:", seen, slot)
            as_believed = seen.state is slot.state
            must(as_believed, f"slot {slot_id} is {seen.state}, the books say {slot.state}:", event)
            chain = (seen.prev, seen.head, seen.pending, seen.kept_for)
            believed = (slot.prev, slot.head, slot.pending, slot.kept_for)
            must(chain == believed, f"slot {slot_id} has other certificates:", event, seen, slot)
            slot.number = seen.number if slot.number is None else slot.number
            must(seen.number == slot.number, "a slot's number has changed:", seen, slot)

    def _compare_sealed(self, event: ev.Event) -> None:
        for session_id, session in self.node.sessions.items():
            book = self.sessions[session_id]
            seen = (session.sealing, session.worker_key, list(session.grants), session.sealed_tasks)
            believed = (book.sealing, book.worker_key, book.grants, book.sealed_tasks)
            must(seen == believed, f"{session_id} is sealed otherwise:", event, seen, believed)
            must(not book.must_end or book.washed, "it serves whom it was not opened for:", event, session_id)
            at_work = book.order or book.in_worker or book.washed
            spent = book.sealed_tasks >= self.node.rules.sealed_tasks_max
            spent |= book.workload.wash_per_task and book.taken > 0 and book.leased_at is not None
            must(at_work or not spent, "a session that takes no more tasks idles:", event, session_id)
            washed = (session.washed_before, session.washed_after)
            must(washed == (book.washed_before, book.washed_after), "washed otherwise:", session, book)

    def _check_nobody_was_overtaken(self, lease: fx.StartWorker) -> None:
        """Whoever joined earlier and still waits could not have used any of these slots."""
        joined = self.sessions[lease.session_id].joined
        for session_id, book in self.line():
            if book.joined < joined:
                useful = [s for s in lease.slot_ids if book.tier in self.slots[s].spec.tiers]
                kept = {s for s, keeper in self.kept_before.items() if keeper not in (None, book.only_after)}
                if self._missing(book) <= 0:
                    useful = [slot_id for slot_id in useful if slot_id not in kept]
                must(not useful, "slots were taken from one who waits for them:", lease, session_id)

    def _missing(self, book: SessionBook) -> int:
        """How many slots it lacks, were all washes under way to pass."""
        coming = (SlotState.FREE, SlotState.WASHING)
        return book.workload.gpus - sum(
            slot.state in coming and slot.will_serve(book) for slot in self.slots.values()
        )

    def _check_nothing_lags(self) -> None:
        """The first of the line has no choice of slots, and tasks wait only for a worker that is full."""
        for session_id, book in [] if self.doubt else self.line()[:1]:
            free = [s for s in self.slots.values() if s.state is SlotState.FREE and book.tier in s.spec.tiers]
            ready = [slot for slot in free if slot.will_serve(book)]
            must(len(ready) < book.workload.gpus, "the first of the line could start:", session_id, free)
            missing = self._missing(book)
            must(
                missing <= 0 or len(ready) == len(free), "it waits for slots that are kept:", session_id, free
            )
            must(missing > 0 or book.prefetched, "nothing was fetched ahead:", session_id, book)
        for session_id in self.serving():
            book = self.sessions[session_id]
            if book.is_ready and len(book.in_worker) < book.workload.max_concurrent_tasks:
                waiting = [task_id for task_id in book.order if not self.tasks[task_id].sent]
                must(not waiting, "tasks wait while the worker has room:", session_id, waiting)
            if self.shutting_down:
                at_work = bool(book.order or book.in_worker)
                must(at_work, "a session lives through the shutdown without work:", session_id)

    def knows(self, table: Table, tenant: str, key: RequestKey) -> bool:
        """Whether a request with this key is answered with what it made before, or refused."""
        books: Mapping[str, TaskBook | SessionBook] = self.tasks if table is Table.TASKS else self.sessions
        mine = [
            (name, book.key)
            for name, book in books.items()
            if book.tenant == tenant and not book.forgotten and book.key and book.key.name == key.name
        ]
        keys, entities = self.node.session_keys, self.node.sessions
        if table is Table.TASKS:
            keys, entities = self.node.task_keys, self.node.tasks  # type: ignore[assignment]
        try:
            found = known_request(keys, entities, tenant, key)
        except Refusal:
            conflict = bool(mine) and mine[0][1].fingerprint not in ("", key.fingerprint)
            must(conflict, "a key was refused that came with the same:", key, mine)
            return True
        must(found == (mine[0][0] if mine else None), "a key stands for something else:", key, found, mine)
        if mine:
            same = mine[0][1].fingerprint in ("", key.fingerprint)
            must(same, "a key stands for another request:", key, mine)
        return found is not None

    # -- what the world does

    def fact(self, event: ev.Event, wash: int | None = None) -> bool:
        """A fact, kept so that it can be told again, too late."""
        self.past = [*self.past[-30:], (event, wash)]
        return self.send(event, wash)

    def read(self, task_id: str) -> None:
        self.tasks[task_id].readers += 1
        self.send(ev.ReaderCame(task_id=task_id))

    def paper(self, wash: Wash, slot_id: str) -> Paper:
        """What this wash may say of this slot. One that was asked to be light may do more."""
        tier = wash.tier if wash.number % 4 else WashTier.FULL
        uuid, prev = self.slots[slot_id].spec.uuid, wash.prevs[slot_id]
        return Paper(
            slot_id=slot_id, slot_uuid=uuid, fence=wash.fence, prev=prev, tier=tier, serial=wash.number
        )

    def container_gone(self, wash: Wash) -> None:
        """What the wash must remove is gone. A wash of an earlier life does nothing any more."""
        if wash.gone or wash not in self.washes:
            return
        wash.gone = True
        if wash.session_id is None:
            self.reality.take_down_the_rest()
        else:
            self.reality.take_down(wash.session_id)
            self.fact(ev.ContainerGone(session_id=wash.session_id))

    def wash_passes(self, wash: Wash, slot_id: str) -> None:
        """Its certificate is not on the disk yet."""
        if wash in self.washes and slot_id in wash.left:
            wash.left.remove(slot_id)
            paper = self.paper(wash, slot_id)
            if self.slots[slot_id].wash == wash.number:
                self.reality.wash(paper.slot_uuid, paper.tier)
            self.old_papers = [*self.old_papers[-40:], paper.signed()]
            self.fact(ev.CertificateIssued(certificate=paper.signed()), wash.number)
            self.forget_finished_washes()

    def secure(self, order: fx.SecureCertificate) -> None:
        """The disk has this certificate. It must have been in the journal when that was asked for."""
        if order in self.reality.unsecured:
            self.reality.unsecured.remove(order)
            written = {row["hash"] for row in self.journal.certificates().values()}
            self.broken |= order.certificate_hash.hex() not in written
            must(not self.broken, "a certificate that nobody wrote:", order)
            self.fact(ev.CertificateSecured(slot_id=order.slot_id, certificate_hash=order.certificate_hash))

    def secure_all(self) -> None:
        for order in list(self.reality.unsecured):
            self.secure(order)

    def wash_fails(self, wash: Wash, slot_ids: list[str]) -> None:
        if wash not in self.washes:
            return
        wash.left = [slot_id for slot_id in wash.left if slot_id not in slot_ids]
        if not wash.gone:  # whoever looked after it has given up
            self.reality.attended.discard(wash.session_id or "")
        event = ev.WashFailed(
            session_id=wash.session_id, slot_ids=tuple(slot_ids), fence=wash.fence, reason="memory is in use"
        )
        self.fact(event, wash.number)
        self.forget_finished_washes()

    def wash_to_the_end(self, wash: Wash) -> None:
        self.container_gone(wash)
        for slot_id in list(wash.left):
            self.wash_passes(wash, slot_id)
        self.secure_all()
        self.forget_finished_washes()

    def forget_finished_washes(self) -> None:
        self.washes = [wash for wash in self.washes if wash.left or not wash.gone]

    def finish(self) -> None:
        """Let the world come to rest: what was lost stays lost, washes pass, and every deadline passes."""
        self.doom = None
        self.send(ev.RuntimeChecked(doubt=None))
        for _ in range(2000):
            self.secure_all()
            for wash in list(self.washes):
                self.wash_to_the_end(wash)
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
        must(not self.node.task_keys and not self.node.session_keys, "keys are kept for ever:")
        rows = self.journal.rows()
        must(not rows[Table.SESSIONS] and not rows[Table.TASKS], "rows are kept for ever:", rows)
        must(not self.reality.containers, "containers are left over:", self.reality.containers)
        for slot in self.node.slots:
            must(slot.state is SlotState.FREE, "a slot did not come back:", slot)
