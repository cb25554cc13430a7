"""Certificates of washes: the good ones verify, every other one is refused, each for its reason."""

from __future__ import annotations

import tracemalloc
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import orjson
import pytest

from gpu_server.sealed import canonical
from gpu_server.sealed.attestation import MAX_DOCUMENT_BYTES
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.software_nsm import SoftwareNsm
from gpu_server.sealed.wash import (
    MAX_CERTIFICATE_BYTES,
    Verified,
    WashRefused,
    encode_record,
    hash_of,
    issue,
    slot_of,
    view,
)
from tests.sealed.documents import PCRS, Forge, software_nsm
from tests.sealed.washes import (
    ALONE,
    GPU,
    MADE,
    NOBODY,
    NODE,
    NODE_KEY,
    OLDER,
    OTHER_NODE,
    STAND_IN,
    document,
    listing,
    record,
    sign,
    steps,
    verified,
    washed,
)

GOOD = washed()
INNER, PAPER, SIGNATURE = canonical.decode(GOOD)
assert isinstance(INNER, bytes)
assert isinstance(PAPER, bytes)
H = hash_of(INNER)


def refused(raw: bytes, **options: Any) -> WashRefused:
    """Why a certificate is refused."""
    with pytest.raises(WashRefused) as caught:
        verified(raw, **options)
    return caught.value


def reason(raw: bytes, **options: Any) -> str:
    return refused(raw, **options).reason


# -- good ones ----------------------------------------------------------------------------------------------


def test_a_certificate() -> None:
    """It says what was put into it, and its hashes are those of its bytes."""
    found = verified(GOOD)
    assert found.record == record()
    assert (found.record_hash, found.hash, found.raw) == (H, sha256(GOOD).digest(), GOOD)
    assert found.attestation is not None
    assert found.attestation.simulated
    assert found.attestation.slots == (OLDER, H)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NOBODY,
        STAND_IN,
        ALONE,
        NOBODY | STAND_IN | ALONE,
        {"tier": "light", "scrub": "skipped"},
        {"tier": "light"},
        {"tier": "light"} | STAND_IN,
        {"fence": 0, "prev": b"p" * 32},
    ],
)
def test_what_counts_as_clean(changes: dict[str, Any]) -> None:
    """Every wash that there is can be signed, and verifies."""
    raw = encode_record(record(**changes))
    made = issue(raw, None if "enclave" in changes else document(hash_of(raw)), NODE)
    assert verified(made).record == record(**changes)


def test_it_holds_for_years() -> None:
    """A document is judged at its own time: certificates are read long after its chain has ended."""
    past = software_nsm(now=lambda: datetime(2021, 1, 2, tzinfo=UTC))
    assert verified(sign(INNER, document(H, past))).attestation is not None


def test_the_view() -> None:
    """The view is JSON, with the whole certificate in it."""
    shown = orjson.loads(orjson.dumps(view(verified(GOOD))))
    assert b64decode(shown["certificate"]) == GOOD
    assert b64decode(shown["document"]) == PAPER
    assert (shown["hash"], shown["record_hash"]) == (hash_of(GOOD).hex(), H.hex())
    assert shown["record"]["slot_uuid"] == GPU
    assert shown["record"]["node_key"] == NODE_KEY.hex()
    assert shown["record"]["lease"] == (b"m" * 32).hex()
    assert shown["record"]["steps"][2] == {
        "name": "scrub",
        "result": "passed",
        "started_ms": MADE - 16,
        "ended_ms": MADE - 6,
        "figures": {"bytes_seen": 1 << 40, "device": "NVIDIA L40S", "digest": "0102"},
    }
    assert shown["attestation"]["assurance"] == "simulated"
    assert shown["attestation"]["pcrs"]["PCR0"] == PCRS[0].hex()
    assert shown["attestation"]["slots"] == [OLDER.hex(), H.hex()]
    bare = view(verified(washed(**NOBODY, **ALONE)))
    assert (bare["document"], bare["attestation"], bare["record"]["lease"]) == (None, None, None)


def test_whose_slot() -> None:
    """The slot that a certificate names is known for messages, also where it is worth nothing."""
    assert slot_of(washed(OTHER_NODE, slot_id="3", residue="failed")) == "3"
    assert slot_of(b"") is None
    assert slot_of(sign(b"", b"")) is None


# -- tampered with ------------------------------------------------------------------------------------------


def changes_of(value: Any, path: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], Any]]:
    """Every value within a value, by its path, with another one of its type and length in its place."""
    if isinstance(value, list):
        return [found for at, item in enumerate(value) for found in changes_of(item, (*path, at))]
    if isinstance(value, int):
        return [(path, value + 1)]
    if isinstance(value, bytes):
        return [(path, value[:-1] + bytes([value[-1] ^ 1]))]
    return [(path, value[:-1] + chr(ord(value[-1]) ^ 1))]


