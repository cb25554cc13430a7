"""How fast a GPU's memory is scrubbed, and what a process that has ended leaves in it.

`python bench/scrub.py [--uuid GPU-...] [--rounds N]`, with what worker_images/carwash/requirements.txt names
installed. Speeds are set against a plain copy within the device (`cuMemcpyDtoD`), measured in the same run,
by the bytes that the memory moves: a copy reads and writes each. Then process A fills all memory that it can
have with a token and ends, or is killed, and process B counts what it finds before it writes anything.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "worker_images/carwash"))

from carwash.cuda_memory import CudaDevice, open_gpu
from carwash.pattern import INVERSE, VECTOR
from carwash.scrub import SMALLEST_CHUNK, Absent, Chunk, Count, Unavailable

TOKEN = 0xC0FFEE42
TARGET = 0.85
SEED = 0x0123456789ABCDEF


def take_all(device: CudaDevice) -> list[Chunk]:
    """All memory that can be had, halving as the scrub does."""
    chunks: list[Chunk] = []
    size, place = device.memory().free, 0
    while (size := size // SMALLEST_CHUNK * SMALLEST_CHUNK) >= SMALLEST_CHUNK:
        address = device.allocate(size)
        if address is None:
            size //= 2
            continue
        chunks.append(Chunk(address=address, size=size, first=place // VECTOR))
        place += size
    return chunks


def seconds(do: Callable[[], object], rounds: int) -> float:
    """The median time of doing it, after once for warming up."""
    do()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(uuid: str | None, rounds: int) -> None:
    """Speeds of each pass over all memory."""
    device = open_gpu(uuid)
    try:
        memory = device.memory()
        chunks = take_all(device)
        taken = sum(chunk.size for chunk in chunks)
        print(f"device: {device.name} ({device.uuid})")
        print(f"memory: {memory.total} bytes in all, {taken} taken in {len(chunks)} chunks "
              f"({100 * taken / memory.total:.2f} %)")  # fmt: skip
        half = chunks[0].size // 2
        copy = (
            2 * half / seconds(lambda: device.copy(chunks[0].address + half, chunks[0].address, half), rounds)
        )
        print(f"copy within the device: {copy / 1e9:8.1f} GB/s moved ({half} bytes)")

        def passes() -> Sequence[tuple[str, Callable[[], object]]]:
            return (
                ("count what is not zero", lambda: device.unlike_word(chunks, 0)),
                ("write the pattern", lambda: device.fill(chunks, SEED)),
                ("compare the pattern", lambda: require(device.unlike_pattern(chunks, SEED))),
                ("write its inverse", lambda: device.fill(chunks, SEED | INVERSE)),
                ("compare its inverse", lambda: require(device.unlike_pattern(chunks, SEED | INVERSE))),
                ("write zeros", lambda: device.zero(chunks)),
                ("compare zeros", lambda: require(device.unlike_word(chunks, 0))),
            )

        def require(count: Count) -> None:
            if count.unlike or count.looked * 4 != taken:
                raise SystemExit(f"the memory is not as it was written: {count}")

        for name, do in passes():
            speed = taken / seconds(do, rounds)
            verdict = "" if speed >= TARGET * copy else f"  BELOW {TARGET}"
            print(f"{name:22}: {speed / 1e9:8.1f} GB/s, {speed / copy:5.2f} of the copy{verdict}")
    finally:
        device.close()


def fill(uuid: str | None) -> None:
    """Process A: the token everywhere; then it says so, and waits to be ended."""
    device = open_gpu(uuid)
    chunks = take_all(device)
    for chunk in chunks:
        device.set(chunk, TOKEN)
    found = device.unlike_word(chunks, TOKEN)
    print(json.dumps({"filled": (found.looked - found.unlike) * 4}), flush=True)
    sys.stdin.read()


def look(uuid: str | None) -> None:
    """Process B: what there is before it writes."""
    device = open_gpu(uuid)
    chunks = take_all(device)
    token, zero = device.unlike_word(chunks, TOKEN), device.unlike_word(chunks, 0)
    said = {"words": zero.looked, "nonzero": zero.unlike, "token": token.looked - token.unlike}
    print(json.dumps(said), flush=True)
    device.close()


def left_behind(uuid: str | None, how: str) -> None:
    """A fills and ends; B looks."""
    again = [sys.executable, __file__, *(["--uuid", uuid] if uuid else []), "--role"]
    first = subprocess.Popen([*again, "fill"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    line = first.stdout.readline()
    if how == "is killed":
        os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    filled = json.loads(line)["filled"]
    second = subprocess.run([*again, "look"], stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(second.stdout)
    print(
        f"A fills {filled} bytes with a token and {how}; B, before it writes, finds in {4 * said['words']}"
        f" bytes {said['nonzero']} words that are not zero, {said['token']} of them the token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uuid", help="the GPU; needed where there are several")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--role", choices=["all", "fill", "look"], default="all", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.uuid:
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen.uuid
    try:
        if chosen.role != "all":
            return (fill if chosen.role == "fill" else look)(chosen.uuid)
        measure(chosen.uuid, chosen.rounds)
        for how in ("ends", "is killed"):
            left_behind(chosen.uuid, how)
    except Absent as error:
        print(f"there is no GPU here, so nothing was measured: {error}")
    except Unavailable as error:
        raise SystemExit(f"the GPU cannot be used: {error}") from error


if __name__ == "__main__":
    main()
