"""A clock for what waits for real programs: hours pass in moments, what is polled has its time."""

from __future__ import annotations

import asyncio

_LONGEST = 0.02
"""Seconds. A sleep that is shorter than this is not shortened: a limit made of many short pauses is as
long as it says, however slowly the machine starts a program."""


class HurriedClock:
    """`Clock` whose long sleeps are short, and over at their end; time moves by what was slept."""

    def __init__(self) -> None:
        self._now = 1000.0

    def now(self) -> float:
        return self._now

    async def sleep_until(self, when: float | None, *, wake: asyncio.Event | None = None) -> None:
        wake = wake or asyncio.Event()
        pause = None if when is None else min(max(when - self._now, 0.0), _LONGEST)
        try:
            async with asyncio.timeout(pause):
                await wake.wait()
        except TimeoutError:
            if when is not None:
                self._now = max(self._now, when)
