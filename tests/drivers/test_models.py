"""The model store: model folders, found, fetched, verified and read ahead."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_server.drivers import model_hydrate, models
from gpu_server.drivers.model_memory import VerifiedModels
from gpu_server.drivers.model_s3 import S3Source
from gpu_server.drivers.model_sources import FileService
from gpu_server.drivers.model_staging import Staging
from gpu_server.drivers.models import FolderModelStore, sources_of, store_of
from gpu_server.drivers.shared_work import Tell
from gpu_server.ports import StartRefused
from gpu_server.settings import Settings
from tests.drivers.models_world import (
    FILE_KEY,
    FILES,
    file_service,
    laid,
    lay,
    tar_of,
    until_times_move,
    with_manifest,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for folder in ("small", "org/large", "org/.hidden", "empty"):
        (root / folder).mkdir(parents=True)
    (root / "small/config.json").touch()
    (root / "small/parts").mkdir()
    (root / "org/large/config.json").touch()
    return root


def test_models_are_found_by_name_or_by_organisation_and_name(root: Path) -> None:
    """Ids of one and of two parts lead to their folders, and a missing model is None."""
    store = FolderModelStore(root)
    assert store.find("small") == root / "small"
    assert store.find("org/large") == root / "org/large"
    assert store.find("org/none") is None
    assert store.find("small/config.json") is None


def test_names_lists_models_of_both_levels(root: Path) -> None:
    """A folder with files is a model, one with only folders an organisation; hidden ones are neither."""
    assert FolderModelStore(root).names() == ("org/large", "small")
    assert FolderModelStore(root / "none").names() == ()


async def test_what_is_around_or_in_a_model_is_none(root: Path) -> None:
    """Neither an organisation nor a folder of a model is served; a hidden file makes no model."""
    lay(root / "small/parts", {"weights": b"1"})
    lay(root / "org", {".listing": b""})
    store = FolderModelStore(root)
    for model_id in ("org", "small/parts"):
        assert await refusal(store, model_id) == (
            "model_missing",
            f"model {model_id} is not in the model store",
        )
    assert store.names() == ("org/large", "small")
    assert await store.prepare("org/large", ignore) == root / "org/large"


@pytest.mark.parametrize(
    "model_id",
    [
        "",
        ".",
        "..",
        "../other",
        "org/..",
        "/etc",
        "org/large/x",
        "a//b",
        "-x",
        "a\n",
        "a b",
        "org/",
        "\0",
        "é",
    ],
)
def test_ids_that_could_leave_the_store_are_no_ids(root: Path, model_id: str) -> None:
    """Whatever is not one or two plain names is refused before the file system is asked."""
    with pytest.raises(ValueError, match="no model id"):
        FolderModelStore(root).find(model_id)


def test_links_are_followed_inside_the_store_only(root: Path, tmp_path: Path) -> None:
    """A link to another model is that model; a link out, to the root or in a circle is no model."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").touch()
    for name, target in (
        ("out", tmp_path / "secret"),
        ("up", tmp_path),
        ("self", root),
        ("alias", root / "small"),
        ("circle", root / "circle"),
    ):
        (root / name).symlink_to(target)
    (root / "org/out").symlink_to(tmp_path / "secret")
    store = FolderModelStore(root)
    assert store.find("alias") == root / "small"
    for name in ("out", "up", "self", "circle", "org/out", "out/x"):
        assert store.find(name) is None
    assert store.names() == ("alias", "org/large", "small")


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """An operator may link the store to where the mount is."""
    (tmp_path / "link").symlink_to(root)
    assert FolderModelStore(tmp_path / "link").find("small") == root / "small"


# -- preparing --------------------------------------------------------------------------------------------


def ignore(done: int, total: int | None) -> None:
    pass


async def refusal(store: FolderModelStore, model_id: str) -> tuple[str, str]:
    with pytest.raises(StartRefused) as refused:
        await store.prepare(model_id, ignore)
    return refused.value.code, refused.value.message


