"""A worker in this process, on a real Unix socket, and a client that reads its streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gpu_worker import Worker
from gpu_worker.output import captured


class Client:
    """Speaks the contract to one worker."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    async def health(self) -> dict[str, Any]:
        async with self.http.get("http://worker/health") as answer:
            return await answer.json()

    def post(self, task_id: str, **metadata: Any) -> Any:
        return self.http.post(f"http://worker/tasks/{task_id}", json={"metadata": metadata})

    def events(self, task_id: str, after: int = 0) -> Any:
        return self.http.get(f"http://worker/tasks/{task_id}/events", params={"after": after})

    async def delete(self, task_id: str) -> int:
        async with self.http.delete(f"http://worker/tasks/{task_id}") as answer:
            return answer.status

    async def run(self, task_id: str, **metadata: Any) -> list[tuple[int | None, str, dict[str, Any]]]:
        async with self.post(task_id, **metadata) as answer:
            assert answer.status == 200
            return parse(await answer.read())


def parse(stream: bytes) -> list[tuple[int | None, str, dict[str, Any]]]:
    """(id, event, data) of each frame; strict, as a host is."""
    *frames, rest = stream.split(b"\n\n")
    assert rest == b"", rest
    found = []
    for frame in frames:
        lines = frame.decode("utf-8").split("\n")
        number = int(lines.pop(0).removeprefix("id: ")) if lines[0].startswith("id: ") else None
        event, data = lines
        assert event.startswith("event: ")
        assert data.startswith("data: ")
        found.append((number, event[7:], json.loads(data[6:])))
    return found


async def read_until(answer: aiohttp.ClientResponse, text: bytes) -> bytes:
    """Read a stream until `text` came by."""
    seen = b""
    async for piece in answer.content.iter_any():
        seen += piece
        if text in seen:
            return seen
    raise AssertionError(f"the stream ended before {text!r}: {seen[-500:]!r}")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """`async with start(worker) as client`: serves the worker; once it loaded, unless `loaded=False`."""

    @contextlib.asynccontextmanager
    async def started(worker: Worker, *, loaded: bool = True, **options: Any) -> AsyncIterator[Client]:
        path = tmp_path / "worker.sock"
        stop = asyncio.Event()
        connector = aiohttp.UnixConnector(path=str(path))
        with captured():
            async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as group:
                serving = group.create_task(worker.serve(path, stop, session_id="s_1", **options))
                client = Client(http)
                while not path.exists() and not serving.done():  # noqa: ASYNC110 (a file tells no event)
                    await asyncio.sleep(0)
                while loaded and (await client.health())["status"] == "loading":
                    pass
                try:
                    yield client
                finally:
                    stop.set()

    return started
