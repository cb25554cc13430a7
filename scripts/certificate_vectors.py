"""Test vectors of wash certificates: good ones, a chain of them, and others with the reason to refuse them.

Keys and times are fixed, and the documents are made as in attestation_vectors.py, so the same files come out
each time. The node's private key is published here: it must be used for these vectors and nowhere else.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gpu_server.sealed.canonical import Value, decode, encode
from gpu_server.sealed.wash import NO_CERTIFICATE, Record, Step, encode_record, hash_of, issue
from scripts.attestation_vectors import NOW, PCRS, bundle
from scripts.attestation_vectors import document as signed_document
from scripts.attestation_vectors import payload as document_payload

MADE_MS: Final = int(NOW.timestamp() * 1000) - 1500
"""When the first record was made: a moment before the documents."""


def seed(name: str) -> bytes:
    """32 bytes that stand for something random."""
    return sha256(f"gpu-server certificate vectors: {name}".encode()).digest()


NODE: Final = Ed25519PrivateKey.from_private_bytes(seed("node"))
OTHER_NODE: Final = Ed25519PrivateKey.from_private_bytes(seed("another node"))
GPU: Final = "GPU-5c0f3a4e-6f1e-4a0d-9b5e-0f2d6f1c7a10"
FIGURES: Final[dict[str, dict[str, int | str | bytes]]] = {
    "teardown": {"containers": 1, "volumes": 2},
    "residue": {"files": 3, "bytes": 4096},
    "scrub": {
        "total": 48_305_799_168,
        "written": 47_244_640_256,
        "compared": 47_244_640_256,
        "mismatched": 0,
        "device": "NVIDIA L40S",
        "nonzero_before": 12_345_678,
        "pattern_seed": bytes(range(8)),
    },
    "gates": {"memory_used": 0, "uncorrected_errors": 0},
}


def steps(made: int, **results: str) -> tuple[Step, ...]:
    """The five steps of a wash that ends when its record is made."""
    times = {"teardown": (-1400, -900), "gates": (-300, -100)}
    return tuple(
        Step(
            name=name,
            result=(result := results.get(name, "passed")),
            started_ms=made + times.get(name, (-900, -300))[0],
            ended_ms=made + times.get(name, (-900, -300))[1],
            figures=FIGURES.get(name, {}) if result == "passed" else {},
        )
        for name in ("teardown", "residue", "scrub", "enclave", "gates")
    )


def record(key: Ed25519PrivateKey = NODE, **changes: Any) -> Record:
    """A full wash of a GPU behind a lease, some fields changed; `results` changes those of its steps."""
    results = changes.pop("results", {})
    made = changes.get("made_ms", MADE_MS)
    plain: dict[str, Any] = {
        "node_key": key.public_key().public_bytes_raw(),
        "slot_id": "0",
        "slot_uuid": GPU,
        "fence": 1_772_600_767_000,
        "prev": NO_CERTIFICATE,
        "made_ms": made,
        "tier": "full",
        "lease": seed("lease"),
        "steps": steps(made, **results),
    }
    return Record(**{**plain, **changes})


def document(h: bytes, **changes: Any) -> bytes:
    """A document of an enclave that was started with h and another slot's record, made for h."""
    listed = encode(["gpu-server/1", [h, seed("record of slot 1")]])
    return signed_document(
        cbor2.dumps(
            document_payload(**{"nonce": h, "user_data": listed, "public_key": seed("key"), **changes})
        )
    )


def certified(raw: bytes, with_document: bytes | None, key: Ed25519PrivateKey = NODE) -> bytes:
    """A certificate over any bytes, as a node would sign that checks nothing."""
    paper = with_document or b""
    return encode([raw, paper, key.sign(hash_of(raw) + sha256(paper).digest())])


def washed(made: Record, **changes: Any) -> bytes:
    """A certificate of a record, with a document made for it."""
    raw = encode_record(made)
    return certified(raw, document(hash_of(raw), **changes))


def chain() -> list[bytes]:
    """Four washes of one GPU: the first one, a light one, an operator's, and one behind another lease."""
    found: list[bytes] = []
    for changes in (
        {"lease": b"", "results": {"teardown": "not_applicable"}},
        {"tier": "light", "results": {"scrub": "skipped"}},
        {"lease": b"", "results": {"teardown": "not_applicable"}},
        {"lease": seed("another lease")},
    ):
        made, prev = MADE_MS + 100 * len(found), hash_of(found[-1]) if found else NO_CERTIFICATE
        one = encode_record(record(made_ms=made, prev=prev, fence=len(found), **changes))
        found.append(issue(one, document(hash_of(one)), NODE))
    return found


