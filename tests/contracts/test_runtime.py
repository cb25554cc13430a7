"""One contract for every container runtime: the fake, processes, and a real Docker engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.process import ProcessRuntime
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import (
    ContainerRuntime,
    CreatedWorker,
    Output,
    RuntimeUnreachable,
    StartRefused,
    WorkerExit,
    WorkerSpec,
)
from tests.fakes.runtime import FakeEngine, FakeRuntime, FakeScript
from tests.worker_specs import TEST_UID, worker_spec

PATIENCE = 30.0
LOUD_BYTES = 4_000_000
HELLO_CODE = """
import sys
sys.stdout.write("to stdout"); sys.stderr.write("to stderr")
"""
STAYS_CODE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
sys.stdout.write("up")
while True: signal.pause()
"""
STUBBORN_CODE = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.write("up")
while True: signal.pause()
"""
LOUD_CODE = f"""
import sys
sys.stdout.write("x" * {LOUD_BYTES})
"""

UP = (Output("stdout", b"up"),)
SCRIPTS: dict[str, tuple[str, FakeScript]] = {
    "hello": (
        HELLO_CODE,
        FakeScript(output=(Output("stdout", b"to stdout"), Output("stderr", b"to stderr")), exit_code=0),
    ),
    "seven": ("raise SystemExit(7)", FakeScript(exit_code=7)),
    "killed": ("import os; os.kill(os.getpid(), 9)", FakeScript(exit_code=137)),
    "stays": (STAYS_CODE, FakeScript(output=UP, on_term=3)),
    "stubborn": (STUBBORN_CODE, FakeScript(output=UP, on_term=None)),
    "loud": (LOUD_CODE, FakeScript(output=(Output("stdout", b"x" * LOUD_BYTES),), exit_code=0)),
}


class Listener:
    """Takes a runtime's exits, to be waited for."""

    def __init__(self) -> None:
        self.heard: list[WorkerExit] = []
        self._arrived: asyncio.Queue[WorkerExit] = asyncio.Queue()

    def __call__(self, worker_exit: WorkerExit) -> None:
        self.heard.append(worker_exit)
        self._arrived.put_nowait(worker_exit)

    async def next(self) -> WorkerExit:
        async with asyncio.timeout(PATIENCE):
            return await self._arrived.get()


@dataclass(kw_only=True)
class Stage:
    """A runtime under test, on a machine that outlives it."""

    make: Callable[[str], ContainerRuntime]
    folders: RunFolders
    is_fake: bool
    stack: AsyncExitStack
    instance: str
    used: set[str] = field(default_factory=set)

    async def open(self, instance: str | None = None) -> tuple[ContainerRuntime, Listener]:
        runtime, listener = self.make(instance or self.instance), Listener()
        self.used.add(instance or self.instance)
        await runtime.open(listener)
        self.stack.push_async_callback(runtime.close)
        return runtime, listener

    def spec(self, script: str, session_id: str = "s_1", **changes: Any) -> WorkerSpec:
        folder = self.folders.create(session_id, TEST_UID, b"{}")
        code, _ = SCRIPTS[script]
        if self.is_fake:
            changes["image"] = script
        return worker_spec(folder, code, **changes)

    async def clean(self) -> None:
        for instance in self.used:
            runtime, _ = await self.open(instance)
            for worker in await runtime.list_workers():
                await runtime.remove(worker.name, grace=0)
            assert await runtime.list_workers() == ()


@pytest.fixture(params=["fake", "process", pytest.param("docker", marks=pytest.mark.docker)])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    instance = f"contract-{tmp_path.name}"
    engine = FakeEngine(images={name: script for name, (_, script) in SCRIPTS.items()})
    makers: dict[str, Callable[[str], ContainerRuntime]] = {
        "fake": lambda name: FakeRuntime(engine, name),
        "process": lambda name: ProcessRuntime(name, tmp_path / "run", tmp_path),
        "docker": DockerRuntime,
    }
    client: APIClient | None = None
    if request.param == "docker":
        client = request.getfixturevalue("docker_engine")
    async with AsyncExitStack() as stack:
        stage = Stage(
            make=makers[request.param],
            folders=RunFolders(tmp_path / "run"),
            is_fake=request.param == "fake",
            stack=stack,
            instance=instance,
        )
        try:
            yield stage
        finally:
            await stage.clean()
    if client is not None:
        for used in stage.used:
            assert client.containers(all=True, filters={"label": f"gpu-server.instance={used}"}) == []


