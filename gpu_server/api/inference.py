"""`POST /inference`: a sealed request, bytes in and bytes out, which nobody but its session's worker can
read.

The service reads the head, which says which session and key the request is for, and no more (docs/sealed.md).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from sse_starlette import EventSourceResponse

from gpu_server.api.auth import Tenant, TheService
from gpu_server.api.bodies import OctetRoute
from gpu_server.api.sealed_answer import MEDIA_TYPE, SealedAnswer
from gpu_server.api.tasks import follow, kept_stream
from gpu_server.core.admission import granted, known_request, owned_session
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import RequestKey, Session, TaskType
from gpu_server.engine import Submission
from gpu_server.sealed import delivery
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.names import check_name, region_of
from gpu_server.sealed.request import Head, read_head
from gpu_server.service import Service, new_id

router = APIRouter(tags=["sealed"], route_class=OctetRoute)

_KEY_HELP = "The ARN of the KMS key that the session was made for"
_TENANT_HELP = "The tenant that the session belongs to"
_POOL_HELP = "The pool that the session was made for; DEFAULT_MODEL_POOL without it"
_REQUEST_HELP = "A name of this request, new for each: the same bytes under the same name run once"
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The sealed answer: salt and chunks; or events, where `Accept` asks for them",
        "content": {MEDIA_TYPE: {}, "text/event-stream": {}},
    }
}
_BODY = {"requestBody": {"required": True, "content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}}


@router.post("/inference", response_class=EventSourceResponse, responses=_ANSWERS, openapi_extra=_BODY)
async def infer(
    request: Request,
    service: TheService,
    tenant: Tenant,
    x_kms_key_arn: Annotated[str, Header(description=_KEY_HELP)],
    x_tenant_id: Annotated[str, Header(description=_TENANT_HELP)],
    x_request_id: Annotated[str, Header(description=_REQUEST_HELP)],
    x_model_pool: Annotated[str | None, Header(description=_POOL_HELP)] = None,
) -> Response:
    """Run a sealed request in its session. The same request sent again gives the same answer, and never runs
    twice."""
    names = _Names(service, tenant, x_kms_key_arn, x_tenant_id, x_model_pool, x_request_id)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != MEDIA_TYPE:
        raise Refusal(RefusalCode.INVALID_REQUEST, f"the body must be a sealed request, sent as {MEDIA_TYPE}")
    body = await request.body()
    try:
        head, _ = read_head(body)
    except SealedError as error:
        raise Refusal(RefusalCode.INVALID_REQUEST, f"the body is not a sealed request: {error}") from error
    task_id = _submit(service, names, head, body)
    task = service.engine.node.tasks[task_id]
    await asyncio.sleep(0)  # the task is on its way to a warm worker while the response is being set up
    if _wants_events(request):
        return follow(service, task_id, after=0)
    return SealedAnswer(service, task, kept_stream(service, task_id))


class _Names:
    """The four headers, each checked. Raises `Refusal`."""

    def __init__(
        self,
        service: Service,
        tenant: str,
        kms_key_arn: str,
        tenant_id: str,
        pool: str | None,
        request_id: str,
    ) -> None:
        if tenant_id != tenant:
            message = "X-Tenant-ID names another tenant than the key"
            raise Refusal(RefusalCode.INVALID_REQUEST, message)
        self.tenant, self.kms_key_arn, self.request_id = tenant, kms_key_arn, request_id
        self.pool = service.settings.default_model_pool if pool is None else pool
        try:
            check_name(self.pool, "X-Model-Pool")
            check_name(self.request_id, "X-Request-ID")
            region_of(self.kms_key_arn)
        except SealedError as error:
            raise Refusal(RefusalCode.INVALID_REQUEST, str(error)) from error

    def key(self, head: Head, body: bytes, secret: bytes) -> RequestKey:
        """What makes it the same request. (A space is in no key that a client can send.)"""
        digest = hashlib.blake2b(key=secret, digest_size=16)
        for part in (self.kms_key_arn.encode(), self.pool.encode(), body):
            digest.update(len(part).to_bytes(8, "big") + part)
        return RequestKey(name=f"sealed {head.session_id} {self.request_id}", fingerprint=digest.hexdigest())


def _submit(service: Service, names: _Names, head: Head, body: bytes) -> str:
    """The task of this request, new or known. Raises `Refusal`."""
    engine, key = service.engine, names.key(head, body, service.fingerprint_key)
    try:
        known = known_request(engine.node.task_keys, engine.node.tasks, names.tenant, key)
    except Refusal as refusal:
        if refusal.code is not RefusalCode.IDEMPOTENCY_MISMATCH:
            raise
        message = f"request {names.request_id} of session {head.session_id} came with other bytes before"
        raise Refusal(RefusalCode.REPLAY, message, session_id=head.session_id) from refusal
    if known is not None:
        return known
    session = owned_session(engine.node, head.session_id, names.tenant)
    psk_id = head.psk_id.hex()
    return engine.submit(
        Submission(
            task_id=new_id("t"),
            tenant=names.tenant,
            task_type=TaskType.SESSION,
            tier=None,
            model_id=session.workload.model_id,
            task_preset=session.workload.task_preset,
            session_id=session.id,
            new_session_id=new_id("s"),
            timeout=service.settings.default_task_timeout,
            body=_delivery(session, psk_id, names, body),
            key=key,
            psk_id=psk_id,
        )
    )


def _delivery(session: Session, psk_id: str, names: _Names, body: bytes) -> bytes:
    """What the worker gets. Raises `Refusal` where the session is not the one that the headers speak of."""
    if not session.accepts_tasks:  # before all else: a grant may be missing because it has ended
        message = f"session {session.id} is {session.state} ({session.close_reason})"
        raise Refusal(RefusalCode.SESSION_CLOSED, message, session_id=session.id)
    grant, sealing = granted(session, psk_id), session.sealing
    assert sealing is not None
    for header, said, true in (
        ("X-KMS-Key-ARN", names.kms_key_arn, sealing.kms_key_arn),
        ("X-Model-Pool", names.pool, sealing.pool),
    ):
        if said != true:
            message = f"{header} is {said}, and session {session.id} was made for {true}"
            raise Refusal(RefusalCode.SESSION_MISMATCH, message, session_id=session.id)
    return delivery.pack(
        tenant=names.tenant,
        pool=names.pool,
        kms_key_arn=names.kms_key_arn,
        request_id=names.request_id,
        epoch=base64.b64decode(grant.epoch),
        wrapped_key=base64.b64decode(grant.wrapped_key),
        grant=base64.b64decode(grant.grant),
        body=body,
    )


def _wants_events(request: Request) -> bool:
    wishes = ",".join(request.headers.getlist("accept")).lower()
    return "text/event-stream" in wishes
