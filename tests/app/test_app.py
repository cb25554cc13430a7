"""The application and its server: the described interface, and how it stops."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from gpu_server import __version__
from gpu_server.app import Server, create_app
from gpu_server.client import Client, Refused, TaskEvent
from gpu_server.core import events as ev
from gpu_server.core.notices import UNNUMBERED
from tests.app.api_world import Api, api_world
from tests.app.played_worker import hold
from tests.app.processes import KEY, service_process

SESSION = {"model_id": "echo", "task_preset": "batch"}
HOLD = {
    **SESSION,
    "task_type": "session",
    "metadata": {"prompt": "held", "hang": True, "ignore_cancel": True},
}
TALK = {
    **SESSION,
    "task_type": "session",
    "metadata": {"prompt": " ".join(f"w{n}" for n in range(10)), "delay_ms": 100},
}


def said(events: list[TaskEvent]) -> str:
    return "".join(event.data["delta"] for event in events if event.event == "text_delta")


def left_in(tmp_path: Path) -> list[Path]:
    """The run folders that are there."""
    return [path for path in (tmp_path / "run").glob("*/*") if path.is_dir()]


async def until_refused(client: Client, session: dict[str, str]) -> None:
    """Wait until the service takes nothing more. Raises `Refused`."""
    while True:
        await client.call("POST", "/api/sessions", session)


async def test_the_description(tmp_path: Path) -> None:
    """The OpenAPI document lists the routes, the security of each, and that streams are streams."""
    async with api_world(tmp_path) as api:
        document = (await api.ask("GET", "/openapi.json", tenant=None)).json
        assert document["info"]["version"] == __version__
        described = {(method, path) for path, methods in document["paths"].items() for method in methods}
        assert described == {
            ("post", "/api/tasks/submit"),
            ("get", "/api/tasks/{task_id}"),
            ("delete", "/api/tasks/{task_id}"),
            ("get", "/api/tasks/{task_id}/events"),
            ("get", "/api/sessions"),
            ("post", "/api/sessions"),
            ("get", "/api/sessions/{session_id}"),
            ("delete", "/api/sessions/{session_id}"),
            ("post", "/api/sessions/{session_id}/keepalive"),
            ("post", "/api/sessions/{session_id}/open"),
            ("post", "/inference"),
            ("post", "/v1/chat/completions"),
            ("post", "/v1/completions"),
            ("get", "/v1/models"),
            ("get", "/v1/models/{model_id}"),
            ("get", "/api/slots"),
            ("get", "/api/slots/{slot_id}/certificates"),
            ("post", "/api/slots/{slot_id}/wash"),
            ("get", "/api/certificates/{record_hash}"),
            ("get", "/health"),
            ("get", "/metrics"),
        }
        schemes = document["components"]["securitySchemes"]
        assert [(scheme["type"], scheme["in"], scheme["name"]) for scheme in schemes.values()] == [
            ("apiKey", "header", "X-API-Key")
        ]
        for methods in document["paths"].values():
            for operation in methods.values():
                assert operation["security"] == [{name: []} for name in schemes]
                assert operation["description"]
        for path, method in (("/api/tasks/submit", "post"), ("/api/tasks/{task_id}/events", "get")):
            assert "text/event-stream" in document["paths"][path][method]["responses"]["200"]["content"]
        fields = document["components"]["schemas"]["SubmitBody"]
        assert set(fields["required"]) == {"task_type", "model_id", "task_preset"}
        assert fields["additionalProperties"] is False
        assert (await api.ask("GET", "/docs", tenant=None)).status == 200


async def test_the_app_serves_its_service(tmp_path: Path) -> None:
    """Two applications in one process do not share anything."""
    async with api_world(tmp_path / "one") as one, api_world(tmp_path / "two") as two:
        await one.session()
        assert (await two.ask("GET", "/api/sessions")).json == {"sessions": []}
        assert create_app(one.service).state.service is one.service


@asynccontextmanager
async def serving_one_task(tmp_path: Path) -> AsyncIterator[tuple[Api, Server, str]]:
    """A server with a task that does not end by itself; the server, and the task's session."""
    async with api_world(tmp_path) as api:
        api.world.on_task = hold
        task_id, session_id = api.world.submit(timeout=1000)
        await api.world.saw(task_id, "held")
        yield api, Server(uvicorn.Config(FastAPI())), session_id


