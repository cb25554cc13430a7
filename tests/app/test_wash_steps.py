"""Steps of a wash: their times, their limits, and what is tried again."""

from __future__ import annotations

import asyncio

import pytest

from gpu_server.counts import Counts
from gpu_server.ports import Dirty, EnclaveDown, EnclaveRefused, JournalFailing, WashUnreachable
from gpu_server.wash_steps import (
    FIRST_RETRY_SECONDS,
    Done,
    Progress,
    Steps,
    Times,
    WashStopped,
    WashView,
    at,
    reason_of,
    within,
)
from tests.fakes.clock import FakeClock


class Killed(BaseException):
    """Nothing of the service's catches this."""


def steps_of(clock: FakeClock, counts: Counts | None = None, **options: float) -> tuple[Steps, Progress]:
    """The steps of one slot, and where they are kept."""
    progress = Progress(clock.now())
    given = {"since": clock.now(), "give_up": 60.0, **options}
    return Steps(clock, counts or Counts(), [progress], slots=("0",), **given), progress


# -- within -----------------------------------------------------------------------------------------------


async def test_within() -> None:
    """What comes of an attempt in time, and nothing is left of the limit."""
    clock = FakeClock()

    async def attempt() -> int:
        await asyncio.sleep(0)
        return 7

    assert await within(clock, 10.0, attempt) == 7
    assert clock._sleepers == {}


@pytest.mark.parametrize("error", [ValueError("x"), TimeoutError("its own"), OSError(28, "full")])
async def test_errors_pass_as_they_are(error: Exception) -> None:
    """An attempt's own error is no group, and no limit that has passed."""

    async def attempt() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await within(FakeClock(), 10.0, attempt)
    assert caught.value is error


async def test_what_is_late() -> None:
    """An attempt that takes longer is cancelled, and may clean up behind itself."""
    clock, cleaned = FakeClock(), []

    async def attempt() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    async def late() -> None:
        with pytest.raises(WashUnreachable, match="not done within 10 s"):
            await within(clock, 10.0, attempt)

    async with asyncio.TaskGroup() as group:
        trying = group.create_task(late())
        await clock.until_slept_to(clock.now() + 10)
        clock.advance(9)
        await asyncio.sleep(0)
        assert not trying.done()
        clock.advance(1)
    assert cleaned == [True]
    assert clock._sleepers == {}


async def test_cancelled_from_outside() -> None:
    """That is no limit that has passed."""
    clock = FakeClock()
    async with asyncio.TaskGroup() as group:
        trying = group.create_task(within(clock, 10.0, asyncio.Event().wait))
        await clock.until_slept_to(clock.now() + 10)
        trying.cancel()
    assert trying.cancelled()
    assert clock._sleepers == {}


async def test_killed() -> None:
    """What kills the process is nobody's to handle."""

    async def attempt() -> None:
        raise Killed

    with pytest.raises(BaseExceptionGroup) as caught:
        await within(FakeClock(), 10.0, attempt)
    assert caught.value.split(Killed)[1] is None


# -- steps ------------------------------------------------------------------------------------------------


async def test_a_step() -> None:
    """It is under way as long as it takes, and says when it was; its time is counted."""
    clock, counts = FakeClock(), Counts()
    steps, progress = steps_of(clock, counts)

    async def attempt() -> dict[str, int]:
        assert progress.view == WashView(since=1000.0, steps=("scrub",), reason=None)
        clock.advance(2)
        return {"written": 5}

    done = await steps.figures("scrub", attempt, limit=10)
    assert done == Done(started=1000.0, ended=1002.0, figures={"written": 5})
    assert progress.view.steps == ()
    assert (counts.wash_seconds["scrub"].total, counts.wash_seconds["scrub"].sum) == (1, 2.0)
    assert steps.nothing("skipped") == Done(started=1002.0, ended=1002.0, result="skipped")


@pytest.mark.parametrize(
    "error",
    [
        WashUnreachable("why"),
        EnclaveDown("why"),
        EnclaveRefused("BUSY", "why"),
        JournalFailing("why"),
        OSError(16, "why", "a name that a worker chose"),
    ],
)
async def test_what_is_tried_again(error: Exception) -> None:
    """A step that cannot be carried out now is, later; why is said without a worker's words."""
    clock = FakeClock()
    steps, progress = steps_of(clock)
    errors = [error]

    async def attempt() -> dict[str, int]:
        if errors:
            raise errors.pop()
        return {}

    async with asyncio.TaskGroup() as group:
        trying = group.create_task(steps.figures("gates", attempt, limit=10))
        await clock.until_slept_to(clock.now() + FIRST_RETRY_SECONDS)
        assert progress.view.reason == "gates: why"
        clock.advance(FIRST_RETRY_SECONDS)
        assert (await trying).ended == 1000.1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(Dirty("found"), "found"), (KeyError("secret"), "the wash crashed: gates: KeyError")],
)
async def test_what_is_not(error: Exception, reason: str) -> None:
    """A finding and a bug end the wash at once."""
    clock, counts = FakeClock(), Counts()
    steps, progress = steps_of(clock, counts)

    async def attempt() -> dict[str, int]:
        raise error

    with pytest.raises(WashStopped) as stopped:
        await steps.figures("gates", attempt, limit=10)
    assert (stopped.value.step, str(stopped.value)) == ("gates", reason)
    assert (progress.view.steps, counts.wash_seconds["gates"].total) == ((), 0)


async def test_giving_up_counts_from_the_order() -> None:
    """Not from the step's own beginning."""
    clock = FakeClock()
    steps, _ = steps_of(clock, since=clock.now() - 60)

    async def attempt() -> dict[str, int]:
        raise WashUnreachable("no answer")

    with pytest.raises(WashStopped, match="could not be washed within 60 s: enclave: no answer"):
        await steps.figures("enclave", attempt, limit=10)


def test_several() -> None:
    """What is done for several slots is under way for each of them."""
    washes = [Progress(1.0), Progress(2.0)]
    with at(washes, "disk") as note:
        note("full")
        assert [wash.view for wash in washes] == [
            WashView(since=since, steps=("disk",), reason="disk: full") for since in (1.0, 2.0)
        ]
    assert [wash.view.steps for wash in washes] == [(), ()]


def test_steps_at_once() -> None:
    """Those that are under way are named in their order, with the first reason that there is."""
    progress = Progress(0.0)
    with progress.at("residue"), progress.at("scrub") as note:
        note("no image")
        assert progress.view == WashView(since=0.0, steps=("residue", "scrub"), reason="scrub: no image")


def test_times() -> None:
    """The time of day as it was read once: what comes later is later, whatever becomes of the wall clock."""
    clock, wall = FakeClock(), [5000.0]
    times = Times(clock, lambda: wall[0])
    wall[0] = 0.0
    assert [times.ms(clock.now()), times.ms(clock.now() + 1.5)] == [5_000_000, 5_001_500]
    step = Done(started=1000.0, ended=1001.0, figures={"n": 1}).step("gates", times)
    assert (step.started_ms, step.ended_ms, step.result) == (5_000_000, 5_001_000, "passed")


def test_reasons() -> None:
    """Of an OSError only what the kernel says of it."""
    assert reason_of(OSError(2, "No such file", "/run/x/secret")) == "No such file"
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert reason_of(WashUnreachable("x")) == "x"
