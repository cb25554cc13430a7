"""Models as folders below one root: `name`, or `org/name`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME: Final = re.compile(_PART)
_MODEL_ID: Final = re.compile(rf"{_PART}(/{_PART})?")


class FolderModelStore:
    """`ModelStore` over a folder, which may come and go (a network mount)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, model_id: str) -> Path | None:
        """The real folder of a model, links resolved; None if it is missing or its link leaves the root."""
        if not _MODEL_ID.fullmatch(model_id):
            raise ValueError(f"{model_id!r} is no model id")
        try:
            root = self._root.resolve(strict=True)
            folder = (root / model_id).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop of links
            return None
        return folder if folder.is_dir() and root in folder.parents else None

    def names(self) -> tuple[str, ...]:
        """A folder that holds files is a model; one that holds only folders is an organisation of models."""
        found: list[str] = []
        for top in self._folders(self._root):
            if self.find(top.name) is None:
                continue
            if _holds_files(top):
                found.append(top.name)
                continue
            ids = (f"{top.name}/{folder.name}" for folder in self._folders(top))
            found.extend(model_id for model_id in ids if self.find(model_id) is not None)
        return tuple(sorted(found))

    def _folders(self, parent: Path) -> Iterator[Path]:
        try:
            children = list(parent.iterdir())
        except OSError:
            return
        for child in children:
            if _NAME.fullmatch(child.name) and child.is_dir():
                yield child


def _holds_files(folder: Path) -> bool:
    try:
        return any(child.is_file() for child in folder.iterdir())
    except OSError:
        return False
