"""As much of an engine as agreeing on a version takes. It can hang, and gives what answers it is told."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

VERSION = b'{"ApiVersion": "1.41"}'


@dataclass
class StandingClock:
    """In the place of `time` where calls ask it: how long a test takes opens and closes no breaker."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


class PlayedEngine:
    """Listens on a unix socket. `answers` are whole HTTP answers by path, without the API's version."""

    def __init__(self, path: Path) -> None:
        self.host = f"unix://{path}"
        self.answers: dict[str, bytes] = {}
        self.asked: list[str] = []
        self._news = asyncio.Event()
        self.hung = False
        self._path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> PlayedEngine:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def until_asked(self, times: int) -> None:
        """Wait until it was asked so often; who asked may have given up by then."""
        async with asyncio.timeout(30):
            while len(self.asked) < times:
                self._news.clear()
                await self._news.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split()[1].decode().removeprefix("/v1.41").partition("?")[0]
                self.asked.append(path)
                self._news.set()
                if self.hung:
                    await reader.read(-1)
                    return
                if path in self.answers:
                    writer.write(self.answers[path])
                    writer.close()
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(VERSION), VERSION))
