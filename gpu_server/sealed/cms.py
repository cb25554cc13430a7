"""`CiphertextForRecipient` of AWS KMS: a data key that only one enclave's RSA key opens.

It is CMS EnvelopedData (RFC 5652) in BER with indefinite lengths: one recipient, named by the hash of its
key, RSAES-OAEP with SHA-256, and AES-256-CBC. Nothing in it is authenticated, and whoever carries it may
change it and watch what the enclave does. So there is one answer for every failure, and the padding is
compared as a whole.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Final

from asn1crypto import cms as asn1_cms
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from gpu_server.sealed.errors import CannotOpen

DATA_KEY_BYTES: Final = 32
MAX_BYTES: Final = 4096
_BLOCK: Final = 16
_PADDING: Final = bytes([_BLOCK]) * _BLOCK
"""PKCS#7 of 32 bytes: a whole block."""
_OAEP: Final = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)


def open_recipient(cms: bytes, private_key: rsa.RSAPrivateKey) -> bytes:
    """The 32-byte data key. Raises `CannotOpen`, the same for every failure.

    Trust the key only once something that it authenticates has been verified.
    """
    try:
        encrypted_key, initial, content = _parts(cms)
        content_key = private_key.decrypt(encrypted_key, _OAEP)
        decryptor = Cipher(algorithms.AES256(content_key), modes.CBC(initial)).decryptor()
        plaintext = decryptor.update(content) + decryptor.finalize()
    except Exception:  # noqa: BLE001 -- parsers of ASN.1 raise many things, and all mean the same here
        raise CannotOpen from None
    if not hmac.compare_digest(plaintext[-_BLOCK:], _PADDING):
        raise CannotOpen
    return plaintext[:-_BLOCK]


def _parts(cms: bytes) -> tuple[bytes, bytes, bytes]:
    """Encrypted content key, initialization vector and ciphertext. Raises whatever it raises."""
    if len(cms) > MAX_BYTES:
        raise ValueError("too long")
    info = asn1_cms.ContentInfo.load(cms, strict=True)
    enveloped: Any = info["content"]
    [recipient] = enveloped["recipient_infos"]
    transport, content = recipient.chosen, enveloped["encrypted_content_info"]
    key_algorithm, algorithm = transport["key_encryption_algorithm"], content["content_encryption_algorithm"]
    oaep = key_algorithm["parameters"]
    initial, ciphertext = algorithm["parameters"].native, content["encrypted_content"].native
    expected = (
        (info["content_type"].native, "enveloped_data"),
        (enveloped["version"].native, "v2"),
        (recipient.name, "ktri"),
        (transport["version"].native, "v2"),
        (transport["rid"].name, "subject_key_identifier"),
        (key_algorithm["algorithm"].native, "rsaes_oaep"),
        (oaep["hash_algorithm"]["algorithm"].native, "sha256"),
        (oaep["mask_gen_algorithm"]["algorithm"].native, "mgf1"),
        (oaep["mask_gen_algorithm"]["parameters"]["algorithm"].native, "sha256"),
        (oaep["p_source_algorithm"]["parameters"].native, b""),
        (content["content_type"].native, "data"),
        (algorithm["algorithm"].native, "aes256_cbc"),
        (len(initial), _BLOCK),
        (len(ciphertext), DATA_KEY_BYTES + _BLOCK),
    )
    if any(found != wanted for found, wanted in expected):
        raise ValueError("not what KMS makes")
    return transport["encrypted_key"].native, initial, ciphertext


def make_recipient(data_key: bytes, spki: bytes) -> bytes:
    """What KMS answers to the holder of this RSA key (SubjectPublicKeyInfo, DER), byte for byte in its form.

    For the emulator and tests; it takes any data, not only 32 bytes. Raises ValueError for another key.
    """
    key = serialization.load_der_public_key(spki)
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("an RSA key is needed")
    content_key, initial = secrets.token_bytes(32), secrets.token_bytes(_BLOCK)
    short = _BLOCK - len(data_key) % _BLOCK
    encryptor = Cipher(algorithms.AES256(content_key), modes.CBC(initial)).encryptor()
    ciphertext = encryptor.update(data_key + bytes([short]) * short) + encryptor.finalize()

    sha256 = _tlv(0x30, _OID_SHA256, _NULL)
    mgf1 = _tlv(0x30, _OID_MGF1, sha256)
    oaep = _tlv(0x30, _OID_OAEP, _tlv(0x30, _tlv(0xA0, sha256), _tlv(0xA1, mgf1)))
    recipient = _tlv(
        0x30,
        _VERSION_2,
        _tlv(0x80, hashlib.sha256(spki).digest()),
        oaep,
        _tlv(0x04, key.encrypt(content_key, _OAEP)),
    )
    content = _open_ended(
        0x30,
        _OID_DATA,
        _tlv(0x30, _OID_AES256_CBC, _tlv(0x04, initial)),
        _open_ended(0xA0, _tlv(0x04, ciphertext)),
    )
    enveloped = _open_ended(0x30, _VERSION_2, _tlv(0x31, recipient), content)
    return _open_ended(0x30, _OID_ENVELOPED, _open_ended(0xA0, enveloped))


def _tlv(tag: int, *parts: bytes) -> bytes:
    """An element of definite length (X.690, section 8.1.3)."""
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(size)]) + size + body


def _open_ended(tag: int, *parts: bytes) -> bytes:
    """An element of indefinite length, ended by two zeros."""
    return bytes([tag, 0x80]) + b"".join(parts) + b"\0\0"


_NULL: Final = _tlv(0x05)
_VERSION_2: Final = _tlv(0x02, b"\2")
_OID_DATA: Final = _tlv(0x06, bytes.fromhex("2a864886f70d010701"))
_OID_ENVELOPED: Final = _tlv(0x06, bytes.fromhex("2a864886f70d010703"))
_OID_OAEP: Final = _tlv(0x06, bytes.fromhex("2a864886f70d010107"))
_OID_MGF1: Final = _tlv(0x06, bytes.fromhex("2a864886f70d010108"))
_OID_SHA256: Final = _tlv(0x06, bytes.fromhex("608648016503040201"))
_OID_AES256_CBC: Final = _tlv(0x06, bytes.fromhex("60864801650304012a"))
