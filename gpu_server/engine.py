"""The engine: the single writer. Each event goes through `Node.handle` with no await, then its effects start.

Deciding is synchronous, so whoever asks (a request, an attendant, the reaper) has its answer at once and no
two decisions can interleave. Effects run as tasks that the engine owns and come back as events.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from gpu_server.attendant import Attendant, Plan
from gpu_server.carwash import CarWash, worker_name
from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.admission import RETRY_AFTER_SECONDS
from gpu_server.core.errors import CertificateRejected, FailureCode, Refusal, RefusalCode
from gpu_server.core.node import Node
from gpu_server.core.sessions import TaskType
from gpu_server.core.slots import Tier
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import (
    Clock,
    ContainerRuntime,
    Contract,
    ModelStore,
    RunFolder,
    SlotReading,
    StartRefused,
    WorkerExit,
    WorkerSpec,
)
from gpu_server.presets import Preset
from gpu_server.stream import Streams

UNNUMBERED = frozenset({"queue", "progress"})
MAX_QUEUED_BYTES = 256 << 20

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A task as the edge hands it over. `body` is what the worker gets, encoded."""

    task_id: str
    tenant: str
    task_type: TaskType
    tier: Tier | None
    model_id: str
    task_preset: str
    preset: Preset
    session_id: str | None
    new_session_id: str
    timeout: float
    body: bytes


