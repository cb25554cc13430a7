"""A Docker engine is restarted, killed and frozen under a service at work: a spare one, made to be broken."""

from __future__ import annotations

import asyncio
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from docker import APIClient

from gpu_server.core.errors import FailureCode
from gpu_server.drivers.docker_api import connect
from tests.docker_engine import SpareEngine, spare_engine
from tests.e2e.harness import ECHO_IMAGE, HOSTILE_IMAGE, Service, until
from tests.e2e.test_chaos import SETTINGS, Chaos, account

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]

# What the engine's absence may cost: a start that was under way, a program that ended then, and, without live
# restore, workers.
ENDS = frozenset(
    {
        FailureCode.RUNTIME_UNREACHABLE,
        FailureCode.START_FAILED,
        FailureCode.IMAGE_MISSING,
        FailureCode.SERVICE_RESTARTED,
    }
)
# A worker that is asked to stop by the engine says that its tasks are cancelled.
WORKERS = ENDS | {FailureCode.WORKER_EXITED, FailureCode.TASK_CANCELLED}
# A new engine also ends what the old one had started and not yet written down that it runs.
STARTS = WORKERS | {FailureCode.START_TIMEOUT}


@pytest.fixture(scope="module")
def spare(engine_with_images: APIClient) -> Iterator[SpareEngine]:
    """An engine that may be broken."""
    with spare_engine(engine_with_images, ECHO_IMAGE, HOSTILE_IMAGE) as engine:
        yield engine


@pytest.fixture
def own(spare: SpareEngine) -> Iterator[Service]:
    """A service on the spare engine; nothing is left of it."""
    root = Path(tempfile.mkdtemp(prefix="gs-e2e-", dir="/dev/shm"))
    root.chmod(0o711)
    with closing(connect(spare.host, 30)) as client:
        service = Service("docker", root, client, **SETTINGS, DOCKER_HOST=spare.host)
        try:
            yield service.start()
            service.close()
            assert service.residue() == []
        finally:
            service.close()
            shutil.rmtree(root)


async def test_it_is_restarted_with_live_restore(own: Service, spare: SpareEngine) -> None:
    """Sessions that were ready live on, their streams too; only a start, or a program that ended just then,
    may fail."""
    await asyncio.to_thread(spare.restart, live_restore=True)
    chaos = Chaos(own, secrets.randbits(32), ENDS, STARTS)

    async def trouble() -> None:
        dice = random.Random(chaos.seed)
        for _ in range(4):
            await asyncio.sleep(dice.uniform(1, 3))
            await asyncio.to_thread(spare.restart, live_restore=True)

    await chaos.run(trouble(), 400)
    await account(own, chaos)
    assert "shared" in chaos.done


async def test_it_is_killed_and_its_workers_with_it(own: Service, spare: SpareEngine) -> None:
    """Without live restore a new engine ends the workers of the old one: streams fail honestly, slots are
    washed, and the service serves on."""
    await asyncio.to_thread(spare.restart)
    chaos = Chaos(own, secrets.randbits(32), WORKERS, STARTS)

    async def trouble() -> None:
        for end in (spare.kill, spare.stop, spare.kill):
            await until("workers run", lambda: _running(own) >= 8, within=60)
            await asyncio.to_thread(end)
            await asyncio.to_thread(spare.start)

    await chaos.run(trouble(), 400)
    async with own.caller() as caller:
        assert (await caller.run(prompt="and on it goes")).text == "and on it goes"
    await account(own, chaos)
    assert any("worker_exited" in end for end in chaos.done)


async def test_it_hangs(own: Service, spare: SpareEngine) -> None:
    """While it hangs, what runs is served and nobody is started; /health says so; then all goes on."""
    async with own.caller() as caller:
        running = await caller.working(count=400, delay_ms=50)
        await asyncio.to_thread(spare.freeze)
        try:
            await until("/health says so", lambda: not _health(own)["runtime_reachable"], within=60)
            assert (_health(own)["status"], _health(own)["ready"]) == ("degraded", True)
            waiting = await caller.started(prompt="patience")
            assert waiting.of("connection")[0]["status"] == "queued"
            assert (await caller.run(session=running.session_id, prompt="x", seconds=60)).text == "x"
            assert (await running.finish())["status"] == "completed"
        finally:
            await asyncio.to_thread(spare.thaw)
        assert (await waiting.finish())["status"] == "completed"
        await until("/health is well", lambda: _health(own)["status"] == "ok")
    await own.settle()


def _health(service: Service) -> dict[str, object]:
    health = service.health()
    assert health is not None
    return health


def _running(service: Service) -> int:
    return sum(container["State"] == "running" for container in service.containers())
