"""The grant: how the enclave gives one session's worker the one key that requests to it are opened with.

Client, enclave and worker each compute `g = C(["gpu-server/1", "grant", tenant, pool, arn, session, epoch,
worker key, SHA-256(wrapped key)])` from what they know themselves, and the pre-shared key (psk) from it and
the data key. So a name, an enclave or a key that is not the same at all ends gives another psk, and nothing
opens.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gpu_server.sealed.canonical import encode
from gpu_server.sealed.errors import CannotOpen, Malformed
from gpu_server.sealed.hpke import KEY_BYTES, TAG_BYTES, WorkerKey, base_recipient, base_sender
from gpu_server.sealed.names import check_name, region_of

__all__ = ["Binding", "WorkerKey", "open_grant", "seal_grant"]

VERSION = "gpu-server/1"
EPOCH_BYTES = 16
DATA_KEY_BYTES = 32
PSK_BYTES = 32
MAX_WRAPPED_KEY = 6144
"""The longest ciphertext that KMS `Decrypt` takes."""

GRANT_BYTES = KEY_BYTES + PSK_BYTES + TAG_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Everything that a session's keys are bound to, none of it secret. Checks itself: raises `Malformed`."""

    tenant: str
    pool: str
    kms_key_arn: str
    session_id: str
    epoch: bytes
    """The first 16 bytes of SHA-256 of the enclave's public key, as SubjectPublicKeyInfo."""
    worker_key: bytes
    """The worker's X25519 public key, 32 bytes."""
    wrapped_key: bytes
    """The data key as KMS encrypted it, 1 to 6,144 bytes."""

    def __post_init__(self) -> None:
        check_name(self.tenant, "the tenant")
        check_name(self.pool, "the pool")
        check_name(self.session_id, "the session's id")
        region_of(self.kms_key_arn)
        if len(self.epoch) != EPOCH_BYTES:
            raise Malformed(f"an epoch has {EPOCH_BYTES} bytes")
        if len(self.worker_key) != KEY_BYTES:
            raise Malformed(f"a worker's key has {KEY_BYTES} bytes")
        if not 1 <= len(self.wrapped_key) <= MAX_WRAPPED_KEY:
            raise Malformed(f"a wrapped key has 1 to {MAX_WRAPPED_KEY} bytes")

    @property
    def info(self) -> bytes:
        """`g`, the context that everything of this session is derived in."""
        wrapped = sha256(self.wrapped_key).digest()
        names = [VERSION, "grant", self.tenant, self.pool, self.kms_key_arn, self.session_id]
        return encode([*names, self.epoch, self.worker_key, wrapped])

    @property
    def psk_id(self) -> bytes:
        """SHA-256 of `g`: what a request names its key by."""
        return sha256(self.info).digest()

    def psk(self, data_key: bytes) -> bytes:
        """This session's pre-shared key, 32 bytes, from the 32 bytes that KMS wrapped. Raises `Malformed`."""
        if len(data_key) != DATA_KEY_BYTES:
            raise Malformed(f"a data key has {DATA_KEY_BYTES} bytes")
        return HKDF(algorithm=SHA256(), length=PSK_BYTES, salt=None, info=self.info).derive(data_key)


def seal_grant(binding: Binding, data_key: bytes, *, _ephemeral: X25519PrivateKey | None = None) -> bytes:
    """The enclave's side: the psk, sealed to the worker. `enc || ct`, 80 bytes. Raises `Malformed`."""
    g = binding.info
    sender = base_sender(binding.worker_key, g, ephemeral=_ephemeral)
    return sender.enc + sender.seal(binding.psk(data_key), b"")


def open_grant(binding: Binding, grant: bytes, key: WorkerKey) -> bytes:
    """The worker's side: the psk. Raises `CannotOpen` for a grant to anybody else, or about anything else."""
    if len(grant) != GRANT_BYTES or binding.worker_key != key.public:
        raise CannotOpen
    return base_recipient(grant[:KEY_BYTES], key, binding.info).open(grant[KEY_BYTES:], b"")