def without_enclave() -> bytes:
    """A wash of a stand-in for a GPU, on a node without an enclave."""
    none = dict.fromkeys(("teardown", "scrub", "enclave", "gates"), "not_applicable")
    made = record(slot_id="cpu0", slot_uuid="CPU-0123456789ab-0", lease=b"", results=none)
    return issue(encode_record(made), None, NODE)


def refused() -> list[tuple[str, str, bytes]]:
    """What is wrong, the reason, and the certificate."""
    raw = encode_record(record())
    paper = document(hash_of(raw))
    good = certified(raw, paper)
    no_enclave = encode_record(record(results={"enclave": "not_applicable"}))
    content = decode(no_enclave)
    debug = dict.fromkeys(range(16), bytes(48))
    pcrs = {index: PCRS.get(index, bytes(48)) for index in range(16)} | {0: b"\x77" * 48}

    def fields(**changes: Value) -> bytes:
        """A record with some of its nine values changed, signed."""
        names = (
            "version",
            "kind",
            "node_key",
            "slot_id",
            "slot_uuid",
            "fence",
            "prev",
            "made_ms",
            "findings",
        )
        changed = encode([changes.get(name, value) for name, value in zip(names, content, strict=True)])
        return certified(changed, None)

    def findings(index: int, value: Value) -> bytes:
        listed = list(content[8])  # type: ignore[arg-type]
        listed[index] = value
        return fields(findings=listed)

    def step(index: int, *values: Value) -> bytes:
        found = list(content[8][2])  # type: ignore[index, arg-type]
        found[index] = list(values)
        return findings(2, found)

    begun, ended = MADE_MS - 1400, MADE_MS - 900
    return [
        ("nothing", "malformed", b""),
        ("a byte behind it", "malformed", good + b"\0"),
        ("cut", "malformed", good[:-1]),
        ("a length that is longer than needed", "malformed", b"\x98\x03" + good[1:]),
        (
            "a document of null",
            "malformed",
            encode([raw]).replace(b"\x81", b"\x83", 1) + b"\xf6\x58\x40" + bytes(64),
        ),
        ("a signature of 63 bytes", "malformed", encode([raw, paper, bytes(63)])),
        ("another version", "malformed", fields(version="gpu-server/2")),
        ("another kind", "malformed", fields(kind="grant")),
        ("a node's key of 31 bytes", "malformed", fields(node_key=bytes(31))),
        ("a slot's id with a space", "malformed", fields(slot_id="0 ")),
        ("a prev of 20 bytes", "malformed", fields(prev=bytes(20))),
        ("another tier", "malformed", findings(0, "deep")),
        ("a lease's mark of 16 bytes", "malformed", findings(1, bytes(16))),
        ("a step too few", "malformed", findings(2, content[8][2][:4])),  # type: ignore[index]
        ("two steps changed about", "malformed", findings(2, content[8][2][::-1])),  # type: ignore[index]
        ("a result that is none", "malformed", step(0, "teardown", "perhaps", begun, ended, [])),
        ("a step that ends before it begins", "malformed", step(0, "teardown", "passed", ended, begun, [])),
        (
            "a step that ends behind the record",
            "malformed",
            step(0, "teardown", "passed", begun, MADE_MS + 1, []),
        ),
        (
            "figures out of order",
            "malformed",
            step(0, "teardown", "passed", begun, ended, [["b", 1], ["a", 2]]),
        ),
        ("a figure twice", "malformed", step(0, "teardown", "passed", begun, ended, [["a", 1], ["a", 1]])),
        (
            "a figure that is no printable ASCII",
            "malformed",
            step(0, "teardown", "passed", begun, ended, [["a", "line\n"]]),
        ),
        ("of another node", "node_key", certified_by_another()),
        ("signed by another node", "signature", certified(raw, paper, OTHER_NODE)),
        ("a bit of the signature", "signature", good[:-1] + bytes([good[-1] ^ 1])),
        (
            "the document of another wash",
            "signature",
            encode([raw, document(seed("other")), decode(good)[2]]),
        ),
        ("without its document", "signature", encode([raw, b"", decode(good)[2]])),
        ("residue that failed", "steps", washed(record(results={"residue": "failed"}))),
        ("residue that was skipped", "steps", washed(record(tier="light", results={"residue": "skipped"}))),
        ("a full wash without a scrub", "steps", washed(record(results={"scrub": "skipped"}))),
        ("a GPU that needs no scrub", "steps", washed(record(results={"scrub": "not_applicable"}))),
        ("a GPU without gates", "steps", washed(record(results={"gates": "not_applicable"}))),
        ("a lease that was not torn down", "steps", washed(record(results={"teardown": "not_applicable"}))),
        ("a teardown without a lease", "steps", washed(record(lease=b""))),
        (
            "a light wash without a lease",
            "steps",
            washed(
                record(tier="light", lease=b"", results={"teardown": "not_applicable", "scrub": "skipped"})
            ),
        ),
        ("an enclave renewed, and no document", "document", certified(raw, None)),
        (
            "a document, and no enclave renewed",
            "document",
            certified(no_enclave, document(hash_of(no_enclave))),
        ),
        ("a document that is none", "document", certified(raw, b"document")),
        ("a document of debug mode", "document", washed(record(), pcrs=debug)),
        ("a document of another program", "document", washed(record(), pcrs=pcrs)),
        ("a document without a key", "document", washed(record(), public_key=None)),
        ("a document of another protocol", "document", washed(record(), user_data=encode(["other/1", []]))),
        ("a document for another record", "nonce", washed(record(), nonce=seed("other"))),
        ("a document without a nonce", "nonce", washed(record(), nonce=None)),
        (
            "a document of an enclave that was started before",
            "unlisted",
            washed(record(), user_data=encode(["gpu-server/1", [seed("older record")]])),
        ),
        (
            "a document of an enclave that was started with nothing",
            "unlisted",
            washed(record(), user_data=encode(["gpu-server/1", []])),
        ),
    ]


