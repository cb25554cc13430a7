"""What has been verified, so that it is not read again for every session.

A record names a manifest by its digest and every file by its fingerprint (size, times, inode): a file that
was written to is verified again. Records lie in STATE_DIR, since a model's folder may be read-only; one that
cannot be read, or written, only costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpu_server.drivers.model_folder import FoundFile, write_whole
from gpu_server.model_manifest import Manifest

_MAX_RECORD: Final = 64 << 20


class VerifiedModels:
    """Records in a folder; without one they last as long as this."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[Path, str] = {}

    def knows(self, model: Path, manifest: Manifest, found: Sequence[FoundFile]) -> bool:
        """Whether exactly these files were verified against exactly this manifest. May block."""
        wanted = _record(model, manifest, found)
        if self._known.get(model) == wanted:
            return True
        if self._folder is None:
            return False
        try:
            with self._path(model).open("rb") as file:
                kept = file.read(_MAX_RECORD).decode("utf-8")
        except (OSError, ValueError):
            return False
        if kept != wanted:
            return False
        self._known[model] = wanted
        return True

    def remember(self, model: Path, manifest: Manifest, found: Sequence[FoundFile]) -> None:
        """These files were verified against this manifest. May block; raises nothing."""
        record = self._known[model] = _record(model, manifest, found)
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path(model), record.encode("utf-8"))

    def _path(self, model: Path) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(bytes(model)).hexdigest()[:32]}.json"


def _record(model: Path, manifest: Manifest, found: Sequence[FoundFile]) -> str:
    """The same text for the same facts: records are compared, never interpreted."""
    named = {file.path for file in manifest.files}
    facts = {
        "model": str(model),
        "manifest": manifest.digest,
        "files": {file.path: file.print for file in found if file.path in named},
    }
    return json.dumps(facts, sort_keys=True) + "\n"
