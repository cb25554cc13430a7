"""`/health`: whether this node serves, and each slot. Open to all; details for those with a key."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gpu_server.api.auth import MaybeTenant, TheService
from gpu_server.api.views import rfc3339, unix_time
from gpu_server.core.slots import NO_CERTIFICATE, Slot, SlotState
from gpu_server.service import Service

router = APIRouter(tags=["health"])

_HIDDEN = "ask with an API key"


class HolderView(BaseModel):
    session_id: str
    task_ids: list[str]


class WashingView(BaseModel):
    """A wash under way: since when, the steps that it is at (of those in docs/carwash.md; then `certificate`,
    and `disk`), and why one of them is tried again."""

    since: str
    steps: list[str]
    reason: str | None


class SlotView(BaseModel):
    """One slot. `held_by` is shown to the holder's own tenant only. `certificate` is the hash of its newest
    wash record, in hex; null before its first."""

    id: str
    uuid: str
    name: str
    kind: str
    tiers: list[str]
    state: str
    fault: str | None
    memory_total_mb: int
    memory_used_mb: int | None
    held_by: HolderView | None
    wash: WashingView | None
    certificate: str | None


class EnclaveView(BaseModel):
    """`mode` says `simulated` where the enclave proves nothing; `epoch`, in hex as in the log, names its
    present life."""

    mode: str
    healthy: bool
    reason: str | None
    epoch: str | None


class Health(BaseModel):
    """`enclave_healthy` and `enclave` are null on a node without an enclave. `node_public_key`, in hex, is
    that of the key which signs certificates of washes (Ed25519)."""

    status: str
    ready: bool
    runtime: str
    node_public_key: str
    enclave_healthy: bool | None
    enclave: EnclaveView | None
    gpu_healthy: bool
    models_loaded: int
    gpus: list[SlotView]
    runtime_reachable: bool
    storage_healthy: bool
    active_sessions: int
    active_tasks: int
    waiting_sessions: int
    warnings: list[str]


@router.get("/health", responses={503: {"model": Health, "description": "Does not serve"}})
async def health(service: TheService, tenant: MaybeTenant) -> JSONResponse:
    """Answers 200 while the node takes work, 503 while it starts, stops or cannot."""
    report = _report(service, tenant)
    return JSONResponse(report.model_dump(), 200 if report.ready else 503)


def _report(service: Service, tenant: str | None) -> Health:
    engine, node = service.engine, service.engine.node
    live = list(node.live_sessions())
    slots = list(node.slots)
    usable = [s for s in slots if s.state is not SlotState.QUARANTINED and not (s.fault or s.doubt)]
    # Once a wash of this life has passed, slots that are being washed are a busy node's.
    washed = engine.counts.washes_passed or any(s.state is not SlotState.WASHING for s in usable)
    enclave = _enclave_view(service, in_full=tenant is not None)
    if engine.broken is not None:
        status = "failed"
    elif node.shutting_down or engine.handed_over:
        status = "stopping"
    elif not usable:
        status = "unhealthy"
    elif not washed:
        status = "starting"
    elif engine.storage_doubt is not None:
        status = "unhealthy"  # what runs is served, and nothing new is taken
    else:
        well = len(usable) == len(slots) and node.runtime_doubt is None
        well = well and (enclave is None or enclave.healthy)
        status = "ok" if well else "degraded"
    doubts = [doubt for doubt in (node.runtime_doubt, engine.storage_doubt) if doubt is not None]
    warnings = [*service.warnings, *doubts]
    loaded = {s.workload.model_id for s in live if s.state in ("ready", "working")}
    return Health(
        status=status,
        ready=status in ("ok", "degraded"),
        runtime=service.runtime.name,
        node_public_key=service.seal.public_key.hex(),
        enclave_healthy=enclave.healthy if enclave is not None else None,
        enclave=enclave,
        gpu_healthy=bool(slots) and len(usable) == len(slots),
        models_loaded=len(loaded),
        gpus=[slot_view(service, slot, tenant=tenant, in_full=tenant is not None) for slot in slots],
        runtime_reachable=node.runtime_doubt is None,
        storage_healthy=engine.storage_doubt is None,
        active_sessions=len(live) - len(node.line),
        active_tasks=sum(len(s.busy) + len(s.queue) for s in live),
        waiting_sessions=len(node.line),
        warnings=warnings if tenant is not None else [_HIDDEN] * bool(warnings),
    )


def _enclave_view(service: Service, *, in_full: bool) -> EnclaveView | None:
    if service.enclave is None:
        return None
    health = service.enclave.health
    return EnclaveView(
        mode=service.enclave.mode,
        healthy=health.healthy,
        reason=health.reason if in_full or health.reason is None else _HIDDEN,
        epoch=health.epoch.hex() if health.epoch is not None else None,
    )


def slot_view(service: Service, slot: Slot, *, tenant: str | None, in_full: bool) -> SlotView:
    """One slot: who holds it, for the holder's own tenant; what is wrong with it, `in_full` or not."""
    spec, reading = slot.spec, service.engine.readings.get(slot.spec.id)
    session = service.engine.node.sessions.get(slot.holder or "")
    mine = session is not None and tenant is not None and session.tenant == tenant
    return SlotView(
        id=spec.id,
        uuid=spec.uuid,
        name=spec.name,
        kind="gpu" if spec.is_gpu else "cpu",
        tiers=sorted(spec.tiers),
        state=slot.state,
        fault=(slot.fault or slot.doubt) if in_full else _HIDDEN if slot.fault or slot.doubt else None,
        memory_total_mb=spec.memory_mb,
        memory_used_mb=reading.memory_used_mb if reading else None,
        held_by=HolderView(session_id=session.id, task_ids=[*session.busy, *session.queue])
        if session is not None and mine
        else None,
        wash=_washing_view(service, slot, in_full=in_full),
        certificate=slot.head.hex() if slot.head != NO_CERTIFICATE else None,
    )


def _washing_view(service: Service, slot: Slot, *, in_full: bool) -> WashingView | None:
    washing = service.engine.washing.get(slot.spec.id)
    if washing is None or slot.state is not SlotState.WASHING:
        return None
    return WashingView(
        since=rfc3339(unix_time(service, washing.since)),
        steps=list(washing.steps),
        reason=washing.reason if in_full or washing.reason is None else _HIDDEN,
    )
