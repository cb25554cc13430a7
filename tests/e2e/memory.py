"""Looking for a mark in the memory of a running process, and in files: what a secret would leave there."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

PIECE = 16 << 20


def forms(secret: bytes) -> dict[str, bytes]:
    """How a secret may lie there: as it is, and as base64 at each of the three offsets, without the
    characters that depend on what stands beside it."""
    found = {"raw": secret, "hex": secret.hex().encode()}
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + secret)
        found[f"base64+{offset}"] = encoded[(offset * 4 + 2) // 3 + (1 if offset else 0) : len(encoded) - 4]
    return found


def found_in_memory(pid: int, wanted: Iterable[bytes]) -> list[str]:
    """Where any of `wanted` lies in a process's memory: region and offset. Needs the right to trace it."""
    needles = list(wanted)
    hits = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end, name in _regions(pid):
            hits += [f"{name or 'anonymous'} at {at:#x}" for at in _search(memory, start, end, needles)]
    return hits


def found_in_files(folder: Path, wanted: Iterable[bytes]) -> list[str]:
    """The files below `folder` that hold any of `wanted`."""
    needles = list(wanted)
    hits = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                content = path.read_bytes()
                if any(needle in content for needle in needles):
                    hits.append(str(path))
    return hits


def readable_bytes(pid: int) -> int:
    """How much of a process can be searched."""
    return sum(end - start for start, end, _ in _regions(pid))


def _regions(pid: int) -> Iterator[tuple[int, int, str]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        places, rights, *_, name = (*line.split(maxsplit=5)[:5], line[73:].strip())
        if rights.startswith("r") and name not in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            start, _, end = places.partition("-")
            yield int(start, 16), int(end, 16), name


def _search(memory: Iterable[bytes], start: int, end: int, needles: list[bytes]) -> Iterator[int]:
    overlap = max(map(len, needles)) - 1
    at, before = start, b""
    while at < end:
        try:
            memory.seek(at)  # type: ignore[attr-defined]
            piece = memory.read(min(PIECE, end - at))  # type: ignore[attr-defined]
        except OSError:
            return  # a page that cannot be read: a device, or gone meanwhile
        if not piece:
            return
        window = before + piece
        if any(needle in window for needle in needles):
            yield at - len(before) + min(i for needle in needles if (i := window.find(needle)) >= 0)
        at, before = at + len(piece), window[-overlap:]
