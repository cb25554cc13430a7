"""Speaks the `http` worker contract over one session's Unix socket, with a worker that may be hostile.

The socket is reached through a descriptor that pins it (see run_folder.py), so a worker that swaps it later
swaps nothing. Every answer is bounded in size, and everything but a task's stream in time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from gpu_server.frames import FrameReader, ProtocolFault

MAX_ANSWER_BYTES = 64 * 1024
MAX_EVENT_NUMBER = 10**15 - 1  # as many digits as the grammar of frames has
LAST_BYTE_SECONDS = 0.05
WORKER_KEY_BYTES = 32  # X25519, RFC 7748
_CALL = aiohttp.ClientTimeout(total=5)
_STREAM = aiohttp.ClientTimeout(total=None, sock_connect=5)


class LinkBroken(Exception):
    """The connection failed or ended early. The task goes on in the worker; attach again."""


class TaskRefused(Exception):
    """The worker answered, and did not take the task. `status` is that of its answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WorkerNotReady(TaskRefused):
    """The worker takes no task now: it has begun to stop, say."""


class TaskUnknown(TaskRefused):
    """The worker has never had this task, or has forgotten it."""


_REFUSALS = {("GET", 404): TaskUnknown, ("POST", 503): WorkerNotReady}


class EventsDropped(Exception):
    """The worker has the task, but its events before `oldest` are gone."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"the worker has dropped the events before {oldest}")
        self.oldest = oldest


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHealth:
    """What a worker says of itself. `status` is `loading`, `ready` or `failed`; `sealed_key` is its public
    key in base64, where it serves sealed tasks."""

    status: str
    message: str | None
    stage: str | None
    done: float
    total: float | None
    sealed_key: str | None


class WorkerLink:
    """One session's worker, reached at `path`.

    `uid` is who must be listening there, or None where the service cannot know.
    """

    def __init__(self, path: str, *, session_id: str, uid: int | None) -> None:
        self._path, self._session_id, self._uid = path, session_id, uid
        connector = aiohttp.UnixConnector(path=path, limit=0, keepalive_timeout=30)
        self._http = aiohttp.ClientSession(
            "http://worker",
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),  # what a worker wants kept is not kept
            auto_decompress=False,
            read_bufsize=1 << 18,
        )

    async def close(self) -> None:
        await self._http.close()

    def check_listener(self) -> None:
        """Make sure that this slot's worker is who listens, before anything is sent: SO_PEERCRED of a Unix
        socket names who called listen(). Raises `LinkBroken`, or `ProtocolFault` when it is someone else."""
        if self._uid is None or not hasattr(socket, "SO_PEERCRED"):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self._path)
            except OSError as error:
                raise LinkBroken(f"nobody listens: {error!r}") from error
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid = struct.unpack("3i", credentials)[1]
        if uid != self._uid:
            raise ProtocolFault(f"uid {uid} listens on the worker's socket, not uid {self._uid}")

    async def health(self) -> WorkerHealth:
        """Raises `LinkBroken` when nobody answers yet, `ProtocolFault` when the wrong one does."""
        try:
            async with self._http.get("/health", timeout=_CALL, allow_redirects=False) as answer:
                raw = await _bounded(answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LinkBroken(f"no health answer: {error!r}") from error
        try:
            data = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise ProtocolFault("the health answer is not JSON") from None
        return self._health_of(data)

    async def run(
        self,
        task_id: str,
        body: bytes,
        reader: FrameReader,
        accepted: Callable[[], None] | None = None,
        *,
        media_type: str = "application/json",
    ) -> None:
        """Give the task to the worker and pass its events to `reader` until the stream ends. `accepted` is
        called, once, when the worker has the task for certain.

        Raises `LinkBroken`, `TaskRefused` (of which `WorkerNotReady` may pass), `EventsDropped`,
        `ProtocolFault`, or what the reader raises.
        """
        headers = {"Content-Type": media_type}
        await self._stream("POST", f"/tasks/{task_id}", reader, accepted, data=body, headers=headers)

    async def attach(
        self, task_id: str, reader: FrameReader, accepted: Callable[[], None] | None = None
    ) -> None:
        """Take up the stream of a task behind the last event that `reader` has. Raises as `run`, and
        `TaskUnknown`."""
        reader.reconnected()
        await self._stream("GET", f"/tasks/{task_id}/events?after={reader.seq}", reader, accepted)

    async def cancel(self, task_id: str) -> None:
        """Ask the worker to stop the task, on a connection of its own. Raises `LinkBroken`, or `TaskRefused`
        when it does not know the task."""
        try:
            async with self._http.delete(f"/tasks/{task_id}", timeout=_CALL, allow_redirects=False) as answer:
                if answer.status >= 400:
                    raise TaskRefused(f"the worker answered {answer.status} to DELETE", answer.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LinkBroken(f"cancel was not delivered: {error!r}") from error

    async def _stream(
        self,
        method: str,
        url: str,
        reader: FrameReader,
        accepted: Callable[[], None] | None,
        **request: Any,
    ) -> None:
        try:
            async with self._http.request(
                method, url, timeout=_STREAM, allow_redirects=False, **request
            ) as answer:
                if answer.status == 410:
                    async with asyncio.timeout(_CALL.total):
                        raw = await _bounded(answer)
                    if method == "POST" and _says_nothing_is_kept(raw):
                        raise TaskRefused("the worker keeps nothing of the task's events", answer.status)
                    raise EventsDropped(_oldest_of(raw, reader.seq))
                if answer.status != 200:
                    refusal = _REFUSALS.get((method, answer.status), TaskRefused)
                    raise refusal(f"the worker answered {answer.status} to {method}", answer.status)
                if accepted is not None:
                    accepted()
                async for chunk in answer.content.iter_any():
                    reader.feed(chunk)
                    if reader.end is not None:
                        await _finish(answer)
                        return
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LinkBroken(f"the stream broke: {error!r}") from error
        if reader.end is None:
            raise LinkBroken("the stream ended before the task did")

    def _health_of(self, data: Any) -> WorkerHealth:
        if not isinstance(data, dict) or data.get("status") not in ("loading", "ready", "failed"):
            raise ProtocolFault("the health answer has no valid status")
        if data.get("session_id") != self._session_id:
            raise ProtocolFault("the worker's socket answers for another session")
        progress = data.get("progress")
        if not isinstance(progress, dict):
            progress = {}
        stage, done, total = progress.get("stage"), progress.get("done"), progress.get("total")
        message = data.get("message")
        return WorkerHealth(
            status=data["status"],
            message=message[:2000] if isinstance(message, str) else None,
            stage=stage[:200] if isinstance(stage, str) else None,
            done=done if isinstance(done, int | float) else 0,
            total=total if isinstance(total, int | float) else None,
            sealed_key=_sealed_key_of(data),
        )


async def _finish(answer: aiohttp.ClientResponse) -> None:
    """Nothing may come any more. A moment for the response's own end, so that its connection can be used
    again; the task's end does not wait for a worker that keeps it open."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(LAST_BYTE_SECONDS):
            if await answer.content.readany():
                raise ProtocolFault("bytes came after `end`")


