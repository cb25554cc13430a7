"""`/api/certificates`: certificates of washes, by the hash of their record, as JSON or as they were signed.

Any key may read them: they name no tenant, and whoever has a hash has it from a session of his own, or from
the operator.
"""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gpu_server.api.auth import Tenant, TheService
from gpu_server.core.admission import RETRY_AFTER_SECONDS
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.rows import Row
from gpu_server.ports import Journal, JournalFailing
from gpu_server.sealed import canonical
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.wash import MAX_CERTIFICATE_BYTES, hash_of, verify_certificate, view

router = APIRouter(prefix="/api/certificates", tags=["certificates"])

CBOR = "application/cbor"
CBOR_SEQUENCE = "application/cbor-seq"
"""RFC 8742."""
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class CertificateRow(BaseModel):
    """One certificate of a slot's chain; `certificate`, in base64, alone counts, and has all the rest."""

    record_hash: str
    hash: str
    prev: str
    slot_id: str
    slot_uuid: str
    fence: int
    tier: str
    certificate: str


class CertificateList(BaseModel):
    """Oldest first."""

    certificates: list[CertificateRow]


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {CBOR: {}}, "description": "The JSON view, or the certificate itself"}
}


@router.get("/{record_hash}", response_class=JSONResponse, responses=_ANSWERS)
async def show(record_hash: str, request: Request, service: TheService, _tenant: Tenant) -> Response:
    """The certificate of the record with this hash: as JSON, or its bytes where `Accept` asks for
    `application/cbor`. The service has verified it once; whoever relies on it does so himself."""
    row = _find(service.engine.journal, record_hash)
    raw = raw_of(row)
    if wants(request, CBOR):
        return Response(raw, media_type=CBOR)
    return JSONResponse(await asyncio.to_thread(_view, raw))


def wants(request: Request, media_type: str) -> bool:
    """Whether `Accept` asks for this media type, and not for JSON."""
    accept = ",".join(request.headers.getlist("accept")).lower()
    named = [part.partition(";")[0].strip() for part in accept.split(",")]
    return media_type in named and "application/json" not in named


def chain_of(journal: Journal, slot_id: str, limit: int) -> tuple[Row, ...]:
    """The newest certificates of a slot, the newest last. Raises `Refusal` while they cannot be read."""
    try:
        return journal.certificates(slot_id, limit)
    except JournalFailing as error:
        raise _unreadable(error) from error


def listed(row: Row) -> CertificateRow:
    """A row of a list."""
    raw = raw_of(row)
    record = canonical.decode(raw, max_bytes=MAX_CERTIFICATE_BYTES)[0]
    assert isinstance(record, bytes)
    return CertificateRow(
        record_hash=hash_of(record).hex(),
        hash=row["hash"],
        prev=row["prev"],
        slot_id=row["slot_id"],
        slot_uuid=row["uuid"],
        fence=row["fence"],
        tier=row["tier"],
        certificate=row["certificate"],
    )


def raw_of(row: Row) -> bytes:
    """The certificate in a row."""
    return base64.b64decode(row["certificate"])


def _find(journal: Journal, record_hash: str) -> Row:
    """Raises `Refusal`."""
    try:
        found = journal.certificate(record_hash.lower()) if _HASH.fullmatch(record_hash) else None
    except JournalFailing as error:
        raise _unreadable(error) from error
    if found is None:
        message = "there is no certificate of this record, or it is not kept any more"
        raise Refusal(RefusalCode.CERTIFICATE_NOT_FOUND, message)
    return found


def _view(raw: bytes) -> dict[str, Any]:
    """Whatever this service may have accepted once, under whichever settings."""
    try:
        return view(verify_certificate(raw, node_key=None, allow_simulated=True))
    except SealedError as error:
        message = f"the certificate that is kept does not verify any more: {error}"
        raise Refusal(RefusalCode.INTERNAL, message) from error


def _unreadable(error: JournalFailing) -> Refusal:
    message = f"certificates cannot be read now: {error}"
    return Refusal(RefusalCode.STORAGE_FAILING, message, retry_after=RETRY_AFTER_SECONDS)
