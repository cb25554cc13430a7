"""Stopping in order: handed over to the next version with everything running, or drained to the end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from gpu_server.client import Client
from tests.e2e.harness import Caller, Following, Service, Services, body, until

SETTINGS = {"CPU_SLOTS": 4, "DISCONNECT_GRACE_SECONDS": 60, "SESSION_QUEUE_MAX_SIZE": 50}
LONG = {"count": 250, "delay_ms": 20}
SOON = 40.0


@pytest.fixture
def serve_own(services: Services) -> Iterator[Callable[..., Service]]:
    """Running services of this test's own, which is to stop them."""
    started: list[Service] = []

    def serve(**settings: object) -> Service:
        started.append(services.own(**{**SETTINGS, **settings}).start())
        return started[-1]

    yield serve
    for service in started:
        service.close()
        assert service.residue() == []
        assert service.errors() == []


@pytest.fixture
def own(serve_own: Callable[..., Service]) -> Service:
    return serve_own()


class CountingClient(Client):
    """Counts the streams that it was given, by their routes."""

    opened: Counter[str]

    async def _ask(self, method: str, path: str, **request: Any) -> aiohttp.ClientResponse:
        answer = await super()._ask(method, path, **request)
        if answer.status == 200:
            self.opened[path] += 1
        return answer


def counted(count: int) -> str:
    """What the echo worker says when it is asked for that many deltas."""
    return "".join(f"tok{n} " for n in range(count))


def send(service: Service, number: signal.Signals) -> None:
    assert service.process is not None
    service.process.send_signal(number)


async def ends(service: Service, within: float) -> int:
    """The exit status of a process that is to end by itself soon."""
    process = service.process
    assert process is not None
    await until("the process has ended", lambda: process.poll() is not None, within=within)
    return int(process.returncode)


# -- handover -----------------------------------------------------------------------------------------------


async def test_a_handover_is_a_pause(own: Service) -> None:
    """SIGUSR2: the process exits with 0 within seconds, every worker is left as it is, streams end in the
    middle, and the next process has the rest of them for clients that come once more."""
    async with (
        own.caller("tenant-a") as caller,
        CountingClient(own.url, own.key, tenant="tenant-a") as client,
    ):
        client.opened = Counter()
        *busy, idle = [await caller.warm() for _ in range(3)]
        starting = await caller.started("short_start", prompt="begun before")
        await starting.until("worker", status="loading")
        waiting = await caller.started(prompt="waits")
        streams = [Following(client.submit(body(session=session, **LONG))) for session in busy]
        for stream in streams:
            await stream.until("text_delta")
        queued = await caller.started(session=streams[0].session_id, prompt="queued before")
        left = own.residue()
        sessions = [await caller.session(s.session_id) for s in (*streams, starting)]
        async with caller.http.get(f"/api/tasks/{streams[0].task_id}/events") as bare:
            await bare.content.readany()
            send(own, signal.SIGUSR2)
            asked = time.monotonic()
            rest = await bare.content.read()  # its end is an end in order: nothing was cut
            assert b"event: task_finish" not in rest
        assert await ends(own, SOON) == 0
        print(f"handed over in {time.monotonic() - asked:.2f} s")
        assert own.residue() == left
        assert "service.handed_over" in own.log_text()

        own.launch()
        await own.serving()
        for stream in streams:
            assert (await stream.finish())["status"] == "completed"
            assert stream.text == counted(250)
            assert client.opened[f"/api/tasks/{stream.task_id}/events"] == 1
        assert client.opened["/api/tasks/submit"] == 2
        for before in sessions:
            after = await caller.session(before["session_id"])
            assert (after["container_id"], after["gpu_ids"]) == (before["container_id"], before["gpu_ids"])
        for task, text in ((starting, "begun before"), (queued, "queued before")):
            assert (await task.finish())["status"] == "completed"
            assert task.text == text
        again = await caller.run(session=idle, prompt="next")
        assert [data["status"] for data in again.of("connection")] == ["session_ready"]
        await caller.kill(idle)
        assert (await waiting.finish())["status"] == "completed"
        assert "wash.residue" not in own.log_text()


