import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_worker
import pytest
from gpu_worker import BlockingEmitter, Emitter, Task, TaskError, Worker

from .conftest import parse, read_until


async def nothing(task: Task, emit: Emitter) -> None:
    pass


async def test_loading_reports_progress_and_refuses_tasks(start: Callable[..., Any]) -> None:
    """Until load returns, health says how far it is and a task is answered 503."""
    worker = Worker()
    worker.task(nothing)
    reported, go_on = asyncio.Event(), asyncio.Event()

    @worker.load
    async def load(progress: Any) -> None:
        await progress("weights", 1, 4)
        reported.set()
        await go_on.wait()

    async with start(worker, loaded=False) as client:
        await reported.wait()
        health = await client.health()
        assert health["status"] == "loading"
        assert health["progress"] == {"stage": "weights", "done": 1, "total": 4}
        async with client.post("t") as answer:
            assert answer.status == 503
        go_on.set()
        while (await client.health())["status"] == "loading":
            pass
        health = await client.health()
        assert (health["status"], health["progress"]) == ("ready", None)
        assert len(await client.run("t")) == 1


async def test_a_plain_load_function_does_not_hold_up_health(start: Callable[..., Any]) -> None:
    """It runs in a thread, and its progress needs no await."""
    worker = Worker()
    worker.task(nothing)
    go_on = threading.Event()

    @worker.load
    def load(progress: Any) -> str:
        progress("weights", 1)
        go_on.wait()
        return "model"

    async with start(worker, loaded=False) as client:
        while (await client.health())["progress"] is None:
            pass
        go_on.set()
        while (await client.health())["status"] != "ready":
            pass


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_load_that_fails_says_why(
    start: Callable[..., Any], blocking: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker stays up, its health is `failed` with the message, and no task is taken."""
    worker = Worker()
    worker.task(nothing)
    if blocking:

        @worker.load
        def load(progress: Any) -> None:
            raise OSError("no weights")
    else:

        @worker.load
        async def load(progress: Any) -> None:
            raise OSError("no weights")

    async with start(worker) as client:
        health = await client.health()
        assert (health["status"], health["message"]) == ("failed", "OSError: no weights")
        async with client.post("t") as answer:
            assert answer.status == 503
    assert "OSError: no weights" in capsys.readouterr().err


async def test_stopping_ends_streams_as_cancelled(tmp_path: Path, start: Callable[..., Any]) -> None:
    """Async tasks are cancelled, plain ones are abandoned, and every stream gets its end."""
    for blocking in (False, True):
        worker = Worker()
        released = threading.Event()
        if blocking:

            @worker.task
            def run(task: Task, emit: BlockingEmitter) -> None:
                emit.text("started")
                released.wait()  # noqa: B023
        else:

            @worker.task
            async def run(task: Task, emit: Emitter) -> None:
                await emit.text("started")
                await asyncio.Event().wait()

        async with asyncio.TaskGroup() as group:
            async with start(worker) as client:
                answer = await client.post("t")
                await read_until(answer, b"started")
                rest = group.create_task(answer.read())
            assert parse(rest.result()) == [(2, "end", {"status": "cancelled"})]
        released.set()
        assert os.listdir(tmp_path) == []


async def test_a_worker_that_fails_ends_its_tasks(start: Callable[..., Any]) -> None:
    """Tasks that know why end with their own words, the others are ended; health says the reason."""
    worker = Worker()
    broken = asyncio.Event()

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        await emit.text("started")
        if task.metadata["knows"]:
            await broken.wait()
            raise TaskError("engine_dead", "the engine exited")
        await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group, start(worker) as client:
        answers = [await client.post(f"t{knows}", knows=knows) for knows in (True, False)]
        for answer in answers:
            await read_until(answer, b"started")
        rests = [group.create_task(answer.read()) for answer in answers]
        broken.set()
        worker.fail("no engine")
        worker.fail("and more")
        ends = [parse(await rest) for rest in rests]
    assert worker.failure == "no engine"
    assert ends == [
        [(2, "end", {"status": "failed", "error": {"code": "engine_dead", "message": "the engine exited"}})],
        [(2, "end", {"status": "failed", "error": {"code": "worker_failed", "message": "no engine"}})],
    ]


async def test_a_load_may_end_the_worker(start: Callable[..., Any]) -> None:
    """`fail` is heard at any time, from any thread."""
    worker = Worker()
    worker.task(nothing)

    @worker.load
    def load(progress: Any) -> None:
        worker.fail("no GPU")

    async with start(worker, loaded=False):
        pass
    assert worker.failure == "no GPU"


@pytest.mark.parametrize("stuck", [False, True])
def test_the_process_of_a_failed_worker(tmp_path: Path, stuck: bool) -> None:
    """It ends with status 1, and the last line of its log is the reason, whatever it still does."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import threading, atexit\n"
        "from gpu_worker import Worker\n"
        "atexit.register(print, 'later')\n"
        "worker = Worker()\n"
        "worker.task(print)\n"
        "@worker.load\n"
        "async def load(progress):\n"
        "    worker.fail('the engine is gone')\n"
        f"    if {stuck}: threading.Event().wait()\n"
        "worker.run()\n"
    )
    environment = {**os.environ, "GPU_WORKER_SOCKET": str(tmp_path / "worker.sock")}
    environment["PYTHONPATH"] = str(Path(gpu_worker.__file__).parents[1])
    ended = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "the worker failed: the engine is gone"
    assert "later" not in ended.stdout


