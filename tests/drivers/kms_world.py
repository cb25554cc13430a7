"""KMS for tests: the emulator, an enclave's documents, and servers that answer what KMS should not."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from gpu_server.kms_emulator import EmulatedKey
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient

REGION = "eu-central-1"
ARN = f"arn:aws:kms:{REGION}:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OTHER_ARN = f"arn:aws:kms:{REGION}:111122223333:key/other"
CONTEXT = {"tenant": "acme", "pool": "chat"}
PCRS = {0: b"\1" * 48, 1: b"\2" * 48, 2: b"\3" * 48}
IMAGE = "kms:RecipientAttestation:ImageSha384"

KMS_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret-access-key",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def aws_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for boto3, and no setting of this machine."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in KMS_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def key(**options: Any) -> EmulatedKey:
    """A key that only the enclave of these tests may use."""
    return EmulatedKey(**{"conditions": {IMAGE: PCRS[0].hex()}, **options})


@cache
def enclave_key() -> rsa.RSAPrivateKey:
    """The enclave's own."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public(private: Any) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    der: bytes = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return der


def document(nsm: SoftwareNsm | None = None, *, public_key: bytes | None = None) -> bytes:
    """A fresh document of the enclave."""
    module = Nsm((nsm or SoftwareNsm(PCRS)).process)
    return module.attestation(public_key=public_key or public(enclave_key()), nonce=bytes(32))


def at(when: datetime, **options: Any) -> SoftwareNsm:
    """A module whose clock stands."""
    return SoftwareNsm(PCRS, now=lambda: when, **options)


def now() -> datetime:
    return datetime.now(UTC)


def kms_client(url: str) -> KMSClient:
    """boto3, against a server of these tests."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "kms",
        region_name=REGION,
        endpoint_url=url,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
    )


@asynccontextmanager
async def played_kms(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server that answers as it likes."""
    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
