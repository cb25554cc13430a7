"""Manifests: which files a version of a model consists of, each with its size and SHA-256.

A manifest is the file `manifest.json` in the model's folder, or at the end of an upload. It may come from
anybody who can write there, so reading one trusts nothing: what is not exactly a manifest is a
`ManifestError`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

MANIFEST_NAME: Final = "manifest.json"
MAX_BYTES: Final = 16 << 20
"""Of a manifest, as text."""
MAX_FILES: Final = 20_000
MAX_FILE_SIZE: Final = 1 << 50
MAX_PATH_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 255
MAX_DEPTH: Final = 16

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_QUOTED: Final = 200


class ManifestError(Exception):
    """This is no manifest, or a path that no model's file may have. The message says what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of a model: its path below the model's folder, its size in bytes, its SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A version of a model: its files, in order of their paths."""

    version: str
    files: tuple[ModelFile, ...]

    @property
    def total(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest itself: the same for the same version and files, however it was written."""
        return hashlib.sha256(dumps(self)).hexdigest()


def make(files: Iterable[ModelFile], version: str | None = None) -> Manifest:
    """A manifest of these files; without a version its name is made of what is in them.

    Raises `ManifestError`, as `parse` does.
    """
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return parse(dumps(Manifest(version=version or _derived(ordered), files=ordered)))


def is_derived(manifest: Manifest) -> bool:
    """Whether the version's name is made of what is in the files."""
    return manifest.version == _derived(manifest.files)


def _derived(files: Iterable[ModelFile]) -> str:
    content = "\n".join(f"{file.sha256} {file.path}" for file in files)
    return f"sha256-{hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:16]}"


def dumps(manifest: Manifest) -> bytes:
    """The text of a manifest, a line for each file."""
    files = sorted(manifest.files, key=lambda file: file.path)
    lines = [
        json.dumps({"path": file.path, "size": file.size, "sha256": file.sha256}, ensure_ascii=False)
        for file in files
    ]
    listed = ",\n".join(f"    {line}" for line in lines)
    version = json.dumps(manifest.version, ensure_ascii=False)
    text = f'{{\n  "version": {version},\n  "files": [\n{listed}\n  ]\n}}\n'
    return text.encode("utf-8", errors="surrogatepass")


def parse(raw: bytes) -> Manifest:
    """Read a manifest. Raises `ManifestError`."""
    if len(raw) > MAX_BYTES:
        raise ManifestError(f"it is larger than {MAX_BYTES} bytes")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ManifestError("it is nested too deep") from None
    except ManifestError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ManifestError(f"it is not JSON: {str(error)[:_QUOTED]}") from None
    _only(content, {"version", "files"}, "the manifest")
    version, listed = content["version"], content["files"]
    if not isinstance(version, str) or not 0 < len(version) <= 128 or not version.isprintable():
        raise ManifestError("version must be a text of 1 to 128 printable characters")
    if not isinstance(listed, list) or not listed:
        raise ManifestError("files must be a list with a file in it")
    if len(listed) > MAX_FILES:
        raise ManifestError(f"it names more than {MAX_FILES} files")
    files = tuple(_file(number, entry) for number, entry in enumerate(listed))
    check_paths(file.path for file in files)
    return Manifest(version=version, files=tuple(sorted(files, key=lambda file: file.path)))


def check_path(path: str) -> None:
    """Whether a model's file may have this path: relative, plain, and the same for everybody who reads it.
    Raises `ManifestError`."""
    shown = repr(path[:_QUOTED])
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        raise ManifestError(f"{shown} is not valid UTF-8") from None
    if not path.isprintable() or "\\" in path:
        raise ManifestError(f"{shown} has a character that no path may have")
    if path.startswith("/"):
        raise ManifestError(f"{shown} is absolute")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ManifestError(f"{shown} has a part that is empty, . or ..")
    if len(encoded) > MAX_PATH_BYTES or len(parts) > MAX_DEPTH:
        raise ManifestError(f"{shown} is too long or too deep")
    if any(len(part.encode("utf-8")) > MAX_NAME_BYTES for part in parts):
        raise ManifestError(f"{shown} has a name that is too long")
    if unicodedata.normalize("NFC", path) != path:
        raise ManifestError(f"{shown} is not in Unicode's composed form (NFC)")


def check_paths(paths: Iterable[str]) -> None:
    """Whether these can be the files of one model: each path once, also for who does not tell upper from
    lower case, and none both a file and a folder. Raises `ManifestError`."""
    seen: dict[str, str] = {}
    for path in paths:
        check_path(path)
        folded = path.casefold()
        if folded == MANIFEST_NAME:
            raise ManifestError(f"{path!r} cannot be in a manifest, since it is where the manifest lies")
        if folded in seen:
            raise ManifestError(f"{path!r} and {seen[folded]!r} are the same file, or differ only in case")
        seen[folded] = path
    for folded, path in seen.items():
        parts = folded.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if above in seen:
                raise ManifestError(f"{seen[above]!r} is a file, and a folder in {path!r}")


def _file(number: int, entry: Any) -> ModelFile:
    _only(entry, {"path", "size", "sha256"}, f"file {number}")
    path, size, sha256 = entry["path"], entry["size"], entry["sha256"]
    if not isinstance(path, str):
        raise ManifestError(f"file {number}: path must be a text")
    check_path(path)
    if type(size) is not int or not 0 <= size <= MAX_FILE_SIZE:
        raise ManifestError(f"{path!r}: size must be a number of bytes")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ManifestError(f"{path!r}: sha256 must be 64 lower-case hexadecimal digits")
    return ModelFile(path=path, size=size, sha256=sha256)


def _only(value: Any, keys: set[str], what: str) -> None:
    if not isinstance(value, dict):
        raise ManifestError(f"{what} must be a JSON object")
    missing, unknown = sorted(keys - set(value)), sorted(set(value) - keys)
    if missing:
        raise ManifestError(f"{what} has no {missing[0]}")
    if unknown:
        raise ManifestError(f"{what} has {unknown[0][:_QUOTED]!r}, which is not known")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ManifestError("an object in it has the same key twice")
    return found


def _constant(name: str) -> Any:
    raise ManifestError(f"{name} is no number of JSON")
