"""Counting bytes in many threads."""

from __future__ import annotations

import asyncio
import threading

from gpu_server.drivers.tally import Tally


async def test_the_beginning_and_the_end_are_told() -> None:
    """However many threads count, the last that is told is all of it, on the event loop."""
    told: list[tuple[int, int | None]] = []
    finished = asyncio.Event()

    def tell(done: int, total: int | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((done, total))
        if done == total:
            finished.set()

    tally = Tally(4000, tell)

    def count() -> None:
        for _ in range(1000):
            tally.add(1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(20):
        await finished.wait()
    assert told[0] == (0, 4000)
    assert told[-1] == (4000, 4000)
    assert len(told) < 100
    for thread in threads:
        thread.join()
