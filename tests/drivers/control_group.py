"""A control group as an engine makes it for a container, for processes that no engine knows of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpu_server.drivers.docker_leftover import CGROUPS


@contextmanager
def group_of(container_id: str) -> Iterator[Path]:
    """The group of this container, removed at the end if it is still there; skips where it cannot be made."""
    folder = CGROUPS / "pids" if (CGROUPS / "pids").is_dir() else CGROUPS
    if os.geteuid() != 0 or not os.access(folder, os.W_OK):
        pytest.skip("making a control group needs root")
    group = folder / "docker" / container_id
    group.mkdir(parents=True)
    try:
        yield group
    finally:
        with suppress(FileNotFoundError):
            group.rmdir()
