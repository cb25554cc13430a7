"""A key service in memory: it wraps data keys for its tenants, and releases them to enclaves alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gpu_server.ports import KeyServiceDenied, KeyServiceDown
from gpu_server.sealed.attestation import verify
from gpu_server.sealed.canonical import encode
from gpu_server.sealed.cms import make_recipient
from gpu_server.sealed.errors import AttestationRefused

ARN = "arn:aws:kms:eu-central-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000001"
OTHER_ARN = "arn:aws:kms:eu-central-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000002"
UNKNOWN_ARN = "arn:aws:kms:eu-central-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000009"


class FakeKeyService:
    """`KeyService`, and what a tenant asks of it. What it wraps is bound to its key and its context.

    Switches: `down` says why nobody answers; `gate` holds every release until it is set.
    """

    def __init__(self, *arns: str) -> None:
        self.down: str | None = None
        self.gate: asyncio.Event | None = None
        self._keys = {arn: AESGCM(AESGCM.generate_key(256)) for arn in arns or (ARN, OTHER_ARN)}

    def data_key(self, kms_key_arn: str, context: Mapping[str, str]) -> tuple[bytes, bytes]:
        """A new data key, and the same wrapped."""
        plain, nonce = os.urandom(32), os.urandom(12)
        return plain, nonce + self._keys[kms_key_arn].encrypt(nonce, plain, _about(kms_key_arn, context))

    async def release(
        self, *, kms_key_arn: str, wrapped_key: bytes, context: Mapping[str, str], document: bytes
    ) -> bytes:
        if self.gate is not None:
            await self.gate.wait()
        if self.down is not None:
            raise KeyServiceDown(self.down)
        if kms_key_arn not in self._keys:
            raise KeyServiceDenied("there is no such key")
        try:
            enclave = verify(document, nonce=None, pcrs={}, allow_simulated=True)
            about = _about(kms_key_arn, context)
            plain = self._keys[kms_key_arn].decrypt(wrapped_key[:12], wrapped_key[12:], about)
        except (AttestationRefused, InvalidTag, ValueError) as error:
            raise KeyServiceDenied("this document, or this context, does not get that key") from error
        assert enclave.public_key is not None
        return make_recipient(plain, enclave.public_key)


def _about(kms_key_arn: str, context: Mapping[str, str]) -> bytes:
    return encode([kms_key_arn, *(f"{name}={context[name]}" for name in sorted(context))])
