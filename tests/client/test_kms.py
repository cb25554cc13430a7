"""Data keys from KMS, by boto3 against the emulator: what comes, and every way in which none does."""

from __future__ import annotations

import json
import logging
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from gpu_server.client import AwsDataKeys, DataKey, DataKeyFailed, Malformed
from gpu_server.kms_emulator import EmulatedKey, KmsEmulator
from tests.client.sealed_world import ARN

CONTEXT = {"tenant": "acme", "pool": "chat"}


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials as an emulator wants them: any."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


async def test_a_data_key() -> None:
    """A data key is new each time, and is 32 bytes; the key that wraps it is the one that was named."""
    async with KmsEmulator({ARN: EmulatedKey()}) as kms:
        keys = AwsDataKeys(endpoint_url=kms.url)
        one, two = await keys.generate(ARN, CONTEXT), await keys.generate(ARN, CONTEXT)
    assert len(one.plaintext) == len(two.plaintext) == 32
    assert one.plaintext != two.plaintext
    assert one.wrapped != two.wrapped
    assert one.plaintext not in one.wrapped


async def test_the_context() -> None:
    """The encryption context reaches KMS: a policy may insist on it."""
    conditions = {"kms:EncryptionContext:tenant": "acme", "kms:EncryptionContext:pool": "chat"}
    async with KmsEmulator({ARN: EmulatedKey(conditions=conditions)}) as kms:
        keys = AwsDataKeys(endpoint_url=kms.url)
        assert await keys.generate(ARN, CONTEXT)
        with pytest.raises(DataKeyFailed) as failed:
            await keys.generate(ARN, {"tenant": "other", "pool": "chat"})
        assert failed.value.code == "AccessDeniedException"


async def test_no_such_key() -> None:
    """A key that is not there, or is disabled, is told with KMS's own code."""
    async with KmsEmulator({ARN: EmulatedKey(enabled=False)}) as kms:
        keys = AwsDataKeys(endpoint_url=kms.url)
        for arn, code in ((ARN, "DisabledException"), (ARN[:-1] + "2", "NotFoundException")):
            with pytest.raises(DataKeyFailed) as failed:
                await keys.generate(arn, CONTEXT)
            assert failed.value.code == code


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port on which nobody listens, and that nobody else can get."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


async def test_nobody_there(monkeypatch: pytest.MonkeyPatch, deaf_port: int) -> None:
    """A KMS that cannot be reached, and missing credentials, are told in words."""
    keys = AwsDataKeys(endpoint_url=f"http://127.0.0.1:{deaf_port}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pauses between boto3's tries
    with pytest.raises(DataKeyFailed, match="Could not connect") as failed:
        await keys.generate(ARN, CONTEXT)
    assert failed.value.code == "unreachable"
    with pytest.raises(DataKeyFailed, match="Invalid endpoint"):
        await AwsDataKeys(endpoint_url="nonsense").generate(ARN, CONTEXT)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataKeyFailed, match="credentials"):
        await keys.generate(ARN, CONTEXT)


async def test_no_data_key_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    """Also who logs all that boto3 does has no data key in the log."""
    with caplog.at_level(logging.DEBUG):
        async with KmsEmulator({ARN: EmulatedKey()}) as kms:
            key = await AwsDataKeys(endpoint_url=kms.url).generate(ARN, CONTEXT)
    assert "GenerateDataKey" in caplog.text
    assert b64encode(key.plaintext).decode() not in caplog.text
    assert repr(key.plaintext) not in caplog.text


@pytest.mark.parametrize("arn", ["", "alias/mine", ARN.replace("eu-central-1", "evil.example/"), ARN + " "])
async def test_no_arn(arn: str) -> None:
    """What is no key's ARN goes nowhere: its region is a part of a host's name."""
    with pytest.raises(Malformed):
        await AwsDataKeys(endpoint_url="http://127.0.0.1:9").generate(arn, CONTEXT)


@asynccontextmanager
async def answering(answer: Mapping[str, Any]) -> AsyncIterator[str]:
    """Something that answers like KMS, whatever it is asked."""

    async def handle(request: web.Request) -> web.Response:
        return web.Response(text=json.dumps(answer), content_type="application/x-amz-json-1.1")

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


GOOD = {"KeyId": ARN, "Plaintext": "A" * 43 + "=", "CiphertextBlob": "d3JhcHBlZA=="}


@pytest.mark.parametrize(
    "wrong",
    [
        {"KeyId": ARN[:-1] + "2"},
        {"KeyId": None},
        {"Plaintext": "AAAA"},
        {"Plaintext": None},
        {"CiphertextBlob": ""},
        {"CiphertextBlob": None},
        {"CiphertextBlob": "A" * 4 * 2049},
    ],
)
async def test_a_wrong_answer(wrong: dict[str, Any]) -> None:
    """An answer that is no data key under this key is not used."""
    answer = {name: value for name, value in (GOOD | wrong).items() if value is not None}
    async with answering(GOOD) as url:
        assert (await AwsDataKeys(endpoint_url=url).generate(ARN, CONTEXT)).plaintext == bytes(32)
    async with answering(answer) as url:
        with pytest.raises(DataKeyFailed) as failed:
            await AwsDataKeys(endpoint_url=url).generate(ARN, CONTEXT)
        assert failed.value.code == "unexpected"


@pytest.mark.parametrize(("plaintext", "wrapped"), [(31, 10), (33, 10), (0, 10), (32, 0), (32, 6145)])
def test_what_is_no_data_key(plaintext: int, wrapped: int) -> None:
    """A data key of the caller's own is checked too."""
    with pytest.raises(DataKeyFailed, match="must have"):
        DataKey(plaintext=bytes(plaintext), wrapped=bytes(wrapped))
