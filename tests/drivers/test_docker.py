"""The Docker driver: what the contract suite cannot say for every runtime."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from docker import APIClient

from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import RunFolder, RuntimeUnreachable, StartRefused, WorkerExit
from tests.docker_engine import TEST_IMAGE
from tests.drivers.control_group import group_of
from tests.drivers.open_files import nothing_left_open
from tests.worker_specs import LIMITS, TEST_UID, worker_spec

PATIENCE = 60.0
STAYS = "import signal; print('up'); signal.pause()"


class Relay:
    """Stands between a driver and the engine, and can go down like an engine that restarts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hung = False
        self.arrived = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def up(self) -> None:
        self._server = await asyncio.start_unix_server(self._relay, self.path)

    async def down(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        self.path.unlink(missing_ok=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.arrived.set()
        self._open.add(writer)
        with contextlib.suppress(OSError, ExceptionGroup):
            if self.hung:
                await reader.read(-1)
                return
            from_engine, to_engine = await asyncio.open_unix_connection("/var/run/docker.sock")
            self._open.add(to_engine)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, to_engine), name="to engine")
                group.create_task(self._pump(from_engine, writer), name="from engine")
        self._open.discard(writer)

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    relay = Relay(tmp_path / "docker.sock")
    await relay.up()
    yield relay
    await relay.down()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolders(tmp_path / "run").create("s_1", TEST_UID, None)


@pytest.fixture
def instance(docker_engine: APIClient, tmp_path: Path) -> Iterator[str]:
    name = f"driver-{tmp_path.name}"
    yield name
    label = f"gpu-server.instance={name}"
    assert docker_engine.containers(all=True, filters={"label": label}) == []


@contextlib.asynccontextmanager
async def opened(
    instance: str, host: str | None = None
) -> AsyncIterator[tuple[DockerRuntime, asyncio.Queue[WorkerExit]]]:
    """An open runtime and the exits it hears; it removes its workers at the end, past any relay."""
    exits: asyncio.Queue[WorkerExit] = asyncio.Queue()
    runtime = DockerRuntime(instance, host)
    async with asyncio.timeout(PATIENCE):
        await runtime.open(exits.put_nowait)
        try:
            yield runtime, exits
        finally:
            await runtime.close()
            cleaner = DockerRuntime(instance)
            await cleaner.open(lambda _: None)
            for worker in await cleaner.list_workers():
                await cleaner.remove(worker.name, grace=0)
            await cleaner.close()


async def test_no_engine_is_unreachable(tmp_path: Path) -> None:
    """Without a socket, pinging and opening say that nothing is known, and leave nothing open."""
    runtime = DockerRuntime("i", f"unix://{tmp_path}/none.sock")
    with pytest.raises(RuntimeUnreachable):
        await runtime.ping()
    with pytest.raises(RuntimeUnreachable):
        await runtime.open(lambda _: None)
    with pytest.raises(RuntimeUnreachable):
        await runtime.list_workers()
    await runtime.close()


async def test_an_engine_that_hangs_is_unreachable(relay: Relay) -> None:
    """An engine that takes connections and never answers is given up at the call's timeout."""
    relay.hung = True
    runtime = DockerRuntime("i", f"unix://{relay.path}", call_timeout=0.2)
    with pytest.raises(RuntimeUnreachable):
        await runtime.ping(limit=0.2)
    with pytest.raises(RuntimeUnreachable):
        await runtime.open(lambda _: None)
    await runtime.close()


@pytest.mark.docker
async def test_an_engine_that_stops_answering_is_never_taken_for_a_removal(
    relay: Relay, instance: str, folder: RunFolder
) -> None:
    """A removal that the engine does not confirm raises, and the worker is still there afterwards."""
    async with opened(instance, f"unix://{relay.path}") as (runtime, _):
        worker = await runtime.create(worker_spec(folder, STAYS))
        await runtime.start(worker.name)
        await relay.down()
        with pytest.raises(RuntimeUnreachable):
            await runtime.remove(worker.name, grace=0)
        await relay.up()
        (seen,) = await runtime.list_workers()
        assert seen.running


