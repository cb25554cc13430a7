"""The tasks of this worker: started once for each id, kept for those who attach later, forgotten when old."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from gpu_worker import frames
from gpu_worker.emit import BlockingEmitter, Emitter
from gpu_worker.errors import TaskError
from gpu_worker.frames import Status
from gpu_worker.history import History
from gpu_worker.output import TaskOutput, current
from gpu_worker.sealed_history import SealedHistory, Sealer

FINISHED_MAX = 64  # finished tasks that are remembered
FINISHED_BYTES = 64 << 20  # and how much their frames may take together
NAMES_MAX = 64  # ids of one run
_MESSAGE_MAX = 4000


class Task:
    """What an author's function is given. `state` is what the load function returned."""

    def __init__(self, id: str, metadata: dict[str, Any], state: Any) -> None:
        self.id = id
        self.metadata = metadata
        self.state = state
        self.cancelled = False


class Run:
    """One call of the author's function. `names` are the ids that it is found by."""

    def __init__(self, task: Task, history: History, *, private: bool = False) -> None:
        self.task = task
        self.history = history
        self.names = [task.id]
        self._output = TaskOutput(history, private=private)
        self._asyncio_task: asyncio.Task[None] | None = None
        self._in_thread = False

    def start(self, group: asyncio.TaskGroup, function: Callable[..., Any]) -> asyncio.Task[None]:
        self._in_thread = not inspect.iscoroutinefunction(function)
        self._asyncio_task = group.create_task(self._execute(function), name=f"task {self.task.id}")
        return self._asyncio_task

    def cancel(self) -> None:
        """Ask the function to stop. A thread cannot be interrupted: it hears of it when it next emits."""
        self.task.cancelled = True
        self.history.release()
        if not self._in_thread:
            self.abandon()

    def abandon(self) -> None:
        """Stop waiting for the function, also where it runs in a thread."""
        self.task.cancelled = True
        if self._asyncio_task is not None:
            # Not at once: an asyncio task cancelled before its first step never runs, nor says its end.
            asyncio.get_running_loop().call_soon(self._asyncio_task.cancel)

    def end(self, status: Status, frame: bytes) -> None:
        self.history.end(*self._output.rest(), frame, status=status)

    async def _execute(self, function: Callable[..., Any]) -> None:
        current.set(self._output)
        usage: dict[str, Any] | None = None
        status: Status = "failed"
        try:
            usage = await self._call(function)
            frame = frames.end("completed", usage=_checked(usage))
            status = "completed"
        except TaskError as error:
            frame = frames.end("failed", (str(error.code), str(error.message)[:_MESSAGE_MAX]))
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 (author's code)
            usage = None
            if not self.task.cancelled:
                self._show_traceback()
            frame = frames.end("failed", ("task_failed", describe(error)))
        if self.task.cancelled:
            status, frame = "cancelled", frames.end("cancelled", usage=usage)
        self.end(status, frame)

    def _show_traceback(self) -> None:
        if self._output.private:  # also where sys.stderr is not captured
            self._output.write("stderr", traceback.format_exc())
        else:
            traceback.print_exc()

    async def _call(self, function: Callable[..., Any]) -> Any:
        if not self._in_thread:
            return await function(self.task, Emitter(self.history))
        emit = BlockingEmitter(self.history, lambda: self.task.cancelled)
        return await in_thread(f"task {self.task.id}", lambda: function(self.task, emit))


class Tasks:
    """All runs by their id. Its asyncio tasks belong to `group`."""

    def __init__(self, group: asyncio.TaskGroup, history_bytes: int) -> None:
        self._group = group
        self._history_bytes = history_bytes
        self._runs: dict[str, Run] = {}
        self._running: dict[asyncio.Task[None], Run] = {}
        self._finished: deque[Run] = deque()

    def find(self, task_id: str) -> Run | None:
        return self._runs.get(task_id)

    def start(self, task: Task, function: Callable[..., Any], sealer: Sealer | None = None) -> Run:
        """Run it. With a `sealer`, all that it says goes out sealed, and nowhere else."""
        limit = self._history_bytes
        history = History(limit) if sealer is None else SealedHistory(limit, sealer)
        run = Run(task, history, private=sealer is not None)
        self._runs[task.id] = run
        asyncio_task = run.start(self._group, function)
        self._running[asyncio_task] = run
        asyncio_task.add_done_callback(self._has_finished)
        return run

    def name(self, run: Run, task_id: str) -> None:
        """Let a run be found by another id too, for as long as it is kept; the id must name no other run. Of
        too many the first and the newest stay."""
        if task_id not in run.names:
            run.names.append(task_id)
            self._runs[task_id] = run
        if len(run.names) > NAMES_MAX:
            del self._runs[run.names.pop(1)]

    async def stop(self, seconds: float) -> None:
        """Cancel what runs, and end its streams after `seconds` at the latest."""
        for run in self._running.values():
            run.cancel()
            run.abandon()
        if self._running:
            await asyncio.wait(list(self._running), timeout=seconds)
        for run in self._running.values():
            run.end("cancelled", frames.end("cancelled"))

    async def fail(self, seconds: float, reason: str) -> None:
        """Let what runs end by itself, which knows better why; after `seconds` all of it ends as failed."""
        if self._running:
            await asyncio.wait(list(self._running), timeout=seconds)
        for run in self._running.values():
            run.end("failed", frames.end("failed", ("worker_failed", reason[:_MESSAGE_MAX])))
            run.cancel()
            run.abandon()

    def _has_finished(self, asyncio_task: asyncio.Task[None]) -> None:
        self._finished.append(self._running.pop(asyncio_task))
        size = sum(run.history.size for run in self._finished)
        while len(self._finished) > FINISHED_MAX or (size > FINISHED_BYTES and len(self._finished) > 1):
            oldest = self._finished.popleft()
            size -= oldest.history.size
            for name in oldest.names:
                del self._runs[name]


async def in_thread(name: str, call: Callable[[], Any]) -> Any:
    """Run `call` in a thread of its own, with this context. The thread is a daemon: what never returns cannot
    keep the process from ending."""
    outcome: Future[tuple[Any, BaseException | None]] = Future()
    outcome.set_running_or_notify_cancel()

    def body() -> None:
        try:
            outcome.set_result((call(), None))
        except BaseException as error:  # noqa: BLE001 (raised again below)
            outcome.set_result((None, error))

    threading.Thread(target=contextvars.copy_context().run, args=(body,), name=name, daemon=True).start()
    value, error = await asyncio.wrap_future(outcome)
    if error is not None:
        raise error
    return value


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MESSAGE_MAX]


def _checked(usage: Any) -> dict[str, Any] | None:
    if usage is not None and not isinstance(usage, dict):
        raise TypeError(f"a task returns a dict (its usage) or None, not {type(usage).__name__}")
    return usage
