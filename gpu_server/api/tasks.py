"""`/api/tasks`: submit, look, follow, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Header, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from sse_starlette import EventSourceResponse, ServerSentEvent

from gpu_server.api.auth import Tenant, TheService
from gpu_server.api.bodies import BoundedRoute, ClosedBody
from gpu_server.api.preferences import IdempotencyKeys, RespondsAsync
from gpu_server.api.views import TaskView, task_view
from gpu_server.core import events as ev
from gpu_server.core.admission import owned_task
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import TaskType
from gpu_server.core.slots import Tier
from gpu_server.engine import Submission
from gpu_server.service import Service, new_id
from gpu_server.stream import Stream

router = APIRouter(prefix="/api/tasks", tags=["tasks"], route_class=BoundedRoute)

SSE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events", "content": {"text/event-stream": {}}}
}
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"description": "Accepted; `Location` is the task's URL", "model": TaskView}
}


class SubmitBody(ClosedBody):
    """A task. `metadata` is the worker's input and is not looked into."""

    task_type: Literal["session", "oneoff"]
    model_id: Annotated[str, Field(min_length=1, max_length=256)]
    task_preset: Annotated[str, Field(min_length=1, max_length=128)]
    task_difficulty: Literal["low", "high"] | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@router.post("/submit", response_class=EventSourceResponse, responses={**SSE, **ACCEPTED})
async def submit(
    body: SubmitBody, service: TheService, tenant: Tenant, keys: IdempotencyKeys, detached: RespondsAsync
) -> Response:
    """Submit a task and follow its events. The first is `connection`, the last `task_finish`.

    With `Prefer: respond-async` the answer is 202, with the task's URL in `Location`."""
    if body.session_id is not None and body.task_type == "oneoff":
        raise Refusal(
            RefusalCode.INVALID_REQUEST, "a oneoff task has a session of its own: leave out session_id"
        )
    submission = Submission(
        task_id=new_id("t"),
        tenant=tenant,
        task_type=TaskType(body.task_type),
        tier=Tier(body.task_difficulty) if body.task_difficulty else None,
        model_id=body.model_id,
        task_preset=body.task_preset,
        session_id=body.session_id,
        new_session_id=new_id("s"),
        timeout=_timeout(service, body.timeout_seconds),
        body=orjson.dumps({"metadata": body.metadata}),
        detached=detached,
        key=keys.key_of("task", body.model_dump(), detached),
    )
    task_id = service.engine.submit(submission)
    if detached:
        task = task_view(service, owned_task(service.engine.node, task_id, tenant))
        headers = {"Location": f"/api/tasks/{task_id}", "Preference-Applied": "respond-async"}
        return JSONResponse(task.model_dump(), status_code=202, headers=headers)
    await asyncio.sleep(0)  # the task is on its way to a warm worker while the response is being set up
    return follow(service, task_id, after=0)


@router.get("/{task_id}")
async def show(task_id: str, service: TheService, tenant: Tenant) -> TaskView:
    """A task's state. Ended tasks stay readable for TASK_RETENTION_SECONDS."""
    return task_view(service, owned_task(service.engine.node, task_id, tenant))


@router.get("/{task_id}/events", response_class=EventSourceResponse, responses=SSE)
async def events(
    task_id: str,
    service: TheService,
    tenant: Tenant,
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,15}$")] = None,
) -> Response:
    """A task's events, from the first or from behind `Last-Event-ID`, and then live. 204 when the client has
    them all and the task has ended, which tells an `EventSource` to stop."""
    owned_task(service.engine.node, task_id, tenant)
    return follow(service, task_id, after=int(last_event_id or 0))


@router.delete("/{task_id}")
async def cancel(task_id: str, service: TheService, tenant: Tenant) -> TaskView:
    """Cancel a task. Cancelling one that has ended changes nothing."""
    service.engine.decide(ev.TaskCancelRequested(task_id=task_id, tenant=tenant))
    return task_view(service, owned_task(service.engine.node, task_id, tenant))


def _timeout(service: Service, asked: float | None) -> float:
    settings = service.settings
    if asked is None:
        return settings.default_task_timeout
    if asked > settings.max_task_timeout:
        raise Refusal(
            RefusalCode.TIMEOUT_OUT_OF_RANGE, f"timeout_seconds may be at most {settings.max_task_timeout:g}"
        )
    return asked


def kept_stream(service: Service, task_id: str) -> Stream:
    """The task's events. Raises `Refusal` where they are not kept any more."""
    stream = service.engine.streams.get(task_id)
    if stream is None:
        message = f"the events of task {task_id} are not kept any more"
        raise Refusal(RefusalCode.EVENTS_GONE, message, task_id=task_id)
    return stream


def follow(service: Service, task_id: str, *, after: int) -> Response:
    """The task's events as a stream, from behind event `after`. Raises `Refusal`."""
    stream = kept_stream(service, task_id)
    if stream.finished and after == stream.last_id:
        return Response(status_code=204)
    return EventSourceResponse(
        _read(service, task_id, stream, after),
        headers={"Location": f"/api/tasks/{task_id}"},
        ping=service.settings.sse_ping_seconds,
        ping_message_factory=_ping,
        sep="\n",
    )


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


async def _read(service: Service, task_id: str, stream: Stream, after: int) -> AsyncIterator[bytes]:
    """The stream, while the engine knows that somebody reads it."""
    service.engine.report(ev.ReaderCame(task_id=task_id))
    try:
        async with aclosing(stream.read(after)) as reading:
            async for frames in reading:
                yield frames
    finally:
        service.engine.report(ev.ReaderLeft(task_id=task_id))