def _sealed_key_of(data: dict[str, Any]) -> str | None:
    key = data.get("sealed_key")
    if key is None:
        return None
    try:
        raw = base64.b64decode(key, validate=True)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != WORKER_KEY_BYTES or base64.b64encode(raw).decode() != key:
        raise ProtocolFault(f"the worker's sealed_key is not {WORKER_KEY_BYTES} bytes in base64")
    return str(key)


def _says_nothing_is_kept(raw: bytes) -> bool:
    """Whether a 410 names no event that is kept: of a sealed task that ran, under this id or another."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return False
    return isinstance(data, dict) and "oldest" not in data


def _oldest_of(raw: bytes, seq: int) -> int:
    """The first event that is still kept, from the body of a 410 to who has the events up to `seq`."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise ProtocolFault("the body of a 410 is not JSON") from None
    oldest = data.get("oldest") if isinstance(data, dict) else None
    if type(oldest) is not int or not seq + 1 < oldest <= MAX_EVENT_NUMBER:
        raise ProtocolFault(f"a 410 behind event {seq} names {str(oldest)[:80]!r} as the oldest one kept")
    return oldest


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in answer.content.iter_any():
        raw += chunk
        if len(raw) > MAX_ANSWER_BYTES:
            raise ProtocolFault(f"an answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(raw)