def test_staging_is_no_model(root: Path) -> None:
    """What is being put together is nobody's to see, through a link either."""
    lay(root / ".staging/m/files", FILES)
    (root / "early").symlink_to(".staging/m/files")
    store = FolderModelStore(root)
    assert store.find("early") is None
    assert store.names() == ("org/large", "small")
    with pytest.raises(ValueError, match="no model id"):
        store.find(".staging/m")


async def test_without_a_manifest(root: Path) -> None:
    """A model is served as it is, unless the settings want a manifest; an empty folder is no model."""
    assert await FolderModelStore(root).prepare("small", ignore) == root / "small"
    assert await refusal(FolderModelStore(root, require_manifest=True), "small") == (
        "model_damaged",
        "model small has no manifest, and MODELS_REQUIRE_MANIFEST wants one",
    )
    assert (await refusal(FolderModelStore(root), "empty"))[0] == "model_missing"


async def test_verified_once_and_remembered(root: Path, tmp_path: Path) -> None:
    """The first session reads all of it, the next ones nothing, in the next life of the service too; what was
    written to is read again."""
    lay(root / "m", with_manifest(FILES))
    total = sum(len(content) for content in FILES.values())
    for life in range(2):
        store = FolderModelStore(root, verified=VerifiedModels(tmp_path / "state"))
        for time in range(2):
            told: list[int] = []
            await store.prepare("m", lambda done, total, told=told: told.append(done))  # type: ignore[misc]
            assert bool(told) == (life == time == 0)
    store = FolderModelStore(root, verified=VerifiedModels(tmp_path / "state"))
    until_times_move(root / "m/config.json", tmp_path / "probe")
    lay(root / "m", {"config.json": b'{"hidden_size": 512}'})
    code, message = await refusal(store, "m")
    assert code == "model_damaged"
    assert message.startswith("model m is damaged: config.json: has SHA-256")
    lay(root / "m", FILES)
    told = []
    await store.prepare("m", lambda done, total: told.append(done))
    assert told[-1] == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.py": b""}, "extra.py: is not in the manifest"),
        ({"config.json": b""}, "config.json: has 0 bytes, not 20"),
        ({"manifest.json": b"[]"}, "manifest.json: is no manifest: the manifest must be a JSON object"),
    ],
)
async def test_damaged(root: Path, change: dict[str, bytes], message: str) -> None:
    """It is refused with the name of the file, also when it was verified before."""
    lay(root / "m", with_manifest(FILES))
    store = FolderModelStore(root)
    await store.prepare("m", ignore)
    lay(root / "m", change)
    assert await refusal(store, "m") == ("model_damaged", f"model m is damaged: {message}")
    assert await store.faults("m", ignore) == (message,)


async def test_a_link_out_of_the_model(root: Path) -> None:
    """A container could not follow it: that is told, and not found out by the loader."""
    lay(root / "m", FILES)
    (root / "m/adapter.bin").symlink_to("../small/config.json")
    code, message = await refusal(FolderModelStore(root), "m")
    assert code == "model_damaged"
    assert message.startswith("model m is damaged: adapter.bin: is a link out of the model's folder")


async def test_ten_sessions_want_one_model(tmp_path: Path) -> None:
    """It is downloaded once, all ten get it and hear how far it is; one that gives up ends nothing."""
    async with file_service(models={"org/m": tar_of(with_manifest(FILES))}, hold_at=1 << 17) as service:
        store = FolderModelStore(tmp_path, sources=[FileService(service.url, FILE_KEY)])
        told: list[list[int]] = [[] for _ in range(10)]
        all_wait = asyncio.Event()

        def listener(number: int) -> Callable[[int, int | None], None]:
            def tell(done: int, total: int | None) -> None:
                told[number].append(done)
                if all(told):
                    all_wait.set()

            return tell

        async with asyncio.timeout(60), store.open(), asyncio.TaskGroup() as group:
            tasks = [group.create_task(store.prepare("org/m", listener(number))) for number in range(10)]
            await service.holding.wait()
            await all_wait.wait()
            tasks[0].cancel()
            await asyncio.wait(tasks[:1])
            service.go_on.set()
            assert {await task for task in tasks[1:]} == {tmp_path / "org/m"}
        assert service.asked == ["org/m"]
    assert laid(tmp_path / "org/m") == with_manifest(FILES)


