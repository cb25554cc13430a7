"""S3, over HTTP: in parts, pinned to what was listed, and on from where it broke."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from gpu_server.drivers.model_s3 import Listed, Part, S3Source, split
from gpu_server.drivers.model_sources import FetchBroken, FetchRefused, ModelAbsent
from gpu_server.drivers.model_staging import Staging, StagingFault
from tests.drivers.models_world import (
    FILES,
    S3_ENVIRONMENT,
    laid,
    lay,
    put,
    s3_client,
    s3_server,
    small_disk,
    tapped,
    with_manifest,
)

PART = 64 << 10
URI = "s3://models/store"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    staging = Staging(tmp_path, "m")
    staging.begin("here")
    return staging


def ignore(done: int, total: int | None) -> None:
    pass


async def test_a_model(endpoint: str, staging: Staging) -> None:
    """All its objects come, large ones in parts, and none of a model whose name begins the same."""
    put(endpoint, "org/m", FILES)
    put(endpoint, "org/m-2", {"other": b"1"})
    told: list[tuple[int, int | None]] = []
    folder = await S3Source(URI, part_bytes=PART).bring("org/m", staging, lambda d, t: told.append((d, t)))
    assert laid(folder) == FILES
    total = sum(len(content) for content in FILES.values())
    assert told[0] == (0, total)


async def test_a_manifest_says_what_is_fetched(endpoint: str, staging: Staging) -> None:
    """What lies beside is left there."""
    put(endpoint, "listed", {**with_manifest(FILES), "old.bin": b"1", "sub/": b""})
    assert laid(await S3Source(URI).bring("listed", staging, ignore)) == with_manifest(FILES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": b"{}"}, "config.json has 2 bytes in S3, not 20"),
        ({"config.json": None}, "config.json is in its manifest, and not in S3"),
        ({"manifest.json": b"{}"}, "is no manifest"),
        ({"../up": b"1"}, "refused"),
        ({"CONFIG.json": b"1"}, "differ only in case"),
    ],
)
async def test_what_cannot_be_right(
    endpoint: str, staging: Staging, changes: dict[str, bytes | None], message: str
) -> None:
    """It is refused before any weight is fetched."""
    model_id = f"wrong-{abs(hash(str(changes)))}"
    files = {**with_manifest(FILES), **changes}
    put(endpoint, model_id, {path: content for path, content in files.items() if content is not None})
    with pytest.raises(FetchRefused, match=message):
        await S3Source(URI).bring(model_id, staging, ignore)
    assert laid(staging.files) == {}


async def test_what_is_not_there(staging: Staging) -> None:
    """A model without objects is absent; a bucket that is not there, or not ours, is refused by name."""
    with pytest.raises(ModelAbsent):
        await S3Source(URI).bring("none", staging, ignore)
    with pytest.raises(FetchRefused, match="NoSuchBucket for bucket no-such-bucket"):
        await S3Source("s3://no-such-bucket").bring("m", staging, ignore)


async def test_an_organisation(endpoint: str, staging: Staging) -> None:
    """Where there are only folders there are several models, and no one of them is meant."""
    for name in ("a", "b"):
        put(endpoint, f"organisation/{name}", FILES)
    with pytest.raises(FetchRefused, match="organisation of models"):
        await S3Source(URI).bring("organisation", staging, ignore)
    assert laid(staging.files) == {}


@asynccontextmanager
async def listing(size: int) -> AsyncIterator[str]:
    """An S3 server that lists one object, of any size."""

    async def answer(request: web.Request) -> web.Response:
        entry = f"<Contents><Key>store/m/w</Key><Size>{size}</Size><ETag>e</ETag></Contents>"
        return web.Response(text=f"<ListBucketResult>{entry}</ListBucketResult>", content_type="text/xml")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("size", [-1, (1 << 50) + 1, 10**18])
async def test_sizes_that_cannot_be(staging: Staging, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A listing may claim any: it is told which, and of what."""
    async with listing(size) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(FetchRefused, match=f"lists 'w' with {size} bytes"):
            await S3Source(URI).bring("m", staging, ignore)