async def test_a_worker_may_fail_when_it_has_stopped(start: Callable[..., Any]) -> None:
    """A thread that notices too late gets no error of a loop that is closed."""
    worker = Worker()
    worker.task(nothing)

    async def serve() -> None:
        async with start(worker):
            pass

    await asyncio.to_thread(asyncio.run, serve())
    worker.fail("too late")
    assert worker.failure == "too late"


@pytest.mark.parametrize("broken", ["sys.stdout.close()", "sys.stderr.close()", "os.close(1); os.close(2)"])
def test_a_failed_worker_ends_where_nobody_reads_its_log(tmp_path: Path, broken: str) -> None:
    """Its status is 1 all the same, at once."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import os, sys\n"
        "from gpu_worker.worker import _exit_failed\n"
        "print('not written yet', end='')\n"
        f"{broken}\n"
        "_exit_failed('the engine is gone')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(gpu_worker.__file__).parents[1])}
    # With a clean-up at its end, Python would give another status.
    program.write_text(f"import atexit, os\natexit.register(os._exit, 3)\n{program.read_text()}")
    assert subprocess.run([sys.executable, program], env=environment, capture_output=True).returncode == 1


async def test_figures(start: Callable[..., Any]) -> None:
    """Health shows a worker's own numbers, where it tells any."""
    worker = Worker()
    worker.task(nothing)
    async with start(worker) as client:
        assert "figures" not in await client.health()
        worker.tell(running=2, waiting=1)
        worker.tell(running=3)
        assert (await client.health())["figures"] == {"running": 3, "waiting": 1}


async def test_stopping_while_loading(start: Callable[..., Any]) -> None:
    """A load that never returns does not hold up the end."""
    worker = Worker()
    worker.task(nothing)

    @worker.load
    async def load(progress: Any) -> None:
        await asyncio.Event().wait()

    async with start(worker, loaded=False) as client:
        assert (await client.health())["status"] == "loading"


async def test_a_worker_without_a_task_function_is_refused(tmp_path: Path) -> None:
    """The mistake is named at the start."""
    with pytest.raises(RuntimeError, match=r"@worker\.task"):
        await Worker().serve(tmp_path / "worker.sock", asyncio.Event())


def test_run_needs_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which variable is missing."""
    monkeypatch.delenv("GPU_WORKER_SOCKET", raising=False)
    with pytest.raises(SystemExit, match="GPU_WORKER_SOCKET"):
        Worker().run()
