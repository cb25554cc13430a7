"""Where models come from, and the first such place: a file service that answers with a tar stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Final, Protocol

import aiohttp

from gpu_server.drivers.crew import PARTING_SECONDS, Stop
from gpu_server.drivers.model_staging import Staging, StagingFault, fault_of, in_thread
from gpu_server.drivers.shared_work import Tell
from gpu_server.drivers.tally import Tally
from gpu_server.model_manifest import ManifestError, check_paths
from gpu_server.model_tar import Member, TarBroken, TarError, TarReader

STALL_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 10.0
WRITE_SECONDS: Final = 300.0
BLOCK_BYTES: Final = 512 << 10
"""Written at once: larger ones hold up everybody else's events on the loop."""
QUEUED_BLOCKS: Final = 4
"""Received, and not written yet."""


class ModelAbsent(Exception):
    """The source does not have this model."""


class FetchBroken(Exception):
    """It did not come whole; another try may do better. The message says what happened."""


class FetchRefused(Exception):
    """It cannot be had from there, however often one tries. The message says why, and holds no secret. What
    has come is of no use then, unless it `keeps`: where it is not the model that is at fault."""

    def __init__(self, message: str, *, keeps: bool = False) -> None:
        super().__init__(message)
        self.keeps = keeps


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
        except aiohttp.ConnectionTimeoutError as error:
            message = f"the file service took no connection within {CONNECT_SECONDS:g} s"
            raise FetchBroken(message) from error
        except TimeoutError as error:
            raise FetchBroken(f"the file service sent nothing for {self._stall:g} s") from error
        except ValueError as error:  # an address that is none, in one of many ways
            message = f"the file service cannot be asked ({type(error).__name__}): see FILE_SERVICE_URL"
            raise FetchRefused(message, keeps=True) from error
        except aiohttp.ClientError as error:
            raise FetchBroken(f"the connection to the file service broke ({type(error).__name__})") from error
        return await in_thread(lambda: _innermost(staging.files, model_id))

    async def _unpack(self, answer: aiohttp.ClientResponse, staging: Staging, tell: Tell) -> None:
        announced = answer.content_length
        if announced is not None:
            await in_thread(lambda: staging.require_room(announced))
        tally, block = Tally(announced, tell), bytearray()
        try:
            async with writing(Unpacker(staging, announced), tally) as writer:
                while piece := await answer.content.readany():
                    block += piece
                    if len(block) >= BLOCK_BYTES:
                        await writer.put(bytes(block))
                        block.clear()
                if block:
                    await writer.put(bytes(block))
                await writer.finish()
        except TarBroken as error:
            raise FetchBroken(f"the file service's answer: {error}") from error
        except TarError as error:
            raise FetchRefused(f"the file service's answer is refused: {error}") from error


@asynccontextmanager
async def writing(unpacker: Unpacker, tally: Tally) -> AsyncIterator[Writer]:
    """A writer, which writes nothing more afterwards, as a rule: its thread is waited for, for a moment."""
    writer = Writer(unpacker, tally)
    try:
        yield writer
    finally:
        await writer.stop()


class Writer:
    """One thread that unpacks what it is handed, block after block, and closes what it has opened. A few
    blocks wait for it at most."""

    def __init__(self, unpacker: Unpacker, tally: Tally) -> None:
        self._unpacker, self._tally = unpacker, tally
        self._loop = asyncio.get_running_loop()
        self._blocks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(QUEUED_BLOCKS)
        self._stop, self._ended = Stop(), asyncio.Event()
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name="model-writer", daemon=True).start()

    async def put(self, block: bytes) -> None:
        """Hand it a block, which is not empty, when there is room. Raises `TarError` or `StagingFault`, also
        for an earlier one."""
        await _in_time(self._room.acquire())
        if self._failure is not None:
            raise self._failure
        self._blocks.put(block)

    async def finish(self) -> None:
        """That was all; wait until it is written. Raises as `put` does."""
        self._blocks.put(b"")
        await _in_time(self._ended.wait())
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Write nothing more. Raises nothing."""
        self._stop.set()
        self._blocks.put(b"")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                await self._ended.wait()

    def _run(self) -> None:
        try:
            try:
                while block := self._blocks.get():
                    self._unpacker.feed(block, self._stop)
                    self._tally.add(len(block))
                    self._post(self._room.release)
                self._stop.check()
                self._unpacker.finish()
            finally:
                self._unpacker.close()
        except Exception as error:  # noqa: BLE001 -- it crosses to who hands over the blocks
            self._failure = error
        self._post(self._ended.set)
        self._post(self._room.release)  # who waits for room is told

    def _post(self, news: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(news)


class Unpacker:
    """Writes a tar's files into a staging. Its methods block, and are for one thread."""

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
            raise fault_of(error) from error

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


async def _in_time(wait: Coroutine[Any, Any, bool]) -> None:
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await wait
    except TimeoutError:
        raise StagingFault(f"the file system did not answer within {WRITE_SECONDS:g} s") from None


def _write_all(file: IO[bytes], content: memoryview) -> None:
    """On a disk that fills up a write may take a part, and only the next one fails."""
    while content:
        content = content[file.write(content) :]


def _check_status(answer: aiohttp.ClientResponse, model_id: str) -> None:
    status = answer.status
    if status == 404:
        raise ModelAbsent(model_id)
    if status in (401, 403):
        raise FetchRefused(f"the file service answered {status}: see FILE_SERVICE_INTERNAL_KEY", keeps=True)
    if status in (408, 425, 429) or status >= 500:
        raise FetchBroken(f"the file service answered {status}")
    if status != 200:
        raise FetchRefused(f"the file service answered {status}: see FILE_SERVICE_URL", keeps=True)
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        shown = encoding[:40].encode("ascii", "backslashreplace").decode()  # it may be no text at all
        raise FetchRefused(f"the file service compressed its answer ({shown}), unasked")


def _innermost(files: Path, model_id: str) -> Path:
    """Where the model is in what was unpacked: there, or in folders that are called as it is."""
    parts = model_id.split("/")
    for inner in (parts, parts[-1:]):
        at = files
        for part in inner:
            # A file may be called like an organisation, too.
            if [entry.name for entry in os.scandir(at)] != [part] or not (at / part).is_dir():
                break
            at /= part
        else:
            return at
    return files


def check_names(paths: list[str]) -> None:
    """Whether these can be a model's files, its manifest aside. Raises `FetchRefused`."""
    try:
        check_paths(path for path in paths if path != "manifest.json")
    except ManifestError as error:
        raise FetchRefused(f"a file has a name that is refused: {error}") from error
