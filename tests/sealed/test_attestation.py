"""Attestation documents: the good ones verify, the others are refused, each for its reason."""

from __future__ import annotations

import hashlib
import resource
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_server.sealed import canonical
from gpu_server.sealed.attestation import (
    AWS_ROOT_SHA256,
    CLOCK_SKEW,
    Attestation,
    root_fingerprint,
    verify,
)
from gpu_server.sealed.cose import read_sign1, write_sign1
from gpu_server.sealed.errors import AttestationRefused
from gpu_server.sealed.software_nsm import sign_document
from gpu_server.sealed.software_pki import LEAF_LIFE
from tests.sealed.documents import (
    MODULE_ID,
    NONCE,
    NOW,
    PCRS,
    PUBLIC_KEY,
    REAL,
    SLOTS,
    USER_DATA,
    Forge,
    payload_of,
    real_document,
    software_document,
    software_nsm,
)


def check(document: bytes, **options: Any) -> Attestation:
    """Verify at NOW, as a caller who accepts simulations."""
    wanted: dict[str, Any] = {"nonce": NONCE, "pcrs": PCRS, "allow_simulated": True, "at": NOW}
    return verify(document, **{**wanted, **options})


def refused(document: bytes, **options: Any) -> str:
    """The reason for which a document is refused."""
    with pytest.raises(AttestationRefused) as caught:
        check(document, **options)
    return caught.value.reason


@cache
def forge() -> Forge:
    return Forge()


# -- real hardware ------------------------------------------------------------------------------------------


def test_a_real_document() -> None:
    """A document of real hardware verifies at its own time, under AWS's root, and says what it says."""
    found = verify(real_document("good"), nonce=None, pcrs={}, at_document_time=True)
    assert not found.simulated
    assert found.module_id == "i-04fd167167daacf3b-enc01845e97d0b3eb4e"
    assert found.timestamp == datetime(2022, 11, 9, 22, 52, 0, 696000, tzinfo=UTC)
    assert found.expires == datetime(2022, 11, 10, 1, 52, tzinfo=UTC)
    assert found.pcrs[0].hex().startswith("22f9e1c9")
    assert sorted(found.pcrs) == list(range(16))
    assert found.public_key is None


def test_a_real_document_with_all_that_is_expected() -> None:
    """Its nonce and registers can be asked for, and another nonce or register is refused."""
    document = real_document("good")
    said = payload_of(document)
    verify(document, nonce=said["nonce"], pcrs=said["pcrs"], at_document_time=True)
    assert refused(document, nonce=NONCE, pcrs={}, at_document_time=True) == "nonce"
    assert refused(document, nonce=None, pcrs={3: b"\1" * 48}, at_document_time=True) == "pcr"


@pytest.mark.parametrize(("name", "reason"), [("bad_signature", "signature"), ("debug_mode", "debug")])
def test_bad_real_documents(name: str, reason: str) -> None:
    """A forged signature and debug mode are refused, each for what it is."""
    assert refused(real_document(name), nonce=None, pcrs={}, at_document_time=True) == reason


def test_real_documents_expire() -> None:
    """Without asking for its own time, a document of 2022 is refused."""
    assert refused(real_document("good"), nonce=None, pcrs={}, at=None) == "expired"


def test_real_documents_need_their_root() -> None:
    """A caller who trusts another root, or none, does not accept AWS's, and a simulation is no way around."""
    assert refused(real_document("good"), nonce=None, pcrs={}, roots=(), at_document_time=True) == "root"


# -- documents of the software module -----------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["definite", "indefinite"])
def test_a_simulated_document(encoding: str) -> None:
    """A software document verifies for a caller who allows it, in both encodings, and is marked."""
    found = check(software_document(software_nsm(encoding=encoding)))
    assert found.simulated
    assert found.module_id == MODULE_ID
    assert (found.timestamp, found.expires) == (NOW, NOW + LEAF_LIFE)
    assert (found.public_key, found.user_data, found.nonce) == (PUBLIC_KEY, USER_DATA, NONCE)
    assert {index: found.pcrs[index] for index in PCRS} == PCRS
    assert found.epoch == hashlib.sha256(PUBLIC_KEY).digest()[:16]
    assert found.slots == SLOTS


def test_a_simulated_document_is_not_aws() -> None:
    """Under AWS's root alone a software document is refused."""
    assert refused(software_document(), allow_simulated=False) == "root"


def test_a_pinned_root_is_still_simulated() -> None:
    """Who pins the root of one module accepts its documents alone, and hears that they are no hardware's."""
    nsm = software_nsm()
    pem = x509.load_der_x509_certificate(nsm.root).public_bytes(serialization.Encoding.PEM)
    roots = [root_fingerprint(pem), AWS_ROOT_SHA256]
    assert check(software_document(nsm), roots=roots, allow_simulated=False).simulated
    assert refused(software_document(), roots=roots, allow_simulated=False) == "root"


def test_a_root_of_another_name_is_no_simulation() -> None:
    """`allow_simulated` accepts roots that say what they are, and no others."""
    root = forge().root.issue("aws.nitro-enclaves", now=NOW, life=timedelta(days=1), path_length=3)
    certificates = Forge(root)
    assert refused(certificates.document()) in ("root", "chain")


