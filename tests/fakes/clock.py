"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio


class FakeClock:
    """`Clock` by hand: `advance` moves time and wakes whoever slept to a moment that has come."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._sleepers: dict[asyncio.Event, float | None] = {}
        self._news = asyncio.Event()

    def now(self) -> float:
        return self._now

    async def sleep_until(self, when: float | None, *, wake: asyncio.Event | None = None) -> None:
        if (when is not None and when <= self._now) or (wake is not None and wake.is_set()):
            await asyncio.sleep(0)
            return
        over = asyncio.Event()
        self._sleepers[over] = when
        self._news.set()
        try:
            async with asyncio.TaskGroup() as group:
                waker = group.create_task(_pass_on(wake, over)) if wake is not None else None
                await over.wait()
                if waker is not None:
                    waker.cancel()
        finally:
            del self._sleepers[over]

    @property
    def slept_to(self) -> tuple[float, ...]:
        """The moments to come that somebody sleeps to, the earliest first."""
        return tuple(
            sorted(when for when in self._sleepers.values() if when is not None and when > self._now)
        )

    def advance(self, seconds: float) -> None:
        """Move time."""
        self._now += seconds
        for over, when in self._sleepers.items():
            if when is not None and when <= self._now:
                over.set()

    async def until_slept_to(self, when: float | None, within: float = 30.0) -> None:
        """Wait until somebody sleeps to this moment (None: for ever)."""
        async with asyncio.timeout(within):
            while when not in self._sleepers.values():
                self._news.clear()
                await self._news.wait()


async def _pass_on(wake: asyncio.Event, over: asyncio.Event) -> None:
    await wake.wait()
    over.set()
