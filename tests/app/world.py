"""An engine in process: real core, streams, run folders and attendants over a fake runtime and clock.

Workers are `PlayedWorker`s that listen on the real socket of their run folder.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from gpu_server.core import events as ev
from gpu_server.core.effects import Effect
from gpu_server.core.node import Node
from gpu_server.core.sessions import Rules, Session, Task, TaskType
from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.models import FolderModelStore
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.engine import UNNUMBERED, Engine, Submission
from gpu_server.ports import Contract, WorkerSpec
from gpu_server.presets import Preset
from gpu_server.stream import Streams
from tests.app.played_worker import PlayedWorker, TaskScript, echo
from tests.app.reading import Event, all_events, parse
from tests.fakes.clock import FakeClock
from tests.fakes.runtime import FakeEngine, FakeRuntime, FakeScript

E = TypeVar("E", bound=ev.Event)
IMAGE = "gpu-server/played:dev"
PRESET = Preset(docker_image=IMAGE, model="none")
EXEC = Preset(docker_image=IMAGE, model="none", contract="exec")


def slot_specs(count: int, *, gpu: bool = False) -> tuple[SlotSpec, ...]:
    """Slots `0`, `1`, ...: GPUs or stand-ins."""
    kind = "GPU" if gpu else "CPU"
    return tuple(
        SlotSpec(id=str(n), uuid=f"{kind}-{n:04}", name=kind, memory_mb=0, is_gpu=gpu) for n in range(count)
    )


@dataclass
class World:
    """One engine and everything around it."""

    engine: Engine
    runtime: FakeRuntime
    machine: FakeEngine
    clock: FakeClock
    folders: RunFolders
    run_dir: Path
    group: asyncio.TaskGroup
    on_task: TaskScript = echo
    health: dict[str, Any] = field(default_factory=lambda: {"status": "ready"})
    workers: dict[str, PlayedWorker] = field(default_factory=dict)
    playing: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    broke: list[str] = field(default_factory=list)
    heard: list[ev.Event] = field(default_factory=list)
    prepare: Callable[[PlayedWorker], None] = lambda worker: None
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _ids: Any = field(default_factory=itertools.count)

    def start_worker(self, spec: WorkerSpec) -> None:
        """The fake runtime has started a container: its program listens."""
        if spec.contract is Contract.EXEC:
            return
        worker = PlayedWorker(spec.session_id, spec.folder.socket, self.on_task, health=dict(self.health))
        self.prepare(worker)
        self.workers[spec.session_id] = worker
        listener = worker.listen()
        playing = self.playing[spec.session_id] = self.group.create_task(worker.serve(listener))
        playing.add_done_callback(lambda _: listener.close())

    def exit(self, session_id: str, code: int = 1, **how: Any) -> None:
        """The worker's process ends: its sockets close, the runtime hears it."""
        self.playing[session_id].cancel()
        self.machine.exit(self.container(session_id), code, **how)

    def container(self, session_id: str) -> str:
        """The name of a session's container."""
        return next(n for n, c in self.machine.containers.items() if c.spec.session_id == session_id)

    def submit(
        self,
        session_id: str | None = None,
        *,
        preset: Preset = PRESET,
        tenant: str = "a",
        oneoff: bool = False,
        timeout: float = 100.0,
        **metadata: Any,
    ) -> tuple[str, str]:
        """Submit a task; its id and its session's."""
        number = next(self._ids)
        task_id, new_session_id = f"t_{number}", f"s_{number}"
        self.engine.submit(
            Submission(
                task_id=task_id,
                tenant=tenant,
                task_type=TaskType.ONEOFF if oneoff or preset.contract == "exec" else TaskType.SESSION,
                tier=None,
                model_id="m",
                task_preset="p",
                preset=preset,
                session_id=session_id,
                new_session_id=new_session_id,
                timeout=timeout,
                body=orjson.dumps({"metadata": metadata}),
            )
        )
        return task_id, session_id or new_session_id

    def told(self, kind: type[E]) -> list[E]:
        """The events of one kind that the core has heard."""
        return [event for event in self.heard if isinstance(event, kind)]

    def session(self, session_id: str) -> Session:
        return self.engine.node.sessions[session_id]

    def task(self, task_id: str) -> Task:
        return self.engine.node.tasks[task_id]

    async def until(self, holds: Callable[[], Any], within: float = 20.0) -> None:
        """Wait until `holds` is true, looking again after each decision."""
        async with asyncio.timeout(within):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def events(self, task_id: str) -> list[Event]:
        """The numbered events of a task, to its end."""
        stream = self.engine.streams.get(task_id)
        assert stream is not None
        async with asyncio.timeout(20):
            return [event for event in await all_events(stream) if event.name not in UNNUMBERED]

    async def ready(self, session_id: str) -> None:
        """Wait until a session's worker is ready, or the session has ended."""
        await self.until(lambda: self.session(session_id).state in ("ready", "working", "closed", "failed"))

    async def free(self) -> None:
        """Wait until every slot is free."""
        await self.until(lambda: all(slot.state == "free" for slot in self.engine.node.slots))

    async def washes(self) -> None:
        """Wait until no wash runs."""
        async with asyncio.timeout(20):
            while self.engine._washes:
                await asyncio.wait(list(self.engine._washes.values()))
                await asyncio.sleep(0)

    async def saw(self, task_id: str, text: str) -> None:
        """Wait until a delta of this text is in the task's stream."""
        stream = self.engine.streams.get(task_id)
        assert stream is not None
        async with asyncio.timeout(20):
            async for chunk in stream.read():
                if any(event.data.get("delta") == text for event in parse(chunk)):
                    return

    def decided(self) -> None:
        """The engine has decided something."""
        self._news.set()


