"""The processes of one worker, as /proc tells them, and signals that cannot hit anybody else.

A worker is started as the leader of a session (setsid) and known by its pid and its start time; a pid alone
may by now be somebody else's. Signals go through a pidfd that was checked after it was opened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_DEAD: Final = frozenset("ZXx")
_PF_EXITING: Final = 0x4  # include/linux/sched.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """The first process of a worker. `start_time` is field 22 of its stat: clock ticks since boot."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stat:
    pid: int
    state: str
    session: int
    flags: int
    threads: int
    start_time: int

    @property
    def is_dead(self) -> bool:
        """A first thread that has ended is no dead process while others of it run."""
        return self.state in _DEAD and self.threads <= 1


def leader_now(pid: int) -> Leader | None:
    """The process that has this pid now, as a leader to remember."""
    stat = _stat(pid)
    return None if stat is None else Leader(pid=pid, start_time=stat.start_time)


def is_alive(leader: Leader) -> bool:
    """Whether exactly this process runs. One that has ended and waits to be reaped does not."""
    stat = _stat(leader.pid)
    return stat is not None and stat.start_time == leader.start_time and not stat.is_dead


def open_pidfd(leader: Leader) -> int | None:
    """A pidfd of exactly this process, the caller's to close, or None if it has gone."""
    try:
        descriptor = os.pidfd_open(leader.pid)
    except ProcessLookupError:
        return None
    stat = _stat(leader.pid)
    if stat is None or stat.start_time != leader.start_time:
        os.close(descriptor)
        return None
    return descriptor


def members(leader: Leader, marker: str) -> tuple[Leader, ...]:
    """The live processes of the leader's session, the leader included.

    When the leader has gone, the number of its session could have come to others: then only processes count
    whose environment holds `marker` (a `NAME=value` that only this worker was given).
    """
    first = _stat(leader.pid)
    if first is not None and first.start_time != leader.start_time:
        return ()
    return tuple(
        Leader(pid=stat.pid, start_time=stat.start_time)
        for stat in _all_stats()
        if stat.session == leader.pid
        and not stat.is_dead
        and stat.start_time >= leader.start_time
        and (first is not None or _has_marker(stat.pid, marker))
    )


def everyone() -> Iterator[Leader]:
    """Every live process that can be seen from here, also those of others."""
    for stat in _all_stats():
        if not stat.is_dead:
            yield Leader(pid=stat.pid, start_time=stat.start_time)


def environment_of(pid: int) -> tuple[bytes, ...]:
    """The `NAME=value` entries of a process as it has them now; empty where they cannot be read.

    Asked of each thread in turn, since a first thread that has ended shows none.
    """
    with suppress(OSError):
        for thread in os.listdir(_PROC / str(pid) / "task"):
            with suppress(OSError):
                if entries := (_PROC / str(pid) / "task" / thread / "environ").read_bytes():
                    return tuple(entries.split(b"\0"))
    return ()


def is_ending(process: Leader) -> bool:
    """Whether all threads of exactly this process are on their way out, or it has gone. By then a control
    group of version 1 has let go of it, and it seems to be in none."""
    if not is_alive(process):
        return True
    try:
        threads = os.listdir(_PROC / str(process.pid) / "task")
    except OSError:
        return True
    stats = (_stat_at(_PROC / str(process.pid) / "task" / thread) for thread in threads)
    return all(stat is None or stat.flags & _PF_EXITING for stat in stats)


def send(process: Leader, number: signal.Signals) -> None:
    """Send a signal to exactly this process; one that has gone, or is another's, gets none."""
    descriptor = open_pidfd(process)
    if descriptor is None:
        return
    try:
        signal.pidfd_send_signal(descriptor, number)
    except (ProcessLookupError, PermissionError):
        pass
    finally:
        os.close(descriptor)


def _all_stats() -> Iterator[_Stat]:
    for entry in os.listdir(_PROC):
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            yield stat


def _stat(pid: int) -> _Stat | None:
    return _stat_at(_PROC / str(pid))


def _stat_at(folder: Path) -> _Stat | None:
    try:
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # proc(5): the command's name stands in parentheses and may hold anything, parentheses too.
    fields = text.rpartition(")")[2].split()
    return _Stat(
        pid=int(folder.name),
        state=fields[0],
        session=int(fields[3]),
        flags=int(fields[6]),
        threads=int(fields[17]),
        start_time=int(fields[19]),
    )


def _has_marker(pid: int, marker: str) -> bool:
    return marker.encode() in environment_of(pid)
