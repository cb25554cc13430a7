"""What a session's worker is started with: its preset, its lease and its input, as the attendant's plan."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_server.core.errors import FailureCode, Refusal
from gpu_server.core.sessions import Session
from gpu_server.core.slots import Slot
from gpu_server.inputs import Inputs
from gpu_server.ports import Contract, ModelStore, RunFolder, StartRefused, WorkerSpec, worker_name
from gpu_server.presets import Preset

SEALED_KEY_ARN = "SEALED_KMS_KEY_ARN"
SEALED_TENANT = "SEALED_TENANT"
SEALED_POOL = "SEALED_POOL"
_RESERVED = frozenset({SEALED_KEY_ARN, SEALED_TENANT, SEALED_POOL})

FindPreset = Callable[[str, str], Preset]
Tell = Callable[[int, int | None], None]
"""Hears how many bytes of how many are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to bring up a worker that is not there. `prepare_model` may take long, and gives None for a worker
    without weights; `hydrate` is for meanwhile. `spec` is asked for when the run folder exists."""

    image: str
    task_input: bytes | None
    prepare_model: Callable[[Tell], Awaitable[Path | None]]
    hydrate: Callable[[Path], Coroutine[Any, Any, None]]
    spec: Callable[[RunFolder, Path | None], WorkerSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One session's worker. `launch` raises `StartRefused`; a worker that runs already does not need it."""

    session_id: str
    name: str
    contract: Contract
    uid: int
    launch: Callable[[], Launch]
    sealed: bool = False


class Launcher:
    """Makes plans. `find_preset` raises `Refusal` for a preset that is not there; `uid_base` is the uid of
    the workers in the first slot; `gpu_memory_utilization` what share of a GPU's memory they may take."""

    def __init__(
        self,
        *,
        find_preset: FindPreset,
        models: ModelStore,
        inputs: Inputs,
        uid_base: int,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        self.find_preset = find_preset
        self._models, self._inputs, self.uid_base = models, inputs, uid_base
        self._gpu_memory_utilization = gpu_memory_utilization

    def plan(self, session: Session, slots: Sequence[Slot]) -> Plan:
        """The plan for a session that holds these slots."""
        # Without root the run folder is our own, and a worker with another uid could not write its socket.
        uid = self.uid_base + slots[0].number if os.geteuid() == 0 else os.geteuid()
        name = worker_name(session.id, session.fence)
        gpus = tuple(slot.spec.uuid for slot in slots if slot.spec.is_gpu)
        contract = Contract.HTTP if session.workload.serves_sessions else Contract.EXEC
        return Plan(
            session_id=session.id,
            name=name,
            contract=contract,
            uid=uid,
            launch=lambda: self._launch(session, name, contract, uid, gpus),
            sealed=session.sealing is not None,
        )

    async def fetch_ahead(self, session: Session) -> None:
        """Have the model of a session that will start soon, and read it ahead: all that its own start then
        finds done. Raises `Refusal` and `StartRefused`."""
        workload = session.workload
        preset = self.find_preset(workload.model_id, workload.task_preset)
        model = await self._prepare_model(preset, workload.model_id, lambda done, total: None)
        if model is not None:
            await self._models.hydrate(model)

    def _launch(
        self, session: Session, name: str, contract: Contract, uid: int, gpus: tuple[str, ...]
    ) -> Launch:
        workload = session.workload
        try:
            preset = self.find_preset(workload.model_id, workload.task_preset)
        except Refusal as refusal:  # the presets were others when the session was made
            raise StartRefused(FailureCode.START_FAILED, refusal.message) from refusal
        if preset.worker_contract is not contract:
            raise StartRefused(FailureCode.START_FAILED, "the preset has another contract than before")
        task_id = next(iter((*session.busy, *session.queue)), None) if contract is Contract.EXEC else None
        return Launch(
            image=preset.docker_image,
            task_input=self._task_input(task_id) if task_id is not None else None,
            prepare_model=lambda tell: self._prepare_model(preset, workload.model_id, tell),
            hydrate=self._models.hydrate,
            spec=lambda folder, model_path: WorkerSpec(
                name=name,
                session_id=session.id,
                fence=session.fence,
                tenant=session.tenant,
                task_id=task_id,
                contract=contract,
                image=preset.docker_image,
                command=tuple(preset.command) if preset.command else None,
                process_command=tuple(preset.process_command) if preset.process_command else None,
                env={
                    "GPU_MEMORY_UTILIZATION": f"{self._gpu_memory_utilization:g}",
                    **_without_sealing(preset.env_vars),
                    "MODEL_ID": workload.model_id,
                    "TASK_PRESET": workload.task_preset,
                    "MAX_CONCURRENT_TASKS": str(workload.max_concurrent_tasks),
                    "GPU_COUNT": str(len(gpus)),
                    **_sealing_of(session),
                },
                gpu_uuids=gpus,
                uid=uid,
                model_path=model_path,
                folder=folder,
                limits=preset.limits,
                sealed=session.sealing is not None,
            ),
        )

    def _task_input(self, task_id: str) -> bytes:
        body = self._inputs.get(task_id)
        if body is None:
            raise StartRefused(FailureCode.SERVICE_RESTARTED, "the task's input was lost with the service")
        return body

    async def _prepare_model(self, preset: Preset, model_id: str, tell: Tell) -> Path | None:
        return None if preset.model == "none" else await self._models.prepare(model_id, tell)


def _sealing_of(session: Session) -> dict[str, str]:
    """What tells a worker that it serves sealed tasks, and which: those of this tenant, key and pool
    alone."""
    if session.sealing is None:
        return {}
    return {
        SEALED_KEY_ARN: session.sealing.kms_key_arn,
        SEALED_TENANT: session.tenant,
        SEALED_POOL: session.sealing.pool,
    }


def _without_sealing(env: Mapping[str, str]) -> dict[str, str]:
    """A preset cannot make a worker take itself for a sealed one."""
    return {name: value for name, value in env.items() if name not in _RESERVED}