async def read_all(worker: CreatedWorker) -> dict[str, bytes]:
    found = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(PATIENCE):
        async for piece in worker.output:
            found[piece.stream] += piece.data
    return found


async def until_up(worker: CreatedWorker) -> None:
    async with asyncio.timeout(PATIENCE):
        seen = b""
        while seen != b"up":
            seen += (await anext(worker.output)).data


async def started(runtime: ContainerRuntime, spec: WorkerSpec) -> CreatedWorker:
    worker = await runtime.create(spec)
    await runtime.start(spec.name)
    return worker


async def test_output_is_attached_before_the_start_and_ends_with_the_worker(stage: Stage) -> None:
    """Every byte of both streams arrives, also of a worker that ends at once."""
    runtime, listener = await stage.open()
    spec = stage.spec("hello")
    worker = await started(runtime, spec)
    assert await read_all(worker) == {"stdout": b"to stdout", "stderr": b"to stderr"}
    heard = await listener.next()
    assert heard == WorkerExit(name=spec.name, session_id="s_1", exit_code=0, oom_killed=False)


@pytest.mark.parametrize(("script", "code"), [("seven", 7), ("killed", 137)])
async def test_an_exit_is_heard_once_with_its_code(stage: Stage, script: str, code: int) -> None:
    """Exit codes follow the shell: n, or 128 + the signal; removing the worker tells nothing again."""
    runtime, listener = await stage.open()
    spec = stage.spec(script)
    await started(runtime, spec)
    assert (await listener.next()).exit_code == code
    await runtime.remove(spec.name, grace=1)
    marker = stage.spec("seven", "s_2")
    await started(runtime, marker)
    assert (await listener.next()).name == marker.name
    assert [heard.name for heard in listener.heard] == [spec.name, marker.name]


async def test_a_created_worker_is_listed_and_runs_only_after_start(stage: Stage) -> None:
    """The list shows a worker from its creation on, with session and fence, and whether it runs."""
    runtime, _ = await stage.open()
    spec = stage.spec("stays", fence=7)
    worker = await runtime.create(spec)
    (seen,) = await runtime.list_workers()
    assert (seen.name, seen.session_id, seen.fence) == (spec.name, "s_1", 7)
    assert seen.container_id == worker.container_id
    assert not seen.running
    await runtime.start(spec.name)
    await until_up(worker)
    (seen,) = await runtime.list_workers()
    assert seen.running


async def test_creating_again_replaces_a_worker_that_never_started(stage: Stage) -> None:
    """An interrupted start can be repeated under the same name, also by a new life of the service."""
    runtime, _ = await stage.open()
    spec = stage.spec("hello")
    await runtime.create(spec)
    await runtime.close()
    runtime, _ = await stage.open()
    worker = await started(runtime, spec)
    assert (await read_all(worker))["stdout"] == b"to stdout"
    assert len(await runtime.list_workers()) == 1


async def test_a_name_that_was_started_is_refused(stage: Stage) -> None:
    """A worker that runs or ran is never replaced: its name is its fence."""
    runtime, listener = await stage.open()
    spec = stage.spec("seven")
    await started(runtime, spec)
    await listener.next()
    with pytest.raises(StartRefused) as refused:
        await runtime.create(spec)
    assert refused.value.code == "start_failed"


async def test_starting_what_was_not_created_is_refused(stage: Stage) -> None:
    """A start needs a worker of that name."""
    runtime, _ = await stage.open()
    with pytest.raises(StartRefused) as refused:
        await runtime.start("s_none-1")
    assert refused.value.code == "start_failed"


async def test_removing_lets_the_worker_end_by_itself_first(stage: Stage) -> None:
    """SIGTERM comes first, and a worker that obeys it is not killed; afterwards nothing is there."""
    runtime, listener = await stage.open()
    spec = stage.spec("stays")
    worker = await started(runtime, spec)
    await until_up(worker)
    await runtime.remove(spec.name, grace=PATIENCE)
    assert (await listener.next()).exit_code == 3
    assert await runtime.list_workers() == ()
    assert await read_all(worker) == {"stdout": b"", "stderr": b""}


