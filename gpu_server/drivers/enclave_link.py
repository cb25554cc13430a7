"""Frames to the enclave and back, over vsock or a Unix socket: what docs/sealed.md calls the enclave's wire.

Sockets are driven by hand (`sock_recv`, `sock_sendall`), because no event loop's streams know vsock. What
comes back is bounded and must be exactly what was asked for: an enclave that is none can only fail to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gpu_server.ports import EnclaveDown, EnclaveRefused
from gpu_server.sealed.canonical import Value
from gpu_server.sealed.chunks import ChunkReader
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.frames import Code, Op, Reply, decode_reply, encode_request
from gpu_server.sealed.grant import EPOCH_BYTES, GRANT_BYTES, Binding
from gpu_server.sealed.names import check_name

Address = Path | tuple[int, int]
"""A Unix socket, or vsock's (CID, port)."""

MAX_DOCUMENT_BYTES: Final = 0x3000
"""An NSM's longest answer."""
INIT_SECONDS: Final = 30.0
"""At least so long for INIT: it looks for two big primes, on a machine that may be busy."""

_MAX_REPLY: Final = MAX_DOCUMENT_BYTES + 256
"""A document and what is around it. Reading is work for the event loop, so no frame of 64 KiB is read."""
_PIECE: Final = 16384
_NO_REQUEST: Final = 0
_MEANING: Final = {
    Code.BUSY: "the enclave is busy",
    Code.KMS_DENIED: "the enclave was denied the key by KMS",
    Code.KMS_DOWN: "the enclave cannot reach KMS",
    Code.POLICY: "the enclave does not do this in the state it is in",
    Code.REPLAY: "the enclave has seen this request before",
    Code.DECRYPT: "the enclave cannot open what KMS answered: it was not encrypted for this life of it",
    Code.ATTEST: "the enclave's security module does not answer as it should",
    Code.MALFORMED: "the enclave does not take this request",
    Code.INTERNAL: "the enclave has met a fault of its own",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveStatus:
    """What an enclave says of itself. `epoch` is None while it is `new`."""

    state: Literal["new", "ready"]
    epoch: bytes | None
    version: str
    mode: Literal["nitro", "simulated"]


class EnclaveLink:
    """Requests to one enclave, over at most `connections` at once; more wait for one.

    Each but INIT ends within `timeout` seconds, and raises `EnclaveDown` (no answer, or none that makes
    sense) or `EnclaveRefused` (it said no).
    """

    def __init__(self, address: Address, *, timeout: float = 5.0, connections: int = 4) -> None:
        self._address, self._timeout = address, timeout
        self._places = asyncio.Semaphore(connections)
        self._idle: list[socket.socket] = []
        self._closings = 0
        self._ids = itertools.count(_NO_REQUEST + 1)

    async def status(self) -> EnclaveStatus:
        """Ask how it is."""
        match await self._ask(Op.STATUS):
            case ["new", b"", str() as version, ("nitro" | "simulated") as mode]:
                return EnclaveStatus(state="new", epoch=None, version=_version(version), mode=mode)
            case ["ready", bytes() as epoch, str() as version, ("nitro" | "simulated") as mode]:
                if len(epoch) == EPOCH_BYTES:
                    return EnclaveStatus(state="ready", epoch=epoch, version=_version(version), mode=mode)
        raise _nonsense()

    async def init(self, records: Sequence[bytes]) -> bytes:
        """Have it make its key, once in its life; its epoch (16 bytes)."""
        return _bytes(await self._ask(Op.INIT, *records), EPOCH_BYTES, EPOCH_BYTES)

    async def hello(self, nonce: bytes) -> bytes:
        """An attestation document with this nonce (32 bytes)."""
        return _bytes(await self._ask(Op.HELLO, nonce), 1, MAX_DOCUMENT_BYTES)

    async def grant(self, binding: Binding, for_recipient: bytes) -> bytes:
        """A key grant (80 bytes)."""
        names = (binding.tenant, binding.pool, binding.kms_key_arn, binding.session_id)
        args = (*names, binding.worker_key, binding.wrapped_key, for_recipient)
        return _bytes(await self._ask(Op.GRANT, *args), GRANT_BYTES, GRANT_BYTES)

    def close(self) -> None:
        """Let go of all connections, those in use when they are done; later requests make new ones."""
        self._closings += 1
        while self._idle:
            self._idle.pop().close()

    async def _ask(self, op: Op, *args: Value) -> list[Value]:
        number = next(self._ids)
        limit = max(self._timeout, INIT_SECONDS) if op is Op.INIT else self._timeout
        try:
            frame = encode_request(op, number, args)
        except SealedError as error:
            raise EnclaveRefused(Code.MALFORMED, _MEANING[Code.MALFORMED]) from error
        try:
            async with asyncio.timeout(limit), self._places:
                reply = await self._exchange(frame)
        except OSError as error:  # of which a TimeoutError is one: ours, or the kernel's with its number
            if isinstance(error, TimeoutError) and error.errno is None:
                raise EnclaveDown(f"the enclave does not answer within {limit:g} s") from error
            raise EnclaveDown(f"the enclave cannot be reached: {error.strerror or error}") from error
        except SealedError as error:
            raise _nonsense() from error
        if reply.code is not Code.OK and reply.id in (number, _NO_REQUEST):
            raise EnclaveRefused(reply.code, _MEANING[reply.code])
        if reply.id != number:
            raise _nonsense()
        return reply.result

    async def _exchange(self, frame: bytes) -> Reply:
        """One request and its reply. A connection is kept only when both went through in full."""
        while self._idle:
            # It may have been closed, or have something to say that nobody asked for.
            kept = self._idle.pop()
            if _is_quiet(kept):
                break
            kept.close()
        else:
            kept = await self._connect()
        done, closings = False, self._closings
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why
                await asyncio.get_running_loop().sock_sendall(kept, frame)
            reply = await _read(kept)
            done = reply.id != _NO_REQUEST
            return reply
        finally:
            if done and closings == self._closings:
                self._idle.append(kept)
            else:
                kept.close()

    async def _connect(self) -> socket.socket:
        if isinstance(self._address, Path):
            return await _connect_unix(self._address)
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        return await _connected(sock, self._address)


async def _connect_unix(path: Path) -> socket.socket:
    """Connect to the socket at `path`, and to nothing that it may be a link to."""
    held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(held).st_mode):
            raise OSError(f"{path.name} is not a socket")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        return await _connected(sock, f"/proc/self/fd/{held}")
    finally:
        os.close(held)


