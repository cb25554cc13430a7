"""Models in S3: listed, then read in parts, many at once, each noted when it is on the disk.

Every read is pinned to the ETag that the listing gave, so that a model that is replaced meanwhile is noticed
and not mixed. A part that is noted is not read again, also by another process after this one was killed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.crew import Stop, work_off
from gpu_server.drivers.model_folder import write_whole
from gpu_server.drivers.model_sources import FetchBroken, FetchRefused, ModelAbsent, check_names
from gpu_server.drivers.model_staging import Staging, fault_of, in_thread
from gpu_server.drivers.shared_work import Tell
from gpu_server.drivers.tally import Tally
from gpu_server.model_manifest import MANIFEST_NAME, MAX_BYTES, MAX_FILE_SIZE, MAX_FILES, ManifestError, parse

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

T = TypeVar("T")
THREADS: Final = 8
PART_BYTES: Final = 32 << 20
READ_BYTES: Final = 1 << 20
TRIES: Final = 5
LIST_SECONDS: Final = 600.0
_GONE: Final = ("404", "NoSuchKey", "PreconditionFailed", "412", "InvalidRange", "416")
_PASSING: Final = (
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "ExpiredToken",
    "TokenRefreshRequired",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "429",
    "500",
    "503",
)


class ObjectChanged(FetchBroken):
    """An object is not what was listed any more: only a new listing helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An object of the model: its path below the model's prefix."""

    path: str
    key: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A range of an object."""

    listed: Listed
    at: int
    size: int

    @property
    def note(self) -> str:
        """What is written down when it is on the disk."""
        file = self.listed
        return json.dumps([file.path, file.etag, file.size, self.at, self.size]) + "\n"


class S3Source:
    """`s3://bucket/prefix/<model_id>/...`. Credentials, region and endpoint are boto3's to find."""

    def __init__(
        self, uri: str, *, threads: int = THREADS, part_bytes: int = PART_BYTES, stall_seconds: float = 60.0
    ) -> None:
        self._uri = uri.rstrip("/")
        self._threads, self._part_bytes, self._stall = threads, part_bytes, stall_seconds

    def origin(self, model_id: str) -> str:
        return f"{self._uri}/{model_id}"

    async def bring(self, model_id: str, staging: Staging, tell: Tell) -> Path:
        bucket, prefix = split(f"{self._uri}/{model_id}/")
        s3 = await _asked(lambda: connect(self._stall, self._threads))
        try:
            listed = await _asked(lambda: self._list(s3, bucket, prefix))
            if not listed:
                raise ModelAbsent(model_id)
            done = await in_thread(lambda: self._noted(staging, listed))
            total = sum(file.size for file in listed)
            needed = total - sum(part.size for part in done)
            # Before there is a part in memory for every 32 MiB of what a listing may claim.
            await in_thread(lambda: staging.require_room(needed))
            await in_thread(lambda: _lay_out(staging.files, listed))
            left = await in_thread(lambda: [p for file in listed for p in self._parts(file) if p not in done])
            tally = Tally(total, tell, done=total - needed)
            notes = Notes(staging.notes)
            try:
                jobs = [partial(_bring_part, s3, bucket, part, staging.files, notes, tally) for part in left]
                await work_off(jobs, threads=self._threads, name="model-s3")
            finally:
                notes.close()
        except OSError as error:
            raise fault_of(error) from error
        finally:
            s3.close()
        return staging.files

    def _list(self, s3: S3Client, bucket: str, prefix: str) -> list[Listed]:
        """The objects of a model: where there is a manifest, those that it names."""
        found: dict[str, Listed] = {}
        with telling(bucket):
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    key, size, etag = entry.get("Key", ""), entry.get("Size", 0), entry.get("ETag", "")
                    path = key.removeprefix(prefix)
                    if not path or (path.endswith("/") and not size):
                        continue  # what consoles make to show a folder
                    if not 0 <= size <= MAX_FILE_SIZE:
                        raise FetchRefused(f"S3 lists {path[:200]!r} with {size} bytes, which cannot be")
                    found[path] = Listed(path=path, key=key, size=size, etag=etag)
                    if len(found) > MAX_FILES + 1:
                        raise FetchRefused(f"there are more than {MAX_FILES} objects of it in S3")
            if found and all("/" in path or path.startswith(".") for path in found):
                raise FetchRefused("no file is directly below it in S3: it is an organisation of models")
            check_names(list(found))
            if MANIFEST_NAME in found:
                found = _chosen(found, _whole(s3, bucket, found[MANIFEST_NAME]))
        return list(found.values())

    def _parts(self, file: Listed) -> Iterator[Part]:
        for at in range(0, file.size, self._part_bytes):
            yield self._part(file, at)

    def _part(self, file: Listed, at: int) -> Part:
        return Part(listed=file, at=at, size=min(self._part_bytes, file.size - at))

    def _noted(self, staging: Staging, listed: list[Listed]) -> set[Part]:
        """The parts that are there: noted, of what is listed now, in a file that is as it was laid out. Other
        notes are forgotten, or they would be believed of a file that is laid out anew."""
        try:
            lines = set(staging.notes.read_text("utf-8", errors="replace").splitlines(keepends=True))
        except FileNotFoundError:
            return set()
        laid_out = {file.path: file for file in listed if _size(staging.files / file.path) == file.size}
        done: dict[str, Part] = {}
        for line in lines:
            try:
                path, _, _, at, _ = json.loads(line)
                file = laid_out[path]
                part = self._part(file, at)
            except (ValueError, TypeError, KeyError):  # torn when its writer was killed, or of another file
                continue
            if part.note == line and at in range(0, file.size, self._part_bytes):
                done[line] = part
        if len(done) < len(lines):
            write_whole(staging.notes, "".join(done).encode())
        return set(done.values())


