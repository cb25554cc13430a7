"""The scrub over the host's memory, sound and harmed, and what its program says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from carwash.__main__ import answer, main
from carwash.host_memory import HostDevice
from carwash.pattern import INVERSE, VECTOR, words
from carwash.scrub import (
    Absent,
    Chunk,
    Count,
    DeviceError,
    Failed,
    Figures,
    Memory,
    Unavailable,
    scrub,
)

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.scrub_answer import read_answer

ROOT = Path(__file__).parents[2]
KIB = 1024
SIZE = 64 * KIB
PIECE = 4 * KIB
SEED = 0x0123_4567_89AB_CDEF


def run(device: HostDevice, **more: Any) -> Figures:
    """A scrub of a small device, the same each time."""
    figures: Figures = {}
    try:
        scrub(device, figures, smallest=PIECE, **{"seed": SEED, "chance": random.Random(1), **more})
    finally:
        assert device.taken == {}, "what was taken was not given back"
    return figures


# -- what is sound ----------------------------------------------------------------------------------------


def test_all_that_can_be_had_is_written_and_compared_three_times() -> None:
    """Every byte outside the driver's own ends as zero, and the figures add up."""
    device = HostDevice(SIZE, reserved=PIECE)
    device.content[:] = b"\x5a" * SIZE
    figures = run(device)
    there = SIZE - PIECE
    assert figures["bytes_total"] == SIZE
    assert figures["bytes_reserved"] == PIECE
    for kind in ("written", "compared", "inverted", "inverse_compared", "zeroed", "zero_compared"):
        assert figures[kind] == figures["bytes_allocated"] == there, kind
    for kind in ("mismatched", "inverse_mismatched", "zero_mismatched"):
        assert figures[kind] == 0, kind
    assert figures["nonzero_before"] == there // 4
    assert int(figures["sampled"]) >= 3 * 256 * 4
    assert device.content == b"\x5a" * PIECE + bytes(there)


def test_what_was_there_is_counted_before_anything_is_written() -> None:
    """Words that are not zero, and nothing of what they say."""
    device = HostDevice(SIZE)
    device.content[100:108] = b"\x01" * 8  # three words, of which it fills one
    figures = run(device)
    assert figures["nonzero_before"] == 2
    assert run(device)["nonzero_before"] == 0
    assert all(isinstance(value, int) for value in figures.values())


