"""Output that is read again from the engine's log."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from gpu_server.drivers import docker_kept
from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.docker_kept import KeptOutput, OpenLog, logged_size
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import Contract, Output, OutputLost, RunFolder, RuntimeUnreachable, WorkerExit
from tests.worker_specs import TEST_UID, worker_spec

PATIENCE = 60.0
NASTY = r"""
import os, random
dice = random.Random(1)
high = "\u00e9\u2028\u2029\ufffd\U0001f600".encode()
kinds = [bytes(range(256)), b'"\\<>&\t\x00', high, b"\xff\xc3", b" a"]
for number in range(2000):
    kind = dice.choice(kinds)
    line = bytes(dice.choice(kind) for _ in range(dice.choice([0, 1, 10, 100])))
    os.write(dice.choice([1, 2]), line.replace(b"\n", b"") + b"\n")
os.write(1, high * 9000 + b"\n" + b"\x01" * 40000)
"""


def log(*frames: tuple[int, bytes], is_last: bool = False) -> OpenLog:
    """A log as the engine sends it, to the end."""
    engine, ours = socket.socketpair()
    with engine:
        engine.sendall(b"".join(struct.pack(">BxxxL", stream, len(data)) + data for stream, data in frames))
    return OpenLog(connection=ours, is_last=is_last)


class Again:
    """Gives one log after the other; an error in their place is raised."""

    def __init__(self, *logs: OpenLog | Exception) -> None:
        self._logs = list(logs)

    async def __call__(self) -> OpenLog:
        found = self._logs.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


async def test_what_was_taken_already_is_passed_over() -> None:
    """A connection may end anywhere, and the engine may be away: each byte comes once, to the last."""
    lines = [(1, b"one\n"), (2, b"two\n"), (1, b"three\n"), (2, b"four")]
    output = KeptOutput(
        log(*lines[:1]),
        Again(
            log(lines[0], (2, b"tw")),
            RuntimeUnreachable("away"),
            log(),
            log(*lines[:3]),
            log(*lines, is_last=True),
        ),
    )
    async with asyncio.timeout(PATIENCE):
        pieces = [piece async for piece in output]
    assert pieces == [
        Output("stdout", b"one\n"),
        Output("stderr", b"tw"),
        Output("stderr", b"o\n"),
        Output("stdout", b"three\n"),
        Output("stderr", b"four"),
    ]


async def test_more_than_is_kept_is_an_error_and_not_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the log may have dropped something, reading ends with an error instead of going on."""
    monkeypatch.setattr(docker_kept, "LOG_BYTES", 1000)
    output = KeptOutput(log(*[(1, b"x" * 27 + b"\n")] * 20), Again())
    for _ in range(9):
        assert (await anext(output)).stream == "stdout"
    with pytest.raises(OutputLost):
        await anext(output)


async def test_a_log_that_was_lost_while_its_reader_was_away_is_an_error() -> None:
    """What opening the log again raises reaches the reader."""
    output = KeptOutput(log(), Again(OutputLost("too much")))
    with pytest.raises(OutputLost):
        await anext(output)


async def test_closing_ends_a_reader_that_waits_for_the_engine() -> None:
    """Also while the log is being opened again, a reader that waits sees the end."""
    waits = asyncio.Event()

    async def never() -> OpenLog:
        waits.set()
        await asyncio.Event().wait()
        raise AssertionError

    output = KeptOutput(log((1, b"up")), never)
    assert (await anext(output)).data == b"up"
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        reader = group.create_task(anext(output, None), name="reader")
        await waits.wait()
        output.close()
        output.close()
    assert reader.result() is None


# -- the engine's own -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolders(tmp_path / "run").create("s_1", TEST_UID, b"{}")


@pytest.fixture
async def ran(
    docker_engine: APIClient, folder: RunFolder, tmp_path: Path
) -> AsyncIterator[tuple[DockerRuntime, Any]]:
    """A runtime, and a function that runs an exec worker to its end and returns what inspecting it tells."""
    exits: asyncio.Queue[WorkerExit] = asyncio.Queue()
    runtime = DockerRuntime(f"kept-{tmp_path.name}")

    async def run(code: str) -> dict[str, Any]:
        worker = await runtime.create(worker_spec(folder, code, contract=Contract.EXEC))
        await runtime.start(worker.name)
        worker.output.close()
        assert (await exits.get()).exit_code == 0
        inspect: dict[str, Any] = docker_engine.inspect_container(worker.container_id)
        return inspect

    async with asyncio.timeout(PATIENCE):
        await runtime.open(exits.put_nowait)
        try:
            yield runtime, run
        finally:
            await runtime.remove("s_1-1", grace=0)
            await runtime.close()


@pytest.mark.docker
async def test_a_size_is_never_less_than_the_logs_own(ran: tuple[DockerRuntime, Any]) -> None:
    """Whatever bytes a program writes: what is counted is at least what the engine wrote, and little more."""
    runtime, run = ran
    try:
        size = os.stat((await run(NASTY))["LogPath"]).st_size
    except OSError:
        pytest.skip("the engine's files cannot be read here")
    found = await runtime.reattach("s_1-1", from_start=True)
    assert found is not None
    counted = sum([logged_size(piece.data) async for piece in found.output])
    assert size <= counted < size * 1.1


@pytest.mark.docker
async def test_a_log_that_the_engine_has_moved_away_is_lost(ran: tuple[DockerRuntime, Any]) -> None:
    """A program that wrote more than is kept cannot be read from its start, and that is said at once."""
    runtime, run = ran
    inspect = await run("import sys\nfor _ in range(100_000): sys.stdout.write('x' * 200 + '\\n')")
    with pytest.raises(OutputLost):
        await runtime.reattach("s_1-1", from_start=True)
    found = await runtime.reattach("s_1-1")
    assert found is not None
    assert found.container_id == inspect["Id"]
