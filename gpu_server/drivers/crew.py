"""A crew: a few threads that work off a list of jobs together, for reading and writing many files at once.

Not a pool: the threads are daemons and live as long as the list, so that a file system that hangs holds up
neither other work nor the end of the program. Jobs look at `Stop` between blocks, so that giving up is
prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
PARTING_SECONDS = 2.0
"""How long one who gives up waits for the threads to notice: then none of them writes any more, as a rule."""


class Stopped(Exception):
    """The job was told to stop, and did."""


class Stop:
    """Told to all jobs of a crew at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Stop at the next opportunity."""
        self._event.set()

    def check(self) -> None:
        """An opportunity to stop. Raises `Stopped`."""
        if self._event.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Wait, and be an opportunity to stop all the while. Raises `Stopped`."""
        if self._event.wait(seconds):
            raise Stopped


async def work_off(jobs: Iterable[Callable[[Stop], T]], *, threads: int, name: str) -> list[T]:
    """Do all jobs, begun in their order, `threads` at once; what they return, in their order.

    Raises what the first job that failed has raised, when the others have stopped. Cancelled, it stops the
    jobs, and waits a moment for that.
    """
    listed = list(jobs)
    stop = Stop()
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    results: dict[int, T] = {}
    failures: list[Exception] = []
    numbers = iter(range(len(listed)))
    lock = threading.Lock()
    left = min(threads, len(listed))
    if not listed:
        return []

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        nonlocal left
        try:
            while not failures:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                stop.check()
                results[number] = listed[number](stop)
        except Stopped as error:
            with lock:
                failures.append(error)
        except Exception as error:  # noqa: BLE001 -- it crosses to the caller
            with lock:
                failures.insert(0, error)
            stop.set()
        finally:
            with lock:
                left -= 1
                last = left == 0
            if last:
                with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                    loop.call_soon_threadsafe(finish)

    for number in range(left):
        threading.Thread(target=run, name=f"{name}-{number}", daemon=True).start()
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                await asyncio.shield(done)
        raise
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(listed))]
