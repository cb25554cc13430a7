"""The canary audit: a worker leaves random bytes wherever it can, and after the wash nobody finds them.

Each cleaner is also switched off in turn, and then the very place that it looks after must still have them:
so none is there for nothing, and the search is known to find.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from gpu_server.drivers import docker
from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.process import ProcessRuntime
from gpu_server.drivers.residue import Residue, residue_of
from gpu_server.drivers.residue_files import CoreFiles
from gpu_server.drivers.residue_thread import InThread
from gpu_server.drivers.residue_uids import trusted_uids
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import (
    Belongings,
    ContainerRuntime,
    Contract,
    CreatedWorker,
    Dirty,
    EndedLease,
    WorkerSpec,
)
from tests.docker_engine import TEST_IMAGE
from tests.drivers.canary_search import Search
from tests.drivers.canary_worker import AS_A_PROCESS, CRASHES, IN_A_CONTAINER
from tests.drivers.control_group import group_of
from tests.worker_specs import worker_spec

PATIENCE = 60.0
OURS = os.geteuid()

needs_root = pytest.mark.skipif(OURS != 0, reason="uids of their own for workers need root")


@dataclass(kw_only=True)
class Scene:
    """A machine with one worker that is about to leave its canary."""

    runtime: ContainerRuntime
    folders: RunFolders
    spec: WorkerSpec
    search: Search
    residue: Residue

    @property
    def cleaners(self) -> tuple[str, ...]:
        return tuple(cleaner.name for cleaner in self.residue.cleaners)

    def without(self, name: str) -> Residue:
        assert name in self.cleaners
        return Residue(cleaner for cleaner in self.residue.cleaners if cleaner.name != name)

    def lease(self, belongings: Belongings | None) -> EndedLease:
        return EndedLease(
            session_id=self.spec.session_id,
            fence=self.spec.fence,
            slot_ids=("cpu-0",),
            uids=(self.spec.uid,),
            belongings=belongings,
        )

    async def plant(self) -> tuple[str, ...]:
        """Run the worker until it has left what it can; the places where it could not."""
        worker = await self.runtime.create(self.spec)
        await self.runtime.start(self.spec.name)
        lines = await _until_up(worker)
        assert self.search.canary in lines
        worker.output.close()
        return tuple(line for line in lines if line.startswith("missing"))


async def _until_up(worker: CreatedWorker) -> list[str]:
    said = b""
    async with asyncio.timeout(PATIENCE):
        async for piece in worker.output:
            said += piece.data
            if said.endswith(b"up\n"):
                return said.decode().splitlines()
    raise AssertionError(said.decode())


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that other uids can reach into."""
    path = Path(tempfile.mkdtemp(prefix="gs-audit-"))
    try:
        path.chmod(0o711)
        yield path
    finally:
        shutil.rmtree(path)


def _halves() -> tuple[str, dict[str, str]]:
    """A canary, and the environment that a worker makes it of."""
    canary = secrets.token_hex(16)
    return canary, {"HALF_A": canary[:16], "HALF_B": canary[16:]}


def _uid() -> int:
    return 1_500_000_000 + secrets.randbelow(1 << 28)


def _nobody(session_id: str) -> None:
    """No session is served."""


# -- processes --------------------------------------------------------------------------------------------

# `workers` is not among them: a worker that its teardown has missed has the session's mark, so that
# `detached_processes` ends it too, and its record goes with the run folder.
# `outside_run_folder` removes nothing.
PROCESS_PLACES = {
    "detached_processes": {"memory, by environment"},
    "processes": {"memory, by uid"},
    "run_folder": {"run folder"},
    "dev_shm": {"/dev/shm"},
    "sysv": {"sysv shared memory", "sysv semaphores", "sysv messages"},
    "mqueue": {"message queues"},
    "temporary_files": {"/tmp"},
    "core_files": {"cores"},
}
"""Cleaner -> where the search finds the canary after the teardown, until that cleaner has worked."""


@asynccontextmanager
async def process_scene() -> AsyncIterator[Scene]:
    with _folder() as root:
        uid, (canary, halves) = _uid(), _halves()
        run, cores = root / "run", root / "cores"
        cores.mkdir()
        cores.chmod(0o1777)
        folders = RunFolders(run)
        runtime = ProcessRuntime(f"audit-{canary[:8]}", run, root)
        env = {**halves, "CANARY_UID": str(uid), "CANARY_CORES": str(cores)}
        spec = worker_spec(folders.create(f"s_{canary[:8]}", uid, b"{}"), AS_A_PROCESS, uid=uid, env=env)
        whole = residue_of(runtime, folders, served_by=_nobody)
        of_cores = InThread(CoreFiles(trusted_uids(), folders=(cores,)))
        scene = Scene(
            runtime=runtime,
            folders=folders,
            spec=spec,
            search=Search(
                canary=canary,
                uid=uid,
                mark=f"HALF_A={halves['HALF_A']}",
                folders={"run folder": run, "cores": cores},
            ),
            residue=Residue(of_cores if c.name == "core_files" else c for c in whole.cleaners),
        )
        await runtime.open(lambda worker_exit: None)
        try:
            yield scene
        finally:
            await scene.residue.clean(scene.lease(None))
            await runtime.close()


