"""The scrub: take all memory that can be had, look at it, write a pattern, its inverse and zeros, and compare
all of it behind each.

The algorithm alone. What the memory is, `Device` says: a GPU's (`cuda_memory.py`), or the host's in tests
(`host_memory.py`). Nothing is believed that can be looked at twice: every count says how many words it looked
at, a comparison has to fail when it should, and samples are compared here, on the host.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Protocol

from carwash.pattern import INVERSE, VECTOR, WORD, vector

SMALLEST_CHUNK: Final = 2 << 20
"""Bytes; CUDA gives memory out in pieces of this size."""
MAX_CHUNKS: Final = 1024
SAMPLES: Final = 256
"""How many vectors are read back after each writing, besides the first and the last of every chunk."""
MIN_SHARE: Final = 900
"""Of the device's memory, in thousandths, that has to be had."""

_CONTROL: Final = 64 << 10
_OTHER_SEED: Final = 0x5DEECE66D_2B3C4D5F

Figures = dict[str, int | str]


class Absent(Exception):
    """There is no GPU on this machine, for certain."""


class Unavailable(Exception):
    """There is a GPU, or may be one, and it cannot be used now. Nothing was found wrong with its memory."""


class DeviceError(Exception):
    """The device failed in the middle of it. The message says what the driver said."""


class Failed(Exception):
    """The memory is not what it should be, or cannot be shown to be. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of a device, in bytes. `reserved` is what the driver keeps for itself, 0 where it does not say."""

    total: int
    reserved: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of the device's memory. `first` is the place of its first vector among all that were taken."""

    address: int
    size: int
    first: int

    @property
    def vectors(self) -> int:
        return self.size // VECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Words that were looked at, and those of them that were unlike what was wanted."""

    looked: int
    unlike: int


class Device(Protocol):
    """One device's memory. Every method may raise `DeviceError`. None of them returns before it is done."""

    uuid: str
    name: str
    processes: int
    """How many processes used the device when it was opened, this one not counted."""

    def memory(self) -> Memory:
        """What there is now."""

    def allocate(self, size: int) -> int | None:
        """The address of `size` bytes, or None where there are not so many in one piece."""

    def free(self, address: int) -> None:
        """Give a piece back."""

    def fill(self, chunks: Sequence[Chunk], seed: int) -> None:
        """Write the pattern of this seed, which may be one with `INVERSE`."""

    def zero(self, chunks: Sequence[Chunk]) -> None:
        """Write zeros."""

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        """Count the words that are not as the pattern has them."""

    def unlike_word(self, chunks: Sequence[Chunk], word: int) -> Count:
        """Count the words that are not this one."""

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the device's memory."""

    def close(self) -> None:
        """Let go of the device. Closing twice is closing once."""