@pytest.mark.docker
async def test_exits_during_an_engine_restart_are_heard_once(
    relay: Relay, instance: str, folder: RunFolder, docker_engine: APIClient
) -> None:
    """What ended while the events stream was down is found by listing; what ends later is heard as ever."""
    async with opened(instance, f"unix://{relay.path}") as (runtime, exits):
        worker = await runtime.create(worker_spec(folder, STAYS))
        await runtime.start(worker.name)
        await anext(worker.output)
        await relay.down()
        docker_engine.kill(worker.container_id, "SIGKILL")
        await asyncio.to_thread(docker_engine.wait, worker.container_id)
        await relay.up()
        heard = await exits.get()
        assert (heard.name, heard.exit_code) == (worker.name, 137)
        await runtime.remove(worker.name, grace=0)
        again = await runtime.create(worker_spec(folder, "raise SystemExit(5)", name="s_1-2", fence=2))
        await runtime.start(again.name)
        heard = await exits.get()
        assert (heard.name, heard.exit_code) == ("s_1-2", 5)
        assert exits.empty()


@pytest.mark.docker
async def test_a_worker_that_uses_too_much_memory_is_said_to_have(instance: str, folder: RunFolder) -> None:
    """An exit by the memory limit is told from any other kill."""
    async with opened(instance) as (runtime, exits):
        worker = await runtime.create(worker_spec(folder, "b'x' * (1 << 30)"))
        await runtime.start(worker.name)
        heard = await exits.get()
        assert (heard.exit_code, heard.oom_killed) == (137, True)


@pytest.mark.docker
async def test_what_cannot_start_is_refused_with_its_reason(
    instance: str, folder: RunFolder, tmp_path: Path
) -> None:
    """A missing image, model folder or program is told with a code and a message, and nothing is made up."""
    async with opened(instance) as (runtime, exits):
        with pytest.raises(StartRefused, match="not available") as refused:
            await runtime.create(worker_spec(folder, image="gpu-server-test/none:1"))
        assert refused.value.code == "image_missing"
        missing = tmp_path / "models/none"
        with pytest.raises(StartRefused, match="does not exist") as refused:
            await runtime.create(worker_spec(folder, model_path=missing))
        assert refused.value.code == "start_failed"
        assert not missing.exists()
        worker = await runtime.create(worker_spec(folder, command=("/no/such/program",)))
        # The init process starts, and says by its exit code that there is no such program.
        with contextlib.suppress(StartRefused):
            await runtime.start(worker.name)
            assert (await exits.get()).exit_code == 127
        assert b"".join([piece.data async for piece in worker.output]).count(b"no/such/program") <= 1


@pytest.mark.docker
async def test_a_start_that_the_engine_refuses_ends_the_output(instance: str, folder: RunFolder) -> None:
    """A GPU that the engine cannot give refuses the start, and a reader of the output sees the end."""
    async with opened(instance) as (runtime, _):
        worker = await runtime.create(worker_spec(folder, gpu_uuids=("GPU-no-such",)))
        with pytest.raises(StartRefused) as refused:
            await runtime.start(worker.name)
        assert refused.value.code == "start_failed"
        assert [piece async for piece in worker.output] == []
        again = await runtime.create(worker_spec(folder, "print('ok')"))
        await runtime.start(again.name)
        assert b"".join([piece.data async for piece in again.output]) == b"ok\n"


@pytest.mark.docker
async def test_what_an_engine_has_forgotten_is_ended_too(instance: str, folder: RunFolder) -> None:
    """A worker of which the engine says that it never ran, and that runs: it is gone after `remove`."""
    async with opened(instance) as (runtime, _):
        worker = await runtime.create(worker_spec(folder, STAYS))
        with group_of(worker.container_id) as group:
            process = await asyncio.create_subprocess_exec("sleep", "1000")
            try:
                (group / "cgroup.procs").write_text(str(process.pid))
                await runtime.remove(worker.name, grace=0)
                assert await process.wait() == -9
                assert await runtime.list_workers() == ()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()


