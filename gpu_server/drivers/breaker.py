"""Whether an engine that does not answer is to be asked again, decided from the times of its failures alone.

A call to an engine that hangs holds a thread until its timeout, so a few callers would soon hold them all.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

FAILURES: Final = 3
PAUSE_SECONDS: Final = 5.0


class Verdict(StrEnum):
    """What to do with a call: make it, look for a sign of life first, or let it fail at once."""

    CALL = "call"
    TRY = "try"
    REFUSE = "refuse"


class Breaker:
    """Opens after `failures` in a row, then allows one try every `pause` seconds; any answer closes it.

    Times are seconds of one clock that does not jump. Not for several threads.
    """

    def __init__(self, *, failures: int = FAILURES, pause: float = PAUSE_SECONDS) -> None:
        self._limit = failures
        self._pause = pause
        self._failures = 0
        self._silent_since = 0.0
        self._next_try = 0.0

    def ask(self, now: float) -> Verdict:
        """What to do with a call now. After TRY the pause begins anew, so that only one caller tries."""
        if self._failures < self._limit:
            return Verdict.CALL
        if now < self._next_try:
            return Verdict.REFUSE
        self._next_try = now + self._pause
        return Verdict.TRY

    def answered(self) -> None:
        """The engine has answered, whatever it said."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """The engine did not answer in time, or could not be connected to."""
        if self._failures == 0:
            self._silent_since = now
        self._failures += 1
        self._next_try = now + self._pause

    def why(self, now: float) -> str:
        """The reason for a refusal, for people."""
        return (
            f"the Docker engine has not answered for {now - self._silent_since:.0f} s;"
            f" it is asked again in {max(self._next_try - now, 0.0):.0f} s"
        )
