"""The echo worker: says back what it is told, and misbehaves on request.

It needs no GPU. The demo, the tests and the measurements use it. Metadata:

- `prompt` (text): streamed back word by word, then whole; or `count` (whole number): that many deltas
- `delay_ms` (number): the wait between deltas; `log` (text): a line to print first
- then at most one of: `fail` (text): fail with this message; `crash` (whole number): exit with this code;
  `hang` (true): never end, unless cancelled, or not even then with `ignore_cancel`; `garbage` (true): write
  what is no frame; `half_frame` (true): write half a frame and exit with code 9

Environment: `LOAD_SECONDS` makes loading take that long, `LOAD_FAIL` makes it fail with that message.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

from gpu_worker import Emitter, Progress, Task, TaskError, Worker

GARBAGE = b"\x00\xffthis is no frame\r\n\r\n: nor is this\n\n"
HALF_FRAME = b'id: 1\nevent: text_delta\ndata: {"del'

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "prompt": (str, "a text"),
    "count": (int, "a whole number"),
    "delay_ms": ((int, float), "a number"),
    "log": (str, "a text"),
    "fail": (str, "a text"),
    "crash": (int, "a whole number"),
    "hang": (bool, "true or false"),
    "ignore_cancel": (bool, "true or false"),
    "garbage": (bool, "true or false"),
    "half_frame": (bool, "true or false"),
}

worker = Worker()


@worker.load
async def load(progress: Progress) -> None:
    steps = round(float(os.environ.get("LOAD_SECONDS", "0")) * 10)
    for step in range(steps):
        await progress("loading", step, steps)
        await asyncio.sleep(0.1)
    if message := os.environ.get("LOAD_FAIL"):
        raise RuntimeError(message)


@worker.task
async def run(task: Task, emit: Emitter) -> dict[str, int]:
    wish = checked(task.metadata)
    if "log" in wish:
        print(wish["log"])
    delay = wish.get("delay_ms", 0) / 1000
    prompt = wish.get("prompt")
    deltas = words(prompt) if prompt is not None else (f"tok{n} " for n in range(wish.get("count", 0)))
    sent = 0
    for delta in deltas:
        if sent and delay:
            await asyncio.sleep(delay)
        await emit.text_delta(delta)
        sent += 1
    if prompt is not None:
        await emit.text(prompt)
    await misbehave(wish, emit)
    return {"deltas": sent}


async def misbehave(wish: dict[str, Any], emit: Emitter) -> None:
    if "fail" in wish:
        raise TaskError("task_failed", wish["fail"])
    if "crash" in wish:
        await emit.flush()
        os._exit(wish["crash"])
    if wish.get("hang"):
        await hang(wish.get("ignore_cancel", False))
    if wish.get("garbage"):
        await emit.raw(GARBAGE)
    if wish.get("half_frame"):
        await emit.raw(HALF_FRAME)
        os._exit(9)


async def hang(ignore_cancel: bool) -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not ignore_cancel:
                raise


def words(prompt: str) -> list[str]:
    """The prompt cut after each run of white space; joined again it is the prompt, to the byte."""
    return re.findall(r"\s*\S+\s*|\s+", prompt)


def checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata without nulls, or `invalid_metadata`."""
    for name, value in metadata.items():
        if name not in KINDS:
            raise TaskError("invalid_metadata", f"{name} is not known")
        kind, words_for_it = KINDS[name]
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise TaskError("invalid_metadata", f"{name} must be {words_for_it}")
    wish = {name: value for name, value in metadata.items() if value is not None}
    if "prompt" in wish and "count" in wish:
        raise TaskError("invalid_metadata", "give prompt or count, not both")
    for name in ("count", "delay_ms"):
        if wish.get(name, 0) < 0:
            raise TaskError("invalid_metadata", f"{name} must not be negative")
    return wish


if __name__ == "__main__":
    worker.run()
