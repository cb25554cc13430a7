"""kill -9 in the middle of things, and a new start: what ran goes on, what waited still waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.harness import (
    ECHO_IMAGE,
    Caller,
    Following,
    Service,
    body,
    only_docker,
    until,
)

SETTINGS = {"CPU_SLOTS": 4, "DISCONNECT_GRACE_SECONDS": 60}
LONG = {"count": 250, "delay_ms": 20}
PROGRAM = """
import sys, time
for n in range(200):
    print(n, flush=True)
    if n % 20 == 0:
        print("note", n, file=sys.stderr, flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
def service(serve: Callable[..., Service]) -> Service:
    """The service that most tests here share, and kill."""
    return serve(**SETTINGS)


def counted(count: int) -> str:
    """What the echo worker says when it is asked for that many deltas."""
    return "".join(f"tok{n} " for n in range(count))


def container_of(service: Service, session_id: str) -> dict[str, Any]:
    """A session's container, as the engine lists it."""
    (found,) = [c for c in service.containers() if session_id in c["Names"][0]]
    return found


def kill_worker(service: Service, session_id: str) -> None:
    """Kill a session's worker behind the service's back."""
    if service.engine is not None:
        service.engine.kill(container_of(service, session_id)["Id"])
        return
    pids = service.worker_pids(session_id)
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # gone with the one before
            os.kill(pid, signal.SIGKILL)


def lives(service: Service, session_id: str) -> bool:
    """Whether a session's worker runs."""
    if service.engine is not None:
        return bool(container_of(service, session_id)["State"] == "running")
    return bool(service.worker_pids(session_id))


async def free_again(service: Service, slots: list[str]) -> None:
    """Wait until these slots are free, which they are after a wash only."""

    def are_free() -> bool:
        health = service.health()
        return health is not None and all(s["state"] == "free" for s in health["gpus"] if s["id"] in slots)

    await until(f"{slots} are free", are_free)


# -- what goes on -------------------------------------------------------------------------------------------


async def test_a_running_stream_goes_on(service: Service, caller: Caller) -> None:
    """Its client has every event once, in the same container, which then serves the next task at once."""
    task = await caller.working(**LONG)
    await task.until("text_delta")
    before = await caller.session(task.session_id)
    await service.restart()
    assert (await task.finish())["status"] == "completed"
    assert task.text == counted(250)
    after = await caller.session(task.session_id)
    for name in ("container_id", "gpu_ids", "created_at"):
        assert after[name] == before[name], name
    assert after["tasks_done"] == before["tasks_done"] + 1

    following = await caller.run(session=task.session_id, prompt="next")
    assert [data["status"] for data in following.of("connection")] == ["session_ready"]
    assert [data["status"] for data in following.of("worker")] == ["working", "waiting"]
    assert following.of("progress") == []
    assert following.text == "next"


async def test_a_stream_goes_on_through_many_restarts(service: Service, caller: Caller) -> None:
    """Also through one that is killed before it has taken anything up."""
    task = await caller.working(count=500, delay_ms=20)
    for _ in range(3):
        await task.until("text_delta")
        service.crash()
        seen = service.log_text().count("service.recovered")
        service.launch()
        await until("it has its files open", lambda n=seen: service.log_text().count("service.recovered") > n)
        await service.restart()
    assert (await task.finish())["status"] == "completed"
    assert task.text == counted(500)


async def test_several_readers_of_several_tasks(service: Service, caller: Caller) -> None:
    """Tasks that a worker runs at once are followed each by itself, by every reader from where it was."""
    session = await caller.warm("batch")
    tasks = [await caller.working("batch", session=session, **LONG) for _ in range(3)]
    await tasks[0].until("text_delta")
    others = [Following(caller.client.follow(task.task_id, 1), after=1) for task in tasks]
    for other in others:
        await other.until("text_delta")
    await service.restart()
    for reader in (*tasks, *others):
        assert (await reader.finish())["status"] == "completed"
        assert reader.text == counted(250)


async def test_queued_tasks_keep_their_order(service: Service, caller: Caller) -> None:
    """What waits behind a running task waits on, hears its place, and runs in the order in which it came."""
    running = await caller.working(count=250, hang=True)
    queued = [await caller.started(session=running.session_id, prompt=text) for text in ("b", "c", "d")]
    await queued[2].until("queue", position=3)
    await service.restart()
    assert [(await caller.task(task.task_id))["position"] for task in queued] == [1, 2, 3]
    await queued[2].until("queue", position=3)  # its reader is there again
    await caller.cancel(running.task_id)
    ends = await asyncio.gather(*(task.finish() for task in (running, *queued)))
    assert [end["status"] for end in ends] == ["cancelled", *["completed"] * 3]
    assert [task.text for task in (running, *queued)] == [counted(250), "b", "c", "d"]
    ended = [(await caller.task(task.task_id))["finished_at"] for task in (running, *queued)]
    assert ended == sorted(ended)
    assert queued[2].of("queue")[-1]["position"] == 1


async def test_the_wait_line_keeps_its_order(service: Service, caller: Caller) -> None:
    """Sessions that wait for a slot wait on, and get one in the order in which they came."""
    holders = [await caller.working(hang=True) for _ in range(4)]
    second, third = await caller.started(prompt="second"), await caller.started(prompt="third")
    ahead = (await caller.open())["session_id"]
    await service.restart()
    health = service.health()
    assert health is not None
    assert (health["waiting_sessions"], health["active_sessions"]) == (3, 4)
    assert [(await caller.task(task.task_id))["position"] for task in (second, third)] == [1, 2]
    await caller.kill(holders[0].session_id)
    assert (await second.finish())["status"] == "completed"
    assert (await caller.session(third.session_id))["state"] == "waiting"
    await caller.kill(second.session_id)
    assert (await third.finish())["status"] == "completed"
    await caller.kill(third.session_id)
    await caller.in_state(ahead, "ready")
    assert [data["status"] for data in second.of("connection")] == ["queued", "allocated", "session_ready"]


async def test_a_session_in_the_middle_of_its_start(service: Service, caller: Caller) -> None:
    """The worker that was loading is waited for further: it is not started twice."""
    task = await caller.started("short_start", prompt="at last")
    await task.until("worker", status="loading")
    ahead = (await caller.open("short_start"))["session_id"]
    created = (await caller.session(task.session_id))["container_id"]
    assert created is not None
    await service.restart()
    assert (await task.finish())["status"] == "completed"
    assert task.text == "at last"
    statuses = [data["status"] for data in task.of("worker")]
    assert list(dict.fromkeys(statuses)) == ["created", "loading", "working", "waiting"]
    assert {data["container_id"] for data in task.of("worker")} == {created}
    assert (await caller.session(task.session_id))["container_id"] == created
    await caller.in_state(ahead, "ready")


async def test_a_oneoff_goes_on(service: Service, caller: Caller) -> None:
    """A one-off task of a long-lived worker ends as it would have, and its session with it."""
    task = await caller.working(oneoff=True, **LONG)
    await task.until("text_delta")
    await service.restart()
    assert (await task.finish())["status"] == "completed"
    assert task.text == counted(250)
    assert (await caller.ended(task.session_id))["close_reason"] == "oneoff_done"


async def test_a_program_goes_on(service: Service, caller: Caller) -> None:
    """In a container it is followed to its end and every line comes once; a plain process says why not."""
    task = await caller.working("program", oneoff=True, code=PROGRAM)
    await task.until("logs")
    await service.restart()
    end = await task.finish()
    session = await caller.ended(task.session_id)
    if service.runtime == "process":
        assert (end["status"], end["error"]["code"]) == ("failed", "service_restarted")
        assert session["state"] == "failed"
        return
    assert end["status"] == "completed"
    lines = {
        name: [e["line"] for e in task.of("logs") if e["stream"] == name] for name in ("stdout", "stderr")
    }
    assert lines["stdout"] == [str(n) for n in range(200)]
    assert lines["stderr"] == [f"note {n}" for n in range(0, 200, 20)]
    assert session["close_reason"] == "oneoff_done"


@only_docker
async def test_a_program_that_ended_while_the_service_was_away(service: Service, caller: Caller) -> None:
    """All that it wrote is there, and its exit code decides."""
    good = await caller.working("program", oneoff=True, code=PROGRAM)
    bad = await caller.working("program", oneoff=True, code=PROGRAM + "sys.exit(4)")
    service.crash()
    for task in (good, bad):
        await until("the program has ended", lambda t=task: not lives(service, t.session_id))
    service.launch()
    await service.serving()
    assert (await good.finish())["status"] == "completed"
    end = await bad.finish()
    assert (end["status"], end["error"]["code"]) == ("failed", "worker_exited")
    assert "code 4" in end["error"]["message"]
    for task in (good, bad):
        said = [e["line"] for e in task.of("logs") if e["stream"] == "stdout"]
        assert said == [str(n) for n in range(200)]


async def test_tasks_that_nobody_reads(serve: Callable[..., Service]) -> None:
    """A detached task, running or queued, goes on without a reader; any other is cancelled after the grace,
    which begins anew."""
    service = serve(DISCONNECT_GRACE_SECONDS=1)
    async with service.caller() as caller:
        session = await caller.warm()
        attended = await caller.working(hang=True)
        running = await caller.client.submit_async(body(session=session, count=200, delay_ms=20))
        queued = await caller.client.submit_async(body(session=session, prompt="behind"))
        await caller.task_in_state(running["task_id"], "running")
        service.crash()
        await attended.leave()
        service.launch()
        await service.serving()
        gone = await caller.task_in_state(attended.task_id, "cancelled")
        assert gone["error"]["code"] == "client_gone"
        for task, text in ((running, counted(200)), (queued, "behind")):
            await caller.task_in_state(task["task_id"], "completed")
            async with caller.events(task["task_id"]) as events:
                assert (await events.finish())["status"] == "completed"
            assert events.text == text


# -- what ended ---------------------------------------------------------------------------------------------


async def test_workers_that_died_while_the_service_was_away(service: Service, caller: Caller) -> None:
    """Their tasks fail with the reason, their sessions have failed, and their slots are washed and free."""
    running = await caller.working(hang=True)
    queued = await caller.started(session=running.session_id, prompt="never")
    idle = await caller.warm()
    loading = await caller.started("slow_start", prompt="never")
    await loading.until("worker", status="loading")
    spared = await caller.warm()
    dead = [running.session_id, idle, loading.session_id]
    slots = [slot for session_id in dead for slot in (await caller.session(session_id))["gpu_ids"]]
    service.crash()
    for session_id in dead:
        kill_worker(service, session_id)
    for session_id in dead:
        await until(f"{session_id} is dead", lambda s=session_id: not lives(service, s))
    service.launch()
    await service.serving()
    for task in (running, queued, loading):
        end = await task.finish()
        assert (end["status"], end["error"]["code"]) == ("failed", "worker_exited"), end
    for session_id in dead:
        ended = await caller.ended(session_id)
        reason = "start_failed" if session_id == loading.session_id else "worker_exited"
        assert (ended["state"], ended["close_reason"]) == ("failed", reason)
    await free_again(service, slots)
    assert (await caller.run(session=spared, prompt="spared")).text == "spared"


@only_docker
async def test_containers_that_were_removed_while_the_service_was_away(
    service: Service, caller: Caller
) -> None:
    """Nobody can tell what became of the worker, and this is what its tasks are told."""
    running = await caller.working(hang=True)
    idle = await caller.warm()
    slots = [slot for s in (running.session_id, idle) for slot in (await caller.session(s))["gpu_ids"]]
    service.crash()
    assert service.engine is not None
    for session_id in (running.session_id, idle):
        service.engine.remove_container(container_of(service, session_id)["Id"], force=True)
    service.launch()
    await service.serving()
    end = await running.finish()
    assert (end["status"], end["error"]["code"]) == ("failed", "service_restarted")
    for session_id in (running.session_id, idle):
        ended = await caller.ended(session_id)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "service_restarted")
    await free_again(service, slots)


