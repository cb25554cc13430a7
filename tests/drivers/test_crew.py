"""Crews: several threads, one list of jobs."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from gpu_server.drivers.crew import Stop, Stopped, work_off


async def test_jobs_are_done_in_order_by_several_threads() -> None:
    """What each gives comes back in the order of the list; as many threads as asked for work at once."""
    barrier, names = threading.Barrier(3, timeout=60), set()

    def job(number: int, stop: Stop) -> int:
        barrier.wait()
        names.add(threading.current_thread().name)
        return number * number

    jobs = [partial(job, number) for number in range(9)]
    assert await work_off(jobs, threads=3, name="crew") == [n * n for n in range(9)]
    assert names == {"crew-0", "crew-1", "crew-2"}
    assert await work_off([], threads=3, name="crew") == []


async def test_the_first_failure_stops_all() -> None:
    """Who waits hears of the failure when the others have stopped, and nothing more is begun."""
    began, waits = [], threading.Event()

    def fail(stop: Stop) -> None:
        assert waits.wait(60)
        raise KeyError("first")

    def wait(stop: Stop) -> None:
        began.append("wait")
        waits.set()
        stop.pause(60)

    with pytest.raises(KeyError, match="first"):
        await work_off([wait, fail, wait, wait], threads=2, name="crew")
    assert began == ["wait"]


async def test_giving_up_is_prompt() -> None:
    """Cancelled in the middle of a job, it stops the job and is gone."""
    working, stopped = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def job(stop: Stop) -> None:
        loop.call_soon_threadsafe(working.set)
        try:
            stop.pause(60)
        except Stopped:
            stopped.append(True)
            raise

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(work_off([job], threads=1, name="crew"))
        await working.wait()
        task.cancel()
    assert task.cancelled()
    assert stopped == [True]


async def test_a_job_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not look whether it should stop is left behind."""
    monkeypatch.setattr("gpu_server.drivers.crew.PARTING_SECONDS", 0.01)
    working, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def job(stop: Stop) -> None:
        loop.call_soon_threadsafe(working.set)
        release.wait(60)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(work_off([job], threads=1, name="crew"))
        await working.wait()
        task.cancel()
    assert task.cancelled()
    release.set()
