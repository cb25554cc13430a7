"""Tasks from submit to `task_finish`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gpu_server.client import Refused
from tests.e2e.harness import Caller, Service, body, until

ONE_SLOT = {"CPU_SLOTS": 1, "GPU_WAIT_MAX_TASKS": 3}


async def test_two_tasks_in_one_session_and_a_oneoff(caller: Caller) -> None:
    """A session's first task brings up its worker, the second finds it ready, a one-off has its own."""
    first = await caller.run(prompt="hello there  wörld\n")
    second = await caller.run(session=first.session_id, prompt="again")
    alone = await caller.run("program", oneoff=True, code="print('hello')")

    assert first.text == "hello there  wörld\n"
    assert first.of("text") == [
        {"text": "hello there  wörld\n", "finish_reason": "stop", "stop_reason": None}
    ]
    assert [e.event for e in first.events if e.event not in ("progress", "text_delta")] == [
        *("connection", "worker", "worker", "connection", "worker", "text", "worker", "task_finish")
    ]
    assert [data["status"] for data in first.of("connection")] == ["allocated", "session_ready"]
    assert [data["status"] for data in first.of("worker")] == ["created", "loading", "working", "waiting"]
    assert first.of("progress")[-1]["stage"] == "loading"
    assert first.events[-1].data["status"] == "completed"
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert first.events[-1].data["usage"] == usage
    assert first.events[-1].data["elapsed_seconds"] >= 0

    assert [(e.id, e.event) for e in second.events] == [
        *((1, "connection"), (2, "worker"), (3, "text_delta"), (4, "text")),
        *((5, "worker"), (6, "task_finish")),
    ]
    assert second.of("connection")[0]["status"] == "session_ready"
    assert second.session_id == first.session_id
    assert second.of("connection")[0]["gpu_ids"] == first.of("connection")[0]["gpu_ids"]

    assert alone.session_id != first.session_id
    assert alone.of("logs") == [{"stream": "stdout", "line": "hello"}]
    assert (await caller.ended(alone.session_id))["close_reason"] == "oneoff_done"
    assert (await caller.session(first.session_id))["state"] == "ready"
    assert (await caller.session(first.session_id))["tasks_done"] == 2


async def test_oneoff_of_a_long_lived_worker_closes_its_session(caller: Caller) -> None:
    """A one-off task of an `http` preset gets a session of its own, which ends with it."""
    task = await caller.run(oneoff=True, prompt="once")
    assert task.text == "once"
    closed = await caller.ended(task.session_id)
    assert (closed["state"], closed["close_reason"], closed["error"]) == ("closed", "oneoff_done", None)


async def test_pings_keep_the_stream_open(caller: Caller) -> None:
    """While nothing happens, comments come, and nothing that a parser of events would take for one."""
    async with caller.http.post("/api/tasks/submit", json=body(hang=True)) as answer:
        seen = b""
        async with asyncio.timeout(30):
            while seen.count(b": ping\n") < 3:
                seen += await answer.content.readany()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert b"id: 1\nevent: connection\ndata: {" in seen


async def test_history_replays_what_the_stream_said(caller: Caller) -> None:
    """The events of an ended task can be read again, from the start and from behind any number."""
    task = await caller.run(prompt="a b c")
    numbered = [event for event in task.events if event.event not in ("queue", "progress")]
    for after in (None, 0, 1, len(numbered) - 1):
        async with caller.events(task.task_id, after=after) as again:
            await again.finish()
        assert again.events == numbered[after or 0 :]


