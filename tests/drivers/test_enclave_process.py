"""The enclave as a process: its record, its end, and those that an earlier life started."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpu_server.drivers.enclave_process import ProcessEnclave
from gpu_server.drivers.process_record import read_record
from gpu_server.ports import EnclaveDown, RuntimeUnreachable

STAYS = "import signal, sys; print('up', flush=True); signal.pause()"
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True: signal.pause()
"""
SHOWS_WHAT_IT_HAS = """
import json, os, signal
files = {number: os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)}
others = [int(n) for n in os.listdir("/proc/self/fd") if int(n) > 2 and os.path.exists(f"/proc/self/fd/{n}")]
print(json.dumps([dict(os.environ), files, others, os.getcwd()]), flush=True)
signal.pause()
"""
HAS_A_CHILD = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
signal.pause()
"""
PATIENCE = 30.0

Make = Callable[..., ProcessEnclave]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    def made(code: str = STAYS, instance: str = "i", **changed: object) -> ProcessEnclave:
        environment = {"MARK": "1", **changed.pop("environment", {})}  # type: ignore[dict-item]
        command = (sys.executable, "-c", code)
        return ProcessEnclave(instance, tmp_path / "e", command, environment=environment, **changed)  # type: ignore[arg-type]

    yield made
    await made().stop(0.0)


async def said(folder: Path, words: str) -> None:
    """Wait until the process has written this."""
    async with asyncio.timeout(PATIENCE):
        while words not in (folder / "enclave.log").read_text():  # noqa: ASYNC110 -- another process's file
            await asyncio.sleep(0.001)


async def ended(enclave: ProcessEnclave) -> str:
    async with asyncio.timeout(PATIENCE):
        while (why := await enclave.ended()) is None:  # noqa: ASYNC110 -- as the supervisor does
            await asyncio.sleep(0.001)
    return why


def inheritable(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:  # that of the listing
        return False


def runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # also one that goes while it is read
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def test_start_and_stop(make: Make, tmp_path: Path) -> None:
    """It runs until it is stopped; nothing is left then, and stopping again is no error."""
    enclave = make()
    assert await enclave.ended() == "its process has gone"
    await enclave.start()
    assert await enclave.ended() is None
    await said(tmp_path / "e", "up")
    assert await enclave.stop(5.0) == "terminated"
    assert await enclave.ended() == "its process has gone"
    assert not (tmp_path / "e").exists()
    assert await enclave.stop(5.0) == "none"


async def test_it_inherits_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's environment holds keys; the enclave's process gets none of it, and no open file."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for the enclave")
    of_the_tests = {int(number) for number in os.listdir("/proc/self/fd")}
    given = {number for number in of_the_tests if number > 2 and inheritable(number)}  # by who started them
    await make(SHOWS_WHAT_IT_HAS).start()
    await said(tmp_path / "e", "]\n")
    environment, files, others, folder = json.loads((tmp_path / "e/enclave.log").read_text())
    assert environment.keys() <= {"MARK", "GPU_SERVER_ENCLAVE", "PWD", "LC_CTYPE", "OLDPWD", "SHLVL", "_"}
    assert files == {"0": "/dev/null", "1": f"{folder}/enclave.log", "2": f"{folder}/enclave.log"}
    assert set(others) <= given
    assert folder == str(tmp_path / "e")


async def test_why_it_ended(make: Make) -> None:
    """Its exit code and the last line that it wrote."""
    enclave = make("import sys; print('first', flush=True); sys.exit('no room here')")
    await enclave.start()
    assert await ended(enclave) == "its process has ended with 1: no room here"
    assert "no room here" in str(await enclave.ended())


async def test_the_next_life_finds_it(make: Make) -> None:
    """By its record: the same process, which runs on, and can be ended."""
    await make().start()
    second = make()
    assert await second.find()
    assert await second.ended() is None
    await second.stop(5.0)
    assert not await second.find()


@pytest.mark.parametrize(
    "other", [{"code": "pass"}, {"environment": {"X": "1"}}, {"make": "2"}, {"instance": "j"}], ids=str
)
async def test_another_make_is_not_taken_up(make: Make, other: dict[str, object]) -> None:
    """Another program, environment, version or instance is another enclave."""
    await make().start()
    assert not await make(**other).find()  # type: ignore[arg-type]


async def test_a_start_replaces(make: Make, tmp_path: Path) -> None:
    """What is left of an earlier one is ended first, also one of another make."""
    await make().start()
    before = read_record(tmp_path / "e")
    second = make(make="2")
    await second.start()
    after = read_record(tmp_path / "e")
    assert before is not None
    assert after is not None
    assert before.pid != after.pid
    assert before.pid is not None
    assert not runs(before.pid)


async def test_a_kill_is_seen(make: Make, tmp_path: Path) -> None:
    """The signal that ended it is told."""
    enclave = make()
    await enclave.start()
    record = read_record(tmp_path / "e")
    assert record is not None
    assert record.pid is not None
    os.kill(record.pid, signal.SIGKILL)
    assert (await ended(enclave)).startswith("its process has ended with -9")
    assert await enclave.stop(5.0) == "ended"


async def test_one_that_does_not_listen(make: Make, tmp_path: Path) -> None:
    """SIGTERM first, and SIGKILL after the grace."""
    enclave = make(STUBBORN)
    await enclave.start()
    await said(tmp_path / "e", "up")
    assert await enclave.stop(0.1) == "killed"
    assert await enclave.ended() == "its process has gone"


async def test_its_children_end_with_it(make: Make, tmp_path: Path) -> None:
    """A process that it started, the runner's enclave for one, is not left."""
    enclave = make(HAS_A_CHILD)
    await enclave.start()
    await said(tmp_path / "e", "\n")
    child = int((tmp_path / "e/enclave.log").read_text())
    await enclave.stop(0.0)
    assert not runs(child)