def test_debug_mode() -> None:
    """Debug mode is refused always, also by a caller who expects zeros."""
    document = software_document(software_nsm(debug=True))
    assert refused(document, pcrs={}) == "debug"
    assert refused(document, pcrs={0: bytes(48)}) == "debug"
    assert refused(forge().document({"pcrs": {1: PCRS[1]}}), pcrs={}) == "debug"


def test_nonce_and_registers() -> None:
    """Another nonce, none at all, another register or a missing one: refused."""
    document = software_document()
    assert refused(document, nonce=NONCE[::-1]) == "nonce"
    assert refused(forge().document({"nonce": None})) == "nonce"
    for index in PCRS:
        assert refused(document, pcrs={**PCRS, index: b"\x99" * 48}) == "pcr"
        assert refused(document, pcrs={**PCRS, index: PCRS[index][:32]}) == "pcr"
    assert refused(document, pcrs={20: bytes(48)}) == "pcr"
    check(document, nonce=None, pcrs={})


def test_freshness() -> None:
    """A document is good for `max_age` seconds, and one from the future only within the clocks' skew."""
    document = software_document()
    check(document, at=NOW + timedelta(seconds=300))
    assert refused(document, at=NOW + timedelta(seconds=301)) == "stale"
    check(document, at=NOW + timedelta(seconds=301), max_age=302)
    check(document, at=NOW - CLOCK_SKEW)
    assert refused(document, at=NOW - CLOCK_SKEW - timedelta(seconds=1)) == "expired"


def test_the_chain_expires_first() -> None:
    """However old a document may be, its certificates must be valid."""
    document = software_document()
    check(document, at=NOW + LEAF_LIFE, max_age=1e6)
    assert refused(document, at=NOW + LEAF_LIFE + timedelta(seconds=1), max_age=1e6) == "expired"
    check(document, at=NOW + timedelta(days=400), at_document_time=True)
    made = NOW + timedelta(days=7)
    late = forge().document({"timestamp": int(made.timestamp() * 1000)})
    assert refused(late, at=made, at_document_time=True) == "expired"


def test_now_is_the_default() -> None:
    """Without a time, it is verified as of now."""
    check(software_document(software_nsm(now=lambda: datetime.now(UTC))), at=None)
    assert refused(software_document(), at=None) == "expired"


# -- what is in it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"module_id": ""},
        {"module_id": b"i-0"},
        {"module_id": None},
        {"digest": "SHA256"},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": 1.5e12},
        {"timestamp": True},
        {"timestamp": 1 << 63},
        {"timestamp": 1 << 70},
        {"pcrs": {}},
        {"pcrs": [b"\1" * 48]},
        {"pcrs": {0: b"\1" * 32}},
        {"pcrs": {0: "1" * 48}},
        {"pcrs": {32: b"\1" * 48}},
        {"pcrs": {"0": b"\1" * 48}},
        {"pcrs": {True: b"\1" * 48}},
        {"certificate": b""},
        {"certificate": bytes(1025)},
        {"certificate": b"no certificate"},
        {"certificate": None},
        {"cabundle": []},
        {"cabundle": {}},
        {"cabundle": [b""]},
        {"cabundle": [bytes(1025)]},
        {"cabundle": [b"x"] * 6},
        {"cabundle": [b"no certificate"]},
        {"public_key": b""},
        {"public_key": bytes(1025)},
        {"public_key": "key"},
        {"user_data": bytes(1025)},
        {"user_data": 1},
        {"nonce": bytes(1025)},
        {"nonce": []},
    ],
    ids=str,
)
def test_fields_of_another_kind(change: dict[str, Any]) -> None:
    """A field of another type or size is refused, however well it is signed."""
    assert refused(forge().document(change), nonce=None, pcrs={}) == "malformed"


@pytest.mark.parametrize("field", sorted(Forge().payload()))
def test_fields_left_out(field: str) -> None:
    """Three fields may be absent, as null or altogether; the others may not."""
    payload = forge().payload()
    del payload[field]
    document = sign_document(cbor2.dumps(payload), forge().leaf.key)
    if field in ("public_key", "user_data", "nonce"):
        for found in (check(document, nonce=None), check(forge().document({field: None}), nonce=None)):
            assert getattr(found, field) is None
    else:
        assert refused(document) == "malformed"


def test_unknown_fields() -> None:
    """A field that AWS may add some day changes nothing."""
    check(forge().document({"region": "eu-west-1"}))


def test_a_tagged_document() -> None:
    """CBOR's tag 18 before the document is legal, once."""
    check(b"\xd2" + software_document())
    assert refused(b"\xd2\xd2" + software_document()) == "malformed"


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xa0", b"\x80", b"\xff", b"\xbf", b"\x9b" + b"\xff" * 8, b"\xd8\x23\x61a", b"\x81" * 500 + b"\1"],
    ids=lambda data: data[:8].hex(),
)
def test_payloads_that_are_none(payload: bytes) -> None:
    """A signed payload that is no such map is refused."""
    assert refused(sign_document(payload, forge().leaf.key)) == "malformed"


