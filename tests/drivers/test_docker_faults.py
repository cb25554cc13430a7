"""The Docker driver while its engine freezes, restarts and dies: a real engine, to which that is done."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from docker import APIClient

from gpu_server.drivers import docker_calls
from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import Contract, RunFolder, RuntimeUnreachable, WorkerExit, WorkerOutput
from tests.docker_engine import TEST_IMAGE, SpareEngine, spare_engine
from tests.drivers.played_engine import StandingClock
from tests.worker_specs import TEST_UID, worker_spec

pytestmark = [pytest.mark.docker, pytest.mark.slow]

T = TypeVar("T")

PATIENCE = 90.0
CALL_SECONDS = 2.0
STAYS = "import os, signal; os.write(1, b'up'); signal.pause()"
ECHOES = """
import os
with open("/run/gpu-worker/words") as words:
    for line in words:
        os.write(1, line.encode())
"""


@pytest.fixture(scope="module")
def spare(docker_engine: APIClient) -> Iterator[SpareEngine]:
    with spare_engine(docker_engine, TEST_IMAGE) as spare:
        yield spare


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a session, and so of a worker, that no other test has: the engine is shared."""
    return RunFolders(tmp_path / "run").create(f"s_{tmp_path.name}", TEST_UID, b"{}")


@contextlib.asynccontextmanager
async def opened(
    spare: SpareEngine, folder: RunFolder, call_timeout: float = 30
) -> AsyncIterator[tuple[DockerRuntime, asyncio.Queue[WorkerExit]]]:
    exits: asyncio.Queue[WorkerExit] = asyncio.Queue()
    runtime = DockerRuntime(folder.session_id, spare.host, call_timeout=call_timeout)
    async with asyncio.timeout(PATIENCE):
        await runtime.open(exits.put_nowait)
        try:
            yield runtime, exits
        finally:
            await runtime.close()


async def until_reachable(ask: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await ask()
        except RuntimeUnreachable:
            await asyncio.sleep(0.05)


class Reader:
    """Reads an output to its end, and tells how far it is."""

    def __init__(self) -> None:
        self.text = b""
        self._more = asyncio.Event()

    async def read(self, output: WorkerOutput) -> None:
        async for piece in output:
            self.text += piece.data
            self._more.set()

    async def until(self, text: bytes) -> None:
        while self.text != text:
            self._more.clear()
            await self._more.wait()


async def test_a_frozen_engine_fails_calls_fast_until_it_goes_on(
    spare: SpareEngine, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls end at their limit, later ones at once; when the engine goes on, so do the calls, and nothing was
    taken for gone."""
    async with opened(spare, folder, CALL_SECONDS) as (runtime, exits):
        worker = await until_reachable(lambda: runtime.create(worker_spec(folder, STAYS)))
        await until_reachable(lambda: runtime.start(worker.name))
        spare.freeze()
        try:
            # A clock that stands, and is behind: until the engine goes on no call is due again, then one is.
            with monkeypatch.context() as patched:
                patched.setattr(docker_calls, "time", StandingClock(time.monotonic() - 60))
                async with asyncio.timeout(PATIENCE / 3):
                    calls = (runtime.list_workers() for _ in range(3))
                    found = await asyncio.gather(*calls, return_exceptions=True)
                    assert all(isinstance(one, RuntimeUnreachable) for one in found)
                    with pytest.raises(RuntimeUnreachable):
                        await runtime.ping(CALL_SECONDS)
                    for call in (runtime.list_workers, lambda: runtime.remove(worker.name, grace=1)):
                        with pytest.raises(RuntimeUnreachable, match="has not answered for"):
                            await call()
        finally:
            spare.thaw()
        (seen,) = await until_reachable(runtime.list_workers)
        assert (seen.name, seen.running) == (worker.name, True)
        await until_reachable(lambda: runtime.remove(worker.name, grace=0))
        assert (await exits.get()).exit_code == 137


async def test_workers_outlive_an_engine_that_restarts_with_live_restore(
    spare: SpareEngine, folder: RunFolder
) -> None:
    """They run on, can be taken up, and their exits are heard."""
    await asyncio.to_thread(spare.restart, live_restore=True)
    async with opened(spare, folder) as (runtime, exits):
        worker = await runtime.create(worker_spec(folder, STAYS))
        await runtime.start(worker.name)
        await anext(worker.output)
        await asyncio.to_thread(spare.restart, live_restore=True)
        assert [piece async for piece in worker.output] == []
        found = await until_reachable(lambda: runtime.reattach(worker.name))
        assert found is not None
        assert (found.container_id, found.exit) == (worker.container_id, None)
        assert exits.empty()
        await runtime.remove(worker.name, grace=PATIENCE)
        heard = await exits.get()
        assert (heard.name, heard.exit_code) == (worker.name, 143)
        assert [piece async for piece in found.output] == []


@pytest.mark.parametrize("how", ["restarts", "dies"])
async def test_output_from_the_start_goes_on_when_the_engine_does(
    spare: SpareEngine, folder: RunFolder, how: str
) -> None:
    """An exec worker is read across its engine's absence: what it wrote before, meanwhile and afterwards
    comes in order and once. (Only what the engine itself had in hand is lost with it.)"""
    await asyncio.to_thread(spare.restart, live_restore=True)
    os.mkfifo(folder.share / "words")
    (folder.share / "words").chmod(0o666)
    async with opened(spare, folder) as (runtime, exits):
        worker = await runtime.create(worker_spec(folder, ECHOES, contract=Contract.EXEC))
        await runtime.start(worker.name)
        found = await runtime.reattach(worker.name, from_start=True)
        assert found is not None
        reader = Reader()
        words = await asyncio.to_thread(os.open, folder.share / "words", os.O_WRONLY)
        async with asyncio.TaskGroup() as group:
            group.create_task(reader.read(found.output), name="reader")
            os.write(words, b"before\n" * 100)
            await reader.until(b"before\n" * 100)
            await asyncio.to_thread(spare.stop if how == "restarts" else spare.kill)
            os.write(words, b"meanwhile\n" * 100)
            await asyncio.to_thread(spare.start, live_restore=True)
            os.write(words, b"afterwards\n" * 100)
            os.close(words)
        assert reader.text == b"before\n" * 100 + b"meanwhile\n" * 100 + b"afterwards\n" * 100
        assert (await exits.get()).exit_code == 0


async def test_workers_that_a_killed_engine_takes_with_it_are_heard(
    spare: SpareEngine, folder: RunFolder
) -> None:
    """An engine that dies and comes back without live restore ends its workers; each exit is told once."""
    await asyncio.to_thread(spare.restart)
    async with opened(spare, folder) as (runtime, exits):
        names = [f"{folder.session_id}-{fence}" for fence in (1, 2)]
        for name in names:
            await runtime.create(worker_spec(folder, STAYS, name=name))
            await runtime.start(name)
        await asyncio.to_thread(spare.kill)
        with pytest.raises(RuntimeUnreachable):
            await runtime.list_workers()
        await asyncio.to_thread(spare.start)
        heard = [await exits.get() for _ in names]
        assert sorted(one.name for one in heard) == names
        assert all(one.exit_code != 0 for one in heard)
        found = await until_reachable(lambda: runtime.reattach(names[0]))
        assert found is not None
        assert found.exit in heard
        for name in names:
            await runtime.remove(name, grace=1)
        assert await runtime.list_workers() == ()
        assert exits.empty()
