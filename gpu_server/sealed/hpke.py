"""HPKE (RFC 9180), one suite: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

pyhpke computes; this module decides what may be computed and has one error for every failure. pyhpke picks
the mode by whether a psk is empty, takes a psk without an id, and raises ValueError for a bad key of the
other end: none of that gets out.
"""

from __future__ import annotations

from base64 import b64encode

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pyhpke import (
    AEADId,
    CipherSuite,
    ContextInterface,
    KDFId,
    KEMId,
    KEMKey,
    KEMKeyInterface,
    KEMKeyPair,
    PyHPKEError,
)

from gpu_server.sealed.errors import CannotOpen, Malformed

KEY_BYTES = 32
"""Of an X25519 key, of an `enc`, of a psk and of a psk's id."""

TAG_BYTES = 16

_SUITE = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES256_GCM)


class WorkerKey:
    """A worker's X25519 pair. The private half never leaves the object: no repr, no pickle, no bytes."""

    __slots__ = ("_private", "public")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> WorkerKey:
        """A new pair, from the operating system's randomness."""
        return cls(X25519PrivateKey.generate())

    def __repr__(self) -> str:
        return f"WorkerKey(public={b64encode(self.public).decode()})"

    def __reduce__(self) -> str:
        raise TypeError("a worker's key stays in its process")


class Sender:
    """Seals messages in order to one recipient."""

    __slots__ = ("_context", "enc")

    def __init__(self, enc: bytes, context: ContextInterface) -> None:
        self.enc = enc
        self._context = context

    def seal(self, plaintext: bytes, aad: bytes) -> bytes:
        """The next message, 16 bytes longer than `plaintext`."""
        return self._context.seal(plaintext, aad)

    def export(self, label: bytes, length: int) -> bytes:
        """A secret that both ends can derive from this context, and nobody else."""
        return self._context.export(label, length)


class Recipient:
    """Opens messages in the order they were sealed in."""

    __slots__ = ("_context",)

    def __init__(self, context: ContextInterface) -> None:
        self._context = context

    def open(self, ciphertext: bytes, aad: bytes) -> bytes:
        """The next message. After `CannotOpen` the context is of no use: a failure spends a nonce."""
        try:
            return self._context.open(ciphertext, aad)
        except PyHPKEError:
            raise CannotOpen from None

    def export(self, label: bytes, length: int) -> bytes:
        """A secret that both ends can derive from this context, and nobody else."""
        return self._context.export(label, length)


def base_sender(to: bytes, info: bytes, *, ephemeral: X25519PrivateKey | None = None) -> Sender:
    """Base mode to a public key. Raises `Malformed` for a key that nothing can be sealed to.

    `ephemeral` is for test vectors alone: used twice, it gives everything away.
    """
    return _sender(to, info, b"", b"", ephemeral)


def base_recipient(enc: bytes, key: WorkerKey, info: bytes) -> Recipient:
    """The other end of `base_sender`. Raises `CannotOpen`."""
    return _recipient(enc, key, info, b"", b"")


def psk_sender(
    to: bytes, info: bytes, psk: bytes, psk_id: bytes, *, ephemeral: X25519PrivateKey | None = None
) -> Sender:
    """PSK mode to a public key. Raises `Malformed` for a key that cannot be sealed to, or a psk that is none.

    `ephemeral` is for test vectors alone.
    """
    _check_psk(psk, psk_id)
    return _sender(to, info, psk, psk_id, ephemeral)


def psk_recipient(enc: bytes, key: WorkerKey, info: bytes, psk: bytes, psk_id: bytes) -> Recipient:
    """The other end of `psk_sender`. Raises `CannotOpen`, and `Malformed` for a psk that is none."""
    _check_psk(psk, psk_id)
    return _recipient(enc, key, info, psk, psk_id)


def _check_psk(psk: bytes, psk_id: bytes) -> None:
    # With an empty psk the library would be in base mode, and say nothing.
    if len(psk) != KEY_BYTES or not psk_id:
        raise Malformed(f"a psk has {KEY_BYTES} bytes and an id")


def _sender(to: bytes, info: bytes, psk: bytes, psk_id: bytes, ephemeral: X25519PrivateKey | None) -> Sender:
    pair = None
    if ephemeral is not None:
        pair = KEMKeyPair(_key(ephemeral), _key(ephemeral.public_key()))
    try:
        enc, context = _SUITE.create_sender_context(
            _key(X25519PublicKey.from_public_bytes(to)), info, psk=psk, psk_id=psk_id, eks=pair
        )
    except (PyHPKEError, ValueError):
        raise Malformed("not an X25519 key that can be sealed to") from None
    return Sender(enc, context)


def _recipient(enc: bytes, key: WorkerKey, info: bytes, psk: bytes, psk_id: bytes) -> Recipient:
    try:
        context = _SUITE.create_recipient_context(enc, _key(key._private), info, psk=psk, psk_id=psk_id)
    except (PyHPKEError, ValueError):
        raise CannotOpen from None
    return Recipient(context)


def _key(key: X25519PrivateKey | X25519PublicKey) -> KEMKeyInterface:
    return KEMKey.from_pyca_cryptography_key(key)
