"""A container runtime in memory that behaves like the port, and badly when told to.

`FakeEngine` is the machine and outlives its runtimes, as Docker does. What a worker does is a `FakeScript`,
found by its image; a test may also play the worker itself with `say` and `exit`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from gpu_server.ports import (
    Belongings,
    Cleaner,
    Contract,
    CreatedWorker,
    EndedLease,
    FoundWorker,
    Output,
    OutputLost,
    RuntimeUnreachable,
    SeenWorker,
    StartRefused,
    WorkerExit,
    WorkerSpec,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeScript:
    """What a worker does: writes, then exits (None: runs on); on SIGTERM exits so (None: ignores it)."""

    output: tuple[Output, ...] = ()
    exit_code: int | None = None
    on_term: int | None = 143


class FakeOutput:
    """A worker's output, fed by hand. Unbounded: tests are small."""

    def __init__(self) -> None:
        self._pieces: deque[Output] = deque()
        self._news = asyncio.Event()
        self._ended = False

    def feed(self, piece: Output) -> None:
        if not self._ended:
            self._pieces.append(piece)
            self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def close(self) -> None:
        self._pieces.clear()
        self.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        while not self._pieces:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._pieces.popleft()


@dataclass(slots=True, kw_only=True)
class FakeContainer:
    """One worker on the machine. `log` is all that an `exec` worker wrote, which is kept for it alone."""

    instance: str
    spec: WorkerSpec
    script: FakeScript
    output: FakeOutput
    log: list[Output] = field(default_factory=list)
    started: bool = False
    exit: WorkerExit | None = None

    def write(self, piece: Output) -> None:
        if self.spec.sealed:
            return
        self.output.feed(piece)
        if self.spec.contract is Contract.EXEC:
            self.log.append(piece)

    @property
    def running(self) -> bool:
        return self.started and self.exit is None


@dataclass(slots=True, kw_only=True)
class FakeEngine:
    """The machine: its images, its containers, and who listens for exits."""

    images: dict[str, FakeScript] = field(default_factory=dict)
    containers: dict[str, FakeContainer] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    listeners: list[tuple[str, Callable[[WorkerExit], None]]] = field(default_factory=list)
    volumes: dict[str, set[str]] = field(default_factory=dict)
    """Container id -> the volumes that it has, or has left."""

    def say(self, name: str, data: bytes, stream: Literal["stdout", "stderr"] = "stdout") -> None:
        """The worker writes."""
        self.containers[name].write(Output(stream, data))

    def exit(self, name: str, exit_code: int, *, oom_killed: bool = False) -> None:
        """The worker's process ends."""
        container = self.containers[name]
        container.exit = WorkerExit(
            name=name,
            session_id=container.spec.session_id,
            exit_code=exit_code,
            oom_killed=oom_killed,
        )
        container.output.end()
        for instance, heard in self.listeners:
            if instance == container.instance:
                asyncio.get_running_loop().call_soon(heard, container.exit)


class FakeVolumes:
    """`Cleaner` of the volumes that the fake's workers leave; `stuck` ones stay."""

    name = "volumes"

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.stuck: set[str] = set()

    async def look(self, lease: EndedLease) -> int:
        mine = lease.belongings
        return len(self._engine.volumes.get(mine.container_id, ())) if mine is not None else 0

    async def remove(self, lease: EndedLease) -> None:
        if lease.belongings is not None:
            self._engine.volumes.get(lease.belongings.container_id, set()).intersection_update(self.stuck)


