"""Models are fetched while slots are washed, for who comes next; and nothing depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpu_server.core import events as ev
from gpu_server.core.errors import FailureCode
from gpu_server.presets import Preset
from tests.app.world import IMAGE, World, engine_world
from tests.fakes.models import FakeModelStore

WEIGHTS = Preset(docker_image=IMAGE)


class WatchedStore(FakeModelStore):
    """A model store that says who asks, and may be held."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, elsewhere=("llama",))
        self.asked: list[str] = []
        self.waiting = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def prepare(self, model_id: str, tell: Callable[[int, int | None], None]) -> Path:
        self.asked.append(model_id)
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        if self.error is not None:
            raise self.error
        return await super().prepare(model_id, tell)


@asynccontextmanager
async def next_in_line(tmp_path: Path) -> AsyncIterator[tuple[World, WatchedStore, asyncio.Event]]:
    """One slot that is being washed until the event is set, and a session that waits for it."""
    store = WatchedStore(tmp_path / "models")
    async with engine_world(tmp_path, models=store) as world:
        world.presets["weights"] = WEIGHTS
        _, first = world.submit()
        await world.ready(first)
        world.request("s_next", model_id="llama", preset="weights")
        assert store.asked == []
        gate = world.runtime.gates["remove"] = asyncio.Event()
        world.engine.decide(ev.SessionKillRequested(session_id=first, tenant="a"))
        yield world, store, gate
        gate.set()
        store.gate.set()
        await world.until(lambda: world.session("s_next").state not in ("waiting", "preparing"))


async def asked(store: WatchedStore, times: int) -> None:
    async with asyncio.timeout(20):
        while len(store.asked) < times:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)


async def test_who_comes_next(tmp_path: Path) -> None:
    """Its model is there, and read ahead, before its slot is free; its own start finds it."""
    async with next_in_line(tmp_path) as (world, store, gate):
        await asked(store, 1)
        while not store.hydrated:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        assert world.session("s_next").state == "waiting"
        gate.set()
        await world.ready("s_next")
        assert store.asked == ["llama", "llama"]
        assert len(world.engine._prefetches) == 0


async def test_a_start_that_comes_meanwhile(tmp_path: Path) -> None:
    """It asks for itself before the other is given up: what they share goes on."""
    async with next_in_line(tmp_path) as (world, store, gate):
        store.gate.clear()
        await asked(store, 1)
        gate.set()
        await asked(store, 2)
        assert store.waiting >= 1
        store.gate.set()
        await world.ready("s_next")
        assert world.session("s_next").state == "ready"


async def test_a_session_that_ends_meanwhile(tmp_path: Path) -> None:
    """Nobody needs it any more."""
    async with next_in_line(tmp_path) as (world, store, _):
        store.gate.clear()
        await asked(store, 1)
        world.engine.decide(ev.SessionKillRequested(session_id="s_next", tenant="a"))
        while store.waiting:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        assert world.broke == []


@pytest.mark.parametrize("how", ["refused", "crash"])
async def test_what_goes_wrong(tmp_path: Path, how: str) -> None:
    """The session that waits hears nothing of it: its own start tells what is wrong, if it still is then."""
    async with next_in_line(tmp_path) as (world, store, gate):
        store.gate.clear()
        await asked(store, 1)
        if how == "refused":
            store.refused["llama"] = (FailureCode.MODEL_DAMAGED, "sha256 does not match")
        else:
            store.error = ZeroDivisionError("a bug")
        store.gate.set()
        while len(world.engine._prefetches):  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        assert (world.session("s_next").state, world.broke) == ("waiting", [])
        store.refused.clear()
        store.error = None
        gate.set()
        await world.ready("s_next")
        assert world.session("s_next").state == "ready"
