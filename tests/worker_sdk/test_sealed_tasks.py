"""A sealed worker on its socket: the same author's code as ever, and ciphertext on the wire."""

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import gpu_worker
import pytest
from gpu_worker import BlockingEmitter, Emitter, Task, TaskError, Worker, tasks
from gpu_worker.sealed_history import WITHHELD
from gpu_worker.sealed_record import ReplayRecord
from gpu_worker.server import SEALED_TASK

from . import sealed_world
from .conftest import parse, read_until
from .sealed_world import ARN, HEADERS, binding_of, post, random_text, read, request_to

ROOT = Path(__file__).parents[2]


async def story(task: Task, emit: Emitter) -> dict[str, int]:
    """Everything an author may do, in one task."""
    await emit.text_delta("Hello ")
    print("a line", task.metadata["word"])
    await emit.text_delta(task.metadata["word"], logprob=-0.5)
    await emit.error("odd", "but going on")
    await emit.progress("half", 1, 2)
    await emit.artifact("a.bin", "application/octet-stream", b"\x00")
    await emit.text("Hello " + task.metadata["word"])
    return {"tokens": 2}


def blocking_story(task: Task, emit: BlockingEmitter) -> dict[str, int]:
    """The same in a thread."""
    emit.text_delta("Hello ")
    print("a line", task.metadata["word"])
    emit.text_delta(task.metadata["word"], logprob=-0.5)
    emit.error("odd", "but going on")
    emit.progress("half", 1, 2)
    emit.artifact("a.bin", "application/octet-stream", b"\x00")
    emit.text("Hello " + task.metadata["word"])
    return {"tokens": 2}


def worker_of(function: Callable[..., Any]) -> Worker:
    worker = Worker()
    worker.task(function)
    return worker


def numbered(events: list[Any]) -> list[Any]:
    return [event for event in events if event[0] is not None]


