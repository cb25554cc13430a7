"""A small client of the HTTP interface, for the command line, the demo and the tests.

It follows a task to its end: a stream that breaks is taken up again with `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import orjson

RECONNECT_TRIES = 5
RECONNECT_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """One server-sent event. `id` is None for one without."""

    id: int | None
    event: str
    data: dict[str, Any]


class Refused(Exception):
    """The service refused a request: its status, its stable `code` and its message."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status, self.problem = status, problem
        self.code = str(problem.get("code", "unknown"))
        super().__init__(f"{self.code} ({status}): {problem.get('detail', 'no detail')}")


class Client:
    """Talks to one service as one tenant. Use as an async context manager.

    Raises `aiohttp.InvalidURL` when `url` is none.
    """

    def __init__(self, url: str, api_key: str, *, tenant: str | None = None) -> None:
        headers = {"X-API-Key": api_key} | ({"X-Tenant-ID": tenant} if tenant else {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        try:
            self._http = aiohttp.ClientSession(url, headers=headers, timeout=timeout, read_bufsize=1 << 18)
        except ValueError as error:
            raise aiohttp.InvalidURL(url, str(error)) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._http.close()

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request, its JSON answer. Raises `Refused`."""
        data = orjson.dumps(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        async with self._http.request(method, path, data=data, headers=headers) as answer:
            return await _json(answer)

    async def submit(self, body: Mapping[str, Any]) -> AsyncIterator[TaskEvent]:
        """Submit a task and give its events, the last being `task_finish`. Raises `Refused`, or
        `aiohttp.ClientError` when the service cannot be reached again."""
        task_id, last, tries = "", 0, 0
        while True:
            try:
                async with self._open(task_id, last, body) as answer:
                    if answer.status != 200:
                        await _json(answer)
                    async for event in read_events(answer.content):
                        task_id = task_id or event.data["task_id"]
                        last, tries = event.id or last, 0
                        yield event
                        if event.event == "task_finish":
                            return
            except (aiohttp.ClientError, TimeoutError):
                if not task_id or tries >= RECONNECT_TRIES:
                    raise
            if not task_id:
                raise aiohttp.ServerDisconnectedError("the stream ended before its first event")
            tries += 1
            await asyncio.sleep(RECONNECT_PAUSE_SECONDS * tries)

    def _open(
        self, task_id: str, last: int, body: Mapping[str, Any]
    ) -> Any:  # aiohttp's request context manager has no public name
        if not task_id:
            headers = {"Content-Type": "application/json"}
            return self._http.post("/api/tasks/submit", data=orjson.dumps(body), headers=headers)
        return self._http.get(f"/api/tasks/{task_id}/events", headers={"Last-Event-ID": str(last)})


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
        raise Refused(answer.status, data)
    return data  # type: ignore[no-any-return]  # every answer of the interface is an object
