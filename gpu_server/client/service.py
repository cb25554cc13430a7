"""A small client of the HTTP interface, for the command line, the demo and the tests.

It follows a task to its end, also when the service is killed and started again meanwhile: a stream that
breaks is taken up with `Last-Event-ID`, and a submission whose answer was lost is sent again with the same
`Idempotency-Key`, so that it runs once.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, Self
from uuid import uuid4

import aiohttp
import orjson

from gpu_server.client.events import TaskEvent, Unreadable, read_events
from gpu_server.drivers.clock import BootClock
from gpu_server.ports import Clock

FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 5.0
MAX_RETRY_AFTER_SECONDS = 30.0
SILENCE_SECONDS: Final = 120.0
"""Eight times what a stream is silent for at most, by the default of SSE_PING_SECONDS."""
MAX_ANSWER_BYTES: Final = 32 << 20
"""Of an answer that is no stream."""
AWAY = frozenset({502, 503, 504})
"""The service says so itself, or a proxy in front of it."""
_BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)


class Refused(Exception):
    """The service refused a request: its status, its stable `code` and its message. `retry_after` is in
    seconds, 0 where the service named none."""

    def __init__(self, status: int, problem: Mapping[str, Any], *, retry_after: float = 0) -> None:
        self.status, self.problem, self.retry_after = status, problem, retry_after
        self.code = str(problem.get("code", "unknown"))
        super().__init__(f"{self.code} ({status}): {problem.get('detail', 'no detail')}")


class Client:
    """Talks to one service as one tenant. Use as an async context manager.

    A service that goes away is waited for, `reconnect_seconds` after its last sign of life. One that this
    client has never reached is not: its address is probably wrong. A connection on which nothing came for
    `silence_seconds` is given up and made anew, where asking again does no harm. Redirections are refusals,
    and no cookies are kept. Raises `aiohttp.InvalidURL` when `url` is none.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        tenant: str | None = None,
        reconnect_seconds: float = 60.0,
        silence_seconds: float = SILENCE_SECONDS,
        clock: Clock | None = None,
    ) -> None:
        headers = {"X-API-Key": api_key} | ({"X-Tenant-ID": tenant} if tenant else {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self._impatient = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence_seconds)
        try:
            self._http = aiohttp.ClientSession(
                url,
                headers=headers,
                timeout=timeout,
                read_bufsize=1 << 18,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        except ValueError as error:
            raise aiohttp.InvalidURL(url, str(error)) from error
        self.tenant, self.clock = tenant, clock or BootClock()
        self._reconnect_seconds, self._reached = reconnect_seconds, False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._http.close()

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request, its JSON answer. Not repeated. Raises `Refused`."""
        data = orjson.dumps(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        async with await self._ask(method, path, data=data, headers=headers) as answer:
            return await _json(answer)

    async def call_once(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, key: str | None = None
    ) -> dict[str, Any]:
        """As `call`, and asked again with the same `Idempotency-Key` when the answer was lost. Raises
        `Refused`, or `aiohttp.ClientError` or TimeoutError when the service cannot be reached (again)."""
        return await self._insist(method, path, _submission(body, key) if body is not None else {})

    def patience(self) -> Patience:
        """For as long as this client waits for a service that is away."""
        return Patience(self.clock, self._reconnect_seconds)

    def submit(self, body: Mapping[str, Any], key: str | None = None) -> AsyncGenerator[TaskEvent, None]:
        """Submit a task and give its events, the last being `task_finish`; a `gap` is one too. `key` is its
        `Idempotency-Key`, made here when there is none. Raises `Refused`, or `aiohttp.ClientError` or
        TimeoutError when the service cannot be reached (again)."""
        return self.submit_bytes("/api/tasks/submit", **_submission(body, key))

    def submit_bytes(
        self,
        path: str,
        data: bytes,
        headers: Mapping[str, str],
        *,
        complete: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[TaskEvent, None]:
        """As `submit`, of bytes that make a task when they are posted to `path`, and the same one when they
        are posted again. `complete` is asked when the stream breaks: whether there is nothing left to come
        back for."""
        return self._events("", 0, (path, {"data": data, "headers": headers}), complete)

    def follow(self, task_id: str, after: int = 0) -> AsyncGenerator[TaskEvent, None]:
        """The events of a task behind event `after`, as `submit` gives them; none when that was its last."""
        return self._events(task_id, after)

    async def submit_async(self, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
        """Submit a task that runs without a reader; the task as it was accepted. Otherwise as `submit`."""
        request = _submission(body, key)
        request["headers"]["Prefer"] = "respond-async"
        return await self._insist("POST", "/api/tasks/submit", request)

    async def _insist(self, method: str, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        patience = self.patience()
        while True:
            try:
                async with await self._ask(method, path, timeout=self._impatient, **request) as answer:
                    return await _json(answer)
            except (Refused, *_BROKEN) as error:
                await self._wait_out(error, patience, asked_before=patience.tries > 0)

    async def _events(
        self,
        task_id: str,
        last: int,
        submission: tuple[str, Mapping[str, Any]] = ("", {}),
        complete: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[TaskEvent, None]:
        """The events behind `last` of a task, which is to be submitted while it has no id."""
        patience = self.patience()
        while True:
            problem: Exception = aiohttp.ServerDisconnectedError("the stream ended before its task did")
            try:
                async with await self._open(task_id, last, submission) as answer:
                    if answer.status == 204:
                        return
                    if answer.status != 200:
                        await _json(answer)
                        raise Unreadable(f"the service answered {answer.status} instead of a stream")
                    task_id = task_id or _task_of(answer)
                    try:
                        async with aclosing(read_events(answer.content)) as events:
                            async for event in events:
                                task_id = task_id or _id(event.data.get("task_id"))
                                last = last if event.id is None else event.id
                                patience.tries = 0
                                yield event
                                if event.event == "task_finish":
                                    return
                    finally:
                        patience.renew()
            except (Refused, *_BROKEN) as error:
                problem = error
            if complete():
                return
            await self._wait_out(problem, patience, asked_before=bool(task_id) or patience.tries > 0)

    async def _open(
        self, task_id: str, last: int, submission: tuple[str, Mapping[str, Any]]
    ) -> aiohttp.ClientResponse:
        if not task_id:
            path, request = submission
            return await self._ask("POST", path, timeout=self._impatient, **request)
        headers = {"Last-Event-ID": str(last)}
        return await self._ask(
            "GET", f"/api/tasks/{task_id}/events", timeout=self._impatient, headers=headers
        )

    async def _ask(self, method: str, path: str, **request: Any) -> aiohttp.ClientResponse:
        """One request, its answer to be used as a context manager. This is none itself, by `contextlib`: a
        loop that ends closes all generators, in any order, and would close that one under its user."""
        answer = await self._http.request(method, path, allow_redirects=False, **request)
        self._reached = True
        return answer

    async def _wait_out(self, problem: Exception, patience: Patience, *, asked_before: bool) -> None:
        """Return when it is time to ask again. Raises `problem` when it will not pass."""
        if isinstance(problem, Refused):
            passing = asked_before and problem.status in AWAY
        else:
            passing = asked_before or self._reached or not isinstance(problem, aiohttp.ClientConnectorError)
        if not passing:
            raise problem
        await patience.wait(problem)


class Patience:
    """How long a service that is away is waited for, and the pauses until it is asked again.

    They grow, and are not the same for any two clients, so that a service that comes back is not overrun.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.tries = 0
        self._clock, self._seconds = clock, seconds
        self.renew()

    def renew(self) -> None:
        """A sign of life."""
        self._until = self._clock.now() + self._seconds

    async def wait(self, problem: Exception) -> None:
        """Pause before the next try; the last one is at the very end. Raises `problem` after that."""
        now = self._clock.now()
        if now >= self._until:
            raise problem
        pause = min(FIRST_PAUSE_SECONDS * 2 ** min(self.tries, 10), MAX_PAUSE_SECONDS)
        pause *= random.uniform(0.5, 1)
        if isinstance(problem, Refused):
            pause += min(problem.retry_after, MAX_RETRY_AFTER_SECONDS)
        self.tries += 1
        await self._clock.sleep_until(min(now + pause, self._until))


def _submission(body: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Idempotency-Key": key or uuid4().hex}
    return {"data": orjson.dumps(body), "headers": headers}


async def _json(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    raw = bytearray()
    async for piece in answer.content.iter_any():
        raw += piece
        if len(raw) > MAX_ANSWER_BYTES:
            raise Unreadable("an answer is too long")
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        data = None
    if answer.status >= 300:
        if not isinstance(data, dict):
            elsewhere = answer.headers.get("Location")
            said = f"it is said to be at {elsewhere}" if elsewhere else raw.decode(errors="replace")
            data = {"detail": said[:500]}
        seconds = answer.headers.get("Retry-After", "")
        retry_after = float(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds) else 0
        raise Refused(answer.status, data, retry_after=retry_after)
    if not isinstance(data, dict):
        raise Unreadable("an answer is no JSON object")
    return data


def _task_of(answer: aiohttp.ClientResponse) -> str:
    """The id of the task whose events these are, "" where the answer does not say."""
    return _id(answer.headers.get("Location", "").rpartition("/")[2])


def _id(named: object) -> str:
    """An id that can stand in a path, "" for what is none."""
    return named if isinstance(named, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,128}", named) else ""