def put(value: Any, path: tuple[int, ...], other: Any) -> Any:
    if not path:
        return other
    return [put(item, path[1:], other) if at == path[0] else item for at, item in enumerate(value)]


CONTENT = canonical.decode(INNER)
FIELDS = changes_of(CONTENT)
NOT_A_FORM = {(0,), (1,), (8, 0), *((8, 2, at, part) for at in range(5) for part in (0, 1))}
"""Texts that have no other value of their length: with another one it is no record at all."""


@pytest.mark.parametrize(("path", "other"), FIELDS, ids=str)
def test_every_field_counts(path: tuple[int, ...], other: Any) -> None:
    """Each value of the record, changed: the signature does not fit any more. Signed again by the node, it is
    another record, for which the document was not made; signed by another node, it is not this node's."""
    inner = canonical.encode(put(CONTENT, path, other))
    tampered = canonical.encode([inner, PAPER, SIGNATURE])
    if path in NOT_A_FORM:
        assert {reason(raw) for raw in (tampered, sign(inner, PAPER))} == {"malformed"}
    elif path == (2,):
        assert reason(tampered) == "node_key"
        assert reason(tampered, node_key=None) == "signature"
    else:
        assert reason(tampered) == "signature"
        assert reason(sign(inner, PAPER)) == "nonce"
        assert reason(sign(inner, document(hash_of(inner)), OTHER_NODE)) == "signature"


def test_the_fields_are_all_there() -> None:
    """The test above reaches nine values, the findings, and all of five steps with three figures each."""
    assert len(FIELDS) == 8 + 2 + 5 * (4 + 3 * 2)


@pytest.mark.parametrize("node_key", [NODE_KEY, None], ids=["known", "unknown"])
def test_every_byte_counts(node_key: bytes | None) -> None:
    """A bit changed in any byte, document and signature too: refused, whether or not the node is known."""
    for at in range(len(GOOD)):
        refused(GOOD[:at] + bytes([GOOD[at] ^ 1 << at % 8]) + GOOD[at + 1 :], node_key=node_key)


def test_cut_and_added() -> None:
    """A certificate that ends early, or does not end, is none."""
    for end in range(0, len(GOOD), 7):
        assert reason(GOOD[:end]) == "malformed"
    for more in (b"\0", GOOD):
        assert reason(GOOD + more) == "malformed"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80",
        b"\x98\x03" + GOOD[1:],  # a head longer than needed
        b"\x9f" + GOOD[1:] + b"\xff",  # an indefinite length
        b"\xc1" + GOOD,  # a tag
        b"\x83\x59\x20\x01" + bytes(8193) + GOOD[-66 - 3 - len(PAPER) :],  # a record of more than 8 KiB
        canonical.encode([INNER, PAPER]),
        canonical.encode([INNER, PAPER, SIGNATURE, b""]),
        canonical.encode([INNER, "", SIGNATURE]),
        canonical.encode([INNER, PAPER, bytes(63)]),
        canonical.encode([CONTENT, PAPER, SIGNATURE]),
        canonical.encode([INNER, bytes(MAX_DOCUMENT_BYTES + 1), SIGNATURE]),
        bytes(MAX_CERTIFICATE_BYTES + 1),
        bytes(1 << 22),
    ],
    ids=lambda raw: raw[:4].hex(),
)
def test_what_is_none(raw: bytes) -> None:
    """Other forms and sizes are refused as such."""
    assert reason(raw) == "malformed"


def test_the_largest() -> None:
    """The largest record, with the largest document, is not too large."""
    assert reason(sign(INNER, bytes(MAX_DOCUMENT_BYTES))) == "document"
    assert reason(sign(bytes(8192), bytes(MAX_DOCUMENT_BYTES))) == "malformed"
    assert len(sign(bytes(8192), bytes(MAX_DOCUMENT_BYTES))) == MAX_CERTIFICATE_BYTES


