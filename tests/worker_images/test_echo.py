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
            assert text == ("text", {"text": prompt, "finish_reason": "stop", "stop_reason": None})
            count = len(deltas)
            usage = {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}
            assert end == ("end", {"status": "completed", "usage": usage})


SYSTEM = {"role": "system", "content": "You echo."}


@pytest.mark.parametrize(
    ("metadata", "text", "why", "usage"),
    [
        ({"messages": [{"role": "user", "content": "one two"}]}, "one two", ("stop", None), (2, 2, 4)),
        (
            {
                "messages": [
                    SYSTEM,
                    {"role": "user", "content": "first"},
                    {"role": "assistant", "content": "first"},
                    {"role": "user", "content": [{"type": "text", "text": t} for t in ("a b ", "c")]},
                ]
            },
            "a b c",
            ("stop", None),
            (7, 3, 10),
        ),
        ({"messages": [SYSTEM]}, "", ("stop", None), (2, 0, 2)),
        ({"prompt": "a b c", "max_tokens": 2}, "a b ", ("length", None), (3, 2, 5)),
        ({"prompt": "a b c", "max_tokens": 3}, "a b c", ("stop", None), (3, 3, 6)),
        ({"prompt": "a b c d", "stop": "c"}, "a b ", ("stop", "c"), (4, 2, 6)),
        ({"prompt": "a b c d", "stop": ["d", "b c"]}, "a ", ("stop", "b c"), (4, 1, 5)),
        ({"prompt": "a b c d", "stop": "d", "max_tokens": 3}, "a b c ", ("length", None), (4, 3, 7)),
        (
            {"prompt": "a b", "temperature": 0, "top_p": 0.5, "seed": 1, "stop": []},
            "a b",
            ("stop", None),
            (2, 2, 4),
        ),
    ],
)
async def test_text_generation(
    start: Callable[..., Any],
    metadata: dict[str, Any],
    text: str,
    why: tuple[str, str | None],
    usage: tuple[int, int, int],
) -> None:
    """The contract of text generation, with words for tokens: the text, why it ends, and what was used."""
    async with start() as worker:
        await worker.until("ready")
        *deltas, whole, end = await worker.run(**metadata)
        assert "".join(data["delta"] for _, data in deltas) == text
        assert whole == ("text", {"text": text, "finish_reason": why[0], "stop_reason": why[1]})
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert end[1]["usage"] == dict(zip(names, usage, strict=True))


async def test_the_wait_of_the_environment(start: Callable[..., Any]) -> None:
    """`DELAY_MS` slows every task that says nothing about it."""
    async with start(DELAY_MS="60") as worker:
        await worker.until("ready")
        began = asyncio.get_running_loop().time()
        await worker.run(prompt="a b")
        assert asyncio.get_running_loop().time() - began >= 0.06


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
        {"prompt": "a", "messages": []},
        {"prompt": [1, 2]},
        {"messages": "a"},
        {"messages": ["a"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "stop": ""},
        {"prompt": "a", "stop": [1]},
        {"prompt": "a", "stop": ["x"] * 17},
        {"prompt": "a", "logprobs": 0},
        {"prompt": "a", "min_tokens": 1},
        {"prompt": "a", "ignore_eos": True},
        {"prompt": "a", "response_format": {"type": "json_object"}},
    ],
)
async def test_bad_metadata_is_named(start: Callable[..., Any], metadata: dict[str, Any]) -> None:
    """Unknown names, wrong types and what it cannot do fail the task with invalid_request."""
    async with start() as worker:
        await worker.until("ready")
        ((event, data),) = await worker.run(**metadata)
        assert event == "end"
        assert data["error"]["code"] == "invalid_request"
        assert any(name in data["error"]["message"] for name in metadata)


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
    async with start(LOAD_SECONDS="600") as worker:
        while (health := await worker.health())["progress"] is None:
            assert health["status"] == "loading"
        assert health["progress"]["total"] == 6000
        worker.path.unlink()
    async with start(LOAD_SECONDS="0.2") as worker:
        await worker.until("ready")


async def test_load_fail(start: Callable[..., Any]) -> None:
    """`LOAD_FAIL` leaves a worker that says `failed` and why; SIGTERM ends it with 0."""
    async with start(LOAD_FAIL="no luck") as worker:
        assert (await worker.until("failed"))["message"] == "RuntimeError: no luck"
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.process.wait() == 0
