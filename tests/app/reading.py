"""Reads a stream the way a client does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from gpu_server.stream import Stream


@dataclass(frozen=True, slots=True)
class Event:
    """One frame as a client sees it."""

    number: int | None
    name: str
    data: Any


def parse(raw: bytes) -> list[Event]:
    """The events of whole frames; comments are left out."""
    *frames, rest = raw.split(b"\n\n")
    assert rest == b"", f"half a frame: {rest!r}"
    found = []
    for frame in frames:
        fields = dict(line.split(b": ", 1) for line in frame.split(b"\n") if not line.startswith(b":"))
        if fields:
            number = int(fields[b"id"]) if b"id" in fields else None
            found.append(Event(number, fields[b"event"].decode(), json.loads(fields[b"data"])))
    return found


async def all_events(stream: Stream, after: int = 0) -> list[Event]:
    """Everything that a new reader of a finished stream gets."""
    return parse(b"".join([chunk async for chunk in stream.read(after)]))


async def next_events(reader: AsyncIterator[bytes]) -> list[Event]:
    """What the next write to a reader holds."""
    async with asyncio.timeout(20):
        return parse(await anext(reader))


async def until(reader: AsyncIterator[bytes], name: str) -> list[Event]:
    """Everything up to and with the write that holds an event of this name."""
    seen: list[Event] = []
    while not any(event.name == name for event in seen):
        seen += await next_events(reader)
    return seen


def numbered_without_a_hole(events: list[Event]) -> bool:
    """Whether these are all events from the first on, each once and in order."""
    return [event.number for event in events] == list(range(1, len(events) + 1))