class Holey(HostDevice):
    """Somebody holds a piece in the middle, so that there is no large one."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.refused: list[int] = []

    def allocate(self, size: int) -> int | None:
        address = super().allocate(size)
        if address is None:
            self.refused.append(size)
        return address


def test_chunks_are_halved_until_all_is_taken() -> None:
    """A piece that cannot be had whole is had in parts; each position has its own pattern."""
    device = Holey()
    middle = (1 << 32) + 7 * PIECE
    device.taken[middle] = PIECE
    figures: Figures = {}
    seen: list[Chunk] = []
    written = device.fill

    def fill(chunks: Sequence[Chunk], seed: int) -> None:
        if not seen:
            seen.extend(chunks)
        written(chunks, seed)

    device.fill = fill  # type: ignore[method-assign]
    scrub(device, figures, smallest=PIECE, seed=SEED)
    assert device.taken == {middle: PIECE}
    assert figures["bytes_allocated"] == SIZE - PIECE
    assert int(figures["chunks"]) == len(seen) > 1
    assert device.refused
    assert [chunk.first * VECTOR for chunk in seen] == [
        sum(chunk.size for chunk in seen[:number]) for number in range(len(seen))
    ]


def test_no_two_places_have_the_same_pattern() -> None:
    """Nor have two seeds, and a place beyond 64 GiB is not one before it."""
    places = [*range(4096), 1 << 32, (1 << 32) + 1, 1 << 33]
    assert len({words(place, SEED)[:2] for place in places}) == len(places)
    assert words(5, SEED) != words(5, SEED ^ 1)
    assert words(5, SEED) != words(5, SEED ^ 1 << 63)
    for one, other in zip(words(5, SEED), words(5, SEED | INVERSE), strict=True):
        assert one ^ other == 0xFFFF_FFFF
    bits = [sum(word >> bit & 1 for place in range(1024) for word in words(place, SEED)) for bit in range(32)]
    assert all(1750 < count < 2350 for count in bits), "no bit is the same nearly everywhere"


# -- what is not ------------------------------------------------------------------------------------------


class StuckAtOne(HostDevice):
    """One bit is one, whatever is written."""

    def write(self, address: int, data: bytes) -> None:
        super().write(address, data)
        self.content[5000] |= 0x10


class StuckAtZero(HostDevice):
    """One word is zero, whatever is written."""

    def write(self, address: int, data: bytes) -> None:
        super().write(address, data)
        self.content[5000:5004] = bytes(4)


class Stuck(HostDevice):
    """One bit of one word is always the same."""

    bit, value = 0, 0

    def write(self, address: int, data: bytes) -> None:
        super().write(address, data)
        at, mask = 5000 + self.bit // 8, 1 << self.bit % 8
        self.content[at] = self.content[at] | mask if self.value else self.content[at] & ~mask


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("seed", [SEED, ~SEED & 0xFFFF_FFFF_FFFF_FFFF])
def test_every_bit_that_is_stuck_is_found(value: int, seed: int) -> None:
    """At zero and at one, whatever the pattern has there: each was seen as both."""
    for bit in range(32):
        device = Stuck(2 * PIECE)
        device.bit, device.value = bit, value
        with pytest.raises(Failed, match=r"^1 words are not as they were written"):
            run(device, seed=seed)


class FlipsBeforeComparing(HostDevice):
    """One bit changes after all was written."""

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        self.content[12345] ^= 1
        return super().unlike_pattern(chunks, seed)


class FlipsAfterZeroing(HostDevice):
    """One bit changes after the zeros were written."""

    def zero(self, chunks: Sequence[Chunk]) -> None:
        super().zero(chunks)
        self.content[12345] ^= 1


class Aliases(HostDevice):
    """The upper half of the addresses is the lower half: what was written last is at both."""

    def write(self, address: int, data: bytes) -> None:
        low = (1 << 32) | address & (SIZE // 2 - 1)
        first = min(len(data), SIZE // 2 - (low & (SIZE // 2 - 1)))
        for base in (0, SIZE // 2):
            super().write(low + base, data[:first])
        if data[first:]:
            self.write(address + first, data[first:])


class DropsWrites(HostDevice):
    """Nothing is ever written."""

    def write(self, address: int, data: bytes) -> None:
        pass


class DropsTheInverse(HostDevice):
    """The pattern is written, what is to follow it is not."""

    def fill(self, chunks: Sequence[Chunk], seed: int) -> None:
        if seed == SEED:
            super().fill(chunks, seed)


class DropsZeros(HostDevice):
    """The pattern is written, zeros are not."""

    def zero(self, chunks: Sequence[Chunk]) -> None:
        pass


class Remembers(HostDevice):
    """Answers with what was written to wherever was written last."""

    def read(self, address: int, size: int) -> bytes:
        return (self.last * (size // len(self.last) + 1))[:size]

    def write(self, address: int, data: bytes) -> None:
        self.last = data
        super().write(address, data)

    last = bytes(VECTOR)


@pytest.mark.parametrize(
    "harmed", [StuckAtOne, StuckAtZero, FlipsBeforeComparing, FlipsAfterZeroing, Aliases, DropsWrites,
               DropsTheInverse, DropsZeros, Remembers],
)  # fmt: skip
def test_memory_that_does_not_keep_what_is_written_is_found(harmed: type[HostDevice]) -> None:
    """Bits that are stuck or flip, aliases, writes that are dropped: each is words that are unlike."""
    with pytest.raises(Failed, match=r"^\d+ words are not as they were written"):
        run(harmed(SIZE))


class Blind(HostDevice):
    """Says that nothing is unlike, and drops the writes."""

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        return Count(looked=sum(chunk.size // 4 for chunk in chunks), unlike=0)

    def unlike_word(self, chunks: Sequence[Chunk], word: int) -> Count:
        return self.unlike_pattern(chunks, 0)


class BlindForPatterns(HostDevice):
    """Keeps what is written, and never compares it with the pattern."""

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        return Count(looked=sum(chunk.size // 4 for chunk in chunks), unlike=0)


class BlindForZeros(HostDevice):
    """Compares the pattern, and says that all is zero without looking."""

    def unlike_word(self, chunks: Sequence[Chunk], word: int) -> Count:
        return Count(looked=sum(chunk.size // 4 for chunk in chunks), unlike=0)


class Lazy(HostDevice):
    """Looks at the first chunk alone."""

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        return super().unlike_pattern([Chunk(address=1 << 32, size=PIECE, first=0)], seed)


class GivesTheSameTwice(HostDevice):
    """Two chunks that overlap."""

    def allocate(self, size: int) -> int | None:
        if size > SIZE // 2:
            return None
        address = super().allocate(size)
        return None if address is None else address - PIECE * (len(self.taken) - 1)

    def free(self, address: int) -> None:
        self.taken.popitem()


class CountsTooMuch(HostDevice):
    """More words are unlike than there are."""

    def unlike_word(self, chunks: Sequence[Chunk], word: int) -> Count:
        return Count(looked=SIZE // 4, unlike=SIZE)


@pytest.mark.parametrize(
    ("liar", "why"),
    [
        (Blind, "compares without looking"),
        (BlindForPatterns, "compares without looking"),
        (BlindForZeros, "compares without looking"),
        (Lazy, f"looked at {PIECE} bytes of {SIZE}"),
        (GivesTheSameTwice, "the same memory out twice"),
        (CountsTooMuch, "more words than there are"),
    ],
)
def test_a_device_that_lies_is_found(liar: type[HostDevice], why: str) -> None:
    """A comparison that did not look, or looked at less, passes nothing."""
    with pytest.raises(Failed, match=why):
        run(liar(SIZE))


class BlindAndDrops(Blind):
    """Writes nothing, and knows which seed it is asked for, so that the control does not find it."""

    def write(self, address: int, data: bytes) -> None:
        pass

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        looked = sum(chunk.size // 4 for chunk in chunks)
        return Count(looked=looked, unlike=0 if seed == SEED else looked)


class KnowsNoInverse(HostDevice):
    """Writes and compares the pattern where its inverse is asked for."""

    def fill(self, chunks: Sequence[Chunk], seed: int) -> None:
        super().fill(chunks, seed & ~INVERSE)

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        return super().unlike_pattern(chunks, seed & ~INVERSE)


def test_samples_are_compared_on_the_host() -> None:
    """What no count shows, words that are read back do."""
    with pytest.raises(Failed, match="sample"):
        run(BlindAndDrops(SIZE))
    with pytest.raises(Failed, match="sample"):
        run(KnowsNoInverse(SIZE))


class Small(HostDevice):
    """Somebody else holds most of it, and nobody says so."""

    def allocate(self, size: int) -> int | None:
        return super().allocate(size) if sum(self.taken.values()) + size <= SIZE // 2 else None


def test_a_part_of_the_memory_is_not_enough() -> None:
    """Less than the share that is asked for fails, before anything is written."""
    device = Small(SIZE)
    device.content[:] = b"x" * SIZE
    with pytest.raises(Failed, match=rf"only {SIZE // 2} of {SIZE} bytes"):
        run(device)
    assert device.content == b"x" * SIZE
    assert run(Small(SIZE), min_share=500)["bytes_allocated"] == SIZE // 2
    with pytest.raises(Failed, match="only 0 of"):
        run(Small(0), min_share=0)


class SaysItIsFree(HostDevice):
    """More is free than there is."""

    def memory(self) -> Memory:
        return Memory(total=SIZE, reserved=0, free=100 * SIZE)

    def allocate(self, size: int) -> int | None:
        at = (1 << 32) + sum(self.taken.values())
        self.taken[at] = size
        return at


def test_no_more_is_taken_than_there_is() -> None:
    """A device that never runs out does not keep the scrub going."""
    assert run(SaysItIsFree(SIZE))["bytes_allocated"] == SIZE


def test_a_device_in_use_is_left_alone() -> None:
    """Nothing is taken while a process is on it."""
    device = HostDevice(SIZE, processes=2)
    device.content[:] = b"x" * SIZE
    with pytest.raises(Failed, match="2 processes"):
        run(device)
    assert device.content == b"x" * SIZE


class Breaks(HostDevice):
    """Fails at the zeros."""

    def zero(self, chunks: Sequence[Chunk]) -> None:
        raise DeviceError("cuMemsetD32: CUDA_ERROR_ECC_UNCORRECTABLE")


def test_a_device_that_breaks_gives_all_back() -> None:
    """The error is told, and what was taken is given back all the same."""
    with pytest.raises(DeviceError, match="UNCORRECTABLE"):
        run(Breaks(SIZE))


# -- what it says -----------------------------------------------------------------------------------------


def opens(device: HostDevice) -> Callable[[str | None], HostDevice]:
    return lambda uuid: device


def refuses(error: Exception) -> Callable[[str | None], HostDevice]:
    def fails(uuid: str | None) -> HostDevice:
        raise error

    return fails


def test_a_pass_has_all_figures() -> None:
    """Exactly those that the service's driver takes, also of the device, which is let go of."""
    device = HostDevice(SIZE)
    said = answer(opens(device), None, smallest=PIECE)
    assert (said["result"], said["reason"], device.closed) == ("passed", "", True)
    spec = SlotSpec(id="0", uuid="GPU-host", name="", memory_mb=0, is_gpu=True)
    assert read_answer(json.dumps(said).encode(), spec) == said["figures"]


