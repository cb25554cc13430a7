"""An engine in process: real core, streams, spool, run folders and attendants over a fake runtime and clock.

Workers are `PlayedWorker`s that listen on the real socket of their run folder. They and all that is kept
outlive a life of the service (`engine_life`), so that another one can take them up.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from gpu_server.certificates import NodeSeal
from gpu_server.core import events as ev
from gpu_server.core.effects import Effect
from gpu_server.core.node import Node
from gpu_server.core.notices import UNNUMBERED
from gpu_server.core.rows import Table
from gpu_server.core.sessions import RequestKey, Rules, Session, Task, TaskType
from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.models import FolderModelStore
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.drivers.spool import Spool
from gpu_server.engine import Engine, Submission
from gpu_server.inputs import Inputs
from gpu_server.launch import FindPreset, Launcher
from gpu_server.ports import Contract, Enclave, Journal, ModelStore, WorkerSpec
from gpu_server.presets import Preset
from gpu_server.recovery import recover
from gpu_server.slot_wash import Equipment
from gpu_server.streams import Streams
from tests.app.played_worker import PlayedWorker, Remembering, TaskScript, echo
from tests.app.reading import Event, all_events, parse
from tests.fakes.clock import FakeClock
from tests.fakes.gpu_wash import FakeGates, FakeScrubber
from tests.fakes.journal import Disk, MemoryJournal
from tests.fakes.runtime import FakeEngine, FakeRuntime, FakeScript
from tests.fakes.washing import residue_in

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
    """A machine and what is on it, and the engine that lives there now, with everything around that."""

    root: Path
    group: asyncio.TaskGroup
    machine: FakeEngine
    clock: FakeClock
    folders: RunFolders
    slots: tuple[SlotSpec, ...]
    rules: Rules
    give_up: float
    find_preset: FindPreset | None
    spool_root: Path
    disk: Disk = field(default_factory=lambda: {table: {} for table in Table})
    models: ModelStore | None = None
    enclave: Enclave | None = None
    scrubber: FakeScrubber = field(default_factory=FakeScrubber)
    gates: FakeGates = field(default_factory=FakeGates)
    killed: bool = False
    boot_id: str = "this boot"
    wall_offset: float = 0.0
    on_task: TaskScript = echo
    on_attach: TaskScript | None = None
    health: dict[str, Any] = field(default_factory=lambda: {"status": "ready"})
    workers: dict[str, PlayedWorker] = field(default_factory=dict)
    playing: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    broke: list[str] = field(default_factory=list)
    presets: dict[str, Preset] = field(default_factory=lambda: {"p": PRESET, "exec": EXEC})
    heard: list[ev.Event] = field(default_factory=list)
    prepare: Callable[[PlayedWorker], None] = lambda worker: None
    engine: Engine = field(init=False)
    runtime: FakeRuntime = field(init=False)
    journal: Journal = field(init=False)
    seal: NodeSeal = field(init=False)
    spool: Spool = field(init=False)
    inputs: Inputs = field(init=False)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _ids: Any = field(default_factory=itertools.count)

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def start_worker(self, spec: WorkerSpec) -> None:
        """The fake runtime has started a container: its program listens."""
        self.started.append(spec.session_id)
        self._news.set()
        if spec.contract is Contract.EXEC:
            return
        socket, health = spec.folder.socket, dict(self.health)
        worker = PlayedWorker(spec.session_id, socket, self.on_task, self.on_attach, health=health)
        self.prepare(worker)
        self.workers[spec.session_id] = worker
        listener = worker.listen()
        playing = self.playing[spec.session_id] = self.group.create_task(worker.serve(listener))
        playing.add_done_callback(lambda _: listener.close())

    def remembers(self, **how: Any) -> Remembering:
        """From here on workers keep what they said."""
        self.on_task = self.on_attach = script = Remembering(**how)
        return script

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
        detached: bool = False,
        key: RequestKey | None = None,
        **metadata: Any,
    ) -> tuple[str, str]:
        """Submit a task; its id and its session's."""
        number = next(self._ids)
        name = next((n for n, p in self.presets.items() if p is preset), f"preset{number}")
        self.presets[name] = preset
        task_id = self.engine.submit(
            Submission(
                task_id=f"t_{number}",
                tenant=tenant,
                task_type=TaskType.ONEOFF if oneoff or preset.contract == "exec" else TaskType.SESSION,
                tier=None,
                model_id="m",
                task_preset=name,
                session_id=session_id,
                new_session_id=f"s_{number}",
                timeout=timeout,
                body=orjson.dumps({"metadata": metadata}),
                detached=detached,
                key=key,
            )
        )
        return task_id, self.task(task_id).session_id

    def request(
        self, session_id: str, *, model_id: str = "m", preset: str = "p", key: RequestKey | None = None
    ) -> str:
        """Ask for a session ahead of its first task; its id."""
        return self.engine.request_session(
            session_id, tenant="a", tier=None, model_id=model_id, task_preset=preset, key=key
        )

    def kill(self) -> None:
        """As by SIGKILL, now: what this life does from here on changes nothing for the next one."""
        self.killed = True
        if hasattr(self, "engine"):  # it may be killed before it has one
            self.engine.broken = "killed"
        self.disk = {table: dict(rows) for table, rows in self.disk.items()}
        left = self.spool_root
        self.spool_root = self.root / f"kept_{next(self._ids)}"
        shutil.copytree(left, self.spool_root)
        self.runtime.unreachable = True
        self.machine.listeners.clear()

    def told(self, kind: type[E]) -> list[E]:
        """The events of one kind that the core has heard."""
        return [event for event in self.heard if isinstance(event, kind)]

    def session(self, session_id: str) -> Session:
        return self.engine.node.sessions[session_id]

    def task(self, task_id: str) -> Task:
        return self.engine.node.tasks[task_id]

    async def until(self, holds: Callable[[], Any], within: float = 20.0) -> None:
        """Wait until `holds` is true, looking again after each decision and each start of a worker."""
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

    async def ended(self, session_id: str) -> tuple[str, str, str]:
        """How the only session ended, badly: its state, its reason, and the code of its failure. Nothing may
        be left of it."""
        session = self.session(session_id)
        await self.until(lambda: session.ended)
        await self.free()
        assert (self.machine.containers, self.folders.names(), self.broke) == ({}, (), [])
        assert session.failure is not None
        return session.state, str(session.close_reason), session.failure.code

    async def free(self) -> None:
        """Wait until every slot is free."""
        await self.until(lambda: all(slot.state == "free" for slot in self.engine.node.slots))

    async def washes(self) -> None:
        """Wait until no wash runs."""
        async with asyncio.timeout(20):
            await self.engine._washes.settle(20)

    async def saw(self, task_id: str, text: str) -> None:
        """Wait until a delta of this text is in the task's stream."""
        stream = self.engine.streams.get(task_id)
        assert stream is not None
        async with asyncio.timeout(20):
            async for chunk in stream.read():
                if any(event.data.get("delta") == text for event in parse(chunk)):
                    return

    async def until_seq(self, task_id: str, number: int) -> None:
        """Wait until so many events of the worker are in the task's stream."""
        stream = self.engine.streams.get(task_id)
        assert stream is not None
        async with asyncio.timeout(20):
            while stream.worker_seq < number:  # noqa: ASYNC110 (it comes soon)
                await asyncio.sleep(0)

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
async def machine_world(
    tmp_path: Path,
    *,
    slots: tuple[SlotSpec, ...] = slot_specs(1),
    rules: Rules | None = None,
    give_up: float = 300.0,
    machine: FakeEngine | None = None,
    find_preset: FindPreset | None = None,
    models: ModelStore | None = None,
    enclave: Enclave | None = None,
) -> AsyncIterator[World]:
    """A machine on which no service lives yet; the one that does will renew this `enclave`."""
    await asyncio.to_thread(tmp_path.mkdir, exist_ok=True)
    machine = machine or FakeEngine()
    machine.images[IMAGE] = FakeScript(on_term=143)
    async with unwrapped(), asyncio.TaskGroup() as group:
        world = World(
            root=tmp_path,
            group=group,
            machine=machine,
            clock=FakeClock(),
            folders=RunFolders(tmp_path / "run"),
            slots=slots,
            rules=rules or Rules(),
            give_up=give_up,
            find_preset=find_preset,
            spool_root=tmp_path / "kept",
            models=models,
            enclave=enclave,
        )
        (tmp_path / "seal").mkdir(exist_ok=True)
        world.seal = NodeSeal.open(
            tmp_path / "seal", enclave=enclave is not None, allow_simulated=enclave is not None
        )
        yield world
        for worker in world.workers.values():
            worker.released.set()
        for playing in world.playing.values():
            playing.cancel()


