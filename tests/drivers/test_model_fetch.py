"""Fetching: from real servers, whole or not at all, once for all, on from where it broke, checked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpu_server.drivers import model_staging
from gpu_server.drivers.model_fetch import Fetcher, FetchFailed
from gpu_server.drivers.model_folder import read_manifest, scan
from gpu_server.drivers.model_memory import VerifiedModels
from gpu_server.drivers.model_s3 import S3Source
from gpu_server.drivers.model_sources import FileService, ModelAbsent, ModelSource
from gpu_server.drivers.models import FolderModelStore
from gpu_server.model_manifest import dumps
from tests.app.processes import ROOT
from tests.drivers.models_world import (
    FILE_KEY,
    FILES,
    S3_ENVIRONMENT,
    file_service,
    laid,
    lay,
    manifest_of,
    put,
    remount_read_only,
    s3_server,
    small_disk,
    tapped,
    tar_of,
    told_when_taken,
    with_manifest,
)

URI = "s3://models/store"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(model_staging, "LOCK_POLL_SECONDS", 0.02)
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


def ignore(done: int, total: int | None) -> None:
    pass


def fetcher(root: Path, *sources: ModelSource, verified: VerifiedModels | None = None) -> Fetcher:
    store = FolderModelStore(root)
    return Fetcher(root, sources, store.find, verified or VerifiedModels(), first_pause=0.01)


def visible(root: Path) -> dict[str, bytes]:
    """What anybody sees of the store."""
    return {path: content for path, content in laid(root).items() if not path.startswith(".staging/")}


def placed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"org/m/{path}": content for path, content in files.items()}


async def test_one_that_has_a_manifest(tmp_path: Path) -> None:
    """It is checked before anybody sees it, and known as verified then."""
    verified = VerifiedModels()
    async with file_service(models={"org/m": tar_of(with_manifest(FILES))}) as service:
        folder = await fetcher(tmp_path, FileService(service.url, FILE_KEY), verified=verified).fetch(
            "org/m", ignore
        )
    assert folder == tmp_path / "org/m"
    assert laid(tmp_path) == placed(with_manifest(FILES))
    assert verified.knows(folder, manifest_of(FILES), scan(folder))


async def test_one_that_has_none(tmp_path: Path) -> None:
    """One is written for it, so that what changes later is noticed."""
    async with file_service(models={"org/m": tar_of(FILES)}) as service:
        folder = await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("org/m", ignore)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.files == manifest_of(FILES).files
    assert manifest.version.startswith("sha256-")


@pytest.mark.parametrize("kind", ["file service", "s3"])
async def test_a_wrong_hash(endpoint: str, tmp_path: Path, kind: str) -> None:
    """It is refused with the file's name, and nothing of it stays."""
    damaged = {**with_manifest(FILES), "model-00001-of-00002.safetensors": os.urandom(300_000)}
    put(endpoint, "damaged", damaged)
    async with file_service(models={"damaged": tar_of(damaged)}) as service:
        source = S3Source(URI) if kind == "s3" else FileService(service.url, FILE_KEY)
        with pytest.raises(FetchFailed, match=r"damaged: model-00001-of-00002.safetensors: has SHA-256"):
            await fetcher(tmp_path, source).fetch("damaged", ignore)
    assert laid(tmp_path) == {}


async def test_too_much_in_it(tmp_path: Path) -> None:
    """A file that the manifest does not name may be code that a loader runs."""
    files = {**with_manifest(FILES), "modeling.py": b"import os"}
    async with file_service(models={"org/m": tar_of(files)}) as service:
        with pytest.raises(FetchFailed, match=r"modeling.py: is not in the manifest"):
            await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("org/m", ignore)
    assert laid(tmp_path) == {}


@pytest.mark.parametrize("files", [{".gitattributes": b""}, {"manifest.json": b"{}"}])
async def test_nothing_in_it(tmp_path: Path, files: dict[str, bytes]) -> None:
    """What no loader would look for is no model."""
    async with file_service(models={"org/m": tar_of(files)}) as service:
        with pytest.raises(FetchFailed, match="no file that a loader would look for"):
            await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("org/m", ignore)
    assert laid(tmp_path) == {}


