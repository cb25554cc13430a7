"""Reading ahead: what comes first, how much, and that it is there then."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpu_server.drivers import model_hydrate
from gpu_server.drivers.model_folder import FoundFile, scan
from gpu_server.drivers.model_hydrate import hydrate, in_loader_order, memory_budget
from tests.drivers.models_world import lay


def found(path: str, size: int = 1) -> FoundFile:
    return FoundFile(path=path, size=size, mtime_ns=0, ctime_ns=0, inode=0)


def test_loader_order() -> None:
    """Small files, then the weights in the order of their numbers; what loaders do not look
    for first, in other folders and formats, comes last, and hidden files not at all."""
    files = [
        found("pytorch_model.bin", 9),
        found("original/consolidated.safetensors", 9),
        found("model-10.safetensors"),
        found("model-2.safetensors"),
        found("tokenizer.json", 5),
        found("config.json", 2),
        found(".cache/blob.safetensors"),
    ]
    assert [file.path for file in in_loader_order(files)] == [
        "config.json",
        "tokenizer.json",
        "model-2.safetensors",
        "model-10.safetensors",
        "original/consolidated.safetensors",
        "pytorch_model.bin",
    ]
    assert [f.path for f in in_loader_order([found("unet/a.bin"), found("unet/b.safetensors")])] == [
        "unet/b.safetensors",
        "unet/a.bin",
    ]


def test_order_of_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand files are put in order without comparing each with each."""

    def compared(one: FoundFile, other: object) -> bool:
        raise AssertionError("two files were compared")

    monkeypatch.setattr(FoundFile, "__eq__", compared)
    files = [found("model.safetensors"), *(found(f"a/model-{number}.bin") for number in range(10_000))]
    assert [f.path for f in in_loader_order(files)[:2]] == ["model.safetensors", "a/model-0.bin"]


async def test_order_is_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sessions go on while a large model's reads are planned."""
    threads: list[threading.Thread] = []

    def noting(files: Sequence[FoundFile]) -> list[FoundFile]:
        threads.append(threading.current_thread())
        return in_loader_order(files)

    monkeypatch.setattr(model_hydrate, "in_loader_order", noting)
    folder = lay(tmp_path / "m", {"config.json": b"{}"})
    await hydrate(folder, scan(folder), budget=1 << 20)
    assert threads
    assert threading.current_thread() not in threads


def cached(path: Path) -> int:
    """Bytes of a file in the page cache."""
    asked = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        pytest.skip("no fincore here")
    return int(asked.stdout)


def drop(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(model_hydrate, "BLOCK_BYTES", 1 << 20)
    files = {f"model-{number}.safetensors": os.urandom(5 << 20) for number in (1, 2)}
    folder = lay(tmp_path / "m", {**files, "config.json": b"{}"})
    drop(folder)
    if cached(folder / "model-1.safetensors"):
        pytest.skip("this file system keeps everything in memory")
    return folder


async def test_what_was_read_ahead_is_there(folder: Path) -> None:
    """All of it is in the page cache then (the kernel may have taken back some), and reading ahead once more
    reads next to nothing."""
    assert await hydrate(folder, scan(folder), budget=1 << 30) == (10 << 20) + 2
    assert all(cached(folder / f"model-{number}.safetensors") > 4 << 20 for number in (1, 2))
    assert await hydrate(folder, scan(folder), budget=1 << 30) <= 2 << 20


async def test_not_more_than_there_is_room_for(folder: Path) -> None:
    """What a loader reads first is read; of the rest the beginnings, which brings files back from S3."""
    read = await hydrate(folder, scan(folder), budget=(2 << 20) + 2)
    assert read == (2 << 20) + 2 + 4096


async def test_a_file_that_goes_away(folder: Path) -> None:
    """The one who asked for it decides what becomes of that."""
    files = scan(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        await hydrate(folder, files, budget=1 << 30)


def test_the_budget(tmp_path: Path) -> None:
    """A share of the memory that is available here, or of what this service may use, if that is less."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    lay(proc, {"meminfo": b"MemTotal:       4096 kB\nMemAvailable:   1000 kB\n"})
    lay(cgroups, {"memory.max": b"max\n", "memory.current": b"100\n"})
    assert memory_budget(proc, cgroups) == 1000 * 1024 * 8 // 10
    lay(cgroups, {"memory.max": b"1000\n"})
    assert memory_budget(proc, cgroups) == 800
    lay(cgroups, {"memory.max": b"max\n"})
    lay(cgroups, {"memory/memory.limit_in_bytes": b"500\n", "memory/memory.usage_in_bytes": b"1\n"})
    assert memory_budget(proc, cgroups) == 400
    assert memory_budget(tmp_path / "none", cgroups) == 0
