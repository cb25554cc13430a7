"""The scrub as a container of a real engine, and as a process; the program in it is played."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.scrubber import ContainerScrubber, ProcessScrubber, program_process, scrub_body
from gpu_server.ports import Dirty, WashUnreachable
from tests.docker_engine import TEST_IMAGE
from tests.drivers.played_engine import PlayedEngine
from tests.fakes.gpu_wash import scrub_figures

SPEC = SlotSpec(id="0", uuid="GPU-aa", name="NVIDIA L40S", memory_mb=1024, is_gpu=True)
PASSED = json.dumps({"result": "passed", "reason": "", "figures": scrub_figures("GPU-aa")})
PASSES = f"print({PASSED!r})"
FAILS = 'print(\'{"result": "failed", "reason": "7 words", "figures": {}}\')'
STAYS = "import time; time.sleep(1000)"
TALKS = "while True: print('x' * 1000)"
COMPLAINS = "import sys; sys.exit('no such thing')"
PATIENCE = 60.0

Make = Callable[..., ContainerScrubber]


# -- the create request -----------------------------------------------------------------------------------


def test_a_container_has_its_gpu_and_nothing_else() -> None:
    """Exactly one GPU, by UUID; no network, nothing to write to, no capability; and it is no worker."""
    body = scrub_body("image", SPEC, 7, instance="i", arguments=["--uuid", "GPU-aa"])
    host = body["HostConfig"]
    (request,) = host["DeviceRequests"]
    assert request["DeviceIDs"] == ["GPU-aa"]
    assert "Count" not in request
    assert "NVIDIA_VISIBLE_DEVICES=GPU-aa" in body["Env"]
    assert body["Labels"] == {
        "gpu-server.instance": "i",
        "gpu-server.role": "carwash",
        "gpu-server.gpu": "GPU-aa",
        "gpu-server.fence": "7",
    }
    assert body["User"] == "65532:65532"
    assert (host["NetworkMode"], host["ReadonlyRootfs"], host["CapDrop"]) == ("none", True, ["ALL"])
    assert host["SecurityOpt"][0] == "no-new-privileges"
    assert json.loads(host["SecurityOpt"][1].removeprefix("seccomp="))["defaultAction"] == "SCMP_ACT_ERRNO"
    assert not host["Privileged"]
    assert host["ShmSize"] >= 64 << 20, "the CUDA driver's files do not fit"
    assert "Mounts" not in host
    assert "Binds" not in host
    assert host["LogConfig"] == {"Type": "none", "Config": {}}


# -- as a container ---------------------------------------------------------------------------------------


@pytest.fixture
def instance() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
async def make(docker_engine: APIClient, instance: str) -> AsyncIterator[Make]:
    made: list[ContainerScrubber] = []

    def make(code: str, image: str = TEST_IMAGE, **more: Any) -> ContainerScrubber:
        def body(image: str, spec: SlotSpec, fence: int, **given: Any) -> dict[str, Any]:
            body = scrub_body(image, spec, fence, **given)
            body["HostConfig"]["DeviceRequests"] = []  # most machines that test have none
            return {**body, "Entrypoint": ["python3", "-c", code]}

        made.append(ContainerScrubber(instance, image, body=body, **more))
        return made[-1]

    yield make
    cleaner = make("")
    await cleaner.sweep()
    for scrubber in made:
        scrubber.close()


def left(engine: APIClient, instance: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine.containers(
        all=True, filters={"label": [f"gpu-server.instance={instance}"]}
    )
    return found


async def running(engine: APIClient, instance: str) -> None:
    """Wait until a scrub that does not end runs."""
    async with asyncio.timeout(PATIENCE):
        while not any(  # noqa: ASYNC110 -- the engine's container
            found["State"] == "running" for found in left(engine, instance)
        ):
            await asyncio.sleep(0.02)


@pytest.mark.docker
async def test_a_scrub_that_passes(make: Make, docker_engine: APIClient, instance: str) -> None:
    """Its figures; and no container is left."""
    assert await make(PASSES).scrub(SPEC, 7) == scrub_figures("GPU-aa")
    assert left(docker_engine, instance) == []


@pytest.mark.docker
async def test_a_scrub_is_told_its_gpu(make: Make) -> None:
    """And its share and time; what it complains of is in the message."""
    with pytest.raises(WashUnreachable, match=r"--uuid GPU-aa --min-share 950 --seconds 31"):
        await make("import sys; sys.exit(' '.join(sys.argv[1:]))", min_share=950, limit=30.0).scrub(SPEC, 7)


@pytest.mark.docker
@pytest.mark.parametrize(
    ("code", "error", "why"),
    [
        (FAILS, Dirty, "7 words"),
        (COMPLAINS, WashUnreachable, "without an answer: no such thing"),
        (TALKS, WashUnreachable, "too long"),
    ],
)
async def test_a_scrub_that_does_not(
    make: Make, docker_engine: APIClient, instance: str, code: str, error: type[Exception], why: str
) -> None:
    """Each is told, what talks without end is ended, and no container is left."""
    with pytest.raises(error, match=why):
        await make(code).scrub(SPEC, 7)
    assert left(docker_engine, instance) == []


@pytest.mark.docker
async def test_a_scrub_that_does_not_end(make: Make, docker_engine: APIClient, instance: str) -> None:
    """It is ended at its limit."""
    with pytest.raises(WashUnreachable, match=r"within 0\.5 s"):
        await make(STAYS, limit=0.5).scrub(SPEC, 7)
    assert left(docker_engine, instance) == []


@pytest.mark.docker
async def test_a_wash_that_is_cancelled(make: Make, docker_engine: APIClient, instance: str) -> None:
    """Its container is gone when the cancellation is through, and was not before."""
    scrubber = make(STAYS)
    async with asyncio.TaskGroup() as group:
        wash = group.create_task(scrubber.scrub(SPEC, 7))
        await running(docker_engine, instance)
        wash.cancel()
    assert wash.cancelled()
    assert left(docker_engine, instance) == []


@pytest.mark.docker
async def test_a_cancellation_while_it_is_created(
    make: Make, docker_engine: APIClient, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way is waited for: a container that appeared later would be nobody's."""
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    create = APIClient.create_container_from_config

    def slow(client: APIClient, *given: Any, **more: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        return create(client, *given, **more)

    monkeypatch.setattr(APIClient, "create_container_from_config", slow)
    scrubber = make(STAYS)
    async with asyncio.TaskGroup() as group:
        wash = group.create_task(scrubber.scrub(SPEC, 7))
        await begun.wait()
        wash.cancel()
    assert wash.cancelled()
    assert left(docker_engine, instance) == []


@pytest.mark.docker
async def test_what_an_earlier_life_left(
    make: Make, docker_engine: APIClient, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next wash of that GPU ends it first, a sweep those of all GPUs; nobody takes it for a worker."""
    other = SlotSpec(id="1", uuid="GPU-bb", name="", memory_mb=0, is_gpu=True)
    for spec, fence in ((SPEC, 1), (SPEC, 2), (other, 3)):
        body = scrub_body(TEST_IMAGE, spec, fence, instance=instance, arguments=[])
        body["HostConfig"]["DeviceRequests"] = []
        body["Entrypoint"] = ["python3", "-c", STAYS]
        docker_engine.start(docker_engine.create_container_from_config(body, None)["Id"])  # type: ignore[no-untyped-call]
    runtime = DockerRuntime(instance)
    await runtime.open(lambda exit: None)
    try:
        assert await runtime.list_workers() == ()
        assert await runtime.foreign_gpu_holders() == {}
    finally:
        await runtime.close()
    scrubber, there = make(PASSES), []
    create = APIClient.create_container_from_config

    def seen(client: APIClient, *given: Any, **more: Any) -> Any:
        there.extend(found["Labels"]["gpu-server.gpu"] for found in left(client, instance))
        return create(client, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(APIClient, "create_container_from_config", seen)
        await scrubber.scrub(SPEC, 4)
    assert there == ["GPU-bb"]
    (only,) = left(docker_engine, instance)
    assert only["Labels"]["gpu-server.gpu"] == "GPU-bb"
    assert await scrubber.sweep() == 1
    assert await scrubber.sweep() == 0


@pytest.mark.docker
async def test_no_image(make: Make) -> None:
    """The reason says how to make it."""
    with pytest.raises(WashUnreachable, match=r"build_images\.sh carwash"):
        await make("", image="gpu-server/no-such-image:dev").scrub(SPEC, 7)


@pytest.mark.docker
async def test_no_such_gpu(make: Make, docker_engine: APIClient, instance: str) -> None:
    """What the engine refuses is the reason; the container that it had made is gone."""
    scrubber = ContainerScrubber(instance, TEST_IMAGE)
    try:
        with pytest.raises(WashUnreachable, match="does not start"):
            await scrubber.scrub(SPEC, 7)
    finally:
        scrubber.close()
    assert left(docker_engine, instance) == []


async def test_no_engine(tmp_path: Path) -> None:
    """Without an engine nothing is known, and that is said."""
    scrubber = ContainerScrubber("i", "image", docker_host=f"unix://{tmp_path}/none.sock")
    for ask in (lambda: scrubber.scrub(SPEC, 7), scrubber.sweep):
        with pytest.raises(WashUnreachable, match="not reachable"):
            await ask()  # type: ignore[operator]
    scrubber.close()


async def test_an_engine_that_is_ill_or_hangs(tmp_path: Path) -> None:
    """It is given up, and not a pass."""
    async with PlayedEngine(tmp_path / "e.sock") as engine:
        scrubber = ContainerScrubber("i", "image", docker_host=engine.host, call_timeout=0.2)
        body = b'{"message": "it is ill"}'
        engine.answers["/containers/json"] = b"HTTP/1.1 500 x\r\nContent-Length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )
        with pytest.raises(WashUnreachable, match="it is ill"):
            await scrubber.scrub(SPEC, 7)
        engine.hung = True
        with pytest.raises(WashUnreachable):
            await scrubber.scrub(SPEC, 7)
        scrubber.close()


# -- as a process -----------------------------------------------------------------------------------------


def process(code: str, **more: Any) -> ProcessScrubber:
    return ProcessScrubber((sys.executable, "-c", code), environment={"MARK": "1"}, **more)


async def test_a_process_that_passes() -> None:
    """Its figures, as a container's."""
    assert await process(PASSES).scrub(SPEC, 7) == scrub_figures("GPU-aa")


async def test_a_process_gets_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one GPU, and nothing of the service's environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for the scrub")
    code = (
        "import json, os, sys; found = dict(os.environ); found.pop('LC_CTYPE', 0)\n"
        "reason = ' '.join([str(found), *sys.argv[1:]])\n"
        "print(json.dumps({'result': 'failed', 'reason': reason, 'figures': {}}))"
    )
    with pytest.raises(Dirty) as caught:
        await process(code).scrub(SPEC, 7)
    told = str(caught.value).removeprefix("the scrub failed: ")
    wanted = {"MARK": "1", "CUDA_VISIBLE_DEVICES": "GPU-aa"}
    assert told == f"{wanted} --uuid GPU-aa --min-share 900 --seconds 61"


@pytest.mark.parametrize(
    ("code", "error", "why"),
    [
        (FAILS, Dirty, "7 words"),
        (COMPLAINS, WashUnreachable, "without an answer"),
        (TALKS, WashUnreachable, "too long"),
    ],
)
async def test_a_process_that_does_not(code: str, error: type[Exception], why: str) -> None:
    """Each is told, and what talks without end is ended."""
    with pytest.raises(error, match=why):
        await process(code).scrub(SPEC, 7)


async def test_a_process_that_does_not_end() -> None:
    """It is ended at its limit."""
    with pytest.raises(WashUnreachable, match=r"within 0\.2 s"):
        await process(STAYS, limit=0.2).scrub(SPEC, 7)


async def test_a_process_whose_wash_is_cancelled(tmp_path: Path) -> None:
    """It is gone when the cancellation is through, and a child that it has is ended."""
    os.mkfifo(tmp_path / "up")
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"with open({str(tmp_path / 'up')!r}, 'w') as up: up.write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(1000)"
    )
    async with asyncio.TaskGroup() as group:
        wash = group.create_task(process(code).scrub(SPEC, 7))
        first, child = map(int, (await asyncio.to_thread((tmp_path / "up").read_text)).split())
        wash.cancel()
    assert wash.cancelled()
    assert not runs(first)
    async with asyncio.timeout(PATIENCE):
        while runs(child):  # noqa: ASYNC110 -- somebody else's child
            await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def test_no_program() -> None:
    """A program that is not there is a reason."""
    scrubber = ProcessScrubber(("/no/such/program",), environment={})
    with pytest.raises(WashUnreachable, match="No such file"):
        await scrubber.scrub(SPEC, 7)
    assert await scrubber.sweep() == 0
    scrubber.close()


async def test_the_real_program() -> None:
    """On a machine without this GPU it does not pass."""
    with pytest.raises(WashUnreachable, match=r"no GPU|not be carried out"):
        await program_process().scrub(SPEC, 7)