def scrub(
    device: Device,
    figures: Figures,
    *,
    min_share: int = MIN_SHARE,
    smallest: int = SMALLEST_CHUNK,
    seed: int | None = None,
    chance: random.Random | None = None,
    now: Callable[[], int] = time.perf_counter_ns,
) -> None:
    """Scrub the device; `figures` is filled in on the way, so that it also says how far a failure came.

    Fails when less than `min_share` thousandths of the device's memory can be had. `chance` chooses the
    samples. Raises `Failed` and `DeviceError`; whatever was taken is given back.
    """
    chance = chance or secrets.SystemRandom()
    seed = secrets.randbits(64) if seed is None else seed
    if device.processes:
        raise Failed(f"{device.processes} processes use the device")
    memory = device.memory()
    figures.update(bytes_total=memory.total, bytes_reserved=memory.reserved, bytes_free=memory.free)
    clock = _Clock(figures, now)
    chunks: list[Chunk] = []
    try:
        with clock.times("allocate_us"):
            for chunk in _allocate(device, memory, smallest):
                chunks.append(chunk)
        allocated = sum(chunk.size for chunk in chunks)
        figures.update(bytes_allocated=allocated, chunks=len(chunks))
        if allocated * 1000 < memory.total * min_share or not chunks:
            raise Failed(
                f"only {allocated} of {memory.total} bytes could be had, wanted are {min_share} thousandths"
            )
        _require_apart(chunks)
        with clock.times("look_us"):
            before = device.unlike_word(chunks, 0)
        _require_all(before, allocated)
        figures["nonzero_before"] = before.unlike

        with clock.times("write_us"):
            device.fill(chunks, seed)
        with clock.times("compare_us"):
            pattern = device.unlike_pattern(chunks, seed)
        _require_all(pattern, allocated)
        figures.update(written=allocated, compared=pattern.looked * WORD, mismatched=pattern.unlike)
        _require_none(pattern, "the pattern")
        sampled = _sample(device, chunks, lambda index: vector(index, seed), chance)
        figures["sampled"] = sampled
        _require_eyes(device.unlike_pattern(_heads(chunks), seed ^ _OTHER_SEED))

        # Every bit has now been seen as what the pattern has there; behind this, as the other one too.
        inverse = seed | INVERSE
        with clock.times("inverse_us"):
            device.fill(chunks, inverse)
        with clock.times("inverse_compare_us"):
            other = device.unlike_pattern(chunks, inverse)
        _require_all(other, allocated)
        figures.update(
            inverted=allocated, inverse_compared=other.looked * WORD, inverse_mismatched=other.unlike
        )
        _require_none(other, "the inverse of the pattern")
        sampled += _sample(device, chunks, lambda index: vector(index, inverse), chance)
        figures["sampled"] = sampled
        _require_eyes(device.unlike_pattern(_heads(chunks), seed))

        with clock.times("zero_us"):
            device.zero(chunks)
        with clock.times("zero_compare_us"):
            zeros = device.unlike_word(chunks, 0)
        _require_all(zeros, allocated)
        figures.update(zeroed=allocated, zero_compared=zeros.looked * WORD, zero_mismatched=zeros.unlike)
        _require_none(zeros, "zeros")
        figures["sampled"] = sampled + _sample(device, chunks, lambda _: bytes(VECTOR), chance)
        _require_eyes(device.unlike_word(_heads(chunks), 0xA5A5A5A5))
    finally:
        with clock.times("free_us"):
            for chunk in chunks:
                device.free(chunk.address)


def _allocate(device: Device, memory: Memory, smallest: int) -> Iterator[Chunk]:
    """All that can be had, in chunks that are halved whenever there is none of that size."""
    size, allocated, taken = memory.free, 0, 0
    while taken < MAX_CHUNKS:
        size = min(size, memory.total - allocated) // smallest * smallest
        if size < smallest:
            return
        address = device.allocate(size)
        if address is None:
            size //= 2
            continue
        yield Chunk(address=address, size=size, first=allocated // VECTOR)
        allocated += size
        taken += 1


def _require_apart(chunks: Sequence[Chunk]) -> None:
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.address):
        if chunk.address < end or chunk.address % VECTOR:
            raise Failed("the device gave the same memory out twice")
        end = chunk.address + chunk.size


def _require_all(count: Count, allocated: int) -> None:
    if count.looked * WORD != allocated:
        raise Failed(f"the device looked at {count.looked * WORD} bytes of {allocated}")
    if not 0 <= count.unlike <= count.looked:
        raise Failed("the device counted more words than there are")


def _require_none(count: Count, what: str) -> None:
    if count.unlike:
        raise Failed(f"{count.unlike} words are not as they were written ({what})")


def _require_eyes(count: Count) -> None:
    """A comparison that cannot fail proves nothing: this one must, nearly everywhere."""
    if count.looked == 0 or count.unlike * 2 <= count.looked:
        raise Failed("the device compares without looking")


def _heads(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [replace(chunk, size=min(chunk.size, _CONTROL)) for chunk in chunks]


def _sample(
    device: Device, chunks: Sequence[Chunk], wanted: Callable[[int], bytes], chance: random.Random
) -> int:
    """Read vectors back and compare them here; how many words. The device does not know which."""
    places = [(chunk, at) for chunk in chunks for at in (0, chunk.vectors - 1)]
    drawn = chance.choices(chunks, weights=[chunk.size for chunk in chunks], k=SAMPLES)
    places += [(chunk, chance.randrange(chunk.vectors)) for chunk in drawn]
    for chunk, at in places:
        if device.read(chunk.address + at * VECTOR, VECTOR) != wanted(chunk.first + at):
            raise Failed("a sample that was read back is not as it was written")
    return len(places) * (VECTOR // WORD)


class _Clock:
    def __init__(self, figures: Figures, now: Callable[[], int]) -> None:
        self._figures, self._now = figures, now

    @contextmanager
    def times(self, name: str) -> Iterator[None]:
        """Note how long this takes, in whole microseconds, rounded up."""
        began = self._now()
        try:
            yield
        finally:
            self._figures[name] = -(-(self._now() - began) // 1000)