def test_a_field_twice() -> None:
    """Which of two equal fields counts is not asked: the document is refused."""
    payload = cbor2.dumps(forge().payload())
    assert payload[0] == 0xA9
    twice = b"\xaa" + payload[1:] + cbor2.dumps("nonce") + cbor2.dumps(NONCE)
    assert refused(sign_document(twice, forge().leaf.key)) == "malformed"


def test_signatures() -> None:
    """A changed payload, another key's signature, a zero one and a swapped one: refused."""
    sign1 = read_sign1(software_document(), max_bytes=1 << 16)

    def signed(signature: bytes, payload: bytes = sign1.payload) -> str:
        return refused(write_sign1(protected=sign1.protected, payload=payload, signature=signature))

    r, s = sign1.signature[:48], sign1.signature[48:]
    assert signed(s + r) == "signature"
    assert signed(bytes(96)) == "signature"
    assert signed(b"\xff" * 96) == "signature"
    assert signed(r + s, sign1.payload.replace(NONCE, bytes(32))) == "signature"
    assert refused(sign_document(sign1.payload, forge().leaf.key)) == "signature"
    assert signed(b"\0" + r + s) == "malformed"


def test_epoch_and_slots_of_another_protocol() -> None:
    """A document without a key has no epoch, and user data of another protocol names no slots."""
    found = check(forge().document({"public_key": None, "user_data": None}))
    for ask in (lambda: found.epoch, lambda: found.slots):
        with pytest.raises(AttestationRefused) as caught:
            ask()
        assert caught.value.reason == "malformed"
    for data in (
        b"",
        b"x",
        canonical.encode(["gpu-server/2", []]),
        canonical.encode(["gpu-server/1", ["x"]]),
    ):
        with pytest.raises(AttestationRefused):
            _ = check(forge().document({"user_data": data})).slots
    assert check(forge().document({"user_data": canonical.encode(["gpu-server/1", []])})).slots == ()


# -- strangers ----------------------------------------------------------------------------------------------


@cache
def seeds() -> tuple[bytes, ...]:
    """Documents to begin with: made ones in both encodings, and the real ones where they are at hand."""
    made = [software_document(software_nsm(encoding=encoding)) for encoding in ("definite", "indefinite")]
    return (*made, *(path.read_bytes() for path in sorted(REAL.glob("*.cbor"))))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A document with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "set", "cut", "double", "insert", "truncate"])):
            case "flip":
                data[at : at + 1] = bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) if data else b""
            case "set":
                data[at : at + 1] = draw(st.sampled_from(TELLING))
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "truncate":
                del data[at:]
    return bytes(data)


TELLING = [
    b"\0",
    b"\xff",
    b"\x9f",
    b"\xbf",
    b"\x5f",
    b"\x7f",
    b"\xd8\x23",
    b"\xd8\x1c",
    b"\xc2",
    b"\xfb",
    b"\xf7",
]
TELLING += [
    b"\x5b" + b"\xff" * 8,
    b"\x9b\x7f" + b"\xff" * 7,
    b"\xbb\0\0\0\1\0\0\0\0",
    b"\x30\x80",
    b"\x30\x84",
]
"""Bytes that begin something: endless, huge, tagged, floating, or nested in DER."""


@pytest.mark.parametrize("part", range(5))
@settings(max_examples=2_000, database=None, suppress_health_check=list(HealthCheck))
@given(document=mutated())
def test_mutated_documents(part: int, document: bytes) -> None:
    """Ten thousand changed documents: what was signed is still the same, or the document is refused, and
    nothing else is ever raised."""
    try:
        found = verify(document, nonce=None, pcrs={}, allow_simulated=True, at_document_time=True)
    except AttestationRefused:
        return
    originals = [payload_of(seed) for seed in seeds()]
    assert any(found.timestamp.timestamp() * 1000 == said["timestamp"] for said in originals)
    assert any(found.public_key == said["public_key"] and found.nonce == said["nonce"] for said in originals)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=1100),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=1_000, database=None, suppress_health_check=list(HealthCheck))
@given(field=st.sampled_from(sorted(Forge().payload())), value=VALUES)
def test_signed_nonsense(field: str, value: object) -> None:
    """Whatever is in a field, well signed: it verifies or is refused."""
    with suppress(AttestationRefused):
        check(forge().document({field: value}), nonce=None, pcrs={})


@settings(max_examples=2_000, database=None)
@given(document=st.binary(max_size=200))
def test_noise(document: bytes) -> None:
    """What never was a document is refused."""
    assert refused(document) == "malformed"


def test_a_large_document() -> None:
    """A document larger than any real one is refused before it is read."""
    assert refused(bytes(1 << 20)) == "malformed"


@pytest.mark.parametrize("head", ["5b", "7b", "9b", "bb", "845b", "84419b"])
def test_lengths_that_are_not_there(head: str) -> None:
    """A length of 16 EiB takes no memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ("ffffffffffffffff", "7fffffffffffffff", "00000000ffffffff", "0000000040000000"):
        assert refused(bytes.fromhex(head + size)) == "malformed"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
