"""The run folder of a session: made for one uid, looked into with suspicion, removed for certain.

A worker is hostile until proven otherwise, and may put anything into `share`: links, pipes, sockets of other
programs, a million files, folders nested by the thousand. So nothing here follows a link, everything goes
through descriptors of folders, and no work grows beyond a bound because a worker wishes it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import stat
from collections.abc import Callable, Container
from pathlib import Path
from typing import Final, Self

from gpu_server.ports import RunFolder, RunFolderFault

SESSION_ID: Final = re.compile(r"[A-Za-z0-9_]+")
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BATCH: Final = 1024
# Other errors, such as too few descriptors, are ours.
_WORKERS_FAULT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES})
_BLOCK: Final = 512  # the unit of st_blocks, whatever the file system's own


class ConnectPath:
    """A worker's socket, held by a descriptor: `path` leads to this very inode, whatever the worker does."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def path(self) -> str:
        """What to connect to. Short, so the 108 bytes of a socket address always suffice."""
        return f"/proc/self/fd/{self._descriptor}"

    def close(self) -> None:
        """Let go of the socket; an established connection stays. Calling it twice is fine."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class RunFolders:
    """The run folders below `root`. Blocking, and short but for `remove`: call that in a thread.

    A worker may keep at most `max_bytes` in at most `max_entries` files and folders.
    """

    def __init__(self, root: Path, max_bytes: int = 1 << 20, max_entries: int = 64) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._max_entries = max_entries

    def create(self, session_id: str, uid: int, task_input: bytes | None) -> RunFolder:
        """Make the folder of a session; what an interrupted start left behind is removed first.

        As root, `share` belongs to `uid` and `task` can only be read by it. Otherwise both are our own, and
        `uid` must be ours. Raises OSError.
        """
        self.remove(session_id)
        path = self._root / session_id
        folder = RunFolder(session_id=session_id, path=path, share=path / "share", task=path / "task")
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.path.mkdir(mode=0o700)
        as_root = os.geteuid() == 0
        folder.share.mkdir(mode=0o700)
        folder.task.mkdir(mode=0o700)
        if task_input is not None:
            _write(folder.task / "input.json", task_input, uid if as_root else None)
        if as_root:
            os.chown(folder.share, uid, uid)
            os.chown(folder.task, 0, uid)
            folder.task.chmod(0o750)
        # Last: until here nobody else can look inside. mkdir's modes are cut by the umask, chmod's are not.
        folder.path.chmod(0o711)
        return folder

    def find(self, session_id: str) -> RunFolder | None:
        """The folder that was made for a session, perhaps by an earlier life of the service."""
        path = self._root / session_id
        if not path.is_dir():
            return None
        return RunFolder(session_id=session_id, path=path, share=path / "share", task=path / "task")

    def owner(self, folder: RunFolder) -> int:
        """The uid that the folder was made for: nobody but the service can change whose it is. Raises
        `RunFolderFault` when it is not there any more."""
        share = _open_share(folder)
        try:
            return os.fstat(share).st_uid
        finally:
            os.close(share)

    def connect_path(self, folder: RunFolder) -> ConnectPath | None:
        """The worker's socket, to connect to and then close; None while there is nothing of that name yet.

        Raises `RunFolderFault` if there is something else than a socket, or the share is no folder.
        """
        share = _open_share(folder)
        try:
            descriptor = os.open(folder.socket.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=share)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _WORKERS_FAULT:
                raise
            raise RunFolderFault(f"the worker's socket cannot be opened: {error.strerror}") from error
        finally:
            os.close(share)
        held = ConnectPath(descriptor)
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            held.close()
            raise RunFolderFault(f"the worker's {folder.socket.name} is not a socket")
        return held

    def check(self, folder: RunFolder) -> None:
        """Raises `RunFolderFault` when a worker keeps more in its share than it may.

        Looks at no more entries than are allowed. A file counts with its length or its blocks, whichever is
        more. A file that was unlinked and is still open is not seen here; the worker's memory limit holds it.
        """
        folders = [_open_share(folder)]
        entries = total = 0
        try:
            while folders:
                here = folders.pop()
                try:
                    with os.scandir(here) as found:
                        for entry in found:
                            entries += 1
                            if entries > self._max_entries:
                                raise RunFolderFault(
                                    f"the run folder holds more than {self._max_entries} entries"
                                )
                            try:
                                info = entry.stat(follow_symlinks=False)
                                if stat.S_ISDIR(info.st_mode):
                                    folders.append(os.open(entry.name, _FOLDER, dir_fd=here))
                            except OSError:
                                continue  # gone or changed meanwhile, or closed to us: the next check sees
                            total += max(info.st_size, info.st_blocks * _BLOCK)
                            if total > self._max_bytes:
                                raise RunFolderFault(
                                    f"the run folder holds more than {self._max_bytes} bytes"
                                )
                finally:
                    os.close(here)
        finally:
            for descriptor in folders:
                os.close(descriptor)

    def remove(self, session_id: str, halt: Callable[[], None] = lambda: None) -> None:
        """Remove a session's folder, whatever is in it; it is no error if there is none.

        Returns only when it is gone. Raises OSError where it cannot be removed (a mount point inside, for
        one). The worker must be gone: one that still runs can make new files faster than this removes them.
        `halt` is called before each entry, and may raise.
        """
        if not SESSION_ID.fullmatch(session_id):
            raise ValueError(f"{session_id!r} is no session id")
        try:
            root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            remove_entry(session_id, root, halt)
            with contextlib.suppress(FileNotFoundError):
                os.stat(session_id, dir_fd=root, follow_symlinks=False)
                raise OSError(errno.EEXIST, "the run folder is still there", session_id)
        finally:
            os.close(root)

    def names(self) -> tuple[str, ...]:
        """The ids of the sessions that have a folder."""
        try:
            found = os.listdir(self._root)
        except FileNotFoundError:
            return ()
        return tuple(sorted(name for name in found if SESSION_ID.fullmatch(name)))


def _write(path: Path, content: bytes, uid: int | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if uid is not None:
            os.fchown(file.fileno(), 0, uid)
            os.fchmod(file.fileno(), 0o440)


def _open_share(folder: RunFolder) -> int:
    try:
        return os.open(folder.share, _FOLDER)
    except OSError as error:
        if error.errno not in _WORKERS_FAULT:
            raise
        raise RunFolderFault(f"the run folder cannot be opened: {error.strerror}") from error


def remove_entry(
    name: str, parent: int, halt: Callable[[], None] = lambda: None, *, owners: Container[int] | None = None
) -> None:
    """Remove one entry of the folder `parent`, whatever it is; no error if there is none. Follows no link. A
    folder is emptied flat: see `_empty`. With `owners`, a folder that has become anybody else's is left, and
    nothing behind a mount point is ever touched: both raise OSError, as whatever else cannot be removed.
    Raises what `halt` raises, too, which is called before each entry."""
    mount = _mount_of(parent)
    try:
        folder = _open_folder(name, parent, mount, owners)
    except FileNotFoundError:
        return
    if folder is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        return
    try:
        _empty(folder, mount, halt)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=parent)


def _empty(top: int, mount: bytes | None, halt: Callable[[], None]) -> None:
    """Empty a folder with two descriptors at a time, however deep it is.

    Each folder found in `top` gives its own folders to `top` and is then removed, so the depth shrinks by one
    with each round; neither the stack, nor the descriptors, nor a path's length grows with it.
    """
    token, number = secrets.token_hex(8), itertools.count()
    while names := _some_names(top):
        for name in names:
            halt()
            folder = _open_folder(name, top, mount)
            if folder is None:
                os.unlink(name, dir_fd=top)
                continue
            try:
                while children := _some_names(folder):
                    for child in children:
                        halt()
                        below = _open_folder(child, folder)
                        if below is None:
                            os.unlink(child, dir_fd=folder)
                            continue
                        os.close(below)
                        os.rename(child, f"{token}-{next(number)}", src_dir_fd=folder, dst_dir_fd=top)
            finally:
                os.close(folder)
            os.rmdir(name, dir_fd=top)


def _some_names(folder: int) -> list[str]:
    with os.scandir(folder) as found:
        return [entry.name for entry in itertools.islice(found, _BATCH)]


def _open_folder(
    name: str, parent: int, mount: bytes | None = None, owners: Container[int] | None = None
) -> int | None:
    """A descriptor of the folder `name`, or None if it is something else. Links are something else. Raises
    OSError for a folder that is none of `owners`', and for one of another mount than `mount`.

    A folder that its owner closed to himself (mode 0) is opened up first; it matters where we are not root.
    """
    held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        info = os.fstat(held)
        mode = info.st_mode
        if not stat.S_ISDIR(mode):
            return None
        if owners is not None and info.st_uid not in owners:
            raise PermissionError(errno.EPERM, "a folder has become somebody else's")
        if mount is not None and _mount_of(held) != mount:
            raise OSError(errno.EBUSY, "a mount point is in the way")
        if mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{held}", 0o700)
        return os.open(".", _FOLDER, dir_fd=held)
    finally:
        os.close(held)


def _mount_of(descriptor: int) -> bytes | None:
    """The mount that an open file is in (proc(5), fdinfo): devices do not tell bind mounts apart."""
    info = os.open(f"/proc/self/fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        lines = os.read(info, 4096).splitlines()
    finally:
        os.close(info)
    return next((line for line in lines if line.startswith(b"mnt_id:")), None)
