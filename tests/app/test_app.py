"""The application and its server: the described interface, and how it stops."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from gpu_server import __version__
from gpu_server.app import Server, create_app
from gpu_server.client import Client, TaskEvent
from gpu_server.core import events as ev
from tests.app.api_world import api_world
from tests.app.processes import KEY, service_process

HOLD = {
    "task_type": "session",
    "model_id": "echo",
    "task_preset": "stream",
    "metadata": {"prompt": "held", "hang": True, "ignore_cancel": True},
}


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
            ("post", "/api/slots/{slot_id}/wash"),
            ("get", "/health"),
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


async def test_stopping(tmp_path: Path) -> None:
    """At the first signal every session ends; at the second nobody is waited for."""
    async with api_world(tmp_path) as api:
        server = Server(uvicorn.Config(FastAPI()))
        server.stop(api.service)
        assert (server.should_exit, server.force_exit) == (True, False)
        assert api.world.told(ev.ShutdownOrdered) == [ev.ShutdownOrdered()]
        server.stop(api.service)
        assert (server.should_exit, server.force_exit) == (True, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends every task with its reason while the clients still listen, and leaves no worker; the
    exit status is 0."""
    with service_process(tmp_path) as service:
        seen: list[TaskEvent] = []
        async with asyncio.timeout(60), Client(service.url, KEY) as client:
            async for event in client.submit(HOLD):
                seen.append(event)
                if event.data.get("delta") == "held":
                    service.process.send_signal(number)
        assert seen[-1].event == "task_finish"
        assert seen[-1].data["error"]["code"] == "shutdown"
        assert await asyncio.to_thread(service.process.wait, 60) == 0
        assert list((tmp_path / "run").iterdir()) == []
        assert "service.stopped" in service.log
        assert KEY not in service.log


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