async def leave_core(scene: Scene) -> None:
    """A core file of a process of the worker's uid, from the kernel itself where it writes them to the
    process's folder, and made by hand where it gives them to a program."""
    core = scene.search.folders["cores"] / "core"
    env = {**scene.spec.env, "GPU_WORKER_SOCKET": "/"}
    crashed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-S", "-c", CRASHES],
        env=env,
        check=False,
        stderr=subprocess.DEVNULL,
    )
    if crashed.returncode != 0 or not any(core.parent.iterdir()):
        core.write_text(scene.search.canary)
        os.chown(core, scene.spec.uid, scene.spec.uid)


@needs_root
async def test_a_process_leaves_nothing() -> None:
    """A canary in every place is found after the worker's teardown, and nowhere after the wash."""
    async with process_scene() as scene:
        missing = await scene.plant()
        assert missing[0].count("Error") == 1, missing
        assert "core: " in missing[0]  # a worker's core limit is 0
        assert missing[1:] == ("missing []",)
        await leave_core(scene)
        belongings = await scene.runtime.belongings(scene.spec.name)
        await scene.runtime.remove(scene.spec.name, grace=0)
        lease = scene.lease(belongings)
        everywhere = set().union(*PROCESS_PLACES.values())
        assert set(await asyncio.to_thread(scene.search.found)) == everywhere
        with pytest.raises(Dirty):
            await scene.residue.second_look(lease)
        figures = await scene.residue.clean(lease)
        assert await asyncio.to_thread(scene.search.found) == {}
        await scene.residue.second_look(lease)
        assert str(figures["outside_run_folder"]).startswith("not seen: ")
        assert {name for name, found in figures.items() if isinstance(found, int) and found} == set(
            PROCESS_PLACES
        )
        assert set(PROCESS_PLACES) | {"workers", "outside_run_folder"} == set(scene.cleaners)


@needs_root
@pytest.mark.parametrize("off", PROCESS_PLACES)
async def test_each_cleaner_is_needed_for_processes(off: str) -> None:
    """Without one cleaner the canary stays in its place, and in no other."""
    async with process_scene() as scene:
        await scene.plant()
        await leave_core(scene)
        await scene.runtime.remove(scene.spec.name, grace=0)
        await scene.without(off).clean(scene.lease(None))
        assert set(await asyncio.to_thread(scene.search.found)) == PROCESS_PLACES[off]


# -- containers -------------------------------------------------------------------------------------------

# What goes by uids is not among them: a worker in a container reaches nothing of the machine's own but its
# share, and its namespaces are gone with it. They are needed for programs that run on the machine itself.
CONTAINER_PLACES = {
    "workers": {"memory, by uid", "engine's files", "volumes"},
    "control_groups": {"memory, by control group"},
    "volumes": {"volumes"},
    "engine_files": {"engine's files"},
    "run_folder": {"run folder"},
}
"""Cleaner -> where the search finds the canary, until that cleaner has worked, of a container whose teardown
went as `_half_removed` says (of one that was never torn down: `workers`)."""

BY_UID = {"processes", "dev_shm", "sysv", "mqueue", "temporary_files", "core_files"}
"""Cleaners that have nothing to do here."""

ALIVE = {
    "memory, by uid",
    "engine's files",
    "volumes",
    "run folder",
    "inside /tmp",
    "inside /data",
    "inside /dev/shm",
    "inside /var/tmp",
    "inside sysv shared memory",
    "inside sysv semaphores",
    "inside sysv messages",
    "inside message queues",
}
"""Where the canary is while the container runs."""


@pytest.fixture(scope="module")
def image(docker_engine: APIClient) -> Iterator[str]:
    """The test image with a VOLUME."""
    name = f"gs-audit-{secrets.token_hex(4)}:test"
    repository, _, tag = name.partition(":")
    container = docker_engine.create_container(TEST_IMAGE, "true")["Id"]
    try:
        docker_engine.commit(container, repository, tag, changes=["VOLUME /data"])
    finally:
        docker_engine.remove_container(container)
    try:
        yield name
    finally:
        docker_engine.remove_image(name)


