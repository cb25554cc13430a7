"""The scrub of one GPU's memory: worker_images/carwash as a container that has exactly this GPU, or, on a
machine without Docker, as a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from docker import APIClient
from docker.errors import APIError, ImageNotFound

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.docker_api import attach, create_container, inspect_image, short
from gpu_server.drivers.docker_body import LABEL_FENCE, LABEL_INSTANCE, device_requests, seccomp_profile
from gpu_server.drivers.docker_calls import EngineCalls
from gpu_server.drivers.docker_output import AttachedOutput
from gpu_server.drivers.docker_removal import remove_for_certain
from gpu_server.drivers.enclave_container import LABEL_ROLE
from gpu_server.drivers.enclave_host import last_words
from gpu_server.drivers.scrub_answer import MAX_ANSWER_BYTES, MIN_SHARE, read_answer
from gpu_server.ports import RuntimeUnreachable, WashUnreachable
from gpu_server.sealed.wash import Figures

ROLE: Final = "carwash"
LABEL_GPU: Final = "gpu-server.gpu"
LIMIT_SECONDS: Final = 60.0

_UID: Final = 65532
# The CUDA driver keeps some hundred MB of the host's memory for a context, more on a larger GPU.
_MEMORY_BYTES: Final = 4 << 30
_WORDS_BYTES: Final = 4096
_DRAIN_SECONDS: Final = 5.0


def scrub_body(
    image: str, spec: SlotSpec, fence: int, *, instance: str, arguments: Sequence[str]
) -> dict[str, Any]:
    """The create request for a scrub: no network, nothing to write to but a small /tmp, no capability, not
    root, and exactly one GPU.

    Whether the CUDA driver is content with the seccomp profile and the read-only root is not known: it was
    never run on a GPU. Nothing in either is known to keep it from working.
    """
    return {
        "Image": image,
        "Hostname": ROLE,
        "User": f"{_UID}:{_UID}",
        "Env": [
            "HOME=/tmp",
            f"NVIDIA_VISIBLE_DEVICES={spec.uuid}",
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        ],
        "Cmd": list(arguments),
        "Labels": {
            LABEL_INSTANCE: instance,
            LABEL_ROLE: ROLE,
            LABEL_GPU: spec.uuid,
            LABEL_FENCE: str(fence),
        },
        "AttachStdin": False,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": False,
        "Tty": False,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "Tmpfs": {
                "/tmp": "rw,nosuid,nodev,noexec,size=16m,mode=1777",
                "/dev/mqueue": "ro,nosuid,nodev,noexec,size=4k",
            },
            "CapDrop": ["ALL"],
            "Privileged": False,
            "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp_profile()}"],
            "IpcMode": "private",
            # The engine's own: the CUDA driver keeps files there, and dies where they do not fit.
            "ShmSize": 64 << 20,
            "Memory": _MEMORY_BYTES,
            "MemorySwap": _MEMORY_BYTES,
            "PidsLimit": 128,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "none", "Config": {}},
            "DeviceRequests": device_requests((spec.uuid,)),
        },
    }


def _arguments(spec: SlotSpec, min_share: int, limit: float) -> list[str]:
    # It also ends by itself, should nobody be left to end it.
    return ["--uuid", spec.uuid, "--min-share", str(min_share), "--seconds", str(round(limit) + 1)]


@dataclass(slots=True)
class _Said:
    """What a program wrote: its answer, and the end of what it complained of."""

    answer: bytearray
    words: bytearray

    def add(self, data: bytes, *, is_answer: bool) -> None:
        """Raises `WashUnreachable` when the answer is longer than any is."""
        if not is_answer:
            self.words += data
            del self.words[:-_WORDS_BYTES]
            return
        self.answer += data
        if len(self.answer) > MAX_ANSWER_BYTES:
            raise WashUnreachable("what the scrub wrote is no answer: it is too long")

    def figures(self, spec: SlotSpec, min_share: int) -> Figures:
        """See `read_answer`."""
        if not self.answer.strip():
            words = last_words(bytes(self.words))
            raise WashUnreachable(f"the scrub ended without an answer{words and f': {words}'}")
        return read_answer(bytes(self.answer), spec, min_share=min_share)


class ContainerScrubber:
    """`GpuScrubber` over a Docker engine. `limit` bounds a scrub, in seconds; `min_share` is in thousandths.
    `body` makes the create request, `scrub_body` unless given.

    It keeps no state: a scrub's container is known by its labels, also to the next life of the service.
    """

    def __init__(
        self,
        instance: str,
        image: str,
        *,
        limit: float = LIMIT_SECONDS,
        min_share: int = MIN_SHARE,
        docker_host: str | None = None,
        call_timeout: float = 30.0,
        body: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        self._instance, self._image, self._body = instance, image, body or scrub_body
        self._limit, self._min_share = limit, min_share
        self._call_timeout = call_timeout
        self._calls = EngineCalls(docker_host, call_timeout)
        self._opening = asyncio.Lock()

    async def scrub(self, spec: SlotSpec, fence: int) -> Figures:
        """See the port."""
        async with self._engine():
            await self._remove(f"{LABEL_GPU}={spec.uuid}")
            said = _Said(bytearray(), bytearray())
            try:
                output = AttachedOutput(await self._start(spec, fence))
                try:
                    async with asyncio.timeout(self._limit):
                        async for piece in output:
                            said.add(piece.data, is_answer=piece.stream == "stdout")
                except TimeoutError as error:
                    raise WashUnreachable(f"the scrub did not end within {self._limit:g} s") from error
                finally:
                    output.close()
            finally:
                await self._remove(f"{LABEL_GPU}={spec.uuid}")
        return said.figures(spec, self._min_share)

    async def sweep(self) -> int:
        """See the port."""
        async with self._engine():
            return await self._remove()

    async def missing(self) -> str | None:
        """Why no scrub can be started here, for want of its image; None where one can. Raises
        `WashUnreachable` while the engine does not answer."""
        try:
            async with self._engine():
                await self._calls.call(lambda client: inspect_image(client, self._image))
        except WashUnreachable as error:
            if isinstance(error.__cause__, ImageNotFound):
                return str(error)
            raise
        return None

    def close(self) -> None:
        """See the port. A call later opens it again."""
        self._calls.close()

    @asynccontextmanager
    async def _engine(self) -> AsyncIterator[None]:
        """Calls to the engine; its errors become the port's."""
        try:
            async with self._opening:
                if not self._calls.is_open:
                    await self._calls.open()
            yield
        except ImageNotFound as error:
            raise WashUnreachable(
                f"there is no image {self._image} on this machine: ./scripts/build_images.sh carwash makes it"
            ) from error
        except APIError as error:
            raise WashUnreachable(f"the scrub's container does not start: {short(error)}") from error
        except RuntimeUnreachable as error:
            raise WashUnreachable(str(error)) from error

    async def _start(self, spec: SlotSpec, fence: int) -> socket.socket:
        """Create, attach, start. Not given up half-way: what appeared later would be nobody's."""
        name = f"gpu-server-carwash-{self._instance}-{spec.uuid}-{fence}"
        arguments = _arguments(spec, self._min_share, self._limit)
        body = self._body(self._image, spec, fence, instance=self._instance, arguments=arguments)

        def start(client: APIClient) -> socket.socket:
            inspect_image(client, self._image)
            container_id = create_container(client, body, name)
            connection = attach(client, container_id)
            try:
                client.start(container_id)
            except BaseException:
                connection.close()
                raise
            return connection

        async def outcome() -> socket.socket | Exception:
            try:
                return await self._calls.call(start)
            except Exception as error:  # noqa: BLE001 -- it is raised below, and not as a group
                return error

        async with asyncio.TaskGroup() as group:
            starting = group.create_task(outcome(), name="carwash.start")
            try:
                came = await asyncio.shield(starting)
            except asyncio.CancelledError:
                late = await asyncio.shield(starting)
                if isinstance(late, socket.socket):
                    late.close()
                raise
        if isinstance(came, Exception):
            raise came
        return came

    async def _remove(self, *labels: str) -> int:
        """Remove the scrubs with these labels; how many there were. Not given up half-way."""
        wanted = [f"{LABEL_INSTANCE}={self._instance}", f"{LABEL_ROLE}={ROLE}", *labels]

        def listed(client: APIClient) -> list[str]:
            return [str(found["Id"]) for found in client.containers(all=True, filters={"label": wanted})]

        found = await self._calls.call(listed)
        for container_id in found:
            await remove_for_certain(self._calls, container_id, limit=self._call_timeout)
        return len(found)


