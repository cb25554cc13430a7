"""Processes that outlive what their engine knows of them.

An engine that is killed between starting a container and writing that down comes back and says that it never
ran; it would also remove it, and leave its processes (20.10). They are found by their control group, which
has the container's id in its name with either cgroup driver (Docker documentation, "Runtime metrics").
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_PLACES = ("docker/{0}", "*/docker/{0}", "system.slice/docker-{0}.scope", "*/system.slice/docker-{0}.scope")


def processes_of(container_id: str, cgroups: Path = CGROUPS) -> set[int]:
    """The processes in a container's control groups, and in those below. Empty also where this machine's
    control groups cannot be seen, as from a container with a cgroup namespace of its own."""
    found: set[int] = set()
    for place in _PLACES:
        for group in cgroups.glob(place.format(container_id)):
            # Groups go away meanwhile, for which a glob would raise.
            for folder, _, _ in os.walk(group):
                with suppress(OSError):
                    members = Path(folder, "cgroup.procs").read_text()
                    found.update(int(line) for line in members.split())
    return found


def kill(pids: set[int]) -> None:
    """SIGKILL for each. One of another pid namespace has no number here (0), and is left."""
    for pid in pids - {0}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
