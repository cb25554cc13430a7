"""The worker's end of the sealed path: its key pair, and opening what is sealed to it.

Imported for sealed sessions only: it needs the package `gpu_server.sealed` and its libraries (docs/sealed.md
describes the protocol).
"""

from __future__ import annotations

import base64
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_server.sealed import delivery
from gpu_server.sealed.delivery import Delivery
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant
from gpu_server.sealed.names import check_name, region_of
from gpu_server.sealed.request import Head, RequestOpener, read_head
from gpu_server.sealed.response import ResponseSealer
from gpu_worker.sealed_record import Refused, ReplayRecord

_GRANTS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedRequest:
    """A delivery that was read, and not opened."""

    delivery: Delivery
    head: Head
    chunks_at: int

    @property
    def request_id(self) -> str:
        return self.delivery.request_id

    @property
    def enc(self) -> bytes:
        return self.head.enc


class SealedSession:
    """One session's key pair, and all that a request must name to be opened by it. Raises ValueError for
    names that the protocol does not allow."""

    def __init__(self, *, session_id: str, tenant: str, pool: str, kms_key_arn: str) -> None:
        try:
            for text, what in ((session_id, "the session's id"), (tenant, "the tenant"), (pool, "the pool")):
                check_name(text, what)
            region_of(kms_key_arn)
        except SealedError as error:
            raise ValueError(str(error)) from None
        self.record = ReplayRecord()
        self._session_id = session_id
        self._tenant = tenant
        self._pool = pool
        self._kms_key_arn = kms_key_arn
        self._key = WorkerKey.generate()
        self._grants: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()  # (psk_id, grant) -> psk

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SealedSession:
        """From the variables that the service sets. Raises ValueError where one is missing."""
        names = {
            "session_id": "GPU_SESSION_ID",
            "tenant": "SEALED_TENANT",
            "pool": "SEALED_POOL",
            "kms_key_arn": "SEALED_KMS_KEY_ARN",
        }
        for variable in names.values():
            if not environment.get(variable):
                raise ValueError(f"{variable} is not set")
        return cls(**{name: environment[variable] for name, variable in names.items()})

    @property
    def public_key(self) -> str:
        """X25519, base64: what `GET /health` shows as `sealed_key`."""
        return base64.b64encode(self._key.public).decode("ascii")

    def read(self, data: bytes) -> SealedRequest:
        """Take a delivery apart. Raises `Refused` (400) for what is none, or is meant for another session."""
        try:
            found = delivery.unpack(data)
            head, chunks_at = read_head(found.body)
        except SealedError:
            raise _cannot_open() from None
        named = (found.tenant, found.pool, found.kms_key_arn, head.session_id)
        if named != (self._tenant, self._pool, self._kms_key_arn, self._session_id):
            raise _cannot_open()
        return SealedRequest(delivery=found, head=head, chunks_at=chunks_at)

    def open(self, request: SealedRequest) -> tuple[dict[str, Any] | None, ResponseSealer]:
        """The metadata, and what seals the answer. No metadata where the bytes are well sealed but no JSON
        object: that is for the sealed answer to tell. Raises `Refused` (400) for all that does not open."""
        found = request.delivery
        try:
            binding = found.binding(self._session_id, self._key.public)
            opener = RequestOpener(
                binding, self._psk(binding, found.grant), found.request_id, self._key, request.head
            )
            clear = opener.open(found.body[request.chunks_at :])
            sealer = opener.answer()
        except SealedError:
            raise _cannot_open() from None
        return _metadata(clear), sealer

    def _psk(self, binding: Binding, grant: bytes) -> bytes:
        known = (binding.psk_id, grant)
        psk = self._grants.get(known)
        if psk is None:
            psk = self._grants[known] = open_grant(binding, grant, self._key)
            if len(self._grants) > _GRANTS_MAX:
                self._grants.popitem(last=False)
        else:
            self._grants.move_to_end(known)
        return psk


def _cannot_open() -> Refused:
    """One message for every reason, so that nobody learns how far a forgery came."""
    return Refused(400, "this request cannot be opened", code="decrypt")


def _metadata(clear: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(clear)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