class Notes:
    """What is on the disk already, a line for each part. Written by many threads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()

    def add(self, note: str) -> None:
        """Write down that a part is done. Raises OSError."""
        with self._lock:
            if self._descriptor >= 0:
                os.write(self._descriptor, note.encode())

    def close(self) -> None:
        """Nothing is written from now on."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1


def connect(stall_seconds: float, threads: int) -> S3Client:
    """A client, which threads may share. Raises `FetchRefused`."""
    import boto3
    from botocore.config import Config

    with telling("S3"):
        return boto3.session.Session().client(
            "s3",
            config=Config(
                connect_timeout=10,
                read_timeout=stall_seconds,
                max_pool_connections=threads + 2,
                retries={"mode": "standard", "total_max_attempts": TRIES},
            ),
        )


async def _asked(do: Callable[[], T]) -> T:
    """What S3 answers, in a thread. Raises `FetchBroken` when that takes too long."""
    try:
        return await call_in_thread(do, limit=LIST_SECONDS, name="model-s3")
    except TimeoutError:
        raise FetchBroken(f"S3 did not answer within {LIST_SECONDS:g} s") from None


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


@contextmanager
def telling(bucket: str) -> Iterator[None]:
    """Says boto3's errors in our words, which hold no request and no credential: raises `FetchBroken` or
    `FetchRefused`."""
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))[:60]
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        if code in _GONE:
            raise ObjectChanged("an object in S3 was changed or removed while it was read") from error
        if code in _PASSING or status.startswith("5"):
            raise FetchBroken(f"S3 answered {code}") from error
        raise FetchRefused(f"S3 answered {code} for bucket {bucket}", keeps=True) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise FetchRefused("there are no credentials for S3", keeps=True) from error
    except boto.CredentialRetrievalError as error:
        raise FetchBroken("the credentials for S3 could not be renewed") from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError) as error:
        raise FetchBroken(f"the connection to S3 broke ({type(error).__name__})") from error
    except ValueError as error:  # an address, or an answer, that is none
        message = f"S3 cannot be used ({type(error).__name__}): see AWS_ENDPOINT_URL"
        raise FetchRefused(message, keeps=True) from error
    except boto.BotoCoreError as error:
        raise FetchRefused(f"S3 cannot be used: {type(error).__name__}", keeps=True) from error


