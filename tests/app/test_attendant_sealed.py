"""Attendants of sealed sessions: they tell of the worker's key, and take no word of it once it is ready."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from gpu_server import attendant
from gpu_server.core import events as ev
from gpu_server.core.sessions import Grant, Sealing, TaskType
from gpu_server.engine import Submission
from tests.app.played_worker import Call, PlayedWorker, TaskScript, end, frame
from tests.app.world import World, engine_life, engine_world, machine_world

CANARY = "canary"
SEALING = Sealing(kms_key_arn="arn:aws:kms:eu-central-1:111122223333:key/k", pool="chat")
KEY, OTHER = (b64encode(bytes([number]) * 32).decode() for number in (1, 2))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; an exit, and what was written before it, is waited for until it is there."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 20.0)
    monkeypatch.setattr(attendant, "LOADING_POLL_SECONDS", 0.005)
    monkeypatch.setattr(attendant, "REATTACH_PAUSE_SECONDS", 0.005)


@pytest.fixture
def _no_exit(_short_waits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells of an exit here, so waiting for that is in vain, and short."""
    monkeypatch.setattr(attendant, "EXIT_NEWS_SECONDS", 0.05)


def start(world: World) -> str:
    """A sealed session."""
    return world.engine.request_session(
        "s_1", tenant="a", tier=None, model_id="m", task_preset="p", sealing=SEALING
    )


def submit(world: World) -> str:
    """A sealed task in it; what it holds is the worker's affair."""
    world.engine.open_session(
        "s_1", tenant="a", psk_id="psk", grant=Grant(epoch="", wrapped_key="", grant="")
    )
    return world.engine.submit(
        Submission(
            task_id="t_1",
            tenant="a",
            task_type=TaskType.SESSION,
            tier=None,
            model_id="m",
            task_preset="p",
            session_id="s_1",
            new_session_id="s_2",
            timeout=100.0,
            body=b"sealed",
            psk_id="psk",
        )
    )


def shown(world: World) -> list[str]:
    return [event.key for event in world.told(ev.WorkerKeyShown)]


async def failure(world: World) -> tuple[str, str]:
    """The code with which the session has failed, and all that anybody can read of that."""
    session = world.session("s_1")
    await world.until(lambda: session.ended)
    assert session.failure is not None
    assert world.spool.note("s_1") is None or CANARY not in str(world.spool.note("s_1"))
    return session.failure.code, session.failure.message + session.log_tail


async def test_the_key_is_told_while_the_worker_loads(tmp_path: Path) -> None:
    """Once, however often it is looked at; and the worker is ready with it."""
    async with engine_world(tmp_path) as world:
        world.health = {"status": "loading", "sealed_key": KEY}
        session = world.session(start(world))
        await world.until(lambda: session.worker_key)
        assert (session.state, session.worker_key) == ("preparing", KEY)
        world.workers["s_1"].health["status"] = "ready"
        await world.ready("s_1")
        assert (session.state, shown(world)) == ("ready", [KEY])


async def test_a_worker_without_a_key(tmp_path: Path) -> None:
    """It cannot serve a sealed session, and its start says so; a plain session needs none."""
    async with engine_world(tmp_path) as world:
        start(world)
        code, message = await failure(world)
        assert (code, "key" in message) == ("start_failed", True)
        await world.free()
        world.health["sealed_key"] = KEY
        world.request("s_plain")
        await world.ready("s_plain")
        assert (world.session("s_plain").state, shown(world)) == ("ready", [])


async def test_a_worker_that_shows_another_key(tmp_path: Path) -> None:
    """It has misbehaved, and is taken down."""
    async with engine_world(tmp_path) as world:
        world.health = {"status": "loading", "sealed_key": KEY}
        session = world.session(start(world))
        await world.until(lambda: session.worker_key)
        world.workers["s_1"].health["sealed_key"] = OTHER
        assert (await failure(world))[0] == "worker_protocol"
        assert (session.close_reason, shown(world)) == ("worker_misbehaved", [KEY, OTHER])


async def test_what_it_writes_is_not_read(tmp_path: Path) -> None:
    """Not before it is ready, and not after; a failed start has the worker's message all the same."""
    async with engine_world(tmp_path) as world:
        world.health = {"status": "loading", "sealed_key": KEY}
        session = world.session(start(world))
        await world.until(lambda: session.worker_key)
        world.machine.say(world.container("s_1"), CANARY.encode())
        world.workers["s_1"].health |= {"status": "failed", "message": "no weights"}
        assert await failure(world) == ("start_failed", "no weights")


async def garbage(worker: PlayedWorker, call: Call) -> None:
    await call.stream(f"{CANARY}\n\n".encode())


async def clear_text(worker: PlayedWorker, call: Call) -> None:
    await call.stream(frame(1, "text_delta", delta=CANARY))


