"""Test vectors of canonical CBOR: values with their encodings, and bytes that are the encoding of none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_server.sealed.canonical import MAX_DEPTH, Value, encode


def shown(value: Value) -> Any:
    """A value in JSON: arrays as they are, the rest with its type. Integers are text: JSON's are smaller."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, int):
        return {"uint": str(value)}
    return [shown(item) for item in value]


def nested(depth: int) -> Value:
    """Arrays within each other around a one."""
    return 1 if depth == 0 else [nested(depth - 1)]


GOOD: dict[str, Sequence[Value]] = {
    "empty": [],
    "one of each type": ["text", b"bytes", 7, [1]],
    "the greatest integers of every head": [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1],
    "empty strings": ["", b"", []],
    "lengths at the heads' borders": ["x" * 23, "x" * 24, b"x" * 255, b"x" * 256],
    "text that is not ASCII": ["Grüße", "東京", "🙂"],
    "arrays within each other": [nested(MAX_DEPTH - 1)],
}

BAD: dict[str, str] = {
    "nothing": "",
    "a text outside an array": "6161",
    "an integer that fits into a shorter head": "811801",
    "an integer of eight bytes that fits into four": "811b00000000ffffffff",
    "a length that fits into a shorter head": "81580161",
    "an array count that fits into a shorter head": "980101",
    "an array of indefinite length": "9f01ff",
    "text of indefinite length": "817f6161ff",
    "bytes of indefinite length": "815f4161ff",
    "a reserved head": "811c",
    "a break alone": "81ff",
    "a negative integer": "8120",
    "a map": "81a0",
    "true": "81f5",
    "null": "81f6",
    "undefined": "81f7",
    "a half float": "81f93c00",
    "a double": "81fb3ff0000000000000",
    "a simple value": "81f0",
    "a tagged integer": "81c101",
    "a tagged regular expression": "81d82364612e2a2b",
    "a big number": "81c24101",
    "a big float of enormous exponent": "81c5821a7fffffff01",
    "a self-described value": "d9d9f78101",
    "text that is not UTF-8": "8162c328",
    "text with half a surrogate pair": "8163eda080",
    "text that is overlong UTF-8": "8162c080",
    "bytes behind the end": "810100",
    "two values": "81018101",
    "an array that ends early": "8201",
    "text that ends early": "816261",
    "a head that ends early": "8119",
    "an array of 2^64 - 1 items": "9bffffffffffffffff",
    "bytes of 2^64 - 1": "815bffffffffffffffff",
    "text of 4 GB": "817afffffffe",
    "one array too many within each other": "81" * (MAX_DEPTH + 1) + "01",
    "arrays within each other without end": "81" * 200,
}


def canonical() -> dict[str, Any]:
    """The encoding of values, and bytes that are the encoding of none."""
    return {
        "good": [
            {"name": name, "value": shown(value), "hex": encode(value).hex()} for name, value in GOOD.items()
        ],
        "refused": [{"name": name, "hex": data} for name, data in BAD.items()],
    }
