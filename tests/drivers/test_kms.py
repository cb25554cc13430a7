"""KMS by boto3: keys for the enclave alone, and every failure is one of two kinds, and says little."""

from __future__ import annotations

import asyncio
import json
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from gpu_server.drivers.kms import AT_ONCE, MAX_ANSWER_BYTES, REGIONS, TRIES, AwsKeyService
from gpu_server.kms_emulator import EmulatedKey, KmsEmulator
from gpu_server.ports import KeyService, KeyServiceDenied, KeyServiceDown
from gpu_server.sealed.cms import open_recipient
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.drivers.kms_world import (
    ARN,
    CONTEXT,
    KMS_ENVIRONMENT,
    OTHER_ARN,
    REGION,
    aws_environment,
    document,
    enclave_key,
    key,
    kms_client,
    played_kms,
)

SEALED = {"KeyId": ARN, "CiphertextForRecipient": b64encode(b"sealed").decode()}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    aws_environment(monkeypatch)


@pytest.fixture
async def emulator() -> AsyncIterator[KmsEmulator]:
    async with KmsEmulator({ARN: key(), OTHER_ARN: EmulatedKey()}, allow_simulated=True) as emulator:
        yield emulator


@contextmanager
def service(url: str, **options: Any) -> Iterator[AwsKeyService]:
    """The driver, closed at the end."""
    made = AwsKeyService(url, **options)
    try:
        yield made
    finally:
        made.close()


async def data_key(emulator: KmsEmulator, arn: str = ARN) -> tuple[bytes, bytes]:
    """A data key, in the clear and wrapped, as a client gets it."""
    client = kms_client(emulator.url)
    answer = await asyncio.to_thread(
        lambda: client.generate_data_key(KeyId=arn, KeySpec="AES_256", EncryptionContext=CONTEXT)
    )
    client.close()
    return answer["Plaintext"], answer["CiphertextBlob"]


async def release(keys: KeyService, **changes: Any) -> bytes:
    """Ask for a release, with something that may be another."""
    wanted = {"kms_key_arn": ARN, "wrapped_key": b"wrapped", "context": CONTEXT, "document": b"document"}
    return await keys.release(**{**wanted, **changes})


async def test_a_key_for_the_enclave(emulator: KmsEmulator) -> None:
    """What comes back is opened by the enclave's key, and is not the data key."""
    plaintext, wrapped = await data_key(emulator)
    with service(emulator.url) as keys:
        sealed = await release(keys, wrapped_key=wrapped, document=document())
        assert plaintext not in sealed
        assert open_recipient(sealed, enclave_key()) == plaintext
        keys.close()  # and it goes on afterwards
        assert await release(keys, wrapped_key=wrapped, document=document())


async def test_many_at_once(emulator: KmsEmulator) -> None:
    """More releases than there are places for all come back."""
    _, wrapped = await data_key(emulator)
    doc = document()
    with service(emulator.url) as keys:
        asked = [release(keys, wrapped_key=wrapped, document=doc) for _ in range(AT_ONCE + 4)]
        assert len(set(await asyncio.gather(*asked))) == AT_ONCE + 4


async def test_denials(emulator: KmsEmulator) -> None:
    """Another enclave, context, ciphertext or key, and no document: denied, with KMS's code and no more."""
    _, wrapped = await data_key(emulator)
    good: dict[str, Any] = {"wrapped_key": wrapped, "document": document()}
    other = document(SoftwareNsm({0: b"\x99" * 48}))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"document": other}, "AccessDeniedException"),
        ({"document": b"none"}, "ValidationException"),
        ({"context": {**CONTEXT, "pool": "other"}}, "InvalidCiphertextException"),
        ({"wrapped_key": wrapped[:-1]}, "InvalidCiphertextException"),
        ({"kms_key_arn": ARN + "x"}, "NotFoundException"),
        ({"kms_key_arn": OTHER_ARN}, "IncorrectKeyException"),
    ]
    with service(emulator.url) as keys:
        for change, code in cases:
            with pytest.raises(KeyServiceDenied) as caught:
                await release(keys, **{**good, **change})
            assert str(caught.value) == f"KMS does not release the key ({code})"
            assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("code", "event"), [("AccessDeniedException", "kms.denied"), ("ExpiredTokenException", "kms.failed")]
)
async def test_what_the_operator_looks_for(code: str, event: str) -> None:
    """The log names key, tenant, pool, KMS's code and the id of the request, and nothing else of the context
    or of KMS's text."""

    async def answer(request: web.Request) -> web.Response:
        headers = {"x-amzn-RequestId": "the-id-of-it" * 10, "Content-Type": "application/x-amz-json-1.1"}
        body = json.dumps({"__type": code, "message": "secret-role"}).encode()
        return web.Response(status=400, body=body, headers=headers)

    async with played_kms(answer) as url:
        with (
            service(url) as keys,
            capture_logs() as lines,
            pytest.raises((KeyServiceDenied, KeyServiceDown)),
        ):
            await release(keys, context={**CONTEXT, "more": "hidden"})
    assert lines == [
        {
            "event": event,
            "log_level": "warning",
            "kms_key_arn": ARN,
            **CONTEXT,
            "code": code,
            "request_id": ("the-id-of-it" * 10)[:60],
        }
    ]


@pytest.mark.parametrize(
    "arn",
    ["", "alias/chat", ARN.replace("kms", "s3", 1), ARN + "\n", ARN.replace(REGION, "x.example.com/")],
)
async def test_names_that_are_no_key(arn: str) -> None:
    """What is not the ARN of a key in a region leads nowhere."""
    with service("http://127.0.0.1:9") as keys, pytest.raises(KeyServiceDenied):
        await release(keys, kms_key_arn=arn)