async def _connected(sock: socket.socket, address: str | tuple[int, int]) -> socket.socket:
    try:
        try:
            sock.connect(address)
        except BlockingIOError:
            if sock.family == socket.AF_UNIX:  # not in progress, but refused: too many wait already
                raise
            await _writable(sock)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error)) from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock)


async def _read(sock: socket.socket) -> Reply:
    """Exactly one reply. Raises `SealedError` and OSError."""
    frames, loop = ChunkReader(_MAX_REPLY), asyncio.get_running_loop()
    while True:
        piece = await loop.sock_recv(sock, _PIECE)
        if not piece:
            raise ConnectionResetError("it closed the connection")
        if payloads := frames.feed(piece):
            frames.close()
            if len(payloads) > 1:
                raise _nonsense()
            return decode_reply(payloads[0])


def _is_quiet(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _bytes(result: list[Value], shortest: int, longest: int) -> bytes:
    match result:
        case [bytes() as value] if shortest <= len(value) <= longest:
            return value
    raise _nonsense()


def _version(text: str) -> str:
    """It is logged, so it is a name and nothing else."""
    try:
        return check_name(text, "version")
    except SealedError as error:
        raise _nonsense() from error


def _nonsense() -> EnclaveDown:
    return EnclaveDown("what listens where the enclave should does not speak as it")
