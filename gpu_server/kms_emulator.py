"""AWS KMS as far as sealed requests need it, for tests and demonstrations: boto3's `endpoint_url` leads here.

It verifies attestation documents, evaluates the conditions of a key's policy, binds a data key to its
encryption context and answers a recipient in the real form, and it denies where KMS denies. What it lacks: it
believes any credentials, and keeps its keys in memory.
"""

from __future__ import annotations

import binascii
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gpu_server.sealed.attestation import AWS_ROOT_SHA256, Attestation, verify
from gpu_server.sealed.cms import make_recipient
from gpu_server.sealed.errors import AttestationRefused, Malformed
from gpu_server.sealed.names import region_of

TARGET: Final = "TrentService."
CONTENT_TYPE: Final = "application/x-amz-json-1.1"
MAX_WRAPPED_BYTES: Final = 6144
RSA_BITS: Final = (2048, 3072, 4096)
IMAGE: Final = "kms:RecipientAttestation:ImageSha384"
_PCR: Final = re.compile(r"kms:RecipientAttestation:PCR(\d|[12]\d|3[01])")
_CONTEXT: Final = "kms:EncryptionContext:"
_NONCE_BYTES: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedKey:
    """A key and the conditions of its policy, named as in IAM, each with one value or several that will do.

    `kms:RecipientAttestation:ImageSha384` (PCR0) and `kms:RecipientAttestation:PCR<n>` (hex, or `*` for any)
    hold for `Decrypt`, and for whatever names a recipient; `kms:EncryptionContext:<name>` for all. A key with
    a condition on the recipient gives nobody else the result of `Decrypt`. Raises ValueError for other
    conditions: one that is not evaluated would be one that is met.
    """

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    conditions: Mapping[str, str | Collection[str]] = field(default_factory=dict)
    enabled: bool = True

    def __post_init__(self) -> None:
        for name in self.conditions:
            if name != IMAGE and not _PCR.fullmatch(name) and not name.startswith(_CONTEXT):
                raise ValueError(f"this emulator knows no condition {name}")

    @property
    def wants_recipient(self) -> bool:
        """Whether there is a condition on the recipient."""
        return any(not name.startswith(_CONTEXT) for name in self.conditions)

    def allows_context(self, context: Mapping[str, str]) -> bool:
        """Whether the conditions on the encryption context are met."""
        return all(
            context.get(name.removeprefix(_CONTEXT)) in _values(wanted)
            for name, wanted in self.conditions.items()
            if name.startswith(_CONTEXT)
        )

    def allows_recipient(self, pcrs: Mapping[int, bytes]) -> bool:
        """Whether the conditions on the recipient are met."""
        for name, wanted in self.conditions.items():
            if name.startswith(_CONTEXT):
                continue
            match = _PCR.fullmatch(name)
            found = pcrs.get(int(match[1]) if match else 0)
            allowed = {value.lower() for value in _values(wanted)}
            if found is None or not ({"*", found.hex()} & allowed):
                return False
        return True