async def test_not_into_a_model(tmp_path: Path) -> None:
    """What could not be put in place is not asked for."""
    lay(tmp_path / "m", FILES)
    async with file_service(models={"m/x": tar_of(FILES)}) as service:
        with pytest.raises(FetchFailed, match="m holds files"):
            await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("m/x", ignore)
        assert service.asked == []


async def test_a_role_that_lost_its_rights(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before that is not thrown away: when the role has them again the download goes on."""
    put(endpoint, "denied", with_manifest(FILES))
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        source = S3Source(URI, part_bytes=65536, threads=1)
        tap.deny_after, tap.deny_with = 4, ["AccessDenied"]
        with pytest.raises(FetchFailed, match="S3 answered AccessDenied"):
            await fetcher(tmp_path, source).fetch("denied", ignore)
        folder = await fetcher(tmp_path, source).fetch("denied", ignore)
        parts = sum(-(-len(content) // 65536) for content in with_manifest(FILES).values())
        assert len(tap.ranges) == parts
    assert laid(folder) == with_manifest(FILES)


async def test_credentials_that_run_out(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are renewed: the download that they run out in is tried again."""
    put(endpoint, "expired", with_manifest(FILES))
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        tap.deny_after, tap.deny_with = 2, ["ExpiredToken"]
        folder = await fetcher(tmp_path, S3Source(URI, part_bytes=65536)).fetch("expired", ignore)
        assert tap.deny_with == []
    assert laid(folder) == with_manifest(FILES)


async def test_an_address_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is told with the name of the setting."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "s3.example.com")
    with pytest.raises(FetchFailed, match="see AWS_ENDPOINT_URL"):
        await fetcher(tmp_path, S3Source(URI)).fetch("org/m", ignore)


async def test_breaks_in_the_middle(tmp_path: Path) -> None:
    """It tries again, and nothing is to be seen until it is whole."""
    async with file_service(
        models={"org/m": tar_of(FILES)}, breaks=[100_000, 400_000], statuses=[503]
    ) as service:
        await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("org/m", ignore)
        assert len(service.asked) == 4
    assert set(visible(tmp_path)) >= set(placed(FILES))


async def test_not_for_ever(tmp_path: Path) -> None:
    """After some tries it is told what happens each time; the key is not told."""
    async with file_service(statuses=[500] * 9) as service:
        with pytest.raises(FetchFailed, match="answered 500, in 5 tries") as caught:
            await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("org/m", ignore)
        assert len(service.asked) == 5
    assert FILE_KEY not in str(caught.value)
    assert visible(tmp_path) == {}


async def test_two_sources(endpoint: str, tmp_path: Path) -> None:
    """The first that has it gives it; where none has, that is told, and nothing is left."""
    put(endpoint, "both", {"from": b"s3"})
    models = {"both": tar_of({"from": b"service"}), "one": tar_of({"from": b"service"})}
    async with file_service(models=models) as service:
        fetching = fetcher(tmp_path, S3Source(URI), FileService(service.url, FILE_KEY))
        for model_id, origin in (("both", b"s3"), ("one", b"service")):
            folder = await fetching.fetch(model_id, ignore)
            assert (folder / "from").read_bytes() == origin
        with pytest.raises(ModelAbsent):
            await fetching.fetch("none", ignore)
    assert ".staging" not in " ".join(laid(tmp_path))


async def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Both numbers are told, and the room that the download took is given back."""
    tar = tar_of({"small": os.urandom(1 << 20), "w": bytes(3 << 20)})
    with small_disk(tmp_path / "disk", 3 << 20) as disk:
        for chunked in (False, True):
            async with file_service(models={"m": tar}, chunked=chunked) as service:
                with pytest.raises(FetchFailed, match=r"it needs \d+ bytes, .* has \d+ bytes free"):
                    await fetcher(disk, FileService(service.url, FILE_KEY)).fetch("m", ignore)
            assert laid(disk) == {}


async def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    """A read-only mount is told before anything is asked for."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        remount_read_only(disk)
        async with file_service(models={"m": tar_of(FILES)}) as service:
            with pytest.raises(FetchFailed, match="mount it writable"):
                await fetcher(disk, FileService(service.url, FILE_KEY)).fetch("m", ignore)
            assert service.asked == []


# -- several processes ------------------------------------------------------------------------------------

_FETCH = """
import asyncio, sys
from pathlib import Path
from gpu_server.drivers import model_staging
from gpu_server.drivers.model_fetch import Fetcher
from gpu_server.drivers.model_memory import VerifiedModels
from gpu_server.drivers.model_s3 import S3Source
from gpu_server.drivers.model_sources import FileService
from gpu_server.drivers.models import FolderModelStore
model_staging.LOCK_POLL_SECONDS = 0.02
root, kind, at, model_id = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
source = S3Source(at, part_bytes=65536, threads=2) if kind == "s3" else FileService(at, sys.argv[5])
fetcher = Fetcher(root, [source], FolderModelStore(root).find, VerifiedModels())
print(asyncio.run(fetcher.fetch(model_id, lambda done, total: None)))
"""


@contextmanager
def another_process(root: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", _FETCH, str(root), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_process_that_is_killed(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle of a download leaves nothing to be seen, and the next one goes on with it."""
    put(endpoint, "killed", with_manifest(FILES))
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        tap.hold_after = 5
        with another_process(tmp_path, "s3", URI, "killed") as process:
            async with asyncio.timeout(60):
                await tap.holding.wait()
            process.kill()
            await asyncio.to_thread(process.wait)
        assert visible(tmp_path) == {}
        noted = len((tmp_path / ".staging/killed/parts").read_text().splitlines())
    async with tapped(endpoint) as tap:  # another: the first one may still have an order of the killed one's
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        folder = await fetcher(tmp_path, S3Source(URI, part_bytes=65536)).fetch("killed", ignore)
        parts = sum(-(-len(content) // 65536) for content in with_manifest(FILES).values())
        assert 3 <= noted <= 5
        assert len(tap.ranges) == parts - noted
    assert laid(folder) == with_manifest(FILES)
    assert set(os.listdir(tmp_path / ".staging")) == set()


async def test_two_processes_at_once(tmp_path: Path) -> None:
    """The service and the command line want the same model: one fetches it, the other waits, both have it."""
    async with file_service(models={"org/m": tar_of(with_manifest(FILES))}, hold_at=1 << 17) as service:
        words = ("http", service.url, "org/m", FILE_KEY)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            with another_process(tmp_path, *words) as one, told_when_taken() as taken:
                await service.holding.wait()
                mine = group.create_task(
                    fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("org/m", ignore)
                )
                await taken.wait()
                assert not mine.done()
                service.go_on.set()
                assert await mine == tmp_path / "org/m"
                assert await asyncio.to_thread(one.wait) == 0
        assert service.asked == ["org/m"]
    assert laid(tmp_path) == placed(with_manifest(FILES))


async def test_what_a_tar_left_is_not_mixed_with_another(endpoint: str, tmp_path: Path) -> None:
    """What the file service brought in part is not taken for what S3 brings."""
    put(endpoint, "moved", {"a": b"s3"})
    tar = tar_of({"stray": b"1" * 300_000, "a": b"service"})
    async with file_service(models={"moved": tar}, breaks=[200_000] * 9) as service:
        with pytest.raises(FetchFailed):
            await fetcher(tmp_path, FileService(service.url, FILE_KEY)).fetch("moved", ignore)
    folder = await fetcher(tmp_path, S3Source(URI)).fetch("moved", ignore)
    assert set(laid(folder)) == {"a", "manifest.json"}


async def test_it_may_be_there_meanwhile(tmp_path: Path) -> None:
    """Somebody put it there while this one waited for its turn: nothing is fetched."""
    lay(tmp_path / "org/m", {**FILES, "manifest.json": dumps(manifest_of(FILES))})
    async with file_service() as service:
        source = FileService(service.url, FILE_KEY)
        assert await fetcher(tmp_path, source).fetch("org/m", ignore) == tmp_path / "org/m"
        assert service.asked == []
