"""What must follow when the service begins again, worked out from the books; and how it may be killed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpu_server.core import effects as fx
from gpu_server.core.node import Node
from gpu_server.core.slots import BOTH_TIERS, NO_CERTIFICATE, SlotSpec, SlotState, Tier, WashTier
from gpu_server.core.timers import Alarm
from tests.core.books import Books, SlotBook
from tests.core.invariants import must

WORK = (fx.StartWorker, fx.AdoptWorker, fx.SendTask, fx.ResumeTask, fx.CancelTask, fx.WashSlots)
DEVICES = ["same", "same", "same", "missing", "replaced", "added", "other tiers", "shifted", "back", "back"]

Deadlines = Mapping[tuple[Alarm, str], float]
BySession = Mapping[str | None, list[fx.Effect]]


@dataclass(frozen=True)
class Death:
    """The service is killed, and begins again after `pause` seconds, with what has become of the devices.
    `again`: it is killed once more as soon as it has decided what to do."""

    devices: str
    which: int
    pause: float
    rebooted: bool
    again: bool


def devices_after(
    specs: Sequence[SlotSpec], death: Death, fresh: str, ever: Iterable[SlotSpec]
) -> tuple[SlotSpec, ...]:
    """The devices of the next life; `fresh` names one that was never there, `ever` are all that were."""
    found, which = list(specs), death.which % len(specs)
    match death.devices:
        case "missing" if len(found) > 1:
            del found[which]
        case "replaced":
            found[which] = replace(found[which], uuid=f"GPU-{fresh}")
        case "added" if len(found) < 5:
            found.insert(0, replace(found[0], id=fresh, uuid=f"GPU-{fresh}", tiers=BOTH_TIERS))
        case "other tiers":
            tiers = [BOTH_TIERS, frozenset({Tier.LOW}), frozenset({Tier.HIGH})]
            now = tiers.index(found[which].tiers)
            found[which] = replace(found[which], tiers=tiers[(now + 1) % 3])
        case "shifted" if len(found) > 1:  # indices are given anew, and all behind the lost one move up
            ids = [spec.id for spec in found]
            del found[which]
            found = [replace(spec, id=slot_id) for slot_id, spec in zip(ids, found, strict=False)]
        case "back" if len(found) < 5:
            there = {spec.id for spec in found} | {spec.uuid for spec in found}
            away = [spec for spec in ever if spec.id not in there and spec.uuid not in there]
            found += away[-1:]
    return tuple(found)


def lost_slots(books: Books, specs: Iterable[SlotSpec]) -> set[str]:
    """The slots whose device is not there any more, also where another one has come in its place."""
    there = {(spec.id, spec.uuid) for spec in specs}
    return {slot_id for slot_id, slot in books.slots.items() if (slot_id, slot.spec.uuid) not in there}


def must_follow(books: Books, specs: Sequence[SlotSpec], *, rebooted: bool) -> BySession:
    """What is to be done for each session, in this order, and for None the wash of all other slots."""
    remembered = {
        name for name, book in books.sessions.items() if book.closed and name in books.node.sessions
    }
    lost, follows = lost_slots(books, specs), defaultdict[str | None, list[fx.Effect]](list)
    held_by_someone: set[str] = set()
    for name, book in books.sessions.items():
        if book.leased_at is None or (book.closed and name not in remembered):
            continue
        held = tuple(s for s, slot in books.slots.items() if s not in lost and slot.holder == name)
        if book.closed and not held:
            continue
        held = tuple(sorted(held, key=book.slot_ids.index))
        held_by_someone.update(held)
        if book.washed or rebooted or lost.intersection(book.slot_ids):
            follows[name].append(
                fx.WashSlots(
                    session_id=name,
                    fence=book.fence,
                    slot_ids=held,
                    grace=books.node.rules.stop_grace,
                    tier=WashTier.FULL,
                    prevs=books.prevs(held),
                    tenant=book.tenant,
                )
            )
            continue
        follows[name].append(
            fx.AdoptWorker(session_id=name, fence=book.fence, slot_ids=held, ready=book.is_ready)
        )
        for task_id in book.in_worker:
            follows[name].append(fx.ResumeTask(session_id=name, task_id=task_id))
            if books.tasks[task_id].finished:
                follows[name].append(fx.CancelTask(session_id=name, task_id=task_id))
    known = {slot_id: slot.state for slot_id, slot in books.slots.items() if slot_id not in lost}
    rest = [
        spec.id
        for spec in specs
        if spec.id not in held_by_someone and known.get(spec.id) is not SlotState.QUARANTINED
    ]
    rest.sort()
    before = {slot_id: books.slots[slot_id].prev for slot_id in known}
    follows[None].append(
        fx.WashSlots(
            session_id=None,
            fence=books.fence + 1,
            slot_ids=tuple(rest),
            grace=0.0,
            tier=WashTier.FULL,
            prevs=tuple(before.get(slot_id, NO_CERTIFICATE) for slot_id in rest),
            tenant=None,
        )
    )
    return follows


def by_session(effects: Iterable[fx.Effect]) -> BySession:
    """The work among these effects, in the same form."""
    found = defaultdict[str | None, list[fx.Effect]](list)
    for effect in effects:
        if isinstance(effect, fx.WashSlots) and effect.session_id is None:
            in_order = sorted(zip(effect.slot_ids, effect.prevs, strict=True))
            slot_ids, prevs = (
                (tuple(column) for column in zip(*in_order, strict=True)) if in_order else ((), ())
            )
            effect = replace(effect, slot_ids=slot_ids, prevs=prevs)
        if isinstance(effect, WORK):
            found[effect.session_id].append(effect)
    return found


def turn_the_page(books: Books, specs: Sequence[SlotSpec], *, rebooted: bool) -> None:
    """The books at the start of the next life, before anything is done in it."""
    books.washes.clear()
    books.shutting_down = books.doubt = False
    for task in books.tasks.values():
        task.readers = 0
    for book in books.sessions.values():
        book.created = book.is_ready  # what was being started may have to be made anew
        book.prefetched = False
    lost, before = lost_slots(books, specs), books.slots
    for book in books.sessions.values():
        if book.leased_at is not None and not book.closed and not book.washed:
            heads = dict(zip(book.slot_ids, book.washed_before, strict=True))
            book.washed_before = tuple(head for slot_id, head in heads.items() if slot_id not in lost)
    for spec in specs:
        if spec.id in before and spec.id not in lost:
            before[spec.id].spec, before[spec.id].wash, before[spec.id].pending = spec, None, None
    books.slots = {
        spec.id: SlotBook(spec) if spec.id in lost or spec.id not in before else before[spec.id]
        for spec in specs
    }
    living = {name for name, book in books.sessions.items() if not book.closed or name in books.node.sessions}
    for slot in books.slots.values():
        if slot.state is not SlotState.QUARANTINED and slot.holder not in living:
            slot.state, slot.holder, slot.kept_for = SlotState.WASHING, None, None
    if rebooted:
        for _, book in books.line():
            book.gave_up = True


def check_deadlines(node: Node, before: Deadlines, now: float) -> None:
    """Raises `Broken` unless deadlines have kept running, but for the moment that work under way gets."""
    soon = now + node.rules.adoption_grace
    for (alarm, name), due in before.items():
        found = node._timers.get(alarm, name)
        if found is None or alarm is Alarm.DISCONNECT:
            continue  # whether it has those that it needs is checked with its state
        wanted = due
        if alarm in (Alarm.START, Alarm.TASK, Alarm.DRAIN):
            wanted = max(due, soon)
        elif alarm is Alarm.CANCEL:
            wanted = now + node.rules.cancel_grace
        must(found == wanted, f"deadline {alarm} of {name} was {due}, should be {wanted}, and is {found}")
