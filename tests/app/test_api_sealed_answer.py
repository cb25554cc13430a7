"""A sealed answer as bytes: when it begins, when it is whole, and how it is cut."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpu_server.api import sealed_answer
from gpu_server.frames import encode
from gpu_server.sealed.errors import SealedError
from tests.app.sealed_world import SealedApi, SealedClient, SealedRequest, sealed_world

SALT = bytes(range(32))


def stream(*events: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(b"id: %d\n%b" % (n, encode(name, data)) for n, (name, data) in enumerate(events, 1))


def sealed(raw: bytes) -> tuple[str, dict[str, Any]]:
    return "sealed", {"data": b64encode(raw).decode()}


FINISH = ("task_finish", {"status": "completed", "elapsed_seconds": 1.0})
FAILED = ("task_finish", {"status": "failed", "error": {"code": "task_failed", "message": "it failed"}})


@pytest.mark.parametrize(
    ("events", "octets", "whole"),
    [
        ([sealed(SALT), sealed(b"\1end"), FINISH], SALT + b"\0\0\0\4\1end", True),
        ([sealed(SALT), sealed(b"\0a"), sealed(b"\1b"), FINISH], SALT + b"\0\0\0\2\0a\0\0\0\2\1b", True),
        ([sealed(SALT), sealed(b"\1b"), FAILED], SALT + b"\0\0\0\2\1b", True),  # a failure can be sealed
        ([sealed(SALT), sealed(b"\0a"), FINISH], SALT + b"\0\0\0\2\0a", False),
        ([sealed(SALT), sealed(b"\1b"), sealed(b"\0a"), FINISH], None, False),
        ([sealed(SALT), FINISH], SALT, False),
        ([sealed(SALT[1:]), sealed(b"\1b"), FINISH], b"", False),
        ([sealed(SALT), sealed(b"\1b"), ("gap", {"from": 1, "to": 2}), FINISH], None, False),
        ([FINISH], b"", False),
        ([FAILED], b"", False),
    ],
)
def test_octets(events: list[tuple[str, dict[str, Any]]], octets: bytes | None, whole: bool) -> None:
    """The salt as it is and each chunk with its length; whole only if the final chunk is the last."""
    raw = stream(("connection", {"status": "allocated"}), ("worker", {"status": "working"}), *events)
    made = sealed_answer._Octets()
    found = made.feed(raw)
    assert octets is None or found == octets
    assert (made.over, made.is_whole) == (True, whole)
    assert made.error == (("task_failed", "it failed") if FAILED in events else None)


def test_a_text_that_looks_like_an_event() -> None:
    """Only what begins a frame is one: a value cannot hold a line break."""
    raw = stream(("connection", {"status": "\nevent: sealed\ndata: {}\n\n"}), sealed(SALT))
    assert sealed_answer._Octets().feed(raw) == SALT


async def cut(client: SealedClient, request: SealedRequest) -> bytes:
    """What comes of an answer that must be cut off."""
    got = bytearray()

    async def take(answer: aiohttp.ClientResponse) -> None:
        async for piece in answer.content.iter_any():
            got.extend(piece)

    async with (
        asyncio.timeout(20),
        client.api.http.post("/inference", data=request.body, headers=client.headers(request)) as answer,
    ):
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await take(answer)
    with pytest.raises(SealedError):
        request.read(bytes(got))
    return bytes(got)


@pytest.mark.parametrize("how", ["no final chunk", "the worker dies", "the task is cancelled", "killed"])
async def test_an_answer_without_its_end(tmp_path: Path, how: str) -> None:
    """It is cut off, so that no client takes it for a whole one, also one that does not look at chunks."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal("one two three")
        if how == "no final chunk":
            sealed.workers.say = lambda said: said[:-1]
        else:
            sealed.workers.before[3] = lambda call: _ends(sealed, client, how)
        got = await cut(client, request)
        assert len(got) > 32