async def test_what_boto_will_not_send() -> None:
    """What KMS cannot take is the client's fault, and is not sent."""
    with service("http://127.0.0.1:9") as keys:
        for change, words in (
            ({"wrapped_key": b""}, "1 to 6144 bytes"),
            ({"wrapped_key": bytes(6145)}, "1 to 6144 bytes"),
            ({"context": {"tenant": 5}}, "cannot take"),
        ):
            with pytest.raises(KeyServiceDenied, match=words):
                await release(keys, **change)


def saying(body: object, status: int = 200) -> Any:
    """A server's answer, counted."""
    calls: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        calls.append(request.headers["X-Amz-Target"])
        return web.Response(
            status=status, body=json.dumps(body).encode(), content_type="application/x-amz-json-1.1"
        )

    return answer, calls


@pytest.mark.parametrize(
    "answer",
    [
        {**SEALED, "Plaintext": b64encode(b"k" * 32).decode()},
        {"KeyId": ARN, "Plaintext": b64encode(b"k" * 32).decode()},
        {"KeyId": ARN},
        {**SEALED, "CiphertextForRecipient": ""},
        {**SEALED, "CiphertextForRecipient": b64encode(bytes(MAX_ANSWER_BYTES + 1)).decode()},
        {**SEALED, "KeyId": OTHER_ARN},
        {"CiphertextForRecipient": SEALED["CiphertextForRecipient"]},
        {},
        [],
        "text",
        {**SEALED, "CiphertextForRecipient": "*"},
    ],
    ids=lambda answer: str(answer)[:60],
)
async def test_answers_that_are_not_taken(answer: object) -> None:
    """A key in the clear is never passed on, nor is an answer about another key, or none."""
    play, _ = saying(answer)
    async with played_kms(play) as url:
        with service(url) as keys, pytest.raises(KeyServiceDown) as caught:
            await release(keys)
    assert "kkkk" not in str(caught.value)
    assert b64encode(b"k" * 32).decode() not in str(caught.value)


async def test_an_empty_plaintext_is_none() -> None:
    """KMS may name the field and leave it empty."""
    play, _ = saying({**SEALED, "Plaintext": ""})
    async with played_kms(play) as url:
        with service(url) as keys:
            assert await release(keys) == b"sealed"


@pytest.mark.parametrize(
    ("code", "status", "denied", "calls"),
    [
        ("AccessDeniedException", 400, True, 1),
        ("DisabledException", 400, True, 1),
        ("KMSInvalidStateException", 400, True, 1),
        ("ThrottlingException", 400, False, TRIES),
        ("KMSInternalException", 500, False, TRIES),
        ("DependencyTimeoutException", 503, False, TRIES),
        ("ExpiredTokenException", 400, False, 1),
        ("UnrecognizedClientException", 400, False, 1),
        ("SomethingNew", 400, False, 1),
    ],
)
async def test_codes(
    monkeypatch: pytest.MonkeyPatch, code: str, status: int, denied: bool, calls: int
) -> None:
    """What a policy refuses is final; what passes is tried again, a few times, and then is `down`."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    play, seen = saying({"__type": code, "message": "arn:aws:sts::1:assumed-role/secret-role"}, status)
    async with played_kms(play) as url:
        with service(url) as keys, pytest.raises(KeyServiceDenied if denied else KeyServiceDown) as caught:
            await release(keys)
    assert code in str(caught.value)
    assert "secret-role" not in str(caught.value)
    assert seen == ["TrentService.Decrypt"] * calls


async def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is refused is `down`."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    with socket.socket() as bound:  # nobody else gets this port, and nobody listens on it
        bound.bind(("127.0.0.1", 0))
        with (
            service(f"http://127.0.0.1:{bound.getsockname()[1]}") as keys,
            pytest.raises(KeyServiceDown, match="reached"),
        ):
            await release(keys)


async def test_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers is given up."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    ended = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        await ended.wait()
        return web.Response()

    async with played_kms(never) as url:
        with service(url, read_seconds=0.05) as keys, pytest.raises(KeyServiceDown, match="ReadTimeout"):
            await release(keys)
        ended.set()


async def test_no_credentials(monkeypatch: pytest.MonkeyPatch, emulator: KmsEmulator) -> None:
    """A node without credentials is `down`: that is no decision about the key."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with service(emulator.url) as keys, pytest.raises(KeyServiceDown, match="credentials"):
        await release(keys)


async def test_the_region_of_the_key() -> None:
    """A request is signed for the region in the key's ARN; clients of many regions do not pile up."""
    regions: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        regions.append(request.headers["Authorization"].split("/")[2])
        asked = json.loads(await request.read())
        return web.json_response({**SEALED, "KeyId": asked["KeyId"]})

    names = [f"eu-west-{number}" for number in range(1, REGIONS + 4)]
    async with played_kms(answer) as url:
        with service(url) as keys:
            for name in (*names, names[0]):
                await release(keys, kms_key_arn=ARN.replace(REGION, name))
            assert len(keys._clients) == REGIONS
    assert regions == [*names, names[0]]


async def test_nothing_is_shown(caplog: pytest.LogCaptureFixture, emulator: KmsEmulator) -> None:
    """No credential and no data key is in the driver's text or in an error."""
    plaintext, wrapped = await data_key(emulator)
    with service(emulator.url) as keys:
        sealed = await release(keys, wrapped_key=wrapped, document=document())
        shown = repr(keys) + repr(vars(keys)) + caplog.text
    assert open_recipient(sealed, enclave_key()) == plaintext
    assert KMS_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in shown
    assert b64encode(plaintext).decode() not in shown
