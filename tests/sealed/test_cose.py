"""COSE_Sign1 and CBOR of strangers: one item, without tags, read once and in bounded memory."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.sealed.cose import (
    MAX_DEPTH,
    Sign1,
    decode_strictly,
    protected_es384,
    read_sign1,
    write_sign1,
)
from gpu_server.sealed.errors import Malformed

PLAIN = {"a": [1, -1, b"x", "y", None, True], "b": {0: b"", 1: 2**64 - 1}}
SIGN1 = Sign1(protected=protected_es384(), payload=b"payload", signature=bytes(range(96)))


def refuses(data: bytes, max_bytes: int = 1024) -> None:
    """Decoding raises `Malformed`."""
    with pytest.raises(Malformed):
        decode_strictly(data, max_bytes=max_bytes)


def test_plain_values() -> None:
    """Maps, arrays, strings and numbers come back as they are, also with indefinite lengths."""
    assert decode_strictly(cbor2.dumps(PLAIN), max_bytes=1024) == PLAIN
    assert decode_strictly(b"\xbf\x61a\x9f\x01\xff\xff", max_bytes=1024) == {"a": [1]}


@pytest.mark.parametrize(
    "tag", [0, 1, 2, 3, 4, 5, 18, 24, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 43000, 99999]
)
def test_tags(tag: int) -> None:
    """No tag is acted upon: dates, big numbers, regular expressions, shared references and the rest."""
    for content in (1, "a", b"a", [1, 2]):
        tagged = cbor2.dumps(cbor2.CBORTag(tag, content))
        refuses(tagged)
        refuses(b"\x81" + tagged)
        refuses(b"\xa1\x01" + tagged)
        refuses(b"\xa1" + tagged + b"\x01")


@pytest.mark.parametrize(
    "data",
    [
        "",
        "ff",
        "f8",
        "18",
        "a201020103",
        "a2616101616102",
        "0101",
        "6180",
        "bf6161ff",
        "5f01ff",
        "1c",
        "a1a0",
        "5bffffffffffffffff",
        "9bffffffffffffffff",
        "bb00000000ffffffff",
    ],
)
def test_what_is_no_item(data: str) -> None:
    """Cut, doubled keys, trailing bytes, no UTF-8, and lengths that are not there."""
    refuses(bytes.fromhex(data))


def test_depth_and_size() -> None:
    """Nesting has a bound, and so has the whole."""
    decode_strictly(b"\x81" * (MAX_DEPTH - 1) + b"\x80", max_bytes=1024)
    for nested in (b"\x81", b"\xa1\x01", b"\x9f", b"\xbf\x01"):
        refuses(nested * 400)
        refuses(nested * 100_000, max_bytes=1 << 20)
    refuses(bytes([0x58, 100]) + bytes(100), max_bytes=101)


@settings(max_examples=5_000, database=None)
@given(data=st.binary(max_size=64))
def test_noise(data: bytes) -> None:
    """Whatever the bytes are, they are a value or `Malformed`."""
    try:
        decode_strictly(data, max_bytes=64)
        read_sign1(data, max_bytes=64)
    except Malformed:
        pass


def test_sign1() -> None:
    """What is written is read again, with and without the tag; the signed bytes are those of RFC 9052."""
    document = write_sign1(protected=SIGN1.protected, payload=SIGN1.payload, signature=SIGN1.signature)
    assert read_sign1(document, max_bytes=1024) == SIGN1
    assert read_sign1(b"\xd2" + document, max_bytes=1024) == SIGN1
    assert SIGN1.protected.hex() == "a1013822"
    assert SIGN1.signed == b"\x84\x6aSignature1\x44\xa1\x01\x38\x22\x40\x47payload"


@pytest.mark.parametrize(
    "change",
    [
        {"protected": cbor2.dumps({1: -7})},
        {"protected": cbor2.dumps({1: -35.0})},
        {"protected": cbor2.dumps({True: -35})},
        {"protected": cbor2.dumps({1: -35, 4: b"kid"})},
        {"protected": b""},
        {"protected": {1: -35}},
        {"unprotected": {1: -35}},
        {"unprotected": []},
        {"payload": None},
        {"payload": "text"},
        {"signature": bytes(95)},
        {"signature": bytes(97)},
        {"signature": None},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_no_sign1(change: dict[str, object]) -> None:
    """Another algorithm, anything unprotected, and parts of another kind."""
    parts = {"protected": SIGN1.protected, "unprotected": {}, "payload": b"p", "signature": SIGN1.signature}
    with pytest.raises(Malformed):
        read_sign1(cbor2.dumps(list({**parts, **change}.values())), max_bytes=1024)
