"""What washes work with in tests: real parts that touch nothing but the test's own folders."""

from __future__ import annotations

from collections.abc import Callable

from gpu_server.drivers.residue import Residue, StrayWorkers
from gpu_server.drivers.residue_files import SessionFolders
from gpu_server.drivers.residue_thread import Place
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import ContainerRuntime, EndedLease


class Inline:
    """A blocking `Place` as a `Cleaner`, without a thread: slots that are washed together go in step, and
    nothing of a life of the service goes on behind its end."""

    def __init__(self, place: Place) -> None:
        self.name = place.name
        self._place = place

    async def look(self, lease: EndedLease) -> int:
        return self._place.look(lease, lambda: None)

    async def remove(self, lease: EndedLease) -> None:
        self._place.remove(lease, lambda: None)


def residue_in(
    runtime: ContainerRuntime, folders: RunFolders, served_by: Callable[[str], str | None]
) -> Residue:
    """Workers, what the runtime knows that they leave, and run folders; nothing goes by a uid."""
    return Residue(
        (
            StrayWorkers(runtime, served_by),
            *runtime.cleaners(),
            Inline(SessionFolders(folders, served_by)),
        )
    )
