"""The process driver: what the contract suite cannot say for every runtime."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gpu_server.drivers.process import UNKNOWN_EXIT, ProcessRuntime
from gpu_server.drivers.process_record import read_record, write_record
from gpu_server.drivers.process_tree import is_alive, leader_now
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import Contract, RunFolder, StartRefused, WorkerExit
from tests.worker_specs import TEST_UID, worker_spec

ROOT = Path(__file__).resolve().parents[2]
STAYS = "import signal; print('up'); signal.pause()"


def running(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolders(tmp_path / "run").create("s_1", TEST_UID, b'{"metadata": {}}')


@contextlib.asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[tuple[ProcessRuntime, asyncio.Queue[WorkerExit]]]:
    exits: asyncio.Queue[WorkerExit] = asyncio.Queue()
    runtime = ProcessRuntime("i", tmp_path / "run", tmp_path)
    async with asyncio.timeout(60):
        await runtime.open(exits.put_nowait)
        try:
            yield runtime, exits
            for worker in await runtime.list_workers():
                await runtime.remove(worker.name, grace=0)
        finally:
            await runtime.close()


async def test_a_worker_gets_the_contracts_environment_and_none_of_the_services(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real paths under the contract's names, the preset's variables, and no secret of the service."""
    monkeypatch.setenv("INTERNAL_API_KEY", "secret")
    code = "import json, os; print(json.dumps([dict(os.environ), os.getcwd(), os.read(0, 1).decode()]))"
    spec = worker_spec(
        folder,
        code,
        contract=Contract.EXEC,
        model_path=Path("/models/m"),
        env={"MODEL_ID": "m", "HOME": "/evil"},
    )
    async with opened(tmp_path) as (runtime, _):
        worker = await runtime.create(spec)
        await runtime.start(spec.name)
        found: Any = json.loads(b"".join([piece.data async for piece in worker.output]))
    environment, cwd, stdin = found
    assert (cwd, stdin) == (str(tmp_path), "")
    assert "secret" not in environment.values()
    expected = {
        "GPU_WORKER_SOCKET": str(folder.socket),
        "TASK_INPUT": str(folder.task / "input.json"),
        "TASK_ID": "t_1",
        "MODEL_PATH": "/models/m",
        "MODEL_ID": "m",
        "HOME": str(folder.share),
        "USER": "worker",
        "TMPDIR": str(folder.path / "tmp"),
        "GPU_SESSION_ID": "s_1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert expected.items() <= environment.items()


@pytest.mark.parametrize(
    ("command", "message"),
    [(None, "no process_command"), ((), "no process_command"), (("no-such-program",), "no-such-program")],
)
async def test_a_preset_that_cannot_run_here_is_refused(
    folder: RunFolder, tmp_path: Path, command: tuple[str, ...] | None, message: str
) -> None:
    """Without a command, or with one that is not installed, the reason is told and no record is left."""
    async with opened(tmp_path) as (runtime, _):
        with pytest.raises(StartRefused, match=message) as refused:
            await runtime.create(worker_spec(folder, process_command=command))
        assert refused.value.code == "start_failed"
        assert await runtime.list_workers() == ()


async def test_removing_takes_the_whole_family(folder: RunFolder, tmp_path: Path) -> None:
    """Children that outlive or ignore their leader are gone when the removal returns."""
    code = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"],
    stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid)
signal.pause()
"""
    async with opened(tmp_path) as (runtime, exits):
        worker = await runtime.create(worker_spec(folder, code))
        await runtime.start(worker.name)
        child = leader_now(int((await anext(worker.output)).data))
        assert child is not None
        assert is_alive(child)
        await runtime.remove(worker.name, grace=30)
        assert (await exits.get()).exit_code == 128 + signal.SIGTERM
        assert not is_alive(child)
        assert not (folder.path / "process.json").exists()


async def test_children_of_a_leader_that_ended_by_itself_are_removed(
    folder: RunFolder, tmp_path: Path
) -> None:
    """A worker that exits and leaves a process behind holds nothing after its removal."""
    code = """
import subprocess, sys
sys.stdout.write(str(subprocess.Popen(["sleep", "300"], stdin=subprocess.DEVNULL).pid))
"""
    async with opened(tmp_path) as (runtime, exits):
        worker = await runtime.create(worker_spec(folder, code))
        await runtime.start(worker.name)
        left = leader_now(int((await anext(worker.output)).data))
        assert (await exits.get()).exit_code == 0
        assert left is not None
        assert is_alive(left)
        await runtime.remove(worker.name, grace=30)
        assert not is_alive(left)
        assert [piece async for piece in worker.output] == []


async def test_a_recorded_pid_that_is_another_process_now_is_left_alone(
    folder: RunFolder, tmp_path: Path
) -> None:
    """After a crash the recorded pid may be anybody's: only pid and start time and boot together are ours."""
    async with opened(tmp_path) as (runtime, _):
        worker = await runtime.create(worker_spec(folder, STAYS))
        record = read_record(folder.path)
        assert record is not None
        with running(["sleep", "300"]) as stranger:
            now = leader_now(stranger.pid)
            assert now is not None
            for start_time, boot in ((now.start_time - 1, record.boot_id), (now.start_time, "another")):
                lie = dataclasses.replace(record, pid=now.pid, start_time=start_time, boot_id=boot)
                write_record(folder.path, lie)
                (seen,) = await runtime.list_workers()
                assert not seen.running
                await runtime.remove(worker.name, grace=0)
                assert stranger.poll() is None
            stranger.kill()