async def test_a_session_runs_its_tasks_first_come_first_served(caller: Caller) -> None:
    """Queued tasks hear their place, start in the order in which they came, and one too many is refused."""
    first = await caller.working(prompt="0", hang=True)
    later = [await caller.started(session=first.session_id, prompt=str(n)) for n in (1, 2, 3)]
    with pytest.raises(Refused) as refused:
        await caller.run(session=first.session_id, prompt="4")
    assert (refused.value.status, refused.value.code) == (429, "session_queue_full")
    status, problem, headers = await caller.ask(
        "POST", "/api/tasks/submit", json=body(session=first.session_id)
    )
    assert (status, problem["code"], int(headers["Retry-After"]) > 0) == (429, "session_queue_full", True)
    assert [(await caller.task(task.task_id))["position"] for task in later] == [1, 2, 3]
    session = await caller.session(first.session_id)
    assert session["queue"] == {"running": 1, "waiting": 3, "max": 3}

    await caller.cancel(first.task_id)
    for task in later:
        assert (await task.finish())["status"] == "completed"
    began = [(await caller.task(task.task_id))["started_at"] for task in later]
    ended = [(await caller.task(task.task_id))["finished_at"] for task in later]
    assert began == sorted(began)
    assert all(a <= b for a, b in zip(ended, began[1:], strict=False))
    assert later[2].of("connection")[0]["status"] == "queued"
    assert [data["position"] for data in later[2].of("queue")] == [3, 2, 1]


async def test_a_preset_says_how_many_tasks_run_at_once(caller: Caller) -> None:
    """`max_concurrent_tasks` tasks work at the same time, the next one waits for a place."""
    session = await caller.warm("batch")
    running = [await caller.working("batch", session=session, hang=True) for _ in range(3)]
    waiting = await caller.started("batch", session=session, prompt="next")
    assert (await caller.session(session))["queue"] == {"running": 3, "waiting": 1, "max": 3}
    await caller.cancel(running[1].task_id)
    assert (await waiting.finish())["status"] == "completed"
    assert [(await caller.task(task.task_id))["state"] for task in running] == [
        *("running", "cancelled", "running")
    ]


async def test_a_task_has_only_so_much_time(caller: Caller) -> None:
    """A task that runs longer than it may ends as `timeout`; its session serves the next one."""
    session = await caller.warm()
    late = await caller.run(session=session, seconds=0.5, prompt="x", hang=True)
    end = late.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("timeout", "task_timeout")
    assert late.of("error") == [end["error"]]
    assert 0.5 <= end["elapsed_seconds"] < 60  # the default is 300
    assert (await caller.run(session=session, prompt="next")).text == "next"


async def test_cancelling_a_running_task(caller: Caller) -> None:
    """DELETE ends it at once as `cancelled`, cancelling twice is cancelling once, the session goes on."""
    session = await caller.warm()
    task = await caller.working(session=session, hang=True)
    assert (await caller.cancel(task.task_id))["state"] == "cancelled"
    assert (await caller.cancel(task.task_id))["state"] == "cancelled"
    end = await task.finish()
    assert (end["status"], end["error"]["code"]) == ("cancelled", "task_cancelled")
    assert (await caller.run(session=session, prompt="next")).text == "next"


async def test_cancelling_a_queued_task(caller: Caller) -> None:
    """It never reaches the worker, and those behind it move up."""
    running = await caller.working(hang=True)
    second, third = [await caller.started(session=running.session_id, prompt=p) for p in ("b", "c")]
    await caller.cancel(second.task_id)
    end = await second.finish()
    assert (end["status"], end["elapsed_seconds"]) == ("cancelled", 0.0)
    assert "text_delta" not in second.names
    assert (await caller.task(third.task_id))["position"] == 1
    await caller.cancel(running.task_id)
    assert (await third.finish())["status"] == "completed"


async def test_cancelling_a_task_whose_worker_starts(caller: Caller) -> None:
    """The task ends at once; the session it started goes on without it."""
    task = await caller.started("slow_start", prompt="x")
    await caller.cancel(task.task_id)
    assert (await task.finish())["error"]["code"] == "task_cancelled"
    assert (await caller.session(task.session_id))["state"] == "preparing"