def test_a_failure_has_the_figures_so_far() -> None:
    """So that an operator sees how far it came."""
    device = DropsZeros(SIZE)
    said = answer(opens(device), None, smallest=PIECE)
    assert (said["result"], device.closed) == ("failed", True)
    assert "words are not" in str(said["reason"])
    figures = said["figures"]
    assert isinstance(figures, dict)
    assert (figures["uuid"], figures["device"], figures["mismatched"]) == ("GPU-host", "host memory", 0)


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (Absent("none"), "not_applicable"),
        (Unavailable("later"), "unavailable"),
        (Failed("wrong"), "failed"),
        (DeviceError("broken"), "failed"),
        (KeyError("a bug of ours\n\u00e9"), "unavailable"),
    ],
)
def test_each_end_has_its_result(error: Exception, result: str) -> None:
    """And a reason of printable ASCII; whatever else goes wrong is no pass."""
    said = answer(refuses(error), None)
    assert said["result"] == result
    assert said["reason"]
    assert str(said["reason"]).isascii()
    assert str(said["reason"]).isprintable()


def test_one_object_is_all_that_it_writes(capfd: pytest.CaptureFixture[str]) -> None:
    """What a library prints meanwhile goes to the standard error."""

    def noisy(uuid: str | None) -> HostDevice:
        os.write(1, b"some library says hello\n")
        raise Absent(f"nothing for {uuid}")

    before = os.dup(1)
    try:
        assert main(["--uuid", "GPU-1"], open_device=noisy) == 0
    finally:
        os.dup2(before, 1)
        os.close(before)
    out, err = capfd.readouterr()
    assert json.loads(out) == {"result": "not_applicable", "reason": "nothing for GPU-1", "figures": {}}
    assert err == "some library says hello\n"


def test_the_program_on_a_machine_without_a_gpu() -> None:
    """It says that it is not applicable; on one that has a GPU it needs NVIDIA's packages, and says that."""
    ran = subprocess.run(
        [sys.executable, "-m", "carwash", "--seconds", "60"],
        cwd=ROOT / "worker_images/carwash",
        capture_output=True,
        timeout=60,
        check=True,
    )
    said = json.loads(ran.stdout)
    has_gpu = Path("/dev/nvidiactl").exists()
    assert said["result"] in ({"passed", "failed", "unavailable"} if has_gpu else {"not_applicable"})


def test_it_ends_with_its_time() -> None:
    """Also when nobody is left to end it."""
    code = (
        "import signal; from carwash.__main__ import main\n"
        "main(['--seconds', '1'], open_device=lambda uuid: signal.pause())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "worker_images/carwash", capture_output=True, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (-14, b"")
