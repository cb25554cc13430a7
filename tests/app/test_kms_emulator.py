"""The KMS emulator, asked by boto3: it answers in the real form, and denies where KMS denies."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gpu_server.kms_emulator import EmulatedKey, KmsEmulator, load_keys
from gpu_server.sealed.attestation import root_fingerprint
from gpu_server.sealed.cms import open_recipient
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.drivers.kms_world import (
    ARN,
    CONTEXT,
    IMAGE,
    OTHER_ARN,
    PCRS,
    at,
    aws_environment,
    document,
    enclave_key,
    key,
    kms_client,
    now,
    public,
)

if TYPE_CHECKING:
    from types_boto3_kms.client import KMSClient


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    aws_environment(monkeypatch)


class Asked:
    """boto3 against an emulator; every call in a thread, since the emulator runs here."""

    def __init__(self, emulator: KmsEmulator, client: KMSClient) -> None:
        self.emulator, self._client = emulator, client

    async def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """What KMS answers."""
        answer: dict[str, Any] = await asyncio.to_thread(lambda: getattr(self._client, name)(**arguments))
        return answer

    async def wrapped(self, arn: str = ARN) -> tuple[bytes, bytes]:
        """A data key, in the clear and wrapped, as a client gets it."""
        answer = await self.call("generate_data_key", KeyId=arn, KeySpec="AES_256", EncryptionContext=CONTEXT)
        return answer["Plaintext"], answer["CiphertextBlob"]

    async def decrypt(self, wrapped: bytes, doc: bytes | None, **changes: Any) -> dict[str, Any]:
        """`Decrypt` as the service asks for it."""
        wanted = {"KeyId": ARN, "CiphertextBlob": wrapped, "EncryptionContext": CONTEXT, **recipient(doc)}
        return await self.call("decrypt", **{**wanted, **changes})

    async def denied(self, *arguments: Any, **changes: Any) -> str:
        """The code with which that is refused."""
        return await self.refused(lambda: self.decrypt(*arguments, **changes))

    async def refused(self, call: Callable[[], Any]) -> str:
        """The code with which a call is refused, with HTTP 400."""
        from botocore.exceptions import ClientError

        with pytest.raises(ClientError) as caught:
            await call()
        response: Any = caught.value.response
        assert response["ResponseMetadata"]["HTTPStatusCode"] == 400
        assert response["Error"]["Message"]
        return str(response["Error"]["Code"])


def recipient(doc: bytes | None) -> dict[str, Any]:
    """The argument that names a recipient."""
    if doc is None:
        return {}
    return {"Recipient": {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": doc}}


@pytest.fixture
async def kms() -> AsyncIterator[Asked]:
    keys = {ARN: key(), OTHER_ARN: EmulatedKey()}
    async with KmsEmulator(keys, allow_simulated=True) as emulator:
        client = kms_client(emulator.url)
        yield Asked(emulator, client)
        client.close()


async def test_a_data_key_for_an_enclave(kms: Asked) -> None:
    """The client gets a data key in the clear; the enclave gets the same one, and nobody between them."""
    plaintext, wrapped = await kms.wrapped()
    assert len(plaintext) == 32
    answer = await kms.decrypt(wrapped, document())
    assert "Plaintext" not in answer
    assert answer["KeyId"] == ARN
    assert plaintext not in answer["CiphertextForRecipient"]
    assert open_recipient(answer["CiphertextForRecipient"], enclave_key()) == plaintext


async def test_a_data_key_made_for_an_enclave(kms: Asked) -> None:
    """`GenerateDataKey` with a recipient has no plaintext either, and the conditions hold for it."""
    asked = {"KeyId": ARN, "KeySpec": "AES_256", "EncryptionContext": CONTEXT}
    answer = await kms.call("generate_data_key", **asked, **recipient(document()))
    assert "Plaintext" not in answer
    again = await kms.decrypt(answer["CiphertextBlob"], document())
    assert open_recipient(answer["CiphertextForRecipient"], enclave_key()) == open_recipient(
        again["CiphertextForRecipient"], enclave_key()
    )
    other = document(SoftwareNsm({0: b"\x99" * 48}))
    assert (
        await kms.refused(lambda: kms.call("generate_data_key", **asked, **recipient(other)))
        == "AccessDeniedException"
    )


async def test_no_document_no_key(kms: Asked) -> None:
    """A key that is for enclaves never answers without a document: it denies rather than fall back."""
    _, wrapped = await kms.wrapped()
    assert await kms.denied(wrapped, None) == "AccessDeniedException"


async def test_a_key_without_conditions(kms: Asked) -> None:
    """Only a key that asks for no enclave answers in the clear."""
    plaintext, wrapped = await kms.wrapped(OTHER_ARN)
    assert (await kms.decrypt(wrapped, None, KeyId=OTHER_ARN))["Plaintext"] == plaintext


@pytest.mark.parametrize(
    "nsm",
    [
        lambda: SoftwareNsm({**PCRS, 0: b"\x99" * 48}),
        lambda: SoftwareNsm(PCRS, debug=True),
        lambda: at(now() - timedelta(minutes=6)),
        lambda: at(now() - timedelta(hours=4)),
        lambda: at(now() + timedelta(minutes=5)),
    ],
    ids=["another program", "debug", "stale", "expired", "from the future"],
)
async def test_documents_that_are_denied(kms: Asked, nsm: Callable[[], SoftwareNsm]) -> None:
    """Another measurement, debug mode, and documents of another time."""
    _, wrapped = await kms.wrapped()
    assert await kms.denied(wrapped, document(nsm())) == "AccessDeniedException"


async def test_a_forged_document(kms: Asked) -> None:
    """A document with one changed byte in its registers is denied; what is no document is invalid."""
    _, wrapped = await kms.wrapped()
    forged = document(SoftwareNsm({**PCRS, 0: b"\x99" * 48})).replace(b"\x99" * 48, PCRS[0])
    assert await kms.denied(wrapped, forged) == "AccessDeniedException"
    assert await kms.denied(wrapped, b"no document") == "ValidationException"


@pytest.mark.parametrize(
    "private",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=1024),
    ],
    ids=["EC", "short RSA"],
)
async def test_a_document_without_an_rsa_key(kms: Asked, private: Callable[[], Any]) -> None:
    """There must be a key to encrypt to, and KMS takes RSA of 2048 bits and more."""
    _, wrapped = await kms.wrapped()
    assert await kms.denied(wrapped, document(public_key=public(private()))) == "ValidationException"
    assert await kms.denied(wrapped, document(public_key=b"no key")) == "ValidationException"


async def test_simulations_only_where_allowed() -> None:
    """Without `allow_simulated` a simulated enclave gets nothing, unless its very root is trusted."""
    nsm = SoftwareNsm(PCRS)
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    root = root_fingerprint(x509.load_der_x509_certificate(nsm.root).public_bytes(Encoding.PEM))
    for roots, granted in (((), False), ((root,), True)):
        async with KmsEmulator({ARN: key()}, roots=roots) as emulator:
            client = kms_client(emulator.url)
            asked = Asked(emulator, client)
            _, wrapped = await asked.wrapped()
            if granted:
                await asked.decrypt(wrapped, document(nsm))
            else:
                assert await asked.denied(wrapped, document(nsm)) == "AccessDeniedException"
            assert await asked.denied(wrapped, document()) == "AccessDeniedException"
            client.close()


async def test_the_encryption_context_is_bound(kms: Asked) -> None:
    """With another context, or none, a ciphertext is invalid; its order does not matter."""
    _, wrapped = await kms.wrapped()
    doc = document()
    for context in ({}, {**CONTEXT, "pool": "other"}, {**CONTEXT, "more": "x"}, {"tenant": "acme"}):
        assert await kms.denied(wrapped, doc, EncryptionContext=context) == "InvalidCiphertextException"
    await kms.decrypt(wrapped, doc, EncryptionContext=dict(reversed(CONTEXT.items())))


async def test_ciphertexts_of_others(kms: Asked) -> None:
    """Changed bytes and another service's ciphertext are invalid; another key's is told apart."""
    _, wrapped = await kms.wrapped()
    doc = document()
    for at_ in (0, 1, 2, len(wrapped) - 1, len(wrapped) - 40):
        changed = bytearray(wrapped)
        changed[at_] ^= 1
        assert await kms.denied(bytes(changed), doc) == "InvalidCiphertextException"
    for other in (b"x", wrapped[:40], b"\1\0\1\xff" + bytes(60)):
        assert await kms.denied(other, doc) == "InvalidCiphertextException"
    assert await kms.denied(wrapped, doc, KeyId=OTHER_ARN) == "IncorrectKeyException"
    assert await kms.denied(wrapped, doc, KeyId=ARN + "x") == "NotFoundException"


async def test_the_key_is_named_by_the_ciphertext(kms: Asked) -> None:
    """Without a key id the ciphertext says which key it is, and its policy holds all the same."""
    plaintext, wrapped = await kms.wrapped()
    asked = {"CiphertextBlob": wrapped, "EncryptionContext": CONTEXT}
    assert await kms.refused(lambda: kms.call("decrypt", **asked)) == "AccessDeniedException"
    answer = await kms.call("decrypt", **asked, **recipient(document()))
    assert open_recipient(answer["CiphertextForRecipient"], enclave_key()) == plaintext


async def test_conditions_on_registers_and_context(kms: Asked) -> None:
    """Every condition must be met; a list means any of its values, a star any value at all."""
    _, wrapped = await kms.wrapped()
    secret = kms.emulator.keys[ARN].secret
    cases: list[tuple[dict[str, Any], bool]] = [
        ({IMAGE: PCRS[0].hex().upper()}, True),
        ({IMAGE: ("00", PCRS[0].hex())}, True),
        ({IMAGE: "*"}, True),
        ({IMAGE: ()}, False),
        ({IMAGE: PCRS[0].hex(), "kms:RecipientAttestation:PCR1": PCRS[1].hex()}, True),
        ({IMAGE: PCRS[0].hex(), "kms:RecipientAttestation:PCR2": PCRS[1].hex()}, False),
        ({"kms:RecipientAttestation:PCR31": "00" * 48}, False),
        ({IMAGE: "*", "kms:EncryptionContext:tenant": "acme"}, True),
        ({IMAGE: "*", "kms:EncryptionContext:tenant": ("x", "acme")}, True),
        ({IMAGE: "*", "kms:EncryptionContext:tenant": "ACME"}, False),
        ({IMAGE: "*", "kms:EncryptionContext:other": "acme"}, False),
    ]
    for conditions, granted in cases:
        kms.emulator.keys[ARN] = key(secret=secret, conditions=conditions)
        if granted:
            await kms.decrypt(wrapped, document())
        else:
            assert await kms.denied(wrapped, document()) == "AccessDeniedException", conditions


@pytest.mark.parametrize(
    "name", ["kms:RecipientAttestation:PCR32", "kms:ViaService", "aws:SourceIp", IMAGE + "x"]
)
def test_unknown_conditions(name: str) -> None:
    """A condition that would not be evaluated cannot be written down."""
    with pytest.raises(ValueError, match="no condition"):
        EmulatedKey(conditions={name: "x"})


async def test_disabled_and_absent_keys(kms: Asked) -> None:
    """A disabled key and one that is not there give nothing, to anybody."""
    _, wrapped = await kms.wrapped()
    described = await kms.call("describe_key", KeyId=ARN)
    assert described["KeyMetadata"]["Enabled"]
    kms.emulator.keys[ARN] = key(secret=kms.emulator.keys[ARN].secret, enabled=False)
    assert await kms.denied(wrapped, document()) == "DisabledException"
    assert await kms.refused(kms.wrapped) == "DisabledException"
    assert not (await kms.call("describe_key", KeyId=ARN))["KeyMetadata"]["Enabled"]
    del kms.emulator.keys[ARN]
    assert await kms.refused(kms.wrapped) == "NotFoundException"


@pytest.mark.parametrize(
    ("target", "body", "code"),
    [
        ("TrentService.Encrypt", b"{}", "UnknownOperationException"),
        ("", b"{}", "UnknownOperationException"),
        ("TrentService.Decrypt", b"no json", "SerializationException"),
        ("TrentService.Decrypt", b"[]", "SerializationException"),
        ("TrentService.Decrypt", b"{}", "ValidationException"),
        ("TrentService.Decrypt", b'{"CiphertextBlob": ""}', "ValidationException"),
        ("TrentService.Decrypt", b'{"CiphertextBlob": "*"}', "SerializationException"),
        ("TrentService.Decrypt", b'{"CiphertextBlob": "AQID", "KeyId": []}', "InvalidCiphertextException"),
        ("TrentService.Decrypt", b'{"CiphertextBlob": "AQID", "Recipient": 5}', "ValidationException"),
        ("TrentService.Decrypt", b'{"CiphertextBlob": "AQID", "Recipient": {}}', "ValidationException"),
        (
            "TrentService.Decrypt",
            b'{"CiphertextBlob": "AQID", "EncryptionContext": 5}',
            "ValidationException",
        ),
        ("TrentService.GenerateDataKey", b'{"KeyId": {}}', "ValidationException"),
        ("TrentService.GenerateDataKey", f'{{"KeyId": "{ARN}"}}'.encode(), "ValidationException"),
    ],
)
async def test_requests_that_are_none(kms: Asked, target: str, body: bytes, code: str) -> None:
    """What boto3 would never send is refused in KMS's form as well."""
    headers = {"X-Amz-Target": target, "Content-Type": "application/x-amz-json-1.1"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(kms.emulator.url, data=body, headers=headers) as answer,
    ):
        assert answer.status == 400
        assert answer.headers["Content-Type"] == "application/x-amz-json-1.1"
        assert (await answer.json(content_type=None))["__type"] == code


