"""What can be concluded from a uid: where the workers of a slot have one that nothing else has, whatever
belongs to it on this machine is theirs."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpu_server.ports import EndedLease, NotSeen

UidsOf = Callable[[EndedLease], frozenset[int]]
"""The uids of a lease's workers. Raises `NotSeen` where nothing can be concluded from a uid."""

# include/linux/proc_ns.h: the machine's own namespaces have numbers that never change.
_INITIAL: Final = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF, "user": 0xEFFFFFFD}


def workers_uids(base: int, numbers: Iterable[int]) -> tuple[int, ...]:
    """The uids of the workers in the slots of these numbers; none where workers have the service's own."""
    return tuple(base + number for number in numbers) if os.geteuid() == 0 else ()


def trusted_uids(blind: str | None = None) -> UidsOf:
    """Takes the uids of a lease for the workers' alone if they are; `blind` says why no place of uids can be
    seen from here at all."""

    def uids_of(lease: EndedLease) -> frozenset[int]:
        if blind is not None:
            raise NotSeen(blind)
        if os.geteuid() != 0 or not lease.uids:
            raise NotSeen("the workers have no uid of their own")
        for uid in lease.uids:
            with suppress(KeyError):
                pwd.getpwuid(uid)
                raise NotSeen(f"uid {uid} is an account of this machine")
        return frozenset(lease.uids)

    return uids_of


def why_blind(namespaces: Path = Path("/proc/self/ns")) -> str | None:
    """Why this process does not see what the machine's own processes have; None where it does."""
    for name, number in _INITIAL.items():
        try:
            if os.stat(namespaces / name).st_ino != number:
                return f"the service has {name} namespaces of its own"
        except OSError:
            return "the service cannot tell which namespaces it is in"
    return None
