"""`/api/sessions`: start ahead of the first task, list, look, keep alive, kill."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, Field, model_validator

from gpu_server.api.auth import Tenant, TheService
from gpu_server.api.bodies import BoundedRoute, ClosedBody
from gpu_server.api.preferences import IdempotencyKeys
from gpu_server.api.views import SessionList, SessionView, session_view
from gpu_server.core import events as ev
from gpu_server.core.admission import owned_session
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import Sealing
from gpu_server.core.slots import Tier
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.names import region_of
from gpu_server.service import Service, new_id

router = APIRouter(prefix="/api/sessions", tags=["sessions"], route_class=BoundedRoute)


NONCE_BYTES = 32
MAX_WRAPPED_KEY_BYTES = 6144


def _arn(text: str) -> str:
    try:
        region_of(text)
    except Malformed as error:
        raise ValueError(str(error)) from error
    return text


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("it must be base64") from error
    return text


Base64 = Annotated[str, AfterValidator(_base64)]


class StartBody(ClosedBody):
    """A session to start ahead of its first task, so that the model is loaded when that comes: of a preset,
    by its two names or by that of a pool. With `kms_key_arn` it is a sealed one."""

    model_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    task_preset: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    pool: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    kms_key_arn: Annotated[str, Field(max_length=128), AfterValidator(_arn)] | None = None
    task_difficulty: Literal["low", "high"] | None = None

    @model_validator(mode="after")
    def _names_one_preset(self) -> StartBody:
        if (self.model_id is None) is not (self.task_preset is None):
            raise ValueError("model_id and task_preset belong together")
        if self.pool is not None and self.model_id is not None:
            raise ValueError("name a pool, or model_id and task_preset, not both")
        if self.pool is None and self.model_id is None and self.kms_key_arn is None:
            raise ValueError("name model_id and task_preset, or a pool")
        return self


class OpenBody(ClosedBody):
    """`nonce` is 32 bytes that nobody could know before, `wrapped_key` the data key as KMS wrapped it: 1 to
    6,144 bytes. Both in base64."""

    nonce: Annotated[Base64, Field(max_length=44)]
    wrapped_key: Annotated[Base64, Field(min_length=1, max_length=4 * MAX_WRAPPED_KEY_BYTES // 3)]

    @model_validator(mode="after")
    def _nonce_is_whole(self) -> OpenBody:
        if len(base64.b64decode(self.nonce)) != NONCE_BYTES:
            raise ValueError(f"nonce must be {NONCE_BYTES} bytes")
        return self


class OpenView(BaseModel):
    """`document`, `worker_key` and `slots` in base64, `epoch` in hex. Verify the document before anything is
    sealed; what `mode` says is a hint, and no proof."""

    document: str
    worker_key: str
    epoch: str
    slots: list[str]
    mode: str


@router.get("")
async def index(service: TheService, tenant: Tenant) -> SessionList:
    """The tenant's sessions, oldest first; ended ones stay for TOMBSTONE_RETENTION_SECONDS."""
    mine = [s for s in service.engine.node.sessions.values() if s.tenant == tenant]
    return SessionList(sessions=[session_view(service, session, log_tail=False) for session in mine])


@router.post("", status_code=201)
async def start(body: StartBody, service: TheService, tenant: Tenant, keys: IdempotencyKeys) -> SessionView:
    """Start a session without a task. It idles like any other once its worker is ready.

    A sealed one shows its worker's key in `worker_key`, some time before it is ready: then it can be
    opened."""
    model_id, task_preset, pool = _preset_of(service, body)
    sealing = None
    if body.kms_key_arn is not None:
        service.opening.require_enclave()
        if pool is None:
            pool = _pool_of(service, model_id, task_preset)
        sealing = Sealing(kms_key_arn=body.kms_key_arn, pool=pool)
    session_id = service.engine.request_session(
        new_id("s"),
        tenant=tenant,
        tier=Tier(body.task_difficulty) if body.task_difficulty else None,
        model_id=model_id,
        task_preset=task_preset,
        key=keys.key_of("session", body.model_dump()),
        sealing=sealing,
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


@router.post("/{session_id}/open")
async def open_(session_id: str, body: OpenBody, service: TheService, tenant: Tenant) -> OpenView:
    """Open a sealed session: its worker is granted the data key in `wrapped_key`, by the enclave that the
    document in the answer attests. May be done again, with the same data key or another."""
    opened = await service.opening.open(
        session_id,
        tenant=tenant,
        nonce=base64.b64decode(body.nonce),
        wrapped_key=base64.b64decode(body.wrapped_key),
    )
    return OpenView(
        document=_text(opened.document),
        worker_key=opened.worker_key,
        epoch=opened.epoch.hex(),
        slots=[_text(record) for record in opened.slots],
        mode=opened.mode,
    )


def _preset_of(service: Service, body: StartBody) -> tuple[str, str, str | None]:
    """Model and preset, and the pool that was named, or is the default where nothing was."""
    if body.model_id is not None and body.task_preset is not None:
        return body.model_id, body.task_preset, None
    pool = body.pool or service.settings.default_model_pool
    return *service.presets.pool(pool), pool


def _pool_of(service: Service, model_id: str, task_preset: str) -> str:
    pools = service.presets.pools_of(model_id, task_preset)
    if len(pools) != 1:
        found = f"the pools {', '.join(pools)} are" if pools else "no pool is"
        message = f"a sealed session has a pool, and {found} of {model_id}/{task_preset}: name one as `pool`"
        raise Refusal(RefusalCode.INVALID_REQUEST, message)
    return pools[0]


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