async def test_stopping(tmp_path: Path) -> None:
    """At the first signal no work is taken any more and what runs goes on; at the second every session ends;
    at the third nobody is waited for."""
    async with serving_one_task(tmp_path) as (api, server, session_id):
        server.stop(api.service)
        await api.world.until(lambda: api.world.told(ev.DrainOrdered))
        (await api.submit()).problem(503, "shutting_down")
        assert api.world.session(session_id).state == "working"
        assert (server.should_exit, server.force_exit) == (False, False)
        assert api.world.told(ev.ShutdownOrdered) == []
        server.stop(api.service)
        assert api.world.told(ev.ShutdownOrdered) == [ev.ShutdownOrdered()]
        assert (server.should_exit, server.force_exit) == (True, False)
        server.stop(api.service)
        assert (server.should_exit, server.force_exit) == (True, True)


@pytest.mark.parametrize("how", ["work ends", "grace ends"])
async def test_a_drain_is_over(tmp_path: Path, how: str) -> None:
    """The server exits when what ran has ended, or has had SHUTDOWN_GRACE_SECONDS for it."""
    async with serving_one_task(tmp_path) as (api, server, session_id):
        grace = api.service.settings.shutdown_grace_seconds
        server.stop(api.service)
        await api.world.clock.until_slept_to(api.world.clock.now() + grace)
        if how == "work ends":
            api.world.workers[session_id].released.set()
        else:
            api.world.clock.advance(grace)
        await api.world.until(lambda: server.should_exit)
        assert not server.force_exit
        await api.world.until(lambda: api.world.session(session_id).ended)
        status = "completed" if how == "work ends" else "failed"
        assert [task.state for task in api.world.engine.node.tasks.values()] == [status]


async def test_an_engine_that_is_broken_does_not_drain(tmp_path: Path) -> None:
    """After a bug nothing is waited for."""
    async with serving_one_task(tmp_path) as (api, server, _):
        api.world.engine.broken = "a bug"
        server.stop(api.service)
        assert server.should_exit


async def test_handing_over(tmp_path: Path) -> None:
    """A service that hands over exits and ends nothing; nor does a signal to stop that comes meanwhile."""
    async with serving_one_task(tmp_path) as (api, server, session_id):
        server.hand_over(api.service)
        assert (server.should_exit, server.force_exit) == (True, False)
        assert api.world.engine.handed_over
        for forced in (False, True):
            server.stop(api.service)
            for _ in range(10):
                await asyncio.sleep(0)
            assert server.force_exit is forced
        assert api.world.session(session_id).state == "working"
        assert api.world.told(ev.DrainOrdered) == api.world.told(ev.ShutdownOrdered) == []


async def test_handing_over_after_all(tmp_path: Path) -> None:
    """A service that drains can still hand over what is left: its grace ends nothing more then."""
    async with serving_one_task(tmp_path) as (api, server, session_id):
        server.stop(api.service)
        grace = api.service.settings.shutdown_grace_seconds
        await api.world.clock.until_slept_to(api.world.clock.now() + grace)
        server.hand_over(api.service)
        api.world.clock.advance(grace)
        for _ in range(10):
            await asyncio.sleep(0)
        assert server.should_exit
        assert api.world.session(session_id).state == "working"
        assert api.world.told(ev.ShutdownOrdered) == []


# -- as a process -----------------------------------------------------------------------------------------


WAITS = """
import asyncio
from pathlib import Path
from gpu_worker import Worker
worker = Worker()

@worker.task
async def run(task, emit):
    await emit.text_delta("begun ")
    while not Path(task.metadata["go_on"]).exists():
        await asyncio.sleep(0.01)
    await emit.text_delta("ended")

worker.run()
"""


