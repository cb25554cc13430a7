"""The file service: a tar stream over real HTTP, and every way in which it can break."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from gpu_server.drivers import model_sources
from gpu_server.drivers.crew import Stop
from gpu_server.drivers.model_sources import (
    FetchBroken,
    FetchRefused,
    FileService,
    ModelAbsent,
    Unpacker,
    check_names,
)
from gpu_server.drivers.model_staging import Staging, StagingFault
from gpu_server.model_tar import TarError
from tests.drivers.models_world import (
    FILE_KEY,
    FILES,
    PlayedFileService,
    file_service,
    laid,
    small_disk,
    tar_of,
)
from tests.full_disk import no_room_beyond

TAR = tar_of(FILES)


def ignore(done: int, total: int | None) -> None:
    pass


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    staging = Staging(tmp_path, "org/m")
    staging.begin("here")
    return staging


def source(service: PlayedFileService, stall: float = 20.0, key: str = FILE_KEY) -> FileService:
    return FileService(service.url + "/", key, stall_seconds=stall)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("prefix", ["", "./", "m/", "org/m/"])
async def test_a_model(staging: Staging, chunked: bool, prefix: str) -> None:
    """All its files come, wherever the tar has them, and bytes are counted."""
    told: list[tuple[int, int | None]] = []
    tar = tar_of(FILES, prefix)
    async with file_service(models={"org/m": tar}, chunked=chunked) as service:
        folder = await source(service).bring("org/m", staging, lambda d, t: told.append((d, t)))
    assert laid(folder) == FILES
    assert told[0] == (0, None if chunked else len(tar))


async def test_a_file_that_is_called_like_the_organisation(staging: Staging) -> None:
    """It is a file of the model, and no folder that the model is in."""
    async with file_service(models={"org/m": tar_of({"org": b"1"})}) as service:
        assert laid(await source(service).bring("org/m", staging, ignore)) == {"org": b"1"}


async def test_one_thread_writes(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the model is, one thread unpacks it, and closes what it has opened."""
    monkeypatch.setattr(model_sources, "BLOCK_BYTES", 4 << 10)
    threads: dict[str, list[threading.Thread]] = {"feed": [], "close": []}
    for name, real in (("feed", Unpacker.feed), ("close", Unpacker.close)):

        def noted(unpacker: Unpacker, *words: Any, name: str = name, real: Any = real) -> None:
            threads[name].append(threading.current_thread())
            real(unpacker, *words)

        monkeypatch.setattr(Unpacker, name, noted)
    async with file_service(models={"org/m": TAR}) as service:
        await source(service).bring("org/m", staging, ignore)
    assert len(threads["feed"]) > 1
    assert len({*threads["feed"], *threads["close"]}) == 1
    assert threading.current_thread() not in threads["close"]