async def test_a_worker_that_ignores_a_cancel_loses_its_session(serve: Callable[..., Service]) -> None:
    """The client hears the end at once, the session is ended after CANCEL_GRACE_SECONDS, others go on."""
    async with serve(CANCEL_GRACE_SECONDS=1).caller() as caller:
        task = await caller.working(hang=True, ignore_cancel=True)
        behind = await caller.started(session=task.session_id, prompt="never")
        await caller.cancel(task.task_id)
        assert (await task.finish())["error"]["code"] == "task_cancelled"
        assert (await behind.finish())["error"]["code"] == "cancel_ignored"
        ended = await caller.ended(task.session_id)
        assert (ended["state"], ended["close_reason"]) == ("failed", "worker_misbehaved")
        assert ended["error"]["code"] == "cancel_ignored"
        assert (await caller.run(prompt="a new session")).text == "a new session"


# -- clients that go away -----------------------------------------------------------------------------------


async def test_a_client_that_goes_away_for_good(caller: Caller) -> None:
    """Its task is cancelled after DISCONNECT_GRACE_SECONDS, with the reason, and the session goes on."""
    session = await caller.warm()
    task = await caller.working(session=session, hang=True)
    await task.leave()
    ended = await caller.task_in_state(task.task_id, "cancelled")
    assert ended["error"]["code"] == "client_gone"
    assert (await caller.run(session=session, prompt="next")).text == "next"


async def test_a_client_that_goes_away_from_the_queue(caller: Caller) -> None:
    """A queued task that nobody reads is cancelled too, and does not reach the worker."""
    running = await caller.working(hang=True)
    queued = await caller.started(session=running.session_id, prompt="x")
    await queued.leave()
    assert (await caller.task_in_state(queued.task_id, "cancelled"))["error"]["code"] == "client_gone"
    assert (await caller.task(queued.task_id))["started_at"] is None


async def test_a_client_that_comes_back_misses_nothing(serve: Callable[..., Service]) -> None:
    """Taken up again with Last-Event-ID, however often, a stream gives every event once and in order."""
    async with serve(CPU_SLOTS=4, DISCONNECT_GRACE_SECONDS=60).caller() as caller:
        task = await caller.working(count=150, delay_ms=20)
        await task.until("text_delta")
        seen = [event for event in task.events if event.id and event.event not in ("queue", "progress")]
        await task.leave()
        while seen[-1].event != "task_finish":
            async with caller.events(task.task_id, after=seen[-1].id) as again:
                async with asyncio.timeout(30):
                    async for event in again._source:
                        seen.append(event)
                        if event.event == "task_finish" or len(seen) % 30 == 0:
                            break
        assert [event.id for event in seen] == list(range(1, len(seen) + 1))
        assert "".join(e.data["delta"] for e in seen if e.event == "text_delta") == "".join(
            f"tok{n} " for n in range(150)
        )
        assert seen[-1].data["status"] == "completed"


async def test_another_reader_keeps_a_task_alive(caller: Caller) -> None:
    """The grace counts from when the last of its readers has gone."""
    task = await caller.working(hang=True)
    async with caller.events(task.task_id) as other:
        await other.until("worker", status="working")
        await task.leave()
        # More than the grace goes by, as the pings of the reader that is still there tell.
        pings = 0
        async with caller.http.get(f"/api/tasks/{task.task_id}/events") as answer, asyncio.timeout(30):
            while pings < 10:
                pings += (await answer.content.readany()).count(b": ping")
        assert (await caller.task(task.task_id))["state"] == "running"
    assert (await caller.task_in_state(task.task_id, "cancelled"))["error"]["code"] == "client_gone"


# -- the wait line ------------------------------------------------------------------------------------------


