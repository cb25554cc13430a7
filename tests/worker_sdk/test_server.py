import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from gpu_worker import Emitter, Task, Worker
from gpu_worker.server import listening

from .conftest import parse, read_until


def counting(runs: list[str]) -> Worker:
    worker = Worker()

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        runs.append(task.id)
        for number in range(task.metadata.get("count", 1)):
            await emit.text_delta(f"{number}")

    return worker


async def test_health_names_the_session(start: Callable[..., Any]) -> None:
    """The service can tell that it talks to the worker it started."""
    async with start(counting([])) as client:
        assert await client.health() == {
            "status": "ready",
            "session_id": "s_1",
            "progress": None,
            "message": None,
        }


async def test_post_is_idempotent(start: Callable[..., Any]) -> None:
    """A known id does not run again, whatever the body: it attaches from the first event."""
    runs: list[str] = []
    async with start(counting(runs)) as client:
        first = await client.run("t", count=3)
        async with client.http.post("http://worker/tasks/t", data=b"not even JSON") as answer:
            assert parse(await answer.read()) == first
    assert runs == ["t"]


async def test_reattach_after_n(start: Callable[..., Any]) -> None:
    """`after=N` gives the same stream from N+1 on, up to nothing at all."""
    async with start(counting([])) as client:
        whole = await client.run("t", count=5)
        for after in (0, 3, 6, 99):
            async with client.events("t", after) as answer:
                assert answer.headers["Content-Type"] == "text/event-stream"
                assert parse(await answer.read()) == whole[after:]


async def test_losing_the_connection_does_not_cancel(start: Callable[..., Any]) -> None:
    """A reader can vanish in the middle; another takes up where it was and misses nothing."""
    worker = Worker()
    go_on = asyncio.Event()

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        await emit.text("before")
        await go_on.wait()
        await emit.text("after")

    async with start(worker) as client:
        async with client.post("t") as answer:
            seen = await read_until(answer, b"before")
            answer.close()
        go_on.set()
        async with client.events("t", after=1) as answer:
            rest = parse(await answer.read())
    assert [data.get("text") for _, _, data in parse(seen) + rest] == ["before", "after", None]
    assert rest[-1][2] == {"status": "completed"}


async def test_an_unread_task_waits_and_loses_nothing(start: Callable[..., Any]) -> None:
    """With nobody reading, a task stops at its bound; who re-attaches gets every event, in order."""
    worker = Worker()
    finished: list[str] = []
    histories: list[Any] = []

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        histories.append(emit._history)
        for number in range(task.metadata["count"]):
            await emit.text_delta(f"{number} ")
        finished.append(task.id)

    async with start(worker, history_bytes=20_000) as client:
        async with client.post("t", count=5000) as answer:
            seen = await read_until(answer, b"\n\n")
            answer.close()
        while not histories[0]._waiting:
            await client.health()
        assert finished == []
        assert histories[0].size <= 20_000
        seen = seen[: seen.rindex(b"\n\n") + 2]
        last = parse(seen)[-1][0]
        assert last is not None
        oldest = histories[0].oldest
        async with client.events("t", max(last, oldest - 1)) as answer:
            events = parse(await answer.read())
    assert [number for number, _, _ in events] == list(range(max(last + 1, oldest), 5002))
    assert finished == ["t"]


async def test_dropped_events_are_gone(start: Callable[..., Any]) -> None:
    """410 where the events after N are no longer kept, also for a POST of the known id; it says where the
    history begins, and from there it is whole."""
    async with start(counting([]), history_bytes=2000) as client:
        whole = await client.run("t", count=500)
        async with client.events("t", after=0) as answer:
            assert answer.status == 410
            oldest = (await answer.json())["oldest"]
        async with client.post("t") as answer:
            assert answer.status == 410
            assert (await answer.json())["oldest"] == oldest
        async with client.events("t", after=oldest - 2) as answer:
            assert answer.status == 410
        async with client.events("t", after=oldest - 1) as answer:
            assert parse(await answer.read()) == whole[oldest - 1 :]
        async with client.events("t", after=495) as answer:
            assert parse(await answer.read()) == whole[495:]


async def test_two_readers_see_the_same(start: Callable[..., Any]) -> None:
    """A second stream of one task is as complete as the first."""
    async with (
        start(counting([])) as client,
        client.post("t", count=200) as first,
        client.events("t") as second,
    ):
        assert await first.read() == await second.read()


async def test_refusals(start: Callable[..., Any]) -> None:
    """404 for an unknown task, 400 for a body or a number that is none."""
    runs: list[str] = []
    async with start(counting(runs)) as client:
        for body in (b"", b"{", b"[]", b'{"metadata": 1}', b"{}", b"\xff", b"[" * 100_000):
            async with client.http.post("http://worker/tasks/t", data=body) as answer:
                assert answer.status == 400
        assert runs == []
        assert await client.delete("t") == 404
        async with client.events("t") as answer:
            assert answer.status == 404
        await client.run("t")
        for after in ("-1", "x", "1" * 5000, "²", ""):
            async with client.events("t", after) as answer:  # type: ignore[arg-type]
                assert answer.status == 400


async def test_the_socket_appears_when_it_can_be_connected_to(tmp_path: Path) -> None:
    """A stale socket is replaced, no other name is left, and it is gone afterwards."""
    path = tmp_path / "worker.sock"
    for stale in (path, tmp_path / "worker.sock~"):
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(stale))
    async with listening(web.Application(), path):
        assert os.listdir(tmp_path) == ["worker.sock"]
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect(str(path))
    assert os.listdir(tmp_path) == []


async def test_a_long_path_is_no_hindrance(tmp_path: Path) -> None:
    """The 107 bytes that a socket's path may have do not bound GPU_WORKER_SOCKET."""
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    async with listening(web.Application(), folder / "worker.sock"):
        assert (folder / "worker.sock").is_socket()


async def test_a_folder_in_the_sockets_place_is_an_error(tmp_path: Path) -> None:
    """Nothing is removed that is not a socket of ours."""
    (tmp_path / "worker.sock").mkdir()
    with pytest.raises(OSError, match="directory"):
        async with listening(web.Application(), tmp_path / "worker.sock"):
            raise AssertionError("it must not be served")
