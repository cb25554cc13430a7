"""Request bodies: bounded while they arrive, parsed by a parser that bounds nesting, checked for depth."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from gpu_server.core.errors import Refusal, RefusalCode


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
    """A route whose handler sees a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            bounded_request = BoundedRequest(request.scope, request.receive)
            if request.method == "POST":
                await bounded_request.body()  # here, because FastAPI would answer a refusal in its own words
            return await handler(bounded_request)

        return bounded


def check_depth(value: object, limit: int) -> None:
    """Raises `Refusal` when objects and lists are nested deeper than `limit`."""
    level: list[object] = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise Refusal(RefusalCode.METADATA_TOO_DEEP, f"metadata is nested deeper than {limit} levels")
