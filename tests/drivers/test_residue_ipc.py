"""SysV objects and message queues of a uid; that they are found and removed is test_residue_audit.py's."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from pathlib import Path

import pytest

from gpu_server.drivers.residue_ipc import MessageQueues, SysvObjects
from gpu_server.ports import EndedLease, NotSeen

UID = 1_900_000_001
LEASE = EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",), uids=(UID,))
HEADS = {
    "shm": "key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime rss swap",
    "sem": "key semid perms nsems uid gid cuid cgid otime ctime",
    "msg": "key msqid perms cbytes qnum lspid lrpid uid gid cuid cgid stime rtime ctime",
}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the objects of other uids need root")


def halt() -> None:
    """Nobody has given up."""


def uids_of(lease: EndedLease) -> frozenset[int]:
    return frozenset(lease.uids)


def listing(folder: Path, **uids: tuple[int, int]) -> Path:
    """A `/proc/sysvipc` with one object of each kind: its owner and its maker, by default root."""
    for kind, head in HEADS.items():
        uid, maker = uids.get(kind, (0, 0))
        row = [str({"uid": uid, "cuid": maker}.get(column, 9)) for column in head.split()]
        (folder / kind).write_text(f"{head}\n{' '.join(row)}\n")
    return folder


def test_owner_and_maker_count(tmp_path: Path) -> None:
    """Ownership can be given away, having made it cannot; what is root's is root's."""
    place = SysvObjects(uids_of, listing(tmp_path, shm=(UID, 0), sem=(0, UID), msg=(0, 0)))
    assert place.look(LEASE, halt) == 2


def test_no_listing_is_not_nothing(tmp_path: Path) -> None:
    """Where the kernel lists nothing, nothing is known."""
    with pytest.raises(NotSeen):
        SysvObjects(uids_of, tmp_path).look(LEASE, halt)


def test_what_has_gone_meanwhile_is_no_error(tmp_path: Path) -> None:
    """The numbers of objects are never used again soon; one that is not there is gone."""
    folder = listing(tmp_path, shm=(UID, UID))
    text = (folder / "shm").read_text()
    (folder / "shm").write_text(text.replace(" 9 ", " 2147483647 ", 1))
    SysvObjects(uids_of, folder).remove(LEASE, halt)


@needs_root
def test_others_queues_stay() -> None:
    """A queue of root's is not counted, and not removed."""
    libc, name = ctypes.CDLL(None, use_errno=True), f"/gs-{secrets.token_hex(8)}".encode()
    queue = libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None)
    assert queue >= 0
    try:
        place = MessageQueues(uids_of)
        assert place.look(LEASE, halt) == 0
        place.remove(LEASE, halt)
        assert libc.mq_unlink(name) == 0
    finally:
        os.close(queue)


def test_queues_that_cannot_be_listed_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one thing, listing them takes root."""

    monkeypatch.setattr("gpu_server.drivers.residue_ipc._LIBC", Refusing(errno.EPERM))
    with pytest.raises(NotSeen, match="message queues cannot be listed: Operation not permitted"):
        MessageQueues(uids_of).look(LEASE, halt)


def test_what_cannot_be_listed_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors say nothing of what can be seen from here."""
    monkeypatch.setattr("gpu_server.drivers.residue_ipc._LIBC", Refusing(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        MessageQueues(uids_of).look(LEASE, halt)


class Refusing:
    """A C library whose system calls all fail."""

    def __init__(self, code: int) -> None:
        self.code = code

    def syscall(self, *_: object) -> int:
        ctypes.set_errno(self.code)
        return -1
