"""What a lease leaves on this machine: removed place by place, then looked for again.

The run folder and whatever the runtime's workers can leave go by the session. Everything else goes by the uid
of the slot's workers, which nothing else on the machine may have; where that cannot be relied on, or a place
cannot be seen from here, the figures say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from gpu_server.drivers.residue_files import CoreFiles, OwnedFiles, SessionFolders, shared_folders
from gpu_server.drivers.residue_ipc import MessageQueues, SysvObjects
from gpu_server.drivers.residue_processes import UidProcesses
from gpu_server.drivers.residue_thread import InThread
from gpu_server.drivers.residue_uids import trusted_uids, why_blind
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import (
    Cleaner,
    ContainerRuntime,
    Dirty,
    EndedLease,
    NotSeen,
    RuntimeUnreachable,
    SeenWorker,
    WashUnreachable,
)
from gpu_server.sealed.wash import Figures

log = structlog.get_logger()


class Residue:
    """`HostResidue` over some cleaners, which work in this order, one at a time.

    Holds nothing between calls. A place that fails does not keep the others from being cleaned.
    """

    def __init__(self, cleaners: Iterable[Cleaner]) -> None:
        self.cleaners = tuple(cleaners)

    async def clean(self, lease: EndedLease) -> Figures:
        """See the port."""
        figures: dict[str, int | str | bytes] = {}
        failed: Exception | None = None
        for cleaner in self.cleaners:
            try:
                figures[cleaner.name] = await _clean(cleaner, lease)
            except NotSeen as blind:
                figures[cleaner.name] = f"not seen: {blind}"
            except Dirty as dirty:
                failed = dirty if not isinstance(failed, Dirty) else failed
            except (RuntimeUnreachable, WashUnreachable, OSError) as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return figures

    async def second_look(self, lease: EndedLease) -> None:
        """See the port."""
        for cleaner in self.cleaners:
            try:
                found = await cleaner.look(lease)
            except NotSeen:
                continue
            if found:
                raise Dirty(f"{cleaner.name}: {found} found on the second look")


async def _clean(cleaner: Cleaner, lease: EndedLease) -> int:
    """How many were found and removed. Raises `Dirty` where some are still there."""
    found = await cleaner.look(lease)
    if found:
        try:
            await cleaner.remove(lease)
            left = await cleaner.look(lease)
        except NotSeen as blind:
            raise WashUnreachable(f"{cleaner.name}: {found} found, and then not seen: {blind}") from blind
        if left:
            raise Dirty(f"{cleaner.name}: {left} still there after removing them")
    return found


class StrayWorkers:
    """Workers of this instance that serve no session, of the lease's session or, without one, of any; with
    all that the runtime knows that they may leave.

    Nobody could list a worker again that is gone. So each is remembered until all that it left is gone too,
    whatever fails or is given up meanwhile.
    """

    name = "workers"

    def __init__(self, runtime: ContainerRuntime, served_by: Callable[[str], str | None]) -> None:
        self._runtime, self._served_by = runtime, served_by
        self._owed: dict[str, EndedLease] = {}

    async def look(self, lease: EndedLease) -> int:
        """See the port."""
        return len({worker.name for worker in await self._find(lease)} | self._owed_by(lease).keys())

    async def remove(self, lease: EndedLease) -> None:
        """See the port."""
        after = Residue(self._runtime.cleaners())
        for worker in await self._find(lease):
            log.warning("wash.residue", container=worker.name, session_id=worker.session_id)
            belongings = await self._runtime.belongings(worker.name)
            if belongings is not None or worker.name not in self._owed:
                self._owed[worker.name] = EndedLease(
                    session_id=worker.session_id, fence=worker.fence, slot_ids=(), belongings=belongings
                )
            await self._runtime.remove(worker.name, grace=0.0)
        for name, owed in self._owed_by(lease).items():
            await after.clean(owed)
            self._owed.pop(name, None)

    def _owed_by(self, lease: EndedLease) -> dict[str, EndedLease]:
        return {
            name: owed
            for name, owed in self._owed.items()
            if lease.session_id is None or (owed.session_id == lease.session_id and owed.fence <= lease.fence)
        }

    async def _find(self, lease: EndedLease) -> list[SeenWorker]:
        seen = await self._runtime.list_workers()
        if lease.session_id is not None:
            return [w for w in seen if w.session_id == lease.session_id and w.fence <= lease.fence]
        return [w for w in seen if self._served_by(w.session_id) != w.name]


def residue_of(
    runtime: ContainerRuntime, folders: RunFolders, *, served_by: Callable[[str], str | None]
) -> Residue:
    """The cleaners of this machine. `served_by` names the worker that serves a session now."""
    # Processes of this runtime's workers are in the service's own namespaces, wherever that is.
    uids_of = trusted_uids(None if runtime.name == "process" else why_blind())
    places = (
        UidProcesses(uids_of),  # before the rest: what lives on could make more
        SessionFolders(folders, served_by),
        OwnedFiles("dev_shm", (Path("/dev/shm"),), uids_of),
        SysvObjects(uids_of),
        MessageQueues(uids_of),
        OwnedFiles("temporary_files", shared_folders(), uids_of),
        CoreFiles(uids_of),
    )
    return Residue(
        (StrayWorkers(runtime, served_by), *runtime.cleaners(), *(InThread(place) for place in places))
    )
