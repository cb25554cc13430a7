"""What a task says: a method for each event. `Emitter` is awaited; `BlockingEmitter` serves plain functions.

A task that runs ahead of its readers waits here when its history is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

from gpu_worker import frames
from gpu_worker.errors import Cancelled
from gpu_worker.history import History

_TURN = 0.0003  # seconds that a task which only emits keeps the event loop, before its readers have a turn


class Emitter:
    """Given to an `async def` task. Every method may raise ValueError for an event of more than 1 MiB."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._turn_ends = 0.0

    async def text_delta(self, delta: str, **more: Any) -> None:
        """The next piece of the answer's text. `more` are further fields of the event: JSON values."""
        await self._send(frames.text_delta(delta, more))

    async def text(self, text: str, **more: Any) -> None:
        """A whole text, with further fields as `text_delta` has them."""
        await self._send(frames.text(text, more))

    async def logs(self, line: str, stream: str = "stdout") -> None:
        """A log line. What a task prints becomes one by itself."""
        await self._send(frames.logs(stream, line))

    async def artifact(self, name: str, media_type: str, data: bytes) -> None:
        """A file made by the task, of at most about 780 kB."""
        await self._send(frames.artifact(name, media_type, data))

    async def progress(self, stage: str, done: float, total: float | None = None) -> None:
        """How far the task is; only for those who watch at this moment, never replayed."""
        self._history.pass_by(frames.progress(stage, done, total))
        await self._yield()

    async def error(self, code: str, message: str) -> None:
        """A fault worth telling that does not end the task. To fail, raise `TaskError`."""
        await self._send(frames.error(code, message))

    async def flush(self) -> None:
        """Wait until everyone who reads now was sent everything. Worth it before work that blocks."""
        while (wait := self._history.unflushed()) is not None:
            await asyncio.wrap_future(wait)

    async def raw(self, data: bytes) -> None:
        """For tests of hosts only: put any bytes on the streams of this moment, and flush them. Of a sealed
        task they are sealed too."""
        self._history.pass_by(data)
        await self.flush()

    async def _send(self, frame: bytes) -> None:
        while (wait := self._history.add(frame)) is not None:
            await asyncio.wrap_future(wait)
        if monotonic() >= self._turn_ends:
            await self._yield()

    async def _yield(self) -> None:
        await asyncio.sleep(0)
        self._turn_ends = monotonic() + _TURN


class BlockingEmitter:
    """Given to a plain `def` task, and used from its threads. The methods are `Emitter`'s, without await.

    Each raises `Cancelled` once the task was asked to stop.
    """

    def __init__(self, history: History, cancelled: Callable[[], bool]) -> None:
        self._history = history
        self._cancelled = cancelled

    def text_delta(self, delta: str, **more: Any) -> None:
        self._send(frames.text_delta(delta, more))

    def text(self, text: str, **more: Any) -> None:
        self._send(frames.text(text, more))

    def logs(self, line: str, stream: str = "stdout") -> None:
        self._send(frames.logs(stream, line))

    def artifact(self, name: str, media_type: str, data: bytes) -> None:
        self._send(frames.artifact(name, media_type, data))

    def progress(self, stage: str, done: float, total: float | None = None) -> None:
        self._check()
        self._history.pass_by(frames.progress(stage, done, total))

    def error(self, code: str, message: str) -> None:
        self._send(frames.error(code, message))

    def flush(self) -> None:
        self._check()
        while (wait := self._history.unflushed()) is not None:
            wait.result()
            self._check()

    def raw(self, data: bytes) -> None:
        self._history.pass_by(data)
        self.flush()

    def _send(self, frame: bytes) -> None:
        self._check()
        while (wait := self._history.add(frame)) is not None:
            wait.result()
            self._check()

    def _check(self) -> None:
        if self._cancelled():
            raise Cancelled("the task was asked to stop")
