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
_SCHEME = "X-API-Key"
_DESCRIPTION = "Or `Authorization: Bearer <key>`. The internal key may name a tenant: `X-Tenant-ID`."
_MODEL = APIKey.model_validate({"in": "header", "name": _SCHEME, "description": _DESCRIPTION})


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
        self.scheme_name, self.model = _SCHEME, _MODEL

    async def __call__(self, request: Request) -> str | None:
        """The tenant, or None when no key was sent. Raises `Refusal`."""
        if not await authenticate(request, required=False):
            return None
        tenant = _only(request, "x-tenant-id")
        if tenant is None:
            return DEFAULT_TENANT
        if _TENANT.fullmatch(tenant) is None:
            message = "X-Tenant-ID must be 1 to 128 characters of letters, digits and ._:/-"
            raise Refusal(RefusalCode.INVALID_REQUEST, message)
        return tenant


class RequiredTenantOfKey(TenantOfKey):
    """The same, for routes that refuse a request without a key."""

    async def __call__(self, request: Request) -> str:
        """The tenant. Raises `Refusal`."""
        await authenticate(request)
        tenant = await super().__call__(request)
        assert tenant is not None
        return tenant


class OperatorKey(SecurityBase):
    """For what concerns the node and no tenant: the internal key, without a tenant's name beside it."""

    def __init__(self) -> None:
        self.scheme_name, self.model = _SCHEME, _MODEL

    async def __call__(self, request: Request) -> None:
        """Raises `Refusal`."""
        await authenticate(request)
        if "x-tenant-id" in request.headers:
            raise Refusal(RefusalCode.OPERATOR_ONLY, "this is for the operator, not for a tenant")


async def authenticate(request: Request, *, required: bool = True) -> bool:
    """Whether the request has the key. Raises `Refusal` for a wrong one, and for none if it is required."""
    key = _only(request, "x-api-key")
    if key is None:
        scheme, _, credentials = (_only(request, "authorization") or "").partition(" ")
        key = credentials.strip() if scheme.lower() == "bearer" else None
    if key is None and required:
        message = "an API key is needed: X-API-Key, or Authorization: Bearer"
        raise Refusal(RefusalCode.UNAUTHORIZED, message)
    service: Service = request.app.state.service
    if key is not None and not _same(key, service.internal_key):
        raise Refusal(RefusalCode.UNAUTHORIZED, "the API key is not valid")
    return key is not None


def _only(request: Request, name: str) -> str | None:
    """A header that may be sent once: with two, a proxy and this service might each believe another."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise Refusal(RefusalCode.INVALID_REQUEST, f"the header {name} was sent more than once")
    return values[0] if values else None


def _same(given: str, expected: str) -> bool:
    """Compare in constant time, whatever the lengths."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)


Tenant = Annotated[str, Depends(RequiredTenantOfKey())]
MaybeTenant = Annotated[str | None, Depends(TenantOfKey())]
TheService = Annotated[Service, Depends(service_of)]
Operator = Depends(OperatorKey())
