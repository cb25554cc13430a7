"""`/api/tasks`: submit, look, follow, cancel; and what becomes of a client that goes away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from gpu_server.core import events as ev
from gpu_server.core.sessions import Rules
from tests.app.api_world import KEY, TASK, Api, api_world
from tests.app.played_worker import hold
from tests.app.reading import Event, parse

HEADERS = {"X-API-Key": KEY, "X-Tenant-ID": "a"}


async def read_until(answer: aiohttp.ClientResponse, name: str) -> list[Event]:
    """Read a stream up to an event of this name, or of a delta that says so."""
    raw = b""
    async with asyncio.timeout(20):
        async for chunk in answer.content.iter_any():
            raw += chunk
            whole = raw[: raw.rfind(b"\n\n") + 2]
            events = parse(whole)
            if any(name in (event.name, event.data.get("delta")) for event in events):
                return events
    raise AssertionError(f"no {name} in {raw!r}")


async def test_submit(tmp_path: Path) -> None:
    """A submission answers the task's event stream, which nobody between may keep or change."""
    async with api_world(tmp_path) as api:
        answer = await api.submit(metadata={"prompt": "hé"}, task_difficulty="high", timeout_seconds=5)
        assert answer.status == 200
        assert answer.headers["Content-Type"].split(";")[0] == "text/event-stream"
        assert answer.headers["Cache-Control"] in ("no-store", "no-cache")
        assert answer.headers["X-Accel-Buffering"] == "no"
        events = [event for event in answer.events if event.name not in ("queue", "progress")]
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        first, last = events[0], events[-1]
        assert first.name == "connection"
        assert first.data["status"] == "allocated"
        assert first.data["gpu_id"] == first.data["gpu_ids"][0] == "0"
        assert first.data["task_id"].startswith("t_")
        assert first.data["session_id"].startswith("s_")
        assert (last.name, last.data["status"]) == ("task_finish", "completed")
        assert [event.data for event in events if event.name == "text_delta"] == [{"delta": "hé"}]
        task = api.world.task(first.data["task_id"])
        assert task.timeout == 5
        assert api.world.session(task.session_id).tier == "high"


async def test_default_timeout(tmp_path: Path) -> None:
    """A task that asks for no time has DEFAULT_TASK_TIMEOUT, and may have MAX_TASK_TIMEOUT."""
    settings = {"default_task_timeout": 7, "max_task_timeout": 9}
    async with api_world(tmp_path, settings=settings) as api:
        for asked, given in ((None, 7), (9, 9)):
            events = (await api.submit(timeout_seconds=asked)).events
            assert api.world.task(events[0].data["task_id"]).timeout == given
        (await api.submit(timeout_seconds=9.01)).problem(422, "timeout_out_of_range")


async def test_replay(tmp_path: Path) -> None:
    """A task's events can be read again, from the first or from behind any other."""
    async with api_world(tmp_path) as api:
        task_id = (await api.submit(metadata={"prompt": "x"})).events[0].data["task_id"]
        path = f"/api/tasks/{task_id}/events"
        everything = (await api.ask("GET", path)).events
        assert everything[-1].name == "task_finish"
        done = await api.ask("GET", path, headers={"Last-Event-ID": str(len(everything))})
        assert (done.status, done.raw) == (204, b"")
        for last in range(len(everything)):
            answer = await api.ask("GET", path, headers={"Last-Event-ID": str(last)})
            assert answer.headers["Content-Type"].split(";")[0] == "text/event-stream"
            assert answer.events == everything[last:]


async def test_a_client_that_knows_more_than_we_do(tmp_path: Path) -> None:
    """A client that saw events which were lost with RUN_DIR still gets the end of its task."""
    async with api_world(tmp_path) as api:
        task_id = (await api.submit(metadata={"prompt": "x"})).events[0].data["task_id"]
        stream = api.world.engine.streams.get(task_id)
        assert stream is not None
        headers = {"Last-Event-ID": str(stream.last_id + 5)}
        (end,) = (await api.ask("GET", f"/api/tasks/{task_id}/events", headers=headers)).events
        assert (end.number, end.name) == (stream.last_id, "task_finish")


async def test_events_that_are_gone(tmp_path: Path) -> None:
    """A task whose events were lost with RUN_DIR can still be looked at."""
    async with api_world(tmp_path) as api:
        task_id = (await api.submit()).events[0].data["task_id"]
        api.world.engine.streams.forget(task_id)
        (await api.ask("GET", f"/api/tasks/{task_id}/events")).problem(410, "events_gone")
        assert (await api.ask("GET", f"/api/tasks/{task_id}")).json["state"] == "completed"


async def test_live(tmp_path: Path) -> None:
    """Two clients follow one task, one from the start and one from the middle, and both see its end."""
    async with api_world(tmp_path) as api:
        api.world.on_task = hold
        async with api.http.post("/api/tasks/submit", json=TASK, headers=HEADERS) as first:
            events = await read_until(first, "held")
            task_id, session_id = (events[0].data[name] for name in ("task_id", "session_id"))
            last = str(events[-1].number)
            async with api.http.get(
                f"/api/tasks/{task_id}/events", headers={**HEADERS, "Last-Event-ID": last}
            ) as second:
                assert api.world.task(task_id).readers == 2
                api.world.workers[session_id].released.set()
                rest = parse(await second.read())
                assert rest == parse(await first.read())
                assert [event.name for event in rest] == ["worker", "task_finish"]


