import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from gpu_worker import BlockingEmitter, Cancelled, Emitter, Task, TaskError, Worker, tasks

from .conftest import parse, read_until


def end_of(events: list[Any]) -> dict[str, Any]:
    _, event, data = events[-1]
    assert event == "end"
    return data


async def forever(task: Task, emit: Emitter) -> None:
    await emit.text("started")
    await asyncio.Event().wait()


async def test_a_task_gets_its_id_metadata_and_state(start: Callable[..., Any]) -> None:
    """What the service sent, and what load returned, are there on the task."""
    worker = Worker()
    seen: list[Any] = []

    @worker.load
    async def load(progress: Any) -> str:
        return "model"

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        seen.append((task.id, task.metadata, task.state, task.cancelled))

    async with start(worker) as client:
        assert end_of(await client.run("t", a=[1])) == {"status": "completed"}
    assert seen == [("t", {"a": [1]}, "model", False)]


@pytest.mark.parametrize("blocking", [False, True])
async def test_what_an_author_raises_fails_the_task(
    start: Callable[..., Any], blocking: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """TaskError chooses the code; anything else is task_failed with its type, its traceback on stderr."""
    worker = Worker()
    errors = {
        "own": TaskError("mine", "no"),
        "other": KeyError("x"),
        "exit": SystemExit(3),
        "stop": StopIteration(),
    }
    if blocking:

        @worker.task
        def run(task: Task, emit: BlockingEmitter) -> None:
            raise errors[task.id]
    else:

        @worker.task
        async def run(task: Task, emit: Emitter) -> None:
            raise errors[task.id]

    async with start(worker) as client:
        assert end_of(await client.run("own"))["error"] == {"code": "mine", "message": "no"}
        assert end_of(await client.run("other")) == {
            "status": "failed",
            "error": {"code": "task_failed", "message": "KeyError: 'x'"},
        }
        assert end_of(await client.run("exit"))["error"]["message"] == "SystemExit: 3"
        assert end_of(await client.run("stop"))["status"] == "failed"
    assert "KeyError: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("result", ["text", {"n": float("inf")}, {"n": object()}, {"n": "a" * (1 << 20)}])
async def test_a_bad_usage_fails_the_task(start: Callable[..., Any], result: Any) -> None:
    """What cannot be said as usage is the author's mistake, and the stream still ends well."""
    worker = Worker()

    @worker.task
    async def run(task: Task, emit: Emitter) -> Any:
        return result

    async with start(worker) as client:
        assert end_of(await client.run("t"))["error"]["code"] == "task_failed"


async def test_delete_cancels_an_async_task(start: Callable[..., Any]) -> None:
    """DELETE is asyncio's cancellation in the function, and the end is `cancelled`."""
    worker = Worker()
    worker.task(forever)
    async with start(worker) as client, client.post("t") as answer:
        seen = await read_until(answer, b"started")
        assert await client.delete("t") == 202
        assert end_of(parse(seen + await answer.read())) == {"status": "cancelled"}
        assert await client.delete("t") == 202


async def test_delete_raises_cancelled_in_a_plain_function(start: Callable[..., Any]) -> None:
    """A thread hears of it at its next emit."""
    worker = Worker()
    deleted = threading.Event()
    raised: list[bool] = []

    @worker.task
    def run(task: Task, emit: BlockingEmitter) -> None:
        emit.text("started")
        deleted.wait()
        try:
            emit.text("more")
        except Cancelled:
            raised.append(task.cancelled)
            raise

    async with start(worker) as client, client.post("t") as answer:
        await read_until(answer, b"started")
        assert await client.delete("t") == 202
        deleted.set()
        assert parse(await answer.read()) == [(2, "end", {"status": "cancelled"})]
    assert raised == [True]


async def test_delete_frees_a_thread_that_waits_for_room(start: Callable[..., Any]) -> None:
    """A plain function that is held back by a full history can be cancelled."""
    worker = Worker()
    full = threading.Event()

    @worker.task
    def run(task: Task, emit: BlockingEmitter) -> None:
        for _ in range(10_000):
            if emit._history.size > 900:
                full.set()
            emit.text("words")

    async with start(worker, history_bytes=1000) as client:
        client_answer = await client.post("t")
        client_answer.close()
        await asyncio.to_thread(full.wait)
        assert await client.delete("t") == 202
        after = 0
        while True:  # whatever was dropped meanwhile, the end is there
            async with client.events("t", after) as answer:
                if answer.status == 200:
                    assert b'"status":"cancelled"' in await answer.read()
                    break
            after += 1


async def test_a_task_that_ends_well_after_a_cancel_is_cancelled(start: Callable[..., Any]) -> None:
    """A function may look at task.cancelled and return; its usage is kept."""
    worker = Worker()

    @worker.task
    async def run(task: Task, emit: Emitter) -> dict[str, int]:
        await emit.text("started")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return {"tokens": 7}
        return {}

    async with start(worker) as client, client.post("t") as answer:
        seen = await read_until(answer, b"started")
        await client.delete("t")
        assert end_of(parse(seen + await answer.read())) == {"status": "cancelled", "usage": {"tokens": 7}}


async def test_a_task_cancelled_at_once_still_says_its_end() -> None:
    """Even when it was cancelled before its first step."""
    async with asyncio.TaskGroup() as group:
        all_tasks = tasks.Tasks(group, 1000)
        run = all_tasks.start(Task("t", {}, None), forever)
        run.cancel()
    with run.history.reader(0) as reader:
        assert b'"status":"cancelled"' in await reader.ready()


async def test_finished_tasks_are_forgotten_oldest_first(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many, and so many bytes, are remembered; a running task always is."""
    monkeypatch.setattr(tasks, "FINISHED_MAX", 3)
    worker = Worker()

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        if task.id == "running":
            await forever(task, emit)
        await emit.text("x" * task.metadata.get("size", 1))

    async def known(client: Any) -> list[str]:
        found = []
        for name in ("t0", "t1", "t2", "t3", "t4"):
            async with client.events(name) as answer:
                found += [name] if answer.status == 200 else []
        return found

    async with start(worker) as client, client.post("running"):
        for number in range(5):
            await client.run(f"t{number}")
        assert await known(client) == ["t2", "t3", "t4"]
        monkeypatch.setattr(tasks, "FINISHED_BYTES", 500)
        await client.run("large", size=1000)
        assert await known(client) == []
        assert await client.delete("large") == 202
        assert await client.delete("running") == 202
