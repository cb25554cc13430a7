"""Places that are looked at with blocking calls, in a thread that is told when nobody waits for it any more.

A look or a removal may be given up: by its limit, or because the wash was. What it still has to do it must
then leave: the slot may be leased again before a call to the kernel returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from gpu_server.drivers.blocking import call_in_thread
from gpu_server.ports import EndedLease, WashUnreachable

T = TypeVar("T")

LIMIT_SECONDS: Final = 30.0

Halt = Callable[[], None]
"""Asked before each step; raises when nobody waits for the work any more."""


class Place(Protocol):
    """A `Cleaner` that blocks."""

    @property
    def name(self) -> str: ...

    def look(self, lease: EndedLease, halt: Halt) -> int: ...

    def remove(self, lease: EndedLease, halt: Halt) -> None: ...


class _Halted(Exception):
    """Nobody waits for this any more."""


class InThread:
    """A blocking `Place` as a `Cleaner`. `limit` bounds each look and each removal, in seconds."""

    def __init__(self, place: Place, limit: float = LIMIT_SECONDS) -> None:
        self.name = place.name
        self._place, self._limit = place, limit

    async def look(self, lease: EndedLease) -> int:
        return await in_thread(lambda halt: self._place.look(lease, halt), name=self.name, limit=self._limit)

    async def remove(self, lease: EndedLease) -> None:
        await in_thread(lambda halt: self._place.remove(lease, halt), name=self.name, limit=self._limit)


async def in_thread(do: Callable[[Halt], T], *, name: str, limit: float = LIMIT_SECONDS) -> T:
    """Run `do` in a thread of its own, with a `Halt` that is up as soon as this returns.

    Raises `WashUnreachable` after `limit` seconds, and what `do` raises.
    """
    given_up = threading.Event()

    def halt() -> None:
        if given_up.is_set():
            raise _Halted

    try:
        return await call_in_thread(lambda: do(halt), limit=limit, name=f"residue: {name}")
    except TimeoutError as error:
        raise WashUnreachable(f"{name}: not done within {limit:g} s") from error
    finally:
        given_up.set()
