"""The five certificates behind a simulated enclave's documents: shaped like AWS's, worth nothing.

Root, region, zone, instance and enclave, on P-384, with the lifetimes of the real ones. The root is made up
when a simulated enclave starts, and its name says what it is.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gpu_server.sealed.attestation import SIMULATED_ROOT_NAME

ROOT_LIFE: Final = timedelta(days=30 * 365)
REGION_LIFE: Final = timedelta(days=20)
ZONE_LIFE: Final = timedelta(days=6)
INSTANCE_LIFE: Final = timedelta(days=1)
LEAF_LIFE: Final = timedelta(hours=3)
BACKDATED: Final = timedelta(seconds=3)
"""A certificate begins a moment before it is made, as the real ones do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def der(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def issue(self, name: str, *, now: datetime, life: timedelta, path_length: int | None) -> Holder:
        """A certificate below this one, valid from a moment ago; with `path_length=None` it is no CA."""
        return _made(
            name, now=now, life=life, ca=path_length is not None, path_length=path_length, issuer=self
        )


def make_root(now: datetime) -> Holder:
    """A new root of simulated enclaves."""
    return _made(SIMULATED_ROOT_NAME, now=now, life=ROOT_LIFE, ca=True, path_length=None, issuer=None)


def issue_below(root: Holder, *, module_id: str, now: datetime) -> list[Holder]:
    """Region, zone, instance and enclave, each below the one before."""
    region = root.issue("simulated region", now=now, life=REGION_LIFE, path_length=2)
    zone = region.issue("simulated zone", now=now, life=ZONE_LIFE, path_length=1)
    instance = zone.issue(module_id.partition("-enc")[0], now=now, life=INSTANCE_LIFE, path_length=0)
    return [region, zone, instance, instance.issue(module_id, now=now, life=LEAF_LIFE, path_length=None)]


def _made(
    name: str,
    *,
    now: datetime,
    life: timedelta,
    ca: bool,
    path_length: int | None,
    issuer: Holder | None,
) -> Holder:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "simulation"),
            x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),
        ]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(secrets.token_bytes(15)) + 1)
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        # The real leaf's key usage is not critical.
        .add_extension(_usage(ca), critical=ca)
    )
    certificate = builder.sign(issuer.key if issuer else key, hashes.SHA384())
    return Holder(certificate=certificate, key=key)


def _usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=not ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
