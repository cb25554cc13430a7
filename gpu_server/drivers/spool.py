"""The spool: what must survive the process but never reach a disk.

One folder on a tmpfs, closed to everybody else, with flat files named after the task or session they belong
to: `<id>.input`, `<id>.note`, `<id>.events` and `<id>.events.old`. Nothing is synced, since nothing here is
to survive the machine. Blocking, with few system calls, so that the event loop can afford it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

_ID: Final = re.compile(r"[A-Za-z0-9_]+")
_INPUT: Final = ".input"
_NOTE: Final = ".note"
_EVENTS: Final = ".events"
_OLD: Final = ".old"
# No id is empty, so these belong to nobody.
_DRAFT: Final = ".draft"
_PROBE: Final = ".probe"
_PROBE_BYTES: Final = 4096
_SECRET: Final = ".secret"
_SECRET_BYTES: Final = 32

_FIELDS: Final = struct.Struct("<?IIQQ")  # own, told, bytes of data, first, last
_CHECK: Final = struct.Struct("<I")  # CRC-32 of the fields
_HEADER_BYTES: Final = _FIELDS.size + _CHECK.size
_FORMAT: Final = 1  # the check begins with it: to another format, records of this one are garbage
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Record(NamedTuple):
    """Some events that were written in one piece, encoded: numbers `first` to `last`.

    `own` are the service's, others the worker's. `told` counts the service's own events up to here, these
    included, so `last - told` is the number that the worker gave to its last event. A tuple and no dataclass,
    because one is made for each piece that is relayed.
    """

    own: bool
    told: int
    first: int
    last: int
    data: bytes


class Spool:
    """Inputs of tasks that no worker has yet, histories of events, last words: below `root`, on a tmpfs.

    An id that could lead elsewhere is a ValueError. Dropping what is not there is no error; what cannot be
    dropped stays for the next life, which drops all that `known` has and nobody needs.
    """

    def __init__(self, root: Path) -> None:
        self.fault: str | None = None
        """Why something could not be written, or dropped, when that was tried last."""
        self._root = root

    def open(self) -> None:
        """Make the folder, or take up that of an earlier life. Raises OSError where it is not ours alone."""
        with contextlib.suppress(FileExistsError):
            self._root.mkdir(mode=0o700)
        status = self._root.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", str(self._root))
        if status.st_uid != os.geteuid() or status.st_mode & 0o777 != 0o700:
            raise PermissionError(errno.EPERM, "it must be ours, with mode 0700", str(self._root))
        self._drop(_DRAFT)

    def known(self) -> set[str]:
        """The ids of all tasks and sessions that have anything here."""
        return {name.partition(".")[0] for name in os.listdir(self._root)} - {""}

    def secret(self) -> tuple[bytes, bool]:
        """32 random bytes that live as long as the folder, and whether they were made just now."""
        kept = self._get(_SECRET)
        if kept is not None and len(kept) == _SECRET_BYTES:
            return kept, False
        made = secrets.token_bytes(_SECRET_BYTES)
        self._put(_SECRET, made)
        return made, True

    def probe(self) -> None:
        """See whether it can be written now, while nobody has anything to write: `fault` tells."""
        with contextlib.suppress(OSError):
            self._put(_PROBE, bytes(_PROBE_BYTES))
        self._drop(_PROBE)

    # -- inputs and notes ---------------------------------------------------------------------------------

    def put_input(self, task_id: str, body: bytes) -> None:
        """Keep a task's input. Raises OSError where there is no room, and then nothing is left of it."""
        self._put(_name(task_id, _INPUT), body)

    def input(self, task_id: str) -> bytes | None:
        """The input, or None where there is none."""
        return self._get(_name(task_id, _INPUT))

    def drop_input(self, task_id: str) -> None:
        """Nobody needs it any more."""
        self._drop(_name(task_id, _INPUT))

    def put_note(self, name: str, note: Mapping[str, Any]) -> None:
        """Keep something small about a session or task, in place of what was noted before. Raises OSError."""
        self._put(_name(name, _NOTE), orjson.dumps(note))

    def note(self, name: str) -> dict[str, Any] | None:
        """What was noted, or None where nothing was, or nothing that can be read."""
        try:
            note = orjson.loads(self._get(_name(name, _NOTE)) or b"null")
        except orjson.JSONDecodeError:
            return None
        return note if isinstance(note, dict) else None

    def drop_note(self, name: str) -> None:
        """Nobody needs it any more."""
        self._drop(_name(name, _NOTE))

    # -- histories ----------------------------------------------------------------------------------------

    def history(self, task_id: str, max_bytes: int) -> History:
        """Open a task's history for appending, behind the whole records that it has. Raises OSError."""
        try:
            history = History(self, self._path(_name(task_id, _EVENTS)), max_bytes)
        except OSError as error:
            self.fault = str(error)
            raise
        self.fault = None
        return history

    def read_history(self, task_id: str) -> list[Record]:
        """Its whole records, in order; a torn end is left out. Raises OSError where it cannot be read."""
        return _read(self._path(_name(task_id, _EVENTS)))

    def history_bytes(self, task_id: str) -> int:
        """How much room a history takes here."""
        size = 0
        for path in _generations(self._path(_name(task_id, _EVENTS))):
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(path).st_size
        return size

    def replace_history(self, task_id: str, record: Record) -> None:
        """Keep one record in place of all. It must not be open. Raises OSError, and then nothing is left."""
        name, content = _name(task_id, _EVENTS), _encoded(record)
        try:
            self._put(name, content)
        except OSError:
            self.drop_history(task_id)  # which makes room
            self._put(name, content)
        self._drop(name + _OLD)

    def drop_history(self, task_id: str) -> None:
        """Nobody needs it any more. It may still be open."""
        self._drop(_name(task_id, _EVENTS))
        self._drop(_name(task_id, _EVENTS + _OLD))

    # -- files --------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, name: str, content: bytes) -> None:
        """Under a draft's name until it is whole."""
        draft = self._path(_DRAFT)
        try:
            descriptor = os.open(draft, _CREATE | os.O_TRUNC, 0o600)
            try:
                _write(descriptor, content)
            finally:
                os.close(descriptor)
            os.rename(draft, self._path(name))
        except OSError as error:
            self.fault = str(error)
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        self.fault = None

    def _get(self, name: str) -> bytes | None:
        return _content(self._path(name))

    def _drop(self, name: str) -> None:
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            self.fault = str(error)


