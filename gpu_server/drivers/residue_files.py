"""Files that outlive a worker: its run folder, and what belongs to its uid in folders that are open to all.

Nothing here follows a link, and nothing is read. Only entries are looked at whose owner is a uid of the
lease; what other uids keep is passed by, and only descended into where everybody may write.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from gpu_server.drivers.residue_thread import Halt
from gpu_server.drivers.residue_uids import UidsOf
from gpu_server.drivers.run_folder import RunFolders, remove_entry
from gpu_server.ports import EndedLease, NotSeen, WashUnreachable

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDERS: Final = 256
# Of an entry: it has gone, or it is the mount of somebody's own program (FUSE), which shows it to its user
# alone, or has ended. What is behind one is no file of this machine.
_NO_FILE: Final = frozenset({errno.ENOENT, errno.EACCES, errno.ENOTCONN})

CORE_PATTERN: Final = Path("/proc/sys/kernel/core_pattern")
CORE_FOLDERS: Final = tuple(
    Path(folder) for folder in ("/var/lib/systemd/coredump", "/var/lib/apport/coredump", "/var/crash")
)
"""Where the programs of systemd and Ubuntu that the kernel gives cores to keep them."""
_KNOWN_TAKERS: Final = frozenset({"systemd-coredump", "apport"})
# systemd-coredump(8): core.<command>.<uid>.<boot>.<pid>.<time>[.<compression>], dots of a command escaped.
_SYSTEMD_CORE: Final = re.compile(r"core\.[^.]*\.(\d+)\.[0-9a-f]{32}\.\d+\.\d+(?:\..*)?")


class SessionFolders:
    """The run folder of the session; without one, of every session that `served_by` knows no worker of."""

    name = "run_folder"

    def __init__(self, folders: RunFolders, served_by: Callable[[str], str | None]) -> None:
        self._folders, self._served_by = folders, served_by

    def look(self, lease: EndedLease, halt: Halt) -> int:
        return len(self._find(lease))

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        for session_id in self._find(lease):
            halt()
            self._folders.remove(session_id, halt)

    def _find(self, lease: EndedLease) -> list[str]:
        there = self._folders.names()
        if lease.session_id is not None:
            return [name for name in there if name == lease.session_id]
        return [name for name in there if self._served_by(name) is None]


class OwnedFiles:
    """Files and folders of a uid in `folders`, and in folders below them that everybody may write to."""

    def __init__(self, name: str, folders: Iterable[Path], uids_of: UidsOf) -> None:
        self.name = name
        self._folders, self._uids_of = tuple(folders), uids_of

    def look(self, lease: EndedLease, halt: Halt) -> int:
        return sum(1 for _ in self._find(self._uids_of(lease), halt))

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        uids = self._uids_of(lease)
        for name, folder in self._find(uids, halt):
            halt()
            remove_entry(name, folder, halt, owners=uids)

    def _find(self, uids: frozenset[int], halt: Halt) -> Iterator[tuple[str, int]]:
        seen: set[tuple[int, int]] = set()
        for path in self._folders:
            try:
                top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            yield from self._search(top, uids, seen, halt)

    def _search(
        self, top: int, uids: frozenset[int], seen: set[tuple[int, int]], halt: Halt
    ) -> Iterator[tuple[str, int]]:
        waiting = [top]
        try:
            while waiting:
                here = waiting.pop()
                try:
                    info = os.fstat(here)
                    if (info.st_dev, info.st_ino) in seen:
                        continue
                    seen.add((info.st_dev, info.st_ino))
                    if len(seen) > _OPEN_FOLDERS:
                        raise WashUnreachable(f"{self.name}: too many folders are open to all")
                    for name, entry in _entries(here, halt):
                        if entry.st_uid in uids:
                            yield name, here
                        elif _open_to_all(entry) and entry.st_dev == info.st_dev:
                            if len(waiting) >= _OPEN_FOLDERS:
                                raise WashUnreachable(f"{self.name}: too many folders are open to all")
                            with suppress(OSError):  # gone meanwhile, or no folder any more
                                waiting.append(os.open(name, _FOLDER, dir_fd=here))
                finally:
                    os.close(here)
        finally:
            for descriptor in waiting:
                os.close(descriptor)


class CoreFiles:
    """What the kernel, or a program that it gives cores to, has kept of a crashed process of a uid."""

    name = "core_files"

    def __init__(
        self, uids_of: UidsOf, pattern: Path = CORE_PATTERN, folders: Iterable[Path] = CORE_FOLDERS
    ) -> None:
        self._uids_of, self._pattern, self._folders = uids_of, pattern, tuple(folders)

    def look(self, lease: EndedLease, halt: Halt) -> int:
        uids = self._uids_of(lease)
        count = 0
        for path in self._places():
            with _opened(path) as folder:
                count += len(_cores(folder, uids, halt))
        return count

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        uids = self._uids_of(lease)
        for path in self._places():
            with _opened(path) as folder:
                for name in _cores(folder, uids, halt):
                    halt()
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)

    def _places(self) -> tuple[Path, ...]:
        """Relative patterns lead into the worker's own folders, which others look after."""
        pattern = self._pattern.read_text(errors="replace").strip()
        if pattern.startswith("|"):
            program = pattern[1:].split()[0].rpartition("/")[2] if pattern[1:].split() else ""
            if program not in _KNOWN_TAKERS:
                raise NotSeen("the kernel gives core files to a program that is not known here")
        elif pattern.startswith("/"):
            folder = pattern.rpartition("/")[0]
            if "%" in folder:
                raise NotSeen("the folder of core files has a name that varies")
            return (*self._folders, Path(folder or "/"))
        return self._folders


def shared_folders() -> tuple[Path, ...]:
    """The folders which every uid may write to, on any Linux or on some."""
    everywhere = ("/tmp", "/var/tmp", "/run/lock", "/var/crash", tempfile.gettempdir())
    return tuple(dict.fromkeys(map(Path, everywhere)))


def _entries(folder: int, halt: Halt) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as found:
        for entry in found:
            halt()
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_FILE:
                    raise
                continue
            yield entry.name, info


def _open_to_all(info: os.stat_result) -> bool:
    return stat.S_ISDIR(info.st_mode) and bool(info.st_mode & stat.S_IWOTH)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A folder, or None where there is none."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield folder
    finally:
        os.close(folder)


def _cores(folder: int | None, uids: frozenset[int], halt: Halt) -> list[str]:
    """Names in a folder of cores. Files only: a pattern may lead into a folder that has others too."""
    if folder is None:
        return []
    return [
        name
        for name, info in _entries(folder, halt)
        if stat.S_ISREG(info.st_mode) and (info.st_uid in uids or _systemd_uid(name) in uids)
    ]


def _systemd_uid(name: str) -> int | None:
    found = _SYSTEMD_CORE.fullmatch(name)
    return int(found[1]) if found else None
