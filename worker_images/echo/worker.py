"""The echo worker: says back what it is told, and misbehaves on request.

It needs no GPU. The demo, the tests and the measurements use it. Metadata:

- `prompt` (text), or `messages`, of which it is the text of the user's last one: streamed back word by word,
  then whole; or `count` (whole number): that many deltas
- `max_tokens`, `stop`: as in docs/text-generation.md, with words for tokens. Of what else stands there it
  takes what decides between tokens by chance or by weight, since it never has a choice, and refuses the rest
- `delay_ms` (number): the wait between deltas; `log` (text): a line to print first
- then at most one of: `fail` (text): fail with this message; `crash` (whole number): exit with this code;
  `hang` (true): never end, unless cancelled, or not even then with `ignore_cancel`; `garbage` (true): write
  what is no frame; `half_frame` (true): write half a frame and exit with code 9

Environment: `LOAD_SECONDS` makes loading take that long, `LOAD_FAIL` makes it fail with that message, and
`DELAY_MS` is the wait between deltas of tasks that name none.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from typing import Any

from gpu_worker import Emitter, Progress, Task, TaskError, Worker

GARBAGE = b"\x00\xffthis is no frame\r\n\r\n: nor is this\n\n"
HALF_FRAME = b'id: 1\nevent: text_delta\ndata: {"del'

NUMBER = ((int, float), "a number")
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "prompt": (str, "a text; this worker knows no token ids"),
    "messages": (list, "a list of messages"),
    "max_tokens": (int, "a whole number"),
    "stop": ((str, list), "a text or a list of texts"),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": (int, "a whole number"),
    "min_p": NUMBER,
    "seed": (int, "a whole number"),
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "logit_bias": (dict, "an object"),
    "count": (int, "a whole number"),
    "delay_ms": NUMBER,
    "log": (str, "a text"),
    "fail": (str, "a text"),
    "crash": (int, "a whole number"),
    "hang": (bool, "true or false"),
    "ignore_cancel": (bool, "true or false"),
    "garbage": (bool, "true or false"),
    "half_frame": (bool, "true or false"),
}

CANNOT = ("min_tokens", "ignore_eos", "logprobs", "response_format")
DELAY_MS = float(os.environ.get("DELAY_MS", "0"))

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
    delay = wish.get("delay_ms", DELAY_MS) / 1000
    answer = answer_to(wish)
    deltas = words(answer.text) if answer else (f"tok{n} " for n in range(wish.get("count", 0)))
    sent = 0
    for delta in deltas:
        if sent and delay:
            await asyncio.sleep(delay)
        await emit.text_delta(delta)
        sent += 1
    if answer is None:
        await misbehave(wish, emit)
        return {"deltas": sent}
    await emit.text(answer.text, finish_reason=answer.finish_reason, stop_reason=answer.stop_reason)
    await misbehave(wish, emit)
    read = answer.words_read
    return {"prompt_tokens": read, "completion_tokens": sent, "total_tokens": read + sent}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a prompt, or a conversation, is answered with."""

    text: str
    words_read: int
    finish_reason: str = "stop"
    stop_reason: str | None = None


def answer_to(wish: dict[str, Any]) -> Answer | None:
    """The answer; None where neither a prompt nor messages are there to be answered."""
    if "messages" in wish:
        said = [text_of(message) for message in wish["messages"]]
        by_user = [text for role, text in said if role == "user"]
        read, prompt = sum(len(words(text)) for _, text in said), by_user[-1] if by_user else ""
    elif "prompt" in wish:
        read, prompt = len(words(wish["prompt"])), wish["prompt"]
    else:
        return None
    every = words(prompt)
    most = wish.get("max_tokens", len(every))
    text = "".join(every[:most])
    stops = [stop for stop in listed(wish.get("stop", [])) if stop in text]
    if stops:
        stop = min(stops, key=text.index)
        return Answer(text=text[: text.index(stop)], words_read=read, stop_reason=stop)
    return Answer(text=text, words_read=read, finish_reason="length" if most < len(every) else "stop")


def text_of(message: Any) -> tuple[str, str]:
    """The role and the text of a message."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys() <= {
        "role",
        "content",
        "name",
    }:
        raise TaskError("invalid_request", "messages must be objects with role and content")
    role, content = message["role"], message["content"]
    if role not in ("system", "developer", "user", "assistant"):
        raise TaskError("invalid_request", "messages: the role must be system, developer, user or assistant")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise TaskError("invalid_request", "messages: the content must be a text, or a list of text parts")
    return role, "".join(part["text"] for part in parts)


def listed(stop: str | list[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else stop


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
    """The metadata without nulls, or `invalid_request`."""
    for name, value in metadata.items():
        if name in CANNOT and value is not None:
            raise TaskError("invalid_request", f"{name} is nothing that the echo worker can do")
        if name in CANNOT:
            continue
        if name not in KINDS:
            raise TaskError("invalid_request", f"{name} is not known")
        kind, words_for_it = KINDS[name]
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise TaskError("invalid_request", f"{name} must be {words_for_it}")
    wish = {name: value for name, value in metadata.items() if value is not None}
    if len(wish.keys() & {"prompt", "messages", "count"}) > 1:
        raise TaskError("invalid_request", "give prompt, messages or count, and one of them alone")
    for name, least in (("count", 0), ("delay_ms", 0), ("max_tokens", 1)):
        if wish.get(name, least) < least:
            raise TaskError("invalid_request", f"{name} must be at least {least}")
    stops = listed(wish.get("stop", []))
    if len(stops) > 16 or not all(isinstance(stop, str) and stop for stop in stops):
        raise TaskError("invalid_request", "stop must be a text, or a list of up to 16, none of them empty")
    return wish


if __name__ == "__main__":
    worker.run()
