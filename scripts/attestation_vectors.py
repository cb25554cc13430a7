"""Test vectors of attestation documents: good ones, and others with the reason for which they are refused.

Keys, serial numbers and signatures (RFC 6979) are fixed, so the same documents come out each time. Their root
is made up and its keys are published here: it must be trusted for these vectors and nowhere else.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from gpu_server.sealed.canonical import encode
from gpu_server.sealed.cose import Sign1, protected_es384, write_sign1

NOW: Final = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
"""When the documents were made."""
MODULE_ID: Final = "i-0123456789abcdef0-enc0123456789abcdef"
PCRS: Final = {0: b"\x10" * 48, 1: b"\x11" * 48, 2: b"\x12" * 48, 3: b"\x13" * 48, 4: b"\x14" * 48}
CURVE: Final = ec.SECP384R1()


def seed(name: str) -> bytes:
    """32 bytes that stand for something random."""
    return sha256(f"gpu-server attestation vectors: {name}".encode()).digest()


def private(name: str) -> ec.EllipticCurvePrivateKey:
    """A key that stands for a random one."""
    return ec.derive_private_key(int.from_bytes(seed(name)), CURVE)


NONCE: Final = seed("nonce")
SLOTS: Final = (seed("record 0"), seed("record 1"))
USER_DATA: Final = encode(["gpu-server/1", list(SLOTS)])


def public_key() -> bytes:
    """SubjectPublicKeyInfo of an RSA key of 2048 bits: a number whose factors nobody knows, so that no
    private key is published."""
    number = b"".join(seed(f"modulus {i}") for i in range(8))
    modulus = int.from_bytes(number) | 1 << 2047 | 1
    return (
        rsa.RSAPublicNumbers(65537, modulus)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def certificate(name: str, issuer: str, life: timedelta, *, ca: bool, depth: int | None = None) -> bytes:
    """The certificate of that name, signed with its issuer's key; valid since a moment before NOW. What is
    behind a # in a name chooses the key, and is not in the certificate."""
    usage = {"digital_signature": not ca, "content_commitment": False, "key_encipherment": False}
    usage |= {"data_encipherment": False, "key_agreement": False, "key_cert_sign": ca, "crl_sign": ca}
    subject, signer = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, of.split("#")[0])]) for of in (name, issuer)
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(private(name).public_key())
        .serial_number(int.from_bytes(seed(f"serial: {name}")[:15]) + 1)
        .not_valid_before(NOW - timedelta(seconds=3))
        .not_valid_after(NOW + life)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=depth), critical=True)
        .add_extension(x509.KeyUsage(**usage, encipher_only=False, decipher_only=False), critical=ca)
        .sign(private(issuer), hashes.SHA384(), ecdsa_deterministic=True)
    )
    return made.public_bytes(serialization.Encoding.DER)


ROOT: Final = "gpu-server test vectors root"
OTHER_ROOT: Final = f"{ROOT}#another"
"""A root of the same name with another key."""


def bundle(root: str = ROOT) -> list[bytes]:
    """Root, region, zone and instance: what leads to the enclave's certificate."""
    day = timedelta(days=1)
    return [
        certificate(root, root, 30 * 365 * day, ca=True),
        certificate("region", root, 20 * day, ca=True, depth=2),
        certificate("zone", "region", 6 * day, ca=True, depth=1),
        certificate("instance", "zone", day, ca=True, depth=0),
    ]


def payload(**changes: Any) -> dict[str, Any]:
    """A document's payload, with some fields changed."""
    plain = {
        "module_id": MODULE_ID,
        "digest": "SHA384",
        "timestamp": int(NOW.timestamp() * 1000),
        "pcrs": {index: PCRS.get(index, bytes(48)) for index in range(16)},
        "certificate": certificate("enclave", "instance", timedelta(hours=3), ca=False),
        "cabundle": bundle(),
        "public_key": public_key(),
        "user_data": USER_DATA,
        "nonce": NONCE,
    }
    return {**plain, **changes}


def document(content: bytes, *, signer: str = "enclave", protected: bytes = protected_es384()) -> bytes:
    """A COSE_Sign1 over a payload, untagged."""
    signed = Sign1(protected=protected, payload=content, signature=b"").signed
    algorithm = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)
    r, s = decode_dss_signature(private(signer).sign(signed, algorithm))
    return write_sign1(protected=protected, payload=content, signature=r.to_bytes(48) + s.to_bytes(48))