class KmsEmulator:
    """`async with KmsEmulator({arn: EmulatedKey()}, allow_simulated=True) as kms: ...kms.url...`

    `roots`: SHA-256 of the DER of roots that are trusted beside AWS's own.
    """

    def __init__(
        self,
        keys: Mapping[str, EmulatedKey],
        *,
        roots: Collection[bytes] = (),
        allow_simulated: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.keys = dict(keys)
        self._roots = (AWS_ROOT_SHA256, *roots)
        self._allow_simulated = allow_simulated
        self._host, self._port = host, port
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> KmsEmulator:
        app = web.Application()
        app.router.add_post("/", self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Where it listens: boto3's `endpoint_url`."""
        return f"http://{self._host}:{self._port}"

    async def _handle(self, request: web.Request) -> web.Response:
        operations = {
            "GenerateDataKey": self._generate_data_key,
            "Decrypt": self._decrypt,
            "DescribeKey": self._describe_key,
        }
        status, answer = 200, {}
        try:
            operation = operations.get(request.headers.get("X-Amz-Target", "").removeprefix(TARGET))
            if operation is None:
                raise _Refusal("UnknownOperationException", "this emulator has no such operation")
            answer = operation(_object(await request.read()))
        except _Refusal as refusal:
            status, answer = 400, {"__type": refusal.code, "message": refusal.message}
        return web.Response(
            status=status,
            body=orjson.dumps(answer),
            headers={"Content-Type": CONTENT_TYPE, "x-amzn-RequestId": secrets.token_hex(16)},
        )

    # -- operations -----------------------------------------------------------------------------------------

    def _generate_data_key(self, asked: dict[str, Any]) -> dict[str, Any]:
        arn, context = _text(asked, "KeyId"), _context(asked)
        recipient = self._recipient(asked)
        key = self._permitted(arn, context, recipient)
        if asked.get("KeySpec") != "AES_256":
            raise _Refusal("ValidationException", "this emulator makes AES_256 keys")
        data_key = secrets.token_bytes(32)
        wrapped = b64encode(_wrap(key.secret, arn, context, data_key)).decode()
        return {"KeyId": arn, "CiphertextBlob": wrapped, **_result(data_key, recipient)}

    def _decrypt(self, asked: dict[str, Any]) -> dict[str, Any]:
        wrapped, context = _bytes(asked, "CiphertextBlob", MAX_WRAPPED_BYTES), _context(asked)
        recipient = self._recipient(asked)
        arn = self._wrapped_by(wrapped)
        named = _text(asked, "KeyId") if "KeyId" in asked else arn
        key = self._permitted(named, context, recipient)
        if key.wants_recipient and recipient is None:
            raise _Refusal("AccessDeniedException", "the key's policy wants an attestation document")
        if named != arn:
            raise _Refusal("IncorrectKeyException", "the ciphertext is of another key")
        data_key = _unwrap(key.secret, arn, context, wrapped)
        return {
            "KeyId": arn,
            "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
            **_result(data_key, recipient),
        }

    def _describe_key(self, asked: dict[str, Any]) -> dict[str, Any]:
        arn = _text(asked, "KeyId")
        key = self._key(arn)
        described = {
            "Arn": arn,
            "KeyId": arn.rpartition("/")[2],
            "Enabled": key.enabled,
            "KeyState": "Enabled" if key.enabled else "Disabled",
            "KeySpec": "SYMMETRIC_DEFAULT",
            "KeyUsage": "ENCRYPT_DECRYPT",
        }
        return {"KeyMetadata": described}

    # -- policy ---------------------------------------------------------------------------------------------

    def _key(self, arn: str) -> EmulatedKey:
        key = self.keys.get(arn)
        if key is None:
            raise _Refusal("NotFoundException", "there is no such key")
        return key

    def _wrapped_by(self, wrapped: bytes) -> str:
        """The key that a ciphertext names."""
        size = int.from_bytes(wrapped[1:3])
        arn = wrapped[3 : 3 + size].decode("ascii", "replace")
        if wrapped[0] != 1 or len(wrapped) < 3 + size + _NONCE_BYTES or arn not in self.keys:
            raise _Refusal("InvalidCiphertextException", "the ciphertext is not of this service")
        return arn

    def _permitted(self, arn: str, context: Mapping[str, str], recipient: Attestation | None) -> EmulatedKey:
        key = self._key(arn)
        if not key.allows_context(context):
            raise _Refusal("AccessDeniedException", "the key's policy does not allow this encryption context")
        if recipient is not None and not key.allows_recipient(recipient.pcrs):
            raise _Refusal("AccessDeniedException", "the key's policy does not allow this enclave")
        if not key.enabled:
            raise _Refusal("DisabledException", "the key is disabled")
        return key

    def _recipient(self, asked: dict[str, Any]) -> Attestation | None:
        """The verified document of whom the answer is for; None where nobody is named."""
        if asked.get("Recipient") is None:
            return None
        recipient = asked["Recipient"]
        if not isinstance(recipient, dict) or recipient.get("KeyEncryptionAlgorithm") != "RSAES_OAEP_SHA_256":
            raise _Refusal("ValidationException", "the recipient is named by RSAES_OAEP_SHA_256")
        document = _bytes(recipient, "AttestationDocument", 262_144)
        try:
            attestation = verify(
                document, nonce=None, pcrs={}, roots=self._roots, allow_simulated=self._allow_simulated
            )
        except AttestationRefused as error:
            code = "ValidationException" if error.reason == "malformed" else "AccessDeniedException"
            raise _Refusal(code, f"the attestation document is refused ({error.reason})") from None
        if not _is_rsa(attestation.public_key):
            raise _Refusal("ValidationException", "the attestation document has no RSA key in it")
        return attestation


class _Refusal(Exception):
    """An error of KMS: HTTP 400, with this code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def load_keys(text: bytes) -> dict[str, EmulatedKey]:
    """Keys from JSON: `{"<arn>": {"conditions": {...}, "secret": "<base64 of 32 bytes>", "enabled": true}}`,
    where everything may be left out. Raises ValueError."""
    loaded = orjson.loads(text)
    if not isinstance(loaded, dict):
        raise ValueError("an object is needed: ARN -> key")
    keys = {}
    for arn, entry in loaded.items():
        try:
            region_of(arn)
            keys[arn] = _loaded_key(**entry)
        except (Malformed, TypeError, ValueError) as error:
            raise ValueError(f"{arn[:200]}: {error}") from error
    return keys


def _loaded_key(
    *, secret: str | None = None, conditions: dict[str, Any] | None = None, enabled: bool = True
) -> EmulatedKey:
    raw = secrets.token_bytes(32) if secret is None else b64decode(secret, validate=True)
    if len(raw) != 32:
        raise ValueError("a secret has 32 bytes")
    if not isinstance(conditions or {}, dict) or not isinstance(enabled, bool):
        raise ValueError("conditions is an object, and enabled is true or false")
    wanted = {
        name: value if isinstance(value, str) else tuple(str(one) for one in value)
        for name, value in (conditions or {}).items()
    }
    return EmulatedKey(secret=raw, conditions=wanted, enabled=enabled)


# -- what is asked ------------------------------------------------------------------------------------------


def _object(body: bytes) -> dict[str, Any]:
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        asked = None
    if not isinstance(asked, dict):
        raise _Refusal("SerializationException", "the body is no JSON object")
    return asked


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise _Refusal("ValidationException", f"{name} is missing")
    return value


def _bytes(asked: dict[str, Any], name: str, most: int) -> bytes:
    try:
        value = b64decode(_text(asked, name), validate=True)
    except (binascii.Error, ValueError):
        raise _Refusal("SerializationException", f"{name} is not base64") from None
    if not 1 <= len(value) <= most:
        raise _Refusal("ValidationException", f"{name} has 1 to {most} bytes")
    return value


def _context(asked: dict[str, Any]) -> dict[str, str]:
    context = asked.get("EncryptionContext") or {}
    if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
        raise _Refusal("ValidationException", "EncryptionContext maps text to text")
    return context


def _values(wanted: str | Collection[str]) -> Collection[str]:
    return (wanted,) if isinstance(wanted, str) else wanted


def _is_rsa(spki: bytes | None) -> bool:
    try:
        key = serialization.load_der_public_key(spki or b"")
    except Exception:  # noqa: BLE001 -- a stranger's bytes: whatever it is, it is no key
        return False
    return isinstance(key, rsa.RSAPublicKey) and key.key_size in RSA_BITS


# -- what is answered ---------------------------------------------------------------------------------------


def _result(data_key: bytes, recipient: Attestation | None) -> dict[str, str]:
    """The key in the clear, or for the recipient alone: never both."""
    if recipient is None:
        return {"Plaintext": b64encode(data_key).decode()}
    sealed = make_recipient(data_key, recipient.public_key or b"")
    return {"CiphertextForRecipient": b64encode(sealed).decode()}


def _wrap(secret: bytes, arn: str, context: Mapping[str, str], data_key: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    name = arn.encode()
    header = b"\x01" + len(name).to_bytes(2) + name
    return header + nonce + AESGCM(secret).encrypt(nonce, data_key, header + _bound(context))


def _unwrap(secret: bytes, arn: str, context: Mapping[str, str], wrapped: bytes) -> bytes:
    end = 3 + len(arn)
    nonce, ciphertext = wrapped[end : end + _NONCE_BYTES], wrapped[end + _NONCE_BYTES :]
    try:
        return AESGCM(secret).decrypt(nonce, ciphertext, wrapped[:end] + _bound(context))
    except InvalidTag:
        message = "the ciphertext, or its encryption context, is another"
        raise _Refusal("InvalidCiphertextException", message) from None


def _bound(context: Mapping[str, str]) -> bytes:
    return orjson.dumps(context, option=orjson.OPT_SORT_KEYS)
