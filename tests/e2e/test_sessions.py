"""Sessions: how long they live, how they end, and what is told of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime

import pytest

from gpu_server.client import Refused
from tests.e2e.harness import Caller, Service, only_process, until


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


async def test_a_session_that_idles_is_closed(serve: Callable[..., Service]) -> None:
    """The idle clock runs only while nothing is queued or running; then the session closes, cleanly, and is
    not to be kept alive any more."""
    async with serve(SESSION_IDLE_TIMEOUT_SECONDS=1).caller() as caller:
        task = await caller.working(hang=True)
        began = time.monotonic()
        await until("it has worked for longer than the timeout", lambda: time.monotonic() > began + 1.5)
        working = await caller.session(task.session_id)
        assert (working["state"], working["expiry"]["idle_deadline"]) == ("working", None)
        await caller.cancel(task.task_id)
        assert (await task.finish())["status"] == "cancelled"
        ended = await caller.ended(task.session_id)
        assert (ended["state"], ended["close_reason"], ended["error"]) == ("closed", "idle_timeout", None)
        idled = seconds(ended["closed_at"]) - seconds((await caller.task(task.task_id))["finished_at"])
        assert 0.99 < idled < 60  # the default is 300
        with pytest.raises(Refused) as refused:
            await caller.keep_alive(task.session_id)
        assert (refused.value.status, refused.value.code) == (409, "session_closed")


async def test_keepalive_renews_the_idle_deadline(caller: Caller) -> None:
    """Each time it is a whole timeout away again."""
    session_id = await caller.warm()
    first = (await caller.session(session_id))["expiry"]
    began = time.monotonic()
    await until("some time has passed", lambda: time.monotonic() > began + 1)
    for _ in range(2):
        asked = time.time()
        expiry = (await caller.keep_alive(session_id))["expiry"]
        assert seconds(expiry["idle_deadline"]) > seconds(first["idle_deadline"]) + 0.9
        assert asked + 299.9 < seconds(expiry["idle_deadline"]) < time.time() + 300.1
        assert expiry["max_deadline"] == first["max_deadline"]


async def test_keepalive_never_passes_the_lifetime(serve: Callable[..., Service]) -> None:
    """The idle deadline stops at the lifetime."""
    async with serve(SESSION_MAX_LIFETIME_SECONDS=200).caller() as caller:
        session_id = await caller.warm()
        expiry = (await caller.keep_alive(session_id))["expiry"]
        assert expiry["idle_deadline"] == expiry["max_deadline"] == expiry["effective"]
        assert expiry["reason"] == "max_lifetime"


async def test_a_session_that_is_kept_alive_ends_at_its_lifetime(serve: Callable[..., Service]) -> None:
    """However often it is renewed."""
    async with serve(SESSION_MAX_LIFETIME_SECONDS=2.5, LIFETIME_GRACE_SECONDS=20).caller() as caller:
        session_id = (await caller.open())["session_id"]

        path = f"/api/sessions/{session_id}/keepalive"

        async def renewed_in_vain() -> bool:
            status, answer, _ = await caller.ask("POST", path)
            assert status == 200 or (status, answer["code"]) == (409, "session_closed"), answer
            return status == 409

        await until("it is over", renewed_in_vain)
        assert (await caller.ended(session_id))["close_reason"] == "max_lifetime"


@only_process
async def test_at_the_lifetime_a_running_task_has_a_grace(serve: Callable[..., Service]) -> None:
    """What runs may end within LIFETIME_GRACE_SECONDS, what is queued fails, nothing new is taken."""
    settings = {"SESSION_MAX_LIFETIME_SECONDS": 5, "LIFETIME_GRACE_SECONDS": 100}
    async with serve(**settings).caller() as caller:
        session_id = await caller.warm("batch")
        held = [await caller.working("batch", session=session_id, hang=True) for _ in range(2)]
        running = await caller.working("batch", session=session_id, count=150, delay_ms=40)
        queued = await caller.started("batch", session=session_id, prompt="too late")
        end = await queued.finish()
        assert (end["status"], end["error"]["code"]) == ("failed", "session_lifetime")
        assert (await caller.session(session_id))["state"] == "draining"
        with pytest.raises(Refused) as refused:
            await caller.run("batch", session=session_id, prompt="no")
        assert (refused.value.status, refused.value.code) == (409, "session_closed")
        assert (await running.finish())["status"] == "completed"
        for task in held:
            await caller.cancel(task.task_id)
        ended = await caller.ended(session_id)
        assert (ended["state"], ended["close_reason"], ended["tasks_done"]) == ("closed", "max_lifetime", 4)


async def test_the_grace_at_the_lifetime_has_an_end(serve: Callable[..., Service]) -> None:
    """A task that goes on for longer than the grace is failed, and the session closes."""
    settings = {"SESSION_MAX_LIFETIME_SECONDS": 2, "LIFETIME_GRACE_SECONDS": 1}
    async with serve(**settings).caller() as caller:
        running = await caller.run(prompt="x", hang=True)
        end = running.events[-1].data
        assert (end["status"], end["error"]["code"]) == ("failed", "session_lifetime")
        assert (await caller.ended(running.session_id))["close_reason"] == "max_lifetime"


async def test_one_expiry_object(caller: Caller) -> None:
    """`expiry` says what will end the session next; of one that has ended, nothing."""
    session_id = await caller.warm()
    ready = (await caller.session(session_id))["expiry"]
    assert ready["effective"] == ready["idle_deadline"] < ready["max_deadline"]
    assert ready["reason"] == "idle_timeout"
    task = await caller.working(session=session_id, hang=True)
    working = (await caller.session(session_id))["expiry"]
    assert working == {
        "idle_deadline": None,
        "max_deadline": working["max_deadline"],
        "effective": working["max_deadline"],
        "reason": "max_lifetime",
    }
    await caller.kill(session_id)
    await task.finish()
    ended = await caller.ended(session_id)
    assert set(ended["expiry"].values()) == {None}
    assert set(ended) == set(await caller.session(session_id))


async def test_killing_a_session(caller: Caller) -> None:
    """Its running and queued tasks end as `cancelled` at once; two kills at the same time are one."""
    running = await caller.working(hang=True)
    queued = await caller.started(session=running.session_id, prompt="x")
    killed = await asyncio.gather(*(caller.kill(running.session_id) for _ in range(2)))
    assert {session["state"] for session in killed} <= {"draining", "closed"}
    for task in (running, queued):
        end = await task.finish()
        assert (end["status"], end["error"]["code"]) == ("cancelled", "session_killed")
    ended = await caller.ended(running.session_id)
    assert (ended["state"], ended["close_reason"], ended["error"]) == ("closed", "killed", None)
    assert (await caller.kill(running.session_id))["close_reason"] == "killed"


async def test_killing_a_session_that_starts(caller: Caller) -> None:
    """In whatever stage of its start, it goes, and nothing of it is left."""
    sessions = [(await caller.open("slow_start"))["session_id"] for _ in range(3)]
    await caller.kill(sessions[0])
    await until("it is made", lambda: _stage_is(caller, sessions[1], "container", "loading"))
    await caller.kill(sessions[1])
    await until("it loads", lambda: _stage_is(caller, sessions[2], "loading"))
    await caller.kill(sessions[2])
    for session_id in sessions:
        assert (await caller.ended(session_id))["close_reason"] == "killed"


async def _stage_is(caller: Caller, session_id: str, *stages: str) -> bool:
    return (await caller.session(session_id))["stage"] in stages


async def test_killing_a_session_that_waits(serve: Callable[..., Service]) -> None:
    """It leaves the line at once, and its task ends as `cancelled`."""
    async with serve(CPU_SLOTS=1, GPU_WAIT_MAX_TASKS=3).caller() as caller:
        await caller.working(hang=True)
        waiting = await caller.started(prompt="x")
        assert (await caller.kill(waiting.session_id))["state"] == "closed"
        assert (await waiting.finish())["error"]["code"] == "session_killed"


async def test_a_session_ahead_of_its_first_task(caller: Caller) -> None:
    """It starts without a task, idles when it is ready, and serves the first task at once."""
    made = await caller.open()
    assert made["state"] in ("waiting", "preparing")
    ready = await caller.in_state(made["session_id"], "ready")
    assert (ready["queue"]["running"], ready["tasks_done"]) == (0, 0)
    assert ready["expiry"]["reason"] == "idle_timeout"
    task = await caller.run(session=made["session_id"], prompt="hi")
    assert task.of("connection")[0]["status"] == "session_ready"


async def test_a_tombstone_tells_why(caller: Caller) -> None:
    """A session that has ended stays readable, with its reason and what its worker said last."""
    task = await caller.run("exit", model="hostile")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", "worker_exited")
    assert "this worker gives up at once" in end["error"]["message"]
    ended = await caller.ended(task.session_id)
    assert (ended["state"], ended["close_reason"]) == ("failed", "start_failed")
    assert ended["error"] == end["error"]
    assert ended["log_tail"] == ["this worker gives up at once"]
    assert ended["closed_at"] is not None
    listed = (await caller.client.call("GET", "/api/sessions"))["sessions"]
    assert [session["session_id"] for session in listed] == [task.session_id]
    with pytest.raises(Refused) as refused:
        await caller.run("exit", model="hostile", session=task.session_id)
    assert (refused.value.status, refused.value.code) == (409, "session_closed")


async def test_what_has_ended_is_forgotten_in_time(serve: Callable[..., Service]) -> None:
    """Tasks stay for TASK_RETENTION_SECONDS, sessions for TOMBSTONE_RETENTION_SECONDS."""
    async with serve(TASK_RETENTION_SECONDS=0.5, TOMBSTONE_RETENTION_SECONDS=1).caller() as caller:
        task = await caller.run("program", oneoff=True, code="")

        async def is_gone(path: str) -> bool:
            return (await caller.ask("GET", path))[0] == 404

        await until("the task is forgotten", lambda: is_gone(f"/api/tasks/{task.task_id}"))
        await until("the session is forgotten", lambda: is_gone(f"/api/sessions/{task.session_id}"))
        assert (await caller.client.call("GET", "/api/sessions")) == {"sessions": []}
