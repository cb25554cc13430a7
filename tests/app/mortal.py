"""A service that is killed at one of its decisions, with machine, workers and clients that outlive it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from gpu_server.core.notices import UNNUMBERED
from gpu_server.core.rows import Change
from gpu_server.core.sessions import RequestKey
from gpu_server.drivers.spool import History
from tests.app.reading import Event, parse
from tests.app.world import World, engine_life
from tests.fakes.journal import MemoryJournal


class Killed(BaseException):
    """SIGKILL, as far as one process can play it: nothing that the service would do catches this."""


@dataclass
class Death:
    """Comes to a world's service at the n-th thing that it writes: before it is written, or right behind."""

    world: World
    at: int | None = None
    written: bool = False
    count: int = 0

    def write(self, write: Callable[[], None]) -> None:
        """Write something. A service that is dead, from this or from anything else, writes nothing more."""
        if self.world.killed:
            raise Killed
        self.count += 1
        if self.count != self.at:
            write()
            return
        if self.written:
            write()
        self.world.kill()
        raise Killed


class MortalJournal(MemoryJournal):
    """A journal at whose writes death may come."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.world.disk)
        self._death = death

    def write(self, changes: Iterable[Change]) -> None:
        if changes := list(changes):
            self._death.write(lambda: super(MortalJournal, self).write(changes))


@contextmanager
def mortal_histories(death: Death) -> Iterator[None]:
    """Death may come as events are written down."""
    append = History.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "append", lambda history, record: death.write(lambda: append(history, record)))
        yield


async def live(
    world: World,
    script: Callable[[], Awaitable[None]],
    death: Death | None = None,
    journal: MortalJournal | None = None,
) -> bool:
    """A life of the service in which this happens; whether it came to its end."""
    try:
        async with engine_life(world, journal=journal or MortalJournal(death or Death(world))):
            await script()
    except Killed:
        return False
    except BaseExceptionGroup as group:
        if (others := group.split(Killed)[1]) is not None:
            raise others from None
        # What the dead service had given to a thread is over before the next one begins, as it would be.
        await asyncio.to_thread(lambda: None)
        return False
    return True


@dataclass
class Caller:
    """A client that does not give up: it submits one task until that is taken, and reads it to its end,
    through all lives of the service."""

    world: World
    tenant: str
    key_name: str = "first"
    task_id: str = ""
    session_id: str = ""
    seen: list[Event] = field(default_factory=list)

    @property
    def key(self) -> RequestKey:
        return RequestKey(name=self.key_name, fingerprint="f")

    def submit(self, session_id: str | None = None, *, preset: str = "p") -> None:
        """Have the task taken, if it is not yet."""
        if self.world.killed:
            raise Killed  # there is nobody who could answer
        if not self.task_id:
            self.task_id, self.session_id = self.world.submit(
                session_id, preset=self.world.presets[preset], tenant=self.tenant, key=self.key
            )

    async def call(self, session_id: str | None = None, *, preset: str = "p") -> None:
        """Go on where the last life ended."""
        world = self.world
        self.submit(session_id, preset=preset)
        if self.ended:
            return
        stream = world.engine.streams.get(self.task_id)
        assert stream is not None
        last = self.seen[-1].number if self.seen else 0
        async for chunk in stream.read(last):
            if world.killed:
                raise Killed  # there was nobody who could have sent it
            self.seen += [event for event in parse(chunk) if event.name not in UNNUMBERED]

    @property
    def ended(self) -> bool:
        return bool(self.seen) and self.seen[-1].name == "task_finish"

    async def saw_everything_once(self) -> None:
        """Raises unless each event came once, in order, without a gap, and still is as it was."""
        assert [event.number for event in self.seen] == list(range(1, len(self.seen) + 1))
        assert "gap" not in {event.name for event in self.seen}
        assert await self.world.events(self.task_id) == self.seen