@pytest.mark.parametrize("grace", [0.0, 0.2])
async def test_removing_kills_what_does_not_end(stage: Stage, grace: float) -> None:
    """A worker that ignores SIGTERM is gone soon after its grace."""
    runtime, listener = await stage.open()
    spec = stage.spec("stubborn")
    worker = await started(runtime, spec)
    await until_up(worker)
    async with asyncio.timeout(PATIENCE):
        await runtime.remove(spec.name, grace=grace)
    assert (await listener.next()).exit_code == 137
    assert await runtime.list_workers() == ()


async def test_removing_is_idempotent(stage: Stage) -> None:
    """A worker that never was, never started, or is gone already is removed without complaint."""
    runtime, _ = await stage.open()
    await runtime.remove("s_none-1", grace=1)
    spec = stage.spec("stays")
    worker = await runtime.create(spec)
    await runtime.remove(spec.name, grace=1)
    await runtime.remove(spec.name, grace=1)
    assert await read_all(worker) == {"stdout": b"", "stderr": b""}
    assert await runtime.list_workers() == ()


async def test_another_instance_sees_and_touches_nothing_of_ours(stage: Stage) -> None:
    """Two services on one machine do not list, hear or remove each other's workers."""
    runtime, listener = await stage.open()
    other, other_listener = await stage.open(f"{stage.instance}-other")
    spec = stage.spec("stays")
    worker = await started(runtime, spec)
    await until_up(worker)
    assert await other.list_workers() == ()
    await other.remove(spec.name, grace=0)
    (seen,) = await runtime.list_workers()
    assert seen.running
    await runtime.remove(spec.name, grace=0)
    await listener.next()
    assert other_listener.heard == []


async def test_workers_outlive_the_service_and_are_found_by_the_next(stage: Stage) -> None:
    """A new life lists a running worker, hears its exit, and can remove it by name."""
    first, _ = await stage.open()
    spec = stage.spec("stays")
    worker = await started(first, spec)
    await until_up(worker)
    await first.close()
    second, listener = await stage.open()
    (seen,) = await second.list_workers()
    assert (seen.name, seen.running) == (spec.name, True)
    await second.remove(spec.name, grace=PATIENCE)
    assert (await listener.next()).exit_code == 3
    assert await second.list_workers() == ()


async def test_an_exit_from_before_is_heard_by_the_next_life(stage: Stage) -> None:
    """An exit that a service was not there to hear is told to the next one, as missed."""
    first, listener = await stage.open()
    spec = stage.spec("seven")
    await started(first, spec)
    await listener.next()
    await first.close()
    _second, listener = await stage.open()
    heard = await listener.next()
    assert (heard.name, heard.exit_code) == (spec.name, 7)


async def test_a_loud_worker_loses_nothing(stage: Stage) -> None:
    """Output far beyond any buffer arrives whole."""
    runtime, _ = await stage.open()
    worker = await started(runtime, stage.spec("loud"))
    assert await read_all(worker) == {"stdout": b"x" * LOUD_BYTES, "stderr": b""}


async def test_closing_the_output_ends_a_reader_that_waits(stage: Stage) -> None:
    """Output can be let go of at any time, twice, and the worker goes on."""
    runtime, _ = await stage.open()
    worker = await started(runtime, stage.spec("stays"))
    await until_up(worker)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        reader = group.create_task(read_all(worker), name="reader")
        asyncio.get_running_loop().call_soon(worker.output.close)
    assert reader.result() == {"stdout": b"", "stderr": b""}
    worker.output.close()
    (seen,) = await runtime.list_workers()
    assert seen.running


async def test_the_fake_can_be_slow_wrong_and_unreachable() -> None:
    """The switches of the fake do what tests of the engine rely on."""
    runtime = FakeRuntime()
    runtime.unreachable = True
    with pytest.raises(RuntimeUnreachable):
        await runtime.list_workers()
    runtime.unreachable = False
    runtime.wrong["require_image"] = StartRefused("image_missing", "no")
    with pytest.raises(StartRefused):
        await runtime.require_image("any")
    gate = runtime.gates["list_workers"] = asyncio.Event()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        waiting = group.create_task(runtime.list_workers(), name="list")
        asyncio.get_running_loop().call_soon(gate.set)
    assert waiting.result() == ()