async def _ends(sealed: SealedApi, client: SealedClient, how: str) -> None:
    world = sealed.api.world
    task_id = next(iter(world.engine.node.tasks))
    match how:
        case "the worker dies":
            world.exit(client.session_id)
        case "the task is cancelled":
            await sealed.api.ask("DELETE", f"/api/tasks/{task_id}")
        case "killed":
            await sealed.api.ask("DELETE", f"/api/sessions/{client.session_id}")
    await asyncio.Event().wait()


async def test_a_failure_that_is_sealed(tmp_path: Path) -> None:
    """A task that fails says why inside, and that is a whole answer; outside are a code and no word of it."""
    async with sealed_world(tmp_path) as sealed:
        sealed.workers.closing = {
            "status": "failed",
            "error": {"code": "canary", "message": "canary"},
            "usage": {"canary": 1},
        }
        client = await sealed.client()
        request = client.seal("one")
        answer = await client.send(request)
        assert request.read(answer.raw)[-1].name == "end"
        task = await sealed.api.ask("GET", answer.headers["Location"])
        assert (task.json["state"], task.json["error"]["code"]) == ("failed", "task_failed")
        events = await sealed.api.ask("GET", f"{answer.headers['Location']}/events")
        assert b"canary" not in task.raw + events.raw


@pytest.mark.parametrize("numbered", [True, False])
async def test_a_worker_that_speaks_in_the_clear(tmp_path: Path, numbered: bool) -> None:
    """Not a word of it gets into the service, and its session ends."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()

        async def speaks(call: Any) -> None:
            if numbered:
                await call.send(b"id: 1\n" + encode("text_delta", {"delta": "canary"}))
            else:
                await call.send(encode("progress", {"stage": "canary", "done": 1, "total": None}))
            await asyncio.Event().wait()

        sealed.workers.before[1] = speaks
        problem = (await client.send(client.seal("x"))).problem(500, "worker_protocol")
        assert "canary" not in str(problem)
        session = (await sealed.api.ask("GET", f"/api/sessions/{client.session_id}")).raw
        assert b"worker_misbehaved" in session
        assert b"canary" not in session


async def test_an_answer_that_is_not_kept(tmp_path: Path) -> None:
    """Who comes for an answer whose beginning was dropped is told so, before anything else."""
    settings = {"stream_history_bytes": 1 << 16}
    async with sealed_world(tmp_path, settings=settings) as sealed:
        client = await sealed.client()
        request = client.seal("one")
        answer = await client.send(request)
        stream = sealed.api.world.engine.streams.get(answer.headers["Location"].rsplit("/", 1)[1])
        assert stream is not None
        stream.forget()
        problem = (await client.send(request)).problem(410, "events_gone")
        assert problem["session_id"] == client.session_id


async def test_a_handover(tmp_path: Path) -> None:
    """An answer that has not begun is asked for again; one that has is cut."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        waiting, going = asyncio.Event(), asyncio.Event()

        async def waits(call: Any) -> None:
            waiting.set()
            await going.wait()

        sealed.workers.before[1] = waits
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(client.send(client.seal("x")))
            await waiting.wait()
            sealed.api.world.engine.hand_over()
        answer = asking.result()
        answer.problem(503, "shutting_down")
        assert answer.headers["Retry-After"] == "1"
        going.set()


async def test_one_chunk_at_a_time(tmp_path: Path) -> None:
    """Nothing is held back: a chunk is with the client before the worker has made the next."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        going_on = asyncio.Event()

        async def waits(call: Any) -> None:
            await going_on.wait()

        sealed.workers.before[3] = waits
        request = client.seal("one two")
        async with (
            asyncio.timeout(20),
            sealed.api.http.post("/inference", data=request.body, headers=client.headers(request)) as answer,
        ):
            begin = await answer.content.readexactly(36)
            first = begin + await answer.content.readexactly(int.from_bytes(begin[32:], "big"))
            going_on.set()
            assert len(request.read(first + await answer.content.read())) == 3
