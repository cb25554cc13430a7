"""The link to a worker over its real socket, with workers that behave, break off, and lie."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import socket
import tempfile
import warnings
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from gpu_server.drivers import worker_link
from gpu_server.drivers.worker_link import (
    MAX_ANSWER_BYTES,
    LinkBroken,
    WorkerHealth,
)
from gpu_server.frames import ProtocolFault
from tests.app.played_worker import Call
from tests.drivers.listening_worker import (
    BODY,
    SESSION,
    Heard,
    answers,
    delta,
    health_answer,
    linked,
    listening,
    patient,
)
from tests.drivers.open_files import nothing_left_open

__all__ = ["patient"]


@pytest.fixture
def path() -> Iterator[str]:
    """A socket's path, short enough for its address."""
    with tempfile.TemporaryDirectory(prefix="link") as folder:
        yield str(Path(folder, "worker.sock"))


# -- health -------------------------------------------------------------------------------------------------


async def test_health(path: str) -> None:
    """A worker that is ready says so; asking again takes the same connection."""
    async with listening(path, answers(200, health_answer())) as worker:
        expected = WorkerHealth(status="ready", message=None, stage=None, done=0, total=None, sealed_key=None)
        assert await worker.link.health() == expected
        assert await worker.link.health() == expected
        assert worker.calls == [("GET", "/health", b"")] * 2
        assert worker.connections == 1


async def test_health_tells_of_loading(path: str) -> None:
    """How far the loading is, and why it failed, are passed on."""
    progress = {"stage": "weights", "done": 1.5, "total": 7}
    async with listening(path, answers(200, health_answer(status="loading", progress=progress))) as worker:
        assert await worker.link.health() == WorkerHealth(
            status="loading", message=None, stage="weights", done=1.5, total=7, sealed_key=None
        )
    failed = health_answer(status="failed", message="no weights")
    async with listening(path + "2", answers(200, failed)) as worker:
        health = await worker.link.health()
        assert (health.status, health.message) == ("failed", "no weights")


async def test_health_shows_a_key(path: str) -> None:
    """The public key of a worker that serves sealed tasks is passed on, also while it loads."""
    key = b64encode(bytes(range(32))).decode()
    async with listening(path, answers(200, health_answer(status="loading", sealed_key=key))) as worker:
        assert (await worker.link.health()).sealed_key == key


@pytest.mark.parametrize(
    "key",
    [
        *("", "key", "=" * 44, b64encode(bytes(31)).decode(), b64encode(bytes(33)).decode()),
        *(" " + b64encode(bytes(32)).decode(), b64encode(bytes(32)).decode()[:-2] + "B=", 7, True, [], {}),
        *("\u00e4" * 43 + "=", b64encode(bytes(32)).decode() + "\n"),
    ],
)
async def test_health_with_a_key_that_is_none(path: str, key: Any) -> None:
    """Anything else than 32 bytes in their one form is a fault."""
    async with listening(path, answers(200, health_answer(sealed_key=key))) as worker:
        with pytest.raises(ProtocolFault, match="sealed_key"):
            await worker.link.health()


@pytest.mark.parametrize("other", ["s_2", None, 1, [SESSION], ""])
async def test_health_of_another_session(path: str, other: Any) -> None:
    """A worker that answers for another session is not this one's."""
    async with listening(path, answers(200, health_answer(session_id=other))) as worker:
        with pytest.raises(ProtocolFault, match="another session"):
            await worker.link.health()


@pytest.mark.parametrize(
    "body",
    [b"", b"ready", b"{", b"\xff\xfe", b'{"status": "ready"', b"[" * 60_000, b'"\\ud800"', b"NaN"],
)
async def test_health_that_is_not_json(path: str, body: bytes) -> None:
    """Bytes that are no JSON are a fault, however deep or broken."""
    async with listening(path, answers(200, body)) as worker:
        with pytest.raises(ProtocolFault, match="not JSON"):
            await worker.link.health()


@pytest.mark.parametrize(
    "body",
    [
        [],
        None,
        "ready",
        1,
        {},
        health_answer(status="fine"),
        health_answer(status=None),
        health_answer(status=["ready"]),
        health_answer(status={"ready": 1}),
    ],
)
async def test_health_without_a_status(path: str, body: Any) -> None:
    """JSON that is no health answer is a fault."""
    async with listening(path, answers(200, body)) as worker:
        with pytest.raises(ProtocolFault, match="no valid status"):
            await worker.link.health()


@pytest.mark.parametrize("wrong", ["x", [1], {"a": 1}, True, None, 1, -1.5, 10**30, {"stage": {}}])
async def test_health_of_hostile_types(path: str, wrong: Any) -> None:
    """Fields of a wrong type are left out; what comes through has the type it promises."""
    progress = {"stage": wrong, "done": wrong, "total": wrong}
    for number, fields in enumerate(({"progress": wrong, "message": wrong}, {"progress": progress})):
        answer = json.dumps(health_answer(**fields)).encode()
        async with listening(f"{path}{number}", answers(200, answer)) as worker:
            health = await worker.link.health()
        assert health.status == "ready"
        assert health.message is None or type(health.message) is str
        assert health.stage is None or type(health.stage) is str
        assert isinstance(health.done, int | float)
        assert math.isfinite(health.done)
        assert health.total is None or math.isfinite(health.total)


