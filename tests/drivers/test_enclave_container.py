"""The enclave as a container of a real engine."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.enclave_container import ContainerEnclave
from gpu_server.ports import EnclaveDown, RuntimeUnreachable
from tests.docker_engine import TEST_IMAGE

STAYS = """import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("up", flush=True)
while 1: signal.pause()"""
PATIENCE = 60.0

pytestmark = pytest.mark.docker
Make = Callable[..., ContainerEnclave]


@pytest.fixture
def instance() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
async def make(docker_engine: APIClient, instance: str, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[ContainerEnclave] = []

    def make(code: str = STAYS, image: str = TEST_IMAGE, **more: object) -> ContainerEnclave:
        def body(image: Mapping[str, Any]) -> dict[str, Any]:
            log = {"Type": "json-file", "Config": {}}
            return {
                "Cmd": ["python3", "-c", code],
                "HostConfig": {"NetworkMode": "none", "LogConfig": log},
                **more,
            }

        made.append(ContainerEnclave(instance, image, body, folder=tmp_path / "e"))
        return made[-1]

    yield make
    for enclave in made:
        await enclave.stop(0.0)
        enclave.close()


async def up(engine: APIClient, enclave: ContainerEnclave) -> None:
    """Wait until its program can be asked to end."""
    async with asyncio.timeout(PATIENCE):
        while b"up" not in engine.logs(enclave.name):  # noqa: ASYNC110 -- another program says it
            await asyncio.sleep(0.01)


async def ended(enclave: ContainerEnclave) -> str:
    async with asyncio.timeout(PATIENCE):
        while (why := await enclave.ended()) is None:
            pass
    return why


async def test_start_and_stop(make: Make, docker_engine: APIClient, tmp_path: Path, instance: str) -> None:
    """It runs under its name and labels until it is stopped; nothing is left then."""
    enclave = make()
    assert await enclave.ended() == "its container has gone"
    await enclave.start()
    assert await enclave.ended() is None
    found = docker_engine.inspect_container(enclave.name)
    assert found["Config"]["Labels"]["gpu-server.role"] == "enclave"
    assert found["Config"]["Labels"]["gpu-server.instance"] == instance
    assert (tmp_path / "e").stat().st_mode & 0o777 == 0o700
    await up(docker_engine, enclave)
    assert await enclave.stop(5.0) == "terminated"
    assert await enclave.ended() == "its container has gone"
    assert not (tmp_path / "e").exists()
    assert await enclave.stop(5.0) == "none"


@pytest.mark.parametrize(
    ("code", "ending"), [("exit(70)", "ended"), ("exit(71)", "killed"), ("exit(72)", "killed")]
)
async def test_how_it_came_to_be_gone(make: Make, code: str, ending: str) -> None:
    """One that has ended is told from one whose runner has not seen it gone."""
    enclave = make(code=code)
    await enclave.start()
    await ended(enclave)
    assert await enclave.stop(5.0) == ending


async def test_one_that_is_killed(make: Make) -> None:
    """What had no time to end in order is not said to have done so."""
    enclave = make()
    await enclave.start()
    assert await enclave.stop(0.0) == "killed"


async def test_the_next_life_finds_it(make: Make) -> None:
    """By its name, labels and make: the same container, which runs on."""
    await make().start()
    assert await make().find()
    assert not await make(code="pass").find()
    assert not await make(Hostname="other").find()


async def test_one_that_could_not_be_started_again(make: Make, instance: str) -> None:
    """What runs is taken up where nothing better can be made now, an enclave whose image file was moved."""
    first = make()
    await first.start()

    def body(image: Mapping[str, Any]) -> dict[str, Any]:
        raise EnclaveDown("there is no enclave image file")

    later = ContainerEnclave(instance, TEST_IMAGE, body)
    try:
        assert await later.find()
    finally:
        later.close()


async def test_a_start_replaces(make: Make, docker_engine: APIClient) -> None:
    """What is left of an earlier one, running or not, is removed first."""
    first = make()
    await first.start()
    before = docker_engine.inspect_container(first.name)["Id"]
    await make(Hostname="other").start()
    assert docker_engine.inspect_container(first.name)["Id"] != before


async def test_why_it_ended(make: Make) -> None:
    """Its exit code and the last line that it wrote."""
    enclave = make("import sys; sys.exit('no room here')")
    await enclave.start()
    assert await ended(enclave) == "its container has ended with 1: no room here"
    assert not await enclave.find()


async def test_it_is_no_worker(make: Make, instance: str) -> None:
    """The listing that residue is found by does not show it, or the reaper would remove it."""
    enclave = make()
    await enclave.start()
    runtime = DockerRuntime(instance)
    exits: list[object] = []
    await runtime.open(exits.append)
    try:
        assert await runtime.list_workers() == ()
    finally:
        await runtime.close()
    assert await enclave.ended() is None


async def test_no_image(make: Make) -> None:
    """The reason says how to make it."""
    with pytest.raises(EnclaveDown, match=r"build_images\.sh enclave"):
        await make(image="gpu-server/no-such-image:dev").start()


async def test_no_device(make: Make) -> None:
    """What the engine refuses, a device that this machine does not have for one, is the reason."""
    enclave = make(
        HostConfig={
            "Devices": [
                {"PathOnHost": "/dev/nitro_no", "PathInContainer": "/dev/nitro_no", "CgroupPermissions": "r"}
            ]
        }
    )
    with pytest.raises(EnclaveDown, match="nitro_no"):
        await enclave.start()


async def test_somebody_elses_container(make: Make, docker_engine: APIClient) -> None:
    """One that only has the name is neither taken up nor removed."""
    enclave = make()
    other = docker_engine.create_container(TEST_IMAGE, ["true"], name=enclave.name)
    try:
        assert not await enclave.find()
        with pytest.raises(EnclaveDown, match="another container"):
            await enclave.start()
        assert docker_engine.inspect_container(other["Id"])
    finally:
        docker_engine.remove_container(other["Id"])


async def test_no_engine(tmp_path: Path) -> None:
    """Without an engine nothing is known, and that is said."""
    enclave = ContainerEnclave("i", "image", lambda _: {}, docker_host=f"unix://{tmp_path}/none.sock")
    for ask in (enclave.find, enclave.start, enclave.ended, lambda: enclave.stop(0.0)):
        with pytest.raises(RuntimeUnreachable):
            await ask()  # type: ignore[operator]
    enclave.close()
