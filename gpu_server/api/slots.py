"""`/api/slots`: what the operator sees of the slots, and may do with one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gpu_server.api.auth import Operator, TheService
from gpu_server.api.bodies import BoundedRoute
from gpu_server.api.certificates import CBOR_SEQUENCE, CertificateList, chain_of, listed, raw_of, wants
from gpu_server.api.health import SlotView, slot_view
from gpu_server.core import events as ev
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.service import Service

router = APIRouter(prefix="/api/slots", tags=["slots"], route_class=BoundedRoute, dependencies=[Operator])

MAX_LISTED = 1000


class OperatorSlotView(SlotView):
    """`fault` is a finding, `doubt` why nothing is known now. `session_id` has the slot, or its wash follows
    that; `kept_for` is the only tenant who may have it next, after a light wash."""

    doubt: str | None
    session_id: str | None
    kept_for: str | None


class SlotList(BaseModel):
    slots: list[OperatorSlotView]


@router.get("")
async def index(service: TheService) -> SlotList:
    """Every slot of this node."""
    return SlotList(slots=[_view(service, slot_id) for slot_id in _ids(service)])


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": CertificateList, "content": {CBOR_SEQUENCE: {}}, "description": "Oldest first"}
}


@router.get("/{slot_id}/certificates", response_class=JSONResponse, responses=_ANSWERS)
async def certificates(
    slot_id: str,
    request: Request,
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
) -> Response:
    """The slot's newest certificates, the newest last: as JSON, or as a CBOR sequence (RFC 8742) where
    `Accept` asks for `application/cbor-seq`. Also of a slot whose device is not there any more."""
    rows = chain_of(service.engine.journal, slot_id, limit)
    if not rows and slot_id not in service.engine.node.slots:
        raise Refusal(RefusalCode.SLOT_NOT_FOUND, f"this node has no slot {slot_id}")
    if wants(request, CBOR_SEQUENCE):
        return Response(b"".join(map(raw_of, rows)), media_type=CBOR_SEQUENCE)
    return JSONResponse(CertificateList(certificates=[listed(row) for row in rows]).model_dump())


@router.post("/{slot_id}/wash", status_code=202)
async def wash(slot_id: str, service: TheService) -> OperatorSlotView:
    """Wash a quarantined slot again: the only way out of quarantine is a wash that passes."""
    service.engine.decide(ev.SlotWashOrdered(slot_id=slot_id))
    return _view(service, slot_id)


def _ids(service: Service) -> list[str]:
    return [slot.spec.id for slot in service.engine.node.slots]


def _view(service: Service, slot_id: str) -> OperatorSlotView:
    slot = service.engine.node.slots[slot_id]
    shown = slot_view(service, slot, tenant=None, in_full=True).model_dump()
    return OperatorSlotView(
        **{**shown, "fault": slot.fault},
        doubt=slot.doubt,
        session_id=slot.holder,
        kept_for=slot.kept_for,
    )
