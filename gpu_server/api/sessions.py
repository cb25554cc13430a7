"""`/api/sessions`: start ahead of the first task, list, look, keep alive, kill."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from gpu_server.api.auth import Tenant, TheService
from gpu_server.api.bodies import BoundedRoute, ClosedBody
from gpu_server.api.preferences import IdempotencyKeys
from gpu_server.api.views import SessionList, SessionView, session_view
from gpu_server.core import events as ev
from gpu_server.core.admission import owned_session
from gpu_server.core.slots import Tier
from gpu_server.service import new_id

router = APIRouter(prefix="/api/sessions", tags=["sessions"], route_class=BoundedRoute)


class StartBody(ClosedBody):
    """A session to start ahead of its first task, so that the model is loaded when that comes."""

    model_id: Annotated[str, Field(min_length=1, max_length=256)]
    task_preset: Annotated[str, Field(min_length=1, max_length=128)]
    task_difficulty: Literal["low", "high"] | None = None


@router.get("")
async def index(service: TheService, tenant: Tenant) -> SessionList:
    """The tenant's sessions, oldest first; ended ones stay for TOMBSTONE_RETENTION_SECONDS."""
    mine = [s for s in service.engine.node.sessions.values() if s.tenant == tenant]
    return SessionList(sessions=[session_view(service, session, log_tail=False) for session in mine])


@router.post("", status_code=201)
async def start(body: StartBody, service: TheService, tenant: Tenant, keys: IdempotencyKeys) -> SessionView:
    """Start a session without a task. It idles like any other once its worker is ready."""
    session_id = service.engine.request_session(
        new_id("s"),
        tenant=tenant,
        tier=Tier(body.task_difficulty) if body.task_difficulty else None,
        model_id=body.model_id,
        task_preset=body.task_preset,
        key=keys.key_of("session", body.model_dump()),
    )
    return session_view(service, service.engine.node.sessions[session_id])


@router.get("/{session_id}")
async def show(session_id: str, service: TheService, tenant: Tenant) -> SessionView:
    """One session, with its expiry and, when it has ended, the reason and its last log lines."""
    return session_view(service, owned_session(service.engine.node, session_id, tenant))


@router.delete("/{session_id}")
async def kill(session_id: str, service: TheService, tenant: Tenant) -> SessionView:
    """Kill a session: its tasks are cancelled at once. Killing it twice is killing it once."""
    service.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant=tenant))
    return session_view(service, owned_session(service.engine.node, session_id, tenant))


@router.post("/{session_id}/keepalive")
async def keepalive(session_id: str, service: TheService, tenant: Tenant) -> SessionView:
    """Renew the idle deadline. It is never shortened, and never passes the lifetime."""
    service.engine.decide(ev.KeepaliveRequested(session_id=session_id, tenant=tenant))
    return session_view(service, owned_session(service.engine.node, session_id, tenant))