@pytest.mark.docker
async def test_a_name_that_is_somebody_elses_is_refused(
    instance: str, folder: RunFolder, docker_engine: APIClient
) -> None:
    """A container of that name that is not this very worker is neither replaced, started nor removed."""
    spec = worker_spec(folder, STAYS)
    other = docker_engine.create_container(TEST_IMAGE, ["true"], name=spec.name)["Id"]
    try:
        async with opened(instance) as (runtime, _):
            for act in (runtime.create(spec), runtime.start(spec.name)):
                with pytest.raises(StartRefused) as refused:
                    await act
                assert refused.value.code == "start_failed"
            await runtime.remove(spec.name, grace=0)
        assert docker_engine.inspect_container(other)["State"]["Status"] == "created"
    finally:
        docker_engine.remove_container(other, force=True)


@pytest.mark.docker
async def test_volumes_of_an_image_leave_nothing_on_the_host(
    instance: str, folder: RunFolder, docker_engine: APIClient
) -> None:
    """An image that declares a volume gets a tmpfs there, which can be written and is small."""
    base = docker_engine.create_container(TEST_IMAGE, ["true"])["Id"]
    tag = secrets.token_hex(4)
    image = docker_engine.commit(base, "gpu-server-test/volume", tag, changes=["VOLUME /data"])["Id"]
    docker_engine.remove_container(base)
    code = (
        "print([l.split()[0] for l in open('/proc/mounts') if l.split()[1] == '/data']); open('/data/x', 'w')"
    )
    try:
        async with opened(instance) as (runtime, exits):
            worker = await runtime.create(worker_spec(folder, code, image=f"gpu-server-test/volume:{tag}"))
            await runtime.start(worker.name)
            assert b"".join([piece.data async for piece in worker.output]) == b"['tmpfs']\n"
            assert (await exits.get()).exit_code == 0
            mounts = docker_engine.inspect_container(worker.container_id)["Mounts"]
            assert {mount["Type"] for mount in mounts} <= {"bind", "tmpfs"}
    finally:
        docker_engine.remove_image(image, force=True)


@pytest.mark.docker
async def test_limits_reach_the_engine(instance: str, folder: RunFolder, docker_engine: APIClient) -> None:
    """Memory without swap, CPU, pids, no restarts, private IPC, no log: as the engine has them."""
    async with opened(instance) as (runtime, _):
        worker = await runtime.create(worker_spec(folder, STAYS))
        host = docker_engine.inspect_container(worker.container_id)["HostConfig"]
        assert host["Memory"] == host["MemorySwap"] == LIMITS.memory
        assert host["NanoCpus"] == 1_000_000_000
        assert host["PidsLimit"] == LIMITS.pids
        assert host["RestartPolicy"]["Name"] == "no"
        assert (host["IpcMode"], host["NetworkMode"]) == ("private", "none")
        assert host["LogConfig"]["Type"] == "none"
        assert host["ReadonlyRootfs"]
        assert host["Init"]


@pytest.mark.docker
async def test_closing_leaks_no_connection(instance: str, folder: RunFolder) -> None:
    """After closing, also with output unread and a worker running, every descriptor is given back."""
    with nothing_left_open():
        async with opened(instance) as (runtime, _):
            for fence in (1, 2, 3):
                worker = await runtime.create(worker_spec(folder, STAYS, name=f"s_1-{fence}", fence=fence))
                await runtime.start(worker.name)
            assert await runtime.foreign_gpu_holders() == {}


@pytest.mark.docker
async def test_images_that_are_there_are_not_pulled_and_others_say_why(instance: str) -> None:
    """An image on this machine is enough; one that cannot be had is refused with the engine's reason."""
    async with opened(instance) as (runtime, _):
        await runtime.require_image(TEST_IMAGE)
        with pytest.raises(StartRefused) as refused:
            await runtime.require_image("localhost:1/gpu-server-test/none:1")
        assert refused.value.code == "image_missing"
        assert "not available" in refused.value.message
