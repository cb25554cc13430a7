"""Uploads: to a real S3 server, the manifest last, and nothing sent twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_server.drivers import model_upload
from gpu_server.drivers.model_folder import scan
from gpu_server.drivers.model_s3 import S3Source
from gpu_server.drivers.model_sources import FetchRefused
from gpu_server.drivers.model_staging import Staging
from gpu_server.drivers.model_upload import Uploaded, UploadFailed, upload
from tests.drivers.models_world import (
    BUCKET,
    FILES,
    S3_ENVIRONMENT,
    laid,
    lay,
    manifest_of,
    put,
    s3_client,
    s3_server,
    with_manifest,
)

URI = "s3://models/store"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        s3_client(url).create_bucket(Bucket=BUCKET)
        yield url


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay(tmp_path / "m", FILES)


def ignore(done: int, total: int | None) -> None:
    pass


async def send(
    folder: Path, model_id: str, files: dict[str, bytes] = FILES, uri: str = URI, *, force: bool = False
) -> Uploaded:
    return await upload(uri, model_id, folder, manifest_of(files), scan(folder), ignore, force=force)


async def test_there_and_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was uploaded is what is fetched, a file of several parts too, and all bytes are counted."""
    monkeypatch.setattr(model_upload, "PART_BYTES", 5 << 20)
    files = {**FILES, "large.safetensors": os.urandom(11 << 20)}
    lay(folder, files)
    told: list[int] = []
    done = await upload(
        URI, "org/m", folder, manifest_of(files), scan(folder), lambda done, total: told.append(done)
    )
    assert done == Uploaded(sent=tuple(sorted(files)), kept=0, strays=())
    staging = Staging(tmp_path, "org/m")
    staging.begin("here")
    assert laid(await S3Source(URI).bring("org/m", staging, ignore)) == with_manifest(files)


async def test_what_is_there_is_not_sent_again(endpoint: str, folder: Path) -> None:
    """Size and SHA-256 decide: an object of the same size that is another is sent, and strays are told of."""
    await send(folder, "again")
    client = s3_client(endpoint)
    client.delete_object(Bucket=BUCKET, Key="store/again/empty.txt")
    client.put_object(Bucket=BUCKET, Key="store/again/config.json", Body=b"x" * len(FILES["config.json"]))
    put(endpoint, "again", {"old.bin": b"1"})
    done = await send(folder, "again")
    assert done == Uploaded(sent=("config.json", "empty.txt"), kept=3, strays=("old.bin",))


async def test_the_manifest_comes_last(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files are missing there is no manifest that promises them."""
    found = scan(folder)
    (folder / "tokenizer/vocab.txt").unlink()
    with pytest.raises(UploadFailed):
        await upload(URI, "last", folder, manifest_of(FILES), found, ignore)
    keys = [entry["Key"] for entry in _listed(endpoint, "store/last/")]
    assert "store/last/manifest.json" not in keys
    assert keys


@pytest.mark.parametrize("there", [with_manifest({**FILES, "w": b"1"}), {"manifest.json": b"{}"}])
async def test_another_version_is_left_alone(endpoint: str, folder: Path, there: dict[str, bytes]) -> None:
    """Nothing of it is written over but by order, and that tells what it does not need any more."""
    model_id = f"another-{len(there)}"
    put(endpoint, model_id, there)
    lay(folder, {"config.json": b"{}"})
    changed = {**FILES, "config.json": b"{}"}
    with pytest.raises(UploadFailed, match=r"is there.*--force"):
        await send(folder, model_id, changed)
    assert _content(endpoint, model_id) == there
    done = await send(folder, model_id, changed, force=True)
    assert done.strays == (("w",) if "w" in there else ())
    assert _content(endpoint, model_id).items() >= with_manifest(changed).items()


async def test_an_upload_over_another_that_breaks(endpoint: str, folder: Path, tmp_path: Path) -> None:
    """What is there then is a mixture: nobody can fetch it, and the next try makes it whole, without being
    told again that it may."""
    await send(folder, "mixed")
    new = {**FILES, "config.json": b'{"hidden_size": 512}', "z": b"1"}
    lay(folder, new)
    found = scan(folder)
    (folder / "z").unlink()
    with pytest.raises(UploadFailed):
        await upload(URI, "mixed", folder, manifest_of(new), found, ignore, force=True)
    staging = Staging(tmp_path, "mixed")
    staging.begin("here")
    with pytest.raises(FetchRefused, match="z is in its manifest, and not in S3"):
        await S3Source(URI).bring("mixed", staging, ignore)
    lay(folder, new)
    await send(folder, "mixed", new)
    assert laid(await S3Source(URI).bring("mixed", staging, ignore)) == with_manifest(new)


def _content(endpoint: str, model_id: str) -> dict[str, bytes]:
    client, prefix = s3_client(endpoint), f"store/{model_id}/"
    keys = [entry["Key"] for entry in _listed(endpoint, prefix)]
    return {
        key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys
    }


def _listed(endpoint: str, prefix: str) -> list[dict[str, str]]:
    return list(s3_client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []))


async def test_a_file_that_changes_meanwhile(folder: Path) -> None:
    """What was verified is not what was sent: that is told."""
    found = scan(folder)
    lay(folder, {"config.json": b"x" * len(FILES["config.json"])})
    with pytest.raises(UploadFailed, match=r"config.json: changed while it was sent"):
        await upload(URI, "changing", folder, manifest_of(FILES), found, ignore)


async def test_where_it_cannot_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that is not there, and a server that is not, are told without a key."""
    with pytest.raises(UploadFailed, match="NoSuchBucket for bucket no-such-bucket"):
        await send(folder, "m", uri="s3://no-such-bucket")
    monkeypatch.setattr("gpu_server.drivers.model_s3.TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UploadFailed, match="EndpointConnectionError") as caught:
        await send(folder, "m")
    assert "testing" not in str(caught.value)
