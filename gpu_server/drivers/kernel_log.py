"""What the NVIDIA driver has told the kernel's log of one GPU: its XIDs, from /dev/kmsg.

A record is `prefix,sequence,time,flags;text` (Documentation/ABI/testing/dev-kmsg of the Linux kernel). Only
the kernel's own count: what a program writes there bears another facility than 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KMSG: Final = Path("/dev/kmsg")
_RECORD_BYTES: Final = 16 << 10
_MAX_RECORDS: Final = 1 << 18
_HEAD: Final = re.compile(rb"(\d{1,9}),(\d{1,20}),[^;]{0,80};")
_XID: Final = re.compile(
    rb"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})(?:\.[0-7])?"
    rb"(?: GPU-[^)]{0,40})?\): (\d{1,6})\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """An error that the driver reported. `sequence` is its record's; `place` PCI domain, bus and device."""

    sequence: int
    place: tuple[int, int, int]
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLog:
    """All that the log holds now: its XIDs, and the sequence numbers of its first and its last record."""

    xids: tuple[Xid, ...]
    first: int
    last: int


def read_kernel_log(path: Path = KMSG) -> KernelLog | None:
    """What is in the log; None where it cannot be read, or is no such log."""
    try:
        # Not to wait for what is still to come.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return parse(_records(lambda: os.read(descriptor, _RECORD_BYTES)))
    except OSError:
        return None
    finally:
        os.close(descriptor)


def parse(records: Iterator[bytes]) -> KernelLog | None:
    """The XIDs of these records; None where there is no record."""
    xids: list[Xid] = []
    first: int | None = None
    last = -1
    for record in records:
        head = _HEAD.match(record)
        if head is None:
            continue
        last = int(head[2])
        first = last if first is None else first
        if int(head[1]) >> 3 == 0 and (xid := _XID.match(record, head.end())):
            domain, bus, device = (int(part, 16) for part in xid.groups()[:3])
            xids.append(Xid(sequence=last, place=(domain, bus, device), number=int(xid[4])))
    return None if first is None else KernelLog(xids=tuple(xids), first=first, last=last)


def _records(read: Callable[[], bytes]) -> Iterator[bytes]:
    """One record a reading, until there is none now. Raises OSError."""
    for _ in range(_MAX_RECORDS):
        try:
            record = read()
        except BlockingIOError:
            return
        except BrokenPipeError:  # it was overwritten before it was read; the next reading goes on after it
            continue
        if not record:
            return
        yield record