async def test_what_was_cancelled_stays_cancelled(service: Service, caller: Caller) -> None:
    """Whether the worker had heard of it or not; its session is usable."""
    session = await caller.warm()
    running = await caller.working(session=session, hang=True)
    queued = await caller.started(session=session, prompt="never")
    for task in (queued, running):
        await caller.cancel(task.task_id)
    await service.restart()
    for task in (queued, running):
        assert (await task.finish())["error"]["code"] == "task_cancelled"
        assert (await caller.task(task.task_id))["state"] == "cancelled"
    assert (await caller.run(session=session, prompt="next")).text == "next"
    assert queued.text == ""


async def test_a_cancel_that_is_ignored_is_still_ignored(serve: Callable[..., Service]) -> None:
    """The grace of a worker that ignores a cancel has its end in the next life too."""
    service = serve(DISCONNECT_GRACE_SECONDS=60, CANCEL_GRACE_SECONDS=1)
    async with service.caller() as caller:
        stubborn = await caller.working(hang=True, ignore_cancel=True)
        await caller.cancel(stubborn.task_id)
        await service.restart()
        assert (await stubborn.finish())["error"]["code"] == "task_cancelled"
        ended = await caller.ended(stubborn.session_id)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "cancel_ignored")


async def test_what_was_killed_stays_killed(service: Service, caller: Caller) -> None:
    """A session whose end had begun is torn down further, and its slot is free afterwards."""
    task = await caller.working(hang=True)
    slots = (await caller.session(task.session_id))["gpu_ids"]
    assert (await caller.kill(task.session_id))["state"] == "draining"
    await service.restart()
    ended = await caller.ended(task.session_id)
    assert (ended["state"], ended["close_reason"]) == ("closed", "killed")
    assert (await task.finish())["error"]["code"] == "session_killed"
    await free_again(service, slots)


