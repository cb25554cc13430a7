"""`/metrics`: what this node does, in figures: as JSON, or as Prometheus reads it where `Accept` asks for
that.

Everything is taken from the state and the counts at the moment of asking. Counts begin with the service's
start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import BaseModel

from gpu_server.api.auth import Tenant, TheService
from gpu_server.core.sessions import SessionState, TaskState
from gpu_server.core.slots import SlotState
from gpu_server.counts import BUCKETS, TOTAL, Counts
from gpu_server.drivers.blocking import call_in_thread
from gpu_server.sealed.wash import STEPS
from gpu_server.service import Service

router = APIRouter(tags=["health"])

FILES_SECONDS = 2.0
"""A file system that takes longer says nothing now: its figures are null."""
MAX_LOOKS = 4
"""Looks at the file system at one time."""
_looks = threading.BoundedSemaphore(MAX_LOOKS)
_PROMETHEUS = ("text/plain", "application/openmetrics-text")
_LIVE = tuple(s for s in SessionState if s not in (SessionState.CLOSED, SessionState.FAILED))
_ENDS = (TaskState.COMPLETED, TaskState.FAILED, TaskState.TIMEOUT, TaskState.CANCELLED)


class GpuStats(BaseModel):
    """Memory is that of all GPUs together, null where there is none or it cannot be read. `success_rate` is
    the share of completed tasks, in percent, of those that ended in any way but by being cancelled; null
    before the first has. `avg_inference_time_seconds` is that of completed tasks, from start to end."""

    gpu_available: bool
    gpu_memory_total_mb: int | None
    gpu_memory_used_mb: int | None
    gpu_memory_usage_pct: float | None
    total_requests: int
    failed_requests: int
    success_rate: float | None
    avg_inference_time_seconds: float | None


class OneModelStats(BaseModel):
    """One model that is loaded, or was since the start of the service. `sessions` are those that have it
    loaded now."""

    sessions: int
    loads: int
    failed_loads: int
    avg_load_time_seconds: float | None


class ModelStats(BaseModel):
    """A load is a worker's start, from its lease to ready. What the file system does not say in time is
    null."""

    fsx_available: bool | None
    loaded_models: int
    available_models: int | None
    total_loads: int
    failed_loads: int
    avg_load_time_seconds: float | None
    models: dict[str, OneModelStats]


class WashStats(BaseModel):
    """Washes since the start of the service. `failed` are those that led into quarantine, by the step that
    did not pass; `avg_seconds` is that of a whole wash that passed, null before the first."""

    passed: int
    failed: dict[str, int]
    avg_seconds: float | None
    quarantined_slots: int


class Metrics(BaseModel):
    """The figures of this node."""

    gpu_stats: GpuStats
    model_stats: ModelStats
    wash_stats: WashStats
    enclave_connected: bool


_ANSWERS = {200: {"model": Metrics, "content": {media_type: {} for media_type in _PROMETHEUS}}}


@router.get("/metrics", response_class=JSONResponse, responses=_ANSWERS)  # type: ignore[arg-type]  # a plain dict
async def metrics(request: Request, service: TheService, tenant: Tenant) -> Response:
    """Figures of the whole node, whatever the tenant."""
    accept = ",".join(request.headers.getlist("accept")).lower()
    if "json" not in accept and any(media_type in accept for media_type in _PROMETHEUS):
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_OfNode(service))
        return Response(encode(registry), headers={"Content-Type": content_type})
    return JSONResponse((await _report(service)).model_dump())


async def _report(service: Service) -> Metrics:
    enclave = service.enclave
    return Metrics(
        gpu_stats=_gpu_stats(service),
        model_stats=await _model_stats(service),
        wash_stats=_wash_stats(service),
        enclave_connected=enclave is not None and enclave.health.healthy,
    )


def _gpu_stats(service: Service) -> GpuStats:
    engine = service.engine
    counts, gpus = engine.counts, [slot for slot in engine.node.slots if slot.spec.is_gpu]
    readings = [engine.readings.get(slot.spec.id) for slot in gpus]
    read = [reading.memory_used_mb for reading in readings if reading is not None and not reading.doubt]
    total = sum(slot.spec.memory_mb for slot in gpus) if gpus else None
    used = sum(read) if gpus and len(read) == len(gpus) else None
    failed = counts.ended[TaskState.FAILED] + counts.ended[TaskState.TIMEOUT]
    completed = counts.ended[TaskState.COMPLETED]
    judged = completed + failed
    return GpuStats(
        gpu_available=any(
            slot.state is not SlotState.QUARANTINED and not (slot.fault or slot.doubt) for slot in gpus
        ),
        gpu_memory_total_mb=total,
        gpu_memory_used_mb=used,
        gpu_memory_usage_pct=round(100 * used / total, 2) if total and used is not None else None,
        total_requests=counts.submitted,
        failed_requests=failed,
        success_rate=round(100 * completed / judged, 2) if judged else None,
        avg_inference_time_seconds=counts.run_seconds / completed if completed else None,
    )


async def _model_stats(service: Service) -> ModelStats:
    loads, loaded = service.engine.counts.loads, _loaded(service)
    ready, seconds = sum(one.ready for one in loads.values()), sum(one.seconds for one in loads.values())
    fsx, names = await _on_disk(service)
    return ModelStats(
        fsx_available=fsx,
        loaded_models=len(loaded),
        available_models=len(names) if names is not None else None,
        total_loads=sum(one.ready + one.failed for one in loads.values()),
        failed_loads=sum(one.failed for one in loads.values()),
        avg_load_time_seconds=seconds / ready if ready else None,
        models={
            model_id: OneModelStats(
                sessions=loaded.get(model_id, 0),
                loads=loads[model_id].ready if model_id in loads else 0,
                failed_loads=loads[model_id].failed if model_id in loads else 0,
                avg_load_time_seconds=loads[model_id].average if model_id in loads else None,
            )
            for model_id in sorted({*loads, *loaded})
        },
    )


def _wash_stats(service: Service) -> WashStats:
    counts = service.engine.counts
    total = counts.wash_seconds.get(TOTAL)
    return WashStats(
        passed=counts.washes_passed,
        failed=dict(sorted(counts.washes_failed.items())),
        avg_seconds=total.sum / total.total if total and total.total else None,
        quarantined_slots=sum(s.state is SlotState.QUARANTINED for s in service.engine.node.slots),
    )


def _loaded(service: Service) -> dict[str, int]:
    """How many sessions have each model loaded."""
    found: dict[str, int] = {}
    for session in service.engine.node.live_sessions():
        if session.state in (SessionState.READY, SessionState.WORKING):
            found[session.workload.model_id] = found.get(session.workload.model_id, 0) + 1
    return found


async def _on_disk(service: Service) -> tuple[bool | None, tuple[str, ...] | None]:
    """Whether the mount of the models is there, and what is in the store. A mount that hangs holds up
    nobody, and few threads, however long it is asked about."""
    mount: Path = service.settings.fsx_mount_point
    if not _looks.acquire(blocking=False):
        return None, None

    def look() -> tuple[bool, tuple[str, ...]]:
        try:
            return mount.is_dir(), service.models.names()
        finally:
            _looks.release()

    try:
        return await call_in_thread(look, limit=FILES_SECONDS, name="metrics-files")
    except (OSError, TimeoutError):
        return None, None


class _OfNode(Collector):
    """The figures as Prometheus has them, made anew for each scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Every family, also those that count nothing yet."""
        engine, enclave = self._service.engine, self._service.enclave
        sessions = GaugeMetricFamily("gpu_server_sessions", "Sessions by state.", labels=["state"])
        states = [session.state for session in engine.node.live_sessions()]
        for state in _LIVE:
            sessions.add_metric([state], states.count(state))
        yield sessions
        slots = GaugeMetricFamily("gpu_server_slots", "Slots by state.", labels=["state"])
        for slot_state in SlotState:
            slots.add_metric([slot_state], sum(s.state is slot_state for s in engine.node.slots))
        yield slots
        submitted = CounterMetricFamily("gpu_server_tasks_submitted", "Tasks that were accepted.")
        submitted.add_metric([], engine.counts.submitted)
        yield submitted
        ended = CounterMetricFamily("gpu_server_tasks_ended", "Tasks that have ended.", labels=["status"])
        for status in _ENDS:
            ended.add_metric([status], engine.counts.ended[status])
        yield ended
        seconds = CounterMetricFamily(
            "gpu_server_task_run_seconds", "Time that completed tasks took from start to end."
        )
        seconds.add_metric([], engine.counts.run_seconds)
        yield seconds
        yield from _wash_families(engine.counts)
        up = GaugeMetricFamily("gpu_server_enclave_up", "Whether the enclave answers; 0 where there is none.")
        up.add_metric([], enclave is not None and enclave.health.healthy)
        yield up
        restarts = CounterMetricFamily(
            "gpu_server_enclave_restarts", "Starts of the enclave after the first."
        )
        restarts.add_metric([], enclave.restarts if enclave is not None else 0)
        yield restarts
        grants = CounterMetricFamily(
            "gpu_server_grants", "Openings of sealed sessions, by what came of them.", labels=["outcome"]
        )
        for outcome, count in sorted(self._service.opening.outcomes.items()):
            grants.add_metric([outcome], count)
        yield grants


def _wash_families(counts: Counts) -> Iterator[Metric]:
    passed = CounterMetricFamily("gpu_server_washes_passed", "Washes of a slot that freed it.")
    passed.add_metric([], counts.washes_passed)
    yield passed
    failed = CounterMetricFamily(
        "gpu_server_washes_failed",
        "Washes of a slot that led into quarantine, by the step that did not pass.",
        labels=["step"],
    )
    for step in dict.fromkeys((*STEPS, *sorted(counts.washes_failed))):
        failed.add_metric([step], counts.washes_failed[step])
    yield failed
    seconds = HistogramMetricFamily(
        "gpu_server_wash_seconds",
        f"Time of steps of washes that passed; `{TOTAL}` is from the order to a slot that is free.",
        labels=["step"],
    )
    for step, durations in sorted(counts.wash_seconds.items()):
        bounds, so_far = [*map(str, BUCKETS), "+Inf"], accumulate(durations.counts)
        seconds.add_metric([step], list(zip(bounds, so_far, strict=True)), durations.sum)
    yield seconds
