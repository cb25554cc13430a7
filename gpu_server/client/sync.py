"""The same client for programs without asyncio: `SyncClient`, and `SyncSealedSession` of it.

Both run the asynchronous ones on an event loop in a thread of their own. For a reader that is slow at most
`READ_AHEAD` events wait there; the rest waits in the service.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, Final, Self, TypeVar

from gpu_server.client.events import TaskEvent
from gpu_server.client.sealed import WASH_SECONDS, Assurance, SealedSession, open_sealed
from gpu_server.client.service import Client
from gpu_server.sealed.attestation import Attestation
from gpu_server.sealed.wash import Verified

T = TypeVar("T")
READ_AHEAD: Final = 256


class SyncClient:
    """`Client` without asyncio. Use as a context manager; any thread may use it. Arguments and exceptions are
    those of `Client`."""

    def __init__(self, url: str, api_key: str, **options: Any) -> None:
        self._loop = _Loop()
        try:
            self._client = self._loop.run(_made(lambda: Client(url, api_key, **options)))
        except BaseException:
            self._loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections and end its thread; a thread that waits for an event is let go, with
        `concurrent.futures.CancelledError`. Closing twice is closing once."""
        self._loop.close(lambda: _end(self._client))

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `Client.call`."""
        return self._loop.run(self._client.call(method, path, body))

    def submit(self, body: Mapping[str, Any], key: str | None = None) -> Iterator[TaskEvent]:
        """As `Client.submit`."""
        return self._loop.iterate(self._client.submit(body, key))

    def follow(self, task_id: str, after: int = 0) -> Iterator[TaskEvent]:
        """As `Client.follow`."""
        return self._loop.iterate(self._client.follow(task_id, after))

    def submit_async(self, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
        """As `Client.submit_async`: it does not wait for the task."""
        return self._loop.run(self._client.submit_async(body, key))

    def open_sealed(self, **options: Any) -> SyncSealedSession:
        """As `open_sealed`."""
        return SyncSealedSession(self._loop, self._loop.run(open_sealed(self._client, **options)))


class SyncSealedSession:
    """`SealedSession` without asyncio; `SyncClient.open_sealed` makes it."""

    def __init__(self, loop: _Loop, session: SealedSession) -> None:
        self._loop, self._session = loop, session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._loop.run(self._session.__aexit__(None, None, None))

    @property
    def session_id(self) -> str:
        """The service's name for it."""
        return self._session.session_id

    @property
    def attestation(self) -> Attestation:
        """The enclave's document, as this client verified it."""
        return self._session.attestation

    @property
    def document(self) -> bytes:
        """As `SealedSession.document`."""
        return self._session.document

    @property
    def assurance(self) -> Assurance:
        """What this client has verified itself, never what an answer claims."""
        return self._session.assurance

    @property
    def washes(self) -> tuple[Verified, ...]:
        """As `SealedSession.washes`."""
        return self._session.washes

    def submit(self, metadata: Mapping[str, Any]) -> Iterator[TaskEvent]:
        """As `SealedSession.submit`."""
        return self._loop.iterate(self._session.submit(metadata))

    def reopen(self) -> None:
        """As `SealedSession.reopen`."""
        self._loop.run(self._session.reopen())

    def certificates_after(self, seconds: float = WASH_SECONDS) -> tuple[Verified, ...]:
        """As `SealedSession.certificates_after`."""
        return self._loop.run(self._session.certificates_after(seconds))


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed, self._turn = False, threading.Lock()  # nothing is started behind the last
        self._thread = threading.Thread(target=self._serve, name="gpu-server-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have this done on the loop; what interrupts the caller, Ctrl-C for one, cancels it."""
        return _wait(self._start(work))

    def iterate(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        """These events, read ahead by at most `READ_AHEAD`: to go to the other thread for each of them would
        cost more than it does."""
        queue: asyncio.Queue[T | _End] = asyncio.Queue(READ_AHEAD)
        pump = self._start(_pump(events, queue))
        try:
            while True:
                for event in self.run(_batch(queue)):
                    if isinstance(event, _End):
                        pump.result()  # raises what went wrong
                        return
                    yield event
        finally:
            pump.cancel()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._turn:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RuntimeError("the client is closed")

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Have the last done, behind all that was started, and end the thread."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            done = asyncio.run_coroutine_threadsafe(last(), self._loop) if last is not None else None
        try:
            if done is not None:
                _wait(done)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()


def _wait(done: Future[T]) -> T:
    try:
        return done.result()
    except BaseException:
        done.cancel()
        raise


async def _made(make: Callable[[], T]) -> T:
    """What must be made where a loop runs."""
    return make()


async def _end(client: Client) -> None:
    """Cancel what still runs on this loop, for whoever waits for it, and only then close the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.__aexit__(None, None, None)


class _End:
    """What a pump puts behind the last event."""


async def _pump(events: AsyncGenerator[T, None], queue: asyncio.Queue[T | _End]) -> None:
    """Move events into the queue, which waits when it is full."""
    try:
        async with aclosing(events):
            async for event in events:
                await queue.put(event)
    except Exception:
        await queue.put(_End())
        raise
    await queue.put(_End())


async def _batch(queue: asyncio.Queue[T | _End]) -> list[T | _End]:
    """One event, as soon as there is one, and those that are there already."""
    batch = [await queue.get()]
    while not queue.empty():
        batch.append(queue.get_nowait())
    return batch
