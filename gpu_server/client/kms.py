"""Data keys: where the key of a sealed session comes from. AWS KMS, or whatever gives a `DataKey`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from gpu_server.sealed.names import region_of

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient

KEY_BYTES: Final = 32
MAX_WRAPPED_BYTES: Final = 6144
"""KMS: the largest `CiphertextBlob` that `Decrypt` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKey:
    """A 32-byte AES key, in the clear and as KMS wrapped it."""

    plaintext: bytes = field(repr=False)
    wrapped: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.plaintext) != KEY_BYTES:
            raise DataKeyFailed("unexpected", f"the data key must have {KEY_BYTES} bytes")
        if not 0 < len(self.wrapped) <= MAX_WRAPPED_BYTES:
            raise DataKeyFailed("unexpected", f"the wrapped key must have 1 to {MAX_WRAPPED_BYTES} bytes")


class DataKeyFailed(Exception):
    """There is no data key. `code` is the key service's own (AccessDeniedException, ...), `unreachable`, or
    `unexpected`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class DataKeys(Protocol):
    """Makes data keys."""

    async def generate(self, kms_key_arn: str, context: Mapping[str, str]) -> DataKey:
        """A new data key under this KMS key; `context` is its encryption context. Raises `DataKeyFailed`."""


class AwsDataKeys:
    """AWS KMS, `GenerateDataKey` (AWS KMS API Reference). Credentials are boto3's to find, the region is the
    key's own; `endpoint_url` is for a KMS that is elsewhere. boto3 is loaded by the first call."""

    def __init__(self, *, endpoint_url: str | None = None) -> None:
        self._endpoint_url = endpoint_url

    async def generate(self, kms_key_arn: str, context: Mapping[str, str]) -> DataKey:
        """As `DataKeys.generate`; the call runs in a thread. Raises `Malformed` for what is no key ARN."""
        return await asyncio.to_thread(self._generate, kms_key_arn, dict(context))

    def _generate(self, kms_key_arn: str, context: Mapping[str, str]) -> DataKey:
        region = region_of(kms_key_arn)
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            kms = _connect(region, self._endpoint_url)
            try:
                made = kms.generate_data_key(KeyId=kms_key_arn, KeySpec="AES_256", EncryptionContext=context)
            finally:
                kms.close()
        except ClientError as error:
            said = error.response.get("Error", {})
            raise DataKeyFailed(said.get("Code", "unknown"), said.get("Message", "no message")) from None
        except (BotoCoreError, ValueError) as error:  # no credentials, no answer; an endpoint that is none
            raise DataKeyFailed("unreachable", str(error)) from None
        if made.get("KeyId") != kms_key_arn:
            raise DataKeyFailed("unexpected", "KMS answered for another key")
        return DataKey(plaintext=made.get("Plaintext", b""), wrapped=made.get("CiphertextBlob", b""))


def _connect(region: str, endpoint_url: str | None) -> KMSClient:
    import boto3
    from botocore.config import Config

    # It logs every answer in full, and this one's is the data key in clear.
    logging.getLogger("botocore.parsers").setLevel(logging.INFO)
    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3})
    return boto3.session.Session().client("kms", region_name=region, endpoint_url=endpoint_url, config=config)
