"""Work that several want at once and that is done once: a model's download, its verification, its reading.

It belongs to nobody of those who wait, so that any of them can leave. When the last has left it is cancelled,
or, where it is of use to who comes later, goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Tell = Callable[[int, int | None], None]
"""Hears how many bytes of how many are done."""


@dataclass(slots=True, kw_only=True)
class _Running(Generic[T]):
    result: asyncio.Future[T]
    listeners: list[Tell] = field(default_factory=list)
    last: tuple[int, int | None] | None = None
    task: asyncio.Task[None] | None = None

    def tell(self, done: int, total: int | None) -> None:
        self.last = (done, total)
        for listener in self.listeners:
            listener(done, total)


class SharedWork(Generic[T]):
    """One piece of work for each key, which `lingers` when nobody waits for it any more, or not. Outside
    `open` nothing is shared: each does its own."""

    def __init__(self, *, lingers: bool = False) -> None:
        self._lingers = lingers
        self._group: asyncio.TaskGroup | None = None
        self._running: dict[str, _Running[T]] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Own the work that is begun meanwhile. What still runs at the end is cancelled."""
        failure: Exception | None = None
        async with asyncio.TaskGroup() as self._group:
            try:
                yield
            except Exception as error:  # noqa: BLE001 -- raised below as it is: the group would wrap it
                failure = error
            finally:
                self._group = None
                for running in list(self._running.values()):
                    if running.task is not None:
                        running.task.cancel()
        if failure is not None:
            raise failure

    async def do(self, key: str, work: Callable[[Tell], Coroutine[Any, Any, T]], tell: Tell) -> T:
        """What the work for this key comes to; it is begun if nobody has. Raises what it raises."""
        if self._group is None:
            return await work(tell)
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = _Running(result=asyncio.get_running_loop().create_future())
            running.task = self._group.create_task(self._run(key, running, work), name=f"shared: {key}")
            # Also where it is cancelled before it has begun: nobody waits for ever.
            running.task.add_done_callback(partial(_end, running.result))
        running.listeners.append(tell)
        if running.last is not None:
            tell(*running.last)
        try:
            return await asyncio.shield(running.result)
        finally:
            running.listeners.remove(tell)
            if not running.listeners and not self._lingers:
                self._abandon(key, running)

    def _abandon(self, key: str, running: _Running[T]) -> None:
        if not running.result.done() and running.task is not None:
            # Who comes now begins anew, and does not join what is ending.
            if self._running.get(key) is running:
                del self._running[key]
            running.task.cancel()

    async def _run(self, key: str, running: _Running[T], work: Callable[[Tell], Awaitable[T]]) -> None:
        try:
            result = await work(running.tell)
        except Exception as error:  # noqa: BLE001 -- those who wait are told
            running.result.set_exception(error)
            running.result.exception()  # so that nobody complains when all have left
        else:
            running.result.set_result(result)
        finally:
            if self._running.get(key) is running:
                del self._running[key]


def _end(result: asyncio.Future[Any], _task: object) -> None:
    result.cancel()  # which does nothing where there is one
