"""What a container may leave on an engine's machine: volumes, the files that the engine keeps of it, and its
control groups with whatever runs in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from docker import APIClient
from docker.errors import NotFound

from gpu_server.drivers import docker_leftover
from gpu_server.drivers.docker_calls import EngineCalls, unreachable
from gpu_server.drivers.process_tree import Leader, is_ending, leader_now
from gpu_server.drivers.residue_processes import containers_of, end_all
from gpu_server.drivers.residue_thread import Halt, in_thread
from gpu_server.drivers.run_folder import remove_entry
from gpu_server.ports import Belongings, Cleaner, EndedLease, NotSeen, RuntimeUnreachable

_ID: Final = re.compile(r"[0-9a-f]{64}")
_INITIAL_CGROUP_NAMESPACE: Final = 0xEFFFFFFB  # include/linux/proc_ns.h


def docker_cleaners(calls: EngineCalls) -> tuple[Cleaner, ...]:
    """Control groups first: what runs in one could write to the others."""
    return ControlGroups(), Volumes(calls), EngineFiles(calls)


def belongings_of(inspect: Mapping[str, Any]) -> Belongings:
    """What an inspected container has. Volumes that it may only read cannot hold anything of it."""
    return Belongings(
        container_id=str(inspect["Id"]),
        volumes=tuple(
            str(mount["Name"])
            for mount in inspect.get("Mounts") or ()
            if mount.get("Type") == "volume" and mount.get("RW", True)
        ),
    )


class Volumes:
    """The volumes that the worker could write to: workers get none, but an image or an engine may add one.
    One that another container uses cannot be removed, and then is not."""

    name = "volumes"

    def __init__(self, calls: EngineCalls) -> None:
        self._calls = calls

    async def look(self, lease: EndedLease) -> int:
        """See the port."""
        belongings = _belongings(lease)
        if belongings is None:
            return 0

        def there(client: APIClient) -> int:
            count = 0
            for volume in belongings.volumes:
                with suppress(NotFound):
                    client.inspect_volume(volume)
                    count += 1
            return count

        with unreachable():
            return await self._calls.call(there)

    async def remove(self, lease: EndedLease) -> None:
        """See the port."""
        belongings = _belongings(lease)

        def removed(client: APIClient) -> None:
            for volume in belongings.volumes if belongings is not None else ():
                with suppress(NotFound):
                    client.remove_volume(volume)

        with unreachable():
            await self._calls.call(removed)


class EngineFiles:
    """The folder that the engine keeps of a container, below its data root: its logs and its settings. An
    engine that is killed while it removes a container may leave it."""

    name = "engine_files"

    def __init__(self, calls: EngineCalls) -> None:
        self._calls = calls

    async def look(self, lease: EndedLease) -> int:
        """See the port."""
        folder = await self._containers()
        container_id = _container_id(lease)
        if container_id is None:
            return 0
        return await in_thread(lambda halt: int(os.path.lexists(folder / container_id)), name=self.name)

    async def remove(self, lease: EndedLease) -> None:
        """See the port. Raises `RuntimeUnreachable` while the engine knows the container."""
        folder = await self._containers()
        container_id = _container_id(lease)
        if container_id is None:
            return

        def known(client: APIClient) -> bool:
            with suppress(NotFound):
                client.inspect_container(container_id)
                return True
            return False

        with unreachable():
            if await self._calls.call(known):
                raise RuntimeUnreachable(f"container {container_id[:12]} is still there")

        def remove(halt: Halt) -> None:
            halt()
            parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                remove_entry(container_id, parent, halt)
            finally:
                os.close(parent)

        await in_thread(remove, name=self.name)

    async def _containers(self) -> Path:
        with unreachable():
            info = await self._calls.call(lambda client: client.info())
        folder = Path(str(info.get("DockerRootDir") or "/nowhere")) / "containers"
        if not await in_thread(lambda halt: os.access(folder, os.R_OK | os.X_OK), name=self.name):
            raise NotSeen("the engine's data root cannot be seen from here")
        return folder


class ControlGroups:
    """The control groups of the container: what runs in them is ended, and they are removed."""

    name = "control_groups"

    def __init__(self, cgroups: Path = docker_leftover.CGROUPS) -> None:
        self._cgroups = cgroups

    async def look(self, lease: EndedLease) -> int:
        """See the port. Counts groups, each with those below it."""
        return await in_thread(lambda halt: len(self._find(lease)), name=self.name)

    async def remove(self, lease: EndedLease) -> None:
        """See the port."""
        await in_thread(lambda halt: self._remove(lease, halt), name=self.name)

    def _remove(self, lease: EndedLease, halt: Halt) -> None:
        container_id = _container_id(lease)
        if container_id is None:
            return

        end_all(lambda: _members(container_id, self._cgroups), halt)
        for group in self._find(lease):
            for folder, _, _ in os.walk(group, topdown=False):
                halt()
                with suppress(FileNotFoundError):
                    os.rmdir(folder)

    def _find(self, lease: EndedLease) -> list[Path]:
        if self._cgroups == docker_leftover.CGROUPS:
            _require_machines_groups()
        container_id = _container_id(lease)
        if container_id is None:
            return []
        return [
            group
            for place in docker_leftover._PLACES
            for group in self._cgroups.glob(place.format(container_id))
        ]


def _members(container_id: str, cgroups: Path) -> Iterator[Leader]:
    """The processes in a container's control groups. Each is asked again once it is known by more than its
    pid, which could have become another's; one that is ending cannot say, and a signal does nothing to it."""
    for pid in docker_leftover.processes_of(container_id, cgroups) - {0}:
        process = leader_now(pid)
        if process is None:
            continue
        if container_id in containers_of(str(pid)) or is_ending(process):
            yield process


def _require_machines_groups() -> None:
    try:
        initial = os.stat("/proc/self/ns/cgroup").st_ino == _INITIAL_CGROUP_NAMESPACE
    except OSError:
        initial = False
    if not initial:
        raise NotSeen("the machine's control groups cannot be seen from here")


def _belongings(lease: EndedLease) -> Belongings | None:
    """Raises `NotSeen` where a lease had a worker, perhaps, that nobody asked in time."""
    if lease.belongings is None and lease.session_id is not None:
        raise NotSeen("no container was found")
    return lease.belongings


def _container_id(lease: EndedLease) -> str | None:
    belongings = _belongings(lease)
    if belongings is None:
        return None
    if not _ID.fullmatch(belongings.container_id):
        raise NotSeen("the container has no id as engines give them")
    return belongings.container_id