async def test_a_size_that_never_fits(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before millions of parts are planned."""

    def planned(source: S3Source, file: Listed) -> Iterator[Part]:
        raise AssertionError("parts were planned")

    monkeypatch.setattr(S3Source, "_parts", planned)
    async with listing(1 << 50) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(StagingFault, match=f"it needs {1 << 50} bytes"):
            await S3Source(URI).bring("m", staging, ignore)


async def test_nobody_there(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be reached may be there later; its address and our keys are not told."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("gpu_server.drivers.model_s3.TRIES", 1)
    with pytest.raises(FetchBroken, match=r"connection to S3 broke \(EndpointConnectionError\)"):
        await S3Source(URI).bring("m", staging, ignore)


async def test_without_credentials(staging: Staging, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That is told as what it is."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FetchRefused, match="no credentials"):
        await S3Source(URI).bring("m", staging, ignore)


async def test_parts_that_break(endpoint: str, staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part goes on from the byte where its connection broke."""
    monkeypatch.setattr("gpu_server.drivers.model_s3.READ_BYTES", 4096)
    put(endpoint, "breaking", FILES)
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        tap.break_next = 3
        assert laid(await S3Source(URI, part_bytes=PART).bring("breaking", staging, ignore)) == FILES
    again = [range_ for _, range_ in tap.ranges if int(range_[6:].split("-")[0]) % PART]
    assert len(again) == 3


async def test_a_next_life_goes_on(endpoint: str, staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted download has noted is not read again; a note that was torn is no note."""
    put(endpoint, "resumed", FILES)
    told: list[int] = []
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        tap.hold_after = 4
        source = S3Source(URI, part_bytes=PART, threads=1)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            task = group.create_task(source.bring("resumed", staging, ignore))
            await tap.holding.wait()
            task.cancel()
        assert task.cancelled()
        tap.hold_after = None
        tap.go_on.set()
        before = len(tap.ranges)
        with staging.notes.open("a") as notes:
            notes.write('["model-00001-of-')
        folder = await source.bring("resumed", staging, lambda done, total: told.append(done))
        assert laid(folder) == FILES
        count = sum(-(-len(content) // PART) for content in FILES.values())
        assert len(tap.ranges) - before == count - 4
    assert told[0] > 0


async def test_what_was_left_is_not_trusted_blindly(
    endpoint: str, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was cut, or one that does not belong, is mended; an object that changed is read anew."""
    put(endpoint, "left", FILES)
    source = S3Source(URI, part_bytes=PART)
    await source.bring("left", staging, ignore)
    os.truncate(staging.files / "config.json", 3)
    lay(staging.files, {"stray.py": b"import os"})
    changed = {**FILES, "model-00001-of-00002.safetensors": os.urandom(300_000)}
    put(endpoint, "left", changed)
    assert laid(await source.bring("left", staging, ignore)) == changed


async def test_notes_do_not_outlive_their_file(
    endpoint: str, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that went and came back, or became another and again what it was, is read anew: what was noted
    of it once is not believed."""
    put(endpoint, "returning", FILES)
    source, name = S3Source(URI, part_bytes=PART), "model-00001-of-00002.safetensors"
    await source.bring("returning", staging, ignore)
    put(endpoint, "returning", {name: os.urandom(300_000)})
    await source.bring("returning", staging, ignore)
    put(endpoint, "returning", FILES)
    assert laid(await source.bring("returning", staging, ignore)) == FILES
    s3_client(endpoint).delete_object(Bucket="models", Key=f"store/returning/{name}")
    await source.bring("returning", staging, ignore)
    put(endpoint, "returning", FILES)
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        tap.hold_after = 0
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            task = group.create_task(source.bring("returning", staging, ignore))
            await tap.holding.wait()
            task.cancel()
        tap.hold_after = None
        tap.go_on.set()
        assert laid(await source.bring("returning", staging, ignore)) == FILES


async def test_an_object_that_changes_meanwhile(
    endpoint: str, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are never mixed with those of another."""
    put(endpoint, "changing", FILES)
    async with tapped(endpoint) as tap:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tap.url)
        tap.hold_after = 3
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            source = S3Source(URI, part_bytes=PART, threads=1)
            task = group.create_task(_outcome(source, "changing", staging))
            await tap.holding.wait()
            name = "model-00001-of-00002.safetensors"
            s3_client(endpoint).put_object(
                Bucket="models", Key=f"store/changing/{name}", Body=os.urandom(300_000)
            )
            tap.hold_after = None
            tap.go_on.set()
        assert "changed or removed" in await task


async def _outcome(source: S3Source, model_id: str, staging: Staging) -> str:
    try:
        await source.bring(model_id, staging, ignore)
    except FetchBroken as broken:
        return str(broken)
    return "no error"


async def test_a_disk_without_room(endpoint: str, tmp_path: Path) -> None:
    """It is told before the first byte is read, with what is missing; what is there already counts."""
    put(endpoint, "large", {"w": bytes(3 << 20)})
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        staging = Staging(disk, "m")
        staging.begin("here")
        with pytest.raises(StagingFault, match=r"it needs 3145728 bytes"):
            await S3Source(URI).bring("large", staging, ignore)


async def test_a_disk_that_fills_up(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else took the room meanwhile: that is the store's fault, and is told as it is."""
    put(endpoint, "large", {"w": bytes(3 << 20)})
    monkeypatch.setattr(Staging, "require_room", lambda self, needed: None)
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        staging = Staging(disk, "m")
        staging.begin("here")
        with pytest.raises(StagingFault, match="is full"):
            await S3Source(URI, part_bytes=PART).bring("large", staging, ignore)


def test_addresses() -> None:
    """Bucket and key of an address."""
    assert split("s3://bucket/a/b/") == ("bucket", "a/b/")
    assert S3Source("s3://bucket/a/").origin("org/m") == "s3://bucket/a/org/m"