# -- time ---------------------------------------------------------------------------------------------------


async def test_deadlines_pass_while_the_service_is_away(serve: Callable[..., Service]) -> None:
    """A session whose idle time is over is closed at the start, a task whose time is over is ended; but one
    that ended in time is told as it was."""
    service = serve(CPU_SLOTS=4, DISCONNECT_GRACE_SECONDS=60, SESSION_IDLE_TIMEOUT_SECONDS=6)
    async with service.caller() as caller:
        late = await caller.working(hang=True, seconds=6)
        in_time = await caller.working(count=50, delay_ms=20, seconds=6)
        idle = await caller.warm()
        service.crash()
        crashed = time.monotonic()
        await until("all deadlines have passed", lambda: time.monotonic() > crashed + 6.5)
        service.launch()
        await service.serving()
        ended = await caller.in_state(idle, "closed")
        assert ended["close_reason"] == "idle_timeout"
        end = await late.finish()
        assert (end["status"], end["error"]["code"]) == ("timeout", "task_timeout")
        assert (await in_time.finish())["status"] == "completed"
        assert in_time.text == counted(50)


# -- what belongs to nobody ---------------------------------------------------------------------------------


@only_docker
async def test_containers_that_no_session_owns(service: Service, caller: Caller) -> None:
    """One of this instance is removed at the start, one of another instance is left alone."""
    session = await caller.warm()
    service.crash()
    engine = service.engine
    assert engine is not None

    def make(instance: str) -> str:
        labels = {"gpu-server.instance": instance, "gpu-server.session": "s_NOBODY", "gpu-server.fence": "1"}
        return str(
            engine.create_container(
                ECHO_IMAGE,
                ["python3", "-c", "import time; time.sleep(600)"],
                labels=labels,
                host_config=engine.create_host_config(network_mode="none"),
                name=f"gpu-server-s_NOBODY-{instance}",
            )["Id"]
        )

    ours, foreign = make(service.instance), make(secrets.token_hex(8))
    try:
        for container in (ours, foreign):
            engine.start(container)
        service.launch()
        await service.serving()
        await until("ours is gone", lambda: ours not in [c["Id"] for c in service.containers()])
        assert engine.inspect_container(foreign)["State"]["Running"]
        assert (await caller.run(session=session, prompt="still mine")).text == "still mine"
    finally:
        engine.remove_container(foreign, force=True)


async def test_run_folders_that_no_session_owns(service: Service, caller: Caller) -> None:
    """One of this instance is removed at the start, another instance's is left alone."""
    session = await caller.warm()
    (mine,) = [path for path in service.run_dir.glob("*/*") if path.name == session]
    service.crash()
    ours, foreign = mine.with_name("s_NOBODY"), service.run_dir / "01234567" / "s_NOBODY"
    for folder in (ours, foreign):
        (folder / "share").mkdir(parents=True)
        (folder / "share" / "left").write_text("by somebody")
    service.launch()
    await service.serving()
    await until("ours is gone", lambda: not ours.exists())
    assert (foreign / "share" / "left").exists()
    assert (await caller.run(session=session, prompt="still mine")).text == "still mine"
    (foreign / "share" / "left").unlink()
    (foreign / "share").rmdir()
    foreign.rmdir()
    foreign.parent.rmdir()