def good_documents() -> dict[str, bytes]:
    """Documents that must be accepted, all of them with the same content."""
    plain = document(cbor2.dumps(payload()))
    pairs = b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in payload().items())
    return {
        "a document": plain,
        "with COSE's tag 18": b"\xd2" + plain,
        "its payload a map of indefinite length": document(b"\xbf" + pairs + b"\xff"),
    }


def refused_documents() -> list[tuple[str, str, bytes, datetime]]:
    """What is wrong, the reason, the document, and when it is verified."""
    content, later, debug = payload(), NOW + timedelta(minutes=6), dict.fromkeys(range(16), bytes(48))
    plain = document(cbor2.dumps(content))
    pcrs = content["pcrs"]
    # A map of ten pairs, of which the last repeats the nonce.
    twice = b"\xaa" + cbor2.dumps(content)[1:] + cbor2.dumps("nonce") + cbor2.dumps(NONCE)
    root, region, *below = content["cabundle"]

    def changed(**changes: Any) -> bytes:
        return document(cbor2.dumps(payload(**changes)))

    return [
        ("a byte behind the document", "malformed", plain + b"\0", NOW),
        ("cut", "malformed", plain[:-1], NOW),
        ("signed with ES256, it says", "malformed", _es256(content), NOW),
        ("the nonce twice", "malformed", document(twice), NOW),
        ("a register of 47 bytes", "malformed", changed(pcrs={**pcrs, 2: bytes(47)}), NOW),
        ("user data of another protocol", "malformed", changed(user_data=encode(["other/1", []])), NOW),
        ("no public key", "malformed", changed(public_key=None), NOW),
        ("another root of the same name", "root", changed(cabundle=bundle(OTHER_ROOT)), NOW),
        ("four hours later", "expired", plain, NOW + timedelta(hours=4)),
        ("a certificate left out", "chain", changed(cabundle=[root, *below]), NOW),
        ("a certificate too many", "chain", changed(cabundle=[root, region, region, *below]), NOW),
        ("an enclave's certificate of another issuer", "chain", changed(certificate=_astray()), NOW),
        (
            "signed with the instance's key",
            "signature",
            document(cbor2.dumps(content), signer="instance"),
            NOW,
        ),
        ("a bit of the signature", "signature", plain[:-1] + bytes([plain[-1] ^ 1]), NOW),
        ("debug mode", "debug", changed(pcrs=debug), NOW),
        ("another nonce", "nonce", changed(nonce=seed("another nonce")), NOW),
        ("no nonce", "nonce", changed(nonce=None), NOW),
        ("another PCR0", "pcr", changed(pcrs={**pcrs, 0: bytes([1]) * 48}), NOW),
        ("no PCR2", "pcr", changed(pcrs={index: pcrs[index] for index in pcrs if index != 2}), NOW),
        ("six minutes later", "stale", plain, later),
    ]


def _es256(content: dict[str, Any]) -> bytes:
    return document(cbor2.dumps(content), protected=cbor2.dumps({1: -7}))


def _astray() -> bytes:
    """An enclave's certificate that names the instance as its issuer, and is signed with another key."""
    return certificate("enclave", "instance#another", timedelta(hours=3), ca=False)


def attestation() -> dict[str, Any]:
    """What the client trusts and expects, and documents that it accepts and refuses."""
    root = bundle()[0]
    return {
        "root": root.hex(),
        "root_sha256": sha256(root).hexdigest(),
        "at": f"{NOW:%Y-%m-%dT%H:%M:%SZ}",
        "max_age_seconds": 300,
        "nonce": NONCE.hex(),
        "pcrs": {str(index): PCRS[index].hex() for index in (0, 1, 2)},
        "public_key": public_key().hex(),
        "epoch": sha256(public_key()).hexdigest()[:32],
        "user_data": USER_DATA.hex(),
        "slots": [record.hex() for record in SLOTS],
        "good": [{"name": name, "document": data.hex()} for name, data in good_documents().items()],
        "refused": [
            {"name": name, "reason": reason, "at": f"{at:%Y-%m-%dT%H:%M:%SZ}", "document": data.hex()}
            for name, reason, data, at in refused_documents()
        ],
    }
