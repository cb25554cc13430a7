"""One contract for every model store: the fake and the folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpu_server.core.errors import FailureCode
from gpu_server.drivers.model_sources import FileService
from gpu_server.drivers.models import FolderModelStore
from gpu_server.ports import ModelStore, StartRefused
from tests.drivers.models_world import FILE_KEY, FILES, file_service, lay, tar_of, with_manifest
from tests.fakes.models import FakeModelStore


@dataclass(kw_only=True)
class Stage:
    """A store that has `org/there`, can fetch `org/elsewhere`, and knows that `broken` is damaged."""

    store: ModelStore
    root: Path


@pytest.fixture(params=["fake", "folder"])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    root = tmp_path / "models"
    if request.param == "fake":
        refused = {"broken": (FailureCode.MODEL_DAMAGED, "model broken is damaged: config.json: is missing")}
        fake = FakeModelStore(
            root, there=("org/there", "broken"), elsewhere=("org/elsewhere",), refused=refused
        )
        yield Stage(store=fake, root=root)
        return
    lay(root / "org/there", with_manifest(FILES))
    lay(root / "broken", with_manifest(FILES))
    (root / "broken/config.json").unlink()
    async with file_service(models={"org/elsewhere": tar_of(with_manifest(FILES))}) as service:
        store = FolderModelStore(root, sources=[FileService(service.url, FILE_KEY)], first_pause=0.01)
        async with store.open():
            yield Stage(store=store, root=root)


def ignore(done: int, total: int | None) -> None:
    pass


async def test_what_is_there(stage: Stage) -> None:
    """Names tells it, and prepare gives its folder, as often as one asks."""
    assert stage.store.names() == ("broken", "org/there")
    for _ in range(2):
        assert await stage.store.prepare("org/there", ignore) == stage.root / "org/there"


async def test_what_is_fetched(stage: Stage) -> None:
    """It is there then, for everybody; whoever waited heard how far it was."""
    told: list[tuple[int, int | None]] = []
    folder = await stage.store.prepare("org/elsewhere", lambda done, total: told.append((done, total)))
    assert folder == stage.root / "org/elsewhere"
    assert "org/elsewhere" in stage.store.names()
    done, total = told[-1]
    assert done == total


@pytest.mark.parametrize("model_id", ["org/none", "none", "name:tag", "../there", "org/../org/there", "/etc"])
async def test_what_is_not_there(stage: Stage, model_id: str) -> None:
    """Whatever it looks like, it is missing, and told by its name."""
    with pytest.raises(StartRefused) as refused:
        await stage.store.prepare(model_id, ignore)
    assert refused.value.code == "model_missing"
    assert f"model {model_id} is not in the model store" in refused.value.message


async def test_what_is_damaged(stage: Stage) -> None:
    """It is refused with the name of the file."""
    with pytest.raises(StartRefused) as refused:
        await stage.store.prepare("broken", ignore)
    assert refused.value.code == "model_damaged"
    assert refused.value.message == "model broken is damaged: config.json: is missing"


async def test_reading_ahead(stage: Stage) -> None:
    """It raises nothing, for one that is not there either, and may be left at any time."""
    await stage.store.hydrate(stage.root / "org/there")
    await stage.store.hydrate(stage.root / "none")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(stage.store.hydrate(stage.root / "org/there"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
    await stage.store.hydrate(stage.root / "org/there")
    assert await stage.store.prepare("org/there", ignore) == stage.root / "org/there"
