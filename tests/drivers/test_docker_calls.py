"""Calls to an engine, played, that answers, refuses and hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import orjson
import pytest
from docker import APIClient
from docker.errors import APIError

from gpu_server.drivers import docker_calls
from gpu_server.drivers.breaker import Breaker
from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.docker_body import LABEL_INSTANCE
from gpu_server.drivers.docker_calls import EngineCalls, refused, unreachable
from gpu_server.drivers.docker_events import NEVER_STARTED
from gpu_server.ports import OutputLost, RuntimeUnreachable, StartRefused, StartUnanswered
from tests.drivers.played_engine import PlayedEngine, StandingClock

PATIENCE = 30.0
LIMIT = 0.2
PAUSE = 5.0


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[PlayedEngine]:
    async with PlayedEngine(tmp_path / "docker.sock") as engine:
        yield engine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    """The clock of the calls' breaker."""
    clock = StandingClock()
    monkeypatch.setattr(docker_calls, "time", clock)
    return clock


@pytest.fixture
async def calls(engine: PlayedEngine, clock: StandingClock) -> AsyncIterator[EngineCalls]:
    calls = EngineCalls(engine.host, PATIENCE, Breaker(failures=3, pause=PAUSE))
    await calls.open()
    yield calls
    calls.close()


@contextlib.contextmanager
def hung(engine: PlayedEngine, calls: EngineCalls) -> Iterator[None]:
    """The engine hangs, and is soon given up; before and after, calls have time."""
    assert calls._client is not None
    engine.hung, calls._timeout, calls._client.timeout = True, LIMIT, LIMIT
    yield
    engine.hung, calls._timeout, calls._client.timeout = False, PATIENCE, PATIENCE


def version(client: APIClient) -> str:
    return str(client.version()["ApiVersion"])


async def fail(engine: PlayedEngine, calls: EngineCalls) -> int:
    """Three calls to an engine that hangs; how often it was asked when they had failed."""
    before = len(engine.asked)
    failed = await asyncio.gather(*(calls.call(version) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(one, RuntimeUnreachable) for one in failed)
    await engine.until_asked(before + 3)
    return len(engine.asked)


async def test_a_hung_engine_is_soon_asked_no_more(
    engine: PlayedEngine, calls: EngineCalls, clock: StandingClock
) -> None:
    """After three timeouts calls fail without being made and hold no thread; the first answer ends that."""
    with hung(engine, calls):
        asked = await fail(engine, calls)
        with pytest.raises(RuntimeUnreachable, match="has not answered for"):
            await calls.call(version)
        assert len(engine.asked) == asked
    clock.now += PAUSE
    assert await calls.call(version) == "1.41"


async def test_while_it_hangs_only_one_looks_for_a_sign_of_life(
    engine: PlayedEngine, calls: EngineCalls, clock: StandingClock
) -> None:
    """Of many callers one asks, in a thread of its own, and the call itself is made only after an answer."""
    made: list[str] = []
    with hung(engine, calls):
        asked = await fail(engine, calls)
        clock.now += PAUSE
        many = (calls.call(lambda client: made.append("call")) for _ in range(20))
        found = await asyncio.gather(*many, return_exceptions=True)
        assert all(isinstance(one, RuntimeUnreachable) for one in found)
        await engine.until_asked(asked + 1)
    assert len(engine.asked) == asked + 1
    assert made == []


async def test_a_sign_of_life_closes_the_breaker(engine: PlayedEngine, calls: EngineCalls) -> None:
    """A ping is always made, in its own limit, and what it finds counts for the calls."""
    with hung(engine, calls):
        for _ in range(3):
            with pytest.raises(RuntimeUnreachable):
                await calls.ping(0.01)
        with pytest.raises(RuntimeUnreachable, match="has not answered for"):
            await calls.call(version)
    await calls.ping(PATIENCE)
    assert await calls.call(version) == "1.41"


async def test_an_error_of_the_engine_is_an_answer(calls: EngineCalls) -> None:
    """However often the engine refuses, it is asked again; the refusal reaches the caller."""

    def refuse(client: APIClient) -> None:
        raise APIError("no")

    def start_refused(client: APIClient) -> None:
        raise StartRefused("start_failed", "no")

    def lost(client: APIClient) -> None:
        raise OutputLost("no")

    for _ in range(3):
        for do, error in ((refuse, APIError), (start_refused, StartRefused), (lost, OutputLost)):
            with pytest.raises(error):
                await calls.call(do)
    assert await calls.call(version) == "1.41"


@pytest.mark.usefixtures("clock")
async def test_connections_that_fail_count_like_timeouts(tmp_path: Path) -> None:
    """An engine that is not there is asked three times, then after a pause only."""
    calls = EngineCalls(f"unix://{tmp_path}/none.sock", LIMIT)
    for _ in range(3):
        with pytest.raises(RuntimeUnreachable, match="not reachable"):
            await calls.open()
    with pytest.raises(RuntimeUnreachable, match="has not answered for"):
        await calls.open()
    with pytest.raises(RuntimeUnreachable, match="not open"):
        await calls.call(version)


async def test_what_comes_after_the_caller_has_gone_is_let_go_of(calls: EngineCalls) -> None:
    """A result that nobody waits for any more is handed to `discard`."""
    release = threading.Event()
    let_go: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def slow(client: APIClient) -> str:
        release.wait(30)
        return "late"

    def discard(late: str) -> None:
        loop.call_soon_threadsafe(let_go.put_nowait, late)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await calls.call(slow, discard)
    release.set()
    async with asyncio.timeout(30):
        assert await let_go.get() == "late"


def test_what_an_error_answer_means_depends_on_what_was_asked() -> None:
    """A start is refused with the engine's reason; of anything else nothing is known."""
    with pytest.raises(StartRefused, match="no such device"), refused():
        raise APIError("500", explanation="no such device")
    with pytest.raises(RuntimeUnreachable, match="no such device"), unreachable():
        raise APIError("500", explanation="no such device")


@pytest.mark.parametrize("breaks", ["/containers/w/json", "/containers/c/start"])
async def test_an_order_to_start_without_an_answer(engine: PlayedEngine, breaks: str) -> None:
    """An engine that breaks off when it was ordered to start a worker is told apart from one that was not."""
    content = orjson.dumps(
        {
            "Id": "c",
            "Name": "/w",
            "Config": {"Labels": {LABEL_INSTANCE: "here"}},
            "State": {"StartedAt": NEVER_STARTED, "Running": False},
        }
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    engine.answers = {"/containers/w/json": head + content, "/events": head[:8], breaks: b""}
    runtime = DockerRuntime("here", engine.host)
    await runtime.open(lambda exit_: None)
    try:
        with pytest.raises(RuntimeUnreachable) as raised:
            await runtime.start("w")
        assert isinstance(raised.value, StartUnanswered) is (breaks == "/containers/c/start")
        assert ("/containers/c/start" in engine.asked) is (breaks == "/containers/c/start")
    finally:
        await runtime.close()
