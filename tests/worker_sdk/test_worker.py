import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_worker import BlockingEmitter, Emitter, Task, Worker

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
