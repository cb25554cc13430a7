"""Time that does not jump and does not stop while the machine sleeps."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

# asyncio sleeps on CLOCK_MONOTONIC, which stands still while the machine is suspended: sleep in slices, so
# that a deadline that passed meanwhile is noticed soon.
_SLICE: Final = 30.0


class BootClock:
    """CLOCK_BOOTTIME in seconds; CLOCK_MONOTONIC where the system has no such clock."""

    def __init__(self) -> None:
        self._clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now(self) -> float:
        """Seconds since boot, suspended time included."""
        return time.clock_gettime(self._clock)

    async def sleep_until(self, when: float | None, *, wake: asyncio.Event | None = None) -> None:
        """Return when `now()` has reached `when` (None: never), or when `wake` is set."""
        wake = wake or asyncio.Event()
        while when is None or when > self.now():
            left = _SLICE if when is None else min(when - self.now(), _SLICE)
            try:
                async with asyncio.timeout(left):
                    await wake.wait()
                return
            except TimeoutError:
                continue


def boot_id() -> str:
    """The kernel's name for this boot, to store beside a deadline; "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