async def test_when_nobody_waits_any_more(tmp_path: Path) -> None:
    """A download that takes longer than a session may goes on: the next session joins it."""
    async with file_service(models={"m": tar_of(FILES)}, hold_at=1 << 17) as service:
        store = FolderModelStore(tmp_path, sources=[FileService(service.url, FILE_KEY)])
        async with asyncio.timeout(60), store.open(), asyncio.TaskGroup() as group:
            task = group.create_task(store.prepare("m", ignore))
            await service.holding.wait()
            task.cancel()
            await asyncio.wait([task])
            assert store.names() == ()
            service.go_on.set()
            assert await store.prepare("m", ignore) == tmp_path / "m"
        assert service.asked == ["m"]


async def test_the_end_of_the_service(tmp_path: Path) -> None:
    """A download that is under way then ends at once, and leaves nothing to be seen."""
    async with file_service(models={"m": tar_of(FILES)}, hold_at=1 << 17) as service:
        store = FolderModelStore(tmp_path, sources=[FileService(service.url, FILE_KEY)])
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            async with store.open():
                task = group.create_task(store.prepare("m", ignore))
                await service.holding.wait()
            await asyncio.wait([task])
        assert task.cancelled()
    assert store.names() == ()


async def test_what_cannot_be_fetched(tmp_path: Path) -> None:
    """The codes tell whether it is nowhere, or could not be had; the messages say why."""
    async with file_service(models={"m": tar_of({"../x": b""})}) as service:
        store = FolderModelStore(tmp_path, sources=[FileService(service.url, FILE_KEY)], first_pause=0.01)
        assert await refusal(store, "none") == (
            "model_missing",
            "model none is not in the model store, and no source has it",
        )
        code, message = await refusal(store, "m")
        assert code == "model_fetch_failed"
        assert message.startswith(
            "model m could not be fetched: the file service's answer is refused: '../x'"
        )


async def test_what_nobody_thought_of(tmp_path: Path) -> None:
    """A source that fails in its own way is told by the kind of failure; what it says may hold anything."""

    class Odd:
        def origin(self, model_id: str) -> str:
            return "odd"

        async def bring(self, model_id: str, staging: Staging, tell: Tell) -> Path:
            raise UnicodeError("/some/path and a secret")

    assert await refusal(FolderModelStore(tmp_path, sources=[Odd()]), "m") == (
        "model_fetch_failed",
        "model m could not be fetched (UnicodeError)",
    )


async def test_a_mount_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first who asks is told after a while, those who come then at once, and no thread waits for each of
    them. When it answers again, all is well."""
    go_on, asked, real = threading.Event(), [], FolderModelStore._real

    def hanging(store: FolderModelStore, model_id: str) -> Path | None:
        asked.append(threading.current_thread())
        go_on.wait(20)
        return real(store, model_id)

    monkeypatch.setattr(models, "LOOKUP_SECONDS", 0.05)
    monkeypatch.setattr(FolderModelStore, "_real", hanging)
    store = FolderModelStore(root)
    told = {await refusal(store, model_id) for model_id in ("small", "small", "org/large")}
    message = "the model store did not answer within 0.05 s (looking for a model)"
    assert told == {("model_missing", message)}
    assert len(asked) == 1
    go_on.set()
    await asyncio.to_thread(asked[0].join)
    monkeypatch.setattr(models, "LOOKUP_SECONDS", 20.0)
    assert await store.prepare("org/large", ignore) == root / "org/large"


async def test_a_state_folder_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be remembered costs time later, and refuses nobody."""
    go_on = threading.Event()

    class Hanging(VerifiedModels):
        def knows(self, *words: object) -> bool:
            return go_on.wait(20)

        def remember(self, *words: object) -> None:
            go_on.wait(20)

    monkeypatch.setattr(models, "STATE_SECONDS", 0.05)
    lay(root / "m", with_manifest(FILES))
    assert await FolderModelStore(root, verified=Hanging()).prepare("m", ignore) == root / "m"
    go_on.set()


