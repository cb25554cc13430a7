"""One blocking call in a thread of its own, with a deadline, for libraries that may hang for good.

A thread pool is wrong for these: one call that never returns takes a seat for ever, and the interpreter waits
for it at exit. Here the caller goes on at the deadline, and the thread is a daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def call_in_thread(do: Callable[[], T], *, limit: float, name: str) -> T:
    """Run `do` in a new daemon thread and return what it returns.

    Raises TimeoutError after `limit` seconds (the thread is left behind: `do` must end by itself or hold
    nothing that matters), and whatever `do` raises.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def post(settle: Callable[[], None]) -> None:
        def settle_if_awaited() -> None:
            if not done.done():
                settle()

        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(settle_if_awaited)

    def run() -> None:
        try:
            result = do()
        except Exception as error:  # noqa: BLE001 -- it crosses to the caller
            failure = error
            post(lambda: done.set_exception(failure))
        else:
            post(lambda: done.set_result(result))

    threading.Thread(target=run, name=name, daemon=True).start()
    async with asyncio.timeout(limit):
        return await done
