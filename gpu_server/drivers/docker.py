"""Workers as sibling containers of a Docker engine.

The driver keeps no state: names and labels of containers are the truth. Every SDK call runs in a small pool
of threads and returns soon (`docker_calls.py`); what takes long is waited for elsewhere: a worker's exit on
the one events stream, an image's download in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import structlog
from docker import APIClient
from docker.errors import APIError, ImageNotFound, NotFound

from gpu_server.core.errors import FailureCode
from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.docker_api import attach, create_container, inspect_image
from gpu_server.drivers.docker_body import (
    LABEL_FENCE,
    LABEL_INSTANCE,
    LABEL_SESSION,
    container_body,
    labels,
    seccomp_profile,
)
from gpu_server.drivers.docker_calls import EngineCalls, refused, unreachable
from gpu_server.drivers.docker_events import NEVER_STARTED, ExitListener
from gpu_server.drivers.docker_found import Found, take_up
from gpu_server.drivers.docker_holders import foreign_gpu_holders
from gpu_server.drivers.docker_images import image_missing, pull
from gpu_server.drivers.docker_kept import KeptOutput
from gpu_server.drivers.docker_output import AttachedOutput, no_output
from gpu_server.drivers.docker_removal import remove_for_certain
from gpu_server.drivers.docker_residue import belongings_of, docker_cleaners
from gpu_server.ports import (
    Belongings,
    Cleaner,
    CreatedWorker,
    FoundWorker,
    RuntimeUnreachable,
    SeenWorker,
    StartRefused,
    StartUnanswered,
    WorkerExit,
    WorkerSpec,
)

_CONFLICT: Final = 409

log = structlog.get_logger()


class DockerRuntime:
    """`ContainerRuntime` over the Docker Engine API, for the containers labelled with `instance`.

    `docker_host` is a URL as in DOCKER_HOST (None: the local socket); attaching needs a unix socket or plain
    TCP. `call_timeout` bounds one API call, `pull_timeout` the download of an image, both in seconds.
    """

    name: Literal["docker", "process"] = "docker"

    def __init__(
        self,
        instance: str,
        docker_host: str | None = None,
        call_timeout: float = 30,
        pull_timeout: float = 600,
    ) -> None:
        self.warnings: tuple[str, ...] = ()
        self._instance = instance
        self._call_timeout = call_timeout
        self._pull_timeout = pull_timeout
        self._seccomp = seccomp_profile()
        self._calls = EngineCalls(docker_host, call_timeout)
        self._listener: ExitListener | None = None
        self._exits: dict[str, set[asyncio.Event]] = {}
        self._outputs: weakref.WeakValueDictionary[str, AttachedOutput | KeptOutput] = (
            weakref.WeakValueDictionary()
        )
        self._pulls: set[threading.Event] = set()

    async def open(self, heard_exit: Callable[[WorkerExit], None]) -> None:
        """Connect and listen. Exits that happened before are heard too, once, as missed ones."""
        if self._calls.is_open:
            raise RuntimeError("this runtime is open already")
        loop = asyncio.get_running_loop()
        await self._calls.open()
        try:
            with unreachable():
                self.warnings = _warnings(await self._calls.call(lambda client: client.info()))
        except BaseException:
            await self.close()
            raise

        def on_loop(container_id: str, worker_exit: WorkerExit) -> None:
            for waiting in self._exits.get(container_id, ()):
                waiting.set()
            heard_exit(worker_exit)

        def in_thread(container_id: str, worker_exit: WorkerExit) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(on_loop, container_id, worker_exit)

        self._listener = ExitListener(self._calls.connect, self._instance, in_thread)
        self._listener.start()

    @property
    def interruptions(self) -> int:
        """See the port: counted when the events stream ends, so before an exit that was missed is told."""
        return self._listener.interruptions if self._listener is not None else 0

    async def close(self) -> None:
        """Stop listening and let go of every connection. Containers are left as they are."""
        listener, self._listener = self._listener, None
        for stop in self._pulls:
            stop.set()
        for output in list(self._outputs.values()):
            output.close()
        if listener is not None:
            await asyncio.to_thread(listener.close, 5.0)
        self._calls.close()

    async def ping(self, limit: float = 5.0) -> None:
        """See the port."""
        await self._calls.ping(limit)

    async def require_image(self, image: str) -> None:
        """See the port. An image that is not there is pulled once, for at most `pull_timeout` seconds."""
        with unreachable():
            try:
                await self._calls.call(lambda client: inspect_image(client, image))
            except ImageNotFound:
                pass
            else:
                return
        stop = threading.Event()
        self._pulls.add(stop)
        try:
            problem = await call_in_thread(
                lambda: pull(self._calls.connect, image, stop), limit=self._pull_timeout, name="docker-pull"
            )
        except TimeoutError:
            problem = f"the download took longer than {self._pull_timeout:.0f} s"
        finally:
            stop.set()
            self._pulls.discard(stop)
        if problem is not None:
            raise image_missing(image, problem)

    async def create(self, spec: WorkerSpec) -> CreatedWorker:
        """See the port. The output must be read: the engine holds back a worker whose listener does not
        read."""
        with refused():
            container_id, output = await self._calls.call(
                lambda client: self._create(client, spec), discard=lambda created: created[1].close()
            )
        self._end_output(spec.name)
        self._outputs[spec.name] = output
        return CreatedWorker(name=spec.name, container_id=container_id, output=output)

    async def start(self, name: str) -> None:
        """See the port."""

        ordered = False

        def start(client: APIClient) -> bool:
            """Whether it ran before and has ended: the engine would run it a second time."""
            nonlocal ordered
            found = self._find(client, name)
            if found is None:
                raise StartRefused(FailureCode.START_FAILED, f"there is no worker {name} to start")
            if found["State"]["StartedAt"] != NEVER_STARTED:
                return not found["State"]["Running"]
            ordered = True
            client.start(found["Id"])
            return False

        try:
            with refused():
                ran_before = await self._calls.call(start)
        except StartRefused:
            self._end_output(name)
            raise
        except RuntimeUnreachable as error:
            if ordered:
                raise StartUnanswered(str(error)) from error
            raise
        if ran_before:
            raise StartRefused(FailureCode.START_FAILED, f"worker {name} ran already and has ended")

    async def reattach(self, name: str, *, from_start: bool = False) -> FoundWorker | None:
        """See the port. What is kept of an `exec` worker's output, and when it is lost: `docker_kept.py`."""

        def take(client: APIClient) -> Found | None:
            found = self._find(client, name)
            if found is None:
                return None
            try:
                return take_up(self._calls, client, found, from_start=from_start)
            except NotFound:
                return None

        with unreachable():
            found = await self._calls.call(take, discard=_let_go)
        if found is None:
            return None
        self._end_output(name)
        self._outputs[name] = found.output
        return FoundWorker(name=name, container_id=found.container_id, output=found.output, exit=found.exit)

    async def remove(self, name: str, *, grace: float) -> None:
        """See the port."""
        with unreachable():
            found = await self._calls.call(lambda client: self._find(client, name))
            if found is None:
                return
            container_id = str(found["Id"])
            if found["State"]["Running"] and grace > 0:
                await self._terminate(container_id, grace)
            await remove_for_certain(self._calls, container_id, limit=self._call_timeout)
        if found["State"]["StartedAt"] == NEVER_STARTED:
            self._end_output(name)

    async def list_workers(self) -> tuple[SeenWorker, ...]:
        """See the port."""

        def listed(client: APIClient) -> list[dict[str, Any]]:
            # The enclave's container is this instance's too, and no worker: it has no session.
            wanted = [f"{LABEL_INSTANCE}={self._instance}", LABEL_SESSION]
            found: list[dict[str, Any]] = client.containers(all=True, filters={"label": wanted})
            return found

        with unreachable():
            return tuple(_seen(container) for container in await self._calls.call(listed))

    async def foreign_gpu_holders(self) -> Mapping[str, str]:
        """See the port. A GPU is named as that container named it: UUID or its prefix, index, or "all"."""

        def inspected(client: APIClient) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            for container in client.containers():
                if (container.get("Labels") or {}).get(LABEL_INSTANCE) == self._instance:
                    continue
                with contextlib.suppress(NotFound):
                    found.append(client.inspect_container(container["Id"]))
            return found

        with unreachable():
            return foreign_gpu_holders(await self._calls.call(inspected), self._instance)

    async def belongings(self, name: str) -> Belongings | None:
        """See the port."""
        with unreachable():
            found = await self._calls.call(lambda client: self._find(client, name))
        return None if found is None else belongings_of(found)

    def cleaners(self) -> tuple[Cleaner, ...]:
        """See the port."""
        return docker_cleaners(self._calls)

    # -- in the pool's threads ----------------------------------------------------------------------------

    def _find(self, client: APIClient, name: str) -> dict[str, Any] | None:
        """The container of that name, if it is this instance's."""
        try:
            found: dict[str, Any] = client.inspect_container(name)
        except NotFound:
            return None
        ours = (found["Config"]["Labels"] or {}).get(LABEL_INSTANCE) == self._instance
        return found if ours and found["Name"].lstrip("/") == name else None

    def _create(self, client: APIClient, spec: WorkerSpec) -> tuple[str, AttachedOutput]:
        try:
            image = inspect_image(client, spec.image)
        except ImageNotFound as error:
            raise image_missing(spec.image, "it is not on this machine") from error
        body = container_body(
            spec,
            instance=self._instance,
            seccomp=self._seccomp,
            image_volumes=(image.get("Config") or {}).get("Volumes") or (),
        )
        try:
            container_id = create_container(client, body, spec.name)
        except APIError as error:
            if error.status_code != _CONFLICT:
                raise
            self._make_way(client, spec)
            container_id = create_container(client, body, spec.name)
        output = no_output() if spec.sealed else AttachedOutput(attach(client, container_id))
        return container_id, output

    def _make_way(self, client: APIClient, spec: WorkerSpec) -> None:
        """Remove the container that has the name, if it is the same worker and never started."""
        try:
            found = client.inspect_container(spec.name)
        except NotFound:
            return
        wanted = labels(spec, self._instance)
        has = found["Config"]["Labels"] or {}
        if any(has.get(label) != value for label, value in wanted.items()):
            raise StartRefused(
                FailureCode.START_FAILED, f"another container already has the name {spec.name}"
            )
        if found["State"]["StartedAt"] != NEVER_STARTED:
            raise StartRefused(FailureCode.START_FAILED, f"worker {spec.name} has been started already")
        with contextlib.suppress(NotFound):
            client.remove_container(found["Id"], v=True, force=True)

    # -- waiting ------------------------------------------------------------------------------------------

    async def _terminate(self, container_id: str, grace: float) -> None:
        """SIGTERM, and wait for the exit on the events stream, at most `grace` seconds."""
        exited = asyncio.Event()
        self._exits.setdefault(container_id, set()).add(exited)
        try:
            async with asyncio.timeout(grace):
                try:
                    await self._calls.call(lambda client: client.kill(container_id, "SIGTERM"))
                except APIError:
                    return  # not running any more
                await exited.wait()
        except TimeoutError:
            pass
        finally:
            waiting = self._exits[container_id]
            waiting.discard(exited)
            if not waiting:
                del self._exits[container_id]

    def _end_output(self, name: str) -> None:
        """The engine ends what is attached to a container when that exits, and not when it never started."""
        if (output := self._outputs.pop(name, None)) is not None:
            output.close()


def _let_go(found: Found | None) -> None:
    if found is not None:
        found.output.close()


def _seen(container: Mapping[str, Any]) -> SeenWorker:
    has = container["Labels"]
    fence = has.get(LABEL_FENCE, "")
    return SeenWorker(
        name=str(container["Names"][0]).lstrip("/") if container["Names"] else str(container["Id"]),
        container_id=str(container["Id"]),
        session_id=has.get(LABEL_SESSION, ""),
        fence=int(fence) if fence.isdigit() else 0,
        running=container["State"] in {"running", "paused", "restarting"},
    )


def _warnings(info: Mapping[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    if not any("seccomp" in option for option in info.get("SecurityOptions") or ()):
        found.append("the Docker engine has no seccomp: workers are not held back from any system call")
    for key, what in (("MemoryLimit", "memory"), ("SwapLimit", "swap"), ("PidsLimit", "process")):
        if not info.get(key, True):
            found.append(f"the Docker engine cannot enforce {what} limits")
    return tuple(found)