async def bad_http(worker: PlayedWorker, call: Call) -> None:
    call._writer.write(f"HTTP/9 {CANARY}\r\n\r\n".encode())
    await call._writer.drain()
    call.cut()


@pytest.mark.usefixtures("_no_exit")
@pytest.mark.parametrize("script", [garbage, clear_text, bad_http])
async def test_no_word_of_a_ready_worker(tmp_path: Path, script: TaskScript) -> None:
    """Whatever it sends instead of sealed events: its session ends, and nobody can read any of it."""
    async with engine_world(tmp_path) as world:
        world.health["sealed_key"] = KEY
        world.on_task = world.on_attach = script
        start(world)
        await world.ready("s_1")
        task_id = submit(world)
        events = await world.events(task_id)
        code, message = await failure(world)
        assert code in ("worker_protocol", "worker_unreachable")
        assert CANARY not in message + repr(events)


async def test_an_exit_has_its_code_alone(tmp_path: Path) -> None:
    """How a worker ended is told, and not what it said last."""
    async with engine_world(tmp_path) as world:
        world.health["sealed_key"] = KEY
        start(world)
        await world.ready("s_1")
        world.machine.say(world.container("s_1"), CANARY.encode())
        world.exit("s_1", 9)
        assert await failure(world) == ("worker_exited", "the worker exited with code 9")


async def sealed_words(worker: PlayedWorker, call: Call) -> None:
    """Two events and the end, from wherever it is asked for."""
    after = int(call.path.partition("after=")[2] or 0)
    frames = [frame(1, "sealed", data="AQID"), frame(2, "sealed", data="BAUG"), end(3)]
    await call.stream(*frames[after:])
    await call.done()


@pytest.mark.parametrize("key", [KEY, OTHER])
async def test_another_life(tmp_path: Path, key: str) -> None:
    """A sealed session is taken up again if its worker still has its key, and what it writes is not read."""
    async with machine_world(tmp_path) as world:
        world.health["sealed_key"] = KEY
        world.on_task = world.on_attach = sealed_words
        async with engine_life(world):
            await world.free()
            start(world)
            await world.ready("s_1")
        world.workers["s_1"].health["sealed_key"] = key
        async with engine_life(world):
            await world.until(lambda: world.told(ev.WorkerReady) or world.session("s_1").ended)
            if key == OTHER:
                assert (await failure(world))[0] == "worker_protocol"
                return
            world.machine.say(world.container("s_1"), CANARY.encode())
            task_id = submit(world)
            data = [event.data for event in await world.events(task_id) if event.name == "sealed"]
            assert data == [{"data": "AQID"}, {"data": "BAUG"}]
            world.exit("s_1", 9)
            assert await failure(world) == ("worker_exited", "the worker exited with code 9")


async def test_a_failed_adoption(tmp_path: Path) -> None:
    """What a worker says of itself when it is found again is not read either: it was ready before."""
    async with machine_world(tmp_path) as world:
        world.health["sealed_key"] = KEY
        async with engine_life(world):
            await world.free()
            start(world)
            await world.ready("s_1")
        world.workers["s_1"].health |= {"status": "failed", "message": CANARY}
        async with engine_life(world):
            code, message = await failure(world)
            assert (code, CANARY in message) == ("start_failed", False)


async def test_a_worker_that_is_gone(tmp_path: Path) -> None:
    """What the service itself found out is told, of a sealed session too."""
    async with machine_world(tmp_path) as world:
        world.health["sealed_key"] = KEY
        async with engine_life(world):
            await world.free()
            start(world)
            await world.ready("s_1")
        del world.machine.containers[world.container("s_1")]
        async with engine_life(world):
            gone = ("service_restarted", "the worker was gone when the service came back")
            assert await failure(world) == gone


async def test_a_task_is_sent_as_what_it_is(tmp_path: Path) -> None:
    """Under its media type, with the very bytes; again after a restart, if the worker may not have it."""
    seen: list[Any] = []

    async def says_nothing(worker: PlayedWorker, call: Call) -> None:
        seen.append((call.media_type, call.body))
        await asyncio.Event().wait()

    async def takes(worker: PlayedWorker, call: Call) -> None:
        seen.append((call.media_type, call.body))
        await sealed_words(worker, call)

    async with machine_world(tmp_path) as world:
        world.health["sealed_key"] = KEY
        world.on_task = says_nothing
        async with engine_life(world):
            await world.free()
            start(world)
            await world.ready("s_1")
            task_id = submit(world)
            async with asyncio.timeout(20):
                while not seen:  # noqa: ASYNC110 (it comes soon)
                    await asyncio.sleep(0)
        world.workers["s_1"].on_task = takes
        async with engine_life(world):
            await world.events(task_id)
    assert seen == 2 * [("application/vnd.gpu-server.sealed", b"sealed")]
