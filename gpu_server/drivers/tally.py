"""Counting bytes in many threads, and telling of them on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

NEWS_SECONDS = 0.1


class Tally:
    """How many of `total` bytes are done. Made on the event loop; `tell` hears of it there, now and then."""

    def __init__(self, total: int | None, tell: Callable[[int, int | None], None], *, done: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._total, self._tell, self._done = total, tell, done
        self._told_at = time.monotonic()
        tell(done, total)

    def add(self, count: int) -> None:
        """From any thread; a negative count takes back what must be done again."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._told_at < NEWS_SECONDS and self._done != self._total:
                return
            self._told_at = now
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._tell, self._done, self._total)
