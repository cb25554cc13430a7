"""Chains of certificates: every link is held, nothing travels along, and a key that may not sign does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from gpu_server.sealed.attestation import SIMULATED_ROOT_NAME
from gpu_server.sealed.chain import verify_chain
from gpu_server.sealed.errors import AttestationRefused
from gpu_server.sealed.software_pki import LEAF_LIFE, Holder, issue_below, make_root
from tests.sealed.documents import MODULE_ID, NOW, payload_of, real_document

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def root() -> Holder:
    return make_root(NOW)


@pytest.fixture(scope="module")
def below(root: Holder) -> list[Holder]:
    return issue_below(root, module_id=MODULE_ID, now=NOW)


def refused(leaf: Holder, *bundle: Holder, at: datetime = NOW) -> str:
    """The reason for which a chain is refused."""
    with pytest.raises(AttestationRefused) as caught:
        verify_chain(leaf.der, [holder.der for holder in bundle], at=at)
    return caught.value.reason


def made(
    issuer: Holder,
    *extensions: tuple[x509.ExtensionType, bool],
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    name: str = "made",
) -> Holder:
    """A certificate with these extensions, signed by an issuer."""
    private = key or ec.generate_private_key(ec.SECP384R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer.certificate.subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(issuer.key, hashes.SHA384())
    return Holder(certificate=certificate, key=private)  # type: ignore[arg-type]


def usage(**allowed: bool) -> x509.KeyUsage:
    """Key usage, with only these allowed."""
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
        " crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names.split()})


END = (x509.BasicConstraints(ca=False, path_length=None), True)
SIGNS = (usage(digital_signature=True), False)


def test_a_chain_that_holds(root: Holder, below: list[Holder]) -> None:
    """It gives the leaf's key, the end of the shortest certificate, and the root's name."""
    *middle, leaf = below
    chain = verify_chain(leaf.der, [holder.der for holder in (root, *middle)], at=NOW)
    assert chain.leaf_key == leaf.key.public_key()
    assert chain.expires == NOW + LEAF_LIFE
    assert chain.root_name == SIMULATED_ROOT_NAME


def test_real_certificates() -> None:
    """AWS's own certificates hold, at their time."""
    said = payload_of(real_document("good"))
    at = datetime.fromisoformat("2022-11-09T23:00:00+00:00")
    assert verify_chain(said["certificate"], said["cabundle"], at=at).root_name == "aws.nitro-enclaves"


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_link_missing(root: Holder, below: list[Holder], missing: int) -> None:
    """Without one of its certificates a chain does not hold."""
    *middle, leaf = below
    bundle = [root, *middle]
    del bundle[missing]
    assert refused(leaf, *bundle) == "chain"


def test_order_and_extras(root: Holder, below: list[Holder]) -> None:
    """The bundle is the chain itself: another order, one twice or a stranger in it is refused."""
    region, zone, instance, leaf = below
    stranger = make_root(NOW)
    for bundle in (
        [root, zone, region, instance],
        [root, region, zone, instance, instance],
        [root, region, zone, instance, stranger],
        [root, root, region, zone, instance],
    ):
        assert refused(leaf, *bundle) == "chain"
    assert refused(leaf, region, zone, instance) == "chain"


def test_another_root(root: Holder, below: list[Holder]) -> None:
    """A root of the same name with another key does not carry the chain, also not beside the right one."""
    *middle, leaf = below
    other = make_root(NOW)
    assert refused(leaf, other, *middle) == "chain"
    assert refused(leaf, other, root, *middle) == "chain"


def test_a_root_that_another_signed(below: list[Holder]) -> None:
    """A trusted certificate must have signed itself."""
    region, zone, instance, leaf = below
    assert refused(leaf, region, zone, instance) == "chain"


@pytest.mark.parametrize("late", [False, True])
def test_every_certificate_is_valid_at_that_time(root: Holder, below: list[Holder], late: bool) -> None:
    """A certificate that is not valid yet, or not any more, ends the chain."""
    *middle, leaf = below
    at = NOW + LEAF_LIFE + timedelta(seconds=1) if late else NOW - timedelta(seconds=4)
    assert refused(leaf, root, *middle, at=at) == "expired"
    assert refused(middle[2], root, *middle[:2], at=NOW + 2 * DAY) == "expired"


def test_a_leaf_signs_no_certificates(root: Holder, below: list[Holder]) -> None:
    """An enclave cannot issue a certificate for another."""
    *middle, leaf = below
    assert refused(made(leaf, END, SIGNS), root, *middle, leaf) == "chain"


def test_path_length(root: Holder) -> None:
    """A certificate that may have no authority below it has none."""
    narrow = root.issue("narrow", now=NOW, life=DAY, path_length=0)
    wide = narrow.issue("wide", now=NOW, life=DAY, path_length=0)
    leaf = wide.issue("leaf", now=NOW, life=DAY, path_length=None)
    assert refused(leaf, root, narrow, wide) == "chain"