async def test_show(tmp_path: Path) -> None:
    """A task's state can be looked at while it runs and after it has ended, until its retention is over."""
    async with api_world(tmp_path, settings={"task_retention_seconds": 60}) as api:
        api.world.on_task = hold
        async with api.http.post("/api/tasks/submit", json=TASK, headers=HEADERS) as stream:
            events = await read_until(stream, "held")
            task_id, session_id = (events[0].data[name] for name in ("task_id", "session_id"))
            shown = (await api.ask("GET", f"/api/tasks/{task_id}")).json
            assert (shown["state"], shown["finished_at"], shown["error"]) == ("running", None, None)
            api.world.workers[session_id].released.set()
            await stream.read()
        shown = (await api.ask("GET", f"/api/tasks/{task_id}")).json
        assert shown["state"] == "completed"
        assert shown["finished_at"] is not None
        api.world.clock.advance(61)
        api.world.engine.report(ev.Tick())
        (await api.ask("GET", f"/api/tasks/{task_id}")).problem(404, "task_not_found")
        (await api.ask("GET", f"/api/tasks/{task_id}/events")).problem(404, "task_not_found")


async def test_cancel(tmp_path: Path) -> None:
    """A cancelled task ends for its readers at once; cancelling again changes nothing."""
    async with api_world(tmp_path) as api:
        api.world.on_task = hold
        async with api.http.post("/api/tasks/submit", json=TASK, headers=HEADERS) as stream:
            task_id = (await read_until(stream, "held"))[0].data["task_id"]
            cancelled = (await api.ask("DELETE", f"/api/tasks/{task_id}")).json
            assert (cancelled["state"], cancelled["error"]["code"]) == ("cancelled", "task_cancelled")
            finish = parse(await stream.read())[-1]
            assert finish.data["status"] == "cancelled"
        again = (await api.ask("DELETE", f"/api/tasks/{task_id}")).json
        assert (again["state"], again["error"]) == (cancelled["state"], cancelled["error"])


async def until_no_reader(api: Api, task_id: str) -> None:
    """Wait until the service has noticed that the client is gone."""
    await api.world.until(lambda: api.world.task(task_id).readers == 0)


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_client_that_goes_away(tmp_path: Path, comes_back: bool) -> None:
    """A task whose client has gone goes on for a while; then it is cancelled, unless somebody reads again."""
    async with api_world(tmp_path, rules=Rules(disconnect_grace=30)) as api:
        world = api.world
        world.on_task = hold
        async with api.http.post("/api/tasks/submit", json=TASK, headers=HEADERS) as stream:
            events = await read_until(stream, "held")
            task_id, session_id = (events[0].data[name] for name in ("task_id", "session_id"))
            stream.close()
        await until_no_reader(api, task_id)
        assert not world.engine.streams.get(task_id)._readers
        world.clock.advance(29)
        world.engine.report(ev.Tick())
        assert world.task(task_id).state == "running"
        if not comes_back:
            world.clock.advance(2)
            world.engine.report(ev.Tick())
            answer = await api.ask("GET", f"/api/tasks/{task_id}/events")
            assert answer.events[-1].data["error"]["code"] == "client_gone"
            return
        headers = {**HEADERS, "Last-Event-ID": str(events[-1].number)}
        async with api.http.get(f"/api/tasks/{task_id}/events", headers=headers) as stream:
            world.clock.advance(100)
            world.engine.report(ev.Tick())
            assert world.task(task_id).state == "running"
            world.workers[session_id].released.set()
            assert parse(await stream.read())[-1].data["status"] == "completed"


async def test_pings(tmp_path: Path) -> None:
    """A silent stream is kept open by comments, which are no events."""
    async with api_world(tmp_path, settings={"sse_ping_seconds": 0.05}) as api:
        api.world.on_task = hold
        async with api.http.post("/api/tasks/submit", json=TASK, headers=HEADERS) as stream:
            raw = b""
            async with asyncio.timeout(20):
                while b": ping\n\n" not in raw or b"held" not in raw:
                    raw += await stream.content.readany()
            assert b"\r" not in raw
            api.world.workers[parse(raw[: raw.rfind(b"\n\n") + 2])[0].data["session_id"]].released.set()
            assert parse(raw + await stream.read())[-1].name == "task_finish"


async def test_a_oneoff(tmp_path: Path) -> None:
    """A one-off task has a session of its own, which ends with it and takes no others."""
    async with api_world(tmp_path) as api:
        session_id = (await api.submit(task_type="oneoff")).events[0].data["session_id"]
        (await api.submit(session_id=session_id)).problem(409, "session_closed")
        await api.world.until(lambda: api.world.session(session_id).ended)
        shown = (await api.ask("GET", f"/api/sessions/{session_id}")).json
        assert (shown["state"], shown["close_reason"]) == ("closed", "oneoff_done")


async def test_the_workers_input(tmp_path: Path) -> None:
    """The worker gets the metadata and nothing else of the request."""
    bodies: list[bytes] = []

    async def keep(worker, call) -> None:
        bodies.append(call.body)
        await hold(worker, call)

    async with api_world(tmp_path) as api:
        api.world.on_task = keep
        metadata = {"prompt": "x", "n": [1, 2.5, None, True, {"é": "ü"}]}
        api.world.prepare = lambda worker: worker.released.set()
        assert (await api.submit(metadata=metadata)).status == 200
        assert bodies == ['{"metadata":{"prompt":"x","n":[1,2.5,null,true,{"é":"ü"}]}}'.encode()]