class ProcessScrubber:
    """`GpuScrubber` by a process of the service's own user, which isolates nothing.

    `command` is the program without its arguments. It sees the one GPU that it is for, and nothing of the
    service's environment but `environment`. It ends with its time, also when the service was killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        limit: float = LIMIT_SECONDS,
        min_share: int = MIN_SHARE,
    ) -> None:
        self._command, self._environment = tuple(command), dict(environment)
        self._limit, self._min_share = limit, min_share

    async def scrub(self, spec: SlotSpec, fence: int) -> Figures:
        """See the port. One that an earlier life of the service left runs for its `limit` at most, and
        `GpuGates` sees it until then."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *_arguments(spec, self._min_share, self._limit),
                env={**self._environment, "CUDA_VISIBLE_DEVICES": spec.uuid},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise WashUnreachable(f"the scrub's process does not start: {error.strerror}") from error
        said = _Said(bytearray(), bytearray())
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._limit):
                while piece := await process.stdout.read(MAX_ANSWER_BYTES):
                    said.add(piece, is_answer=True)
        except TimeoutError as error:
            raise WashUnreachable(f"the scrub did not end within {self._limit:g} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also its children, of which none is expected
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    while await process.stdout.read(MAX_ANSWER_BYTES):
                        pass
            await process.wait()
        return said.figures(spec, self._min_share)

    async def sweep(self) -> int:
        """See the port: there is nothing that it could find."""
        return 0

    def close(self) -> None:
        """See the port: there is nothing to let go of."""


def program_process(*, limit: float = LIMIT_SECONDS, min_share: int = MIN_SHARE) -> ProcessScrubber:
    """The scrub's program as it lies in this checkout, run by this Python."""
    folder = Path(__file__).parents[2] / "worker_images/carwash"
    return ProcessScrubber(
        (sys.executable, "-m", "carwash"),
        environment={
            "PYTHONPATH": str(folder),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_CACHE_DISABLE": "1",
            "CUDA_MODULE_LOADING": "EAGER",
        },
        limit=limit,
        min_share=min_share,
    )
