"""What the contract of container runtimes is tried on: the fake, processes, and a real Docker engine."""

from __future__ import annotations

import asyncio
import os
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
    FoundWorker,
    Output,
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
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # or one just before the wait would be slept over
sys.stdout.write("up")
signal.sigwait([signal.SIGTERM])
sys.exit(3)
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

# Waits for a word, says it, and ends: see `Stage.say`.
WAITS_CODE = """
import os, sys
sys.stdout.write("up")
with open(os.path.dirname(os.environ["GPU_WORKER_SOCKET"]) + "/word") as pipe:
    word = pipe.read()
sys.stdout.write(word); sys.stderr.write(word)
raise SystemExit(5)
"""
LINES = 300
COUNTS_CODE = f"""
import os, sys
for number in range({LINES}):
    sys.stdout.write(f"out {{number:04}} " + "x" * number * 7 + "\\n")
    sys.stderr.write(f"err {{number:04}}\\n")
sys.stdout.write("up\\n")
with open(os.path.dirname(os.environ["GPU_WORKER_SOCKET"]) + "/word") as pipe:
    word = pipe.read()
sys.stdout.write(word); sys.stderr.write(word)
raise SystemExit(5)
"""
COUNTED = {
    "stdout": "".join(f"out {number:04} {'x' * number * 7}\n" for number in range(LINES)).encode() + b"up\n",
    "stderr": "".join(f"err {number:04}\n" for number in range(LINES)).encode(),
}

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
    "waits": (WAITS_CODE, FakeScript(output=UP)),
    "counts": (
        COUNTS_CODE,
        FakeScript(output=(Output("stderr", COUNTED["stderr"]), Output("stdout", COUNTED["stdout"]))),
    ),
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
    fake: FakeEngine | None
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
        if self.fake is not None:
            changes["image"] = script
        else:
            os.mkfifo(folder.share / "word")
            (folder.share / "word").chmod(0o666)
        return worker_spec(folder, code, **changes)

    async def say(self, spec: WorkerSpec, word: str) -> None:
        """Let a worker that waits say `word` on both streams and end with code 5."""
        if self.fake is None:
            await asyncio.to_thread((spec.folder.share / "word").write_text, word)
            return
        self.fake.say(spec.name, word.encode())
        self.fake.say(spec.name, word.encode(), "stderr")
        self.fake.exit(spec.name, 5)

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
            fake=engine if request.param == "fake" else None,
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


async def reattached(runtime: ContainerRuntime, name: str, *, from_start: bool = False) -> FoundWorker:
    found = await runtime.reattach(name, from_start=from_start)
    assert found is not None
    assert found.name == name
    return found


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
