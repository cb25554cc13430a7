"""Where models come from, and the first such place: a file service that answers with a tar stream."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import IO, Final, Protocol

import aiohttp

from gpu_server.drivers.crew import Stop
from gpu_server.drivers.model_staging import Staging, StagingFault, in_thread, reason
from gpu_server.drivers.shared_work import Tell
from gpu_server.drivers.tally import Tally
from gpu_server.model_manifest import ManifestError, check_paths
from gpu_server.model_tar import Member, TarBroken, TarError, TarReader

STALL_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 10.0
WRITE_SECONDS: Final = 300.0
BLOCK_BYTES: Final = 512 << 10
"""Written at once: larger ones hold up everybody else's events on the loop."""


class ModelAbsent(Exception):
    """The source does not have this model."""


class FetchBroken(Exception):
    """It did not come whole; another try may do better. The message says what happened."""


class FetchRefused(Exception):
    """It cannot be had from there, however often one tries. The message says why, and holds no secret."""


class ModelSource(Protocol):
    """A place that has models. Its messages may be shown to everybody."""

    def origin(self, model_id: str) -> str:
        """What an interrupted download is known by: only the same origin goes on with it."""

    async def bring(self, model_id: str, staging: Staging, tell: Tell) -> Path:
        """Put the model's files into the staging, and give the folder that they are in. Raises `ModelAbsent`,
        `FetchBroken`, `FetchRefused`, or `StagingFault` when it is the store that cannot take them."""


class FileService:
    """`POST /api/models/download` with `{"model_id"}`, which answers a tar stream.

    It cannot go on where it broke: each try begins anew.
    """

    def __init__(self, url: str, key: str, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._url, self._key, self._stall = f"{url.rstrip('/')}/api/models/download", key, stall_seconds

    def origin(self, model_id: str) -> str:
        return f"{self._url} {model_id}"

    async def bring(self, model_id: str, staging: Staging, tell: Tell) -> Path:
        await in_thread(staging.clear)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=self._stall)
        headers = {"X-Internal-Key": self._key, "Accept-Encoding": "identity"}
        try:
            async with (
                aiohttp.ClientSession(
                    timeout=timeout, headers=headers, auto_decompress=False, read_bufsize=BLOCK_BYTES
                ) as session,
                # A redirect would take the key along.
                session.post(self._url, json={"model_id": model_id}, allow_redirects=False) as answer,
            ):
                _check_status(answer, model_id)
                await self._unpack(answer, staging, tell)
        except TimeoutError as error:
            raise FetchBroken(f"the file service sent nothing for {self._stall:g} s") from error
        except aiohttp.ClientError as error:
            raise FetchBroken(f"the connection to the file service broke ({type(error).__name__})") from error
        return await in_thread(lambda: _innermost(staging.files, model_id))

    async def _unpack(self, answer: aiohttp.ClientResponse, staging: Staging, tell: Tell) -> None:
        announced = answer.content_length
        if announced is not None:
            await in_thread(lambda: staging.require_room(announced))
        tally = Tally(announced, tell)
        unpacker, stop, block = Unpacker(staging, announced), Stop(), bytearray()
        try:
            while True:
                piece = await answer.content.readany()
                block += piece
                if len(block) >= BLOCK_BYTES or not piece:
                    await in_thread(partial(unpacker.feed, bytes(block), stop), limit=WRITE_SECONDS)
                    tally.add(len(block))
                    block.clear()
                if not piece:
                    break
            await in_thread(unpacker.finish)
        except TarBroken as error:
            raise FetchBroken(f"the file service's answer: {error}") from error
        except TarError as error:
            raise FetchRefused(f"the file service's answer is refused: {error}") from error
        finally:
            stop.set()  # a thread that was given up writes nothing more
            unpacker.close()


class Unpacker:
    """Writes a tar's files into a staging. Its methods block, and are called one after the other."""

    def __init__(self, staging: Staging, announced: int | None) -> None:
        self._staging, self._announced = staging, announced
        self._reader = TarReader(max_bytes=announced)
        self._paths: list[str] = []
        self._file: IO[bytes] | None = None

    def feed(self, block: bytes, stop: Stop) -> None:
        """Write what this block brings. Raises `TarError` or `StagingFault`."""
        try:
            for item in self._reader.feed(block):
                stop.check()
                if isinstance(item, Member):
                    self._begin(item)
                elif self._file is not None:
                    _write_all(self._file, item)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise TarError(f"{self._paths[-1]!r} is there twice, or both a file and a folder") from None
        except OSError as error:
            raise StagingFault(reason(error)) from error

    def finish(self) -> None:
        """The stream has ended. Raises `TarError`."""
        self.close()
        self._reader.finish()
        if not self._paths:
            raise TarError("there is no file in it")

    def close(self) -> None:
        """Let go of the file that is being written."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _begin(self, member: Member) -> None:
        self.close()
        self._paths.append(member.path)
        if self._announced is None:
            self._staging.require_room(member.size)
        path = self._staging.files / member.path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o644), "wb", buffering=0)


def _write_all(file: IO[bytes], content: memoryview) -> None:
    """On a disk that fills up a write may take a part, and only the next one fails."""
    while content:
        content = content[file.write(content) :]


def _check_status(answer: aiohttp.ClientResponse, model_id: str) -> None:
    status = answer.status
    if status == 404:
        raise ModelAbsent(model_id)
    if status in (401, 403):
        raise FetchRefused(f"the file service answered {status}: see FILE_SERVICE_INTERNAL_KEY")
    if status in (408, 425, 429) or status >= 500:
        raise FetchBroken(f"the file service answered {status}")
    if status != 200:
        raise FetchRefused(f"the file service answered {status}: see FILE_SERVICE_URL")
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise FetchRefused(f"the file service compressed its answer ({encoding[:40]}), unasked")


def _innermost(files: Path, model_id: str) -> Path:
    """Where the model is in what was unpacked: there, or in folders that are called as it is."""
    parts = model_id.split("/")
    for inner in (parts, parts[-1:]):
        at = files
        for part in inner:
            if [entry.name for entry in os.scandir(at)] != [part]:
                break
            at /= part
        else:
            if at.is_dir():
                return at
    return files


def check_names(paths: list[str]) -> None:
    """Whether these can be a model's files, its manifest aside. Raises `FetchRefused`."""
    try:
        check_paths(path for path in paths if path != "manifest.json")
    except ManifestError as error:
        raise FetchRefused(f"a file has a name that is refused: {error}") from error
