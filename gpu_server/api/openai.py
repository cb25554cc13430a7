"""`/v1`: the OpenAI interface. A request becomes a task of a session of its tenant for the model; the session
is found, or made. docs/openai.md says which parameters there are."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Response
from pydantic import BaseModel

from gpu_server.api.auth import Tenant, TheService
from gpu_server.api.bodies import BoundedRoute
from gpu_server.api.openai_answer import TaskAnswer
from gpu_server.api.openai_bodies import ChatBody, CompletionBody
from gpu_server.api.openai_stream import Chunks, Heading, Whole
from gpu_server.api.preferences import IdempotencyKeys
from gpu_server.core.admission import known_request
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.routing import choose_session
from gpu_server.core.sessions import TaskType
from gpu_server.engine import Submission
from gpu_server.service import Service, made_at, new_id

router = APIRouter(prefix="/v1", tags=["openai"], route_class=BoundedRoute)

_PIN_HELP = "The session that is to serve this; without it, one is found or made. Every answer names it."
PinnedSession = Annotated[
    str | None, Header(alias="X-Session-ID", min_length=1, max_length=128, description=_PIN_HELP)
]
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, as OpenAI has it; with `stream: true` in chunks",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


class ModelView(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "gpu-server"


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelView]


@router.get("/models")
async def models(service: TheService, tenant: Tenant) -> ModelList:
    """The models that have a preset for these routes. `created` is when the presets file was last changed."""
    return ModelList(data=[_model_view(service, model_id) for model_id in service.presets.openai_models()])


@router.get("/models/{model_id:path}")
async def model(model_id: str, service: TheService, tenant: Tenant) -> ModelView:
    """One of them."""
    if model_id not in service.presets.openai_models():
        raise _unknown(model_id)
    return _model_view(service, model_id)


@router.post("/chat/completions", responses=_ANSWERS)
async def chat(
    body: ChatBody,
    service: TheService,
    tenant: Tenant,
    keys: IdempotencyKeys,
    x_session_id: PinnedSession = None,
) -> Response:
    """The next message of a conversation, whole or as a stream of server-sent events."""
    return await _answer(service, tenant, body, keys, x_session_id)


@router.post("/completions", responses=_ANSWERS)
async def complete(
    body: CompletionBody,
    service: TheService,
    tenant: Tenant,
    keys: IdempotencyKeys,
    x_session_id: PinnedSession = None,
) -> Response:
    """What follows a prompt, whole or as a stream of server-sent events."""
    return await _answer(service, tenant, body, keys, x_session_id)


async def _answer(
    service: Service,
    tenant: str,
    body: ChatBody | CompletionBody,
    keys: IdempotencyKeys,
    pinned: str | None,
) -> Response:
    engine, timeout = service.engine, service.settings.default_task_timeout
    found = service.presets.openai_preset(body.model)
    if found is None:
        raise _unknown(body.model)
    preset_name, preset = found
    chat, asked = isinstance(body, ChatBody), body.metadata()
    key = keys.key_of("openai", chat, body.model, asked, body.stream, body.include_usage, pinned)
    known = known_request(engine.node.task_keys, engine.node.tasks, tenant, key) if key else None
    session_id = pinned
    if known is None and pinned is None:
        session_id = choose_session(
            engine.node,
            tenant,
            body.model,
            preset_name,
            tier=preset.tier,
            timeout=timeout,
            now=engine.clock.now(),
        )
    task_id = engine.submit(
        Submission(
            task_id=new_id("t"),
            tenant=tenant,
            task_type=TaskType.SESSION,
            tier=preset.tier if session_id is None else None,
            model_id=body.model,
            task_preset=preset_name,
            session_id=session_id,
            new_session_id=new_id("s"),
            timeout=timeout,
            body=orjson.dumps({"metadata": asked}),
            key=key,
        )
    )
    task, stream = engine.node.tasks[task_id], engine.streams.get(task_id)
    if stream is None:
        message = f"the answer of task {task_id} is not kept any more"
        raise Refusal(RefusalCode.EVENTS_GONE, message, task_id=task_id)
    headers = {"X-Session-ID": task.session_id, "X-Request-ID": task_id}
    if task.position is not None:
        headers["X-Queue-Position"] = str(task.position)
    heading = Heading(chat=chat, task_id=task_id, model=body.model, created=made_at(task_id))
    answer: Chunks | Whole
    logprobs = body.alternatives is not None
    if body.stream:
        answer = Chunks(heading, include_usage=body.include_usage, logprobs=logprobs)
    else:
        answer = Whole(heading, logprobs=logprobs)
    await asyncio.sleep(0)  # the task is on its way to a warm worker while the response is being set up
    return TaskAnswer(service, task, stream, answer, headers, keyed=key is not None)


def _unknown(model_id: str) -> Refusal:
    message = f"no model {model_id!r} is served here; GET /v1/models lists those that are"
    return Refusal(RefusalCode.MODEL_NOT_FOUND, message)


def _model_view(service: Service, model_id: str) -> ModelView:
    return ModelView(id=model_id, created=service.presets.changed_at)
