"""What is written to every vector of memory: a function of its place and a seed, as in `kernels.cu`."""

from __future__ import annotations

import struct
from typing import Final

WORD: Final = 4
VECTOR: Final = 16
"""Bytes: the memory is written and read in vectors of four words."""
INVERSE: Final = 1 << 64
"""Added to a seed of 64 bits: the same pattern with every bit inverted."""

_MASK: Final = 0xFFFFFFFF
_VECTOR: Final = struct.Struct("<4I")


def words(index: int, seed: int) -> tuple[int, int, int, int]:
    """The four words of vector `index` of all memory, for a seed of 64 bits, or one with `INVERSE`.

    No two vectors have the same first two words.
    """
    key0, key1, flip = keys(seed)
    left, right = index & _MASK, index >> 32 & _MASK
    right ^= _mix(left ^ key0)
    left ^= _mix(right ^ key1)
    third = (left ^ _halves_swapped(right)) * 0x9E3779B1 + key1 & _MASK
    fourth = (right ^ _halves_swapped(left)) * 0x85EBCA77 + key0 & _MASK
    return left ^ flip, right ^ flip, third ^ flip, fourth ^ flip


def keys(seed: int) -> tuple[int, int, int]:
    """A seed as the kernels take it: two keys, and what every word is flipped by."""
    return seed & _MASK, seed >> 32 & _MASK, _MASK if seed & INVERSE else 0


def vector(index: int, seed: int) -> bytes:
    """The bytes of vector `index`."""
    return _VECTOR.pack(*words(index, seed))


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK
    return x ^ x >> 16


def _halves_swapped(x: int) -> int:
    return (x << 16 | x >> 16) & _MASK