async def test_sessions_wait_in_line_for_a_slot(serve: Callable[..., Service]) -> None:
    """Who cannot have a slot yet hears its place, and gets one in the order of the line."""
    async with serve(**ONE_SLOT).caller() as caller:
        first = await caller.working(hang=True)
        second, third = await caller.started(prompt="b"), await caller.started(prompt="c")
        assert [task.of("connection")[0]["status"] for task in (second, third)] == ["queued", "queued"]
        await third.until("queue", position=2)
        await caller.kill(first.session_id)
        assert (await first.finish())["error"]["code"] == "session_killed"
        assert (await second.finish())["status"] == "completed"
        await caller.kill(second.session_id)
        assert (await third.finish())["status"] == "completed"
        assert [data["position"] for data in third.of("queue")] == [2, 1]
        assert [data["status"] for data in third.of("connection")] == [
            *("queued", "allocated", "session_ready")
        ]


async def test_waiting_for_a_slot_has_an_end(serve: Callable[..., Service]) -> None:
    """After GPU_WAIT_MAX_SECONDS the task ends as `timeout`, and its session has failed."""
    async with serve(CPU_SLOTS=1, GPU_WAIT_MAX_SECONDS=1).caller() as caller:
        first = await caller.working(hang=True)
        second = await caller.run(prompt="b")
        end = second.events[-1].data
        assert (end["status"], end["error"]["code"]) == ("timeout", "gpu_wait_timeout")
        ended = await caller.session(second.session_id)
        assert (ended["state"], ended["close_reason"]) == ("failed", "no_available_gpu")
        assert (await caller.task(first.task_id))["state"] == "running"


async def test_waiting_can_be_switched_off(serve: Callable[..., Service]) -> None:
    """With GPU_WAIT_MAX_SECONDS=0 a node that is busy refuses at once, and says when to try again."""
    async with serve(CPU_SLOTS=1, GPU_WAIT_MAX_SECONDS=0).caller() as caller:
        await caller.working(hang=True)
        status, problem, headers = await caller.ask("POST", "/api/tasks/submit", json=body())
        assert (status, problem["code"], int(headers["Retry-After"]) > 0) == (503, "no_available_gpu", True)


async def test_the_line_has_a_length(serve: Callable[..., Service]) -> None:
    """More than GPU_WAIT_MAX_TASKS may not wait."""
    async with serve(**ONE_SLOT).caller() as caller:
        await caller.working(hang=True)
        for _ in range(3):
            await caller.started()
        status, problem, headers = await caller.ask("POST", "/api/tasks/submit", json=body())
        assert (status, problem["code"], "Retry-After" in headers) == (429, "gpu_wait_line_full", True)


async def test_leaving_the_line(serve: Callable[..., Service]) -> None:
    """A session whose only task goes away while it waits is gone too, and the next one moves up."""
    async with serve(**ONE_SLOT).caller() as caller:
        await caller.working(hang=True)
        cancelled, left, last = [await caller.started() for _ in range(3)]
        await last.until("queue", position=3)
        await caller.cancel(cancelled.task_id)
        await last.until("queue", position=2)
        await left.leave()
        await last.until("queue", position=1)
        for task in (cancelled, left):
            ended = await caller.session(task.session_id)
            assert (ended["state"], ended["close_reason"]) == ("closed", "abandoned")


async def test_a_lease_of_several_slots(serve: Callable[..., Service]) -> None:
    """It gathers its slots while others wait behind it, and frees all of them."""
    service = serve(CPU_SLOTS=2)
    async with service.caller() as caller:
        one = await caller.working(hang=True)
        pair = await caller.started("pair", prompt="both")
        behind = await caller.started(prompt="behind")
        assert behind.of("connection")[0]["status"] == "queued"
        await caller.kill(one.session_id)
        await pair.finish()
        assert set(pair.of("connection")[-1]["gpu_ids"]) == {"cpu0", "cpu1"}
        await caller.kill(pair.session_id)
        assert (await behind.finish())["status"] == "completed"
        await caller.kill(behind.session_id)
        await until("both slots are free", lambda: service.is_all_free(service.health()))
