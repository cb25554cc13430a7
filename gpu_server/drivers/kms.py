"""AWS KMS, by boto3: data keys, released to an enclave.

The service never asks for a key in the clear, and takes no answer that has one in it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog

from gpu_server.drivers.blocking import call_in_thread
from gpu_server.ports import KeyServiceDenied, KeyServiceDown
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.names import region_of

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient

AT_ONCE: Final = 16
REGIONS: Final = 4
"""Clients that are kept, the least used go first: a tenant chooses the region."""
TRIES: Final = 3
MAX_WRAPPED_BYTES: Final = 6144
MAX_ANSWER_BYTES: Final = 8192
_DENIED: Final = (
    "AccessDeniedException",
    "DisabledException",
    "IncorrectKeyException",
    "InvalidArnException",
    "InvalidCiphertextException",
    "InvalidKeyUsageException",
    "KMSInvalidStateException",
    "NotFoundException",
    "ValidationException",
)

log = structlog.get_logger()


class AwsKeyService:
    """`ports.KeyService`. Credentials are boto3's to find; the region is that of each key's ARN, also with an
    `endpoint_url` (an emulator, a VPC endpoint). Times in seconds."""

    def __init__(
        self, endpoint_url: str | None = None, *, connect_seconds: float = 3.0, read_seconds: float = 5.0
    ) -> None:
        self._endpoint_url = endpoint_url
        self._connect, self._read = connect_seconds, read_seconds
        # Every try, and the pauses between them; credentials may have to be fetched first.
        self._limit = TRIES * (connect_seconds + read_seconds) + 10.0
        self._places = asyncio.Semaphore(AT_ONCE)
        self._clients: OrderedDict[str, KMSClient] = OrderedDict()
        self._lock = threading.Lock()

    async def release(
        self, *, kms_key_arn: str, wrapped_key: bytes, context: Mapping[str, str], document: bytes
    ) -> bytes:
        """See `ports.KeyService`. Messages name KMS's code, not its text: that speaks of the node's role. The
        log has the id under which CloudTrail has the rest."""
        try:
            region = region_of(kms_key_arn)
        except Malformed as error:
            raise KeyServiceDenied(str(error)) from None
        if not 1 <= len(wrapped_key) <= MAX_WRAPPED_BYTES:
            raise KeyServiceDenied(f"a wrapped key has 1 to {MAX_WRAPPED_BYTES} bytes")

        def ask() -> bytes:
            return self._ask(region, kms_key_arn, wrapped_key, context, document)

        async with self._places:
            try:
                return await call_in_thread(ask, limit=self._limit, name="kms")
            except TimeoutError:
                raise KeyServiceDown(f"KMS did not answer within {self._limit:g} s") from None

    def close(self) -> None:
        """Let go of idle connections. The next call makes new ones."""
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close()

    def _ask(
        self, region: str, arn: str, wrapped_key: bytes, context: Mapping[str, str], document: bytes
    ) -> bytes:
        with _telling(arn, context):
            answer = self._client(region).decrypt(
                KeyId=arn,
                CiphertextBlob=wrapped_key,
                EncryptionContext=context,
                Recipient={
                    "KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256",
                    "AttestationDocument": document,
                },
            )
        # KMS may name the field and leave it empty. Anything in it means that it ignored the recipient.
        if answer.get("Plaintext"):
            raise KeyServiceDown("KMS answered with the key in the clear: it does not know recipients")
        sealed = answer.get("CiphertextForRecipient")
        if not sealed or len(sealed) > MAX_ANSWER_BYTES or answer.get("KeyId") != arn:
            raise KeyServiceDown("KMS answered something else than was asked for")
        return sealed

    def _client(self, region: str) -> KMSClient:
        import boto3
        from botocore.config import Config

        # Making a client is not safe in threads; using one is.
        with self._lock:
            client = self._clients.get(region)
            if client is None:
                client = boto3.session.Session().client(
                    "kms",
                    region_name=region,
                    endpoint_url=self._endpoint_url,
                    config=Config(
                        connect_timeout=self._connect,
                        read_timeout=self._read,
                        max_pool_connections=AT_ONCE,
                        retries={"mode": "standard", "total_max_attempts": TRIES},
                    ),
                )
                self._clients[region] = client
            self._clients.move_to_end(region)
            while len(self._clients) > REGIONS:
                self._clients.popitem(last=False)
            return client


@contextmanager
def _telling(arn: str, context: Mapping[str, str]) -> Iterator[None]:
    """Says boto3's errors in our words, which hold no request and no credential; logs those of KMS itself."""
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))[:60]
        request_id = str(error.response.get("ResponseMetadata", {}).get("RequestId", "?"))[:60]
        about = {"kms_key_arn": arn, "tenant": context.get("tenant"), "pool": context.get("pool")}
        if code in _DENIED:
            log.warning("kms.denied", code=code, request_id=request_id, **about)
            raise KeyServiceDenied(f"KMS does not release the key ({code})") from None
        log.warning("kms.failed", code=code, request_id=request_id, **about)
        raise KeyServiceDown(f"KMS answered {code}") from None
    except boto.ParamValidationError:
        raise KeyServiceDenied("KMS cannot take this request") from None
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError):
        raise KeyServiceDown("this node has no credentials for KMS") from None
    except Exception as error:  # noqa: BLE001 -- its parser raises AttributeError, too
        raise KeyServiceDown(f"KMS cannot be reached ({type(error).__name__})") from None
