"""Request bodies: read after the key was seen, bounded in size while they arrive, and in depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, model_validator

from gpu_server.api.auth import authenticate
from gpu_server.core.errors import Refusal, RefusalCode


class ClosedBody(BaseModel):
    """A JSON object with these fields, and no other."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, body: object) -> object:
        """Of the fields that are not known the first alone: pydantic would tell each of a million, and keep
        everyone else waiting meanwhile."""
        if not isinstance(body, dict) or len(body) <= len(cls.model_fields):
            return body
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in body if name not in known)
        return {name: value for name, value in body.items() if name in known or name == unknown}


class BoundedRequest(Request):
    """A request whose body is refused as soon as it is too large, whether it announced its size or not.

    FastAPI's own limit answers some of these in plain text, where clients are promised problem+json.
    """

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            limit: int = self.app.state.service.settings.max_body_bytes
            too_large = Refusal(RefusalCode.BODY_TOO_LARGE, f"the body is larger than {limit} bytes")
            announced = self.headers.get("content-length", "")
            if announced.isdigit() and int(announced) > limit:
                raise too_large
            taken = bytearray()
            async for chunk in self.stream():
                taken += chunk
                if len(taken) > limit:
                    raise too_large
            self._body = bytes(taken)
        return self._body

    async def json(self) -> Any:
        """orjson refuses what is nested deeper than 1,024, where the standard library's parser overflows."""
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class BoundedRoute(APIRoute):
    """A route that needs a key, and looks at nothing else of a request before it has seen one.

    `takes_json` is False for routes whose bodies have no depth. Size and depth of a body are checked here,
    before it is parsed, because FastAPI would answer a refusal in its own words.
    """

    takes_json = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            bounded_request = BoundedRequest(request.scope, request.receive)
            if request.method == "POST":
                await authenticate(bounded_request)
                body = await bounded_request.body()
                if self.takes_json:
                    check_depth(body, request.app.state.service.settings.metadata_max_depth)
            return await handler(bounded_request)

        return bounded


class OctetRoute(BoundedRoute):
    """The same for bodies that are bytes and nothing that is known here."""

    takes_json = False


# A string, also one that never ends: so that nothing is scanned twice, however a body is malformed.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_BRACKETS_ALIKE = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_BRACKETS = bytes(code for code in range(256) if code not in b"[]{}")


def check_depth(body: bytes, limit: int) -> None:
    """Raises `Refusal` when a body's `metadata` has objects and lists nested deeper than `limit`.

    Counts brackets in the raw bytes, one level for each pass: looking at millions of tiny objects one by one
    would keep everyone else waiting.
    """
    brackets = _STRING.sub(b"", body).translate(_BRACKETS_ALIKE, _ALL_BUT_BRACKETS)
    for _ in range(limit + 1):  # the body itself is one level more
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets:  # else they do not match, which the parser says better
        raise Refusal(RefusalCode.METADATA_TOO_DEEP, f"metadata is nested deeper than {limit} levels")