SERVICE = """
import asyncio, sys
from pathlib import Path
from gpu_server.drivers.process import ProcessRuntime
from gpu_server.drivers.run_folder import RunFolders
from tests.worker_specs import TEST_UID, worker_spec
async def main(root):
    runtime = ProcessRuntime("i", root / "run", root)
    await runtime.open(lambda _: None)
    folder = RunFolders(root / "run").create("s_1", TEST_UID, None)
    worker = await runtime.create(worker_spec(folder, sys.argv[2]))
    if sys.argv[3] == "start":
        await runtime.start(worker.name)
        print((await anext(worker.output)).data.decode().strip(), flush=True)
    else:
        print("created", flush=True)
    await asyncio.Event().wait()
asyncio.run(main(Path(sys.argv[1])))
"""
TALKS = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.write(1, b"up")
signal.sigwait([signal.SIGUSR1])
sys.stdout.write("x" * 500_000); sys.stdout.flush()
sys.stderr.write("y" * 500_000)
"""


async def run_and_kill_service(tmp_path: Path, last: str) -> None:
    """A service that creates a worker, starts it if that is the last it does, and is killed then."""
    with running([sys.executable, "-c", SERVICE, str(tmp_path), TALKS, last]) as service:
        assert service.stdout is not None
        said = await asyncio.to_thread(service.stdout.readline)
        service.kill()
    assert said == {"start": "up\n", "create": "created\n"}[last]


async def test_a_worker_survives_a_killed_service_and_is_taken_over(tmp_path: Path) -> None:
    """kill -9 of the service: its worker runs on, is listed, may write without end, is heard and removed."""
    await run_and_kill_service(tmp_path, "start")
    record = read_record(tmp_path / "run/s_1")
    assert record is not None
    assert record.leader is not None
    async with opened(tmp_path) as (runtime, exits):
        (seen,) = await runtime.list_workers()
        assert (seen.name, seen.running) == ("s_1-1", True)
        # It can only end when somebody takes what it writes, which is more than a pipe holds.
        os.kill(record.leader.pid, signal.SIGUSR1)
        assert (await exits.get()).exit_code == UNKNOWN_EXIT
        await runtime.remove("s_1-1", grace=30)
        assert await runtime.list_workers() == ()


async def test_a_worker_of_a_killed_service_is_taken_up_with_its_output(tmp_path: Path) -> None:
    """What it writes from then on comes whole, far beyond what a pipe holds; with which code it ended cannot
    be known."""
    await run_and_kill_service(tmp_path, "start")
    record = read_record(tmp_path / "run/s_1")
    assert record is not None
    assert record.leader is not None
    async with opened(tmp_path) as (runtime, exits):
        found = await runtime.reattach("s_1-1")
        assert found is not None
        assert found.exit is None
        os.kill(record.leader.pid, signal.SIGUSR1)
        seen = {"stdout": b"", "stderr": b""}
        async for piece in found.output:
            seen[piece.stream] += piece.data
        assert seen == {"stdout": b"x" * 500_000, "stderr": b"y" * 500_000}
        heard = await exits.get()
        assert heard.exit_code == UNKNOWN_EXIT
        found = await runtime.reattach("s_1-1")
        assert found is not None
        assert found.exit == heard
        assert [piece async for piece in found.output] == []


async def test_a_worker_whose_service_was_killed_before_the_start_can_be_created_anew(tmp_path: Path) -> None:
    """What was created and never started is nothing to take up, and in nobody's way."""
    await run_and_kill_service(tmp_path, "create")
    async with opened(tmp_path) as (runtime, exits):
        assert await runtime.reattach("s_1-1") is None
        path = tmp_path / "run/s_1"
        folder = RunFolder(session_id="s_1", path=path, share=path / "share", task=path / "task")
        worker = await runtime.create(worker_spec(folder, "print('ran')"))
        await runtime.start(worker.name)
        assert b"".join([piece.data async for piece in worker.output]) == b"ran\n"
        assert (await exits.get()).exit_code == 0


async def test_an_exit_that_nobody_saw_has_the_code_for_unknown(folder: RunFolder, tmp_path: Path) -> None:
    """A worker that ended between two lives of the service is told as failed, never as success."""
    async with opened(tmp_path) as (runtime, _):
        await runtime.create(worker_spec(folder, STAYS))
        record = read_record(folder.path)
        assert record is not None
        with running(["/bin/true"]) as gone:
            now = leader_now(gone.pid)
        assert now is not None
        write_record(folder.path, dataclasses.replace(record, pid=now.pid, start_time=now.start_time))
    async with opened(tmp_path) as (runtime, _):
        assert await runtime.list_workers() == ()
    write_record(folder.path, dataclasses.replace(record, pid=now.pid, start_time=now.start_time))
    async with opened(tmp_path) as (runtime, exits):
        heard = await exits.get()
        assert heard.exit_code == UNKNOWN_EXIT
        found = await runtime.reattach(record.name)
        assert found is not None
        assert found.exit == heard


def test_it_says_that_it_isolates_nothing(tmp_path: Path) -> None:
    """Whoever runs this in earnest is warned."""
    runtime = ProcessRuntime("i", tmp_path, tmp_path)
    assert "no isolation" in runtime.warnings[0]
