"""The steps of a wash: each with a limit on its time, and patience with what cannot be reached now.

A finding that is wrong ends it (`WashStopped`), and so does a bug. What cannot be reached is tried again,
alone and with backoff, until the wash as a whole has taken too long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import structlog

from gpu_server.counts import Counts
from gpu_server.ports import (
    Clock,
    Dirty,
    EnclaveDown,
    EnclaveRefused,
    JournalFailing,
    RuntimeUnreachable,
    WashUnreachable,
)
from gpu_server.sealed.wash import Figures, Step

FIRST_RETRY_SECONDS: Final = 0.1
LAST_RETRY_SECONDS: Final = 5.0
ENCLAVE_SECONDS: Final = 150.0
"""What the enclave may take beside a step's own limit: it boots, and other washes hold it up."""

T = TypeVar("T")

_UNREACHABLE: Final = (
    RuntimeUnreachable,
    WashUnreachable,
    EnclaveDown,
    EnclaveRefused,
    JournalFailing,
    OSError,
)

log = structlog.get_logger()


class WashStopped(Exception):
    """A wash has come to a bad end in one of its steps. The message is for an operator."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


@dataclass(frozen=True, slots=True, kw_only=True)
class WashView:
    """What the wash of one slot is at. `since` is the node's time when it was ordered, `reason` why a step
    is tried again."""

    since: float
    steps: tuple[str, ...]
    reason: str | None


class Progress:
    """What the wash of one slot is at, kept by its steps."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.held_up: Callable[[str, float], None] = lambda step, seconds: None
        """Hears that a step is tried again, and for how many seconds it has been under way."""
        self._steps: dict[str, str | None] = {}

    @property
    def view(self) -> WashView:
        """For those who look."""
        why = next((f"{step}: {reason}" for step, reason in self._steps.items() if reason), None)
        return WashView(since=self.since, steps=tuple(self._steps), reason=why)

    @contextmanager
    def at(self, step: str) -> Iterator[Callable[[str], None]]:
        """This step is under way; what it gives is told why it is tried again."""
        self._steps[step] = None

        def note(why: str) -> None:
            self._steps[step] = why

        try:
            yield note
        finally:
            self._steps.pop(step, None)


@contextmanager
def at(washes: Iterable[Progress], step: str) -> Iterator[Callable[[str], None]]:
    """The same of several."""
    with ExitStack() as stack:
        notes = [stack.enter_context(progress.at(step)) for progress in washes]

        def note(why: str) -> None:
            for each in notes:
                each(why)

        yield note


class Times:
    """The node's time as the time of day: one reading of the wall clock, so that an order of events stays
    one when that clock is set meanwhile."""

    def __init__(self, clock: Clock, wall: Callable[[], float] = time.time) -> None:
        self._offset = wall() - clock.now()

    def ms(self, at: float) -> int:
        """Milliseconds since 1970."""
        return int((at + self._offset) * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A step that is over. Times are the node's."""

    started: float
    ended: float
    result: str = "passed"
    figures: Figures = field(default_factory=dict)

    def step(self, name: str, times: Times) -> Step:
        """As it is written down. Raises `Malformed` where a figure is none."""
        return Step(
            name=name,
            result=self.result,
            started_ms=times.ms(self.started),
            ended_ms=times.ms(self.ended),
            figures=self.figures,
        )


class Steps:
    """Carries out the steps of a wash: of one slot, or of all that were ordered together.

    The wash was ordered at `since` and gives up `give_up` seconds later; `slots` are named in the log.
    """

    def __init__(
        self,
        clock: Clock,
        counts: Counts,
        progress: Iterable[Progress],
        *,
        since: float,
        give_up: float,
        slots: tuple[str, ...],
    ) -> None:
        self._clock, self._counts, self._progress = clock, counts, tuple(progress)
        self._since, self._give_up, self._slots = since, give_up, slots

    def now(self) -> float:
        """The node's time."""
        return self._clock.now()

    def nothing(self, result: str) -> Done:
        """A step that there is nothing of."""
        now = self._clock.now()
        return Done(started=now, ended=now, result=result)

    async def do(self, name: str, attempt: Callable[[], Awaitable[T]], *, limit: float) -> tuple[T, Done]:
        """What comes of it, and when. Each attempt may take `limit` seconds. Raises `WashStopped`."""
        started, pause = self._clock.now(), FIRST_RETRY_SECONDS
        with at(self._progress, name) as note:
            while True:
                try:
                    found = await within(self._clock, limit, attempt)
                    break
                except Dirty as dirty:
                    raise WashStopped(name, str(dirty)) from dirty
                except _UNREACHABLE as error:
                    why = reason_of(error)
                except Exception as error:  # a bug: nothing is proven, and the node goes on
                    log.exception("wash.crashed", step=name, slots=self._slots)
                    raise WashStopped(name, f"the wash crashed: {name}: {type(error).__name__}") from error
                log.warning("wash.unreachable", step=name, slots=self._slots, reason=why)
                note(why)
                for progress in self._progress:
                    progress.held_up(name, self._clock.now() - started)
                if self._clock.now() >= self._since + self._give_up:
                    reason = f"could not be washed within {self._give_up:g} s: {name}: {why}"
                    raise WashStopped(name, reason)
                await self._clock.sleep_until(self._clock.now() + pause)
                pause = min(2 * pause, LAST_RETRY_SECONDS)
        ended = self._clock.now()
        self._counts.wash_seconds[name].add(ended - started)
        return found, Done(started=started, ended=ended)

    async def figures(self, name: str, attempt: Callable[[], Awaitable[Figures]], *, limit: float) -> Done:
        """A step that has passed, with what it has found. Raises `WashStopped`."""
        figures, done = await self.do(name, attempt, limit=limit)
        return replace(done, figures=figures)


async def within(clock: Clock, limit: float, attempt: Callable[[], Awaitable[T]]) -> T:
    """What comes of an attempt, which is cancelled after `limit` seconds of this clock: `WashUnreachable`."""
    failure: Exception | None = None
    found: list[T] = []
    async with asyncio.TaskGroup() as group:

        async def watch() -> None:
            await clock.sleep_until(clock.now() + limit)
            over.reschedule(asyncio.get_running_loop().time())

        try:
            async with asyncio.timeout(None) as over:
                watching = group.create_task(watch())
                try:
                    found.append(await attempt())
                finally:
                    watching.cancel()
        except Exception as error:  # noqa: BLE001 -- it is raised below as it is: the group would wrap it
            expired = isinstance(error, TimeoutError) and over.expired()
            failure = WashUnreachable(f"not done within {limit:g} s") if expired else error
    if failure is not None:
        raise failure
    return found[0]


def reason_of(error: Exception) -> str:
    """What went wrong, without the names of files, which workers choose."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