@asynccontextmanager
async def unwrapped() -> AsyncIterator[None]:
    """A test's own failure, out of the groups of whoever owned the tasks around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
            found = found.exceptions[0]
        raise found from None


@asynccontextmanager
async def engine_world(
    tmp_path: Path,
    *,
    slots: tuple[SlotSpec, ...] = slot_specs(1),
    rules: Rules | None = None,
    give_up: float = 300.0,
    washed: bool = True,
    machine: FakeEngine | None = None,
) -> AsyncIterator[World]:
    """A running engine whose slots are free (with `washed`)."""
    machine = machine or FakeEngine()
    machine.images[IMAGE] = FakeScript(on_term=143)
    runtime = FakeRuntime(machine)
    runtime.name = "process"  # so that the listener's uid is compared with ours
    clock, folders = FakeClock(), RunFolders(tmp_path / "run")
    streams = Streams(max_bytes_each=1 << 20, max_bytes_total=1 << 24)
    broke: list[str] = []
    async with unwrapped(), asyncio.TaskGroup() as group:
        engine = Engine(
            Node(rules or Rules()),
            streams=streams,
            runtime=runtime,
            folders=folders,
            models=FolderModelStore(tmp_path / "models"),
            clock=clock,
            wash_give_up=give_up,
            worker_uid_base=20_000,
            on_broken=lambda: broke.append(engine.broken or ""),
        )
        world = World(engine, runtime, machine, clock, folders, tmp_path / "run", group, broke=broke)
        engine.on_decided = world.decided
        handle = engine.node.handle

        def recorded(event: ev.Event, now: float) -> list[Effect]:
            world.heard.append(event)
            return handle(event, now)

        engine.node.handle = recorded
        runtime.on_start = world.start_worker
        async with engine.running():
            engine.report(ev.NodeStarted(slots=slots))
            if washed:
                await world.free()
                await world.washes()
            yield world
            for worker in world.workers.values():
                worker.released.set()
        for playing in world.playing.values():
            playing.cancel()
