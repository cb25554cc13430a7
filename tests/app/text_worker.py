"""A played worker that generates text as the contract has it, and clients of the OpenAI routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
import orjson

from tests.app.api_world import KEY, Api
from tests.app.played_worker import Call, PlayedWorker, TaskScript, end, frame

MODEL = "org/chat"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


def says(
    *deltas: str | dict[str, Any],
    reason: str | None = "stop",
    usage: dict[str, Any] | None = USAGE,
    asked: list[Any] | None = None,
) -> TaskScript:
    """A worker that answers every task with these deltas; what it was asked goes into `asked`."""
    told = [delta if isinstance(delta, dict) else {"delta": delta} for delta in deltas]
    text = "".join(delta["delta"] for delta in told)

    async def script(worker: PlayedWorker, call: Call) -> None:
        if asked is not None:
            asked.append(orjson.loads(call.body)["metadata"])
        frames = [frame(n, "text_delta", **delta) for n, delta in enumerate(told, 1)]
        if reason is not None:
            frames.append(frame(len(frames) + 1, "text", text=text, finish_reason=reason, stop_reason=None))
        more = {} if usage is None else {"usage": usage}
        await call.stream(b"".join(frames) + end(len(frames) + 1, **more))
        await call.done()

    return script


def fails(code: str, message: str, *deltas: str) -> TaskScript:
    """A worker that fails every task, after these deltas."""

    async def script(worker: PlayedWorker, call: Call) -> None:
        frames = [frame(n, "text_delta", delta=delta) for n, delta in enumerate(deltas, 1)]
        error = {"code": code, "message": message}
        await call.stream(b"".join(frames) + end(len(frames) + 1, "failed", error=error))
        await call.done()

    return script


@asynccontextmanager
async def client_of(api: Api, tenant: str = "a", **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, as a tenant; it tries nothing twice unless told to."""
    async with openai.AsyncOpenAI(
        base_url=f"{api.url}/v1",
        api_key=options.pop("key", KEY),
        default_headers={"X-Tenant-ID": tenant},
        **{"max_retries": 0, **options},
    ) as client:
        yield client


def chunks(raw: bytes) -> list[Any]:
    """The data of a stream: JSON, but `[DONE]`. Comments are left out."""
    *blocks, rest = raw.split(b"\n\n")
    assert rest == b"", rest
    data = [block.removeprefix(b"data: ") for block in blocks if not block.startswith(b":")]
    return [one.decode() if one == b"[DONE]" else json.loads(one) for one in data]


def comments(raw: bytes) -> Sequence[str]:
    """The comments of a stream."""
    return [block.decode()[2:] for block in raw.split(b"\n\n") if block.startswith(b":")]