def test_a_long_chain(root: Holder) -> None:
    """There are at most four between root and leaf."""
    chain = [root]
    for depth in range(5):
        chain.append(chain[-1].issue(f"level {depth}", now=NOW, life=DAY, path_length=9))
    leaf = chain[-1].issue("leaf", now=NOW, life=DAY, path_length=None)
    assert refused(leaf, *chain) == "chain"
    leaf = chain[-2].issue("leaf", now=NOW, life=DAY, path_length=None)
    verify_chain(leaf.der, [holder.der for holder in chain[:-1]], at=NOW)


@pytest.mark.parametrize(
    ("extensions", "holds"),
    [
        ([END, SIGNS], True),
        ([SIGNS], True),
        ([END, (usage(digital_signature=True), True)], True),
        ([END], False),
        ([END, (usage(key_cert_sign=True), False)], False),
        ([(x509.BasicConstraints(ca=True, path_length=0), True), SIGNS], False),
        ([END, SIGNS, (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), True)], False),
        ([END, SIGNS, (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), False)], True),
    ],
)
def test_what_a_leaf_may_be(
    root: Holder, extensions: list[tuple[x509.ExtensionType, bool]], holds: bool
) -> None:
    """A leaf may sign and is no authority; a critical extension that nobody here understands is refused."""
    leaf = made(root, *extensions)
    if holds:
        verify_chain(leaf.der, [root.der], at=NOW)
    else:
        assert refused(leaf, root) == "chain"


@pytest.mark.parametrize(
    "extensions",
    [
        [],
        [(usage(key_cert_sign=True), True)],
        [(x509.BasicConstraints(ca=True, path_length=0), True)],
        [(x509.BasicConstraints(ca=True, path_length=0), True), (usage(digital_signature=True), True)],
        [(x509.BasicConstraints(ca=True, path_length=0), False), (usage(key_cert_sign=True), True)],
        [(x509.BasicConstraints(ca=False, path_length=None), True), (usage(key_cert_sign=True), True)],
    ],
)
def test_what_an_authority_must_be(root: Holder, extensions: list[tuple[x509.ExtensionType, bool]]) -> None:
    """An intermediate says, critically, that it is an authority, and that it signs certificates."""
    middle = made(root, *extensions)
    assert refused(made(middle, END, SIGNS, name="leaf"), root, middle) == "chain"


@pytest.mark.parametrize(
    "key",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["P-256", "RSA"],
)
def test_keys_of_another_kind(
    root: Holder, key: Callable[[], ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]
) -> None:
    """A document's key is on P-384."""
    assert refused(made(root, END, SIGNS, key=key()), root) == "chain"


@pytest.mark.parametrize(
    "name", [b"\x30\x02\xa3\x00", b"\x30\x02\xa5\x00"], ids=["x400Address", "ediPartyName"]
)
def test_names_that_no_library_reads(root: Holder, name: bytes) -> None:
    """A kind of name that the library does not know is malformed, whoever signed it."""
    extension = x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, name)
    assert refused(made(root, END, SIGNS, (extension, False)), root) == "malformed"


def test_a_year_that_no_clock_has(root: Holder, below: list[Holder]) -> None:
    """A certificate that ends in the year 0 is malformed."""
    *middle, leaf = below
    ends = f"{root.certificate.not_valid_after_utc:%Y%m%d%H%M%SZ}".encode()
    assert root.der.count(ends) == 1
    strange = root.der.replace(ends, b"0000" + ends[4:])
    with pytest.raises(AttestationRefused) as caught:
        verify_chain(leaf.der, [strange, *(holder.der for holder in middle)], at=NOW)
    assert caught.value.reason == "malformed"


def renamed(holder: Holder, by: Holder) -> bytes:
    """The certificate, with names of the simulated root that are no UTF-8, signed again."""
    wrong = SIMULATED_ROOT_NAME.replace("gpu", "\udcff\udcff\udcff").encode("utf-8", "surrogateescape")
    certificate = holder.certificate
    content = certificate.tbs_certificate_bytes.replace(SIMULATED_ROOT_NAME.encode(), wrong)
    assert wrong in content
    signature = b""
    while len(signature) != len(certificate.signature):  # the lengths around it shall stay as they are
        signature = by.key.sign(content, ec.ECDSA(hashes.SHA384()))
    signed = holder.der.replace(certificate.tbs_certificate_bytes, content)
    return signed.replace(certificate.signature, signature)


def test_a_root_whose_name_is_no_text() -> None:
    """A chain that holds, but whose root's name cannot be read, is refused like any other."""
    root = make_root(NOW)
    leaf = made(root, END, SIGNS)
    with pytest.raises(AttestationRefused) as caught:
        verify_chain(renamed(leaf, root), [renamed(root, root)], at=NOW)
    assert caught.value.reason == "chain"
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x03\x02\x01\x01", b"\x30\x80" * 100, bytes(1024)])
def test_no_certificates(root: Holder, der: bytes) -> None:
    """What is no certificate is malformed, as leaf, between, and as root."""
    for leaf, bundle in ((der, [root.der]), (root.der, [root.der, der]), (root.der, [der])):
        with pytest.raises(AttestationRefused) as caught:
            verify_chain(leaf, bundle, at=NOW)
        assert caught.value.reason == "malformed"
