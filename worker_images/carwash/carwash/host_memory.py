"""A device made of the host's memory: the reference for what a GPU does, and what tests do harm to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from carwash.pattern import VECTOR, WORD, vector
from carwash.scrub import Chunk, Count, Memory

_BASE: Final = 1 << 32
"""Addresses begin here, so that one taken for an offset is noticed."""


class HostDevice:
    """`size` bytes, of which `reserved` are not given out. Slow: Python touches every vector.

    What `allocate` gives out is what was there: `content` is never cleared but by who uses it.
    """

    def __init__(self, size: int, *, reserved: int = 0, uuid: str = "GPU-host", processes: int = 0) -> None:
        self.uuid, self.name, self.processes = uuid, "host memory", processes
        self.content = bytearray(size)
        self.taken: dict[int, int] = {}
        """Address -> size of what was given out."""
        self.closed = False
        self._reserved = reserved

    def memory(self) -> Memory:
        """See `Device`."""
        free = len(self.content) - self._reserved - sum(self.taken.values())
        return Memory(total=len(self.content), reserved=self._reserved, free=free)

    def allocate(self, size: int) -> int | None:
        """See `Device`. The first gap that is large enough."""
        at = _BASE + self._reserved
        for address in sorted(self.taken):
            if address - at >= size:
                break
            at = address + self.taken[address]
        if at + size > _BASE + len(self.content):
            return None
        self.taken[at] = size
        return at

    def free(self, address: int) -> None:
        """See `Device`."""
        del self.taken[address]

    def fill(self, chunks: Sequence[Chunk], seed: int) -> None:
        """See `Device`."""
        for chunk in chunks:
            for at in range(chunk.vectors):
                self.write(chunk.address + at * VECTOR, vector(chunk.first + at, seed))

    def zero(self, chunks: Sequence[Chunk]) -> None:
        """See `Device`."""
        for chunk in chunks:
            self.write(chunk.address, bytes(chunk.size))

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        """See `Device`."""
        looked = unlike = 0
        for chunk in chunks:
            for at in range(chunk.vectors):
                found = self.read(chunk.address + at * VECTOR, VECTOR)
                unlike += _unlike(found, vector(chunk.first + at, seed))
                looked += VECTOR // WORD
        return Count(looked=looked, unlike=unlike)

    def unlike_word(self, chunks: Sequence[Chunk], word: int) -> Count:
        """See `Device`."""
        looked = unlike = 0
        for chunk in chunks:
            found = self.read(chunk.address, chunk.size)
            unlike += _unlike(found, word.to_bytes(WORD, "little") * (chunk.size // WORD))
            looked += chunk.size // WORD
        return Count(looked=looked, unlike=unlike)

    def read(self, address: int, size: int) -> bytes:
        """See `Device`."""
        return bytes(self.content[address - _BASE : address - _BASE + size])

    def write(self, address: int, data: bytes) -> None:
        """What every writing ends in."""
        self.content[address - _BASE : address - _BASE + len(data)] = data

    def close(self) -> None:
        """See `Device`."""
        self.closed = True


def _unlike(found: bytes, wanted: bytes) -> int:
    if found == wanted:
        return 0
    ours, theirs = memoryview(found).cast("I"), memoryview(wanted).cast("I")
    return sum(one != other for one, other in zip(ours, theirs, strict=True))
