"""`CiphertextForRecipient`: opened by its key alone, with one answer for everything that is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import pytest
from asn1crypto import cms as asn1_cms
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.sealed.cms import make_recipient, open_recipient
from gpu_server.sealed.errors import CannotOpen

KEY = bytes(range(32))
INITIAL, CONTENT = 415, 435
"""Where the initialization vector and the ciphertext lie in an answer for an RSA-2048 key."""


@cache
def private() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def spki(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    """The public key, DER."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@cache
def sealed() -> bytes:
    return make_recipient(KEY, spki(private()))


def refused(cms: bytes, key: rsa.RSAPrivateKey | None = None) -> None:
    """Opening fails, with nothing said about why."""
    with pytest.raises(CannotOpen) as caught:
        open_recipient(cms, key or private())
    assert str(caught.value) == str(CannotOpen())
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_there_and_back() -> None:
    """What was made for a key is opened by it, each time another ciphertext."""
    assert open_recipient(sealed(), private()) == KEY
    assert make_recipient(KEY, spki(private())) != sealed()


def test_the_form_of_kms() -> None:
    """Byte for byte the form of KMS's own answers: indefinite lengths, the hash of the key as its name."""
    name = hashlib.sha256(spki(private())).hexdigest()
    sha256 = "300d06096086480165030402010500"
    head = (
        "308006092a864886f70d010703a080"  # ContentInfo, EnvelopedData
        "30800201023182016b308201670201028020"
        + name  # version 2, one recipient, version 2, its name
        + "303c06092a864886f70d010107302fa00f"
        + sha256  # RSAES-OAEP
        + "a11c301a06092a864886f70d010108"
        + sha256
        + "04820100"
    )
    middle = "308006092a864886f70d010701301d060960864801650304012a0410"  # data, AES-256-CBC
    made = sealed()
    assert made[:131].hex() == head
    assert made[387:INITIAL].hex() == middle
    assert made[431:CONTENT].hex() == "a0800430"
    assert made[483:].hex() == "00" * 10
    assert len(made) == 493


def test_definite_lengths() -> None:
    """The same in DER is the same."""
    info = asn1_cms.ContentInfo.load(sealed(), strict=True)
    plain = info.dump(force=True)
    assert plain[1] != 0x80
    assert open_recipient(plain, private()) == KEY


def test_another_key() -> None:
    """It opens for no other key."""
    refused(sealed(), rsa.generate_private_key(public_exponent=65537, key_size=2048))


@pytest.mark.parametrize("size", [0, 1, 16, 31, 33, 47, 48, 64])
def test_data_of_another_size(size: int) -> None:
    """A data key has 32 bytes, and nothing else is taken."""
    refused(make_recipient(bytes(size), spki(private())))


def flipped(at: int, mask: int = 1) -> bytes:
    """The answer with one byte changed."""
    changed = bytearray(sealed())
    changed[at] ^= mask
    return bytes(changed)


def test_no_padding_oracle() -> None:
    """Of all values for the byte before the padding's last, only the right one is taken: who can change the
    ciphertext learns nothing that he did not know."""
    taken = [mask for mask in range(256) if opens(flipped(CONTENT + 31, mask))]
    assert taken == [0]
    for at in range(CONTENT + 16, CONTENT + 48):
        refused(flipped(at))


def opens(cms: bytes) -> bool:
    """Whether it is opened at all."""
    try:
        open_recipient(cms, private())
    except CannotOpen:
        return False
    return True


def test_nothing_authenticates_the_key() -> None:
    """A changed initialization vector changes the key and is not noticed here: the reason why the key is
    trusted only after something that was sealed with it has been opened."""
    found = open_recipient(flipped(INITIAL), private())
    assert found == bytes([KEY[0] ^ 1]) + KEY[1:]


def changes() -> Iterator[tuple[str, bytes, bytes]]:
    """What another writer could have put there: what, old bytes, new bytes."""
    oid = bytes.fromhex
    yield "SHA-384", oid("608648016503040201"), oid("608648016503040202")
    yield "AES-128-CBC", oid("60864801650304012a"), oid("608648016503040102")
    yield "PKCS1", oid("2a864886f70d010107"), oid("2a864886f70d010101")
    yield "no MGF1", oid("2a864886f70d010108"), oid("2a864886f70d010109")
    yield "signed data", oid("2a864886f70d010703"), oid("2a864886f70d010702")
    yield "no data", oid("2a864886f70d010701"), oid("2a864886f70d010706")
    yield "version 0", oid("30800201023182"), oid("30800201003182")
    yield "recipient version 0", oid("30820167020102"), oid("30820167020100")
    yield "issuer and serial", oid("0201028020"), oid("0201028120")
    yield "no recipient", oid("3182016b"), oid("3082016b")


@pytest.mark.parametrize(("old", "new"), [pytest.param(o, n, id=what) for what, o, n in changes()])
def test_another_form(old: bytes, new: bytes) -> None:
    """Other algorithms, versions and kinds of recipients are refused."""
    assert old in sealed()
    refused(sealed().replace(old, new))


def test_two_recipients() -> None:
    """There is one recipient, not two and not none."""
    recipient = sealed()[24:387]
    assert recipient[:4].hex() == "30820167"
    head, tail = sealed()[:20], sealed()[387:]
    assert opens(head + b"\x31\x82" + len(recipient).to_bytes(2) + recipient + tail)
    refused(head + b"\x31\x82" + (2 * len(recipient)).to_bytes(2) + recipient * 2 + tail)
    refused(head + b"\x31\x00" + tail)


def test_trailing_bytes_and_size() -> None:
    """Nothing follows it, nothing is missing, and it is not large."""
    refused(sealed() + b"\0")
    refused(b"")
    refused(bytes(1 << 20))
    refused(b"\x30\x80" * 2048)
    for end in range(0, len(sealed()), 7):
        refused(sealed()[:end])


def test_keys_that_are_not_rsa() -> None:
    """A recipient has an RSA key."""
    with pytest.raises(ValueError, match="RSA"):
        make_recipient(KEY, spki(ec.generate_private_key(ec.SECP384R1())))


@settings(max_examples=1_000, database=None)
@given(
    at=st.integers(0, 492),
    cut=st.integers(0, 3),
    put=st.sampled_from([b"", b"\0", b"\xff", b"\x80", b"\x30\x80", b"\x04\x84\xff\xff\xff\xff"])
    | st.binary(max_size=4),
)
def test_mutations(at: int, cut: int, put: bytes) -> None:
    """Whatever is changed, it is refused in one way, or gives 32 bytes."""
    with suppress(CannotOpen):
        assert len(open_recipient(sealed()[:at] + put + sealed()[at + cut :], private())) == 32
