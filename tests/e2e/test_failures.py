"""Workers that fail, lie, flood or mean harm: each ends its own session, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gpu_server.client import Refused, TaskEvent
from tests.e2e.harness import Caller, Following, check_events, only_docker, until

# What a session of each hostile mode ends with: close reason, error code, a part of the message.
AT_START = {
    "exit": ("start_failed", "worker_exited", "exited with code 3: this worker gives up at once"),
    "never_ready": ("start_failed", "start_timeout", "not ready after 1.5 s (stage "),
    "no_socket": ("start_failed", "start_timeout", "not ready"),
    "slow_header": ("start_failed", "start_timeout", "not ready"),
    "symlink": ("start_failed", "run_folder_fault", "not a socket"),
    "folder": ("start_failed", "run_folder_fault", "not a socket"),
    "wrong_session": ("start_failed", "worker_protocol", "another session"),
    "endless_health": ("start_failed", "worker_protocol", "longer than"),
}
ON_TASK = {
    "bad_ids": ("worker_protocol", "id 4 came after 2"),
    "bad_event": ("worker_protocol", "task_finish"),
    "no_end": ("worker_protocol", ""),
    "endless_frame": ("worker_protocol", "longer than 1048576 bytes"),
}


@pytest.fixture(autouse=True)
async def _others_are_served(caller: Caller) -> AsyncIterator[None]:
    """Whatever a test does, a session of another tenant that was there before goes on serving."""
    async with caller.service.caller() as other:
        session = await other.warm()
        yield
        assert (await other.run(session=session, prompt="still here")).text == "still here"


@pytest.mark.parametrize("mode", sorted(AT_START))
async def test_a_worker_that_does_not_start(caller: Caller, mode: str) -> None:
    """Its task fails with a code and a message that say what it did, and so does its tombstone."""
    reason, code, message = AT_START[mode]
    task = await caller.run(mode, model="hostile")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", code), end
    assert message in end["error"]["message"]
    if mode == "never_ready":  # the message says how far it came, which is as far as the task was told
        loads = "loading" in [data["status"] for data in task.of("worker")]
        assert ("(stage loading)" in end["error"]["message"]) is loads
    assert task.of("error") == [end["error"]]
    ended = await caller.ended(task.session_id)
    assert (ended["state"], ended["close_reason"], ended["error"]) == ("failed", reason, end["error"])


async def test_a_worker_that_cannot_load(caller: Caller) -> None:
    """A worker that says that it failed is ended with what it says."""
    task = await caller.run("cannot_load")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", "start_failed")
    assert "the weights are torn" in end["error"]["message"]
    assert (await caller.ended(task.session_id))["close_reason"] == "start_failed"


@pytest.mark.parametrize("mode", sorted(ON_TASK))
async def test_a_worker_that_breaks_the_contract(caller: Caller, mode: str) -> None:
    """The task fails with `worker_protocol`, what is queued behind it too, and the session is ended."""
    code, message = ON_TASK[mode]
    session = await caller.warm(mode, model="hostile")
    task = await caller.run(mode, model="hostile", session=session)
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", code), end
    assert message in end["error"]["message"]
    ended = await caller.ended(session)
    assert (ended["state"], ended["close_reason"]) == ("failed", "worker_misbehaved")


@pytest.mark.parametrize(
    ("wish", "code", "reason", "message"),
    [
        ({"garbage": True}, "worker_protocol", "worker_misbehaved", "no frame"),
        ({"half_frame": True}, "worker_exited", "worker_exited", "exited with code 9"),
        ({"crash": 7, "log": "my last line"}, "worker_exited", "worker_exited", "code 7"),
        ({"crash": 0}, "worker_exited", "worker_exited", "code 0"),
    ],
)
async def test_a_worker_that_dies_or_talks_nonsense_in_a_task(
    caller: Caller, wish: dict[str, object], code: str, reason: str, message: str
) -> None:
    """What it said before arrives; its running and queued tasks fail with the reason."""
    before = await caller.working(hang=True)
    session = before.session_id
    running = await caller.started(session=session, count=20, delay_ms=20, **wish)
    queued = await caller.started(session=session, prompt="never")
    await caller.cancel(before.task_id)
    for task in (running, queued):
        end = await task.finish()
        assert (end["status"], end["error"]["code"]) == ("failed", code), end
        assert message in end["error"]["message"]
    assert running.text == "".join(f"tok{n} " for n in range(20))
    assert "text_delta" not in queued.names
    ended = await caller.ended(session)
    assert (ended["state"], ended["close_reason"]) == ("failed", reason)


async def test_a_task_that_fails_leaves_its_session(caller: Caller) -> None:
    """A failure that the worker reports itself is the task's alone, with the worker's own code."""
    session = await caller.warm()
    failed = await caller.run(session=session, prompt="x", fail="no luck")
    end = failed.events[-1].data
    assert (end["status"], end["error"]) == ("failed", {"code": "task_failed", "message": "no luck"})
    wrong = await caller.run(session=session, nonsense=1)
    assert wrong.events[-1].data["error"]["code"] == "invalid_request"
    assert (await caller.run(session=session, prompt="next")).text == "next"


@pytest.mark.parametrize("mode", ["flood", "many_files"])
async def test_a_worker_that_fills_its_run_folder(caller: Caller, mode: str) -> None:
    """More than 1 MiB, or many files, ends the session; all of it is removed."""
    session_id = (await caller.open(mode, model="hostile"))["session_id"]
    ended = await caller.ended(session_id)
    assert (ended["state"], ended["close_reason"]) == ("failed", "worker_misbehaved")
    assert ended["error"]["code"] == "run_folder_fault"
    # The session is over when its container is gone; its folder goes with the wash that follows.
    await until("its folder is gone", lambda: session_id not in caller.service.run_folders())


@only_docker
async def test_a_worker_that_runs_out_of_memory(caller: Caller) -> None:
    """The limit holds, and the message says that it was the memory."""
    task = await caller.run("memory_bomb", model="hostile")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", "worker_exited")
    assert "memory" in end["error"]["message"]
    assert (await caller.ended(task.session_id))["close_reason"] == "worker_exited"


@only_docker
async def test_a_fork_bomb_stays_in_its_container(caller: Caller) -> None:
    """While it goes off the service answers and another session serves; killed, it is gone."""
    bomb = await caller.working("fork_bomb", model="hostile")
    await bomb.until("text", text="going off")

    def full() -> bool:
        (container,) = [c for c in caller.service.containers() if bomb.session_id in c["Names"][0]]
        top = caller.service.engine.top(container["Id"]) if caller.service.engine else {}
        return len(top["Processes"]) >= 24  # of 32, threads counted

    await until("it has forked all it can", full)
    other = await caller.run(prompt="another session")
    assert other.text == "another session"
    assert caller.service.health() is not None
    await caller.kill(bomb.session_id)
    assert (await bomb.finish())["error"]["code"] == "session_killed"
    await caller.ended(bomb.session_id)


@only_docker
async def test_a_container_that_somebody_kills(caller: Caller) -> None:
    """`docker kill` from outside ends the session as `worker_exited`, and its slot is washed."""
    task = await caller.working(hang=True)
    (container,) = [c for c in caller.service.containers() if task.session_id in c["Names"][0]]
    assert caller.service.engine is not None
    caller.service.engine.kill(container["Id"])
    end = await task.finish()
    assert (end["status"], end["error"]["code"]) == ("failed", "worker_exited")
    assert (await caller.ended(task.session_id))["close_reason"] == "worker_exited"


# -- floods -------------------------------------------------------------------------------------------------

FLOOD = 1_000_000


async def test_a_flood_of_events_with_a_reader(caller: Caller) -> None:
    """A million deltas arrive whole or with an honest `gap`, memory stays bounded, others are served."""
    service, beside = caller.service, await caller.warm()
    flooded = caller.submit("batch", count=FLOOD)
    await flooded.until("text_delta")
    before = service.memory()
    served = await caller.run(session=beside, prompt="meanwhile")
    assert served.text == "meanwhile"
    assert (await caller.task(flooded.task_id))["state"] == "running"
    last = await _skim(flooded)
    assert (last.data["status"], last.data["usage"]) == ("completed", {"deltas": FLOOD})
    assert service.memory("VmHWM") < before + (160 << 20)


async def _skim(following: Following) -> TaskEvent:
    """Read a long stream to its end and check its ids, without keeping it."""
    last, event = following.events[-1].id, None
    async for event in following._source:
        if event.event == "gap":
            assert event.data["from"] == last + 1
            last = event.data["to"]
        elif event.event not in ("queue", "progress"):
            assert event.id == last + 1
            last = event.id
    assert event is not None
    assert event.event == "task_finish"
    return event


async def test_a_flood_of_events_that_nobody_reads(caller: Caller) -> None:
    """Only STREAM_HISTORY_BYTES of it are kept: a late reader gets a `gap` and the rest, in order."""
    service = caller.service
    before = service.memory()
    flooded = await caller.working(count=FLOOD)
    async with caller.http.get(f"/api/tasks/{flooded.task_id}/events"):  # holds it open, and reads nothing
        await flooded.leave()
        assert (await caller.run(prompt="meanwhile")).text == "meanwhile"
        await caller.task_in_state(flooded.task_id, "completed", within=150)
    assert service.memory("VmHWM") < before + (160 << 20)
    async with caller.events(flooded.task_id) as again:
        await again.finish()
    assert again.names[0] == "gap"
    assert again.names.count("gap") == 1
    assert again.text.endswith(f"tok{FLOOD - 1} ")


async def test_many_readers_of_one_task(caller: Caller) -> None:
    """Each gets every event once and in order, those that come late too."""
    task = await caller.working(count=300, delay_ms=2)

    async def read() -> list[TaskEvent]:
        async with caller.events(task.task_id) as reader:
            await reader.finish()
            return [event for event in reader.events if event.event not in ("queue", "progress")]

    first, *others = await asyncio.gather(*(read() for _ in range(20)))
    check_events(first)
    assert all(other == first for other in others)
    await task.finish()


async def test_a_failed_session_takes_no_more_tasks(caller: Caller) -> None:
    """A task for a session whose worker died is refused, with the reason."""
    task = await caller.run(crash=1)
    with pytest.raises(Refused) as refused:
        await caller.run(session=task.session_id, prompt="x")
    assert (refused.value.status, refused.value.code) == (409, "session_closed")
    assert "worker_exited" in str(refused.value)
