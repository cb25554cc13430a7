"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: on the size and the time of a request's head,
and on the patience with clients that are gone or read nothing.

Counted is what the parser takes without handing out a byte of a body: the head, and the fields that may
follow a chunked body, which are kept just the same.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 20.0
STALL_SECONDS = 120.0

# A client that vanished without a word (its machine lost power, its network went away) is found out within
# about a minute: by probes where nothing is under way, by the last option where something is. Linux holds a
# client that is there, and keeps its window closed, to the last one too: such a client may be cut before
# STALL_SECONDS.
_PROBES: Final[tuple[tuple[str, int], ...]] = (
    ("TCP_KEEPIDLE", 30),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 60_000),
)

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHeadProtocol(HttpToolsProtocol):
    """Ends a connection whose request head is too large (431) or takes too long to come, and one whose client
    is gone or takes nothing of what there is for it. A stream that was cut can be taken up again."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected; its first request is awaited."""
        super().connection_made(transport)
        _probe(transport.get_extra_info("socket"))
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        self._stop_stall_timer()
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

    def pause_writing(self) -> None:
        """The client takes less than there is for it."""
        super().pause_writing()
        self._watch_for_stall(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has taken it."""
        self._stop_stall_timer()
        super().resume_writing()

    def _watch_for_stall(self, unsent: int) -> None:
        self._stop_stall_timer()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._look_for_stall, unsent)

    def _look_for_stall(self, unsent: int) -> None:
        """A client that is only slow is not cut: a long event would never get through to it."""
        left = self.transport.get_write_buffer_size()
        if left < unsent:
            self._watch_for_stall(left)
        else:
            self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

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


def _probe(connection: socket.socket | None) -> None:
    """Let the kernel find out about a client that has vanished."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES:
        with suppress(AttributeError, OSError):  # which options there are depends on the system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
