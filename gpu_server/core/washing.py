"""Washing: which wash is ordered when, and what its certificate is good for.

1. When a lease ends its slots are washed, fully or lightly (`wash_tier`); when the service starts, every slot
   that nobody holds; when an operator asks, a quarantined one.
2. A certificate that fits the order becomes the newest of its slot's chain. Its row is written with that
   decision, and `SecureCertificate` asks for the disk's word (`issue`).
3. With that word the slot is free, and the line moves.
4. What a light wash has freed is kept for its tenant. It is washed fully as soon as somebody else waits for
   it: without that, one tenant's leases could keep a slot from everyone for good (`look_ahead`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_server.core import effects as fx
from gpu_server.core.errors import Failure, FailureCode, Refusal, RefusalCode
from gpu_server.core.events import CertificateIssued, SlotWashOrdered, WashFailed
from gpu_server.core.sessions import FAILED_REASONS, Session, SessionState
from gpu_server.core.slots import SlotState, WashTier

if TYPE_CHECKING:
    from gpu_server.core.node import Node


def wash_tier(node: Node, session: Session) -> WashTier:
    """How the slots of this session are washed at its end: lightly only after one that was plain and ended
    well, and was looked after until then.

    Where nobody may wait for a slot nobody could ask for one that is kept, so there every wash is full.
    """
    rules = node.rules
    allowed = rules.light_wash and rules.gpu_wait_max > 0 and rules.gpu_wait_max_tasks > 0
    plain = session.sealing is None and not session.workload.wash_per_task
    well = session.close_reason not in FAILED_REASONS and not node._adopting
    return WashTier.LIGHT if allowed and plain and well else WashTier.FULL


def wash_lease(node: Node, session: Session) -> None:
    """The lease is over: its slots are nobody's until each has its certificate."""
    tier = wash_tier(node, session)
    node.slots.wash(session.slot_ids, tier, f"{session.id} ended: {session.close_reason}")
    node._out.append(_order_for(node, session, session.slot_ids, tier))


def wash_again(node: Node, session: Session) -> fx.WashSlots:
    """Nobody saw the end of this session's wash, so it begins anew. Of its slots, those that it still holds:
    others have been freed, or locked away, already."""
    held = tuple(s for s in session.slot_ids if s in node.slots and node.slots[s].holder == session.id)
    node.slots.wash_again(held)
    return _order_for(node, session, held, WashTier.FULL)


def begin_to_wash(node: Node) -> list[fx.WashSlots]:
    """At start: the slots that nobody holds, and that are not locked away. A wash that was interrupted when
    its session had closed is still the wash of that lease; all others are one of no lease."""
    fence, washed, again = node._take_fence(), list[str](), dict[str, Session]()
    for slot in node.slots:
        holder = node.sessions.get(slot.holder or "")
        if slot.state is SlotState.QUARANTINED or (holder is not None and not holder.ended):
            continue
        if slot.state is SlotState.WASHING and holder is not None and holder.fence == slot.fence:
            again[holder.id] = holder
        else:
            node.slots.begin_wash(slot.spec.id, fence)
            washed.append(slot.spec.id)
    orders = [wash_again(node, session) for session in again.values()]
    return [*orders, _order(node, fence, tuple(washed))]


def wash_by_order(node: Node, event: SlotWashOrdered) -> None:
    """An operator wants a quarantined slot back. Raises `Refusal` for any other."""
    if event.slot_id not in node.slots:
        raise Refusal(RefusalCode.SLOT_NOT_FOUND, f"this node has no slot {event.slot_id}")
    if (state := node.slots[event.slot_id].state) is not SlotState.QUARANTINED:
        message = f"slot {event.slot_id} is {state}; only a quarantined slot is washed by order"
        raise Refusal(RefusalCode.SLOT_NOT_QUARANTINED, message)
    _rewash(node, (event.slot_id,), "by an operator's order")


def issue(node: Node, event: CertificateIssued) -> None:
    """Raises `CertificateRejected` for what is no certificate of a wash that was ordered."""
    certificate = node.judge(event.certificate)
    slot = node.slots.issue(certificate)
    node._keep_certificate(certificate)
    session = node.sessions.get(slot.holder or "")
    if session is not None and session.fence == certificate.fence:
        session.washed_after += (certificate.record_hash.hex(),)
        node._touch_session(session.id)
    node._out.append(fx.SecureCertificate(slot_id=slot.spec.id, certificate_hash=certificate.hash))


def lock_away(node: Node, event: WashFailed, now: float) -> None:
    """The slots whose wash failed, if it is still the one that was ordered."""
    for slot_id in event.slot_ids:
        if slot_id not in node.slots:
            continue
        slot = node.slots[slot_id]
        if slot.fence == event.fence and slot.state is SlotState.WASHING:
            node.slots.quarantine(slot_id, event.reason)
    session = node.sessions.get(event.session_id or "")
    if session is not None and not session.ended:
        session.failure = Failure(code=FailureCode.NOT_CLEANED, message=event.reason)
        node._close(session, SessionState.FAILED, now)


def look_ahead(node: Node) -> None:
    """For those who wait: wash what is kept for others and they need, and say who starts after the washes
    that are under way, so that what these need can be fetched meanwhile. Not while the runtime does not
    answer."""
    if node.runtime_doubt is not None or node._adopting:
        return
    kept: list[str] = []
    for session, claim in node.line.claims(node.slots):
        kept += claim.kept
        if len(claim.all) == session.workload.gpus and not session.prefetched:
            session.prefetched = True
            node._out.append(fx.PrefetchModel(session_id=session.id))
    if kept:
        _rewash(node, tuple(kept), "somebody waits for it")


def _rewash(node: Node, slot_ids: tuple[str, ...], why: str) -> None:
    fence = node._take_fence()
    for slot_id in slot_ids:
        node.slots.rewash(slot_id, fence, why)
    node._out.append(_order(node, fence, slot_ids))


def _order(node: Node, fence: int, slot_ids: tuple[str, ...]) -> fx.WashSlots:
    return fx.WashSlots(
        session_id=None,
        fence=fence,
        slot_ids=slot_ids,
        grace=0.0,
        tier=WashTier.FULL,
        prevs=node.slots.prevs(slot_ids),
        tenant=None,
    )


def _order_for(node: Node, session: Session, slot_ids: tuple[str, ...], tier: WashTier) -> fx.WashSlots:
    return fx.WashSlots(
        session_id=session.id,
        fence=session.fence,
        slot_ids=slot_ids,
        grace=node.rules.stop_grace,
        tier=tier,
        prevs=node.slots.prevs(slot_ids),
        tenant=session.tenant,
    )
