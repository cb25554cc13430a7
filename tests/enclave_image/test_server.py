"""The enclave's one socket, against peers that are slow, cut, rude and many."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from enclave.server import Server, listen_unix

from gpu_server.sealed.frames import (
    MAX_FRAME,
    Code,
    FrameReader,
    Op,
    Reply,
    Request,
    decode_reply,
    encode_request,
)

PATIENCE = 20.0


def says_ready(request: Request) -> tuple[Code, list[bytes]]:
    return Code.OK, [str(request.op).encode()]


class Serving:
    """A server on a Unix socket, in a thread."""

    def __init__(self, path: Path, handle: Callable[[Request], object] = says_ready, **limits: float) -> None:
        self._path = path
        self.server = Server(listen_unix(str(path)), handle, **limits)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.server.run)

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(PATIENCE)
        peer.connect(str(self._path))
        return peer

    def close(self) -> None:
        self.server.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    with contextlib.ExitStack() as stack:

        def start(*args: object, held: bool = False, **limits: object) -> Serving:
            """`held`: nobody is served before the test starts the thread."""
            serving = Serving(tmp_path / "s", *args, **limits)  # type: ignore[arg-type]
            stack.callback(serving.close)
            if not held:
                serving.thread.start()
            return serving

        yield start


def replies(peer: socket.socket, count: int) -> list[Reply]:
    """The next replies."""
    frames, found = FrameReader(), []
    while len(found) < count:
        piece = peer.recv(65536)
        assert piece, "it closed the connection"
        found += [decode_reply(payload) for payload in frames.feed(piece)]
    return found


def status(number: int) -> bytes:
    return encode_request(Op.STATUS, number, [])


def test_many_requests_on_one_connection(serve: Callable[..., Serving]) -> None:
    """Replies come in order, each with its request's id, also where requests come all at once."""
    with serve().connect() as peer:
        peer.sendall(b"".join(status(number) for number in range(1, 21)))
        assert [reply.id for reply in replies(peer, 20)] == list(range(1, 21))


def test_a_request_in_pieces(serve: Callable[..., Serving]) -> None:
    """Bytes may come one by one."""
    with serve().connect() as peer:
        for byte in status(7):
            peer.sendall(bytes([byte]))
        assert replies(peer, 1)[0].id == 7


def test_half_close(serve: Callable[..., Serving]) -> None:
    """Who has nothing more to ask still gets the answers, and then the end."""
    with serve().connect() as peer:
        peer.sendall(status(1) + status(2))
        peer.shutdown(socket.SHUT_WR)
        assert len(replies(peer, 2)) == 2
        assert peer.recv(1) == b""


@pytest.mark.parametrize(
    "sent",
    [
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"\xff\xff\xff\xff" + bytes(100),
        bytes(4),
        b"\0\0\0\1\xa0",
        b"\0\0\0\5hello",
        encode_request(Op.STATUS, 1, [])[:-1] + b"\xff",
    ],
    ids=["too long", "4 GB", "nothing", "a map", "no CBOR", "cut"],
)
def test_what_is_no_request(serve: Callable[..., Serving], sent: bytes) -> None:
    """It is told so, and the connection ends: nobody can say where the next frame begins."""
    serving = serve()
    with serving.connect() as peer:
        peer.sendall(sent)
        assert replies(peer, 1) == [Reply(0, Code.MALFORMED, [])]
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1) == b""
    with serving.connect() as peer:
        peer.sendall(status(1))
        assert replies(peer, 1)[0].code is Code.OK


def test_an_end_in_the_middle(serve: Callable[..., Serving]) -> None:
    """A frame that is cut off is dropped."""
    with serve().connect() as peer:
        peer.sendall(status(1)[:-1])
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""


def test_too_many_connections(serve: Callable[..., Serving]) -> None:
    """One more than there are places is told that it is busy; a place that was left is taken again."""
    serving = serve(connections=2)
    with serving.connect() as one, serving.connect() as two:
        for peer in (one, two):
            peer.sendall(status(1))
            assert replies(peer, 1)[0].code is Code.OK
        with serving.connect() as third:
            assert replies(third, 1) == [Reply(0, Code.BUSY, [])]
    code = Code.BUSY
    while code is Code.BUSY:  # until the places are given back
        with serving.connect() as peer, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(status(1))
            code = replies(peer, 1)[0].code
    assert code is Code.OK


def test_a_frame_that_never_ends(serve: Callable[..., Serving]) -> None:
    """A peer that sends a byte now and then has the time of one frame, not more."""
    with serve(frame_seconds=0.3).connect() as peer:
        peer.sendall(status(1)[:5])
        peer.settimeout(0.05)
        for _ in range(1000):
            with contextlib.suppress(TimeoutError):
                try:
                    if peer.recv(1) == b"":
                        return
                except ConnectionResetError:  # it closed with a byte of ours unread
                    return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                peer.sendall(b"\0")
        pytest.fail("it waits for ever")


def test_an_idle_connection(serve: Callable[..., Serving]) -> None:
    """Who asks nothing for long loses the connection, with or without having asked before."""
    serving = serve(held=True, idle_seconds=0.2)
    with serving.connect() as silent, serving.connect() as asked:
        asked.sendall(status(1))  # however late: its time begins when it is served
        serving.thread.start()
        assert replies(asked, 1)[0].id == 1
        assert silent.recv(1) == b""
        assert asked.recv(1) == b""


def test_a_peer_that_does_not_read(serve: Callable[..., Serving]) -> None:
    """Answers that nobody takes hold a thread for the time of a frame, then the connection ends."""
    serving = serve(lambda request: (Code.OK, [bytes(60_000)]), frame_seconds=0.2, connections=1)
    with serving.connect() as peer, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(1, 200):
            peer.sendall(status(number))
    code = Code.BUSY
    while code is Code.BUSY:
        with serving.connect() as peer, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(status(1))
            code = replies(peer, 1)[0].code
    assert code is Code.OK


def test_an_answer_too_long_for_a_frame(serve: Callable[..., Serving]) -> None:
    """It is a fault of the enclave, and said to be one."""
    with serve(lambda request: (Code.OK, [bytes(MAX_FRAME)])).connect() as peer:
        peer.sendall(status(3))
        assert replies(peer, 1) == [Reply(3, Code.INTERNAL, [])]


def test_connections_at_once(serve: Callable[..., Serving]) -> None:
    """One that takes long does not hold up another."""
    begun, go_on = threading.Event(), threading.Event()

    def handle(request: Request) -> tuple[Code, list[bytes]]:
        if request.op is Op.INIT:
            begun.set()
            assert go_on.wait(PATIENCE)
        return Code.OK, []

    serving = serve(handle)
    with serving.connect() as slow, serving.connect() as quick:
        slow.sendall(encode_request(Op.INIT, 1, []))
        assert begun.wait(PATIENCE)
        quick.sendall(status(2))
        assert replies(quick, 1)[0].id == 2
        go_on.set()
        assert replies(slow, 1)[0].id == 1


def test_the_socket_is_its_owners(tmp_path: Path) -> None:
    """Nobody else may connect, and what an earlier life left at the path is replaced."""
    path = tmp_path / "s"
    listen_unix(str(path)).close()
    with listen_unix(str(path)):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """What is no socket is not removed."""
    path = tmp_path / "s"
    path.write_text("something")
    with pytest.raises(OSError, match="in use"):
        listen_unix(str(path))
    assert os.path.isfile(path)
