"""Processes that have left their worker's session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpu_server.drivers.process_record import ProcessRecord, write_record
from gpu_server.drivers.process_residue import DetachedProcesses, OutsideRunFolder
from gpu_server.ports import EndedLease, NotSeen

NO_LEASE = EndedLease(session_id=None, fence=6, slot_ids=("cpu-0",))


def lease(session_id: str) -> EndedLease:
    return EndedLease(session_id=session_id, fence=5, slot_ids=("cpu-0",))


def halt() -> None:
    """Nobody has given up."""


@contextmanager
def marked(run_dir: Path, session_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that some worker has left behind, with the session's entry in its environment."""
    env = {**os.environ, "GPU_WORKER_SOCKET": f"{run_dir}/{session_id}/share/worker.sock"}
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


def test_the_sessions_own_are_ended(tmp_path: Path) -> None:
    """By the environment that only its worker was given: another session's live on, another service's too."""
    place = DetachedProcesses("i", tmp_path / "run")
    with (
        marked(tmp_path / "run", "s_1") as ours,
        marked(tmp_path / "run", "s_10") as other,
        marked(tmp_path / "elsewhere", "s_1") as foreign,
    ):
        assert place.look(lease("s_1"), halt) == 1
        place.remove(lease("s_1"), halt)
        assert place.look(lease("s_1"), halt) == 0
        assert ours.wait(60) == -9
        assert other.poll() is None
        assert foreign.poll() is None


def test_without_a_lease_those_whose_worker_has_no_record(tmp_path: Path) -> None:
    """A worker that runs has its record; what it left after that was removed is residue."""
    run = tmp_path / "run"
    (run / "s_2").mkdir(parents=True)
    write_record(
        run / "s_2",
        ProcessRecord(instance="i", name="n", session_id="s_2", fence=1, marker="m", boot_id="b"),
    )
    place = DetachedProcesses("i", run)
    with marked(run, "s_1") as left, marked(run, "s_2") as serving:
        assert place.look(NO_LEASE, halt) == 1
        place.remove(NO_LEASE, halt)
        assert place.look(NO_LEASE, halt) == 0
        assert left.wait(60) == -9
        assert serving.poll() is None


async def test_what_cannot_be_told_apart_is_said() -> None:
    """A wash of a process's slot never looks as if all had been seen."""
    with pytest.raises(NotSeen, match="workers run as the service"):
        await OutsideRunFolder().look(NO_LEASE)
    await OutsideRunFolder().remove(NO_LEASE)
