"""The request: a head in clear that says which session and which key, then chunks in HPKE's PSK mode.

Body: `u32be length || C([1, session_id, psk_id, enc])`, then framed chunks. The flag byte is a chunk's
associated data; its place in the stream is HPKE's own sequence number.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from gpu_server.sealed.canonical import decode, encode
from gpu_server.sealed.chunks import FINAL, ChunkReader, cut, frame, parse, unpad
from gpu_server.sealed.errors import CannotOpen, Malformed, StreamBroken
from gpu_server.sealed.grant import VERSION, Binding
from gpu_server.sealed.hpke import KEY_BYTES, WorkerKey, psk_recipient, psk_sender
from gpu_server.sealed.names import check_name
from gpu_server.sealed.response import EXPORT_LABEL, SECRET_BYTES, ResponseOpener, ResponseSealer

MAX_HEAD_BYTES = 512
"""Of a head, its length included."""

_LENGTH = 4
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Head:
    """What a request says in clear."""

    session_id: str
    psk_id: bytes
    enc: bytes

    def __post_init__(self) -> None:
        check_name(self.session_id, "the session's id")
        if len(self.psk_id) != KEY_BYTES or len(self.enc) != KEY_BYTES:
            raise Malformed("a head with a wrong key id or enc")

    def pack(self) -> bytes:
        """The head's bytes, its length before it."""
        return frame(encode([_FORMAT, self.session_id, self.psk_id, self.enc]))


def read_head(body: bytes | memoryview) -> tuple[Head, int]:
    """The head that a request's body begins with, and where its chunks begin. Raises `Malformed`."""
    end = _LENGTH + int.from_bytes(body[:_LENGTH], "big")
    if end > MAX_HEAD_BYTES or end > len(body):
        raise Malformed("not the head of a sealed request")
    match decode(bytes(body[_LENGTH:end]), max_bytes=MAX_HEAD_BYTES):
        case [1, str() as session_id, bytes() as psk_id, bytes() as enc]:
            return Head(session_id, psk_id, enc), end
    raise Malformed("not the head of a sealed request")


def _info(request_id: str) -> bytes:
    return encode([VERSION, "request", check_name(request_id, "the request's id")])


class RequestSealer:
    """The client's side of one request, a new one for each. Its bytes may be sent again as they are."""

    def __init__(
        self, binding: Binding, psk: bytes, request_id: str, *, _ephemeral: X25519PrivateKey | None = None
    ) -> None:
        info, psk_id = _info(request_id), binding.psk_id
        self._sender = psk_sender(binding.worker_key, info, psk, psk_id, ephemeral=_ephemeral)
        self._finished = False
        self.head: bytes = Head(binding.session_id, psk_id, self._sender.enc).pack()

    def seal(self, data: bytes, *, final: bool) -> bytes:
        """The next chunks, framed. Raises `StreamBroken` behind the final one."""
        sealed = BytesIO()
        self._write(sealed, data, final)
        return sealed.getvalue()

    def body(self, plaintext: bytes) -> bytes:
        """The whole body of a request: the head and every chunk."""
        sealed = BytesIO()
        sealed.write(self.head)
        self._write(sealed, plaintext, final=True)
        return sealed.getvalue()

    def answer(self, salt: bytes) -> ResponseOpener:
        """What opens the answer, which begins with `salt`. Raises `Malformed` for what is no salt."""
        return ResponseOpener(self._sender.export(EXPORT_LABEL, SECRET_BYTES), salt)

    def _write(self, to: BytesIO, data: bytes, final: bool) -> None:
        if self._finished:
            raise StreamBroken("nothing comes behind the final chunk")
        self._finished = final
        for flag, padded in cut(data, final=final):
            to.write(frame(flag, self._sender.seal(padded, flag)))


class RequestOpener:
    """The worker's side of one request. After a failure it opens nothing more."""

    def __init__(self, binding: Binding, psk: bytes, request_id: str, key: WorkerKey, head: Head) -> None:
        if (
            head.session_id != binding.session_id
            or head.psk_id != binding.psk_id
            or binding.worker_key != key.public
        ):
            raise CannotOpen
        self._recipient = psk_recipient(head.enc, key, _info(request_id), psk, binding.psk_id)
        self._reader = ChunkReader()
        self._broken = False
        self.finished = False

    def feed(self, data: bytes | memoryview) -> bytes:
        """The plaintext of the chunks that are complete now, which is authentic but perhaps not all there is.

        Raises `CannotOpen`, `Malformed`, or `StreamBroken` for what is behind the final chunk or after a
        failure.
        """
        if self._broken:
            raise StreamBroken("the request was given up")
        self._broken = True  # until this piece has proven itself
        # One chunk after the other: fresh memory for all of them at once costs more than the decryption.
        opened = BytesIO()
        for chunk in self._reader.each(data):
            if self.finished:
                raise StreamBroken("a chunk behind the final one")
            flag, ciphertext = parse(chunk)
            opened.write(unpad(self._recipient.open(ciphertext, flag)))
            self.finished = flag == FINAL
        if self.finished:
            self._reader.close()
        self._broken = False
        return opened.getvalue()

    def finish(self) -> None:
        """The request has ended. Raises `StreamBroken` if its final chunk never came."""
        self._reader.close()
        if self._broken or not self.finished:
            raise StreamBroken("the request ended without its final chunk")

    def open(self, chunks: bytes | memoryview) -> bytes:
        """The plaintext of a whole request, from what follows the head. Raises as `feed` and `finish` do."""
        plaintext = self.feed(chunks)
        self.finish()
        return plaintext

    def answer(self, salt: bytes | None = None) -> ResponseSealer:
        """What seals the answer, once the request is here in full: before, `StreamBroken`.

        `salt` is for test vectors alone: one salt for two answers gives both away.
        """
        self.finish()
        return ResponseSealer(self._recipient.export(EXPORT_LABEL, SECRET_BYTES), salt)
