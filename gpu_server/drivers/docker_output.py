"""What a container writes, from a connection that the engine writes it to.

The wire format is that of the Engine API's attach and logs without a terminal: frames of 8 bytes (stream,
three zeros, big-endian length) and a payload. Nothing is read ahead of the consumer beyond one buffer, so a
slow consumer slows the worker's writes and never fills this process.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final, Self

from gpu_server.ports import Output

_READ: Final = 64 * 1024

HEADER: Final = struct.Struct(">BxxxL")
"""Stream (2 is stderr) and length of what follows."""


def no_output() -> AttachedOutput:
    """The output of a container that nobody listens to: it has ended already."""
    ours, other = socket.socketpair()
    other.close()
    return AttachedOutput(ours)


class AttachedOutput:
    """Async iterator over one container's output; it ends with the container, and has one reader.

    Owns `sock` and closes it at the end, on `close()`, or when nobody holds the iterator any more.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = b""
        self._position = 0
        self._left = 0
        self._stderr = False
        self._reading = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        while True:
            there = len(self._buffer) - self._position
            if self._left and there:
                data = self._buffer[self._position : self._position + self._left]
                self._position += len(data)
                self._left -= len(data)
                return Output("stderr" if self._stderr else "stdout", data)
            if not self._left and there >= HEADER.size:
                stream, self._left = HEADER.unpack_from(self._buffer, self._position)
                self._stderr = stream == 2
                self._position += HEADER.size
                continue
            chunk = await self._receive()
            if not chunk:
                self._sock.close()
                raise StopAsyncIteration
            self._buffer = self._buffer[self._position :] + chunk
            self._position = 0

    def close(self) -> None:
        """Let go of the connection. A reader that waits sees the end; calling it twice is fine."""
        if not self._reading:
            self._sock.close()
            return
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._sock.close()

    async def _receive(self) -> bytes:
        if self._sock.fileno() < 0:
            return b""
        self._reading = True
        try:
            return await asyncio.get_running_loop().sock_recv(self._sock, _READ)
        except OSError:
            return (
                b""  # the engine went away; what was written after this is lost, the exit is heard elsewhere
            )
        finally:
            self._reading = False

    def __del__(self) -> None:
        self._sock.close()
