"""What this process has open, told apart from what other tests have left to be closed some time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def open_files() -> set[tuple[int, int, int]]:
    """Number, device and inode of every descriptor."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # that of the listing
            continue
        found.add((int(name), status.st_dev, status.st_ino))
    return found


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Every descriptor that is opened within is closed at the end. They are not counted: one of an earlier
    test that is closed meanwhile would make room for a leak, or be missed."""
    before = open_files()
    yield
    gc.collect()
    assert open_files() - before == set()
