"""The contract's four routes, on a Unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web

from gpu_worker.emit import Emitter
from gpu_worker.errors import TaskError
from gpu_worker.frames import dumps
from gpu_worker.history import Dropped
from gpu_worker.sealed_record import Refused
from gpu_worker.tasks import Run, Task, Tasks

if TYPE_CHECKING:
    from gpu_worker.sealed_session import SealedSession

SEALED_TASK = "application/vnd.gpu-server.sealed"
_BODY_MAX = 65 << 20
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
    sealed_key: str | None = None
    state: Any = None


class Routes:
    """With a `sealed` session, tasks come sealed or not at all."""

    def __init__(
        self,
        health: Health,
        tasks: Tasks,
        function: Callable[..., Any],
        sealed: SealedSession | None = None,
    ) -> None:
        self._health = health
        self._tasks = tasks
        self._function = function
        self._sealed = sealed

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
                **({"sealed_key": health.sealed_key} if health.sealed_key else {}),
                **({"figures": health.figures} if health.figures else {}),
            },
            dumps=dumps,
        )

    async def submit(self, request: web.Request) -> web.StreamResponse:
        task_id = request.match_info["id"]
        is_sealed = request.content_type == SEALED_TASK
        body = await request.read()
        try:
            if self._sealed is not None and is_sealed:
                run = self._admit_sealed(self._sealed, task_id, body)
            elif self._sealed is None and not is_sealed:
                run = self._tasks.find(task_id) or self._admit(task_id, body)
            else:
                wanted = "tasks that are not sealed" if self._sealed is None else "sealed tasks only"
                raise Refused(415, f"this worker takes {wanted}")
        except Refused as refused:
            code = {} if refused.code is None else {"code": refused.code}
            return _refusal(refused.status, refused.message, **code)
        return await _stream(request, run, after=0)

    def _admit(self, task_id: str, body: bytes) -> Run:
        self._check_ready()
        try:
            metadata = _metadata(body)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        return self._tasks.start(Task(task_id, metadata, self._health.state), self._function)

    def _admit_sealed(self, session: SealedSession, task_id: str, body: bytes) -> Run:
        """The run of a sealed request: an earlier one, where the same bytes have come before."""
        request = session.read(body)
        known = session.record.task_of(request.request_id, request.enc)
        run = None
        if known is not None:
            run = self._tasks.find(known)
            if run is None:
                raise Refused(410, "the answer to this request is no longer kept", code="gone")
        named = self._tasks.find(task_id)
        if named is not None and named is not run:
            raise Refused(409, "another request came under this task id", code="replay")
        if run is not None:
            self._tasks.name(run, task_id)
            return run
        self._check_ready()
        metadata, sealer = session.open(request)
        session.record.add(request.request_id, request.enc, task_id)
        task = Task(task_id, metadata or {}, self._health.state)
        return self._tasks.start(task, _no_object if metadata is None else self._function, sealer)

    def _check_ready(self) -> None:
        if self._health.status != "ready":
            raise Refused(503, f"the worker is not ready: {self._health.status}")

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


async def _no_object(task: Task, emit: Emitter) -> None:
    """Runs in place of the author's function: only the sealed answer may say what was in the request."""
    raise TaskError("invalid_request", "what was sealed must be a JSON object")


def _metadata(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None
    metadata = document.get("metadata") if isinstance(document, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError('the body must be {"metadata": {...}}')
    return metadata


def _refusal(status: int, message: str, **more: int | str) -> web.Response:
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
