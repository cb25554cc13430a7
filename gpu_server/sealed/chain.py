"""The certificates of an attestation document, from its root to the key that signed it.

Path building is cryptography's; AWS's certificates are no web certificates, so its default policy does not
fit them and is replaced by what AWS's attestation process asks for:
https://github.com/aws/aws-nitro-enclaves-nsm-api/blob/main/docs/attestation_process.md
Revocation lists are not read, as it says: what signs a document lives for hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from gpu_server.sealed.errors import AttestationRefused

MAX_INTERMEDIATES: Final = 4
_UNDERSTOOD: Final = (x509.BasicConstraints, x509.KeyUsage, x509.NameConstraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A chain that holds: the leaf's key, when its first certificate expires, and its root's common name."""

    leaf_key: ec.EllipticCurvePublicKey
    expires: datetime
    root_name: str


def verify_chain(leaf: bytes, bundle: Sequence[bytes], *, at: datetime) -> Chain:
    """Verify that `bundle` (DER, root first) leads to `leaf`, without a certificate too many, at that time.

    The caller has decided to trust `bundle[0]`: nothing here looks at whose it is. Raises
    `AttestationRefused`: malformed, expired, or chain.
    """
    root, *intermediates = [_load(der, at) for der in bundle]
    target = _load(leaf, at)
    every = [target, *reversed(intermediates), root]
    policy = (
        verification.PolicyBuilder()
        .store(verification.Store([root]))
        .time(at)
        .max_chain_depth(MAX_INTERMEDIATES)
        .extension_policies(ca_policy=_ca_policy(), ee_policy=_leaf_policy())
    )
    try:
        # A root is trusted, but a document that carries one with another's signature is not what it claims.
        root.verify_directly_issued_by(root)
        found = policy.build_client_verifier().verify(target, intermediates).chain
        key, root_name = target.public_key(), _common_name(root)
    except Exception as error:
        # VerificationError, InvalidSignature, and whatever a strange key or name raises.
        raise AttestationRefused("chain", "the chain of certificates does not hold") from error
    # The bundle is the chain in the order of AWS's specification: nothing unused travels along.
    if found != every:
        raise AttestationRefused("chain", "the bundle is not the chain of the certificate")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise AttestationRefused("chain", "the certificate's key is not on P-384")
    return Chain(
        leaf_key=key,
        expires=min(certificate.not_valid_after_utc for certificate in every),
        root_name=root_name,
    )


def _load(der: bytes, at: datetime) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        critical = [extension.value for extension in certificate.extensions if extension.critical]
        valid = certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc
    except Exception as error:
        # Much is read only when it is asked for, and what is wrong with it has no one family of errors: a
        # year 0 raises ValueError, a name of a kind that the library does not know an error of its own.
        raise AttestationRefused("malformed", "a certificate cannot be read") from error
    if not valid:
        raise AttestationRefused("expired", "a certificate of the chain is not valid at that time")
    if not all(isinstance(value, _UNDERSTOOD) for value in critical):
        raise AttestationRefused("chain", "a certificate has a critical extension that is unknown here")
    return certificate


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _ca_policy() -> verification.ExtensionPolicy:
    return (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.BasicConstraints, verification.Criticality.CRITICAL, _is_ca)
        .require_present(x509.KeyUsage, verification.Criticality.AGNOSTIC, _may_sign_certificates)
    )


def _leaf_policy() -> verification.ExtensionPolicy:
    return (
        verification.ExtensionPolicy.permit_all()
        .may_be_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, _is_no_ca)
        .require_present(x509.KeyUsage, verification.Criticality.AGNOSTIC, _may_sign)
    )


def _is_ca(
    policy: verification.Policy, certificate: x509.Certificate, constraints: x509.BasicConstraints
) -> None:
    if not constraints.ca:
        raise ValueError("no CA")


def _is_no_ca(
    policy: verification.Policy, certificate: x509.Certificate, constraints: x509.BasicConstraints | None
) -> None:
    if constraints is not None and constraints.ca:
        raise ValueError("a CA")


def _may_sign_certificates(
    policy: verification.Policy, certificate: x509.Certificate, usage: x509.KeyUsage
) -> None:
    if not usage.key_cert_sign:
        raise ValueError("may not sign certificates")


def _may_sign(policy: verification.Policy, certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.digital_signature:
        raise ValueError("may not sign")
