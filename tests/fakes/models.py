"""A model store in memory, but for the folders that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gpu_server.core.errors import FailureCode
from gpu_server.ports import StartRefused


class FakeModelStore:
    """Has the models of `there`, can fetch those of `elsewhere` into `root`, refuses those of `refused`."""

    def __init__(
        self,
        root: Path,
        *,
        there: tuple[str, ...] = (),
        elsewhere: tuple[str, ...] = (),
        refused: Mapping[str, tuple[FailureCode, str]] | None = None,
    ) -> None:
        self.root = root
        self.elsewhere, self.refused = elsewhere, dict(refused or {})
        self.hydrated: list[Path] = []
        self._there = set(there)
        for model_id in there:
            (root / model_id).mkdir(parents=True, exist_ok=True)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._there))

    async def prepare(self, model_id: str, tell: Callable[[int, int | None], None]) -> Path:
        if model_id in self.refused:
            raise StartRefused(*self.refused[model_id])
        if model_id not in self._there:
            if model_id not in self.elsewhere:
                raise StartRefused(FailureCode.MODEL_MISSING, f"model {model_id} is not in the model store")
            tell(0, 1)
            (self.root / model_id).mkdir(parents=True)
            self._there.add(model_id)
            tell(1, 1)
        return (self.root / model_id).resolve()

    async def hydrate(self, folder: Path) -> None:
        self.hydrated.append(folder)