class Engine:
    """Owns the node, the attendants and every task that works for them; works inside `running()`.

    `on_broken` is called once if a decision fails with a bug: the state can no longer be trusted, so nothing
    more is decided, and the process should end.
    """

    def __init__(
        self,
        node: Node,
        *,
        streams: Streams,
        runtime: ContainerRuntime,
        folders: RunFolders,
        models: ModelStore,
        clock: Clock,
        wash_give_up: float,
        worker_uid_base: int,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.node, self.streams, self.clock, self.runtime = node, streams, clock, runtime
        self.broken: str | None = None
        self.readings: Mapping[str, SlotReading] = {}
        self.wash = CarWash(runtime, folders, clock, give_up=wash_give_up, is_live=self._is_served)
        self.on_decided: Callable[[], None] = lambda: None
        self.attendants: dict[str, Attendant] = {}
        self._folders, self._models = folders, models
        self._uid_base, self._on_broken = worker_uid_base, on_broken
        self._presets: dict[str, Preset] = {}
        self._bodies: dict[str, bytes] = {}
        self._queued_bytes = 0
        self._washes: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own all work until the block ends, then stop it; `shut_down` before that leaves nothing behind."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self.runtime.open(self.heard_exit)
            try:
                yield
            finally:
                for attendant in list(self.attendants.values()):
                    await attendant.close()
                for task in list(self._tasks):
                    task.cancel()
                await self.runtime.close()

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task that the engine owns. A crash in it is a bug, and stops the service."""
        assert self._group is not None, "the engine is not running"
        task = self._group.create_task(self._guard(name, work), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(
            lambda _: work.close()
        )  # it has not begun where the task was cancelled at once
        return task

    async def _guard(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  # nothing above this but the task group of everyone
            self._break(f"{name}: {error!r}")

    # -- deciding -------------------------------------------------------------------------------------------

    def decide(self, event: ev.Event) -> None:
        """Decide on one event and start what follows. Raises `Refusal` for a request that is not granted."""
        if self.broken is not None:
            raise Refusal(RefusalCode.INTERNAL, "the service has met a bug and is stopping")
        try:
            for effect in self.node.handle(event, self.clock.now()):
                self._start(effect)
        except Refusal:
            raise
        except CertificateRejected as rejected:
            log.error("certificate.rejected", reason=str(rejected))
            return
        except Exception as error:
            self._break(f"{type(event).__name__}: {error!r}")
            raise
        self.on_decided()

    def report(self, event: ev.Event) -> None:
        """Take a fact. Once the engine is broken, facts change nothing any more."""
        if self.broken is None:
            self.decide(event)

    def _break(self, why: str) -> None:
        log.critical("engine.broken", why=why, exc_info=True)
        if self.broken is None:
            self.broken = why
            self._on_broken()

    # -- requests -------------------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> None:
        """Admit a task: afterwards its stream is in `streams`. Raises `Refusal`, and then nothing is kept."""
        task_id, session_id = submission.task_id, submission.new_session_id
        if self._queued_bytes + len(submission.body) > MAX_QUEUED_BYTES:
            message = f"the inputs of queued tasks together would pass {MAX_QUEUED_BYTES} bytes"
            raise Refusal(RefusalCode.TOO_MUCH_QUEUED, message, retry_after=RETRY_AFTER_SECONDS)
        self.streams.open(task_id)
        self._bodies[task_id] = submission.body
        self._queued_bytes += len(submission.body)
        if submission.session_id is None:
            self._presets[session_id] = submission.preset
        try:
            self.decide(
                ev.TaskSubmitted(
                    task_id=task_id,
                    tenant=submission.tenant,
                    task_type=submission.task_type,
                    tier=submission.tier,
                    workload=submission.preset.workload(submission.model_id, submission.task_preset),
                    session_id=submission.session_id,
                    new_session_id=session_id,
                    timeout=submission.timeout,
                )
            )
        except BaseException:
            self.streams.forget(task_id)
            self._take_body(task_id)
            self._presets.pop(session_id, None)
            raise
        log.info("task.accepted", task_id=task_id, session_id=self.node.tasks[task_id].session_id)

    def request_session(
        self,
        session_id: str,
        *,
        tenant: str,
        tier: Tier | None,
        model_id: str,
        task_preset: str,
        preset: Preset,
    ) -> None:
        """Make a session ahead of its first task. Raises `Refusal`."""
        workload = preset.workload(model_id, task_preset)
        self._presets[session_id] = preset
        try:
            self.decide(
                ev.SessionRequested(session_id=session_id, tenant=tenant, tier=tier, workload=workload)
            )
        except BaseException:
            self._presets.pop(session_id, None)
            raise
        log.info("session.accepted", session_id=session_id)

    async def shut_down(self, patience: float) -> bool:
        """End every session and wait for the washes, `patience` seconds at most; whether nothing is left."""
        self.report(ev.ShutdownOrdered())
        if self._washes:
            await asyncio.wait(list(self._washes.values()), timeout=patience)
        return self.broken is None and not self._washes and not any(self.node.live_sessions())

    # -- effects --------------------------------------------------------------------------------------------

    def _start(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Publish():
                self._publish(effect)
            case fx.StartWorker():
                self._start_worker(effect)
            case fx.SendTask(session_id=session_id, task_id=task_id):
                stream = self.streams.get(task_id)
                assert stream is not None, f"{task_id} has no stream"
                self.attendants[session_id].send(task_id, self._take_body(task_id), stream)
            case fx.CancelTask(session_id=session_id, task_id=task_id):
                self.attendants[session_id].cancel(task_id)
            case fx.WashSlots():
                wash = self.spawn(f"wash {effect.fence} {effect.session_id}", self._wash(effect))
                self._washes[id(effect)] = wash
                wash.add_done_callback(lambda _: self._washes.pop(id(effect), None))
            case fx.ForgetTask(task_id=task_id):
                self.streams.forget(task_id)
            case fx.ForgetSession(session_id=session_id):
                self._presets.pop(session_id, None)
            case _:
                raise AssertionError(f"no one handles {effect}")

    def _publish(self, effect: fx.Publish) -> None:
        stream = self.streams.get(effect.task_id)
        assert stream is not None, f"{effect.task_id} has no stream"
        if effect.event in UNNUMBERED:
            stream.note(effect.event, effect.data)
            return
        stream.publish(effect.event, effect.data)
        if effect.event == "task_finish":
            self._take_body(effect.task_id)
            self.streams.finished(effect.task_id)
            log.info("task.finished", task_id=effect.task_id, status=effect.data["status"])

    def _take_body(self, task_id: str) -> bytes:
        """A task's input, which nobody needs here any more; empty when it was taken before."""
        body = self._bodies.pop(task_id, b"")
        self._queued_bytes -= len(body)
        return body

    def _start_worker(self, effect: fx.StartWorker) -> None:
        session = self.node.sessions[effect.session_id]
        preset, workload = self._presets[session.id], session.workload
        slots = [self.node.slots[slot_id].spec for slot_id in effect.slot_ids]
        number = list(self.node.slots).index(self.node.slots[effect.slot_ids[0]])
        # Without root the run folder is our own, and a worker with another uid could not write its socket.
        uid = self._uid_base + number if os.geteuid() == 0 else os.geteuid()
        exec_task = session.queue[0] if preset.worker_contract is Contract.EXEC else None

        def find_model() -> Path | None:
            if preset.model == "none":
                return None
            try:
                found = self._models.find(workload.model_id)
            except ValueError:  # an id that cannot be a folder's name, such as name:tag
                found = None
            if found is None:
                raise StartRefused(
                    FailureCode.MODEL_MISSING, f"model {workload.model_id} is not in the model store"
                )
            return found

        def spec(folder: RunFolder, model_path: Path | None) -> WorkerSpec:
            return WorkerSpec(
                name=worker_name(session.id, effect.fence),
                session_id=session.id,
                fence=effect.fence,
                tenant=session.tenant,
                task_id=exec_task,
                contract=preset.worker_contract,
                image=preset.docker_image,
                command=tuple(preset.command) if preset.command else None,
                process_command=tuple(preset.process_command) if preset.process_command else None,
                env={
                    **preset.env_vars,
                    "MODEL_ID": workload.model_id,
                    "TASK_PRESET": workload.task_preset,
                },
                gpu_uuids=tuple(slot.uuid for slot in slots if slot.is_gpu),
                uid=uid,
                model_path=model_path,
                folder=folder,
                limits=preset.limits,
            )

        plan = Plan(
            session_id=session.id,
            image=preset.docker_image,
            contract=preset.worker_contract,
            uid=uid,
            task_input=self._bodies[exec_task] if exec_task else None,
            find_model=find_model,
            spec=spec,
        )
        log.info("session.starting", session_id=session.id, slots=effect.slot_ids, fence=effect.fence)
        attendant = self.attendants[session.id] = Attendant(plan, self.runtime, self._folders, self)
        attendant.start()

    async def _wash(self, order: fx.WashSlots) -> None:
        """A wash that crashes has not proven anything: its slots are locked away, the node goes on."""
        try:
            await self._run_wash(order)
        except Exception as error:  # whatever it is, the answer is quarantine and a log line
            log.exception("wash.crashed", slots=order.slot_ids)
            reason = f"the wash crashed: {error!r}"
            self.report(
                ev.WashFailed(
                    session_id=order.session_id, slot_ids=order.slot_ids, fence=order.fence, reason=reason
                )
            )
        finally:
            # What could not be removed belongs to nobody from here on: the reaper tries again.
            self.attendants.pop(order.session_id or "", None)

    async def _run_wash(self, order: fx.WashSlots) -> None:
        tail = ""
        if order.session_id is not None:
            await self.attendants[order.session_id].close()
            tail = self.attendants[order.session_id].log_tail
        async for outcome in self.wash.run(order, [self.node.slots[s].spec for s in order.slot_ids]):
            if isinstance(outcome, ev.ContainerGone):
                self.attendants.pop(outcome.session_id, None)
                outcome = replace(outcome, log_tail=tail)
            if isinstance(outcome, ev.WashFailed):
                log.error("slot.quarantined", slots=outcome.slot_ids, reason=outcome.reason)
            self.report(outcome)
        log.info("wash.done", session_id=order.session_id, slots=order.slot_ids, fence=order.fence)

    # -- what the runtime and the reaper ask ----------------------------------------------------------------

    def heard_exit(self, exit_: WorkerExit) -> None:
        """A worker's process has ended."""
        attendant = self.attendants.get(exit_.session_id)
        if attendant is not None and attendant.name == exit_.name:
            attendant.heard_exit(exit_)

    def _is_served(self, session_id: str) -> bool:
        """Whether this session has an attendant, or is about to: its container is then nobody's residue."""
        return session_id in self.attendants
