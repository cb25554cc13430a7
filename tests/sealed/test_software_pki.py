"""The certificates of a simulation are shaped like AWS's, and never pass for them."""

from __future__ import annotations

import hashlib
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from gpu_server.sealed.attestation import AWS_ROOT_SHA256, MAX_CERTIFICATE_BYTES, SIMULATED_ROOT_NAME
from gpu_server.sealed.software_pki import Holder, issue_below, make_root
from tests.sealed.documents import MODULE_ID, NOW


def names(holder: Holder) -> list[str]:
    """The common names of a certificate's subject."""
    found = holder.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return [str(name.value) for name in found]


def test_lifetimes_and_keys() -> None:
    """Five certificates on P-384, small enough for a document, as long-lived as the real ones."""
    root = make_root(NOW)
    chain = [root, *issue_below(root, module_id=MODULE_ID, now=NOW)]
    lives = [holder.certificate.not_valid_after_utc - NOW for holder in chain]
    days = timedelta(days=1)
    assert lives == [30 * 365 * days, 20 * days, 6 * days, days, timedelta(hours=3)]
    for holder in chain:
        assert holder.certificate.not_valid_before_utc < NOW
        assert isinstance(holder.key.curve, ec.SECP384R1)
        assert len(holder.der) <= MAX_CERTIFICATE_BYTES
    assert names(chain[-1]) == [MODULE_ID]
    assert names(chain[-2]) == ["i-0123456789abcdef0"]


def test_the_root_says_what_it_is() -> None:
    """Each root is new, is named a simulation, and is not AWS's."""
    one, other = make_root(NOW), make_root(NOW)
    assert names(one) == names(other) == [SIMULATED_ROOT_NAME]
    assert one.der != other.der
    assert AWS_ROOT_SHA256 not in {hashlib.sha256(root.der).digest() for root in (one, other)}


def test_keys_are_not_shown() -> None:
    """A holder's text does not have its key in it."""
    assert "key" not in repr(make_root(NOW)).lower()
