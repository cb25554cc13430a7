"""Refusals and mistakes as `application/problem+json` (RFC 9457), each with its stable `code`."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gpu_server.core.admission import RETRY_AFTER_SECONDS
from gpu_server.core.errors import FailureCode, Refusal, RefusalCode

STATUS: Mapping[RefusalCode, int] = {
    RefusalCode.UNAUTHORIZED: 401,
    RefusalCode.INVALID_REQUEST: 422,
    RefusalCode.BODY_TOO_LARGE: 413,
    RefusalCode.METADATA_TOO_DEEP: 422,
    RefusalCode.TIMEOUT_OUT_OF_RANGE: 422,
    RefusalCode.MODEL_NOT_FOUND: 404,
    RefusalCode.PRESET_NOT_FOUND: 404,
    RefusalCode.PRESET_NOT_SUPPORTED: 422,
    RefusalCode.IMAGE_NOT_ALLOWED: 403,
    RefusalCode.SESSION_NOT_FOUND: 404,
    RefusalCode.SESSION_CLOSED: 409,
    RefusalCode.SESSION_MISMATCH: 409,
    RefusalCode.SESSION_QUEUE_FULL: 429,
    RefusalCode.TASK_NOT_FOUND: 404,
    RefusalCode.NO_AVAILABLE_GPU: 503,
    RefusalCode.NO_SUCH_CAPACITY: 422,
    RefusalCode.GPU_WAIT_LINE_FULL: 429,
    RefusalCode.TOO_MUCH_QUEUED: 429,
    RefusalCode.IDEMPOTENCY_MISMATCH: 409,
    RefusalCode.STORAGE_FAILING: 503,
    RefusalCode.EVENTS_GONE: 410,
    RefusalCode.RUNTIME_UNREACHABLE: 503,
    RefusalCode.POOL_NOT_FOUND: 404,
    RefusalCode.SEALED_REQUIRED: 403,
    RefusalCode.SEALED_NOT_SUPPORTED: 422,
    RefusalCode.SESSION_NOT_READY: 409,
    RefusalCode.SESSION_NOT_OPEN: 409,
    RefusalCode.REPLAY: 409,
    RefusalCode.ENCLAVE_UNAVAILABLE: 503,
    RefusalCode.ENCLAVE_BUSY: 503,
    RefusalCode.ENCLAVE_REFUSED: 403,
    RefusalCode.ATTESTATION_FAILED: 502,
    RefusalCode.DECRYPT_FAILED: 400,
    RefusalCode.KMS_DENIED: 403,
    RefusalCode.KMS_DOWN: 503,
    RefusalCode.OPERATOR_ONLY: 403,
    RefusalCode.SLOT_NOT_FOUND: 404,
    RefusalCode.SLOT_NOT_QUARANTINED: 409,
    RefusalCode.CERTIFICATE_NOT_FOUND: 404,
    RefusalCode.NOT_FOUND: 404,
    RefusalCode.METHOD_NOT_ALLOWED: 405,
    RefusalCode.SHUTTING_DOWN: 503,
    RefusalCode.INTERNAL: 500,
}

FAILURE_STATUS: Mapping[str, int] = {
    FailureCode.REQUEST_REFUSED: 400,
    FailureCode.DECRYPT_FAILED: 400,
    FailureCode.MODEL_MISSING: 404,
    FailureCode.TASK_CANCELLED: 409,
    FailureCode.CLIENT_GONE: 409,
    FailureCode.SESSION_KILLED: 409,
    FailureCode.REPLAY: 409,
    FailureCode.EVENTS_GONE: 410,
    FailureCode.GPU_WAIT_TIMEOUT: 503,
    FailureCode.SESSION_LIFETIME: 503,
    FailureCode.MODEL_FETCH_FAILED: 503,
    FailureCode.RUNTIME_UNREACHABLE: 503,
    FailureCode.SERVICE_RESTARTED: 503,
    FailureCode.NODE_RESTARTED: 503,
    FailureCode.SLOT_LOST: 503,
    FailureCode.STORAGE_FAILING: 503,
    FailureCode.SHUTDOWN: 503,
    FailureCode.TASK_TIMEOUT: 504,
}
"""The statuses of failed tasks, where an answer has none yet; any other code, also a worker's own, is 500."""

MAX_NAME_LENGTH = 64

log = structlog.get_logger()


def problem(refusal: Refusal, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
    """The answer to a refused request."""
    status, extra = STATUS[refusal.code], dict(headers or {})
    if refusal.retry_after is not None:
        extra["Retry-After"] = str(refusal.retry_after)
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return _problem(status, refusal.code, refusal.message, extra, {**refusal.ids, **more})


def task_problem(
    code: str, message: str, headers: Mapping[str, str] | None = None, **ids: str
) -> JSONResponse:
    """The answer to a request whose task failed before there was anything to answer with."""
    status, extra = FAILURE_STATUS.get(code, 500), dict(headers or {})
    if status == 503:
        extra["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return _problem(status, code, message, extra, ids)


def _problem(
    status: int, code: str, message: str, headers: Mapping[str, str], more: Mapping[str, Any]
) -> JSONResponse:
    content = {
        "type": f"urn:gpu-server:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": message,
        **more,
    }
    return JSONResponse(content, status, headers=headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Answer everything that goes wrong in this one form."""

    @app.exception_handler(Refusal)
    async def _refused(request: Request, refusal: Refusal) -> JSONResponse:
        log.info("request.refused", code=refusal.code, path=request.url.path, **refusal.ids)
        return problem(refusal)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if error.errors() and error.errors()[0]["loc"][:1] == ("body",) and not isinstance(error.body, dict):
            message = "the body must be a JSON object, sent with Content-Type: application/json"
            return problem(Refusal(RefusalCode.INVALID_REQUEST, message))
        # The input itself is left out: it may be somebody's prompt, and may be huge. So may a field's name.
        errors = [
            {"where": ".".join(str(part)[:MAX_NAME_LENGTH] for part in detail["loc"]), "what": detail["msg"]}
            for detail in error.errors()[:20]
        ]
        first = f"{errors[0]['where']}: {errors[0]['what']}" if errors else "the request is not valid"
        return problem(Refusal(RefusalCode.INVALID_REQUEST, first), errors=errors)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: RefusalCode.NOT_FOUND, 405: RefusalCode.METHOD_NOT_ALLOWED}.get(
            error.status_code, RefusalCode.INVALID_REQUEST
        )
        return problem(Refusal(code, f"{error.detail}: {request.method} {request.url.path}"), error.headers)

    @app.exception_handler(Exception)
    async def _crashed(request: Request, error: Exception) -> JSONResponse:
        log.error("request.crashed", path=request.url.path, exc_info=error)
        return problem(Refusal(RefusalCode.INTERNAL, "the service met a bug; its log has the details"))