class FakeRuntime:
    """`ContainerRuntime` over a `FakeEngine`.

    It keeps what `exec` workers write, and gives nobody what those of sealed sessions write. To the engine,
    `close` is the same as a kill of the service: nobody listens any more.

    Switches: `unreachable` makes every method fail so; `wrong[method]` is raised by that method;
    `gates[method]` holds that method until the event is set (slow), or for ever (never).
    `calls` tells what was called, in order, as (method, worker or image).
    """

    name: Literal["docker", "process"] = "docker"

    def __init__(self, engine: FakeEngine | None = None, instance: str = "fake") -> None:
        self.warnings: tuple[str, ...] = ()
        self.interruptions = 0
        self.engine = engine or FakeEngine()
        self.instance = instance
        self.unreachable = False
        self.wrong: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.calls: list[tuple[str, str]] = []
        self.on_start: Callable[[WorkerSpec], None] = lambda spec: None
        self._listener: tuple[str, Callable[[WorkerExit], None]] | None = None

    async def open(self, heard_exit: Callable[[WorkerExit], None]) -> None:
        await self._enter("open")
        self._listener = (self.instance, heard_exit)
        self.engine.listeners.append(self._listener)
        for container in self._ours():
            if container.exit is not None:
                asyncio.get_running_loop().call_soon(heard_exit, container.exit)

    async def close(self) -> None:
        if self._listener in self.engine.listeners:
            self.engine.listeners.remove(self._listener)

    async def ping(self, limit: float = 5.0) -> None:
        try:
            async with asyncio.timeout(limit):
                await self._enter("ping")
        except TimeoutError as error:
            raise RuntimeUnreachable("the fake engine did not answer in time") from error

    async def require_image(self, image: str) -> None:
        await self._enter("require_image", image)
        if image not in self.engine.images:
            raise StartRefused("image_missing", f"image {image} is not available")

    async def create(self, spec: WorkerSpec) -> CreatedWorker:
        await self._enter("create", spec.name)
        script = self.engine.images.get(spec.image)
        if script is None:
            raise StartRefused("image_missing", f"image {spec.image} is not available")
        old = self.engine.containers.get(spec.name)
        if old is not None and (old.started or old.instance != self.instance):
            raise StartRefused("start_failed", f"the name {spec.name} is taken")
        container = FakeContainer(instance=self.instance, spec=spec, script=script, output=FakeOutput())
        self.engine.containers[spec.name] = container
        if spec.sealed:
            container.output.end()
        return CreatedWorker(name=spec.name, container_id=f"fake-{spec.name}", output=container.output)

    async def start(self, name: str) -> None:
        await self._enter("start", name)
        container = self.engine.containers.get(name)
        if container is None or container.instance != self.instance:
            raise StartRefused("start_failed", f"there is no worker {name}")
        if container.exit is not None:
            raise StartRefused("start_failed", f"worker {name} ran already and has ended")
        if container.started:
            return
        container.started = True
        self.on_start(container.spec)
        for piece in container.script.output:
            container.write(piece)
        if container.script.exit_code is not None:
            self.engine.exit(name, container.script.exit_code)

    async def reattach(self, name: str, *, from_start: bool = False) -> FoundWorker | None:
        await self._enter("reattach", name)
        container = self.engine.containers.get(name)
        if container is None or container.instance != self.instance or not container.started:
            return None
        if from_start and container.spec.contract is not Contract.EXEC:
            raise OutputLost(f"what worker {name} wrote is not kept")
        container.output.close()
        container.output = FakeOutput()
        for piece in container.log if from_start else ():
            container.output.feed(piece)
        if container.exit is not None or container.spec.sealed:
            container.output.end()
        return FoundWorker(
            name=name, container_id=f"fake-{name}", output=container.output, exit=container.exit
        )

    async def remove(self, name: str, *, grace: float) -> None:
        await self._enter("remove", name)
        container = self.engine.containers.get(name)
        if container is None or container.instance != self.instance:
            return
        if container.running:
            asked = container.script.on_term if grace > 0 else None
            self.engine.exit(name, 137 if asked is None else asked)
        container.output.end()
        del self.engine.containers[name]

    async def list_workers(self) -> tuple[SeenWorker, ...]:
        await self._enter("list_workers")
        return tuple(
            SeenWorker(
                name=container.spec.name,
                container_id=f"fake-{container.spec.name}",
                session_id=container.spec.session_id,
                fence=container.spec.fence,
                running=container.running,
            )
            for container in self._ours()
        )

    async def foreign_gpu_holders(self) -> Mapping[str, str]:
        await self._enter("foreign_gpu_holders")
        return dict(self.engine.holders)

    async def belongings(self, name: str) -> Belongings | None:
        await self._enter("belongings", name)
        container = self.engine.containers.get(name)
        if container is None or container.instance != self.instance:
            return None
        container_id = f"fake-{name}"
        volumes = tuple(sorted(self.engine.volumes.get(container_id, ())))
        return Belongings(container_id=container_id, volumes=volumes)

    def cleaners(self) -> tuple[Cleaner, ...]:
        return (FakeVolumes(self.engine),)

    def _ours(self) -> list[FakeContainer]:
        return [found for found in self.engine.containers.values() if found.instance == self.instance]

    async def _enter(self, method: str, subject: str = "") -> None:
        self.calls.append((method, subject))
        if method in self.gates:
            await self.gates[method].wait()
        if self.unreachable:
            raise RuntimeUnreachable("the fake engine is unreachable")
        if method in self.wrong:
            raise self.wrong[method]