def test_claims_allocate_nothing() -> None:
    """A length of gigabytes, wherever it stands, costs no more than the certificate does."""
    claims = (b"\x9b" + b"\xff" * 8, b"\x5a\xff\xff\xff\xff", b"\x9a\0\1\0\0", b"\x7b" + b"\x7f" * 8)
    tracemalloc.start()
    try:
        for at in range(0, 900, 3):
            for claim in claims:
                inner = INNER[:at] + claim + INNER[at + len(claim) :]
                for raw in (GOOD[:at] + claim + GOOD[at + len(claim) :], sign(inner, b"")):
                    with suppress(WashRefused):
                        verified(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


ORDER_8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"


@pytest.mark.parametrize(
    "key",
    [bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 31, bytes.fromhex(ORDER_8), b"\xff" * 32, b"\2" * 32],
)
def test_keys_that_are_none(key: bytes) -> None:
    """A node's key that is no point signs nothing; neither does one of low order, under which everybody can
    sign: one signature fits an eighth of all records at least."""
    for fence in range(64):
        inner = encode_record(record(node_key=key, fence=fence, **ALONE))
        for paper in (bytes(64), b"\1" + bytes(63), SIGNATURE):
            assert reason(canonical.encode([inner, b"", paper]), node_key=None) == "signature"


# -- what it says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        *({name: "failed"} for name in ("teardown", "residue", "scrub", "enclave", "gates")),
        *({"tier": "light", name: "skipped"} for name in ("teardown", "residue", "enclave", "gates")),
        {"residue": "not_applicable"},
        {"scrub": "skipped"},
        {"scrub": "not_applicable"},
        {"gates": "not_applicable"},
        {"slot_uuid": "MIG-1", "scrub": "not_applicable", "gates": "not_applicable"},
        {"tier": "light", **NOBODY},
        {"teardown": "not_applicable"},
        {"lease": b""},
    ],
    ids=str,
)
def test_results_that_are_not_clean(changes: dict[str, Any]) -> None:
    """A step that failed, was left out, or cannot have been what it says is refused, however well it is
    signed; and the node does not sign it."""
    raw = encode_record(record(**changes))
    paper = document(hash_of(raw))
    assert reason(sign(raw, paper)) == "steps"
    with pytest.raises(WashRefused) as caught:
        issue(raw, paper, NODE)
    assert caught.value.reason == "steps"


def test_a_document_is_there_or_not() -> None:
    """A document belongs to an enclave that was renewed, on a node that has one."""
    alone = washed(**ALONE)
    raw = encode_record(record(**ALONE))
    assert verified(GOOD, enclave="required").record == record()
    assert verified(alone, enclave="absent").attestation is None
    assert reason(alone, enclave="required") == "document"
    assert reason(GOOD, enclave="absent") == "document"
    assert reason(sign(INNER, b"")) == "document"
    assert reason(sign(raw, document(hash_of(raw)))) == "document"
    for args in ((INNER, None), (INNER, b""), (raw, document(hash_of(raw)))):
        with pytest.raises(WashRefused) as caught:
            issue(*args, NODE)
        assert caught.value.reason == "document"


def of(module: SoftwareNsm | None = None, **changes: Any) -> Callable[[], bytes]:
    return lambda: document(H, module or software_nsm(), **changes)


@pytest.mark.parametrize(
    ("make", "why", "inner"),
    [
        (of(nonce=OLDER), "nonce", None),
        (of(nonce=None), "nonce", None),
        (of(user_data=listing(OLDER)), "unlisted", None),
        (of(user_data=listing()), "unlisted", None),
        (of(user_data=None), "document", "malformed"),
        (of(user_data=canonical.encode(["gpu-server/2", [H]])), "document", "malformed"),
        (of(public_key=None), "document", "malformed"),
        (of(software_nsm(debug=True)), "document", "debug"),
        (of(SoftwareNsm(PCRS | {0: b"\7" * 48})), "document", "pcr"),
        (
            lambda: Forge().document({"nonce": H, "user_data": listing(H)})[:-1] + b"\0",
            "document",
            "signature",
        ),
        (lambda: b"no document", "document", "malformed"),
        (lambda: PAPER + b"\0", "document", "malformed"),
    ],
)
def test_documents(make: Callable[[], bytes], why: str, inner: str | None) -> None:
    """A document of another wash, another program, of debug mode, or of an enclave that was not started with
    this record is refused, though the node has signed it."""
    error = refused(sign(INNER, make()))
    assert (error.reason, error.document) == (why, inner)


def test_simulations_are_accepted_by_name() -> None:
    """Without a word about simulations, or with another root, a simulated document is refused."""
    error = refused(GOOD, allow_simulated=False)
    assert (error.reason, error.document) == ("document", "root")
    forge = Forge()
    raw = sign(INNER, forge.document({"nonce": H, "user_data": listing(H)}))
    root = sha256(forge.root.der).digest()
    assert verified(raw, allow_simulated=False, roots=[root]).attestation is not None
    assert reason(raw, allow_simulated=False) == "document"


def test_the_node_signs_its_own() -> None:
    """A node signs no record of another node, no document that is too large, and nothing but records."""
    with pytest.raises(WashRefused) as caught:
        issue(INNER, PAPER, OTHER_NODE)
    assert caught.value.reason == "node_key"
    for args in ((INNER, bytes(MAX_DOCUMENT_BYTES + 1)), (b"", PAPER), (INNER[:-1], PAPER)):
        with pytest.raises(Malformed):
            issue(*args, NODE)
    assert issue(INNER, PAPER, NODE) == GOOD


def test_errors_quote_nothing() -> None:
    """No refusal shows the bytes at fault."""
    for raw in (washed(slot_id="visible", residue="failed"), sign(b"visible", b"")):
        assert "visible" not in str(refused(raw))


def test_it_shows_itself_briefly() -> None:
    """A verified certificate in a log or a traceback does not print all of its bytes."""
    found: Verified = verified(washed(steps=steps()))
    assert GOOD.hex()[:40] not in repr(found)
    assert str(GOOD)[2:40] not in repr(found)