async def test_another_boot(make: Make, tmp_path: Path) -> None:
    """A pid of an earlier boot is nobody's: it is neither taken up nor signalled."""
    enclave = make()
    await enclave.start()
    path = tmp_path / "e/process.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "boot_id": "another"}))
    assert not await enclave.find()
    await enclave.stop(0.0)
    os.kill(record["pid"], 0)
    os.kill(record["pid"], signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, record["pid"], 0)


async def test_no_place(tmp_path: Path) -> None:
    """A folder that cannot be made is a reason."""
    (tmp_path / "file").write_text("")
    enclave = ProcessEnclave("i", tmp_path / "file/e", ("true",), environment={})
    with pytest.raises(EnclaveDown, match="does not start"):
        await enclave.start()


async def test_no_program(tmp_path: Path) -> None:
    """A program that is not there ends at once, and is named."""
    enclave = ProcessEnclave("i", tmp_path / "e", ("/no/such/program",), environment={})
    await enclave.start()
    assert "/no/such/program" in await ended(enclave)
    await enclave.stop(0.0)


async def test_a_service_without_descriptors(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc cannot be read nothing is known, which is an error of the port's: another would end the
    whole service."""
    enclave = make()
    await enclave.start()

    def refuses(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("gpu_server.drivers.process_tree.os.listdir", refuses)
        with pytest.raises(RuntimeUnreachable, match="too many open files"):
            await enclave.stop(0.0)
    assert await enclave.ended() is None


async def test_one_that_cannot_be_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end is not said to have ended."""
    enclave = make()
    await enclave.start()
    with monkeypatch.context() as patched:
        patched.setattr("gpu_server.drivers.enclave_process.send", lambda process, number: None)
        patched.setattr("gpu_server.drivers.enclave_process._KILL_SECONDS", 0.01)
        with pytest.raises(RuntimeUnreachable, match="does not end"):
            await enclave.stop(0.0)
    assert await enclave.ended() is None