async def test_sigterm_lets_tasks_end(tmp_path: Path) -> None:
    """A task that ends by itself is not disturbed; new work is refused meanwhile. Then no worker is left, and
    the exit status is 0."""
    (tmp_path / "worker.py").write_text(WAITS)
    command = f"[python, {tmp_path / 'worker.py'}]"
    preset = f"{{docker_image: gpu-server/waits, model: none, process_command: {command}}}"
    (tmp_path / "presets.yaml").write_text(f"models:\n  waits:\n    p: {preset}\n")
    session = {"model_id": "waits", "task_preset": "p"}
    task = {**session, "task_type": "session", "metadata": {"go_on": str(tmp_path / "go_on")}}
    with service_process(tmp_path, MODEL_PRESETS_FILE=str(tmp_path / "presets.yaml")) as service:
        seen: list[TaskEvent] = []
        async with asyncio.timeout(60), Client(service.url, KEY) as client:
            async for event in client.submit(task):
                seen.append(event)
                if event.data.get("delta") == "begun ":
                    service.process.send_signal(signal.SIGTERM)
                    with pytest.raises(Refused, match="shutting_down"):
                        await until_refused(client, session)
                    (tmp_path / "go_on").touch()
        assert said(seen) == "begun ended"
        assert seen[-1].data["status"] == "completed"
        assert await asyncio.to_thread(service.process.wait, 60) == 0
        assert left_in(tmp_path) == []
        assert "service.stopped" in service.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    """A second signal ends every task with its reason while the clients still listen, and leaves no worker;
    the exit status is 0."""
    with service_process(tmp_path) as service:
        seen: list[TaskEvent] = []
        async with asyncio.timeout(60), Client(service.url, KEY) as client:
            async for event in client.submit(HOLD):
                seen.append(event)
                if event.data.get("delta") == "held":
                    service.process.send_signal(number)
                    with pytest.raises(Refused, match="shutting_down"):
                        await until_refused(client, SESSION)
                    service.process.send_signal(number)
        assert seen[-1].event == "task_finish"
        assert seen[-1].data["error"]["code"] == "shutdown"
        assert await asyncio.to_thread(service.process.wait, 60) == 0
        assert left_in(tmp_path) == []
        assert "service.stopped" in service.log
        assert KEY not in service.log


async def test_the_grace_has_an_end(tmp_path: Path) -> None:
    """A task that does not end within SHUTDOWN_GRACE_SECONDS is ended."""
    with service_process(tmp_path, SHUTDOWN_GRACE_SECONDS="0.3") as service:
        seen: list[TaskEvent] = []
        async with asyncio.timeout(60), Client(service.url, KEY) as client:
            async for event in client.submit(HOLD):
                seen.append(event)
                if event.data.get("delta") == "held":
                    service.process.send_signal(signal.SIGTERM)
        assert seen[-1].data["error"]["code"] == "shutdown"
        assert await asyncio.to_thread(service.process.wait, 60) == 0


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
async def test_the_next_one_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """A service that hands over, or is killed, in the middle of a task: the next one goes on with it, and the
    client, which asks on, gets each event once."""
    with service_process(tmp_path) as first:
        port = first.url.rsplit(":", 1)[1]
        seen: list[TaskEvent] = []
        async with asyncio.timeout(60), Client(first.url, KEY) as client, AsyncExitStack() as stack:
            async for event in client.submit(TALK):
                seen.append(event)
                if event.data.get("delta") == "w1 ":
                    first.process.send_signal(number)
                    status = await asyncio.to_thread(first.process.wait, 60)
                    assert status == (0 if number == signal.SIGUSR2 else -signal.SIGKILL)
                    second = await asyncio.to_thread(
                        stack.enter_context, service_process(tmp_path, HTTP_PORT=port)
                    )
            numbers = [event.id for event in seen if event.event not in UNNUMBERED]
            assert numbers == list(range(1, len(numbers) + 1))
            assert said(seen) == TALK["metadata"]["prompt"]
            assert seen[-1].data["status"] == "completed"
            second.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(second.process.wait, 60) == 0
        assert left_in(tmp_path) == []
        assert ("service.handed_over" in first.log) is (number == signal.SIGUSR2)


CRASHING = """
from gpu_server.core.node import Node
from gpu_server.core import events as ev
handle = Node.handle
def crash(self, event, now):
    if isinstance(event, ev.SessionRequested):
        raise KeyError("a bug in a decision")
    return handle(self, event, now)
Node.handle = crash
from gpu_server.cli import app
app(["serve"])
"""


async def test_a_bug_stops_the_service(tmp_path: Path) -> None:
    """A service that has met a bug in a decision stops by itself, with a status that is not 0."""
    with service_process(tmp_path, CRASHING) as service:
        async with asyncio.timeout(60), Client(service.url, KEY) as client:
            with pytest.raises(Exception, match="internal"):
                await client.call("POST", "/api/sessions", {"model_id": "echo", "task_preset": "stream"})
        assert await asyncio.to_thread(service.process.wait, 60) == 1
        assert "engine.broken" in service.log


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A service whose port is taken ends, with a status that is not 0."""
    with service_process(tmp_path / "one") as first:
        port = first.url.rsplit(":", 1)[1]
        with service_process(tmp_path / "two", HTTP_PORT=port) as second:
            assert await asyncio.to_thread(second.process.wait, 60) != 0
            assert "address already in use" in second.log
