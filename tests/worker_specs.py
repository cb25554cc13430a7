"""Worker specs for tests of the runtimes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from gpu_server.ports import Contract, Limits, RunFolder, WorkerSpec
from tests.docker_engine import TEST_IMAGE

TEST_UID = 10_123 if os.geteuid() == 0 else os.geteuid()
LIMITS = Limits(memory=256 << 20, cpus=1.0, pids=64, tmp_size=16 << 20, tmp_exec=False, shm_size=8 << 20)


def worker_spec(folder: RunFolder, code: str = "", **changes: Any) -> WorkerSpec:
    """A worker that runs Python `code`, in a container or as a process."""
    spec = WorkerSpec(
        name=f"{folder.session_id}-1",
        session_id=folder.session_id,
        fence=1,
        tenant="tenant-a",
        task_id="t_1",
        contract=Contract.HTTP,
        image=TEST_IMAGE,
        command=("python3", "-u", "-c", code),
        process_command=("python", "-u", "-c", code),
        env={},
        gpu_uuids=(),
        uid=TEST_UID,
        model_path=None,
        folder=folder,
        limits=LIMITS,
    )
    return replace(spec, **changes)
