"""Processes that live on after their worker: found in /proc, ended, and seen gone.

Another program's container may use the same numbers as we do for uids. So a process that its control group
says is in a container is nobody's business here, unless the container is the worker's or our own.
"""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpu_server.drivers.process_tree import Leader, everyone, is_alive, is_ending, open_pidfd, send
from gpu_server.drivers.residue_thread import Halt
from gpu_server.drivers.residue_uids import UidsOf
from gpu_server.ports import EndedLease

_PROC: Final = Path("/proc")
_CONTAINER: Final = re.compile(r"[0-9a-f]{64}")
_KILL_SECONDS: Final = 5.0
_TICK: Final = 0.2


class UidProcesses:
    """Processes that run, in any of the four ways, as one of the lease's uids."""

    name = "processes"

    def __init__(self, uids_of: UidsOf) -> None:
        self._uids_of = uids_of

    def look(self, lease: EndedLease, halt: Halt) -> int:
        return len(self._find(lease, halt))

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        end_all(lambda: self._find(lease, halt), halt)

    def _find(self, lease: EndedLease, halt: Halt) -> list[Leader]:
        uids = self._uids_of(lease)
        worker = {lease.belongings.container_id} if lease.belongings is not None else set()
        meant = containers_of("self") | worker
        found = []
        for process in everyone():
            halt()
            if process.pid == os.getpid() or not uids & uids_of_process(process.pid):
                continue
            containers = containers_of(str(process.pid))
            if containers <= meant and (containers or not _ends_soon(process, halt)):
                found.append(process)
        return found


def end_all(find: Callable[[], Iterable[Leader]], halt: Halt) -> None:
    """SIGKILL for all that `find` finds, until it finds none; gives up after a few seconds."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (found := list(find())) and time.monotonic() < deadline:
        for process in found:
            halt()
            send(process, signal.SIGKILL)
        _wait_for(found[0])


def uids_of_process(pid: int) -> set[int]:
    """The real, effective, saved and file system uid of a process; empty when it has gone."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text(errors="replace").splitlines():
            if line.startswith("Uid:"):
                return {int(uid) for uid in line.split()[1:]}
    return set()


def containers_of(pid: str) -> set[str]:
    """The ids of the containers that a process is in, by the names of its control groups.

    Asked of each thread, since one that has ended (the first, say) can be in none any more.
    """
    found: set[str] = set()
    with suppress(OSError):
        for thread in os.listdir(_PROC / pid / "task"):
            with suppress(OSError):
                found.update(_CONTAINER.findall((_PROC / pid / "task" / thread / "cgroup").read_text()))
    return found


def _ends_soon(process: Leader, halt: Halt) -> bool:
    """Whether a process whose container cannot be told any more, since it is ending, has gone; it is given a
    few seconds."""
    deadline = time.monotonic() + _KILL_SECONDS
    while is_ending(process):
        halt()
        if not is_alive(process):
            return True
        if time.monotonic() >= deadline:
            return False
        _wait_for(process)
    return False


def _wait_for(process: Leader) -> None:
    descriptor = open_pidfd(process)
    if descriptor is None:
        return
    try:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        waiting.poll(_TICK * 1000)
    finally:
        os.close(descriptor)
