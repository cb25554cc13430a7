"""Putting a model into S3, the data repository behind FSx for Lustre, with its manifest last.

Files are written over, one by one, so another version is replaced by order only, and then its manifest first:
until the last file is there, who fetches finds that what is there is not what the manifest says. An object of
the right size and SHA-256 (told by its metadata, which we wrote) is not sent again, so that an upload goes on
where it broke.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.crew import Stop, work_off
from gpu_server.drivers.model_folder import FolderFault, FoundFile, look_again
from gpu_server.drivers.model_s3 import LIST_SECONDS, ObjectChanged, connect, split, telling
from gpu_server.drivers.model_sources import FetchBroken, FetchRefused
from gpu_server.drivers.shared_work import Tell
from gpu_server.drivers.tally import Tally
from gpu_server.model_manifest import (
    MANIFEST_NAME,
    MAX_BYTES,
    Manifest,
    ManifestError,
    ModelFile,
    dumps,
    parse,
)

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

FILES_AT_ONCE: Final = 2
PART_BYTES: Final = 16 << 20
"""Ten of them are in memory for each file; boto3 takes larger ones where ten thousand are not enough."""
PARTS_AT_ONCE: Final = 4


class UploadFailed(Exception):
    """The model is not, or not wholly, in S3. The message says why; another try goes on from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """What an upload did: the paths that were sent, how many were there already, and what else lies there."""

    sent: tuple[str, ...]
    kept: int
    strays: tuple[str, ...]


async def upload(
    uri: str,
    model_id: str,
    folder: Path,
    manifest: Manifest,
    found: Sequence[FoundFile],
    tell: Tell,
    *,
    force: bool = False,
) -> Uploaded:
    """Send a model that was verified to `uri`/`model_id`; over another version only with `force`. Raises
    `UploadFailed`."""
    bucket, prefix = split(f"{uri.rstrip('/')}/{model_id}/")
    seen = {file.path: file for file in found}
    tally = Tally(manifest.total, tell)
    try:
        s3 = await call_in_thread(
            lambda: connect(60.0, FILES_AT_ONCE * PARTS_AT_ONCE), limit=60.0, name="model-upload"
        )
        await call_in_thread(
            lambda: _make_way(s3, bucket, prefix, manifest, force=force), limit=60.0, name="model-upload"
        )
        jobs = [
            partial(_send, s3, bucket, prefix, folder, file, seen[file.path], tally)
            for file in manifest.files
        ]
        sent = await work_off(jobs, threads=FILES_AT_ONCE, name="model-upload")
        await call_in_thread(
            lambda: _put_manifest(s3, bucket, prefix, manifest), limit=60.0, name="model-upload"
        )
        there = await call_in_thread(
            lambda: _there(s3, bucket, prefix), limit=LIST_SECONDS, name="model-upload"
        )
    except (FetchBroken, FetchRefused, FolderFault) as error:
        raise UploadFailed(str(error)) from error
    except OSError as error:
        raise UploadFailed(str(error) or type(error).__name__) from error
    named = {MANIFEST_NAME, *(file.path for file in manifest.files)}
    return Uploaded(
        sent=tuple(file.path for file, was in zip(manifest.files, sent, strict=True) if was),
        kept=sent.count(False),
        strays=tuple(path for path in there if path not in named),
    )


def _send(
    s3: S3Client,
    bucket: str,
    prefix: str,
    folder: Path,
    file: ModelFile,
    seen: FoundFile,
    tally: Tally,
    stop: Stop,
) -> bool:
    """Send one file, unless it is there. Whether it was sent."""
    from boto3.s3.transfer import TransferConfig

    key = prefix + file.path
    if _is_there(s3, bucket, key, file):
        tally.add(file.size)
        return False

    def count(sent: int) -> None:
        tally.add(sent)
        stop.check()

    config = TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
    )
    # Opened here, since boto3 leaves open what it opened when a transfer fails.
    with _telling(bucket), (folder / file.path).open("rb") as opened:
        s3.upload_fileobj(
            opened,
            bucket,
            key,
            ExtraArgs={"Metadata": {"sha256": file.sha256}},
            Callback=count,
            Config=config,
        )
    if not look_again(folder, seen):
        raise FolderFault(file.path, "changed while it was sent")
    return True


def _is_there(s3: S3Client, bucket: str, key: str, file: ModelFile) -> bool:
    from botocore.exceptions import ClientError

    with _telling(bucket):
        try:
            head = s3.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            # Without the right to list, S3 answers 403 for what is not there.
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (403, 404):
                return False
            raise
    return head["ContentLength"] == file.size and head["Metadata"].get("sha256") == file.sha256


def _make_way(s3: S3Client, bucket: str, prefix: str, manifest: Manifest, *, force: bool) -> None:
    """Whether nothing is there but this version, or parts of it; with `force` whatever is there becomes an
    incomplete one of this version, never a mixture that the old manifest vouches for."""
    try:
        with telling(bucket):
            text = s3.get_object(Bucket=bucket, Key=prefix + MANIFEST_NAME)["Body"].read(MAX_BYTES + 1)
    except ObjectChanged:  # there is none
        return
    try:
        there = parse(text)
        if there == manifest:
            return
        what = f"another version is there ({there.version})"
    except ManifestError as error:
        what = f"a manifest.json that is none is there ({error})"
    if not force:
        raise UploadFailed(f"{what}: upload it under another id, or replace what is there with --force")
    _put_manifest(s3, bucket, prefix, manifest)


def _put_manifest(s3: S3Client, bucket: str, prefix: str, manifest: Manifest) -> None:
    with _telling(bucket):
        s3.put_object(
            Bucket=bucket, Key=prefix + MANIFEST_NAME, Body=dumps(manifest), ContentType="application/json"
        )


def _there(s3: S3Client, bucket: str, prefix: str) -> list[str]:
    """The paths of all objects below the prefix."""
    with _telling(bucket):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry.get("Key", "") for page in pages for entry in page.get("Contents", ())]
    return [path for key in keys if (path := key.removeprefix(prefix)) and not path.endswith("/")]


@contextmanager
def _telling(bucket: str) -> Iterator[None]:
    """`telling`, also for what boto3 raises around the errors of botocore."""
    from boto3.exceptions import S3UploadFailedError

    with telling(bucket):
        try:
            yield
        except S3UploadFailedError as error:
            if isinstance(error.__context__, Exception):
                raise error.__context__ from error
            raise FetchBroken("S3 did not take a file") from error
