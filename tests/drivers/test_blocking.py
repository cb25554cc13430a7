"""Calls that may hang, in threads of their own."""

import asyncio
import threading

import pytest

from gpu_server.drivers.blocking import call_in_thread


async def test_the_result_and_the_error_of_a_call_come_back() -> None:
    """What the call returns or raises reaches the caller."""
    assert await call_in_thread(lambda: 42, limit=10, name="test") == 42
    with pytest.raises(ZeroDivisionError):
        await call_in_thread(lambda: 1 // 0, limit=10, name="test")


async def test_a_call_that_hangs_is_given_up_and_its_late_result_is_dropped() -> None:
    """The caller goes on at the limit; the thread's end afterwards disturbs nobody."""
    release, ended = threading.Event(), threading.Event()

    def hang() -> None:
        release.wait(30)
        ended.set()

    with pytest.raises(TimeoutError):
        await call_in_thread(hang, limit=0.01, name="test")
    release.set()
    assert await asyncio.to_thread(ended.wait, 30)


def test_a_result_after_the_loop_has_closed_is_dropped() -> None:
    """A thread that outlives its loop ends quietly."""
    release = threading.Event()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await call_in_thread(lambda: release.wait(30), limit=0.01, name="late-test")

    asyncio.run(give_up())
    release.set()
    for thread in threading.enumerate():
        if thread.name == "late-test":
            thread.join(30)
            assert not thread.is_alive()
