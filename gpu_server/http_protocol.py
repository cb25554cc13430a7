"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: on the size and the time of a request's head.

Counted is what the parser takes without handing out a byte of a body: the head, and the fields that may
follow a chunked body, which are kept just the same.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 20.0

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHeadProtocol(HttpToolsProtocol):
    """Ends a connection whose request head is too large (431) or takes too long to come."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected; its first request is awaited."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: the parser gets as many as a head may still have, and then the next ones."""
        if self.timeout_keep_alive_task is not None:
            # uvicorn forgets its own deadline at any byte, also at one that begins no request.
            self._await_head()
        while data and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._head_bytes
            self._head_bytes += len(data[:room])
            super().data_received(data[:room])
            if self._head_bytes >= MAX_HEAD_BYTES:
                self._refuse_head()
            data = data[room:]

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body has come."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Its body is complete; uvicorn's own keep-alive deadline counts from the end of the answer."""
        self._head_bytes = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_head(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # else it would end up in an answer under way
            self.transport.write(_TOO_LARGE)
        self.transport.close()

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
