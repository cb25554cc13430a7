"""The wait line: sessions that cannot have their slots yet, in the order in which they will get them."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_server.core.sessions import Session
from gpu_server.core.slots import Slots, Tier


class WaitLine:
    """First come, first served, and nobody overtakes at another's cost.

    A session further back may start first only with slots that no one before it could use: whoever cannot
    start yet reserves every free slot it would take. So a lease of four GPUs gathers them one by one and is
    never starved by leases of one.
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

    def next_start(self, slots: Slots) -> tuple[Session, tuple[str, ...]] | None:
        """The first session that may start now, and the slots for it; None when everyone has to wait."""
        reserved: frozenset[str] = frozenset()
        for session in self._line.values():
            chosen = slots.choose(session.workload.gpus, session.tier, reserved)
            if len(chosen) == session.workload.gpus:
                return session, chosen
            reserved |= frozenset(chosen)
            if len(reserved) == slots.free_count:
                return None
        return None

    def could_start(self, count: int, tier: Tier, slots: Slots) -> bool:
        """Whether someone who joined the line now would start at once, behind all who wait already."""
        reserved: frozenset[str] = frozenset()
        for session in self._line.values():
            if len(reserved) == slots.free_count:
                return False
            reserved |= frozenset(slots.choose(session.workload.gpus, session.tier, reserved))
        return len(slots.choose(count, tier, reserved)) == count
