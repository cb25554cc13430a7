"""A small client of the HTTP interface, for the command line, the demo and the tests.

It follows a task to its end, also when the service is killed and started again meanwhile: a stream that
breaks is taken up with `Last-Event-ID`, and a submission whose answer was lost is sent again with the same
`Idempotency-Key`, so that it runs once.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

import aiohttp
import orjson

from gpu_server.drivers.clock import BootClock
from gpu_server.ports import Clock

FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 5.0
MAX_RETRY_AFTER_SECONDS = 30.0
_AWAY = frozenset({502, 503, 504})  # the service says so itself, or a proxy in front of it
_BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """One server-sent event. `id` is None for one without."""

    id: int | None
    event: str
    data: dict[str, Any]


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
    client has never reached is not: its address is probably wrong. Raises `aiohttp.InvalidURL` when `url` is
    none.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        tenant: str | None = None,
        reconnect_seconds: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        headers = {"X-API-Key": api_key} | ({"X-Tenant-ID": tenant} if tenant else {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        try:
            self._http = aiohttp.ClientSession(url, headers=headers, timeout=timeout, read_bufsize=1 << 18)
        except ValueError as error:
            raise aiohttp.InvalidURL(url, str(error)) from error
        self._reconnect_seconds, self._clock = reconnect_seconds, clock or BootClock()
        self._reached = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._http.close()

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request, its JSON answer. Not repeated. Raises `Refused`."""
        data = orjson.dumps(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        async with self._ask(method, path, data=data, headers=headers) as answer:
            return await _json(answer)

    def submit(self, body: Mapping[str, Any], key: str | None = None) -> AsyncGenerator[TaskEvent, None]:
        """Submit a task and give its events, the last being `task_finish`; a `gap` is one too. `key` is its
        `Idempotency-Key`, made here when there is none. Raises `Refused`, or `aiohttp.ClientError` or
        TimeoutError when the service cannot be reached (again)."""
        return self._events("", 0, _submission(body, key))

    def follow(self, task_id: str, after: int = 0) -> AsyncGenerator[TaskEvent, None]:
        """The events of a task behind event `after`, as `submit` gives them; none when that was its last."""
        return self._events(task_id, after, {})

    async def submit_async(self, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
        """Submit a task that runs without a reader; the task as it was accepted. Otherwise as `submit`."""
        request = _submission(body, key)
        request["headers"]["Prefer"] = "respond-async"
        patience = _Patience(self._clock, self._reconnect_seconds)
        while True:
            try:
                async with self._ask("POST", "/api/tasks/submit", **request) as answer:
                    return await _json(answer)
            except (Refused, *_BROKEN) as error:
                await self._wait_out(error, patience, asked_before=patience.tries > 0)

    async def _events(
        self, task_id: str, last: int, submission: Mapping[str, Any]
    ) -> AsyncGenerator[TaskEvent, None]:
        """The events behind `last` of a task, which is to be submitted while it has no id."""
        patience = _Patience(self._clock, self._reconnect_seconds)
        while True:
            problem: Exception = aiohttp.ServerDisconnectedError("the stream ended before its task did")
            try:
                async with self._open(task_id, last, submission) as answer:
                    if answer.status == 204:
                        return
                    if answer.status != 200:
                        await _json(answer)
                    task_id = task_id or answer.headers.get("Location", "").rpartition("/")[2]
                    try:
                        async for event in read_events(answer.content):
                            task_id = task_id or event.data.get("task_id", "")
                            last = last if event.id is None else event.id
                            patience.tries = 0
                            yield event
                            if event.event == "task_finish":
                                return
                    finally:
                        patience.renew()
            except (Refused, *_BROKEN) as error:
                problem = error
            await self._wait_out(problem, patience, asked_before=bool(task_id) or patience.tries > 0)

    def _open(self, task_id: str, last: int, submission: Mapping[str, Any]) -> Any:
        if not task_id:
            return self._ask("POST", "/api/tasks/submit", **submission)
        return self._ask("GET", f"/api/tasks/{task_id}/events", headers={"Last-Event-ID": str(last)})

    @asynccontextmanager
    async def _ask(self, method: str, path: str, **request: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._http.request(method, path, **request) as answer:
            self._reached = True
            yield answer

    async def _wait_out(self, problem: Exception, patience: _Patience, *, asked_before: bool) -> None:
        """Return when it is time to ask again. Raises `problem` when it will not pass."""
        if isinstance(problem, Refused):
            passing = asked_before and problem.status in _AWAY
        else:
            passing = asked_before or self._reached or not isinstance(problem, aiohttp.ClientConnectorError)
        if not passing:
            raise problem
        await patience.wait(problem)


class _Patience:
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


async def read_events(content: aiohttp.StreamReader) -> AsyncIterator[TaskEvent]:
    """Parse an event stream (HTML standard, section 9.2.6, as far as this service uses it)."""
    rest = b""
    async for chunk in content.iter_any():
        *frames, rest = (rest + chunk).split(b"\n\n")
        for frame in frames:
            fields = dict(
                line.split(b": ", 1) for line in frame.split(b"\n") if line and not line.startswith(b":")
            )
            if b"data" in fields:
                number = fields.get(b"id")
                yield TaskEvent(
                    id=int(number) if number else None,
                    event=fields[b"event"].decode(),
                    data=orjson.loads(fields[b"data"]),
                )


async def _json(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    raw = await answer.read()
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        data = {"detail": raw[:500].decode(errors="replace")}
    if answer.status >= 400:
        seconds = answer.headers.get("Retry-After", "")
        retry_after = float(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds) else 0
        raise Refused(answer.status, data, retry_after=retry_after)
    return data  # type: ignore[no-any-return]  # every answer of the interface is an object
