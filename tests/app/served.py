"""A service in a thread of its own, for commands that talk to one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from gpu_server.core import events as ev
from tests.app.api_world import Api, api_world
from tests.app.world import slot_specs


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Where it is; `quarantine` locks one of its slots away."""

    url: str
    api: Api
    loop: asyncio.AbstractEventLoop

    def quarantine(self, slot_id: str, why: str) -> None:
        async def report() -> None:
            self.api.world.engine.report(ev.SlotChecked(slot_id=slot_id, fault=why))

        asyncio.run_coroutine_threadsafe(report(), self.loop).result(20)


@contextmanager
def served_world(
    folder: Path, *, prepare: Callable[[Api], None] = lambda api: None, **options: Any
) -> Iterator[Served]:
    """A world of `api_world(**options)`, of two slots, whose loop is in a thread of its own."""
    started: concurrent.futures.Future[Served] = concurrent.futures.Future()
    stop: list[asyncio.Event] = []

    async def serve() -> None:
        try:
            async with api_world(folder, **{"slots": slot_specs(2), **options}) as api:
                prepare(api)
                stop.append(asyncio.Event())
                started.set_result(Served(url=api.url, api=api, loop=asyncio.get_running_loop()))
                await stop[0].wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    # The service logs in this process: that must not get into what the commands print.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(io.StringIO()))
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield started.result(30)
    finally:
        if stop:
            started.result().loop.call_soon_threadsafe(stop[0].set)
        thread.join(30)
        structlog.reset_defaults()
