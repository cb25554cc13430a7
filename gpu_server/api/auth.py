"""Who is asking: the tenant comes from the key, never from the body."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated

from fastapi import Depends, Request
from fastapi.openapi.models import APIKey
from fastapi.security.base import SecurityBase

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.service import Service

DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9._:/-]{1,128}")


# Dependencies are coroutines, though they wait for nothing: plain functions would each cross a thread pool.
async def service_of(request: Request) -> Service:
    """The service that this application serves from."""
    service: Service = request.app.state.service
    return service


class TenantOfKey(SecurityBase):
    """Finds the tenant of a request by its key: `X-API-Key`, or `Authorization: Bearer`.

    The internal key may name its tenant with `X-Tenant-ID`. A wrong key is refused also where none is needed.
    """

    def __init__(self) -> None:
        self.scheme_name = "X-API-Key"
        description = "Or `Authorization: Bearer <key>`. The internal key may name a tenant: `X-Tenant-ID`."
        self.model = APIKey.model_validate({"in": "header", "name": "X-API-Key", "description": description})

    async def __call__(self, request: Request) -> str | None:
        """The tenant, or None when no key was sent. Raises `Refusal`."""
        service: Service = request.app.state.service
        key = request.headers.get("x-api-key")
        if key is None:
            scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                return None
            key = credentials.strip()
        if not _same(key, service.internal_key):
            raise Refusal(RefusalCode.UNAUTHORIZED, "the API key is not valid")
        tenant = request.headers.get("x-tenant-id", DEFAULT_TENANT)
        if _TENANT.fullmatch(tenant) is None:
            message = "X-Tenant-ID must be 1 to 128 characters of letters, digits and ._:/-"
            raise Refusal(RefusalCode.INVALID_REQUEST, message)
        return tenant


class RequiredTenantOfKey(TenantOfKey):
    """The same, for routes that refuse a request without a key."""

    async def __call__(self, request: Request) -> str:
        """The tenant. Raises `Refusal`."""
        tenant = await super().__call__(request)
        if tenant is None:
            message = "an API key is needed: X-API-Key, or Authorization: Bearer"
            raise Refusal(RefusalCode.UNAUTHORIZED, message)
        return tenant


def _same(given: str, expected: str) -> bool:
    """Compare in constant time, whatever the lengths."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)


Tenant = Annotated[str, Depends(RequiredTenantOfKey())]
MaybeTenant = Annotated[str | None, Depends(TenantOfKey())]
TheService = Annotated[Service, Depends(service_of)]