def test_keys_from_json() -> None:
    """A file says conditions, secrets and what is disabled; keys are new where it says no secret."""
    secret = b64encode(bytes(32)).decode()
    entry = {"conditions": {IMAGE: ["aa", "bb"], "kms:EncryptionContext:tenant": "acme"}, "secret": secret}
    keys = load_keys(json.dumps({ARN: entry, OTHER_ARN: {"enabled": False}}).encode())
    assert keys[ARN].secret == bytes(32)
    assert keys[ARN].conditions == {IMAGE: ("aa", "bb"), "kms:EncryptionContext:tenant": "acme"}
    assert not keys[OTHER_ARN].enabled
    assert len(keys[OTHER_ARN].secret) == 32
    assert "secret" not in repr(keys[ARN])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"arn": {}}',
        '{"ARN": []}',
        '{"ARN": {"policy": {}}}',
        '{"ARN": {"secret": "AAAA"}}',
        '{"ARN": {"secret": 5}}',
        '{"ARN": {"enabled": "no"}}',
        '{"ARN": {"conditions": ["x"]}}',
        '{"ARN": {"conditions": {"kms:ViaService": "x"}}}',
        '{"ARN": {"conditions": {"IMAGE": 5}}}',
    ],
)
def test_keys_that_cannot_be_read(text: str) -> None:
    """A file with anything else in it is refused as a whole."""
    with pytest.raises(ValueError):  # noqa: PT011 -- each has its own words
        load_keys(text.replace("ARN", ARN).replace("IMAGE", IMAGE).encode())