@asynccontextmanager
async def engine_life(world: World, *, journal: Journal | None = None) -> AsyncIterator[Engine]:
    """One life of the service: it takes up what is there, and at the end of the block leaves all as it is.

    It is told of the slots by its first decision, which the block finds taken.
    """
    world.killed = False
    world.runtime = FakeRuntime(world.machine)
    world.runtime.name = "process"  # so that the listener's uid is compared with ours
    world.runtime.on_start = world.start_worker
    world.journal = journal or MemoryJournal(world.disk)
    world.spool = Spool(world.spool_root)
    world.spool.open()
    world.inputs = Inputs(world.spool)
    world.heard = []
    streams = Streams(max_bytes_each=1 << 20, max_bytes_total=1 << 24, spool=world.spool)
    node = Node(world.rules, judge=world.seal.judge)
    rebooted = recover(
        node,
        journal=world.journal,
        spool=world.spool,
        streams=streams,
        inputs=world.inputs,
        boot_id=world.boot_id,
        wall_offset=world.wall_offset,
    )
    engine = world.engine = Engine(
        node,
        journal=world.journal,
        spool=world.spool,
        streams=streams,
        runtime=world.runtime,
        folders=world.folders,
        inputs=world.inputs,
        launcher=Launcher(
            find_preset=world.find_preset or (lambda _, name: world.presets[name]),
            models=world.models or FolderModelStore(world.root / "models"),
            inputs=world.inputs,
            uid_base=20_000,
        ),
        clock=world.clock,
        equipment=Equipment(
            seal=world.seal,
            residue=residue_in(world.runtime, world.folders, lambda session_id: engine.served_by(session_id)),
            scrubber=world.scrubber,
            gates=world.gates,
            enclave=world.enclave,
            give_up=world.give_up,
        ),
        on_broken=lambda: world.broke.append(engine.broken or ""),
    )
    engine.on_decided = world.decided
    handle = node.handle

    def recorded(event: ev.Event, now: float) -> list[Effect]:
        world.heard.append(event)
        return handle(event, now)

    node.handle = recorded
    async with engine.running():
        engine.report(ev.NodeStarted(slots=world.slots, rebooted=rebooted))
        yield engine


@asynccontextmanager
async def engine_world(
    tmp_path: Path, *, washed: bool = True, journal: Journal | None = None, **machine: Any
) -> AsyncIterator[World]:
    """A running engine on a machine of its own, whose slots are free (with `washed`)."""
    async with machine_world(tmp_path, **machine) as world, engine_life(world, journal=journal):
        if washed:
            await world.free()
            await world.washes()
        yield world
        for worker in world.workers.values():
            worker.released.set()
