"""Where a model is put together before it is one: a hidden folder of the store, under a lock.

It lies on the same file system as the models, so that one rename makes a model of it: nobody ever sees a part
of one. The lock is a `flock`, which ends with its process, so that the service and the command line may want
the same model at once. What a download leaves when it is interrupted stays, for the next one to go on from.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.crew import PARTING_SECONDS
from gpu_server.drivers.model_folder import sync_folder, write_whole

T = TypeVar("T")
STAGING_NAME: Final = ".staging"
LOCK_POLL_SECONDS: Final = 0.5
STALE_SECONDS: Final = 7 * 86400.0
"""What nobody has gone on with for this long is removed."""
DISK_SECONDS: Final = 120.0
"""How long the file system may take for what is not reading and writing of content."""
PUBLISH_SECONDS: Final = 3600.0
"""How long it may take until all of a model is on the disk for certain."""


_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StagingFault(Exception):
    """The store's folder cannot take a model. The message says why. What has come may be gone on with later,
    unless not `keeps`: then it never can be, or takes room that something else needs."""

    def __init__(self, message: str, *, keeps: bool = True) -> None:
        super().__init__(message)
        self.keeps = keeps


class Staging:
    """A model in the making; only who holds its lock has one. What blocks is for a thread."""

    def __init__(self, root: Path, model_id: str) -> None:
        self.model_id = model_id
        self._root, self._folder = root, root / STAGING_NAME / _name_of(model_id)
        self.files = self._folder / "files"
        """Where its files go."""
        self.notes = self._folder / "parts"
        """Where a source notes what it has done."""

    def begin(self, origin: str) -> None:
        """Keep what was left of a try with the same origin, and nothing else. Raises `StagingFault`."""
        note = self._folder / "origin"
        with _told():
            kept = None
            with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
                kept = note.read_text("utf-8")
            if kept != origin:
                self._remove()
            self.files.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_whole(note, origin.encode("utf-8"))

    def clear(self) -> None:
        """Remove what is there, but stay ready. Raises `StagingFault`."""
        with _told():
            if self.files.exists():
                shutil.rmtree(self.files)
            self.notes.unlink(missing_ok=True)
            self.files.mkdir(mode=0o755, parents=True)

    def remove(self) -> None:
        """Give back all room. Raises nothing."""
        with contextlib.suppress(OSError):
            self._remove()

    def require_room(self, needed: int) -> None:
        """Whether `needed` more bytes find room, and a little besides. Raises `StagingFault`."""
        with _told():
            free = shutil.disk_usage(self._root).free
        if needed + needed // 50 + (1 << 20) > free:
            raise StagingFault(
                f"it needs {needed} bytes, and MODEL_CACHE_DIR has {free} bytes free: make room there",
                keeps=False,
            )

    def require_place(self) -> None:
        """Whether a model can be put where this one belongs. Raises `StagingFault`."""
        place = self._root / self.model_id
        above = place.parent
        with _told():
            if above != self._root and above.exists():
                if above.is_symlink():
                    raise StagingFault(f"{above.name} is a link; a model is not put behind one", keeps=False)
                if holds_files(above):
                    raise StagingFault(f"{above.name} holds files: it is no folder of models", keeps=False)
            if os.path.lexists(place) and (place.is_symlink() or not place.is_dir() or any(place.iterdir())):
                raise StagingFault(f"there is something else at {self.model_id} already", keeps=False)

    def open_to_workers(self, content: Path) -> None:
        """Let everybody read what is in `content`, a folder below `files`, whatever the umask of the service
        is: workers have uids of their own. Raises `StagingFault`."""
        with _told():
            for folder, _, names in os.walk(content):
                os.chmod(folder, 0o755)
                for name in names:
                    os.chmod(Path(folder) / name, 0o644)  # a source makes no links

    def publish(self, content: Path) -> Path:
        """Make the model of what is in `content`, a folder below `files`: durable first, then by one rename.
        Raises `StagingFault`."""
        place = self._root / self.model_id
        self.require_place()
        with _told():
            if not place.parent.exists():
                place.parent.mkdir()
                place.parent.chmod(0o755)
            for folder, _, names in os.walk(content, topdown=False):
                for name in names:
                    _sync_file(Path(folder) / name)
                sync_folder(Path(folder))
            content.rename(place)
            sync_folder(place.parent)
            sync_folder(self._root)
            self.remove()
        return place

    def _remove(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)


@asynccontextmanager
async def staging_for(root: Path, model_id: str) -> AsyncIterator[Staging]:
    """The staging of a model, for one at a time on this and other machines. Raises `StagingFault`."""
    lock = _Lock(root, model_id)
    try:
        await _taken(lock)
        yield Staging(root, model_id)
    finally:
        # Its thread is started in any case, and goes on when it is not waited for.
        with contextlib.suppress(TimeoutError):
            await call_in_thread(lock.release, limit=PARTING_SECONDS, name="model-staging")


def sweep(root: Path, is_there: Callable[[str], bool], *, now: float | None = None) -> None:
    """Remove what downloads left that nobody needs or has gone on with. May block; raises nothing."""
    now = time.time() if now is None else now

    def is_useless(folder: Path, model_id: str) -> bool:
        return is_there(model_id) or now - _touched(folder) > STALE_SECONDS

    try:
        folders = [folder for folder in (root / STAGING_NAME).iterdir() if folder.is_dir()]
    except OSError:
        return
    for folder in folders:
        model_id = folder.name.replace("%", "/")
        try:
            if not is_useless(folder, model_id):
                continue
            lock = os.open(_lock_path(root, model_id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError):  # ValueError: a stray folder, with a name that no model has
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_lock(lock, root, model_id):
                if is_useless(folder, model_id):  # still
                    Staging(root, model_id).remove()
                _lock_path(root, model_id).unlink()
        except OSError:  # somebody is at work there
            continue
        finally:
            os.close(lock)


async def in_thread(do: Callable[[], T], *, limit: float = DISK_SECONDS) -> T:
    """Something that blocks, for as long as a file system may take. Raises `StagingFault` beyond that."""
    try:
        return await call_in_thread(do, limit=limit, name="model-staging")
    except TimeoutError:
        raise StagingFault(f"the file system did not answer within {limit:g} s") from None


def holds_files(folder: Path) -> bool:
    """Whether there is a file in it, hidden ones aside: then it is a model, not a folder of models. May
    block; raises OSError."""
    return any(not child.name.startswith(".") and child.is_file() for child in folder.iterdir())


async def _taken(lock: _Lock) -> None:
    while True:
        if await in_thread(lock.take):
            return
        await asyncio.sleep(LOCK_POLL_SECONDS)


class _Lock:
    """The lock of a model. The thread that takes it may be given up before it has come back: when it then
    gets the lock it lets go of it itself."""

    def __init__(self, root: Path, model_id: str) -> None:
        self._root, self._model_id = root, model_id
        self._guard = threading.Lock()
        self._given_up = False
        self._held: int | None = None

    def take(self) -> bool:
        """Whether it was free, and is held now. Blocks. Raises `StagingFault`."""
        lock = _try_lock(self._root, self._model_id)
        with self._guard:
            if not self._given_up:
                self._held = lock
                return lock is not None
        self._let_go(lock)
        return False

    def release(self) -> None:
        """Let go of it, now or when it is got. May block; raises nothing."""
        with self._guard:
            self._given_up, lock, self._held = True, self._held, None
        self._let_go(lock)

    def _let_go(self, lock: int | None) -> None:
        if lock is not None:
            # Removed while it is held: who waits for it looks whether it is still the file of that name.
            with contextlib.suppress(OSError):
                _lock_path(self._root, self._model_id).unlink()
            with contextlib.suppress(OSError):
                os.close(lock)


def _try_lock(root: Path, model_id: str) -> int | None:
    path = _lock_path(root, model_id)
    with _told():
        if not root.is_dir():
            raise StagingFault("MODEL_CACHE_DIR is not there")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_lock(lock, root, model_id):
                return lock
        except BlockingIOError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None


def _is_lock(lock: int, root: Path, model_id: str) -> bool:
    try:
        return os.fstat(lock).st_ino == _lock_path(root, model_id).stat().st_ino
    except FileNotFoundError:
        return False


def _lock_path(root: Path, model_id: str) -> Path:
    return root / STAGING_NAME / f"{_name_of(model_id)}~lock"


def _name_of(model_id: str) -> str:
    """One name for org/name; no model id has a %, nor the ~ of its lock."""
    return model_id.replace("/", "%")


def _touched(folder: Path) -> float:
    """When anything in it was last written, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                times.append((Path(parent) / name).stat().st_mtime)
    return max(times)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fault_of(error) from error


def fault_of(error: OSError) -> StagingFault:
    """An error of the store's file system, as what an operator can do about it."""
    return StagingFault(_reason(error), keeps=error.errno not in _FULL)


def _reason(error: OSError) -> str:
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"MODEL_CACHE_DIR cannot be written ({error.strerror}): mount it writable, or put the model there"
            " by other means"
        )
    if error.errno in _FULL:
        return f"MODEL_CACHE_DIR is full ({error.strerror}): make room there"
    if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
        return f"MODEL_CACHE_DIR does not lock files ({error.strerror}): mount it with -o flock"
    return f"MODEL_CACHE_DIR cannot be used: {error.strerror or error}"
