"""The contract's four routes, on a Unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from gpu_worker.frames import dumps
from gpu_worker.history import Dropped
from gpu_worker.tasks import Run, Task, Tasks

_BODY_MAX = 64 << 20
_CLOSE_SECONDS = 0.5  # for streams that are still being read when the worker stops


@dataclass(slots=True, kw_only=True)
class Health:
    """What `GET /health` answers. `state` is what tasks are given; it is there once the status is ready.
    `figures` are for people who look; the service does not read them."""

    session_id: str | None
    status: Literal["loading", "ready", "failed"] = "loading"
    progress: dict[str, Any] | None = None
    message: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    state: Any = None


class Routes:
    def __init__(self, health: Health, tasks: Tasks, function: Callable[..., Any]) -> None:
        self._health = health
        self._tasks = tasks
        self._function = function

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_BODY_MAX)
        app.router.add_get("/health", self.health)
        app.router.add_post("/tasks/{id}", self.submit)
        app.router.add_get("/tasks/{id}/events", self.events)
        app.router.add_delete("/tasks/{id}", self.cancel)
        return app

    async def health(self, request: web.Request) -> web.Response:
        health = self._health
        return web.json_response(
            {
                "status": health.status,
                "session_id": health.session_id,
                "progress": health.progress,
                "message": health.message,
                **({"figures": health.figures} if health.figures else {}),
            },
            dumps=dumps,
        )

    async def submit(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        run = self._tasks.find(request.match_info["id"])
        if run is None:
            if self._health.status != "ready":
                return _refusal(503, f"the worker is not ready: {self._health.status}")
            try:
                metadata = _metadata(body)
            except ValueError as error:
                return _refusal(400, str(error))
            task = Task(request.match_info["id"], metadata, self._health.state)
            run = self._tasks.start(task, self._function)
        return await _stream(request, run, after=0)

    async def events(self, request: web.Request) -> web.StreamResponse:
        run = self._tasks.find(request.match_info["id"])
        if run is None:
            return _refusal(404, "unknown task")
        after = request.query.get("after", "0")
        if not (after.isascii() and after.isdecimal() and len(after) < 19):
            return _refusal(400, "after must be a whole number")
        return await _stream(request, run, int(after))

    async def cancel(self, request: web.Request) -> web.Response:
        run = self._tasks.find(request.match_info["id"])
        if run is None:
            return _refusal(404, "unknown task")
        run.cancel()
        return web.Response(status=202)


async def _stream(request: web.Request, run: Run, after: int) -> web.StreamResponse:
    """Write whatever is ready in one write, again and again. Losing the reader only ends this."""
    try:
        reader = run.history.reader(after)
    except Dropped as dropped:
        return _refusal(410, str(dropped), oldest=dropped.oldest)
    with reader:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        try:
            while data := await reader.ready():
                await response.write(data)
                reader.took()
        except Dropped:  # a reader that was slower than another one; it must see a cut, not an end
            if request.transport is not None:
                request.transport.abort()
            return response
        await response.write_eof()
    return response


def _metadata(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None
    metadata = document.get("metadata") if isinstance(document, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError('the body must be {"metadata": {...}}')
    return metadata


def _refusal(status: int, message: str, **more: int) -> web.Response:
    return web.json_response({"error": message, **more}, status=status, dumps=dumps)


@contextlib.asynccontextmanager
async def listening(app: web.Application, path: Path) -> AsyncIterator[None]:
    """Serve `app` on the Unix socket `path`, which appears when it can be connected to."""
    # A reader that goes away ends its handler at once; tasks run elsewhere and do not notice.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_CLOSE_SECONDS)
    await runner.setup()
    try:
        await web.SockSite(runner, _bound_beside(path)).start()
        os.rename(_beside(path), path)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        await runner.cleanup()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + "~")


def _bound_beside(path: Path) -> socket.socket:
    beside = _beside(path)
    beside.unlink(missing_ok=True)
    unix = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:  # by way of the folder's descriptor, because a socket's path may have 107 bytes only
        unix.bind(f"/proc/self/fd/{folder}/{beside.name}" if len(bytes(beside)) > 107 else str(beside))
    except BaseException:
        unix.close()
        raise
    finally:
        os.close(folder)
    return unix
