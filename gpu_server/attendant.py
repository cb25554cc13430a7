"""Attendants: one for each session that has a container, holding everything the service does for it.

It starts the worker, or takes up one that an earlier life of the service started, tells the engine what
becomes of it, carries tasks to it and their events back into their streams. It decides nothing: what it sees,
it reports as an event. `close` ends all of that and leaves the container as it is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog

from gpu_server.core import events as ev
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.sessions import CloseReason, TaskState
from gpu_server.drivers.run_folder import ConnectPath, RunFolders
from gpu_server.drivers.worker_link import LinkBroken, TaskRefused, WorkerLink
from gpu_server.exec_output import ExecOutput, count_by_stream
from gpu_server.frames import ProtocolFault
from gpu_server.launch import Launch, Plan
from gpu_server.ports import (
    ContainerRuntime,
    Contract,
    CreatedWorker,
    FoundWorker,
    Output,
    OutputLost,
    RunFolder,
    RunFolderFault,
    RuntimeUnreachable,
    StartRefused,
    StartUnanswered,
    WorkerExit,
)
from gpu_server.relay import relay_exec, relay_http
from gpu_server.stream import Stream

LOG_TAIL_BYTES = 64 * 1024
MODEL_NEWS_SECONDS = 0.5
FIRST_POLL_SECONDS = 0.01
LOADING_POLL_SECONDS = 0.1
CANCEL_RETRY_SECONDS = 0.1
ADOPTION_SECONDS = 30.0
REATTACH_PAUSE_SECONDS = 1.0
UNREACHABLE_TRIES = 60
EXIT_NEWS_SECONDS = 2.0
NOT_READ = "the worker failed; what it says is not read, since its session is sealed and was ready"

log = structlog.get_logger()


class Host(Protocol):
    """What an attendant needs of the engine."""

    def report(self, event: ev.Event) -> None: ...

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...

    def delivered(self, task_id: str) -> None: ...


class Attendant:
    """Serves one session's worker from its start until `close`."""

    def __init__(self, plan: Plan, runtime: ContainerRuntime, folders: RunFolders, host: Host) -> None:
        self.plan = plan
        self._runtime, self._folders, self._host = runtime, folders, host
        self._log = log.bind(session_id=plan.session_id)
        self._tasks: set[asyncio.Task[None]] = set()
        self._exited: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self._attached = asyncio.Event()
        self._folder: RunFolder | None = None
        self._worker: CreatedWorker | None = None
        self._socket: ConnectPath | None = None
        self._link: WorkerLink | None = None
        self._start: asyncio.Task[None] | None = None
        self._creating: asyncio.Task[None] | None = None
        self._hydration: asyncio.Task[None] | None = None
        self._output: asyncio.Task[None] | None = None
        self._relays: dict[str, asyncio.Task[None]] = {}
        self._tail = bytearray()
        self._told_model = 0.0
        self._interruptions = self._started_at = 0
        self._started = False
        self._ready = False
        self._closing = False
        self._shown_key: str | None = None

    # -- what the engine asks for ---------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the worker up; comes back as WorkerCreated and WorkerReady, or WorkerLost."""
        self._start = self._spawn("start", self._start_or_lose(self._bring_up_or_raise))

    def adopt(self, *, ready: bool) -> None:
        """Take up a worker that an earlier life started; comes back as `start` does. It was `ready` then, or
        perhaps not even there: what was never started is brought up now."""
        self._ready = ready
        self._start = self._spawn("adopt", self._start_or_lose(self._take_up_or_raise))

    def send(self, task_id: str, body: bytes | None, stream: Stream) -> None:
        """Run a task, or follow it further, behind what `stream` has of it: a worker runs it once, however
        often it is sent. Comes back as TaskEnded, or WorkerLost. `body` None: the worker must have it."""
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
        if self._folder is None or self._closing:
            return
        try:
            self._folders.check(self._folder)
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

    async def _start_or_lose(self, attempt: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start, and try again while the runtime does not answer: the container may be there by then."""
        try:
            for _ in range(UNREACHABLE_TRIES):
                try:
                    return await attempt()
                except RuntimeUnreachable as error:
                    self._log.warning("worker.start_delayed", reason=str(error))
                    self._host.report(ev.RuntimeChecked(doubt=f"the runtime does not answer: {error}"))
                    attempt = self._take_up_or_raise
                    await asyncio.sleep(REATTACH_PAUSE_SECONDS)
            message = "the runtime did not answer for too long"
            self._lost_to(
                CloseReason.START_FAILED, Failure(code=FailureCode.RUNTIME_UNREACHABLE, message=message)
            )
        except StartRefused as refused:
            self._lost(CloseReason.START_FAILED, refused.code, refused.message)
        except RunFolderFault as fault:
            self._lost(CloseReason.START_FAILED, FailureCode.RUN_FOLDER_FAULT, str(fault))
        except ProtocolFault as fault:
            self._lost(CloseReason.START_FAILED, FailureCode.WORKER_PROTOCOL, str(fault))
        except OSError as error:
            self._lost(CloseReason.START_FAILED, FailureCode.START_FAILED, f"run folder: {error}")

    async def _bring_up_or_raise(self) -> None:
        plan, session_id = self.plan, self.plan.session_id
        launch = plan.launch()
        self._stage("model")
        model = await launch.prepare_model(self._tell_model)
        if model is not None and self._hydration is None:
            self._hydration = self._spawn("hydration", self._hydrate(launch, model))
        self._stage("image")
        await self._runtime.require_image(launch.image)
        self._stage("container")
        self._worker = await self._create(launch, model)
        if self._closing:
            return  # `close` has waited for the container, so that the wash finds it: nothing starts it now
        self._host.report(ev.WorkerCreated(session_id=session_id, container_id=self._worker.container_id))
        if plan.contract is Contract.HTTP:
            if not plan.sealed:
                self._output = self._spawn("output", self._keep_tail(self._worker))
            await self._runtime.start(plan.name)
            self._started = True
            self._stage("loading")
            await self._until_ready()
        self._is_ready()

    async def _hydrate(self, launch: Launch, model: Path) -> None:
        """Reading ahead may fail, whatever the reason: the worker then reads for itself."""
        try:
            await launch.hydrate(model)
        except Exception:  # noqa: BLE001  # whatever it is, the start is only slower, and it is logged
            self._log.exception("model.not_hydrated")

    def _is_ready(self) -> None:
        self._ready = True
        if self._hydration is not None and self.plan.contract is Contract.HTTP:
            self._hydration.cancel()  # the worker has loaded; a program only begins to
        self._attached.set()
        self._host.report(ev.WorkerReady(session_id=self.plan.session_id))

    async def _create(self, launch: Launch, model: Path | None) -> CreatedWorker:
        """Make run folder and container in a task of its own, which `close` waits for, never cancels."""
        made: asyncio.Future[CreatedWorker] = asyncio.get_running_loop().create_future()
        plan = self.plan

        async def create() -> None:
            try:
                self._folder = await asyncio.to_thread(
                    self._folders.create, plan.session_id, plan.uid, launch.task_input
                )
                self._interruptions = self._runtime.interruptions
                self._worker = await self._runtime.create(launch.spec(self._folder, model))
                made.set_result(self._worker)
            except Exception as error:  # noqa: BLE001  # the start, which waits for this, tells what it was
                made.set_exception(error)
                made.exception()  # so that nobody complains when the start was cancelled meanwhile

        self._creating = self._host.spawn(f"{plan.session_id}: create", create())
        return await asyncio.shield(made)

    # -- adopting -------------------------------------------------------------------------------------------

    async def _take_up_or_raise(self) -> None:
        plan, was_ready = self.plan, self._ready
        try:
            found = await self._find()
        except OutputLost as lost:
            self._lost(CloseReason.WORKER_EXITED, FailureCode.SERVICE_RESTARTED, str(lost))
            return
        if found is None:
            if was_ready and not await self._waits_to_be_started():
                message = "the worker was gone when the service came back"
                self._lost_to(
                    CloseReason.WORKER_EXITED, Failure(code=FailureCode.SERVICE_RESTARTED, message=message)
                )
                return
            self._ready = False
            await self._bring_up_or_raise()
            return
        self._worker, self._started = found, True
        self._folder = self._folders.find(plan.session_id)
        self._host.report(ev.WorkerCreated(session_id=plan.session_id, container_id=found.container_id))
        if found.exit is not None:
            self.heard_exit(found.exit)
        if plan.contract is Contract.HTTP:
            if found.exit is not None:
                return
            if not plan.sealed:
                self._output = self._spawn("output", self._keep_tail(found))
            if not was_ready:
                self._stage("loading")
            await self._until_ready(limit=ADOPTION_SECONDS if was_ready else None)
        self._is_ready()

    async def _find(self) -> FoundWorker | None:
        """The worker, as soon as the runtime answers: until then nothing is known of it."""
        from_start = self.plan.contract is Contract.EXEC
        while True:
            seen = self._runtime.interruptions
            try:
                found = await self._runtime.reattach(self.plan.name, from_start=from_start)
                if found is not None:
                    self._interruptions = seen
                return found
            except RuntimeUnreachable as error:
                self._log.warning("worker.not_found_yet", reason=str(error))
                await asyncio.sleep(REATTACH_PAUSE_SECONDS)

    async def _waits_to_be_started(self) -> bool:
        """Whether a program was created, and never started: the service ended just before that."""
        if self.plan.contract is Contract.HTTP:
            return False
        return any(worker.name == self.plan.name for worker in await self._runtime.list_workers())

    async def _until_ready(self, limit: float | None = None) -> None:
        """Wait for the socket, then for `ready`. The start deadline is the core's; an exit ends this task.
        With a `limit`, in seconds, the worker was ready before: `StartRefused` when it is not so again."""
        told: tuple[str, float] | None = None
        pause, began = FIRST_POLL_SECONDS, asyncio.get_running_loop().time()
        while limit is None or asyncio.get_running_loop().time() - began <= limit:
            try:
                health = await (await self._connect()).health()
            except LinkBroken:
                await asyncio.sleep(pause)
                pause = min(1.1 * pause, LOADING_POLL_SECONDS)
                continue
            self._show_key(health.sealed_key)
            if health.status == "ready":
                return
            if health.status == "failed":
                message = health.message or "the worker could not load"
                raise StartRefused(FailureCode.START_FAILED, message)
            if health.stage is not None and told != (health.stage, health.done):
                told = (health.stage, health.done)
                self._stage("loading", health.done, health.total)
            await asyncio.sleep(LOADING_POLL_SECONDS)
        raise StartRefused(FailureCode.WORKER_UNREACHABLE, f"the worker did not answer within {limit:g} s")

    def _show_key(self, key: str | None) -> None:
        """Tell of the key that a sealed session's worker shows, and of each other one: the core judges."""
        if self.plan.sealed and key is not None and key != self._shown_key:
            self._shown_key = key
            self._host.report(ev.WorkerKeyShown(session_id=self.plan.session_id, key=key))

    async def _connect(self) -> WorkerLink:
        """The link to the worker's socket. Raises `LinkBroken` while nobody listens there."""
        if self._folder is None:
            raise RunFolderFault("the session has no run folder any more")
        if self._socket is None:
            self._socket = self._folders.connect_path(self._folder)
            if self._socket is None:
                raise LinkBroken("the worker has no socket yet")
        if self._link is None:
            uid = self._folders.owner(self._folder) if self._runtime.name == "docker" else os.geteuid()
            self._link = WorkerLink(self._socket.path, session_id=self.plan.session_id, uid=uid)
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

    def _tell_model(self, done: int, total: int | None) -> None:
        """Not more often than people look: each time is a decision."""
        now = asyncio.get_running_loop().time()
        if done == total or now - self._told_model >= MODEL_NEWS_SECONDS:
            self._told_model = now
            self._stage("model", done, total)

    # -- tasks ----------------------------------------------------------------------------------------------

    async def _until_attached(self) -> bool:
        """Whether the worker can be talked to; a task may be here before an adopted worker was found."""
        if self._attached.is_set():
            return True
        attached = self._spawn("attached", _wait(self._attached))
        either: list[asyncio.Future[Any]] = [attached, self._exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        attached.cancel()
        return self._attached.is_set()

    async def _run_http(self, task_id: str, body: bytes | None, stream: Stream) -> None:
        if not await self._until_attached():
            return  # `_report_exit` tells what happened, to all tasks at once
        assert self._link is not None
        try:
            end = await relay_http(
                self._link,
                task_id,
                body,
                stream,
                delivered=lambda: self._host.delivered(task_id),
                exit_is_near=self._exit_is_near,
                sealed=self.plan.sealed,
                is_running=self._is_running,
            )
        except ProtocolFault as fault:
            self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.WORKER_PROTOCOL, str(fault))
        except LinkBroken as broken:
            self._lost(CloseReason.WORKER_MISBEHAVED, FailureCode.WORKER_UNREACHABLE, str(broken))
        else:
            if end is not None:
                self._ended(task_id, *end)

    async def _run_exec(self, task_id: str, body: bytes | None, stream: Stream) -> None:
        """Start the container, read its output to the end, and let its exit code decide. One that was started
        before is read from its beginning, and what the stream has of that is left out."""
        await self._attached.wait()
        assert self._worker is not None
        try:
            await self._start_program()
            self._host.delivered(task_id)
            while not await self._read_program(self._worker, stream):
                self._worker = self._with_all_output(await self._find())
            exit_ = await asyncio.shield(self._exited)
        except StartRefused as refused:
            self._lost(CloseReason.START_FAILED, refused.code, refused.message)
        except OutputLost as lost:
            self._lost(CloseReason.WORKER_EXITED, FailureCode.SERVICE_RESTARTED, str(lost))
        else:
            if exit_.exit_code == 0:
                self._ended(task_id, TaskState.COMPLETED, None, None)
            else:
                self._ended(task_id, TaskState.FAILED, self._exit_failure(exit_), None)

    async def _start_program(self) -> None:
        """Start the program, once, also where the runtime took the order and its answer was lost. Raises
        `OutputLost` where that was an engine's last deed: one that dies between starting a container and
        writing that down (20.10, killed) comes back without knowing that it ran."""
        ordered = False
        while not self._started:
            if not ordered:
                self._started_at = self._runtime.interruptions
            try:
                await self._runtime.start(self.plan.name)
                self._started = True
            except RuntimeUnreachable as error:
                ordered = ordered or isinstance(error, StartUnanswered)
                if (found := await self._find()) is not None:
                    self._worker, self._started = self._with_all_output(found), True
                elif ordered and self._runtime.interruptions != self._started_at:
                    raise OutputLost(
                        "the container runtime went away while it started the program"
                    ) from error
                else:
                    await asyncio.sleep(REATTACH_PAUSE_SECONDS)

    async def _read_program(self, worker: CreatedWorker, stream: Stream) -> bool:
        """Whether all of its output was read; not if the runtime was lost since it was attached."""
        return await relay_exec(
            worker,
            ExecOutput(stream, self._taken_before(stream)),
            self._exited,
            remember=self._remember,
            is_interrupted=lambda: self._runtime.interruptions != self._interruptions,
            silence=EXIT_NEWS_SECONDS,
        )

    def _with_all_output(self, found: FoundWorker | None) -> FoundWorker:
        """Raises `OutputLost` for a program that ended while the runtime was away: its last words went with
        the engine that was to read them."""
        if found is None or (found.exit is not None and self._runtime.interruptions != self._started_at):
            raise OutputLost("the program ended while the container runtime was away")
        if found.exit is not None:
            self.heard_exit(found.exit)
        return found

    @staticmethod
    def _taken_before(stream: Stream) -> Mapping[Literal["stdout", "stderr"], int]:
        """How much of a program's output an earlier life has taken. Raises `OutputLost`."""
        taken = count_by_stream(stream.worker_frames())
        if sum(taken.values()) != stream.worker_seq:
            raise OutputLost("the program's output cannot be followed further: its beginning is not kept")
        return taken

    async def _cancel(self, task_id: str) -> None:
        """Ask until the worker has heard it, or the task is over: a request may overtake the task itself on
        its way, and a cancel of an earlier life comes before the worker was found again. The core's cancel
        deadline ends the session if nothing helps."""
        if not await self._until_attached():
            return
        while task_id in self._relays and self._link is not None:
            try:
                await self._link.cancel(task_id)
            except (LinkBroken, TaskRefused) as problem:
                reason = type(problem).__name__ if self.plan.sealed else str(problem)  # it may quote it
                self._log.debug("task.cancel_not_delivered", task_id=task_id, reason=reason)
                await asyncio.sleep(CANCEL_RETRY_SECONDS)
            else:
                return

    def _ended(
        self, task_id: str, state: TaskState, failure: Failure | None, usage: Mapping[str, Any] | None
    ) -> None:
        self._host.report(
            ev.TaskEnded(
                session_id=self.plan.session_id, task_id=task_id, state=state, failure=failure, usage=usage
            )
        )

    # -- the end of the worker ------------------------------------------------------------------------------

    async def _exit_is_near(self) -> bool:
        """Whether the worker's exit is heard soon: its connections break a moment before that."""
        done, _ = await asyncio.wait([self._exited], timeout=EXIT_NEWS_SECONDS)
        return bool(done)

    async def _is_running(self) -> bool:
        """Whether the worker runs for certain. While the runtime is away its exit is heard much later, if it
        has ended, and is no fault of its own."""
        try:
            seen = await self._runtime.list_workers()
        except RuntimeUnreachable:
            return False
        return any(worker.name == self.plan.name and worker.running for worker in seen)

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
        self._lost_to(reason, self._exit_failure(exit_))

    def _exit_failure(self, exit_: WorkerExit) -> Failure:
        how = "was killed for using too much memory" if exit_.oom_killed else "exited"
        last = self.log_tail.rstrip().rsplit("\n", 1)[-1][:500]
        message = f"the worker {how} with code {exit_.exit_code}" + (f": {last}" if last else "")
        return Failure(code=FailureCode.WORKER_EXITED, message=message, from_worker=bool(last))

    def _lost(self, reason: CloseReason, code: str, message: str) -> None:
        """The worker cannot serve any more. The message may quote it, so it counts as the worker's words; and
        those of one that has had sealed tasks may be a tenant's, in the clear."""
        if self.plan.sealed and self._ready:
            message = NOT_READ
        self._lost_to(reason, Failure(code=code, message=message, from_worker=True))

    def _lost_to(self, reason: CloseReason, failure: Failure) -> None:
        self._host.report(
            ev.WorkerLost(
                session_id=self.plan.session_id, reason=reason, failure=failure, log_tail=self.log_tail
            )
        )

    # -- output ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The container's name, also where there is none yet."""
        return self.plan.name

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


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