def _chosen(found: dict[str, Listed], text: bytes) -> dict[str, Listed]:
    """The objects that a manifest names, and itself. Raises `FetchRefused`."""
    try:
        manifest = parse(text)
    except ManifestError as error:
        raise FetchRefused(f"its manifest.json in S3 is no manifest: {error}") from error
    for file in manifest.files:
        listed = found.get(file.path)
        if listed is None:
            raise FetchRefused(f"{file.path} is in its manifest, and not in S3")
        if listed.size != file.size:
            raise FetchRefused(f"{file.path} has {listed.size} bytes in S3, not {file.size}")
    return {path: found[path] for path in (*(file.path for file in manifest.files), MANIFEST_NAME)}


def _whole(s3: S3Client, bucket: str, listed: Listed) -> bytes:
    if listed.size > MAX_BYTES:
        raise FetchRefused(f"its manifest.json in S3 is larger than {MAX_BYTES} bytes")
    return s3.get_object(Bucket=bucket, Key=listed.key, IfMatch=listed.etag)["Body"].read(MAX_BYTES + 1)


def _lay_out(files: Path, listed: list[Listed]) -> None:
    """Files of the right size, empty so far; what is not one of them goes."""
    wanted = {files / file.path for file in listed}
    for folder, _, names in os.walk(files):
        for name in names:
            if Path(folder) / name not in wanted:
                (Path(folder) / name).unlink()
    for file in listed:
        path = files / file.path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _size(path) != file.size:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.truncate(descriptor, 0)
                os.truncate(descriptor, file.size)
            finally:
                os.close(descriptor)


def _size(path: Path) -> int | None:
    return path.stat(follow_symlinks=False).st_size if path.is_file() else None


def _bring_part(
    s3: S3Client, bucket: str, part: Part, files: Path, notes: Notes, tally: Tally, stop: Stop
) -> None:
    """Read one part, on from where it broke, a few times; on the disk first, then noted."""
    descriptor = os.open(files / part.listed.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    done = 0
    try:
        for attempt in range(TRIES):
            if attempt:
                stop.pause(min(0.5 * 2**attempt, 10.0))
            try:
                for piece in _read(s3, bucket, part, done):
                    stop.check()
                    done += _write(descriptor, piece, part.at + done)
                    tally.add(len(piece))
                break
            except ObjectChanged:
                raise
            except FetchBroken:
                if attempt == TRIES - 1:
                    raise
        os.fdatasync(descriptor)
        stop.check()
        notes.add(part.note)
    except OSError as error:
        raise fault_of(error) from error
    finally:
        os.close(descriptor)


def _read(s3: S3Client, bucket: str, part: Part, done: int) -> Iterator[bytes]:
    first, last = part.at + done, part.at + part.size - 1
    with telling(bucket):
        answer = s3.get_object(
            Bucket=bucket, Key=part.listed.key, Range=f"bytes={first}-{last}", IfMatch=part.listed.etag
        )
        body, left = answer["Body"], last - first + 1
        try:
            if answer["ETag"] != part.listed.etag or answer["ContentLength"] != left:
                raise ObjectChanged("an object in S3 was changed while it was read")
            while left:
                piece = body.read(min(READ_BYTES, left))
                if not piece:
                    raise FetchBroken("S3 sent less than it announced")
                left -= len(piece)
                yield piece
        finally:
            body.close()


def _write(descriptor: int, piece: bytes, at: int) -> int:
    view, done = memoryview(piece), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], at + done)
    return done
