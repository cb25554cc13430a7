"""What outlives its process in the kernel: SysV objects and POSIX message queues, by their owner's uid.

Workers in containers have namespaces of their own for these, which are gone with the last process in them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from gpu_server.drivers.residue_thread import Halt
from gpu_server.drivers.residue_uids import UidsOf
from gpu_server.ports import EndedLease, NotSeen

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_IPC_RMID: Final = 0
_GONE: Final = frozenset({errno.EINVAL, errno.EIDRM})
# Not permitted, or not in this kernel. Other errors, such as too few descriptors, pass.
_NEVER: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENODEV, errno.EINVAL})

# Linux system calls have the same numbers everywhere from 424 on (mount_api(7): fsopen, fsconfig, fsmount).
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_CLOEXEC: Final = 1
_CMD_CREATE: Final = 6


class SysvObjects:
    """Shared memory, semaphores and message queues that belong to a uid, or that it made."""

    name = "sysv"

    def __init__(self, uids_of: UidsOf, listing: Path = Path("/proc/sysvipc")) -> None:
        self._uids_of, self._listing = uids_of, listing

    def look(self, lease: EndedLease, halt: Halt) -> int:
        return len(self._find(lease))

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        for kind, number in self._find(lease):
            halt()
            if _remove(kind, number) != 0 and (code := ctypes.get_errno()) not in _GONE:
                raise OSError(code, os.strerror(code))

    def _find(self, lease: EndedLease) -> list[tuple[str, int]]:
        uids, found = self._uids_of(lease), []
        for kind in ("shm", "sem", "msg"):
            try:
                head, *rows = (self._listing / kind).read_text().splitlines()
            except FileNotFoundError as error:
                raise NotSeen("the kernel does not list SysV objects") from error
            columns = head.split()
            for row in rows:
                values = dict(zip(columns, row.split(), strict=True))
                if {int(values["uid"]), int(values["cuid"])} & uids:
                    found.append((kind, int(values["msqid" if kind == "msg" else f"{kind}id"])))
        return found


def _remove(kind: str, number: int) -> int:
    if kind == "shm":
        return int(_LIBC.shmctl(number, _IPC_RMID, None))
    if kind == "sem":
        return int(_LIBC.semctl(number, 0, _IPC_RMID))
    return int(_LIBC.msgctl(number, _IPC_RMID, None))


class MessageQueues:
    """POSIX message queues of a uid, in the IPC namespace that the service is in."""

    name = "mqueue"

    def __init__(self, uids_of: UidsOf) -> None:
        self._uids_of = uids_of

    def look(self, lease: EndedLease, halt: Halt) -> int:
        uids = self._uids_of(lease)
        with _queues() as folder:
            return len(_owned(folder, uids))

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        uids = self._uids_of(lease)
        with _queues() as folder:
            for name in _owned(folder, uids):
                halt()
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def _owned(folder: int, uids: frozenset[int]) -> list[str]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_uid in uids:
                    found.append(entry.name)
    return found


@contextmanager
def _queues() -> Iterator[int]:
    """The folder of the namespace's queues, mounted nowhere: it need not be at /dev/mqueue."""
    context = _syscall(_FSOPEN, b"mqueue", _CLOEXEC)
    try:
        _syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        mount = _syscall(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
    try:
        yield folder
    finally:
        os.close(folder)


def _syscall(number: int, *arguments: object) -> int:
    result = int(_LIBC.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        if code not in _NEVER:
            raise OSError(code, os.strerror(code))
        raise NotSeen(f"message queues cannot be listed: {os.strerror(code)}")
    return result
