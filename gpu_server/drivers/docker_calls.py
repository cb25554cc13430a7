"""How the engine is called: one client, a few threads, every call bounded, and none while it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from docker import APIClient
from docker.errors import APIError

from gpu_server.core.errors import FailureCode
from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.breaker import Breaker, Verdict
from gpu_server.drivers.docker_api import ENGINE_ERRORS, connect, short
from gpu_server.ports import OutputLost, RuntimeUnreachable, StartRefused

T = TypeVar("T")

_UNAVAILABLE: Final = 503
_THREADS: Final = 8
_TRY_SECONDS: Final = 5.0


class EngineCalls:
    """Calls to one engine, which is asked nothing but a sign of life while its `Breaker` is open.

    `timeout` bounds one call, in seconds. An engine's own error (`APIError`) is an answer, and the caller's.
    """

    def __init__(self, docker_host: str | None, timeout: float, breaker: Breaker | None = None) -> None:
        self.docker_host = docker_host
        self._timeout = timeout
        self._breaker = breaker or Breaker()
        self._client: APIClient | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def is_open(self) -> bool:
        return self._pool is not None

    def connect(self) -> APIClient:
        """A client of the caller's own; blocks. Raises `ENGINE_ERRORS`."""
        return connect(self.docker_host, self._timeout)

    async def open(self) -> None:
        """Connect. Raises `RuntimeUnreachable`, and is closed then."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")
        try:
            with unreachable():
                self._client = await self._submit(self.connect)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of client and threads; one that is held by a call ends with it."""
        pool, self._pool = self._pool, None
        client, self._client = self._client, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        if client is not None:
            client.close()

    async def ping(self, limit: float) -> None:
        """A sign of life within `limit` seconds, open or not, else `RuntimeUnreachable`."""

        def ping() -> None:
            connect(self.docker_host, limit).close()  # agreeing on a version is a question and an answer

        try:
            await call_in_thread(ping, limit=limit, name="docker-ping")
        except APIError as error:
            self._breaker.answered()
            raise RuntimeUnreachable(f"the Docker engine answered: {short(error)}") from error
        except (TimeoutError, *ENGINE_ERRORS) as error:
            self._breaker.failed(time.monotonic())
            raise RuntimeUnreachable(f"the Docker engine is not reachable: {short(error)}") from error
        self._breaker.answered()

    async def call(self, do: Callable[[APIClient], T], discard: Callable[[T], None] | None = None) -> T:
        """Run `do` in the pool; `discard` gets what came after the caller had given up.

        Raises `RuntimeUnreachable` when no answer came, or none is to be expected, and whatever `do` raises.
        """
        client = self._client
        if client is None:
            raise RuntimeUnreachable("the runtime is not open")
        return await self._submit(lambda: do(client), discard)

    async def _submit(self, do: Callable[[], T], discard: Callable[[T], None] | None = None) -> T:
        now = time.monotonic()
        verdict = self._breaker.ask(now)
        if verdict is Verdict.REFUSE:
            raise RuntimeUnreachable(self._breaker.why(now))
        if verdict is Verdict.TRY:
            await self.ping(min(self._timeout, _TRY_SECONDS))
        if self._pool is None:
            raise RuntimeUnreachable("the runtime is not open")
        future = self._pool.submit(do)
        late = True
        try:
            # Longer than the client's own limit: a call may wait for a thread first.
            async with asyncio.timeout(self._timeout + 5):
                result = await asyncio.wrap_future(future)
            late = False
        except (APIError, StartRefused, OutputLost):
            self._breaker.answered()
            raise
        except TimeoutError as error:
            self._breaker.failed(time.monotonic())
            raise RuntimeUnreachable("the Docker engine did not answer in time") from error
        except ENGINE_ERRORS as error:
            self._breaker.failed(time.monotonic())
            raise RuntimeUnreachable(f"the Docker engine is not reachable: {short(error)}") from error
        finally:
            if late and discard is not None:
                future.add_done_callback(lambda done: _drop(done, discard))
        self._breaker.answered()
        return result


def _drop(done: Future[T], discard: Callable[[T], None]) -> None:
    if not done.cancelled() and done.exception() is None:
        discard(done.result())


@contextlib.contextmanager
def unreachable() -> Iterator[None]:
    """Where nothing may be refused, an engine's error answer means that nothing is known."""
    try:
        yield
    except APIError as error:
        raise RuntimeUnreachable(f"the Docker engine answered: {short(error)}") from error


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Where a worker is being started, an engine's error answer is a refusal."""
    try:
        yield
    except APIError as error:
        if error.status_code == _UNAVAILABLE:
            raise RuntimeUnreachable(f"the Docker engine answered: {short(error)}") from error
        raise StartRefused(FailureCode.START_FAILED, short(error)) from error
