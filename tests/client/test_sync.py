"""The client without asyncio: the same promises, from a thread that knows no event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import CancelledError, Future
from typing import Any

import aiohttp
import pytest

from gpu_server.client import Refused, SealedStreamBroken, SyncClient, TaskEvent, sync
from gpu_server.client.sync import READ_AHEAD
from tests.app.api_world import KEY, TASK
from tests.app.played_service import Played, played_service, sends
from tests.app.played_worker import frame
from tests.client.sealed_world import ARN, CANARY, PCR0, POOL, SealedService, sealed_world
from tests.client.test_sealed import EXPECTED, PROMPT, STREAMS, said
from tests.client.test_service import EVENTS, FRAMES


def client_of(service: Played) -> SyncClient:
    return SyncClient(f"http://127.0.0.1:{service.port}", KEY, clock=service.clock)


def runs(client: SyncClient) -> bool:
    """Whether the client's own thread is there."""
    return client._loop._thread.is_alive()


async def test_a_task() -> None:
    """Tasks are submitted and followed; a refusal is an exception; the thread ends with the client."""

    def use(service: Played) -> None:
        with client_of(service) as client:
            assert list(client.submit(TASK)) == EVENTS
            assert list(client.follow("t_1", after=2)) == EVENTS[3:]
            assert client.submit_async(TASK) == {"task_id": "t_1"}
            assert client.call("GET", "/api/sessions") == {"task_id": "t_1"}
            with pytest.raises(Refused, match="some detail"):
                client.call("GET", "/api/sessions")
            assert runs(client)
        assert not runs(client)

    answers = sends(*FRAMES[:3], cut=True), sends(*FRAMES[3:]), sends(*FRAMES[3:]), 202, 200, 404
    async with played_service(*answers) as (_, service):
        await asyncio.to_thread(use, service)


async def test_a_sealed_session() -> None:
    """A sealed session is opened, used and ended; what goes wrong is the same exception as ever."""

    def use(service: SealedService) -> None:
        options: dict[str, Any] = {
            "kms_key_arn": ARN,
            "pool": POOL,
            "expect": EXPECTED,
            "keys": service.kms,
            "allow_simulated": True,
        }
        with client_of(service) as client, client.open_sealed(**options) as session:
            assert session.assurance == "simulated"
            assert session.session_id == "s_1"
            assert session.attestation.pcrs[0].hex() == PCR0
            assert said(list(session.submit(PROMPT))) == ["hello", CANARY, "again"]
            session.reopen()
            service.stream = STREAMS["the end dropped"]
            with pytest.raises(SealedStreamBroken):
                list(session.submit(PROMPT))
        assert service.ended == ["s_1"]

    async with sealed_world() as (_, service):
        await asyncio.to_thread(use, service)


async def test_a_reader_that_leaves() -> None:
    """Who stops reading gives up the answer, at once or when that is collected; the client goes on."""

    def use(service: Played) -> TaskEvent:
        with client_of(service) as client:
            for event in client.submit(TASK):
                first = event
                break
            gc.collect()
            unfinished = client.submit(TASK)
            next(unfinished)
            assert list(client.submit(TASK)) == EVENTS
            del unfinished
            return first

    async with played_service(*[sends(*FRAMES)] * 3) as (_, service):
        assert await asyncio.to_thread(use, service) == EVENTS[0]


async def test_reading_ahead() -> None:
    """For a reader that is slow only so many events wait here, and none is lost."""
    many = [frame(number, "text_delta", delta=str(number)) for number in range(1, 3 * READ_AHEAD)]

    def use(service: Played) -> list[str]:
        with client_of(service) as client:
            events = client.submit(TASK)
            first = next(events)
            return [first.data["delta"], *(event.data["delta"] for event in events if "delta" in event.data)]

    async with played_service(sends(*many, FRAMES[4])) as (_, service):
        assert await asyncio.to_thread(use, service) == [str(n) for n in range(1, 3 * READ_AHEAD)]


async def test_a_closed_client() -> None:
    """A client that was closed says so; closing it again changes nothing."""

    def use(service: Played) -> None:
        client = client_of(service)
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.call("GET", "/api/sessions")
        with pytest.raises(RuntimeError, match="closed"):
            list(client.submit(TASK))

    async with played_service() as (_, service):
        await asyncio.to_thread(use, service)


def test_a_wrong_address() -> None:
    """An address that is none leaves no thread behind."""
    before = set(threading.enumerate())
    with pytest.raises(aiohttp.InvalidURL):
        SyncClient("nonsense", KEY)
    left = set(threading.enumerate()) - before
    assert "gpu-server-client" not in {thread.name for thread in left}


async def test_closed_while_somebody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for an event when the client is closed is let go, with an error."""
    asked, over, waits, batch = asyncio.Event(), asyncio.Event(), threading.Event(), sync._batch

    async def noted(queue: Any) -> Any:
        waits.set()
        return await batch(queue)

    monkeypatch.setattr(sync, "_batch", noted)

    async def never(service: Played, request: Any, stream: Any) -> None:
        asked.set()
        await over.wait()

    def read(client: SyncClient) -> None:
        with pytest.raises(CancelledError):
            list(client.submit(TASK))

    async with played_service(never) as (_, service):
        try:
            client = client_of(service)
            reading = asyncio.get_running_loop().run_in_executor(None, read, client)
            await asked.wait()
            assert await asyncio.to_thread(waits.wait, 60)
            await asyncio.to_thread(client.close)
            await reading
        finally:
            over.set()


def test_closed_while_somebody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started when the client is closed is done, or refused: it is never lost between the two."""
    loop, started, closing = sync._Loop(), threading.Event(), threading.Event()
    hand_over = asyncio.run_coroutine_threadsafe

    def slowly(work: Any, to: asyncio.AbstractEventLoop) -> Future[Any]:
        if not started.is_set():
            started.set()
            closing.wait(0.2)  # so long has the close for overtaking it
        return hand_over(work, to)

    async def work() -> int:
        return 7

    async def last() -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    def close() -> None:
        started.wait()
        loop.close(last)
        closing.set()

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", slowly)
    closer = threading.Thread(target=close)
    closer.start()
    try:
        assert loop.run(work()) == 7
    finally:
        closer.join()
    with pytest.raises(RuntimeError, match="the client is closed"):
        loop.run(work())


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts the caller, Ctrl-C for one, cancels what it waits for."""
    cancelled = threading.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def result(future: object) -> None:
        running.wait(60)
        raise KeyboardInterrupt

    running, loop = threading.Event(), sync._Loop()
    monkeypatch.setattr(Future, "result", result)
    loop._loop.call_soon_threadsafe(lambda: loop._loop.call_soon(lambda: loop._loop.call_soon(running.set)))
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(work())
        assert cancelled.wait(60)
    finally:
        loop.close()
