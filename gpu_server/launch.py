"""What a session's worker is started with: its preset, its lease and its input, as the attendant's plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_server.core.errors import FailureCode, Refusal
from gpu_server.core.sessions import Session
from gpu_server.core.slots import Slot
from gpu_server.inputs import Inputs
from gpu_server.ports import Contract, ModelStore, RunFolder, StartRefused, WorkerSpec, worker_name
from gpu_server.presets import Preset

FindPreset = Callable[[str, str], Preset]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to bring up a worker that is not there. `find_model` may block for long, on a network file system:
    it gets a thread. `spec` is asked for when the run folder exists."""

    image: str
    task_input: bytes | None
    find_model: Callable[[], Path | None]
    spec: Callable[[RunFolder, Path | None], WorkerSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One session's worker. `launch` raises `StartRefused`; a worker that runs already does not need it."""

    session_id: str
    name: str
    contract: Contract
    uid: int
    launch: Callable[[], Launch]


class Launcher:
    """Makes plans. `find_preset` raises `Refusal` for a preset that is not there; `uid_base` is the uid of
    the workers in the first slot."""

    def __init__(self, *, find_preset: FindPreset, models: ModelStore, inputs: Inputs, uid_base: int) -> None:
        self.find_preset = find_preset
        self._models, self._inputs, self._uid_base = models, inputs, uid_base

    def plan(self, session: Session, slots: Sequence[Slot]) -> Plan:
        """The plan for a session that holds these slots."""
        # Without root the run folder is our own, and a worker with another uid could not write its socket.
        uid = self._uid_base + slots[0].number if os.geteuid() == 0 else os.geteuid()
        name = worker_name(session.id, session.fence)
        gpus = tuple(slot.spec.uuid for slot in slots if slot.spec.is_gpu)
        contract = Contract.HTTP if session.workload.serves_sessions else Contract.EXEC
        return Plan(
            session_id=session.id,
            name=name,
            contract=contract,
            uid=uid,
            launch=lambda: self._launch(session, name, contract, uid, gpus),
        )

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
            find_model=lambda: self._find_model(preset, workload.model_id),
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
                    **preset.env_vars,
                    "MODEL_ID": workload.model_id,
                    "TASK_PRESET": workload.task_preset,
                },
                gpu_uuids=gpus,
                uid=uid,
                model_path=model_path,
                folder=folder,
                limits=preset.limits,
            ),
        )

    def _task_input(self, task_id: str) -> bytes:
        body = self._inputs.get(task_id)
        if body is None:
            raise StartRefused(FailureCode.SERVICE_RESTARTED, "the task's input was lost with the service")
        return body

    def _find_model(self, preset: Preset, model_id: str) -> Path | None:
        if preset.model == "none":
            return None
        try:
            found = self._models.find(model_id)
        except ValueError:  # an id that cannot be a folder's name, such as name:tag
            found = None
        if found is None:
            raise StartRefused(FailureCode.MODEL_MISSING, f"model {model_id} is not in the model store")
        return found