async def test_what_comes_without_a_manifest(tmp_path: Path) -> None:
    """Where one is wanted, it has to come from who made the model: half an upload would be served else."""
    async with file_service(models={"m": tar_of(FILES)}) as service:
        source = FileService(service.url, FILE_KEY)
        store = FolderModelStore(tmp_path, sources=[source], require_manifest=True)
        code, message = await refusal(store, "m")
        assert code == "model_fetch_failed"
        assert message.endswith("it came without a manifest, and MODELS_REQUIRE_MANIFEST wants one")
        assert laid(tmp_path) == {}
        service.models["m"] = tar_of(with_manifest(FILES))
        assert await store.prepare("m", ignore) == tmp_path / "m"


async def test_what_was_left_behind_is_removed(tmp_path: Path) -> None:
    """When the store opens, what nobody has gone on with for long goes, also where nothing is fetched any
    more; a stray folder is left alone."""
    lay(tmp_path / ".staging/foo bar", {})
    lay(tmp_path / ".staging/old", {"files/x": b"1"})
    for path in (*(tmp_path / ".staging/old").rglob("*"), tmp_path / ".staging/old"):
        os.utime(path, (0, 0))
    async with FolderModelStore(tmp_path).open():
        assert os.listdir(tmp_path / ".staging") == ["foo bar"]


async def test_reading_ahead_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions that start at once read it once; where it is switched off nobody does."""
    reads, begun, go_on = [], asyncio.Event(), asyncio.Event()

    async def read(folder: Path, files: object, *, budget: int) -> int:
        reads.append(folder)
        begun.set()
        await go_on.wait()
        return 0

    monkeypatch.setattr(model_hydrate, "hydrate", read)
    store = FolderModelStore(root)
    async with asyncio.timeout(20), store.open(), asyncio.TaskGroup() as group:
        group.create_task(store.hydrate(root / "small"))
        await begun.wait()
        group.create_task(store.hydrate(root / "small"))
        await asyncio.sleep(0)  # it joins
        go_on.set()
    assert reads == [root / "small"]
    await FolderModelStore(root, prefetch=False).hydrate(root / "small")
    assert reads == [root / "small"]


async def test_reading_two_models_ahead(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the room that there is: neither pushes out what was read of the other."""
    budgets, first, go_on = [], asyncio.Event(), asyncio.Event()

    async def read(folder: Path, files: object, *, budget: int) -> int:
        budgets.append(budget)
        (go_on if first.is_set() else first).set()
        await go_on.wait()
        return budget

    monkeypatch.setattr(model_hydrate, "hydrate", read)
    monkeypatch.setattr(model_hydrate, "memory_budget", lambda: 100)
    for name in ("one", "two"):
        lay(root / name, {"weights": bytes(70)})
    store = FolderModelStore(root)
    async with asyncio.timeout(20), store.open():
        async with asyncio.TaskGroup() as group:
            group.create_task(store.hydrate(root / "one"))
            await first.wait()
            group.create_task(store.hydrate(root / "two"))
        await store.hydrate(root / "two")
    assert budgets == [70, 30, 70]


def test_the_store_that_the_settings_describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 is asked first, then the file service, and neither without AUTO_FETCH_MODELS or an order."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(
        model_cache_dir=tmp_path,
        state_dir=tmp_path / "state",
        model_source_s3_uri="s3://bucket/models",
        file_service_url="http://files",
        file_service_internal_key="key",
    )
    assert [type(source) for source in sources_of(settings)] == [S3Source, FileService]
    assert store_of(settings)._sources == ()
    assert len(store_of(settings, fetching=True)._sources) == 2
    assert len(store_of(settings.model_copy(update={"auto_fetch_models": True}))._sources) == 2
