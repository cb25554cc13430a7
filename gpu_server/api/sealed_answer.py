"""A sealed answer as bytes: the worker's salt, and then its chunks as they come, each with its length before
it.

The response begins with the salt, so what fails before that has a status of its own. An answer that was not
given to its end is cut off, never ended: though a client would see it by the missing final chunk as well.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from contextlib import aclosing

import orjson
import structlog
from fastapi import Response
from starlette.types import Receive, Scope, Send

from gpu_server.api.problems import problem, task_problem
from gpu_server.core import events as ev
from gpu_server.core.errors import FailureCode, Refusal, RefusalCode
from gpu_server.core.sessions import Task
from gpu_server.engine import HANDOVER_SECONDS
from gpu_server.sealed.chunks import FINAL, frame
from gpu_server.service import Service
from gpu_server.stream import Stream

MEDIA_TYPE = "application/octet-stream"
SALT_BYTES = 32

_FRAME = re.compile(rb"id: [0-9]+\nevent: ([a-z_]+)\ndata: ([^\n]*)\n\n")

log = structlog.get_logger()


class SealedAnswer(Response):
    """Follows one sealed task, and answers with what its worker has sealed. A client that goes away is a
    reader that has left: the task goes on for DISCONNECT_GRACE_SECONDS, and the same request comes back to
    it."""

    def __init__(self, service: Service, task: Task, stream: Stream) -> None:
        super().__init__()
        self._service, self._task, self._stream = service, task, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client has gone."""
        engine = self._service.engine
        engine.report(ev.ReaderCame(task_id=self._task.id))
        try:
            async with asyncio.TaskGroup() as group:
                gone = group.create_task(_until_gone(receive))
                answering = group.create_task(self._answer(scope, receive, send))
                await asyncio.wait((gone, answering), return_when=asyncio.FIRST_COMPLETED)
                gone.cancel()
                answering.cancel()
        finally:
            engine.report(ev.ReaderLeft(task_id=self._task.id))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        octets = _Octets()
        begun = False
        async with aclosing(self._stream.read()) as reading:
            async for frames in reading:
                data = octets.feed(frames)
                if data and not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self._head()})
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if octets.over:
                    break
        if begun and octets.is_whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif begun:
            # Without the body's end the server closes the connection: nobody can take this for an answer.
            log.info("sealed_answer.cut", task_id=self._task.id)
        else:
            await self._failure(octets)(scope, receive, send)

    def _failure(self, octets: _Octets) -> Response:
        task_id, session_id = self._task.id, self._task.session_id
        headers = {"Location": f"/api/tasks/{task_id}"}
        if octets.has_gap:
            message = f"the beginning of the answer of task {task_id} is not kept any more"
            gone = Refusal(RefusalCode.EVENTS_GONE, message, task_id=task_id, session_id=session_id)
            return problem(gone, headers)
        if not octets.over:
            message = "the service is being replaced by another version; send the same request again"
            return problem(Refusal(RefusalCode.SHUTTING_DOWN, message, retry_after=HANDOVER_SECONDS), headers)
        code, message = octets.error or (FailureCode.WORKER_PROTOCOL, "the worker answered with nothing")
        return task_problem(code, message, headers, task_id=task_id, session_id=session_id)

    def _head(self) -> list[tuple[bytes, bytes]]:
        headers = {
            "content-type": MEDIA_TYPE,
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            "location": f"/api/tasks/{self._task.id}",
        }
        return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


class _Octets:
    """Makes bytes of a sealed task's events. `is_whole`: the task has ended, and its final chunk came
    last."""

    def __init__(self) -> None:
        self.over = False
        self.has_gap = False
        self.is_whole = False
        self.error: tuple[str, str] | None = None
        self._salted = False
        self._final = False

    def feed(self, frames: bytes) -> bytes:
        """What these frames add to the answer. Behind `over` there is nothing more."""
        pieces: list[bytes] = []
        for name, data in _events(frames):
            if name == b"sealed":
                pieces.append(self._piece(base64.b64decode(orjson.loads(data)["data"])))
            elif name == b"gap":
                self.over = self.has_gap = True
            elif name == b"task_finish":
                self._finish(orjson.loads(data))
            if self.over:
                break
        return b"".join(pieces)

    def _piece(self, raw: bytes) -> bytes:
        if not self._salted:
            self.over = len(raw) != SALT_BYTES
            self._salted = not self.over
            return b"" if self.over else raw
        self._final = raw[:1] == FINAL
        return frame(raw)

    def _finish(self, data: dict[str, object]) -> None:
        self.over = True
        self.is_whole = self._final
        error = data.get("error")
        if isinstance(error, dict):
            self.error = (str(error["code"]), str(error["message"]))


def _events(frames: bytes) -> Iterator[tuple[bytes, bytes]]:
    for match in _FRAME.finditer(frames):
        yield match[1], match[2]


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