# -- what is the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [story, blocking_story])
async def test_an_authors_code_says_the_same(start: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Opened, a sealed answer is what a plain task's stream would have been, from both kinds of function."""
    async with start(worker_of(function)) as client:
        plain = numbered(await client.run("t", word="world"))
    session = sealed_world.session()
    async with start(worker_of(function), sealed=session) as client:
        request = request_to(session.public_key, {"word": "world"})
        status, outer = await read(post(client.http, "t", request.delivery))
    assert status == 200
    assert numbered(request.events(outer)) == plain
    assert plain[-1] == (7, "end", {"status": "completed", "usage": {"tokens": 2}})


async def test_nothing_but_ciphertext_leaves(start: Callable[..., Any]) -> None:
    """Sealed events, and an end that says only how it ended: the service passes it on and learns nothing."""
    canary = random_text()
    session = sealed_world.session()
    async with start(worker_of(story), sealed=session) as client:
        request = request_to(session.public_key, {"word": canary})
        _, outer = await read(post(client.http, "t", request.delivery))
        health = json.dumps(await client.health())
    assert canary in request.clear_stream(outer).decode()
    assert canary not in outer.decode() + health
    assert base64.b64encode(canary.encode())[:20] not in outer
    assert parse(outer)[-1][1:] == ("end", {"status": "completed"})


async def test_the_key_is_shown_from_the_beginning(start: Callable[..., Any]) -> None:
    """While the model loads, too, and never another; a plain worker shows none."""
    session = sealed_world.session()
    worker = worker_of(story)
    loaded = asyncio.Event()

    @worker.load
    async def load(progress: Any) -> None:
        await loaded.wait()

    async with start(worker, loaded=False, sealed=session) as client:
        health = await client.health()
        assert (health["status"], health["sealed_key"]) == ("loading", session.public_key)
        loaded.set()
        while (health := await client.health())["status"] == "loading":
            pass
        assert (health["message"], health["sealed_key"]) == (None, session.public_key)
    async with start(worker_of(story)) as client:
        assert "sealed_key" not in await client.health()


# -- what is refused --------------------------------------------------------------------------------------


async def test_plain_and_sealed_do_not_mix(start: Callable[..., Any]) -> None:
    """A sealed worker takes no task in clear, which is answered in clear, and a plain one nothing sealed."""
    session = sealed_world.session()
    request = request_to(session.public_key, {"word": "x"})
    async with start(worker_of(story), sealed=session) as client:
        async with client.post("t", word="x") as answer:
            assert answer.status == 415
        assert (await read(post(client.http, "t", request.delivery)))[0] == 200
        async with client.post("t", word="x") as answer:  # not even for a task that is known
            assert answer.status == 415
    async with start(worker_of(story)) as client:
        assert (await read(post(client.http, "t", request.delivery)))[0] == 415


async def test_what_does_not_open_is_no_task(start: Callable[..., Any]) -> None:
    """400, with the code `decrypt`; the honest bytes may still come, under the same ids."""
    session = sealed_world.session()
    request = request_to(session.public_key, {"word": "x"})
    async with start(worker_of(story), sealed=session) as client:
        for forged in (request.delivered(tenant="other"), request.delivered(body=request.body[:-1]), b"{}"):
            status, body = await read(post(client.http, "t", forged))
            assert (status, json.loads(body)) == (
                400,
                {"error": "this request cannot be opened", "code": "decrypt"},
            )
        async with client.events("t") as answer:
            assert answer.status == 404
        assert (await read(post(client.http, "t", request.delivery)))[0] == 200


@pytest.mark.parametrize("clear", [b"[1]", b"no JSON"])
async def test_a_request_that_is_no_object_fails_inside(start: Callable[..., Any], clear: bytes) -> None:
    """Only the one who sealed it is told; outside it is a task that failed."""
    session = sealed_world.session()
    request = sealed_world.SealedRequest(binding_of(session.public_key), clear)
    async with start(worker_of(story), sealed=session) as client:
        status, outer = await read(post(client.http, "t", request.delivery))
    assert status == 200
    ((_, event, data),) = request.events(outer)
    assert (event, data["error"]["code"]) == ("end", "invalid_request")
    assert b"invalid_request" not in outer


async def test_a_worker_that_loads_takes_nothing_and_records_nothing(start: Callable[..., Any]) -> None:
    """503, and when it is ready the same bytes run."""
    session = sealed_world.session()
    worker = worker_of(story)
    loaded = asyncio.Event()

    @worker.load
    async def load(progress: Any) -> None:
        await loaded.wait()

    request = request_to(session.public_key, {"word": "x"})
    async with start(worker, loaded=False, sealed=session) as client:
        assert (await read(post(client.http, "t", request.delivery)))[0] == 503
        loaded.set()
        while (await client.health())["status"] == "loading":
            pass
        assert (await read(post(client.http, "t", request.delivery)))[0] == 200


# -- once, and only once ----------------------------------------------------------------------------------


async def test_the_same_bytes_run_once(start: Callable[..., Any]) -> None:
    """They attach to the run there is, whatever task id they come under, which then names that run."""
    runs: list[str] = []

    async def run(task: Task, emit: Emitter) -> None:
        runs.append(task.id)
        await emit.text(task.metadata["word"])

    session = sealed_world.session()
    request = request_to(session.public_key, {"word": "x"})
    async with start(worker_of(run), sealed=session) as client:
        answers = [await read(post(client.http, name, request.delivery)) for name in ("t1", "t1", "t2")]
        async with client.events("t2", after=1) as answer:
            rest = await answer.read()
        assert await client.delete("t2") == 202
    assert len(set(answers)) == 1
    assert answers[0][1].endswith(rest)
    assert runs == ["t1"]


async def test_another_request_under_a_known_id_is_a_replay(start: Callable[..., Any]) -> None:
    """409, for a request id and for a task id alike; what ran first stays."""
    session = sealed_world.session()
    first = request_to(session.public_key, {"word": "x"})
    same_id = request_to(session.public_key, {"word": "y"}, request_id=first.request_id)
    other = request_to(session.public_key, {"word": "z"})
    async with start(worker_of(story), sealed=session) as client:
        answer = await read(post(client.http, "t1", first.delivery))
        for task_id, request in (("t2", same_id), ("t1", same_id), ("t1", other)):
            status, body = await read(post(client.http, task_id, request.delivery))
            assert (status, json.loads(body)["code"]) == (409, "replay")
        assert await read(post(client.http, "t1", first.delivery)) == answer


async def test_a_task_id_that_names_another_run_is_refused(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a request that is known: each id goes on naming its own run, and is forgotten with it."""
    monkeypatch.setattr(tasks, "FINISHED_MAX", 1)
    session = sealed_world.session()
    first, second = (request_to(session.public_key, {"word": "x"}) for _ in range(2))
    go_on = asyncio.Event()

    async def run(task: Task, emit: Emitter) -> None:
        await go_on.wait()

    async with start(worker_of(run), sealed=session) as client:
        answers = [
            await post(client.http, name, request.delivery)
            for name, request in (("t1", first), ("t2", second))
        ]
        status, body = await read(post(client.http, "t2", first.delivery))
        assert (status, json.loads(body)["code"]) == (409, "replay")
        go_on.set()
        for answer in answers:
            assert answer.status == 200
            await answer.read()
        assert (await read(post(client.http, "t2", second.delivery)))[0] == 200
        assert (await read(post(client.http, "t3", request_to(session.public_key).delivery)))[0] == 200
        for name in ("t1", "t2"):
            async with client.events(name) as answer:
                assert answer.status == 404


async def test_one_run_has_no_more_than_so_many_names(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes under ever new task ids take no memory: the first id and the newest ones are kept."""
    monkeypatch.setattr(tasks, "NAMES_MAX", 3)
    session = sealed_world.session()
    request = request_to(session.public_key, {"word": "x"})
    async with start(worker_of(story), sealed=session) as client:
        for number in range(9):
            assert (await read(post(client.http, f"t{number}", request.delivery)))[0] == 200
        known = []
        for number in range(9):
            async with client.events(f"t{number}") as answer:
                known += [number] if answer.status == 200 else []
    assert known == [0, 7, 8]


async def test_an_answer_that_is_no_longer_kept_is_gone(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """410: it ran, and does not run again."""
    monkeypatch.setattr(tasks, "FINISHED_MAX", 1)
    runs: list[str] = []

    async def run(task: Task, emit: Emitter) -> None:
        runs.append(task.id)

    session = sealed_world.session()
    requests = [request_to(session.public_key) for _ in range(2)]
    async with start(worker_of(run), sealed=session) as client:
        for name, request in zip("ab", requests, strict=True):
            assert (await read(post(client.http, name, request.delivery)))[0] == 200
        await read(post(client.http, "c", requests[1].delivery))  # a second name, forgotten with its run
        for name in ("a", "d"):
            status, body = await read(post(client.http, name, requests[0].delivery))
            assert (status, json.loads(body)["code"]) == (410, "gone")
        assert (await read(post(client.http, "e", request_to(session.public_key).delivery)))[0] == 200
        for name in ("b", "c"):
            async with client.events(name) as answer:
                assert answer.status == 404
    assert runs == ["a", "b", "e"]


async def test_a_full_record_drains(start: Callable[..., Any]) -> None:
    """No new request then, and those that ran are still answered."""
    session = sealed_world.session()
    session.record = ReplayRecord(most=1)
    request = request_to(session.public_key, {"word": "x"})
    async with start(worker_of(story), sealed=session) as client:
        assert (await read(post(client.http, "t", request.delivery)))[0] == 200
        assert (await read(post(client.http, "u", request_to(session.public_key).delivery)))[0] == 503
        assert (await read(post(client.http, "t", request.delivery)))[0] == 200


async def test_a_lost_connection_is_taken_up_again(start: Callable[..., Any]) -> None:
    """`after=N` gives the very chunks that follow, and together they open."""
    go_on = asyncio.Event()

    async def run(task: Task, emit: Emitter) -> None:
        await emit.text("before")
        await emit.flush()
        await go_on.wait()
        await emit.text("after")

    session = sealed_world.session()
    request = request_to(session.public_key)
    async with start(worker_of(run), sealed=session) as client:
        async with post(client.http, "t", request.delivery) as answer:
            seen = await read_until(answer, b"id: 2\n")
            answer.close()
        go_on.set()
        async with client.events("t", after=2) as answer:
            seen += await answer.read()
    assert [data.get("text") for _, _, data in request.events(seen)] == ["before", "after", None]


# -- ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_cancelled_task_ends_sealed(start: Callable[..., Any], blocking: bool) -> None:
    """DELETE asks it to stop as ever; inside and outside it ends as cancelled, with a final chunk."""
    deleted = threading.Event()

    async def forever(task: Task, emit: Emitter) -> None:
        await emit.text("started")
        await asyncio.Event().wait()

    def until_deleted(task: Task, emit: BlockingEmitter) -> None:
        emit.text("started")
        deleted.wait()
        emit.text("more")

    session = sealed_world.session()
    request = request_to(session.public_key)
    async with (
        start(worker_of(until_deleted if blocking else forever), sealed=session) as client,
        post(client.http, "t", request.delivery) as answer,
    ):
        seen = await read_until(answer, b"id: 2\n")
        assert await client.delete("t") == 202
        deleted.set()
        seen += await answer.read()
    assert request.events(seen)[-1] == (2, "end", {"status": "cancelled"})
    assert parse(seen)[-1][2] == {"status": "cancelled"}


@pytest.mark.parametrize("blocking", [False, True])
async def test_what_a_task_raises_and_prints_stays_inside(
    start: Callable[..., Any], blocking: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Codes, messages, printed lines and tracebacks are for the tenant; this process writes none of them."""
    canary = random_text()

    def raise_it(task: Task) -> None:
        print("stdout", canary)
        print("stderr", canary, file=sys.stderr)
        if task.metadata["own"]:
            raise TaskError("own_code", canary)
        raise KeyError(canary)

    async def run(task: Task, emit: Emitter) -> None:
        raise_it(task)

    def run_blocking(task: Task, emit: BlockingEmitter) -> None:
        raise_it(task)

    session = sealed_world.session()
    async with start(worker_of(run_blocking if blocking else run), sealed=session) as client:
        request = request_to(session.public_key, {"own": True})
        _, outer = await read(post(client.http, "own", request.delivery))
        assert request.events(outer)[-1][2]["error"] == {"code": "own_code", "message": canary}
        assert parse(outer)[-1][2] == {
            "status": "failed",
            "error": {
                "code": "task_failed",
                "message": WITHHELD[1],
            },
        }
        request = request_to(session.public_key, {"own": False})
        _, outer = await read(post(client.http, "other", request.delivery))
        *logs, end = request.events(outer)
        assert end[2]["error"] == {"code": "task_failed", "message": f"KeyError: '{canary}'"}
        lines = [data["line"] for _, event, data in logs if event == "logs"]
        assert lines[:2] == [f"stdout {canary}", f"stderr {canary}"]
        assert lines[-1] == f"KeyError: '{canary}'"
        assert any(line.startswith("Traceback") for line in lines)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


async def test_a_worker_that_fails_tells_why_inside_alone(start: Callable[..., Any]) -> None:
    """Its reason may quote a task, so health says only that it failed."""
    worker = Worker()

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        await emit.text("started")
        await asyncio.Event().wait()

    session = sealed_world.session()
    request = request_to(session.public_key)
    async with asyncio.TaskGroup() as group, start(worker, sealed=session) as client:
        answer = await post(client.http, "t", request.delivery)
        seen = await read_until(answer, b"id: 2\n")
        rest = group.create_task(answer.read())
        worker.fail("canary reason")
        seen += await rest
    assert request.events(seen)[-1][2]["error"] == {"code": "worker_failed", "message": "canary reason"}
    assert b"canary" not in seen
    assert worker.health.message == "the worker failed"


async def test_an_unread_sealed_task_waits(start: Callable[..., Any]) -> None:
    """Without a reader it stops at its bound and loses nothing: who re-attaches gets all events, in order."""
    histories: list[Any] = []

    async def run(task: Task, emit: Emitter) -> None:
        histories.append(emit._history)
        for number in range(100_000):
            await emit.text_delta(f"{number} ")

    session = sealed_world.session()
    request = request_to(session.public_key)
    async with start(worker_of(run), sealed=session, history_bytes=4 << 20) as client:
        answer = await post(client.http, "t", request.delivery)
        seen = await read_until(answer, b"\n\n")
        seen = seen[: seen.rindex(b"\n\n") + 2]
        answer.close()
        while not histories[0]._waiting:
            await client.health()
        assert histories[0].size <= 4 << 20
        last = parse(seen)[-1][0]
        async with client.events("t", last) as answer:
            assert answer.status == 200
            seen += await answer.read()
    events = request.events(seen)
    assert [number for number, _, _ in events] == list(range(1, 100_002))
    assert "".join(data.get("delta", "") for _, _, data in events) == "".join(
        f"{number} " for number in range(100_000)
    )


@pytest.mark.parametrize("blocking", [False, True])
async def test_raw_bytes_are_sealed_too(start: Callable[..., Any], blocking: bool) -> None:
    """There is no way out in clear: what is no event reaches the client alone, who will refuse it."""

    async def run(task: Task, emit: Emitter) -> None:
        await emit.text("words")
        await emit.raw(b"no frame\n\n")

    def run_blocking(task: Task, emit: BlockingEmitter) -> None:
        emit.text("words")
        emit.raw(b"no frame\n\n")

    session = sealed_world.session()
    request = request_to(session.public_key)
    async with start(worker_of(run_blocking if blocking else run), sealed=session) as client:
        _, outer = await read(post(client.http, "t", request.delivery))
    assert b"no frame" not in outer
    assert b"no frame\n\n" in request.clear_stream(outer)


async def test_a_worker_that_stops_ends_its_tasks_sealed(start: Callable[..., Any]) -> None:
    """Also for SIGTERM the final chunk is there, and says cancelled."""

    async def run(task: Task, emit: Emitter) -> None:
        await emit.text("started")
        await asyncio.Event().wait()

    session = sealed_world.session()
    request = request_to(session.public_key)
    async with asyncio.TaskGroup() as group, start(worker_of(run), sealed=session) as client:
        answer = await post(client.http, "t", request.delivery)
        seen = await read_until(answer, b"id: 2\n")
        rest = group.create_task(answer.read())
    assert request.events(seen + rest.result())[-1] == (2, "end", {"status": "cancelled"})


# -- the process ------------------------------------------------------------------------------------------

PROGRAM = """
import logging, os, subprocess, sys, threading
from gpu_worker import Worker

worker = Worker()
asked = threading.Event()
said = threading.Event()
words = []


def engine():
    asked.wait()
    print("engine", words[0])
    print("engine", words[0], file=sys.stderr)
    logging.error("engine %s", words[0])
    said.set()


@worker.load
async def load(progress):
    print("loading on stdout")
    print("loading on stderr", file=sys.stderr)
    threading.Thread(target=engine, daemon=True).start()


@worker.task
def run(task, emit):
    word = task.metadata["word"]
    words.append(word)
    asked.set()
    said.wait()
    print("task", word)
    logging.error("task %s", word)
    for number in (1, 2):
        os.write(number, word.encode())
    subprocess.run([sys.executable, "-c", "import sys; print(sys.argv[1])", word])
    emit.text(word)
    if task.metadata.get("fatal"):
        worker.fail(word)
    raise RuntimeError(word)


worker.run()
"""


@contextlib.asynccontextmanager
async def process(folder: Path, program: str, **env: str) -> AsyncIterator[Any]:
    """A worker of its own process, and a client of its socket."""
    (folder / "worker.py").write_text(program)
    path = folder / "worker.sock"
    environment = {**os.environ, "GPU_WORKER_SOCKET": str(path), **env}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(gpu_worker.__file__).parents[1]), str(ROOT)])
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        str(folder / "worker.py"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        while not path.exists():
            assert running.returncode is None, (await running.communicate())[1].decode()
            await asyncio.sleep(0)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(path))) as http:
            yield running, http
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
        await running.communicate()


async def health_of(http: aiohttp.ClientSession) -> dict[str, Any]:
    while True:
        async with http.get("http://worker/health") as answer:
            health: dict[str, Any] = await answer.json()
        if health["status"] != "loading":
            return health


SEALED = {
    "SEALED_KMS_KEY_ARN": ARN,
    "SEALED_TENANT": "acme",
    "SEALED_POOL": "default",
    "GPU_SESSION_ID": "s_1",
}


async def test_a_sealed_process_writes_nothing_of_its_tasks(tmp_path: Path) -> None:
    """Not by print, logging, a thread of no task, a bare descriptor, a child, a traceback, nor as the reason
    of its own end. What it writes while it loads is there to be read."""
    canary = random_text()
    async with process(tmp_path, PROGRAM, **SEALED) as (running, http):
        key = (await health_of(http))["sealed_key"]
        for name in ("first", "last"):
            request = request_to(key, {"word": canary, "fatal": name == "last"})
            status, outer = await read(post(http, name, request.delivery))
            assert status == 200
            clear = request.clear_stream(outer).decode()
            assert f"RuntimeError: {canary}" in clear
            assert f"task {canary}" in clear
        out, err = await running.communicate()
    assert out.decode() == "loading on stdout\n"
    assert err.decode() == "loading on stderr\n"
    assert running.returncode == 1


async def test_a_plain_process_writes_as_ever(tmp_path: Path) -> None:
    """The same program without a sealed session: this is what the search above would find."""
    async with process(tmp_path, PROGRAM) as (running, http):
        await health_of(http)
        body = json.dumps({"metadata": {"word": "canary", "fatal": True}})
        await read(http.post("http://worker/tasks/t", data=body))
        out, err = await running.communicate()
    assert b"engine canary" in out
    assert b"task canary" in out
    assert err.splitlines()[-1] == b"the worker failed: canary"


@pytest.mark.parametrize("error", ["ImportError", "AttributeError"])
async def test_an_image_without_the_package_says_so(tmp_path: Path, error: str) -> None:
    """The load fails with what is missing or of another version, and the worker never becomes ready; plain it
    works."""
    (tmp_path / "gpu_server").mkdir()
    (tmp_path / "gpu_server/__init__.py").write_text(f"raise {error}('No module named cbor2')")
    program = "from gpu_worker import Worker\nworker = Worker()\nworker.task(print)\nworker.run()\n"
    async with process(tmp_path, program, **SEALED) as (_, http):
        health = await health_of(http)
    assert health["status"] == "failed"
    assert health["message"] == "this image cannot serve sealed sessions: No module named cbor2"
    assert "sealed_key" not in health
    (tmp_path / "worker.sock").unlink()
    async with process(tmp_path, program) as (_, http):
        assert (await health_of(http))["status"] == "ready"


@pytest.mark.parametrize("says", ["raise OSError", "worker.fail"])
async def test_a_load_that_fails_says_why(tmp_path: Path, says: str) -> None:
    """In health, all that the service reads of a sealed worker: no task has been there to be quoted. A worker
    that ends says it for a moment, which lasts here until it was heard."""
    program = (
        "import os, threading\n"
        "import gpu_worker.worker\n"
        "from gpu_worker import Worker\n"
        "gpu_worker.worker._STOP_SECONDS = 60\n"
        "def wait(seconds, way, argument):\n"
        "    def heard():\n"
        "        open(os.environ['HEARD']).close()\n"
        "        way(argument)\n"
        "    threading.Thread(target=heard, daemon=True).start()\n"
        "gpu_worker.worker._exit_in = wait\n"
        "worker = Worker()\n"
        "worker.task(print)\n"
        "@worker.load\n"
        f"def load(progress):\n    {says}('no weights')\n    threading.Event().wait()\n"
        "worker.run()\n"
    )
    heard = tmp_path / "heard"
    os.mkfifo(heard)
    async with process(tmp_path, program, HEARD=str(heard), **SEALED) as (running, http):
        health = await health_of(http)
        if says == "worker.fail":
            with heard.open("r+b", buffering=0):  # whoever waits to read it goes on
                _, err = await running.communicate()
            assert err.decode() == "the worker failed: no weights\n"
    assert health["status"] == "failed"
    assert health["message"] in ("no weights", "OSError: no weights")


async def test_a_sealed_process_needs_its_names(tmp_path: Path) -> None:
    """The variable that is missing is named in health."""
    program = "from gpu_worker import Worker\nworker = Worker()\nworker.task(print)\nworker.run()\n"
    async with process(tmp_path, program, **{**SEALED, "SEALED_TENANT": ""}) as (_, http):
        assert "SEALED_TENANT is not set" in (await health_of(http))["message"]


def test_a_plain_worker_loads_none_of_it() -> None:
    """The sealed path's package and libraries cost nothing where they are not needed."""
    code = "import gpu_worker, sys; print({name.split('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(Path(gpu_worker.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "'gpu_worker'" in found.stdout
    assert not [name for name in ("cbor2", "cryptography", "gpu_server") if f"'{name}'" in found.stdout]


def test_media_types_are_one() -> None:
    """The SDK names it without the package that defines it."""
    assert HEADERS["Content-Type"] == SEALED_TASK
