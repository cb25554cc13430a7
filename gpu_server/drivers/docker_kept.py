"""What an `exec` worker wrote, read again from its beginning out of the log that the engine keeps.

The log is two files. When the first is full, the engine moves it away and begins the second, and nothing can
be relied on from then on: the next move drops the first file, and nobody is told; and a reader that follows
the log across a move misses lines and gets others twice (engine 20.10). So a log counts as whole for as long
as all that was read of it fits into the first file.

Following it is not enough either: the engine stops when the worker exits, before or after the last lines, or
when it goes away itself. So the log is opened anew whenever its connection ends, until it was read once after
the exit; its order is always the same, and what was taken already is passed over.

Each stream comes as it was written, but for bytes that are no UTF-8: the log holds U+FFFD in their place.
That also happens to a character of several bytes that lies across a multiple of 16 KiB in one line, where the
engine cuts.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from docker import APIClient

from gpu_server.drivers.docker_api import raw_body
from gpu_server.drivers.docker_body import KEPT_LOG, LOG_BYTES
from gpu_server.drivers.docker_output import HEADER, AttachedOutput
from gpu_server.ports import Output, OutputLost, RuntimeUnreachable

_TOO_MUCH: Final = "the worker wrote more than is kept for reading it again"
_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 2.0

# A line of the log, {"log":"...","stream":"stdout","time":"2026-01-01T00:00:00.123456789Z"}, is 69 bytes and
# the text, whose quotes, backslashes and line ends take one byte more, and other control characters five.
_ENTRY: Final = 72
_ONE_MORE: Final = b'"\\\n\r'
_FIVE_MORE: Final = bytes(set(range(0x20)) - set(_ONE_MORE)) + b"<>&"
_ALL_BUT_ONE_MORE: Final = bytes(set(range(256)) - set(_ONE_MORE))
_ALL_BUT_FIVE_MORE: Final = bytes(set(range(256)) - set(_FIVE_MORE))
_THREE_MORE: Final = tuple(character.encode() for character in "\ufffd\u2028\u2029")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLog:
    """A log at its first byte. `is_last`: its worker has ended, so it will not grow."""

    connection: socket.socket
    is_last: bool


class KeptOutput:
    """Async iterator over one worker's output from its first byte; it ends with the worker, has one reader.

    `again` opens the log once more; while that raises `RuntimeUnreachable`, it is tried again. Raises
    `OutputLost` once so much has come that the log may not be whole any more.
    """

    def __init__(self, log: OpenLog, again: Callable[[], Awaitable[OpenLog]]) -> None:
        self._again = again
        self._taken = 0
        self._closed = False
        self._opening: asyncio.Timeout | None = None
        self._take(log)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        while True:
            async for piece in self._output:
                self._size += logged_size(piece.data)
                if self._size >= LOG_BYTES:
                    self.close()
                    raise OutputLost(_TOO_MUCH)
                known = min(self._to_pass_over, len(piece.data))
                self._to_pass_over -= known
                if known < len(piece.data):
                    data = piece.data[known:]
                    self._taken += len(data)
                    return Output(piece.stream, data)
            if self._closed or self._is_last:
                raise StopAsyncIteration
            await self._open_again()

    def close(self) -> None:
        """Let go of the log. A reader that waits sees the end; calling it twice is fine."""
        self._closed = True
        self._output.close()
        if self._opening is not None:
            self._opening.reschedule(0)

    def _take(self, log: OpenLog) -> None:
        self._output = AttachedOutput(log.connection)
        self._is_last = log.is_last
        self._to_pass_over = self._taken
        self._size = 0

    async def _open_again(self) -> None:
        pause = _FIRST_PAUSE
        try:
            async with asyncio.timeout(None) as self._opening:
                while True:
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                    try:
                        log = await self._again()
                    except RuntimeUnreachable:
                        continue
                    break
        except TimeoutError:  # closed meanwhile
            return
        finally:
            self._opening = None
        self._take(log)


def open_log(client: APIClient, docker_host: str | None, inspect: Mapping[str, Any]) -> OpenLog:
    """The log of a container that was started; blocks. Raises `ENGINE_ERRORS`, and `OutputLost` if the log is
    not whole."""
    if inspect["HostConfig"]["LogConfig"] != KEPT_LOG:
        raise OutputLost("what this worker writes is not kept")
    runs = bool(inspect["State"]["Running"])
    path = f"/containers/{inspect['Id']}/logs?stdout=1&stderr=1"
    connection = raw_body(client, docker_host, f"{path}&follow={int(runs)}")
    try:
        # Looked at after the other has begun to read: what is whole now was whole then.
        with raw_body(client, docker_host, path) as look:
            _require_whole(look, float(client.timeout))
    except BaseException:
        connection.close()
        raise
    return OpenLog(connection=connection, is_last=not runs)


def logged_size(data: bytes) -> int:
    """At most so many bytes does the engine write to the log's file for this piece of a line."""
    return (
        _ENTRY
        + len(data)
        + len(data.translate(None, _ALL_BUT_ONE_MORE))
        + 5 * len(data.translate(None, _ALL_BUT_FIVE_MORE))
        + 3 * sum(data.count(character) for character in _THREE_MORE)
    )


def _require_whole(look: socket.socket, limit: float) -> None:
    deadline = time.monotonic() + limit
    size = 0
    with look.makefile("rb") as log:
        while len(header := log.read(HEADER.size)) == HEADER.size:
            _, length = HEADER.unpack(header)
            size += logged_size(log.read(length))
            if size >= LOG_BYTES:
                raise OutputLost(_TOO_MUCH)
            if time.monotonic() > deadline:
                raise TimeoutError("reading the log took too long")
