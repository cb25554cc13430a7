"""`C(x)`: the canonical CBOR of arrays of text, bytes, unsigned integers and nested arrays; of nothing else.

RFC 8949, section 4.2.1, for four of its eight major types. The reader is written out here, because a library
that knows every tag acts on them while it reads: a regular expression is compiled, a big float is computed.
What is read is encoded again by cbor2 and compared, so two implementations must agree about every byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import cbor2

from gpu_server.sealed.errors import Malformed

Value: TypeAlias = "str | bytes | int | Sequence[Value]"
"""Text, bytes, an unsigned integer below 2^64, or an array (list or tuple) of these."""

MAX_DEPTH = 8
"""Arrays within arrays, the outermost counted."""

MAX_BYTES = 65536

_UNSIGNED, _BYTES, _TEXT, _ARRAY = 0, 2, 3, 4


def encode(value: Sequence[Value]) -> bytes:
    """The one encoding of an array. Raises `Malformed` for what the protocol has no form for."""
    if type(value) not in (list, tuple):
        raise Malformed("the outermost value is an array")
    _check(value, MAX_DEPTH)
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> list[Value]:
    """The array that `data` is the one encoding of. Raises `Malformed` for anything else.

    Memory is bounded by `max_bytes`, whatever lengths the bytes claim.
    """
    if len(data) > max_bytes:
        raise Malformed(f"more than {max_bytes} bytes")
    value, end = _read(data, 0, MAX_DEPTH)
    if end != len(data):
        raise Malformed("bytes behind the end of the value")
    if not isinstance(value, list):
        raise Malformed("the outermost value is an array")
    if encode(value) != data:
        raise Malformed("not the canonical encoding")
    return value


def _check(value: Value, depth: int) -> None:
    # By exact type: True is an int, and a subclass may encode as it likes.
    kind = type(value)
    if kind is bytes:
        return
    if isinstance(value, str) and kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed("text that is not Unicode") from None
        return
    if isinstance(value, int) and kind is int:
        if not 0 <= value < 1 << 64:
            raise Malformed("an integer outside 0 to 2^64 - 1")
        return
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        if depth == 0:
            raise Malformed(f"more than {MAX_DEPTH} arrays within each other")
        for item in value:
            _check(item, depth - 1)
        return
    raise Malformed("a type that the protocol does not have")


def _read(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    """The value that begins at `at`, and where it ends."""
    kind, argument, at = _head(data, at)
    if kind == _UNSIGNED:
        return argument, at
    if kind == _ARRAY:
        if depth == 0:
            raise Malformed(f"more than {MAX_DEPTH} arrays within each other")
        # Every item takes a byte at least: a count that the rest cannot hold is refused before it is begun.
        if argument > len(data) - at:
            raise Malformed("ends in the middle of an array")
        items: list[Value] = []
        for _ in range(argument):
            item, at = _read(data, at, depth - 1)
            items.append(item)
        return items, at
    if kind not in (_BYTES, _TEXT):
        raise Malformed("a type that the protocol does not have")
    end = at + argument
    if end > len(data):
        raise Malformed("ends in the middle of a string")
    string = bytes(data[at:end])
    if kind == _BYTES:
        return string, end
    try:
        return string.decode(), end
    except UnicodeDecodeError:
        raise Malformed("text that is not UTF-8") from None


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """Major type and argument of the item at `at`, and where its head ends (RFC 8949, section 3)."""
    if at >= len(data):
        raise Malformed("ends in the middle of a value")
    kind, info = data[at] >> 5, data[at] & 31
    at += 1
    if info < 24:
        return kind, info, at
    if info > 27:
        raise Malformed("an indefinite or reserved length")
    size = 1 << (info - 24)
    if at + size > len(data):
        raise Malformed("ends in the middle of a value")
    return kind, int.from_bytes(data[at : at + size], "big"), at + size