async def test_a_handover_right_after_the_start(own: Service) -> None:
    """Handed over again before anybody has come back, nothing is lost either."""
    async with own.caller() as caller:
        task = await caller.working(**LONG)
        await task.until("text_delta")
        for _ in range(3):
            send(own, signal.SIGUSR2)
            assert await ends(own, SOON) == 0
            own.launch()
            await until("it is there", lambda: own.health() is not None)
        assert (await task.finish())["status"] == "completed"
        assert task.text == counted(250)


async def test_requests_during_a_handover(own: Service) -> None:
    """Each is done, refused with `shutting_down` or finds nobody; repeated with its Idempotency-Key until it
    is done, it is done once."""
    refusals: Counter[str] = Counter()
    accepted: dict[str, str] = {}
    stopping = False

    async def insist(caller: Caller, key: str, wish: dict[str, Any]) -> None:
        headers = {"Idempotency-Key": key, "Prefer": "respond-async"}

        async def is_done() -> bool:
            try:
                status, answer, more = await caller.ask(
                    "POST", "/api/tasks/submit", json=wish, headers=headers
                )
            except aiohttp.ClientError as error:
                refusals[type(error).__name__] += 1
                return False
            if status == 202:
                assert accepted.setdefault(key, answer["task_id"]) == answer["task_id"]
                return True
            assert (status, answer["code"]) in ((503, "shutting_down"), (429, "session_queue_full")), answer
            assert int(more["Retry-After"]) > 0
            refusals[answer["code"]] += 1
            return False

        await until(f"{key} is taken", is_done)

    async def submitter(caller: Caller, number: int, session: str) -> None:
        wishes: list[dict[str, Any]] = []
        while not stopping:
            wishes.append(body("batch", session=session, prompt=f"{number} {len(wishes)}", delay_ms=20))
            for n in range(max(0, len(wishes) - 2), len(wishes)):  # the one before too: it is known already
                await insist(caller, f"{number}-{n}", wishes[n])

    async with own.caller() as caller:
        sessions = [await caller.warm("batch") for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(sessions * 2):
                group.create_task(submitter(caller, number, session))
            for life in range(2):
                before = len(accepted)
                await until("tasks are taken", lambda n=before: len(accepted) > n + 20)
                send(own, signal.SIGUSR2)
                assert await ends(own, SOON) == 0, life
                own.launch()
                await own.serving()
            before = len(accepted)
            await until("tasks are taken", lambda: len(accepted) > before + 20)
            stopping = True
        print(f"{len(accepted)} tasks, refusals: {dict(refusals)}")
        assert refusals.total() > 0
        assert len(set(accepted.values())) == len(accepted)
        for key, task_id in accepted.items():
            await caller.task_in_state(task_id, "completed")
            async with caller.events(task_id) as events:
                await events.finish()
            assert events.text == key.replace("-", " ")
        done = [(await caller.session(session))["tasks_done"] for session in sessions]
        assert sum(done) == len(accepted)


# -- the end ------------------------------------------------------------------------------------------------


async def test_sigterm_lets_what_runs_end(serve_own: Callable[..., Service]) -> None:
    """Running and queued tasks complete, who waits for a slot is told, nothing new is taken; then the process
    exits with 0 and nothing is left."""
    own = serve_own(SHUTDOWN_GRACE_SECONDS=600, CPU_SLOTS=5)
    async with own.caller() as caller:
        idle = await caller.warm()
        last = await caller.working(hang=True)  # nothing ends before this one is told to
        queued = await caller.started(session=last.session_id, prompt="queued")
        starting = await caller.started("short_start", prompt="begun before")
        alone = await caller.working("program", oneoff=True, code="import time; time.sleep(3); print('out')")
        running = await caller.working(**LONG)
        waiting = await caller.started("pair", prompt="never")  # also when `alone` has ended
        send(own, signal.SIGTERM)

        async def stopping() -> dict[str, Any] | None:
            async with caller.http.get("/health") as answer:
                health = await answer.json()
                return health if answer.status == 503 else None

        health = await until("it says so", stopping)
        assert (health["status"], health["ready"]) == ("stopping", False)
        assert (await waiting.finish())["error"]["code"] == "shutdown"
        wish = body(session=running.session_id, prompt="too late")
        for path, content in (
            ("/api/tasks/submit", body()),
            ("/api/tasks/submit", wish),
            ("/api/sessions", {"model_id": "echo", "task_preset": "stream"}),
        ):
            status, problem, headers = await caller.ask("POST", path, json=content)
            assert (status, problem["code"]) == (503, "shutting_down")
            assert int(headers["Retry-After"]) > 0
        assert (await caller.ended(idle))["close_reason"] == "shutdown"
        assert (await caller.task(last.task_id))["state"] == "running"
        ends_of = await asyncio.gather(*(task.finish() for task in (running, starting, alone)))
        assert [end["status"] for end in ends_of] == ["completed"] * 3
        await caller.cancel(last.task_id)
        assert [(await task.finish())["status"] for task in (last, queued)] == ["cancelled", "completed"]
        assert (running.text, queued.text, starting.text) == (counted(250), "queued", "begun before")
    assert await ends(own, SOON) == 0
    assert own.residue() == []


async def test_the_grace_of_sigterm_has_an_end(serve_own: Callable[..., Service]) -> None:
    """After SHUTDOWN_GRACE_SECONDS what still runs fails with `shutdown`, and the process exits with 0."""
    own = serve_own(SHUTDOWN_GRACE_SECONDS=2)
    async with own.caller() as caller:
        running = await caller.working(hang=True)
        queued = await caller.started(session=running.session_id, prompt="never")
        asked = time.monotonic()
        send(own, signal.SIGTERM)
        for task in (running, queued):
            end = await task.finish()
            assert (end["status"], end["error"]["code"]) == ("failed", "shutdown")
        assert 2 <= time.monotonic() - asked < 2 + SOON
    assert await ends(own, SOON) == 0
    assert own.residue() == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_grace(
    serve_own: Callable[..., Service], second: signal.Signals
) -> None:
    """At once: tasks fail with `shutdown`, and nothing is left."""
    own = serve_own(SHUTDOWN_GRACE_SECONDS=600)
    async with own.caller() as caller:
        running = await caller.working(hang=True)
        send(own, signal.SIGTERM)
        await until("it drains", lambda: (own.health() or {}).get("status") == "stopping")
        assert (await caller.task(running.task_id))["state"] == "running"
        send(own, second)
        assert (await running.finish())["error"]["code"] == "shutdown"
    assert await ends(own, SOON) == 0
    assert own.residue() == []


async def test_a_drain_that_is_killed(serve_own: Callable[..., Service]) -> None:
    """A process manager without patience: the next start takes up the rest, and takes new work."""
    own = serve_own(SHUTDOWN_GRACE_SECONDS=600)
    async with own.caller() as caller:
        running = await caller.working(**LONG)
        send(own, signal.SIGTERM)
        await until("it drains", lambda: (own.health() or {}).get("status") == "stopping")
        await own.restart()
        assert (await running.finish())["status"] == "completed"
        assert running.text == counted(250)
        assert (await caller.run(session=running.session_id, prompt="next")).text == "next"


async def test_a_drain_that_is_handed_over(serve_own: Callable[..., Service]) -> None:
    """Who changes his mind in the middle of a drain loses nothing that still runs."""
    own = serve_own(SHUTDOWN_GRACE_SECONDS=600)
    async with own.caller() as caller:
        running = await caller.working(**LONG)
        send(own, signal.SIGTERM)
        await until("it drains", lambda: (own.health() or {}).get("status") == "stopping")
        send(own, signal.SIGUSR2)
        assert await ends(own, SOON) == 0
        assert running.session_id in str(own.residue())
        own.launch()
        await own.serving()
        assert (await running.finish())["status"] == "completed"
        assert running.text == counted(250)
