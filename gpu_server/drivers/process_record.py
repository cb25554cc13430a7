"""What the process driver knows of a worker, in a file of its run folder: what labels are to a container."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gpu_server.drivers.process_tree import Leader

_FILE: Final = "process.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """One worker. `pid` and `start_time` are None until it is started, `exit_code` until it was heard to end.

    A pid means nothing in another boot, so `boot_id` says which one it is of. `marker` is the worker's own
    entry in its environment.
    """

    instance: str
    name: str
    session_id: str
    fence: int
    marker: str
    boot_id: str
    pid: int | None = None
    start_time: int | None = None
    exit_code: int | None = None

    @property
    def leader(self) -> Leader | None:
        if self.pid is None or self.start_time is None:
            return None
        return Leader(pid=self.pid, start_time=self.start_time)


def write_record(folder: Path, record: ProcessRecord) -> None:
    """Write whole or not at all: a crash leaves the old record."""
    draft = folder / f"{_FILE}.new"
    draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(draft, folder / _FILE)


def read_record(folder: Path) -> ProcessRecord | None:
    """The record in this folder, or None where there is none or it is not one."""
    try:
        return ProcessRecord(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove_record(folder: Path) -> None:
    """Remove a worker's record; it is no error if there is none."""
    for name in (_FILE, f"{_FILE}.new"):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()


def records(run_dir: Path, instance: str) -> Iterator[tuple[Path, ProcessRecord]]:
    """Every record of this instance under `run_dir`, with its folder."""
    try:
        folders = sorted(run_dir.iterdir())
    except FileNotFoundError:
        return
    for folder in folders:
        record = read_record(folder)
        if record is not None and record.instance == instance:
            yield folder, record
