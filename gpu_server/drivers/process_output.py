"""What a worker process writes, over two named pipes beside its record.

Named, because a service that died and came back can open them again: the worker holds both ends of each, so
it gets no SIGPIPE while nobody reads, and it waits when a pipe is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, Self

from gpu_server.ports import Output

_READ: Final = 64 * 1024
_STREAMS: Final[tuple[Literal["stdout", "stderr"], ...]] = ("stdout", "stderr")


class PipedOutput:
    """Async iterator over one worker's output, with one reader. Nothing is read ahead of the reader.

    It ends when no process holds the pipes any more, or, after `finish()`, when they are empty.
    """

    def __init__(self, readers: dict[Literal["stdout", "stderr"], int]) -> None:
        self._readers = readers
        self._finished = False
        self._wake: Callable[[], None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        while self._readers:
            for stream in list(self._readers):
                data = self._take(stream)
                if data:
                    # The other stream goes first next time, so that a loud one does not hide a quiet one.
                    self._readers[stream] = self._readers.pop(stream)
                    return Output(stream, data)
            if self._finished:
                self.close()
            elif self._readers:
                await self._readable()
        raise StopAsyncIteration

    def finish(self) -> None:
        """The worker is gone: end after what is in the pipes, whoever still holds them."""
        self._finished = True
        if self._wake is not None:
            self._wake()

    def close(self) -> None:
        """Let go of the pipes; a reader that waits sees the end."""
        readers, self._readers = self._readers, {}
        if self._wake is not None:
            self._wake()
        for descriptor in readers.values():
            os.close(descriptor)

    def _take(self, stream: Literal["stdout", "stderr"]) -> bytes | None:
        """Bytes that are there, or None; a pipe at its end is closed."""
        try:
            data = os.read(self._readers[stream], _READ)
        except BlockingIOError:
            return None
        if not data:
            os.close(self._readers.pop(stream))
        return data

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        waiting = tuple(self._readers.values())

        def stop_waiting() -> None:
            # Before any descriptor is closed: its number may be another file's at once.
            for descriptor in waiting:
                loop.remove_reader(descriptor)
            if not ready.done():
                ready.set_result(None)

        for descriptor in waiting:
            loop.add_reader(descriptor, stop_waiting)
        self._wake = stop_waiting
        try:
            await ready
        finally:
            stop_waiting()
            self._wake = None

    def __del__(self) -> None:
        for descriptor in self._readers.values():
            os.close(descriptor)


def make_pipes(folder: Path) -> tuple[PipedOutput, tuple[int, int]]:
    """New pipes in `folder`: the output to read, and what the worker gets as stdout and stderr."""
    remove_pipes(folder)
    for stream in _STREAMS:
        os.mkfifo(folder / stream, 0o600)
    output = open_pipes(folder)
    # Read and write, so that the worker itself counts as a reader.
    writers = (os.open(folder / "stdout", os.O_RDWR), os.open(folder / "stderr", os.O_RDWR))
    return output, writers


def make_no_pipes(folder: Path) -> tuple[PipedOutput, tuple[int, int]]:
    """What a worker gets whose output nobody may read, and the output that it has: none, now and later."""
    remove_pipes(folder)
    return PipedOutput({}), (os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY))


def open_pipes(folder: Path) -> PipedOutput:
    """The output of a worker that has its pipes already; it ends at once where there are none."""
    return PipedOutput(_readers(folder))


def _readers(folder: Path) -> dict[Literal["stdout", "stderr"], int]:
    found: dict[Literal["stdout", "stderr"], int] = {}
    for stream in _STREAMS:
        with contextlib.suppress(OSError):
            found[stream] = os.open(folder / stream, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    return found


class DiscardedOutput:
    """Empties the pipes of a worker that an earlier life of the service started, until somebody takes it up:
    a worker never waits because nobody reads."""

    def __init__(self, folder: Path) -> None:
        self._open = set(_readers(folder).values())
        loop = asyncio.get_running_loop()
        for descriptor in self._open:
            loop.add_reader(descriptor, self._discard, descriptor)

    def close(self) -> None:
        for descriptor in list(self._open):
            self._drop(descriptor)

    def _discard(self, descriptor: int) -> None:
        try:
            ended = not os.read(descriptor, _READ)
        except BlockingIOError:
            return
        if ended:
            self._drop(descriptor)

    def _drop(self, descriptor: int) -> None:
        self._open.discard(descriptor)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


def remove_pipes(folder: Path) -> None:
    """Remove a worker's pipes; it is no error if there are none."""
    for stream in _STREAMS:
        with contextlib.suppress(FileNotFoundError):
            (folder / stream).unlink()
