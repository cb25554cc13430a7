"""Who is asking: the tenant comes from the key, never from the body."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.service import Service

DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False)
_bearer = HTTPBearer(auto_error=False)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def optional_tenant(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    api_key: Annotated[str | None, Depends(_api_key)] = None,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None,
) -> str | None:
    """The tenant, or None when no key was sent. A wrong key is refused, also where none is needed."""
    key = api_key if api_key is not None else bearer.credentials if bearer is not None else None
    if key is None:
        return None
    if not _same(key, service.internal_key):
        raise Refusal(RefusalCode.UNAUTHORIZED, "the API key is not valid")
    tenant = request.headers.get("x-tenant-id", DEFAULT_TENANT)
    if _TENANT.fullmatch(tenant) is None:
        raise Refusal(
            RefusalCode.INVALID_REQUEST,
            "X-Tenant-ID must be 1 to 128 characters of letters, digits and ._:/-",
        )
    return tenant


def require_tenant(tenant: Annotated[str | None, Depends(optional_tenant)]) -> str:
    """The tenant; refuses a request without a key."""
    if tenant is None:
        raise Refusal(RefusalCode.UNAUTHORIZED, "an API key is needed: X-API-Key, or Authorization: Bearer")
    return tenant


def _same(given: str, expected: str) -> bool:
    """Compare in constant time, whatever the lengths."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)


Tenant = Annotated[str, Depends(require_tenant)]
MaybeTenant = Annotated[str | None, Depends(optional_tenant)]
TheService = Annotated[Service, Depends(service_of)]
