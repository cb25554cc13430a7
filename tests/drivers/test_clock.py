"""The clock of the service."""

import time

import pytest

from gpu_server.drivers import clock
from gpu_server.drivers.clock import BootClock, boot_id


async def test_sleeping_until_a_moment_ends_after_it_and_not_before() -> None:
    """A sleeper wakes when the clock has reached its moment; one that has passed is no wait."""
    boot = BootClock()
    when = boot.now() + 0.02
    await boot.sleep_until(when)
    assert boot.now() >= when
    await boot.sleep_until(when - 100)


async def test_a_jump_of_the_clock_ends_a_long_sleep_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was suspended past a deadline notices it at the end of the slice it slept in."""
    monkeypatch.setattr(clock, "_SLICE", 0.01)
    boot = BootClock()
    start = boot.now()
    readings = iter([start, start + 1000, start + 5000])
    monkeypatch.setattr(boot, "now", lambda: next(readings))
    before = time.monotonic()
    await boot.sleep_until(start + 4000)
    assert time.monotonic() - before < 60


def test_the_boot_has_a_name_that_stays() -> None:
    """The boot id is the same all through one boot."""
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36
