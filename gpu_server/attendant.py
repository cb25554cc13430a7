"""Attendants: one for each session that has a container, holding everything the service does for it.

It starts the worker, tells the engine what becomes of it, carries tasks to it and their events back into
their streams. It decides nothing: what it sees, it reports as an event. `close` ends all of that and leaves
the container to the wash.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from gpu_server.core import events as ev
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.sessions import CloseReason, TaskState
from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.run_folder import ConnectPath, RunFolders
from gpu_server.drivers.worker_link import LinkBroken, TaskRefused, WorkerLink
from gpu_server.exec_output import ExecOutput
from gpu_server.frames import FrameReader, ProtocolFault
from gpu_server.ports import (
    ContainerRuntime,
    Contract,
    CreatedWorker,
    Output,
    RunFolder,
    RunFolderFault,
    RuntimeUnreachable,
    StartRefused,
    WorkerExit,
    WorkerSpec,
)
from gpu_server.stream import Stream

LOG_TAIL_BYTES = 64 * 1024
FIRST_POLL_SECONDS = 0.01
LOADING_POLL_SECONDS = 0.1
CANCEL_RETRY_SECONDS = 0.1
MODEL_LOOKUP_SECONDS = 30.0
EXEC_PIECE_BYTES = 4096
EXIT_NEWS_SECONDS = 2.0
REATTACH_TRIES = 3

log = structlog.get_logger()


class Host(Protocol):
    """What an attendant needs of the engine."""

    def report(self, event: ev.Event) -> None: ...

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to start one worker. `find_model` may block for long, on a network file system: it gets a thread.
    `spec` is asked for when the run folder exists."""

    session_id: str
    image: str
    contract: Contract
    uid: int
    task_input: bytes | None
    find_model: Callable[[], Path | None]
    spec: Callable[[RunFolder, Path | None], WorkerSpec]


