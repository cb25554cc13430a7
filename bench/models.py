"""What reading a model ahead is worth, and that two containers share one copy of it.

`python bench/models.py [--folder F] [--megabytes N] [--rounds N]`: makes a set of weight files in F (a folder
on the disk that is to be measured), drops them from the page cache before each round (checked with fincore),
and reads them as a loader does that maps its weights: page by page. Then two containers, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_server.drivers.model_folder import hash_files, scan
from gpu_server.drivers.model_hydrate import hydrate

FILES = 4
TENSOR_BYTES = 4 << 20
IMAGE = "gpu-server/echo:dev"
_READER = """
import mmap, os, sys, time
began, total = time.monotonic(), 0
for name in sorted(os.listdir("/models")):
    with open("/models/" + name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        total += sum(view[at] for at in range(0, len(view), 4096))
print(time.monotonic() - began, flush=True)
sys.stdin.read()
"""


def make(folder: Path, megabytes: int) -> None:
    """Files that no file system can make small."""
    block = random.randbytes(1 << 20)
    for number in range(1, FILES + 1):
        with (folder / f"model-{number:05}-of-{FILES:05}.safetensors").open("wb") as file:
            for at in range(megabytes // FILES):
                file.write(at.to_bytes(8, "big") + block[8:])
            file.flush()
            os.fsync(file.fileno())


def resident(folder: Path) -> int:
    """Bytes of the files in the page cache."""
    told = subprocess.check_output(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, sorted(folder.iterdir()))],
        text=True,
    )
    return sum(map(int, told.split()))


def drop(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident(folder)
    if left > 1 << 20:
        raise SystemExit(f"{left} bytes stayed in the page cache: choose a --folder on a disk")


def mapped(folder: Path, *, in_order: bool) -> None:
    """Touch every page, tensor by tensor: in the order of the file, or in that of a model's layers."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            tensors = list(range(0, len(view), TENSOR_BYTES))
            if not in_order:
                random.Random(1).shuffle(tensors)
            for tensor in tensors:
                for at in range(tensor, min(tensor + TENSOR_BYTES, len(view)), 4096):
                    view[at]


def ahead(folder: Path) -> None:
    asyncio.run(hydrate(folder, scan(folder), budget=1 << 60))


def verified(folder: Path) -> None:
    asyncio.run(hash_files(folder, scan(folder), lambda done, total: None))


def measured(do: Callable[[], None]) -> float:
    began = time.monotonic()
    do()
    return time.monotonic() - began


def reading(folder: Path, rounds: int) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    ways: dict[str, tuple[Callable[[], None], Callable[[], None] | None]] = {
        "mapped, in order, cold": (lambda: mapped(folder, in_order=True), None),
        "mapped, layer by layer, cold": (lambda: mapped(folder, in_order=False), None),
        "read ahead, cold": (lambda: ahead(folder), None),
        "mapped, in order, read ahead": (lambda: mapped(folder, in_order=True), lambda: ahead(folder)),
        "mapped, layer by layer, read ahead": (lambda: mapped(folder, in_order=False), lambda: ahead(folder)),
        "read ahead when it is all there": (lambda: ahead(folder), lambda: ahead(folder)),
        "verified (SHA-256), cold": (lambda: verified(folder), None),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (way, before) in ways.items():
            drop(folder)
            if before is not None:
                before()
                if (there := resident(folder)) < 0.99 * size:
                    raise SystemExit(f"of what was read ahead only {there} bytes are in the page cache")
            times[name].append(measured(way))
    print(f"{size / 1e9:.2f} GB in {FILES} files, median of {rounds} (lowest to highest):")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(
            f"  {name:36} {middle:7.3f} s   {size / middle / 1e9:6.2f} GB/s"
            f"   ({min(taken):.3f} to {max(taken):.3f})"
        )
    for order in ("in order", "layer by layer"):
        cold, warm = (statistics.median(times[f"mapped, {order}, {way}"]) for way in ("cold", "read ahead"))
        print(f"  the loader's own time, {order}: {cold / warm:.1f} times shorter")


def sharing(folder: Path) -> None:
    """Two containers that map the same files: how long each takes, and how much memory each adds."""
    drop(folder)
    print("two containers, one after the other, both running at the end:")
    running, cached = [], _cached()
    try:
        for name in ("first", "second"):
            container = subprocess.Popen(
                [
                    *("docker", "run", "--rm", "-i", "--network=none", "--read-only", "--memory=4g"),
                    *("--mount", f"type=bind,source={folder},target=/models,readonly"),
                    *("--entrypoint", "python", IMAGE, "-c", _READER),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.append(container)
            assert container.stdout is not None
            taken, now = float(container.stdout.readline()), _cached()
            print(f"  {name:6}  {taken:6.3f} s   page cache {(now - cached) / 1e6:+8.0f} MB")
            cached = now
        print(f"  the files in the page cache, once: {resident(folder) / 1e6:.0f} MB")
    finally:
        for container in running:
            assert container.stdin is not None
            container.stdin.close()
            container.wait()


def _cached() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Cached:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-models-", dir=chosen.folder))
    try:
        make(folder, chosen.megabytes)
        reading(folder, chosen.rounds)
        if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, check=False).returncode:
            print(f"no Docker engine, or no image {IMAGE}: the second part is left out")
        else:
            folder.chmod(0o755)
            sharing(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
