"""A file system that is full, as far as this process can tell."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: a write stops there, in the middle, and the next one is an OSError.

    As it is where a tmpfs is full, but for the number of the error: EFBIG, since Python ignores SIGXFSZ. It
    is so for every file, also for one that takes up what the test prints.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
