"""Attendants: the model is made ready before the worker, and read ahead while that starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_server import attendant
from gpu_server.core import events as ev
from gpu_server.core.errors import FailureCode
from gpu_server.ports import StartRefused
from gpu_server.presets import Preset
from tests.app.world import IMAGE, engine_world

WITH_WEIGHTS = Preset(docker_image=IMAGE)
PROGRAM = Preset(docker_image=IMAGE, contract="exec")


class PlayedStore:
    """A store that waits until it is told to go on, and knows what was asked of it."""

    def __init__(
        self, folder: Path, refusal: StartRefused | None = None, hydration: Exception | None = None
    ) -> None:
        self.folder, self.refusal, self.hydration = folder, refusal, hydration
        self.go_on, self.asked = asyncio.Event(), asyncio.Event()
        self.hydrating, self.let_go = asyncio.Event(), asyncio.Event()
        self.tell: Callable[[int, int | None], None] = lambda done, total: None

    def names(self) -> tuple[str, ...]:
        return ("m",)

    async def prepare(self, model_id: str, tell: Callable[[int, int | None], None]) -> Path:
        self.tell = tell
        self.asked.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.let_go.set()
            raise
        if self.refusal is not None:
            raise self.refusal
        return self.folder

    async def hydrate(self, folder: Path) -> None:
        assert folder == self.folder
        self.hydrating.set()
        if self.hydration is not None:
            raise self.hydration
        try:
            await asyncio.Event().wait()
        finally:
            self.let_go.set()


async def test_the_model_is_read_ahead_until_the_worker_is_ready(tmp_path: Path) -> None:
    """Reading goes on while the worker loads, and ends with that."""
    store = PlayedStore(tmp_path)
    store.go_on.set()
    async with engine_world(tmp_path, models=store) as world:
        world.health = {"status": "loading"}
        _, session_id = world.submit(preset=WITH_WEIGHTS)
        async with asyncio.timeout(20):
            await store.hydrating.wait()
            await world.until(lambda: session_id in world.workers)
            assert not store.let_go.is_set()
            world.workers[session_id].health["status"] = "ready"
            await store.let_go.wait()
        await world.ready(session_id)
        assert world.machine.containers[world.container(session_id)].spec.model_path == tmp_path


async def test_how_far_a_model_is_is_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download tells of every block: readers hear of the first, and of the last, which is all there is."""
    store = PlayedStore(tmp_path)
    async with engine_world(tmp_path, models=store) as world:
        world.submit(preset=WITH_WEIGHTS)
        await store.asked.wait()
        monkeypatch.setattr(attendant, "MODEL_NEWS_SECONDS", 1e9)
        store.tell(1, 1000)
        for done in range(2, 1000):
            store.tell(done, 1000)
        store.tell(1000, 1000)
        told = [(event.stage, event.done, event.total) for event in world.told(ev.StageReached)]
        assert told == [("model", 0, None), ("model", 1000, 1000)]


async def test_a_model_that_is_refused(tmp_path: Path) -> None:
    """The session fails with the store's reason, and no container was made."""
    store = PlayedStore(tmp_path, StartRefused(FailureCode.MODEL_MISSING, "no such thing"))
    store.go_on.set()
    async with engine_world(tmp_path, models=store) as world:
        _, session_id = world.submit(preset=WITH_WEIGHTS)
        assert await world.ended(session_id) == ("failed", "start_failed", "model_missing")
        assert world.started == []


async def test_a_session_that_ends_waits_for_its_model_no_longer(tmp_path: Path) -> None:
    """Killed in the middle of a download, it lets go of it."""
    store = PlayedStore(tmp_path)
    async with engine_world(tmp_path, models=store) as world:
        _, session_id = world.submit(preset=WITH_WEIGHTS)
        await store.asked.wait()
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        async with asyncio.timeout(20):
            await store.let_go.wait()
        await world.free()


async def test_a_program_is_read_ahead_for_until_it_ends(tmp_path: Path) -> None:
    """It begins to load where a worker of sessions is ready."""
    store = PlayedStore(tmp_path)
    store.go_on.set()
    async with engine_world(tmp_path, models=store) as world:
        _, session_id = world.submit(preset=PROGRAM)
        await world.until(lambda: session_id in world.started)
        await store.hydrating.wait()
        assert not store.let_go.is_set()
        world.machine.exit(world.container(session_id), 0)
        async with asyncio.timeout(20):
            await store.let_go.wait()
        await world.free()


async def test_reading_ahead_that_fails(tmp_path: Path) -> None:
    """It costs time, and nothing else."""
    store = PlayedStore(tmp_path, hydration=RuntimeError("can't start new thread"))
    store.go_on.set()
    async with engine_world(tmp_path, models=store) as world:
        task_id, _ = world.submit(preset=WITH_WEIGHTS, prompt="x")
        events = await world.events(task_id)
        assert store.hydrating.is_set()
        assert events[-1].data["status"] == "completed"


async def test_a_reason_that_is_no_text(tmp_path: Path) -> None:
    """A file's name need not be UTF-8, and may be in the reason: the session fails with it, the node does
    not."""
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    store = PlayedStore(tmp_path, StartRefused(FailureCode.MODEL_DAMAGED, f"{name}: is not in the manifest"))
    store.go_on.set()
    async with engine_world(tmp_path, models=store) as world:
        task_id, session_id = world.submit(preset=WITH_WEIGHTS)
        assert await world.ended(session_id) == ("failed", "start_failed", "model_damaged")
        error = (await world.events(task_id))[-1].data["error"]
        assert error["message"] == "caf\\udce9.txt: is not in the manifest"
