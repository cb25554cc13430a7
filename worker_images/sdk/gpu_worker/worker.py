"""The author's side: two decorators and `run`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gpu_worker import frames
from gpu_worker.output import captured, hushed
from gpu_worker.server import Health, Routes, listening
from gpu_worker.tasks import Tasks, describe, in_thread

if TYPE_CHECKING:
    from gpu_worker.sealed_session import SealedSession

HISTORY_BYTES = 8 << 20
_STOP_SECONDS = 1.0  # for tasks to end after SIGTERM
_EXIT_SECONDS = 2.0  # then the process ends, whatever still runs

Function = TypeVar("Function", bound=Callable[..., Any])


class Progress(Protocol):
    """Given to an `async def` load function."""

    async def __call__(self, stage: str, done: float, total: float | None = None) -> None: ...


class BlockingProgress(Protocol):
    """Given to a plain `def` load function."""

    def __call__(self, stage: str, done: float, total: float | None = None) -> None: ...


class Worker:
    """One worker process: it loads once, then runs tasks until SIGTERM."""

    def __init__(self) -> None:
        self._load_function: Callable[..., Any] | None = None
        self._task_function: Callable[..., Any] | None = None
        self._stop: Callable[[], Any] | None = None
        self._on_failure: Callable[[str], None] = lambda _: None
        self._hush: Callable[[], None] = lambda: None
        self.failure: str | None = None
        self.health = Health(session_id=None)

    def load(self, function: Function) -> Function:
        """Decorator for `load(progress)`, which runs before the worker is ready and returns `task.state`."""
        self._load_function = function
        return function

    def task(self, function: Function) -> Function:
        """Decorator for `run(task, emit)`. It may return a dict, the task's usage."""
        self._task_function = function
        return function

    def fail(self, reason: str) -> None:
        """End this worker: it cannot serve any more. From any thread; the first reason counts.

        Tasks that run have a second to end by themselves, then they end as failed with `worker_failed`. The
        process ends with status 1, and `reason` is the last line of its log.
        """
        if self.failure is None:
            self.failure = reason
            self._on_failure(reason)
            if self._stop is not None:
                self._stop()

    def tell(self, **figures: float) -> None:
        """Numbers that `GET /health` shows as `figures`, for people who look: how much is running, say."""
        self.health.figures.update(figures)

    def run(self) -> None:
        """Serve on GPU_WORKER_SOCKET until SIGTERM or SIGINT, or until `fail`."""
        path = os.environ.get("GPU_WORKER_SOCKET")
        if not path:
            sys.exit("GPU_WORKER_SOCKET is not set: it names the Unix socket to serve on")
        with contextlib.ExitStack() as output:
            if _is_sealed():
                self._hush = output.enter_context(hushed())
            output.enter_context(captured())
            asyncio.run(self._until_signal(Path(path)))
        if self.failure is not None:
            _exit_failed(self.failure)

    async def serve(
        self,
        path: Path,
        stop: asyncio.Event,
        *,
        session_id: str | None = None,
        history_bytes: int = HISTORY_BYTES,
        sealed: SealedSession | str | None = None,
    ) -> None:
        """Serve on the Unix socket `path` until `stop` is set, or until `fail`: then `failure` says why. This
        is `run` for those who have an event loop. `sealed` is the session's key pair; a text says why
        there is none though there should be, and the load fails with it."""
        if self._task_function is None:
            raise RuntimeError("no function is decorated with @worker.task")
        unable = sealed if isinstance(sealed, str) else None
        session = None if isinstance(sealed, str) else sealed
        sealed_key = session.public_key if session else None
        self.health = Health(session_id=session_id, sealed_key=sealed_key)
        loop = asyncio.get_running_loop()

        def stopping() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: what was to stop has stopped
                loop.call_soon_threadsafe(stop.set)

        self._stop = stopping
        if self.failure is not None:
            stop.set()
        async with asyncio.TaskGroup() as group:
            tasks = Tasks(group, history_bytes)
            app = Routes(self.health, tasks, self._task_function, session).application()
            async with listening(app, path):
                loading = group.create_task(self._load(unable), name="load")
                await stop.wait()
                loading.cancel()
                was_ready = self.health.status == "ready"
                self.health.status = "failed"
                self.health.message = self.failure or "the worker is stopping"
                if self.failure is None:
                    await tasks.stop(_STOP_SECONDS)
                    return
                if session is not None:
                    if was_ready:
                        self.health.message = "the worker failed"  # its own words may quote a task
                    else:  # its log is not read: health is where it is heard
                        await asyncio.sleep(_STOP_SECONDS)
                await tasks.fail(_STOP_SECONDS, self.failure)

    async def _until_signal(self, path: Path) -> None:
        stop = asyncio.Event()

        def stopping() -> None:
            stop.set()
            _exit_in(_EXIT_SECONDS, os._exit, 0)

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping)
        self._on_failure = lambda reason: _exit_in(_EXIT_SECONDS, _exit_failed, reason)
        await self.serve(
            path,
            stop,
            session_id=os.environ.get("GPU_SESSION_ID"),
            history_bytes=int(os.environ.get("GPU_WORKER_HISTORY_BYTES", HISTORY_BYTES)),
            sealed=_sealed_session() if _is_sealed() else None,
        )

    async def _load(self, unable: str | None) -> None:
        health = self.health
        if unable is not None:
            health.status, health.message = "failed", unable
            return
        try:
            if self._load_function is None:
                health.state = None
            elif inspect.iscoroutinefunction(self._load_function):
                health.state = await self._load_function(self._progress)
            else:
                load = self._load_function
                health.state = await in_thread("load", lambda: load(self._note_progress))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (author's code)
            traceback.print_exc()
            health.status, health.message = "failed", describe(error)
        else:
            self._hush()
            health.status = "ready"
        health.progress = None

    async def _progress(self, stage: str, done: float, total: float | None = None) -> None:
        self._note_progress(stage, done, total)
        await asyncio.sleep(0)

    def _note_progress(self, stage: str, done: float, total: float | None = None) -> None:
        self.health.progress = frames.progress_data(stage, done, total)


def _is_sealed() -> bool:
    return bool(os.environ.get("SEALED_KMS_KEY_ARN"))


def _sealed_session() -> SealedSession | str:
    """The key pair of this session; where it cannot be made, why."""
    try:
        # Not at the top: plain workers need none of its libraries.
        from gpu_worker.sealed_session import SealedSession

        return SealedSession.from_environment(os.environ)
    except Exception as error:  # noqa: BLE001 (its log is not read: what is lost here nobody hears)
        return f"this image cannot serve sealed sessions: {error}"


def _exit_in(seconds: float, way: Callable[[Any], Any], argument: object) -> None:
    """End the process after that long, whatever still runs."""
    guard = threading.Timer(seconds, way, (argument,))
    guard.daemon = True
    guard.start()


def _exit_failed(reason: str) -> None:
    """Nothing may run that could print after the reason, or wait for what is dead: no clean-up at exit."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or nobody reads it
                stream.flush()
        print(f"the worker failed: {reason}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)
