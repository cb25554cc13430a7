"""What goes wrong on the OpenAI routes, in the shape that OpenAI's clients read: `{"error": {...}}`.

Their clients try 408, 409, 429 and every 5xx again by themselves, unless `x-should-retry` says otherwise. So
it is always said: what may pass by waiting is `true`, with `Retry-After`, and all else is `false`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gpu_server.api.openai_bodies import UNSUPPORTED
from gpu_server.api.problems import FAILURE_STATUS, MAX_NAME_LENGTH, STATUS
from gpu_server.core.admission import RETRY_AFTER_SECONDS
from gpu_server.core.errors import Refusal, RefusalCode

PREFIX = "/v1/"
ANSWER_TOO_LARGE = "answer_too_large"
_STATUS: Mapping[RefusalCode, int] = {
    **STATUS,
    RefusalCode.INVALID_REQUEST: 400,
    RefusalCode.METADATA_TOO_DEEP: 400,
}
_FAILURE_STATUS: Mapping[str, int] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    ANSWER_TOO_LARGE: 400,
    **FAILURE_STATUS,
}
"""The statuses of failed tasks; any other code, also a worker's own, is 500."""
_TYPES = {403: "permission_error", 429: "rate_limit_error"}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIError:
    """One error, as a client of these routes is told it. `retry_after` in seconds: the same request may do
    better then."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None

    def body(self) -> bytes:
        """The JSON of it, for an answer or for the data of an event."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": _TYPES.get(self.status, default),
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> dict[str, str]:
        """What tells a client whether to try again, and how to get in."""
        found = {"x-should-retry": "false" if self.retry_after is None else "true"}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The whole answer."""
        more = {**(headers or {}), **self.headers()}
        return Response(self.body(), self.status, more, media_type="application/json")


def refused(refusal: Refusal) -> OpenAIError:
    """A request that was not granted."""
    deep = refusal.code is RefusalCode.METADATA_TOO_DEEP  # that is the word of the other routes
    return OpenAIError(
        status=_STATUS[refusal.code],
        code="invalid_api_key" if refusal.code is RefusalCode.UNAUTHORIZED else refusal.code,
        message="the body is nested too deep" if deep else refusal.message,
        param="model" if refusal.code is RefusalCode.MODEL_NOT_FOUND else None,
        retry_after=refusal.retry_after,
    )


def failed(code: str, message: str) -> OpenAIError:
    """A task that was taken and did not complete."""
    status = _FAILURE_STATUS.get(code, 500)
    return OpenAIError(
        status=status,
        code=code,
        message=message,
        retry_after=RETRY_AFTER_SECONDS if status == 503 else None,
    )


def invalid(mistakes: Sequence[Mapping[str, Any]], body: object) -> OpenAIError:
    """A body or a header that is not valid: its first mistake. What stood there is never repeated, since it
    may be somebody's prompt.

    Of a value that may have several forms the mistakes in each are listed: the one found deepest is meant.
    """
    told = [(_param(mistake, body), mistake) for mistake in mistakes]
    if not told:
        return OpenAIError(status=400, code="invalid_value", message="the request is not valid")
    param, mistake = max(told, key=lambda pair: pair[0].count(".") + pair[0].count("["))
    kind = str(mistake["type"])
    if kind == "json_invalid" or not param:
        message = "the body must be a JSON object, with Content-Type: application/json"
        return OpenAIError(status=400, code="invalid_value", message=message)
    code = UNSUPPORTED if kind == UNSUPPORTED else "invalid_value"
    message = str(mistake["msg"]) if "why" in mistake.get("ctx", {}) else f"{param}: {mistake['msg']}"
    if kind == "extra_forbidden":
        code, message = "unknown_parameter", f"{param} is not a parameter of this route"
    elif kind == "missing":
        code, message = "missing_required_parameter", f"{param} is missing"
    return OpenAIError(status=400, code=code, message=message, param=param)


def _param(mistake: Mapping[str, Any], body: object) -> str:
    """Where a mistake is, as `messages[0].content`. Beside keys and indices a place names the forms that a
    value may have, which are nothing that a client wrote."""
    if mistake["loc"][0] != "body":
        return str(mistake["loc"][-1])  # a header
    place, here = "", body
    for part in mistake["loc"][1:]:
        if isinstance(part, int):
            place += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
        elif isinstance(here, dict) and (part in here or mistake["type"] == "missing"):
            place += f".{part[:MAX_NAME_LENGTH]}"
            here = here.get(part)
    named = mistake.get("ctx", {}).get("param")
    if named is not None and not place.endswith(f".{named}"):
        place += f".{named}"
    return place.removeprefix(".")


# -- for the whole application ------------------------------------------------------------------------------

_Handler = Callable[[Request, Any], Response | Awaitable[Response]]


async def _on_refusal(request: Request, refusal: Refusal) -> Response:
    log.info("request.refused", code=refusal.code, path=request.url.path, **refusal.ids)
    return refused(refusal).response()


async def _on_mistake(request: Request, error: RequestValidationError) -> Response:
    return invalid(error.errors(), error.body).response()


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{error.detail}: {request.method} {request.url.path}"
    code = {404: RefusalCode.NOT_FOUND, 405: RefusalCode.METHOD_NOT_ALLOWED}.get(error.status_code)
    answer = OpenAIError(status=error.status_code, code=code or RefusalCode.INVALID_REQUEST, message=message)
    return answer.response(error.headers)


async def _on_crash(request: Request, error: Exception) -> Response:
    log.error("request.crashed", path=request.url.path, exc_info=error)
    return failed(RefusalCode.INTERNAL, "the service met a bug; its log has the details").response()


_ON: Mapping[type[Exception], _Handler] = {
    Refusal: _on_refusal,
    RequestValidationError: _on_mistake,
    HTTPException: _on_http_error,
    Exception: _on_crash,
}


def install(app: FastAPI) -> None:
    """Answer in this shape below /v1, and as before everywhere else. Comes after `problems.install`."""
    for kind, ours in _ON.items():
        app.add_exception_handler(kind, _below_v1(ours, app.exception_handlers[kind]))


def _below_v1(ours: _Handler, theirs: _Handler) -> _Handler:
    async def choose(request: Request, error: Exception) -> Response:
        handler = ours if request.url.path.startswith(PREFIX) else theirs
        answer = handler(request, error)
        return await answer if isinstance(answer, Awaitable) else answer

    return choose
