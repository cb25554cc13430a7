"""Answers of the OpenAI routes on the wire: when the head goes out, what keeps a stream alive, and what
becomes of a task whose client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import replace

import structlog
from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from gpu_server.api.openai_errors import OpenAIError
from gpu_server.api.openai_stream import Chunks, Whole
from gpu_server.core import events as ev
from gpu_server.core.errors import Refusal
from gpu_server.core.sessions import Task
from gpu_server.service import Service
from gpu_server.stream import Stream

HEAD_HELD_SECONDS = 1.0
"""How long the head of a stream waits for its first text: a failure until then has a status of its own."""
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}
_PING = b": ping\n\n"

log = structlog.get_logger()


class TaskAnswer(Response):
    """Follows one task, and answers with what it says, while the client is there.

    A task whose client goes away is cancelled at once: this protocol has no way to come back. With `keyed` it
    has one, the same `Idempotency-Key` again; then the task has as long for that as any other.
    """

    def __init__(
        self,
        service: Service,
        task: Task,
        stream: Stream,
        answer: Chunks | Whole,
        headers: Mapping[str, str],
        *,
        keyed: bool,
    ) -> None:
        super().__init__()
        self._service, self._task, self._stream = service, task, stream
        self._answer, self._more_headers, self._keyed = answer, headers, keyed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client has gone."""
        engine = self._service.engine
        engine.report(ev.ReaderCame(task_id=self._task.id))
        client_gone = False
        try:
            async with asyncio.TaskGroup() as group:
                gone = group.create_task(_until_gone(receive))
                answering = group.create_task(self._follow(send))
                await asyncio.wait((gone, answering), return_when=asyncio.FIRST_COMPLETED)
                client_gone = not answering.done()
                gone.cancel()
                answering.cancel()
        finally:
            if not self._keyed and not self._task.ended:
                if client_gone:
                    log.info("task.client_gone", task_id=self._task.id)
                with suppress(Refusal):  # the service is being replaced: then the next life sees to it
                    engine.decide(ev.TaskCancelRequested(task_id=self._task.id, tenant=self._task.tenant))
            engine.report(ev.ReaderLeft(task_id=self._task.id))

    async def _follow(self, send: Send) -> None:
        wire = _Wire(send, self._more_headers)
        if isinstance(self._answer, Chunks):
            await self._send_chunks(self._answer, wire)
        else:
            await self._send_whole(self._answer, wire)

    async def _send_whole(self, whole: Whole, wire: _Wire) -> None:
        async with aclosing(self._stream.read()) as reading:
            async for frames in reading:
                whole.feed(frames)
                if whole.over:
                    break
        if not whole.over:
            whole.cut_off()
        if whole.failure is not None:
            await self._send_failure(whole.failure, wire)
        else:
            await wire.send(200, {}, whole.body())

    async def _send_chunks(self, chunks: Chunks, wire: _Wire) -> None:
        async with asyncio.TaskGroup() as group:
            pulse = group.create_task(self._pulse(chunks, wire))
            async with aclosing(self._stream.read()) as reading:
                async for frames in reading:
                    data = chunks.feed(frames)
                    if chunks.begun and not wire.begun and chunks.failure is None:
                        await wire.begin(_STREAM_HEADERS)
                    if wire.begun and (data := chunks.comments() + data):
                        await wire.write(data)
                    if chunks.over:
                        break
            pulse.cancel()
        if not chunks.over:
            chunks.cut_off()
        if chunks.failure is not None and not wire.begun:
            await self._send_failure(chunks.failure, wire)
            return
        if chunks.failure is not None:
            await wire.write(b"data: " + chunks.failure.body() + b"\n\n")
        await wire.end()

    async def _send_failure(self, failure: OpenAIError, wire: _Wire) -> None:
        """With a key the same request gets the same answer, and an end in failure is one."""
        if self._keyed and self._task.ended:
            failure = replace(failure, retry_after=None)
        await wire.send(failure.status, failure.headers(), failure.body())

    async def _pulse(self, chunks: Chunks, wire: _Wire) -> None:
        """Begin the stream when its head has waited long enough, and then show now and then that it lives."""
        clock = self._service.clock
        await clock.sleep_until(clock.now() + HEAD_HELD_SECONDS)
        if not wire.begun:
            await wire.begin(_STREAM_HEADERS)
            if data := chunks.comments():
                await wire.write(data)
        while True:
            await clock.sleep_until(clock.now() + self._service.settings.sse_ping_seconds)
            await wire.write(_PING)


class _Wire:
    """One answer's way out: the head once, and bytes in the order of the calls, also of several tasks'.

    Who begins it may be cancelled before the head is out; then the next call sends that first.
    """

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self.begun = False
        self._send, self._headers = send, headers
        self._head: Message | None = None  # while it has still to be sent
        self._turn = asyncio.Lock()

    async def begin(self, headers: Mapping[str, str], status: int = 200) -> None:
        """Send the head."""
        self.begun = True
        merged = {**self._headers, **headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in merged.items()]
        self._head = {"type": "http.response.start", "status": status, "headers": raw}
        async with self._turn:
            await self._send_head()

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send some of the body."""
        async with self._turn:
            await self._send_head()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send_head(self) -> None:
        if self._head is not None:
            await self._send(self._head)
            self._head = None

    async def end(self) -> None:
        """There is no more."""
        await self.write(b"", more=False)

    async def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole answer of JSON."""
        form = {"content-type": "application/json", "content-length": str(len(body))}
        await self.begin({**headers, **form}, status)
        await self.write(body, more=False)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
