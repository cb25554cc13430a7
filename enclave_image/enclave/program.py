"""What the enclave does: INIT once, then HELLO and GRANT, and STATUS at any time. No I/O but the NSM.

States: `new` until INIT has made the one RSA key of this life, then `ready` to its end. There are no sessions
and no requests here: a grant is computed from its arguments alone, and its data key is forgotten at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpu_server.sealed.canonical import Value, encode
from gpu_server.sealed.cms import open_recipient
from gpu_server.sealed.errors import CannotOpen, SealedError
from gpu_server.sealed.frames import Code, Op, Request
from gpu_server.sealed.grant import EPOCH_BYTES, Binding, seal_grant
from gpu_server.sealed.nsm import Nsm, NsmError

VERSION: Final = "gpu-server/1"
NONCE_BYTES: Final = 32
ENTROPY_BYTES: Final = 256

Mode = Literal["nitro", "simulated"]
Answer = tuple[Code, Sequence[Value]]


@dataclass(frozen=True, slots=True)
class _Life:
    """What INIT made: the key that KMS encrypts to, and what documents say beside it."""

    key: rsa.RSAPrivateKey = field(repr=False)
    spki: bytes
    user_data: bytes

    @property
    def epoch(self) -> bytes:
        return sha256(self.spki).digest()[:EPOCH_BYTES]


class Program:
    """One enclave. Thread safe. `mix` puts bytes into the kernel's random pool."""

    def __init__(self, nsm: Nsm, *, mode: Mode, mix: Callable[[bytes], object]) -> None:
        self._nsm, self._mode, self._mix = nsm, mode, mix
        self._life: _Life | None = None
        self._init = threading.Lock()

    def handle(self, request: Request) -> Answer:
        """The answer to one request. Raises nothing: what goes wrong is a code, and never says why."""
        try:
            return self._handle(request.op, request.args)
        except CannotOpen:
            return Code.DECRYPT, ()
        except SealedError:
            return Code.MALFORMED, ()
        except (NsmError, OSError):
            return Code.ATTEST, ()
        except Exception:  # noqa: BLE001 -- its text may hold anything, and nobody here may read it
            return Code.INTERNAL, ()

    def _handle(self, op: Op, args: Sequence[Value]) -> Answer:
        life = self._life
        if op is Op.STATUS:
            return Code.OK, ["ready" if life else "new", life.epoch if life else b"", VERSION, self._mode]
        if op is Op.INIT:
            return self._make(args)
        if life is None:
            return Code.POLICY, ()
        return self._hello(life, args) if op is Op.HELLO else _grant(life, args)

    def _hello(self, life: _Life, args: Sequence[Value]) -> Answer:
        match args:
            case (bytes() as nonce,) if len(nonce) == NONCE_BYTES:
                document = self._nsm.attestation(public_key=life.spki, user_data=life.user_data, nonce=nonce)
                return Code.OK, [document]
        return Code.MALFORMED, ()

    def _make(self, records: Sequence[Value]) -> Answer:
        """INIT. The records are in every document of this life, so there is no second INIT."""
        with self._init:
            if self._life is not None:
                return Code.POLICY, ()
            user_data = encode([VERSION, list(records)])
            # The kernel has had little to gather randomness from when an enclave boots.
            self._mix(self._nsm.get_random(ENTROPY_BYTES))
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            self._life = _Life(key, spki, user_data)
            return Code.OK, [self._life.epoch]


def _grant(life: _Life, args: Sequence[Value]) -> Answer:
    match args:
        case (
            str() as tenant,
            str() as pool,
            str() as kms_key_arn,
            str() as session_id,
            bytes() as worker_key,
            bytes() as wrapped_key,
            bytes() as for_recipient,
        ):
            # What is wrong with the names is found before the private key is used.
            binding = Binding(
                tenant=tenant,
                pool=pool,
                kms_key_arn=kms_key_arn,
                session_id=session_id,
                epoch=life.epoch,
                worker_key=worker_key,
                wrapped_key=wrapped_key,
            )
            return Code.OK, [seal_grant(binding, open_recipient(for_recipient, life.key))]
    return Code.MALFORMED, ()