def certified_by_another() -> bytes:
    """A certificate that is good, of another node."""
    raw = encode_record(record(OTHER_NODE))
    return issue(raw, document(hash_of(raw)), OTHER_NODE)


def pool() -> list[bytes]:
    """The chain, and then four that do not belong behind it, though they say so."""
    links = chain()
    strangers: list[tuple[Ed25519PrivateKey, dict[str, Any]]] = [
        (NODE, {"made_ms": MADE_MS}),
        (NODE, {"slot_id": "1"}),
        (NODE, {"slot_uuid": "GPU-other"}),
        (OTHER_NODE, {}),
    ]
    for key, changes in strangers:
        plain = {"prev": hash_of(links[3]), "made_ms": MADE_MS + 400}
        raw = encode_record(record(key, **{**plain, **changes}))
        links.append(issue(raw, document(hash_of(raw)), key))
    return links


REFUSED_CHAINS: Final[list[tuple[str, str, list[int], str | None]]] = [
    ("nothing", "malformed", [], None),
    ("one left out", "order", [0, 2, 3], "newest"),
    ("two changed about", "order", [0, 2, 1, 3], "newest"),
    ("newest first", "order", [3, 2, 1, 0], None),
    ("one twice", "order", [0, 1, 1, 2, 3], "newest"),
    ("the first again at the end", "order", [0, 1, 2, 3, 0], None),
    ("older than the one before it", "order", [0, 1, 2, 3, 4], None),
    ("of another slot", "slot", [0, 1, 2, 3, 5], None),
    ("of another device", "slot", [0, 1, 2, 3, 6], None),
    ("of another node", "node_key", [0, 1, 2, 3, 7], None),
    ("cut, and a head", "head", [0, 1, 2], "newest"),
    ("another head", "head", [0, 1, 2, 3], "another"),
]
"""What is wrong, the reason, the certificates by their places in the pool, and which head is known."""


def fields_of(raw: bytes) -> dict[str, Any]:
    """A certificate with what is computed on the way."""
    one, paper, signature = decode(raw)
    assert isinstance(one, bytes)
    assert isinstance(paper, bytes)
    assert isinstance(signature, bytes)
    return {
        "record": one.hex(),
        "record_hash": hash_of(one).hex(),
        "document_sha256": sha256(paper).hexdigest(),
        "signature": signature.hex(),
        "certificate": raw.hex(),
        "hash": hash_of(raw).hex(),
    }


def certificates() -> dict[str, Any]:
    """What the verifier trusts and expects, and certificates and chains that it accepts and refuses."""
    papers, good = pool(), washed(record())
    everything = {
        "a full wash behind a lease": good,
        "without an enclave, and without a GPU": without_enclave(),
    }
    newest = fields_of(papers[3])["record_hash"]
    heads = {"newest": newest, "another": seed("other").hex(), None: None}
    return {
        "node_private_key": seed("node").hex(),
        "node_key": NODE.public_key().public_bytes_raw().hex(),
        "root_sha256": sha256(bundle()[0]).hexdigest(),
        "pcrs": {str(index): PCRS[index].hex() for index in (0, 1, 2)},
        "good": [{"name": name, **fields_of(raw)} for name, raw in everything.items()],
        "refused": [{"name": name, "reason": why, "certificate": raw.hex()} for name, why, raw in refused()],
        "pool": [fields_of(raw) for raw in papers],
        "chain": {"certificates": [0, 1, 2, 3], "head": newest},
        "refused_chains": [
            {"name": name, "reason": why, "certificates": places, "head": heads[head]}
            for name, why, places, head in REFUSED_CHAINS
        ],
    }