@pytest.fixture
def volume(docker_engine: APIClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A named volume that every worker gets, as no preset can say."""
    name = f"gs-audit-{secrets.token_hex(8)}"
    plain = docker.container_body

    def with_volume(spec: WorkerSpec, **more: Any) -> dict[str, Any]:
        body = plain(spec, **more)
        body["HostConfig"]["Mounts"].append({"Type": "volume", "Source": name, "Target": "/var/tmp"})
        return body

    monkeypatch.setattr(docker, "container_body", with_volume)
    yield name
    left = docker_engine.volumes(filters={"name": name})["Volumes"]
    for found in left or ():
        docker_engine.remove_volume(found["Name"])


@asynccontextmanager
async def container_scene(engine: APIClient, image: str, volume: str) -> AsyncIterator[Scene]:
    root = Path(engine.info()["DockerRootDir"])
    if not os.access(root / "containers", os.R_OK):
        pytest.skip("the engine's data root cannot be seen from here")
    with _folder() as folder:
        uid, (canary, halves) = _uid(), _halves()
        folders = RunFolders(folder / "run")
        runtime = DockerRuntime(f"audit-{canary[:8]}")
        spec = worker_spec(
            folders.create(f"s_{canary[:8]}", uid, b"{}"),
            image=image,
            command=("python3", "-u", "-c", IN_A_CONTAINER),
            contract=Contract.EXEC,
            uid=uid,
            env=halves,
        )
        await runtime.open(lambda worker_exit: None)
        scene = Scene(
            runtime=runtime,
            folders=folders,
            spec=spec,
            search=Search(
                canary=canary,
                uid=uid,
                mark="-",
                folders={
                    "run folder": folder,
                    "engine's files": root / "containers",
                    "volumes": root / "volumes" / volume,
                },
            ),
            residue=residue_of(runtime, folders, served_by=_nobody),
        )
        try:
            yield scene
        finally:
            for worker in await runtime.list_workers():
                await runtime.remove(worker.name, grace=0)
            await runtime.close()


@contextmanager
def _half_removed(scene: Scene, container_id: str, kept: Path) -> Iterator[None]:
    """What an engine leaves that is killed while it removes a container: the folder that it had of it, from
    `kept`, and its control group with a process that it knows nothing of any more."""
    shutil.copytree(kept, scene.search.folders["engine's files"] / container_id)
    hold = f"import os; canary = {scene.search.canary!r}; print('up', flush=True); os.read(0, 1)"
    with (
        group_of(container_id) as group,
        subprocess.Popen(
            ["python3", "-S", "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            (group / "cgroup.procs").write_text(str(process.pid))
            yield
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(scene.search.folders["engine's files"] / container_id, ignore_errors=True)


@asynccontextmanager
async def _torn_down(scene: Scene) -> AsyncIterator[EndedLease]:
    """The lease of the scene's worker, after a teardown that an engine did by halves."""
    belongings = await scene.runtime.belongings(scene.spec.name)
    assert belongings is not None
    # The search knows of no other volume.
    assert belongings.volumes == (scene.search.folders["volumes"].name,)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept")
        shutil.copytree(scene.search.folders["engine's files"] / belongings.container_id, kept)
        await scene.runtime.remove(scene.spec.name, grace=0)
        scene.search = replace(scene.search, container=belongings.container_id)
        with _half_removed(scene, belongings.container_id, kept):
            yield scene.lease(belongings)


@needs_root
@pytest.mark.docker
async def test_a_container_leaves_nothing(docker_engine: APIClient, image: str, volume: str) -> None:
    """What a worker leaves inside its container is found there while it runs; what outlives an engine that
    removed it by halves is found after that; and nothing after the wash."""
    async with container_scene(docker_engine, image, volume) as scene:
        (missing,) = await scene.plant()
        assert missing.count("Error") == 1, missing
        assert "core: " in missing  # a container's core limit is 0
        assert set(await asyncio.to_thread(scene.search.found, inside=True)) == ALIVE
        async with _torn_down(scene) as lease:
            left = set().union(*(CONTAINER_PLACES[n] for n in CONTAINER_PLACES if n != "workers"))
            assert set(await asyncio.to_thread(scene.search.found, inside=True)) == left
            figures = await scene.residue.clean(lease)
            assert await asyncio.to_thread(scene.search.found, inside=True) == {}
            await scene.residue.second_look(lease)
        assert {name for name, found in figures.items() if found != 0} == set(CONTAINER_PLACES) - {"workers"}
        assert set(CONTAINER_PLACES) | BY_UID == set(scene.cleaners)


@needs_root
@pytest.mark.docker
@pytest.mark.parametrize("off", [name for name in CONTAINER_PLACES if name != "workers"])
async def test_each_cleaner_is_needed_for_containers(
    docker_engine: APIClient, image: str, volume: str, off: str
) -> None:
    """Without one cleaner the canary stays in its place, and in no other."""
    async with container_scene(docker_engine, image, volume) as scene:
        await scene.plant()
        async with _torn_down(scene) as lease:
            await scene.without(off).clean(lease)
            assert set(await asyncio.to_thread(scene.search.found, inside=True)) == CONTAINER_PLACES[off]


@needs_root
@pytest.mark.docker
async def test_a_container_that_nobody_took_down_is_taken_down(
    docker_engine: APIClient, image: str, volume: str
) -> None:
    """One of the lease that its teardown has missed, with its volume and its log, is left by every cleaner
    but one."""
    async with container_scene(docker_engine, image, volume) as scene:
        await scene.plant()
        lease = scene.lease(None)
        await scene.without("workers").clean(lease)
        assert set(await asyncio.to_thread(scene.search.found)) == CONTAINER_PLACES["workers"]
        await scene.residue.clean(lease)
        assert await asyncio.to_thread(scene.search.found, inside=True) == {}