class Attendant:
    """Serves one session's worker from its start until `close`."""

    def __init__(self, plan: Plan, runtime: ContainerRuntime, folders: RunFolders, host: Host) -> None:
        self.plan = plan
        self._runtime, self._folders, self._host = runtime, folders, host
        self._log = log.bind(session_id=plan.session_id)
        self._tasks: set[asyncio.Task[None]] = set()
        self._exited: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self._spec: WorkerSpec | None = None
        self._worker: CreatedWorker | None = None
        self._socket: ConnectPath | None = None
        self._link: WorkerLink | None = None
        self._start: asyncio.Task[None] | None = None
        self._creating: asyncio.Task[None] | None = None
        self._output: asyncio.Task[None] | None = None
        self._relays: dict[str, asyncio.Task[None]] = {}
        self._tail = bytearray()
        self._exec_bytes = 0
        self._started = False
        self._ready = False
        self._closing = False

    # -- what the engine asks for ---------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the worker up; comes back as WorkerCreated and WorkerReady, or WorkerLost."""
        self._start = self._spawn("start", self._bring_up())

    def send(self, task_id: str, body: bytes, stream: Stream) -> None:
        """Run a task; comes back as TaskEnded, or WorkerLost."""
        work = self._run_exec if self.plan.contract is Contract.EXEC else self._run_http
        relay = self._relays[task_id] = self._spawn(f"task {task_id}", work(task_id, body, stream))
        relay.add_done_callback(lambda _: self._relays.pop(task_id))

    def cancel(self, task_id: str) -> None:
        """Ask the worker to stop a task."""
        self._spawn(f"cancel {task_id}", self._cancel(task_id))

    def heard_exit(self, exit_: WorkerExit) -> None:
        """The runtime says that the worker's process has ended."""
        if not self._exited.done() and not self._closing:
            self._exited.set_result(exit_)
            self._spawn("exit", self._report_exit(exit_))

    def check_folder(self) -> None:
        """Look whether the worker keeps its run folder within bounds."""
        if self._spec is None or self._closing:
            return
        try:
            self._folders.check(self._spec.folder)
        except OSError as error:
            # Ours, such as too few descriptors: the worker is not to blame, and the next round looks again.
            self._log.warning("run_folder.unreadable", reason=str(error))
        except RunFolderFault as fault:
            self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.RUN_FOLDER_FAULT, str(fault))

    async def close(self) -> None:
        """Stop everything this attendant does. The container is left to the wash.

        A creation that is under way is waited for: a container that appeared after the wash had looked would
        belong to nobody.
        """
        self._closing = True
        if self._creating is not None:
            await asyncio.wait([self._creating])
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._unpin()
        if self._worker is not None:
            self._worker.output.close()

    # -- starting -------------------------------------------------------------------------------------------

    async def _bring_up(self) -> None:
        try:
            await self._bring_up_or_raise()
        except StartRefused as refused:
            self._lost(CloseReason.START_FAILED, refused.code, refused.message)
        except RuntimeUnreachable as error:
            self._lost(CloseReason.START_FAILED, FailureCode.RUNTIME_UNREACHABLE, str(error))
        except RunFolderFault as fault:
            self._lost(CloseReason.START_FAILED, FailureCode.RUN_FOLDER_FAULT, str(fault))
        except ProtocolFault as fault:
            self._lost(CloseReason.START_FAILED, FailureCode.WORKER_PROTOCOL, str(fault))
        except OSError as error:
            self._lost(CloseReason.START_FAILED, FailureCode.START_FAILED, f"run folder: {error}")

    async def _bring_up_or_raise(self) -> None:
        plan, session_id = self.plan, self.plan.session_id
        self._stage("model")
        try:
            model = await call_in_thread(plan.find_model, limit=MODEL_LOOKUP_SECONDS, name="find-model")
        except TimeoutError:
            message = f"the model store did not answer within {MODEL_LOOKUP_SECONDS:g} s"
            raise StartRefused(FailureCode.MODEL_MISSING, message) from None
        self._stage("image")
        await self._runtime.require_image(plan.image)
        self._stage("container")
        self._worker, spec = await self._create(model)
        if self._closing:
            return  # `close` has waited for the container, so that the wash finds it: nothing starts it now
        self._host.report(ev.WorkerCreated(session_id=session_id, container_id=self._worker.container_id))
        if plan.contract is Contract.HTTP:
            self._output = self._spawn("output", self._keep_tail(self._worker))
            await self._runtime.start(spec.name)
            self._started = True
            self._stage("loading")
            await self._until_ready(spec)
        self._ready = True
        self._host.report(ev.WorkerReady(session_id=session_id))

    async def _create(self, model: Path | None) -> tuple[CreatedWorker, WorkerSpec]:
        """Make run folder and container in a task of its own, which `close` waits for, never cancels."""
        made: asyncio.Future[tuple[CreatedWorker, WorkerSpec]] = asyncio.get_running_loop().create_future()
        plan = self.plan

        async def create() -> None:
            try:
                folder = await asyncio.to_thread(
                    self._folders.create, plan.session_id, plan.uid, plan.task_input
                )
                self._spec = plan.spec(folder, model)
                self._worker = await self._runtime.create(self._spec)
                made.set_result((self._worker, self._spec))
            except Exception as error:  # noqa: BLE001  # the start, which waits for this, tells what it was
                made.set_exception(error)
                made.exception()  # so that nobody complains when the start was cancelled meanwhile

        self._creating = self._host.spawn(f"{plan.session_id}: create", create())
        return await asyncio.shield(made)

    async def _until_ready(self, spec: WorkerSpec) -> None:
        """Wait for the socket, then for `ready`. The start deadline is the core's; an exit ends this task."""
        told: tuple[str, float] | None = None
        pause = FIRST_POLL_SECONDS
        while True:
            try:
                health = await (await self._connect(spec)).health()
            except LinkBroken:
                await asyncio.sleep(pause)
                pause = min(1.1 * pause, LOADING_POLL_SECONDS)
                continue
            if health.status == "ready":
                return
            if health.status == "failed":
                message = health.message or "the worker could not load"
                raise StartRefused(FailureCode.START_FAILED, message)
            if health.stage is not None and told != (health.stage, health.done):
                told = (health.stage, health.done)
                self._stage("loading", health.done, health.total)
            await asyncio.sleep(LOADING_POLL_SECONDS)

    async def _connect(self, spec: WorkerSpec) -> WorkerLink:
        """The link to the worker's socket. Raises `LinkBroken` while nobody listens there."""
        if self._socket is None:
            self._socket = self._folders.connect_path(spec.folder)
            if self._socket is None:
                raise LinkBroken("the worker has no socket yet")
        if self._link is None:
            uid = spec.uid if self._runtime.name == "docker" else os.geteuid()
            link = WorkerLink(self._socket.path, session_id=spec.session_id, uid=uid)
            self._link = link
        try:
            self._link.check_listener()
        except LinkBroken:
            await self._unpin()  # it may have made its socket anew: look again next time
            raise
        return self._link

    async def _unpin(self) -> None:
        if self._link is not None:
            await self._link.close()
        if self._socket is not None:
            self._socket.close()
        self._link = self._socket = None

    def _stage(self, stage: str, done: float = 0, total: float | None = None) -> None:
        self._host.report(
            ev.StageReached(session_id=self.plan.session_id, stage=stage, done=done, total=total)
        )

    # -- tasks ----------------------------------------------------------------------------------------------

    async def _run_http(self, task_id: str, body: bytes, stream: Stream) -> None:
        """Send the task and relay its events; a broken connection is taken up again, a dead worker is not."""
        assert self._link is not None
        reader = FrameReader(stream)
        tries = 0
        while reader.end is None:
            seen = reader.seq
            try:
                if reader.seq == 0:
                    await self._link.run(task_id, body, reader)  # again, too: a known id runs once
                else:
                    await self._link.attach(task_id, reader)
            except TaskRefused as refused:
                if reader.seq == 0:
                    self._ended(
                        task_id,
                        TaskState.FAILED,
                        Failure(code=FailureCode.WORKER_PROTOCOL, message=str(refused)),
                    )
                    return
                self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.WORKER_PROTOCOL, str(refused))
                return
            except ProtocolFault as fault:
                self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.WORKER_PROTOCOL, str(fault))
                return
            except LinkBroken as broken:
                if reader.end is not None:
                    break  # it has said all there is to say
                if await self._exit_is_near():
                    return  # `_report_exit` tells what happened, to all tasks at once
                tries = 1 if reader.seq > seen else tries + 1
                if tries > REATTACH_TRIES:
                    self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.WORKER_UNREACHABLE, str(broken))
                    return
        state, failure, usage = reader.end
        self._host.report(
            ev.TaskEnded(
                session_id=self.plan.session_id, task_id=task_id, state=state, failure=failure, usage=usage
            )
        )

    async def _run_exec(self, task_id: str, body: bytes, stream: Stream) -> None:
        """Start the container, read its output to the end, and let its exit code decide."""
        assert self._worker is not None
        output = ExecOutput(stream)
        try:
            await self._runtime.start(self._worker.name)
            self._started = True
        except StartRefused as refused:
            self._lost(CloseReason.START_FAILED, refused.code, refused.message)
            return
        except RuntimeUnreachable as error:
            self._lost(CloseReason.START_FAILED, FailureCode.RUNTIME_UNREACHABLE, str(error))
            return
        reading = self._spawn("exec output", self._read_exec(self._worker, output))
        either: list[asyncio.Future[Any]] = [reading, self._exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        # All that was written is read; but what the program left behind may hold its output open in silence.
        seen = -1
        while not reading.done() and seen != self._exec_bytes:
            seen = self._exec_bytes
            await asyncio.wait([reading], timeout=EXIT_NEWS_SECONDS)
        self._worker.output.close()
        await asyncio.wait([reading])
        output.close()
        exit_ = await asyncio.shield(self._exited)
        if exit_.exit_code == 0:
            self._ended(task_id, TaskState.COMPLETED, None)
        else:
            failure = Failure(code=FailureCode.WORKER_EXITED, message=self._exit_message(exit_))
            self._ended(task_id, TaskState.FAILED, failure)

    async def _read_exec(self, worker: CreatedWorker, output: ExecOutput) -> None:
        """In small pieces: 4 KiB may be as many events, and others want the event loop too."""
        async for piece in worker.output:
            self._remember(piece)
            for start in range(0, len(piece.data), EXEC_PIECE_BYTES):
                part = piece.data[start : start + EXEC_PIECE_BYTES]
                self._exec_bytes += len(part)
                output.feed(Output(piece.stream, part))
                await asyncio.sleep(0)

    async def _cancel(self, task_id: str) -> None:
        """Ask until the worker has heard it, or the task is over: a request may overtake the task itself on
        its way. The core's cancel deadline ends the session if nothing helps."""
        while task_id in self._relays and self._link is not None:
            try:
                await self._link.cancel(task_id)
            except (LinkBroken, TaskRefused) as problem:
                self._log.debug("task.cancel_not_delivered", task_id=task_id, reason=str(problem))
                await asyncio.sleep(CANCEL_RETRY_SECONDS)
            else:
                return

    def _ended(self, task_id: str, state: TaskState, failure: Failure | None) -> None:
        self._host.report(
            ev.TaskEnded(session_id=self.plan.session_id, task_id=task_id, state=state, failure=failure)
        )

    # -- the end of the worker ------------------------------------------------------------------------------

    async def _exit_is_near(self) -> bool:
        """Whether the worker's exit is heard soon: its connections break a moment before that."""
        done, _ = await asyncio.wait([self._exited], timeout=EXIT_NEWS_SECONDS)
        return bool(done)

    async def _report_exit(self, exit_: WorkerExit) -> None:
        """Let what the worker said last arrive, then report that it is gone."""
        if self.plan.contract is Contract.EXEC and self._relays:
            return  # the exit is the task's end
        if self._start is not None and not self._start.done():
            self._start.cancel()
        rest = [task for task in (self._output, *self._relays.values()) if task and not task.done()]
        if rest:
            await asyncio.wait(rest, timeout=EXIT_NEWS_SECONDS)
        reason = CloseReason.WORKER_EXITED if self._ready else CloseReason.START_FAILED
        self._lost(reason, FailureCode.WORKER_EXITED, self._exit_message(exit_))

    def _exit_message(self, exit_: WorkerExit) -> str:
        how = "was killed for using too much memory" if exit_.oom_killed else "exited"
        last = self.log_tail.rstrip().rsplit("\n", 1)[-1][:500]
        return f"the worker {how} with code {exit_.exit_code}" + (f": {last}" if last else "")

    def _lost(self, reason: CloseReason, code: str, message: str) -> None:
        self._host.report(
            ev.WorkerLost(
                session_id=self.plan.session_id,
                reason=reason,
                failure=Failure(code=code, message=message),
                log_tail=self.log_tail,
            )
        )

    # -- output ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The container's name, once there is to be one."""
        return self._spec.name if self._spec is not None else None

    @property
    def is_started(self) -> bool:
        """Whether the container runs, or should: it was started, and nobody has told of its end."""
        return self._started and not self._exited.done()

    @property
    def log_tail(self) -> str:
        return self._tail.decode(errors="replace")

    async def _keep_tail(self, worker: CreatedWorker) -> None:
        async for piece in worker.output:
            self._remember(piece)
            await asyncio.sleep(0)

    def _remember(self, piece: Output) -> None:
        self._tail += piece.data
        del self._tail[:-LOG_TAIL_BYTES]

    async def _guard(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """A bug in serving one session ends that session, not the node."""
        try:
            await work
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this session's end and is logged
            self._log.exception("attendant.crashed", what=what)
            self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.INTERNAL, f"{what}: {error!r}")

    def _spawn(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._host.spawn(f"{self.plan.session_id}: {what}", self._guard(what, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(
            lambda _: work.close()
        )  # it has not begun where the task was cancelled at once
        return task
