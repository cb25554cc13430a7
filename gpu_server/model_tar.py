"""A tar stream, read as a model: plain files and folders below one place, and nothing else.

A tar may name a file anywhere, link, make devices, and announce any size. Python's `tarfile` reads much of
that into memory before one can refuse it, and takes a stream that breaks between two members for a whole one.
So this reads the format itself (POSIX.1-1988 ustar, the `x` and `g` headers of POSIX.1-2001, GNU long names),
from whatever pieces arrive, and knows the end only by its two blocks of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gpu_server.model_manifest import MAX_FILE_SIZE, MAX_FILES, ManifestError, check_path

BLOCK: Final = 512
MAX_EXTENSION: Final = 1 << 20
"""Bytes of a header that extends the next one."""
MAX_MEMBERS: Final = 2 * MAX_FILES
"""Folders and headers that extend others count too."""
MAX_ZEROS: Final = 1 << 16
"""Blocks behind the end."""
_FILES, _FOLDER, _LINKS = (b"0", b"\0", b"7"), b"5", (b"1", b"2")
_EXTENSIONS: Final = {b"x": "pax", b"g": "pax for all", b"L": "name", b"K": "link name"}
_RECORD: Final = re.compile(rb"(\d{1,8}) ([^=\n]+)=")


class TarError(Exception):
    """This is no tar of a model; the message names the member where there is one."""


class TarBroken(TarError):
    """The stream ended before the tar did, or is not one: another try may bring all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file begins; its content follows, in pieces that have `size` bytes together."""

    path: str
    size: int


class TarReader:
    """Feed it what arrives, in pieces of any size; it gives the members and pieces of their content."""

    def __init__(self, *, max_bytes: int | None = None) -> None:
        self._buffer = bytearray()
        self._left = self._padding = 0
        self._extension: str | None = None
        self._pax: dict[str, str] = {}
        self._sparse = False
        self._long_name: str | None = None
        self._zeros = self._members = self._announced = 0
        self._max_bytes = max_bytes

    def feed(self, data: bytes | memoryview) -> Iterator[Member | memoryview]:
        """What this piece of the stream brings. Take all of it before feeding more. Raises `TarError`."""
        view = memoryview(data)
        at = 0
        while at < len(view):
            if self._extension is None and self._left:
                piece = view[at : at + self._left]
                self._left -= len(piece)
                at += len(piece)
                yield piece
            elif self._extension is None and self._padding:
                skipped = min(self._padding, len(view) - at)
                self._padding -= skipped
                at += skipped
            else:
                wanted = self._left + self._padding if self._extension is not None else BLOCK
                piece = view[at : at + wanted - len(self._buffer)]
                self._buffer += piece
                at += len(piece)
                if len(self._buffer) == wanted:
                    block = bytes(self._buffer)
                    self._buffer.clear()
                    if self._extension is not None:
                        self._extend(block[: self._left])
                    elif (member := self._header(block)) is not None:
                        yield member

    def finish(self) -> None:
        """The stream has ended. Raises `TarBroken` when the tar has not."""
        if self._zeros < 2 or self._buffer:
            raise TarBroken("the stream ended in the middle of the tar")

    # -- headers --------------------------------------------------------------------------------------------

    def _header(self, block: bytes) -> Member | None:
        if not any(block):
            self._zeros += 1
            if self._zeros > MAX_ZEROS:
                raise TarError("it does not end")
            return None
        if self._zeros:
            raise TarBroken("there is something behind the end of the tar")
        if _number(block[148:156]) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            raise TarBroken("the stream is no tar: a header's checksum is wrong")
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise TarError(f"it has more than {MAX_MEMBERS} members")
        kind, size = block[156:157], self._size(block)
        if kind in _EXTENSIONS:
            if size > MAX_EXTENSION:
                raise TarError(f"a header of {size} bytes is too large")
            if size:
                self._extension, self._left, self._padding = _EXTENSIONS[kind], size, -size % BLOCK
            return None
        name = self._name(block)
        self._pax, self._sparse, self._long_name = {}, False, None
        return self._member(name, kind, size, mode=_number(block[100:108]) or 0)

    def _member(self, name: str, kind: bytes, size: int, *, mode: int) -> Member | None:
        path = _plain(name)
        shown = repr(name[:200])
        if kind == _FOLDER:
            if size:
                raise TarError(f"{shown} is a folder with content")
            return None
        if kind not in _FILES:
            what = "a link" if kind in _LINKS else "a sparse file" if kind == b"S" else "no plain file"
            raise TarError(f"{shown} is {what}; pack the files themselves (tar --dereference)")
        if name.endswith("/"):
            raise TarError(f"{shown} is a file with the name of a folder")
        if path is None:
            raise TarError(f"{shown} is a file without a name")
        if mode & 0o7000:
            raise TarError(f"{shown} is setuid, setgid or sticky")
        self._announced += size
        if self._max_bytes is not None and self._announced > self._max_bytes:
            raise TarError(f"{shown} makes it larger than the {self._max_bytes} bytes that were announced")
        self._left, self._padding = size, -size % BLOCK
        return Member(path=path, size=size)

    def _size(self, block: bytes) -> int:
        size: int | None = _number(block[124:136])
        if "size" in self._pax and block[156:157] not in _EXTENSIONS:
            text = self._pax["size"]
            size = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
        if size is None or not 0 <= size <= MAX_FILE_SIZE:
            raise TarError("a header gives a size that cannot be")
        return size

    def _name(self, block: bytes) -> str:
        if "path" in self._pax:
            name = self._pax["path"]
        elif self._long_name is not None:
            name = self._long_name
        else:
            name = _text(block[:100])
            if block[257:263] == b"ustar\0" and block[345:500].strip(b"\0"):
                name = f"{_text(block[345:500])}/{name}"
        if self._sparse:
            raise TarError(f"{name[:200]!r} is a sparse file; pack it whole")
        return name

    def _extend(self, content: bytes) -> None:
        kind, self._extension = self._extension, None
        self._left = self._padding = 0
        if kind == "name":
            self._long_name = _text(content)
        elif kind == "pax":
            # Only what is looked at is kept: there may be many such headers before one member.
            for key, value in _records(content).items():
                if key in ("path", "size"):
                    self._pax[key] = value
                self._sparse = self._sparse or key.startswith("GNU.sparse")
        elif kind == "pax for all" and {"path", "size"} & set(_records(content)):
            raise TarError("a header gives all members the same name or size")


def _records(content: bytes) -> dict[str, str]:
    """The records of a pax header, `length key=value\\n` each."""
    found: dict[str, str] = {}
    at = 0
    while at < len(content):
        match = _RECORD.match(content, at)
        end = at + int(match[1]) if match else 0
        if match is None or end <= match.end() or end > len(content) or content[end - 1 : end] != b"\n":
            raise TarError("a pax header cannot be read")
        found[match[2].decode("utf-8", errors="replace")] = _decode(content[match.end() : end - 1])
        at = end
    return found


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    if not text:
        return 0
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None


def _text(field: bytes) -> str:
    return _decode(field.split(b"\0")[0])


def _decode(field: bytes) -> str:
    try:
        return field.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError(f"{field[:200]!r} is not valid UTF-8") from None


def _plain(name: str) -> str | None:
    """The path that this name means below the model's folder; None for the folder itself."""
    path = name.rstrip("/") if name.strip("/") else name
    while path.startswith("./"):
        path = path[2:]
    if path in (".", ""):
        return None
    try:
        check_path(path)
    except ManifestError as error:
        raise TarError(str(error)) from None
    return path
