"""Reading a model's files ahead of its loader, in large sequential reads, several at once.

A loader that maps its weights faults them in page by page, a few hundred kilobytes at a time; over a network
file system each of those is a round trip. Read like this they come as fast as the file system can, while
image and container are being prepared, and the loader finds them in the page cache. On FSx for Lustre reading
is also what brings back files that were released to S3.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from gpu_server.drivers.crew import Stop, work_off
from gpu_server.drivers.model_folder import FoundFile

THREADS: Final = 4
BLOCK_BYTES: Final = 16 << 20
MEMORY_SHARE: Final = 0.8
"""Of the memory that is available: what is read beyond that pushes out what was read before."""
_PROBE_BYTES: Final = 4096
_WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


def in_loader_order(files: Sequence[FoundFile]) -> list[FoundFile]:
    """What a loader reads first comes first: configuration and tokenizer, then the weights by name, numbers
    as numbers. Of weights in several formats the first format counts, as it does for loaders."""
    visible = [file for file in files if not file.hidden]
    small = sorted((f for f in visible if not f.path.endswith(_WEIGHTS)), key=lambda file: file.size)
    weights = sorted((f for f in visible if f.path.endswith(_WEIGHTS)), key=_by_number)
    # Loaders look in the model's folder itself, and for safetensors before anything else.
    top = [file for file in weights if "/" not in file.path] or weights
    chosen = next((kind for kind in _WEIGHTS for file in top if file.path.endswith(kind)), "")
    first = [file for file in top if file.path.endswith(chosen)]
    chosen_paths = {file.path for file in first}
    return [*small, *first, *(file for file in weights if file.path not in chosen_paths)]


async def hydrate(folder: Path, files: Sequence[FoundFile], *, budget: int) -> int:
    """Read files until `budget` bytes are in the page cache, and of the rest only the beginnings, which is
    enough to bring them back from S3. Gives how many bytes were read. Raises OSError."""
    blocks = await asyncio.to_thread(lambda: list(_blocks(files, budget)))
    jobs = (partial(_read, folder / path, at, size) for path, at, size in blocks)
    return sum(await work_off(jobs, threads=THREADS, name="model-hydrate"))


def memory_budget(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many bytes may be read ahead: a share of what is available on this machine, and to this service,
    where it runs with a limit, since the page cache counts for who reads."""
    available = _meminfo(proc / "meminfo")
    for limit, used in (
        (cgroups / "memory.max", cgroups / "memory.current"),
        (cgroups / "memory/memory.limit_in_bytes", cgroups / "memory/memory.usage_in_bytes"),
    ):
        # What is used holds cache that can be dropped; the limit itself is the better measure of room.
        if (allowed := _number(limit)) is not None and _number(used) is not None:
            available = min(available, allowed)
    return int(available * MEMORY_SHARE)


def _blocks(files: Sequence[FoundFile], budget: int) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of each read, in order."""
    for file in in_loader_order(files):
        for at in range(0, file.size, BLOCK_BYTES):
            size = min(BLOCK_BYTES, file.size - at)
            if size > budget:
                if at == 0:
                    yield file.path, 0, min(size, _PROBE_BYTES)
                break
            budget -= size
            yield file.path, at, size


def _read(path: Path, at: int, size: int, stop: Stop) -> int:
    """Bring a block into the page cache; the bytes that were read, 0 where it is there already."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _is_cached(descriptor, at, size):
            return 0
        os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)
        done, buffer = 0, memoryview(bytearray(min(size, 1 << 20)))
        while done < size:
            stop.check()
            count = os.preadv(descriptor, [buffer[: size - done]], at + done)
            if not count:
                break
            done += count
        return done
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, at: int, size: int) -> bool:
    """Whether beginning, middle and end of a block can be had without waiting (RWF_NOWAIT)."""
    probe = bytearray(1)
    try:
        for offset in (at, at + size // 2, at + size - 1):
            if os.preadv(descriptor, [probe], offset, os.RWF_NOWAIT) != 1:
                return False
    except OSError:  # EAGAIN: not there; EOPNOTSUPP: this file system cannot tell
        return False
    return True


def _by_number(file: FoundFile) -> list[tuple[int, int, str]]:
    """model-2 before model-10."""
    parts = re.split(r"(\d+)", str(PurePosixPath(file.path)))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _meminfo(path: Path) -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is none, or `max`
        return None
