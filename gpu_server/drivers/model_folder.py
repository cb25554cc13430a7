"""A model's folder as it lies on a file system: what is in it, its manifest, and what its bytes come to."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from gpu_server.drivers.crew import Stop, work_off
from gpu_server.drivers.tally import Tally
from gpu_server.model_manifest import (
    MANIFEST_NAME,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_FILES,
    Manifest,
    ManifestError,
    ModelFile,
    parse,
)

HASH_THREADS: Final = 4
BLOCK_BYTES: Final = 8 << 20
_MAX_ENTRIES: Final = 4 * MAX_FILES
_MAX_HOPS: Final = 40
"""Links on the way to one file; the kernel follows no more."""
_LEADS_OUT: Final = "is a link out of the model's folder, where a container cannot follow it: copy the file"
_LEADS_NOWHERE: Final = "is a link that leads nowhere"


class FolderFault(Exception):
    """Something in the folder cannot be what a model has: `path`, below the folder, and what is wrong."""

    def __init__(self, path: str, what: str) -> None:
        if not path.isprintable():  # names are any bytes, and this is for logs, JSON and terminals
            path = repr(path)[1:-1]
        super().__init__(f"{path}: {what}")
        self.path, self.what = path, what


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file as it was seen: what of it changes when anybody writes to it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @property
    def print(self) -> tuple[int, int, int, int]:
        """Its fingerprint; times in nanoseconds since 1970."""
        return self.size, self.mtime_ns, self.ctime_ns, self.inode

    @property
    def hidden(self) -> bool:
        """No loader looks for these: a name on its path begins with a dot."""
        return any(part.startswith(".") for part in self.path.split("/"))


def scan(folder: Path) -> tuple[FoundFile, ...]:
    """All files of a model but its manifest, in order of their paths. Links count as what they lead to, as
    long as that is in the same folder: a container sees nothing else. Raises `FolderFault`."""
    try:
        found = [_seen(folder, path) for path in _walk(folder)]
    except OSError as error:
        raise FolderFault(_below(folder, error.filename), f"cannot be read: {error.strerror}") from error
    return tuple(sorted((f for f in found if f.path != MANIFEST_NAME), key=lambda file: file.path))


def look_again(folder: Path, file: FoundFile) -> bool:
    """Whether a file is still as it was found."""
    try:
        return _seen(folder, file.path).print == file.print
    except (OSError, FolderFault):
        return False


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest that lies in a model's folder; None if there is none. Raises `FolderFault`."""
    try:
        descriptor = os.open(folder / MANIFEST_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FolderFault(MANIFEST_NAME, "is no regular file")
            return parse(file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FolderFault(MANIFEST_NAME, f"cannot be read: {error.strerror}") from error
    except ManifestError as error:
        raise FolderFault(MANIFEST_NAME, f"is no manifest: {error}") from error


def write_manifest(folder: Path, text: bytes) -> None:
    """Put a manifest there, all or nothing. Raises OSError."""
    write_whole(folder / MANIFEST_NAME, text, mode=0o644)


def write_whole(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that others see the old or the new one, also after a crash. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def compare(manifest: Manifest, found: Iterable[FoundFile]) -> list[FolderFault]:
    """What can be told without reading: files that lack, have another size, or do not belong there. Hidden
    ones are left alone."""
    there = {file.path: file for file in found}
    faults = []
    for wanted in manifest.files:
        seen = there.pop(wanted.path, None)
        if seen is None:
            faults.append(FolderFault(wanted.path, "is missing"))
        elif seen.size != wanted.size:
            faults.append(FolderFault(wanted.path, f"has {seen.size} bytes, not {wanted.size}"))
    faults += [FolderFault(path, "is not in the manifest") for path, seen in there.items() if not seen.hidden]
    return sorted(faults, key=lambda fault: fault.path)


async def hash_files(
    folder: Path, files: Sequence[FoundFile], tell: Callable[[int, int | None], None]
) -> tuple[ModelFile, ...]:
    """Read files whole, several at once, and give their SHA-256. Raises `FolderFault`, also for one that
    changes meanwhile."""
    tally = Tally(sum(file.size for file in files), tell)
    jobs = [partial(_hash, folder, file, tally) for file in files]
    return tuple(await work_off(jobs, threads=HASH_THREADS, name="model-hash"))


async def verify(
    folder: Path, manifest: Manifest, found: Sequence[FoundFile], tell: Callable[[int, int | None], None]
) -> list[FolderFault]:
    """Every way in which the folder's files are not what the manifest says; reads those that may be.
    Raises `FolderFault` for one that cannot be read."""
    faults = compare(manifest, found)
    wrong = {fault.path for fault in faults}
    sums = {file.path: file.sha256 for file in manifest.files if file.path not in wrong}
    hashed = await hash_files(folder, [file for file in found if file.path in sums], tell)
    faults += [
        FolderFault(file.path, f"has SHA-256 {file.sha256}, not {sums[file.path]}")
        for file in hashed
        if file.sha256 != sums[file.path]
    ]
    return sorted(faults, key=lambda fault: fault.path)


def _hash(folder: Path, file: FoundFile, tally: Tally, stop: Stop) -> ModelFile:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(BLOCK_BYTES, max(file.size, 1))))
    size = 0
    try:
        with (folder / file.path).open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := opened.readinto(buffer):
                stop.check()
                digest.update(buffer[:count])
                size += count
                tally.add(count)
    except OSError as error:
        raise FolderFault(file.path, f"cannot be read: {error.strerror}") from error
    if size != file.size or not look_again(folder, file):
        raise FolderFault(file.path, "changed while it was read")
    return ModelFile(path=file.path, size=size, sha256=digest.hexdigest())


def _walk(folder: Path) -> Iterator[str]:
    """Paths of everything in it that is no folder, depth first; links to folders within it lead nowhere
    new."""
    pending, count = [("", 0)], 0
    while pending:
        below, depth = pending.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                count += 1
                if count > _MAX_ENTRIES or depth >= MAX_DEPTH:
                    raise FolderFault(path, "is one too many: no model has so many files, or so deep")
                if entry.is_symlink():
                    if _target(folder, path).is_dir():
                        continue
                    yield path
                elif entry.is_dir(follow_symlinks=False):
                    pending.append((path, depth + 1))
                else:
                    yield path


def _seen(folder: Path, path: str) -> FoundFile:
    status = (folder / path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise FolderFault(path, "is no regular file")
    return FoundFile(
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
    )


def _target(folder: Path, path: str) -> Path:
    """Where a link leads, followed part by part as the kernel does, which must be in the folder all the way.
    Raises `FolderFault`."""
    at = root = folder.resolve()
    parts, hops = path.split("/")[::-1], 0
    while parts:
        part = parts.pop()
        if part == ".." and at == root:
            raise FolderFault(path, _LEADS_OUT)
        # No part of `at` is a link, so that its parent is what the kernel takes for `..`.
        at = at.parent if part == ".." else at / part
        if at.is_symlink():
            leads, hops = os.readlink(at), hops + 1
            if leads.startswith("/"):
                raise FolderFault(path, _LEADS_OUT)
            if hops > _MAX_HOPS:
                raise FolderFault(path, _LEADS_NOWHERE)
            at = at.parent
            parts += leads.split("/")[::-1]
    if not (folder / path).exists():
        raise FolderFault(path, _LEADS_NOWHERE)
    return at


def _below(folder: Path, name: object) -> str:
    path = Path(str(name))
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name
