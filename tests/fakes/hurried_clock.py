"""A clock for what waits for real programs: hours pass in seconds, but never before others had their turn."""

from __future__ import annotations

import asyncio

_TURN = 0.001


class HurriedClock:
    """`Clock` whose every sleep is short, and over at its end; time moves by what was slept."""

    def __init__(self) -> None:
        self._now = 1000.0

    def now(self) -> float:
        return self._now

    async def sleep_until(self, when: float | None, *, wake: asyncio.Event | None = None) -> None:
        wake = wake or asyncio.Event()
        while True:
            try:
                async with asyncio.timeout(_TURN):
                    await wake.wait()
                return
            except TimeoutError:
                if when is not None:
                    self._now = max(self._now, when)
                    return