async def test_a_file_system_that_hangs(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for without end, and only a few blocks are kept in memory meanwhile."""
    go_on = threading.Event()
    monkeypatch.setattr(Unpacker, "feed", lambda unpacker, block, stop: go_on.wait(20))
    for name, value in (
        ("BLOCK_BYTES", 4 << 10),
        ("QUEUED_BLOCKS", 1),
        ("WRITE_SECONDS", 0.05),
        ("PARTING_SECONDS", 0.01),
    ):
        monkeypatch.setattr(model_sources, name, value)
    async with file_service(models={"org/m": TAR}) as service:
        with pytest.raises(StagingFault, match=r"did not answer within 0\.05 s"):
            await source(service).bring("org/m", staging, ignore)
    go_on.set()


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, ModelAbsent, "org/m"),
        (401, FetchRefused, "FILE_SERVICE_INTERNAL_KEY"),
        (403, FetchRefused, "FILE_SERVICE_INTERNAL_KEY"),
        (302, FetchRefused, "FILE_SERVICE_URL"),
        (400, FetchRefused, "answered 400"),
        (429, FetchBroken, "answered 429"),
        (500, FetchBroken, "answered 500"),
        (503, FetchBroken, "answered 503"),
    ],
)
async def test_answers(staging: Staging, status: int, error: type[Exception], message: str) -> None:
    """What another try may change is told from what it may not; a redirect is not followed with the key."""
    async with file_service(statuses=[status], headers={"Location": "/elsewhere"}) as service:
        with pytest.raises(error, match=message) as caught:
            await source(service).bring("org/m", staging, ignore)
    assert FILE_KEY not in str(caught.value)


async def test_a_wrong_key(staging: Staging) -> None:
    """That is told, and the key is not."""
    async with file_service(models={"org/m": TAR}) as service:
        with pytest.raises(FetchRefused, match="403") as caught:
            await source(service, key="wrong-key").bring("org/m", staging, ignore)
    assert "wrong-key" not in str(caught.value)


async def test_nobody_there(staging: Staging) -> None:
    """A service that cannot be reached may be there later."""
    async with file_service() as service:
        pass
    with pytest.raises(FetchBroken, match="connection"):
        await source(service).bring("org/m", staging, ignore)


@pytest.mark.parametrize("url", ["http://..", "http://127.0.0.1:99999", "http://host:port"])
async def test_an_address_that_is_none(staging: Staging, url: str) -> None:
    """However it fails, the setting is named; another try would not help."""
    with pytest.raises(FetchRefused, match="see FILE_SERVICE_URL"):
        await FileService(url, FILE_KEY).bring("org/m", staging, ignore)


async def test_a_service_that_takes_no_connection(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is told from one that sends nothing."""
    monkeypatch.setattr(model_sources, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # takes one, and nobody ever answers it
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        service = FileService(f"http://127.0.0.1:{full.getsockname()[1]}", FILE_KEY)
        with pytest.raises(FetchBroken, match=r"took no connection within 0\.2 s"):
            await service.bring("org/m", staging, ignore)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("at", [0, 512, 100_000, len(TAR) - 5000])
async def test_a_connection_that_breaks(staging: Staging, chunked: bool, at: int) -> None:
    """Wherever it breaks, that is not taken for the end, and the next try begins anew."""
    async with file_service(models={"org/m": TAR}, breaks=[at], chunked=chunked) as service:
        with pytest.raises(FetchBroken):
            await source(service).bring("org/m", staging, ignore)
        assert laid(await source(service).bring("org/m", staging, ignore)) == FILES


@pytest.mark.parametrize("cut", [512, 1024, 20_480, len(TAR.rstrip(b"\0")) // 512 * 512])
async def test_a_tar_that_breaks(staging: Staging, cut: int) -> None:
    """An answer that ends in order with a tar that does not is broken too."""
    async with file_service(models={"org/m": TAR[:cut]}, chunked=True) as service:
        with pytest.raises(FetchBroken):
            await source(service).bring("org/m", staging, ignore)


@pytest.mark.parametrize("claim", [len(TAR) * 2, 1000])
async def test_a_length_that_lies(staging: Staging, claim: int) -> None:
    """More or less than what was announced is never taken for a model."""
    async with file_service(models={"org/m": TAR}, claim=claim) as service:
        with pytest.raises((FetchBroken, FetchRefused)):
            await source(service).bring("org/m", staging, ignore)


async def test_a_length_without_room(tmp_path: Path) -> None:
    """It is refused before the first byte is written."""
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        staging = Staging(disk, "m")
        staging.begin("here")
        async with file_service(models={"m": tar_of({"w": bytes(3 << 20)})}) as service:
            with pytest.raises(StagingFault, match=r"it needs \d+ bytes"):
                await source(service).bring("m", staging, ignore)
        assert laid(staging.files) == {}


async def test_no_length_and_no_room(tmp_path: Path) -> None:
    """Where no length is announced, each member's own is looked at before it is written."""
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        staging = Staging(disk, "m")
        staging.begin("here")
        tar = tar_of({"small": b"1", "w": bytes(3 << 20)})
        async with file_service(models={"m": tar}, chunked=True) as service:
            with pytest.raises(StagingFault, match=r"it needs 3145728 bytes"):
                await source(service).bring("m", staging, ignore)
        assert laid(staging.files) == {"small": b"1"}


async def test_a_stall(staging: Staging) -> None:
    """A service that stops sending is left after a while."""
    async with file_service(models={"org/m": TAR}, hold_at=1 << 16) as service:
        with pytest.raises(FetchBroken, match=r"sent nothing for 0\.2 s"):
            await source(service, stall=0.2).bring("org/m", staging, ignore)


async def test_compressed(staging: Staging) -> None:
    """What was not asked for is not unpacked: a small answer may be a large model."""
    async with file_service(models={"org/m": TAR}, headers={"Content-Encoding": "gzip"}) as service:
        with pytest.raises(FetchRefused, match=r"compressed its answer \(gzip\)"):
            await source(service).bring("org/m", staging, ignore)


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape"])
async def test_members_that_would_escape(staging: Staging, tmp_path: Path, name: str) -> None:
    """They are refused by name, and nothing is written outside."""
    async with file_service(models={"org/m": tar_of({"ok": b"1", name: b"2"})}) as service:
        with pytest.raises(FetchRefused, match="escape"):
            await source(service).bring("org/m", staging, ignore)
    assert "escape" not in " ".join(laid(tmp_path))


@pytest.mark.parametrize("names", [["a", "a"], ["a", "a/b"], ["a/b", "a"]])
def test_members_in_each_others_way(staging: Staging, names: list[str]) -> None:
    """A name that is there twice, or is both a file and a folder, is refused."""
    unpacker = Unpacker(staging, None)
    tar = b"".join(tar_of({name: b"1"})[:1024] for name in names)
    with pytest.raises(TarError, match="twice"):
        unpacker.feed(tar, Stop())
    unpacker.close()


def test_a_link_in_the_way(staging: Staging, tmp_path: Path) -> None:
    """A name that is a link already is not written through."""
    (staging.files / "a").symlink_to(tmp_path / "outside")
    unpacker = Unpacker(staging, None)
    with pytest.raises(TarError):
        unpacker.feed(tar_of({"a": b"1"}), Stop())
    assert not (tmp_path / "outside").exists()


def test_an_empty_tar(staging: Staging) -> None:
    """A model without files is none."""
    unpacker = Unpacker(staging, None)
    unpacker.feed(bytes(10240), Stop())
    with pytest.raises(TarError, match="no file in it"):
        unpacker.finish()


def test_a_disk_that_is_full(staging: Staging) -> None:
    """That is the store's fault, not the source's."""
    unpacker = Unpacker(staging, None)
    with no_room_beyond(100_000), pytest.raises(StagingFault, match="is full"):
        unpacker.feed(tar_of({"w": os.urandom(300_000)}), Stop())
    unpacker.close()


def test_names() -> None:
    """A manifest lies beside the files, and is none of them."""
    check_names(["manifest.json", "config.json"])
    with pytest.raises(FetchRefused, match="differ only in case"):
        check_names(["config.json", "Config.json"])