class History:
    """One task's history, open for appending: two generations of files, of which the newer one is written.

    When that has passed `max_bytes` it takes the place of the older one. So at least the last `max_bytes` are
    kept, and at most twice as much and a record for each generation.
    """

    def __init__(self, spool: Spool, path: str, max_bytes: int) -> None:
        self._spool = spool
        self._path = path
        self._max_bytes = max_bytes
        self._descriptor = -1
        # Appending, so that what is written after a file was shortened is not written behind a hole.
        self._descriptor = os.open(path, _CREATE | os.O_APPEND, 0o600)
        self._size = os.fstat(self._descriptor).st_size
        if self._size > 0:
            self._shorten(max((place.end for place in _places(_content(path) or b"")), default=0))

    def append(self, record: Record) -> None:
        """Write one record. Raises OSError, and then the file ends where it ended before."""
        content = _encoded(record)
        try:
            if self._size >= self._max_bytes:
                self._rotate()
            _write(self._descriptor, content)
        except OSError as error:
            self._spool.fault = str(error)
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(content)
        self._spool.fault = None

    def cut(self, keep: int) -> None:
        """Only the service's own first `keep` events count: drop the next one, and all that is behind it."""
        for path in _generations(self._path):
            places = _places(_content(path) or b"")
            beyond = next((place.begin for place in places if place.record.told > keep), None)
            if beyond is None:
                continue
            if path == self._path:
                self._shorten(beyond)
            else:
                self._shorten(0)  # first, so that whatever interrupts this leaves no hole
                os.truncate(path, beyond)
            return

    def read(self) -> list[Record]:
        """All that it has, in order. Raises OSError."""
        return _read(self._path)

    def close(self) -> None:
        """Let go of the file, which stays. Closing twice is closing once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _shorten(self, size: int) -> None:
        if size < self._size:
            os.ftruncate(self._descriptor, size)
            self._size = size

    def _rotate(self) -> None:
        os.rename(self._path, self._path + _OLD)
        newer = os.open(self._path, _CREATE | os.O_EXCL | os.O_APPEND, 0o600)
        os.close(self._descriptor)
        self._descriptor, self._size = newer, 0


# -- records ----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A record, and where it is in a file."""

    record: Record
    begin: int
    end: int


def _encoded(record: Record) -> bytes:
    own, told, first, last, data = record
    fields = _FIELDS.pack(own, told, len(data), first, last)
    return b"".join((fields, _CHECK.pack(zlib.crc32(fields, _FORMAT)), data))


def _places(content: bytes) -> Iterator[_Place]:
    """The whole records of a file, up to the first thing that is none."""
    begin, size = 0, len(content)
    while (start := begin + _HEADER_BYTES) <= size:
        fields = content[begin : begin + _FIELDS.size]
        own, told, length, first, last = _FIELDS.unpack(fields)
        end = start + length
        (check,) = _CHECK.unpack_from(content, begin + _FIELDS.size)
        if check != zlib.crc32(fields, _FORMAT) or end > size:
            return
        yield _Place(Record(own, told, first, last, content[start:end]), begin, end)
        begin = end


def _read(path: str) -> list[Record]:
    contents = [_content(generation) or b"" for generation in _generations(path)]
    return [place.record for content in contents for place in _places(content)]


# -- names and files --------------------------------------------------------------------------------------


def _generations(path: str) -> tuple[str, str]:
    """Where a history is, the older records first."""
    return path + _OLD, path


def _name(owner: str, ending: str) -> str:
    if not _ID.fullmatch(owner):
        raise ValueError(f"{owner!r} is no id")
    return owner + ending


def _content(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        return file.read()


def _write(descriptor: int, content: bytes) -> None:
    written = os.write(descriptor, content)
    while written < len(content):  # the rest, or the reason why there was no room for it
        written += os.write(descriptor, content[written:])
