"""The response: chunks under a key that only the request's two ends can derive, as in RFC 9458, section 4.4.

`secret` is exported from the request's HPKE context; the worker draws a salt. Chunk i is `flag ||
AES-256-GCM(key, base xor i, padded plaintext, AAD = flag)`, so that a chunk elsewhere in the stream, or with
another flag, does not open.
"""

from __future__ import annotations

from os import urandom

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gpu_server.sealed.chunks import FINAL, cut, parse, unpad
from gpu_server.sealed.errors import CannotOpen, Malformed, StreamBroken

SALT_BYTES = 32
SECRET_BYTES = 32
EXPORT_LABEL = b"response"

_NONCE_BYTES = 12


def _keys(secret: bytes, salt: bytes) -> tuple[AESGCM, int]:
    def derive(label: bytes, length: int) -> bytes:
        return HKDF(algorithm=SHA256(), length=length, salt=salt, info=label).derive(secret)

    if len(salt) != SALT_BYTES:
        raise Malformed(f"a response begins with a salt of {SALT_BYTES} bytes")
    return AESGCM(derive(b"key", 32)), int.from_bytes(derive(b"nonce", _NONCE_BYTES), "big")


class ResponseSealer:
    """The worker's side of one answer. `RequestOpener.answer` makes it."""

    def __init__(self, secret: bytes, salt: bytes | None = None) -> None:
        self.salt = urandom(SALT_BYTES) if salt is None else salt
        self._key, self._base = _keys(secret, self.salt)
        self._count = 0
        self.finished = False

    def seal(self, plaintext: bytes, *, final: bool) -> list[bytes]:
        """The next chunks, not framed: as many as the plaintext needs, and with `final` one at least.

        Raises `StreamBroken` behind the final one.
        """
        if self.finished:
            raise StreamBroken("nothing comes behind the final chunk")
        self.finished = final
        chunks = []
        for flag, padded in cut(plaintext, final=final):
            nonce = (self._base ^ self._count).to_bytes(_NONCE_BYTES, "big")
            self._count += 1
            chunks.append(flag + self._key.encrypt(nonce, padded, flag))
        return chunks


class ResponseOpener:
    """The client's side of one answer. `RequestSealer.answer` makes it."""

    def __init__(self, secret: bytes, salt: bytes) -> None:
        self._key, self._base = _keys(secret, salt)
        self._count = 0
        self._broken = False
        self.finished = False

    def open(self, chunk: bytes) -> bytes:
        """The plaintext of the next chunk, in order from 0, not framed.

        Raises `CannotOpen` or `Malformed` for any other chunk than the next one, and from then on
        `StreamBroken`, as for a chunk behind the final one.
        """
        if self.finished or self._broken:
            raise StreamBroken("a chunk behind the end of the stream")
        self._broken = True  # until this chunk has proven itself
        flag, ciphertext = parse(chunk)
        nonce = (self._base ^ self._count).to_bytes(_NONCE_BYTES, "big")
        try:
            padded = self._key.decrypt(nonce, ciphertext, flag)
        except InvalidTag:
            raise CannotOpen from None
        plaintext = unpad(padded)
        self._count += 1
        self._broken = False
        self.finished = flag == FINAL
        return plaintext

    def close(self) -> None:
        """The stream has ended. Raises `StreamBroken` if its final chunk never came."""
        if not self.finished:
            raise StreamBroken("the stream ended without its final chunk")
