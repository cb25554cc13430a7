"""Canonical CBOR: one encoding for every value, and nothing else is read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.sealed.canonical import MAX_DEPTH, Value, decode, encode
from gpu_server.sealed.errors import Malformed

ROOT = Path(__file__).resolve().parents[2]

values = st.lists(
    st.recursive(
        st.text(max_size=40) | st.binary(max_size=300) | st.integers(0, 2**64 - 1),
        lambda inner: st.lists(inner, max_size=5),
        max_leaves=20,
    ),
    max_size=6,
)

VECTORS = json.loads((ROOT / "docs/sealed-vectors/canonical.json").read_text())
REFUSED = {item["name"]: item["hex"] for item in VECTORS["refused"]}


@given(value=values)
def test_what_is_encoded_is_decoded(value: list[Value]) -> None:
    """Every value comes back as it was, and cbor2 reads the same from its bytes."""
    data = encode(value)
    assert decode(data) == value
    assert cbor2.loads(data) == value


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_refused(data: str) -> None:
    """What is no array of the four types, in its shortest form and in full, is refused."""
    with pytest.raises(Malformed):
        decode(bytes.fromhex(data))


def test_tags_do_nothing() -> None:
    """A tag is refused before anything acts on it: a library would compile a regular expression here."""
    costly = b"(a?){200}" * 20
    with pytest.raises(Malformed, match="a type that the protocol does not have"):
        decode(b"\x81\xd8\x23\x78" + bytes([len(costly)]) + costly)


def test_depth_is_bounded() -> None:
    """Eight arrays within each other are the most, both ways."""
    value: Value = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert isinstance(value, list)
    assert decode(encode(value)) == value
    with pytest.raises(Malformed):
        encode([value])
    with pytest.raises(Malformed):
        decode(b"\x81" + encode(value))


@pytest.mark.parametrize(
    "value",
    [True, None, -1, 1 << 64, 1.0, {}, {"a": 1}, bytearray(b"a"), memoryview(b"a"), {1}, "\ud800", object()],
    ids=repr,
)
def test_other_types_cannot_be_written(value: Any) -> None:
    """What the protocol has no form for is refused when it is written, at any depth."""
    for wrapped in ([value], [["a", [value]]], value):
        with pytest.raises(Malformed):
            encode(wrapped)


@pytest.mark.parametrize("value", ["text", b"bytes", 7], ids=repr)
def test_the_outermost_value_is_an_array(value: Any) -> None:
    """A bare text, byte string or integer is no message."""
    with pytest.raises(Malformed):
        encode(value)
    with pytest.raises(Malformed):
        decode(cbor2.dumps(value))


def test_tuples_are_arrays() -> None:
    """A tuple is written as a list is."""
    assert encode(("a", (1, b"b"))) == encode(["a", [1, b"b"]])


def test_size_is_bounded() -> None:
    """What is longer than the caller allows is refused unread."""
    data = encode([bytes(100)])
    assert decode(data, max_bytes=len(data)) == [bytes(100)]
    with pytest.raises(Malformed):
        decode(data, max_bytes=len(data) - 1)
    with pytest.raises(Malformed):
        decode(encode([bytes(65536)]))


@pytest.mark.parametrize(
    "data", [b"\x9b" + b"\xff" * 8, b"\x81\x5b" + b"\x7f" * 8, b"\x81\x7a\xff\xff\xff\xff" + bytes(60_000)]
)
def test_a_claimed_length_allocates_nothing(data: bytes) -> None:
    """A count or length of gigabytes costs no more memory than the bytes that are there."""
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
