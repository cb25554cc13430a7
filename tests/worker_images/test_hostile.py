"""The hostile worker as a plain process: it misbehaves as named, and never harms the machine it runs on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WORKER = Path(__file__).parents[1] / "images/hostile/worker.py"
URL = "http://worker"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """`async with start(mode) as (process, http)`: once its socket is there, unless `serves=False`."""

    @contextlib.asynccontextmanager
    async def started(
        mode: str, *, serves: bool = True, **env: str
    ) -> AsyncIterator[tuple[asyncio.subprocess.Process, aiohttp.ClientSession]]:
        path = tmp_path / "worker.sock"
        inherited = {name: value for name, value in os.environ.items() if name != "HOSTILE_IMAGE"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(WORKER),
            env={
                **inherited,
                "HOSTILE_MODE": mode,
                "GPU_WORKER_SOCKET": str(path),
                "GPU_SESSION_ID": "s_1",
                **env,
            },
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            while serves and path.name not in os.listdir(path.parent):
                assert process.returncode is None
                await asyncio.sleep(0)
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(path))) as http:
                yield process, http
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    return started


def size_of(path: Path) -> int:
    return path.stat().st_size


async def task(http: aiohttp.ClientSession) -> bytes:
    async with http.post(f"{URL}/tasks/t", json={"metadata": {}}) as answer:
        return await answer.read()


async def test_outside_its_image_the_probe_only_looks(start: Callable[..., Any]) -> None:
    """Privileged calls, writes and forks are left out where a success would hit the machine itself."""
    async with start("probe") as (_, http):
        frame = (await task(http)).decode().split("\n\n")[0]
    report = json.loads(json.loads(frame.split("\n")[2].removeprefix("data: "))["text"])
    assert report["may_harm"] is False
    for name in ("syscalls", "writable", "forks", "setuid_files", "cgroup_write", "sysctl_write"):
        assert report[name] is None
    assert set(report["sockets"]) >= {"AF_VSOCK", "AF_ALG"}
    assert report["uid"] == os.getuid()


@pytest.mark.parametrize("mode", ["fork_bomb", "memory_bomb"])
async def test_bombs_refuse_to_run_outside_the_image(start: Callable[..., Any], mode: str) -> None:
    """They exit at once and say why."""
    async with start(mode, serves=False) as (process, _):
        assert await process.wait() == 1
        assert b"hostile image only" in await process.stderr.read()


@pytest.mark.parametrize(
    ("mode", "status", "session"),
    [
        ("probe", "ready", "s_1"),
        ("never_ready", "loading", "s_1"),
        ("wrong_session", "ready", "s_00000000000000000000000000"),
    ],
)
async def test_health(start: Callable[..., Any], mode: str, status: str, session: str) -> None:
    """Health is by the contract, but for what the mode is about."""
    async with start(mode) as (_, http), http.get(f"{URL}/health") as answer:
        health = await answer.json()
    assert (health["status"], health["session_id"]) == (status, session)


async def test_exit(start: Callable[..., Any]) -> None:
    """It gives up with code 3 after a line on stderr."""
    async with start("exit", serves=False) as (process, _):
        assert await process.wait() == 3
        assert b"gives up" in await process.stderr.read()


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("bad_ids", [b"id: 1\n", b"id: 2\n", b"id: 4\n", b"event: end"]),
        ("bad_event", [b"event: task_finish"]),
        ("no_end", [b"id: 1\n"]),
    ],
)
async def test_broken_streams(start: Callable[..., Any], mode: str, found: list[bytes]) -> None:
    """Each stream breaks the contract in its own way."""
    async with start(mode) as (_, http):
        data = await task(http)
    assert all(text in data for text in found)
    assert (b"event: end" in data) == (mode != "no_end")


@pytest.mark.parametrize(
    ("mode", "path"), [("endless_frame", "tasks/t/events"), ("endless_health", "health")]
)
async def test_endless_answers(start: Callable[..., Any], mode: str, path: str) -> None:
    """More than 1 MiB comes, and no end of it."""
    async with start(mode) as (_, http), http.get(f"{URL}/{path}") as answer:
        data = await answer.content.readexactly(2 << 20)
    assert b"\n\n" not in data


async def test_what_it_leaves_in_the_run_folder(start: Callable[..., Any], tmp_path: Path) -> None:
    """A link, a folder, too many bytes, too many files."""
    socket = tmp_path / "worker.sock"
    async with start("symlink"):
        assert os.readlink(socket) == "/etc/passwd"
    os.unlink(socket)
    async with start("folder"):
        assert os.listdir(socket) == []
    os.rmdir(socket)
    async with start("flood"):
        assert size_of(tmp_path / "flood") == 8 << 20
    os.unlink(socket)
    async with start("many_files"):
        assert sum(len(below) + len(files) for _, below, files in os.walk(tmp_path)) > 5000


async def test_slow_header(start: Callable[..., Any]) -> None:
    """It takes the connection and says nothing."""
    async with start("slow_header") as (_, http):
        with pytest.raises(TimeoutError):
            await http.get(f"{URL}/health", timeout=aiohttp.ClientTimeout(total=0.2))
