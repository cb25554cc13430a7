"""The echo worker as the process that it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ROOT = Path(__file__).parents[2]
URL = "http://worker"
NUMBERS = itertools.count()


@dataclass
class Running:
    process: asyncio.subprocess.Process
    http: aiohttp.ClientSession
    path: Path

    async def health(self) -> dict[str, Any]:
        async with self.http.get(f"{URL}/health") as answer:
            return await answer.json()

    def post(self, task_id: str, **metadata: Any) -> Any:
        return self.http.post(f"{URL}/tasks/{task_id}", json={"metadata": metadata})

    async def run(self, **metadata: Any) -> list[tuple[str, dict[str, Any]]]:
        async with self.post(f"t{next(NUMBERS)}", **metadata) as answer:
            return parse(await answer.read())

    async def until(self, status: str) -> dict[str, Any]:
        while (health := await self.health())["status"] != status:
            pass
        return health


def parse(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(event, data) of each numbered frame; the ids must be 1, 2, 3."""
    *frames, rest = stream.decode().split("\n\n")
    assert rest == ""
    found = []
    for number, frame in enumerate(frames, 1):
        first, event, data = frame.split("\n")
        assert first == f"id: {number}"
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    @contextlib.asynccontextmanager
    async def started(**env: str) -> AsyncIterator[Running]:
        path = tmp_path / "worker.sock"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "worker_images/echo/worker.py"),
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "worker_images/sdk"),
                "GPU_WORKER_SOCKET": str(path),
                "GPU_SESSION_ID": "s_echo",
                **env,
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            while not path.exists():
                assert process.returncode is None, (await process.communicate())[1].decode()
                await asyncio.sleep(0)
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(path))) as http:
                yield Running(process, http, path)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    return started


async def test_a_prompt_comes_back(start: Callable[..., Any]) -> None:
    """The deltas joined are the prompt, to the byte, and the text after them is the prompt."""
    async with start() as worker:
        assert (await worker.until("ready"))["session_id"] == "s_echo"
        for prompt in (" hello  big\n world ", "Grüße 你好", "", " "):
            *deltas, text, end = await worker.run(prompt=prompt)
            assert "".join(data["delta"] for event, data in deltas if event == "text_delta") == prompt
            assert text == ("text", {"text": prompt})
            assert end == ("end", {"status": "completed", "usage": {"deltas": len(deltas)}})


async def test_count_and_log(start: Callable[..., Any]) -> None:
    """`count` gives so many deltas, and `log` a line before them."""
    async with start() as worker:
        await worker.until("ready")
        assert await worker.run(count=2, log="hi", delay_ms=1) == [
            ("logs", {"stream": "stdout", "line": "hi"}),
            ("text_delta", {"delta": "tok0 "}),
            ("text_delta", {"delta": "tok1 "}),
            ("end", {"status": "completed", "usage": {"deltas": 2}}),
        ]


async def test_fail_comes_after_the_deltas(start: Callable[..., Any]) -> None:
    """`fail` fails the task with its message."""
    async with start() as worker:
        await worker.until("ready")
        *deltas, end = await worker.run(count=2, fail="as asked")
        assert len(deltas) == 2
        assert end[1]["error"] == {"code": "task_failed", "message": "as asked"}


@pytest.mark.parametrize(
    "metadata",
    [
        {"prompt": 1},
        {"count": "3"},
        {"count": True},
        {"count": -1},
        {"hang": 1},
        {"prmpt": "typo"},
        {"prompt": "a", "count": 1},
    ],
)
async def test_bad_metadata_is_named(start: Callable[..., Any], metadata: dict[str, Any]) -> None:
    """Unknown names and wrong types fail the task with invalid_metadata."""
    async with start() as worker:
        await worker.until("ready")
        ((event, data),) = await worker.run(**metadata)
        assert event == "end"
        assert data["error"]["code"] == "invalid_metadata"


@pytest.mark.parametrize(("metadata", "code"), [({"crash": 7}, 7), ({"half_frame": True}, 9)])
async def test_a_crash_comes_after_the_deltas(
    start: Callable[..., Any], metadata: dict[str, Any], code: int
) -> None:
    """The process exits with the code that was asked for, and what was said before has been sent."""
    async with start() as worker:
        await worker.until("ready")
        seen = b""
        async with worker.post("t", count=3, **metadata) as answer:
            with contextlib.suppress(aiohttp.ClientPayloadError):
                async for piece in answer.content.iter_any():
                    seen += piece
        assert seen.count(b"tok") == 3
        assert seen.endswith(b"\n\n") == ("crash" in metadata)
        assert await worker.process.wait() == code


async def test_garbage_breaks_the_protocol(start: Callable[..., Any]) -> None:
    """`garbage` puts bytes on the stream that no reader of the contract accepts."""
    async with start() as worker:
        await worker.until("ready")
        async with worker.post("t", garbage=True) as answer:
            assert b"\x00\xff" in await answer.read()


async def test_hang_obeys_a_cancel_unless_told_not_to(start: Callable[..., Any]) -> None:
    """A hanging task ends on DELETE; with ignore_cancel it goes on, and SIGTERM ends the process still."""
    async with start() as worker:
        await worker.until("ready")
        async with worker.post("obedient", hang=True, count=1) as answer:
            seen = await answer.content.readuntil(b"\n\n")
            async with worker.http.delete(f"{URL}/tasks/obedient") as deleted:
                assert deleted.status == 202
            assert parse(seen + await answer.read())[-1] == ("end", {"status": "cancelled"})
        async with worker.post("stubborn", hang=True, ignore_cancel=True, count=1) as answer:
            seen = await answer.content.readuntil(b"\n\n")
            async with worker.http.delete(f"{URL}/tasks/stubborn") as deleted:
                assert deleted.status == 202
            assert (await worker.health())["status"] == "ready"
            assert not answer.content.at_eof()
            worker.process.send_signal(signal.SIGTERM)
            assert parse(seen + await answer.read())[-1] == ("end", {"status": "cancelled"})
        assert await worker.process.wait() == 0


async def test_sigterm_ends_streams_and_exits_with_0(start: Callable[..., Any]) -> None:
    """Running tasks end as cancelled, the socket is removed, and the exit code is 0."""
    async with start() as worker:
        await worker.until("ready")
        async with worker.post("t", hang=True, prompt="hi") as answer:
            seen = await answer.content.readuntil(b"\n\n")
            worker.process.send_signal(signal.SIGTERM)
            assert parse(seen + await answer.read())[-1] == ("end", {"status": "cancelled"})
        assert await worker.process.wait() == 0
        assert not worker.path.exists()


async def test_loading_takes_as_long_as_asked(start: Callable[..., Any]) -> None:
    """`LOAD_SECONDS` shows progress while loading."""
    async with start(LOAD_SECONDS="0.5") as worker:
        while (health := await worker.health())["progress"] is None:
            assert health["status"] == "loading"
        assert health["progress"]["total"] == 5
        await worker.until("ready")


async def test_load_fail(start: Callable[..., Any]) -> None:
    """`LOAD_FAIL` leaves a worker that says `failed` and why; SIGTERM ends it with 0."""
    async with start(LOAD_FAIL="no luck") as worker:
        assert (await worker.until("failed"))["message"] == "RuntimeError: no luck"
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.process.wait() == 0
