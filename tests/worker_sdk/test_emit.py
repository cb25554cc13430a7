import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from gpu_worker import BlockingEmitter, Cancelled, Emitter, Task, Worker
from gpu_worker.history import History


async def test_events_arrive_in_order(start: Callable[..., Any]) -> None:
    """Every event of the contract comes through, in the order of emitting, with ids without holes."""
    worker = Worker()

    @worker.task
    async def run(task: Task, emit: Emitter) -> dict[str, int]:
        await emit.text_delta("a\nb")
        await emit.text("ab")
        await emit.logs("line")
        await emit.artifact("a.bin", "application/octet-stream", b"\x00")
        await emit.progress("half", 1, 2)
        await emit.error("odd", "but going on")
        return {"tokens": 1}

    async with start(worker) as client:
        assert await client.run("t") == [
            (1, "text_delta", {"delta": "a\nb"}),
            (2, "text", {"text": "ab"}),
            (3, "logs", {"stream": "stdout", "line": "line"}),
            (4, "artifact", {"name": "a.bin", "media_type": "application/octet-stream", "data": "AA=="}),
            (None, "progress", {"stage": "half", "done": 1, "total": 2}),
            (5, "error", {"code": "odd", "message": "but going on"}),
            (6, "end", {"status": "completed", "usage": {"tokens": 1}}),
        ]


async def test_blocking_emitter_says_the_same(start: Callable[..., Any]) -> None:
    """A plain function has the same methods without await, in a thread."""
    worker = Worker()

    @worker.task
    def run(task: Task, emit: BlockingEmitter) -> dict[str, int]:
        emit.text_delta("a")
        emit.text("a")
        emit.logs("line", "stderr")
        emit.artifact("a", "text/plain", b"")
        emit.error("c", "m")
        emit.flush()
        emit.progress("s", 1)
        emit.raw(b"")
        return {"tokens": 1}

    async with start(worker) as client:
        events = await client.run("t")
    assert [(number, event) for number, event, _ in events] == [
        (1, "text_delta"),
        (2, "text"),
        (3, "logs"),
        (4, "artifact"),
        (5, "error"),
        (None, "progress"),
        (6, "end"),
    ]


async def test_further_fields(start: Callable[..., Any]) -> None:
    """Text may carry more, as JSON values behind its own field; both emitters take it."""
    worker = Worker()

    @worker.task
    def run(task: Task, emit: BlockingEmitter) -> None:
        emit.text_delta("a", logprobs=[{"token": "a", "logprob": -0.5}])
        emit.text("a", finish_reason="stop", stop_reason=None)
        with pytest.raises(ValueError, match="JSON"):
            emit.text("a", logprob=float("nan"))

    async with start(worker) as client:
        assert await client.run("t") == [
            (1, "text_delta", {"delta": "a", "logprobs": [{"token": "a", "logprob": -0.5}]}),
            (2, "text", {"text": "a", "finish_reason": "stop", "stop_reason": None}),
            (3, "end", {"status": "completed"}),
        ]
    history = History(1000)
    await Emitter(history).text_delta("ü", index=1)
    await Emitter(history).text("ü", index=1)
    with history.reader(0) as reader:
        said = await reader.ready()
    assert said.decode().count(',"index":1}') == 2


@pytest.mark.parametrize("blocking", [False, True])
async def test_an_oversized_event_raises_in_the_authors_code(
    start: Callable[..., Any], blocking: bool
) -> None:
    """More than 1 MiB is a ValueError where it was emitted; the task can go on after it."""
    worker = Worker()
    big = "a" * (1 << 20)
    if blocking:

        @worker.task
        def run(task: Task, emit: BlockingEmitter) -> None:
            with pytest.raises(ValueError, match="split it"):
                emit.text(big)
            emit.text("small")
    else:

        @worker.task
        async def run(task: Task, emit: Emitter) -> None:
            with pytest.raises(ValueError, match="split it"):
                await emit.text(big)
            await emit.text("small")

    async with start(worker) as client:
        events = await client.run("t")
    assert [event for _, event, _ in events] == ["text", "end"]
    assert events[0][0] == 1


async def test_an_emitter_waits_when_nobody_reads() -> None:
    """A full history holds the task at its emit, until a reader takes some."""
    history = History(500)
    emit = Emitter(history)

    async def talk() -> None:
        for _ in range(100):
            await emit.text_delta("word")
        history.end(b"END", status="completed")

    async with asyncio.TaskGroup() as group:
        talking = group.create_task(talk())
        while not history._waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not talking.done()
        assert history.size <= 500
        data = b""
        with history.reader(0) as reader:
            while piece := await reader.ready():
                data += piece
                reader.took()
    assert data.count(b"text_delta") == 100


async def test_a_task_that_only_emits_lets_others_run() -> None:
    """The loop gets its turn without any other await in the author's code."""
    emit = Emitter(History(1 << 20))

    async def talk() -> None:
        while True:
            await emit.progress("busy", 1)
            for _ in range(10):
                await emit.text_delta("")

    async with asyncio.TaskGroup() as group:
        talking = group.create_task(talk())
        await asyncio.sleep(0)
        talking.cancel()


async def test_a_blocking_emitter_raises_cancelled() -> None:
    """Once the task was asked to stop, each method of the blocking emitter raises."""
    emit = BlockingEmitter(History(1000), lambda: True)
    for call in (
        lambda: emit.text_delta("a"),
        lambda: emit.progress("s", 1),
        lambda: emit.flush(),
    ):
        with pytest.raises(Cancelled):
            call()