async def test_health_texts_are_cut(path: str) -> None:
    """What a worker says of itself is kept to a length."""
    answer = health_answer(message="m" * 10_000, progress={"stage": "s" * 10_000})
    async with listening(path, answers(200, answer)) as worker:
        health = await worker.link.health()
        assert health.message is not None
        assert health.stage is not None
        assert (len(health.message), len(health.stage)) == (2000, 200)


@pytest.mark.parametrize("announced", [True, False])
async def test_an_endless_health_answer(path: str, announced: bool) -> None:
    """An answer is read up to its bound, whatever it announces, and not a moment longer."""
    sent = 0

    async def handler(call: Call) -> None:
        nonlocal sent
        how = b"Content-Length: 1000000000000" if announced else b"Transfer-Encoding: chunked"
        call._writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % how)
        while True:
            await call.send(b" " * 8192)
            sent += 8192

    async with listening(path, handler) as worker:
        with pytest.raises(ProtocolFault, match="longer than"):
            await worker.link.health()
    assert sent < 4 << 20  # what the sockets and the reader may hold


async def test_the_longest_health_answer(path: str) -> None:
    """An answer of just the permitted length is taken."""
    raw = orjson.dumps(health_answer()).ljust(MAX_ANSWER_BYTES)
    async with listening(path, answers(200, raw)) as worker:
        assert (await worker.link.health()).status == "ready"


async def test_health_of_nobody(path: str) -> None:
    """Without a socket, and with one that breaks off, the link is broken: that may pass."""
    async with linked(path) as link:
        with pytest.raises(LinkBroken):
            await link.health()

    async def cuts(call: Call) -> None:
        call.cut()

    async with listening(path, cuts) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.health()


@pytest.mark.parametrize(
    "head", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"]
)
async def test_health_that_is_not_http(path: str, head: bytes) -> None:
    """Something that does not speak HTTP, or without measure, is no worker yet."""

    async def handler(call: Call) -> None:
        call._writer.write(head)
        await call._writer.drain()

    async with listening(path, handler) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.health()


@pytest.mark.parametrize("begun", [True, False])
async def test_calls_have_a_deadline(path: str, begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that takes a call and never answers it, or never to the end, breaks the link."""
    monkeypatch.setattr(worker_link, "_CALL", aiohttp.ClientTimeout(total=0.05))
    hanging = asyncio.Event()

    async def handler(call: Call) -> None:
        if begun:
            await call.stream(b" ")
        await hanging.wait()

    async with listening(path, handler) as worker:
        with pytest.raises(LinkBroken):
            await worker.link.health()
        if not begun:
            with pytest.raises(LinkBroken):
                await worker.link.cancel("t_1")
        hanging.set()


# -- who listens --------------------------------------------------------------------------------------------


async def test_listener(path: str) -> None:
    """The listener's uid is compared, where it is known, without a byte being sent."""
    async with listening(path, answers(200, {}), uid=os.geteuid()) as worker:
        worker.link.check_listener()
        assert worker.calls == []
    async with listening(path + "2", answers(200, {}), uid=None) as worker:
        worker.link.check_listener()
        assert worker.connections == 0


async def test_another_listens(path: str) -> None:
    """Another user's listener is a fault."""
    async with listening(path, answers(200, {}), uid=os.geteuid() + 1) as worker:
        with pytest.raises(ProtocolFault, match=f"uid {os.geteuid()} listens"):
            worker.link.check_listener()


@pytest.mark.parametrize("what", ["nothing", "a socket", "a file", "a full queue"])
async def test_nobody_listens(path: str, what: str) -> None:
    """Whatever is there, as long as it takes no connection at once the link is broken, and nothing waits."""
    with contextlib.ExitStack() as stack:
        if what == "a file":
            stack.enter_context(contextlib.closing(os.fdopen(os.open(path, os.O_CREAT))))
        elif what != "nothing":
            bound = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            bound.bind(path)
        if what == "a full queue":
            bound.listen(0)
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(path)
        async with linked(path, uid=os.geteuid()) as link:
            with pytest.raises(LinkBroken, match="nobody listens"):
                link.check_listener()


# -- closing ------------------------------------------------------------------------------------------------


async def test_close(path: str) -> None:
    """Closing, also twice and with streams that were abandoned, leaves nothing open and warns of nothing."""
    with nothing_left_open(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        holding = asyncio.Event()

        async def handler(call: Call) -> None:
            await call.stream(delta(1))
            await holding.wait()

        async with listening(path, handler) as worker:
            reader = Heard()
            async with asyncio.TaskGroup() as group:
                running = group.create_task(worker.link.run("t_1", BODY, reader))
                while reader.seq < 1:  # noqa: ASYNC110  # the reader is in this loop too
                    await asyncio.sleep(0)
                running.cancel()
            await worker.link.close()
            await worker.link.close()
            holding.set()
        del worker, running
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
    assert [str(each.message) for each in warned] == []
