"""`/api/slots`: what the operator may do with a slot."""

from __future__ import annotations

from fastapi import APIRouter

from gpu_server.api.auth import Operator, TheService
from gpu_server.api.bodies import BoundedRoute
from gpu_server.api.health import SlotView, slot_view
from gpu_server.core import events as ev

router = APIRouter(prefix="/api/slots", tags=["slots"], route_class=BoundedRoute, dependencies=[Operator])


@router.post("/{slot_id}/wash", status_code=202)
async def wash(slot_id: str, service: TheService) -> SlotView:
    """Wash a quarantined slot again: the only way out of quarantine is a wash that passes."""
    service.engine.decide(ev.SlotWashOrdered(slot_id=slot_id))
    return slot_view(service, service.engine.node.slots[slot_id], tenant=None, in_full=True)
