"""Frames in, frames out, over one listening socket: vsock in an enclave, a Unix socket in a simulation.

Whoever connects is the host, which may send anything at any pace. So there is a bounded number of
connections, each with a thread and a clock of its own, and no more memory for one than a frame.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from typing import Final

from enclave.program import Answer
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.frames import Code, FrameReader, Request, decode_request, encode_reply

CONNECTIONS: Final = 16
FRAME_SECONDS: Final = 10.0
"""From a frame's first byte to its last, and for an answer to be taken."""
IDLE_SECONDS: Final = 120.0
"""Between two frames of one connection."""

_NO_REQUEST: Final = 0
"""The id in an answer to something that has none."""
_PIECE: Final = 16384


def listen_vsock(port: int) -> socket.socket:
    """On every CID that this machine has. Raises OSError."""
    listening = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listening.bind((socket.VMADDR_CID_ANY, port))
        listening.listen(CONNECTIONS)
    except BaseException:
        listening.close()
        raise
    return listening


def listen_unix(path: str) -> socket.socket:
    """In a folder of our own; what an earlier life left there is removed. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        os.chmod(path, 0o600)
        listening.listen(CONNECTIONS)
    except BaseException:
        listening.close()
        raise
    return listening


class Server:
    """Serves `handle` on a listening socket. Times are in seconds."""

    def __init__(
        self,
        listening: socket.socket,
        handle: Callable[[Request], Answer],
        *,
        connections: int = CONNECTIONS,
        frame_seconds: float = FRAME_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._listening, self._handle = listening, handle
        self._frame_seconds, self._idle_seconds = frame_seconds, idle_seconds
        self._places = threading.Semaphore(connections)
        self._open: set[socket.socket] = set()
        self._closing = threading.Event()

    def run(self) -> None:
        """Accept for ever, or until `close`."""
        while not self._closing.is_set():
            try:
                peer, _ = self._listening.accept()
            except OSError:
                if self._closing.wait(0.1):  # too few descriptors, say: not for ever
                    return
                continue
            if not self._places.acquire(blocking=False):
                self._turn_away(peer)
                continue
            self._open.add(peer)
            threading.Thread(target=self._serve, args=(peer,), name="connection", daemon=True).start()

    def close(self) -> None:
        """End `run` and every connection."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for peer in list(self._open):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def _turn_away(self, peer: socket.socket) -> None:
        """Say so, if that takes no waiting."""
        with peer, contextlib.suppress(OSError):
            peer.setblocking(False)
            peer.send(encode_reply(_NO_REQUEST, Code.BUSY))
            peer.shutdown(socket.SHUT_WR)

    def _serve(self, peer: socket.socket) -> None:
        try:
            with peer, contextlib.suppress(OSError):  # TimeoutError is one
                self._talk(peer)
        finally:
            self._open.discard(peer)
            self._places.release()

    def _talk(self, peer: socket.socket) -> None:
        """One request after the other. A peer that closes its sending half still gets its answers."""
        frames = FrameReader()
        deadline = time.monotonic() + self._idle_seconds
        amid = False
        while True:
            _limit(peer, deadline)
            piece = peer.recv(_PIECE)
            if not piece:
                return
            try:
                requests = [decode_request(payload) for payload in frames.feed(piece)]
            except SealedError:
                self._answer(peer, _NO_REQUEST, (Code.MALFORMED, ()))
                return  # where the next frame begins is anybody's guess
            for request in requests:
                self._answer(peer, request.id, self._handle(request))
            # Once a frame has begun, more of its bytes do not move its deadline.
            was_amid, amid = amid and not requests, _amid(frames)
            if not (was_amid and amid):
                deadline = time.monotonic() + (self._frame_seconds if amid else self._idle_seconds)

    def _answer(self, peer: socket.socket, id: int, answer: Answer) -> None:
        try:
            frame = encode_reply(id, *answer)
        except SealedError:
            frame = encode_reply(id, Code.INTERNAL)
        peer.settimeout(self._frame_seconds)
        peer.sendall(frame)


def _limit(peer: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    peer.settimeout(left)


def _amid(frames: FrameReader) -> bool:
    """Whether a frame has begun that is not complete."""
    try:
        frames.close()
    except SealedError:
        return True
    return False
