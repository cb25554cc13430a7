"""The wait line: sessions that cannot have their slots yet, in the order in which they will get them."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_server.core.sessions import Session
from gpu_server.core.slots import Claim, Need, Slots


class WaitLine:
    """First come, first served, and nobody overtakes at another's cost.

    A session further back may start first only with slots that no one before it could use: whoever cannot
    start yet reserves every free slot it would take. So a lease of four GPUs gathers them one by one and is
    never starved by leases of one. Slots that are kept for a tenant are no exception: what somebody before
    needs is washed for them.
    """

    def __init__(self) -> None:
        self._line: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._line.values())

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._line

    def join(self, session: Session) -> None:
        self._line[session.id] = session

    def leave(self, session_id: str) -> None:
        self._line.pop(session_id, None)

    def claims(self, slots: Slots) -> Iterator[tuple[Session, Claim]]:
        """Who waits, in their order, and what is set aside for each; until nothing is left to set aside."""
        reserved: set[str] = set()
        for session in self._line.values():
            if len(reserved) == slots.free_count + slots.washing_count:
                return
            claim = slots.claim(session.need, reserved)
            reserved.update(claim.all)
            yield session, claim

    def next_start(self, slots: Slots) -> tuple[Session, tuple[str, ...]] | None:
        """The first session that may start now, and the slots for it; None when everyone has to wait."""
        if slots.free_count == 0:
            return None
        for session, claim in self.claims(slots):
            if len(claim.free) == session.workload.gpus:
                return session, claim.free
        return None

    def could_start(self, need: Need, slots: Slots) -> bool:
        """Whether someone who joined the line now would start at once, behind all who wait already."""
        if slots.free_count < need.count:
            return False
        reserved = {slot_id for _, claim in self.claims(slots) for slot_id in claim.all}
        return len(slots.choose(need, reserved)) == need.count
