"""The node's own key: it signs certificates of washes, judges them, and marks leases without naming anybody.

`STATE_DIR/node_key` is made once and never written again: certificates of another key are those of another
node. It holds the Ed25519 seed and its public key, 32 bytes each, so that a damaged file is known for one.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gpu_server.core.errors import CertificateRejected
from gpu_server.core.slots import Certificate, WashTier
from gpu_server.sealed import wash
from gpu_server.sealed.canonical import encode

KEY_FILE: Final = "node_key"
_HALF: Final = 32
_WHOLE: Final = 2 * _HALF


class NodeKeyUnusable(Exception):
    """The node's key cannot be used, and is left as it is. The message says what to do."""


@dataclass(frozen=True, slots=True)
class NodeSeal:
    """Signs and judges certificates of this node. `open` makes it.

    `enclave` says whether a certificate must have an enclave's document, or must have none; `allow_simulated`
    accepts one of a simulated enclave.
    """

    _key: Ed25519PrivateKey = field(repr=False)
    enclave: bool
    allow_simulated: bool
    public_key: bytes
    """What clients know the node by, 32 bytes."""
    _secret: bytes = field(repr=False)

    @classmethod
    def open(cls, state_dir: Path, *, enclave: bool, allow_simulated: bool = False) -> NodeSeal:
        """The seal of the key in `state_dir`, which is made if there is none. Raises `NodeKeyUnusable`."""
        path = state_dir / KEY_FILE
        try:
            seed = _read(path)
            if seed is None:
                _make(path)
                seed = _read(path)
        except OSError as error:
            raise NodeKeyUnusable(f"the node's key {path} cannot be used: {error.strerror}") from error
        if seed is None:
            raise NodeKeyUnusable(f"the node's key {path} was removed while the service started")
        key = Ed25519PrivateKey.from_private_bytes(seed)
        info = encode(["gpu-server/1", "lease marks"])
        return cls(
            _key=key,
            enclave=enclave,
            allow_simulated=allow_simulated,
            public_key=key.public_key().public_bytes_raw(),
            _secret=HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(seed),
        )

    def issue(self, record: bytes, document: bytes | None) -> bytes:
        """Sign a record of this node. Raises `SealedError` for what `judge` would refuse by its form."""
        return wash.issue(record, document, self._key)

    def judge(self, raw: bytes) -> Certificate:
        """What a certificate says, if this node signed it and it holds.

        Raises `CertificateRejected`, of slot `?` where it cannot be read.
        """
        try:
            verified = wash.verify_certificate(
                raw,
                node_key=self.public_key,
                enclave="required" if self.enclave else "absent",
                allow_simulated=self.allow_simulated,
            )
        except wash.WashRefused as error:
            raise CertificateRejected(wash.slot_of(raw) or "?", f"{error.reason}: {error}") from error
        record = verified.record
        return Certificate(
            raw=raw,
            hash=verified.hash,
            record_hash=verified.record_hash,
            slot_id=record.slot_id,
            slot_uuid=record.slot_uuid,
            fence=record.fence,
            prev=record.prev,
            tier=WashTier(record.tier),
        )

    def lease_mark(self, tenant: str, session_id: str) -> bytes:
        """Names a lease, 32 bytes: the same for the same tenant and session; others cannot compute it."""
        return hmac.digest(self._secret, encode(["gpu-server/1", "lease", tenant, session_id]), "sha256")


def _read(path: Path) -> bytes | None:
    """The seed in a key file; None where there is no file. Raises OSError and `NodeKeyUnusable`."""
    if path.is_symlink():
        raise NodeKeyUnusable(f"the node's key {path} must be a file, not a link to one")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NodeKeyUnusable(f"the node's key {path} is no regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise NodeKeyUnusable(
                f"the node's key {path} must belong to the service, with mode 0600: whoever else can read it"
                " can sign certificates. If nobody has read it: chown and chmod 600"
            )
        data = os.read(descriptor, _WHOLE + 1)
    finally:
        os.close(descriptor)
    seed, public = data[:_HALF], data[_HALF:]
    if len(data) == _WHOLE:
        found = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        if hmac.compare_digest(found, public):
            return seed
    what = "is empty" if not data else "is damaged" if len(data) == _WHOLE else f"has not {_WHOLE} bytes"
    raise NodeKeyUnusable(
        f"the node's key {path} {what}. Put it back from a backup, or move it away: the service then makes"
        " a new one, and this is another node to all who know the old key"
    )


def _make(path: Path) -> None:
    """Write a new key, whole and on the disk, unless there is a file already. Raises OSError."""
    key = Ed25519PrivateKey.generate()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes_raw() + key.public_key().public_bytes_raw())
            file.flush()
            os.fsync(descriptor)
        # A link, unlike a rename, replaces nothing.
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
