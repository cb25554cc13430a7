"""Two request headers that change how a request is taken: `Idempotency-Key` and `Prefer`."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any

import orjson
from fastapi import Depends, Header, Request

from gpu_server.api.auth import TheService
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import RequestKey

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KEY_HELP = (
    "The same key with the same request gives the task or session of the first one, and nothing is done"
    " twice; with another request it is refused. Remembered as long as what it made."
)
_PREFER_HELP = "`respond-async`: answer 202 with the task's URL; the task then runs without a reader."


class Keys:
    """Makes the key of a request, or None when it has no `Idempotency-Key`
    (draft-ietf-httpapi-idempotency-key-header). The fingerprint is a keyed hash: it is written to a disk, and
    must not let anyone guess what was asked."""

    def __init__(self, name: str | None, secret: bytes) -> None:
        self._name, self._secret = name, secret

    def key_of(self, *request: Any) -> RequestKey | None:
        """The key for a request that consists of these JSON values."""
        if self._name is None:
            return None
        content = orjson.dumps(request, option=orjson.OPT_SORT_KEYS)
        digest = hashlib.blake2b(content, key=self._secret, digest_size=16)
        return RequestKey(name=self._name, fingerprint=digest.hexdigest())


async def _keys(
    request: Request,
    service: TheService,
    idempotency_key: Annotated[str | None, Header(description=_KEY_HELP)] = None,
) -> Keys:
    values = request.headers.getlist("idempotency-key")
    if len(values) > 1 or (values and _KEY.fullmatch(values[0]) is None):
        message = "Idempotency-Key may be sent once, as 1 to 255 characters of visible ASCII"
        raise Refusal(RefusalCode.INVALID_REQUEST, message)
    return Keys(idempotency_key, service.fingerprint_key)


async def _responds_async(
    request: Request, prefer: Annotated[str | None, Header(description=_PREFER_HELP)] = None
) -> bool:
    """RFC 7240: preferences are listed with commas, may have parameters behind semicolons, in any case."""
    wishes = ",".join(request.headers.getlist("prefer")).split(",")
    return any(wish.partition(";")[0].strip().lower() == "respond-async" for wish in wishes)


IdempotencyKeys = Annotated[Keys, Depends(_keys)]
RespondsAsync = Annotated[bool, Depends(_responds_async)]
