"""Processes whose engine has forgotten that it started them."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpu_server.drivers.docker_leftover import kill, processes_of
from tests.drivers.control_group import group_of

ID = "ab" * 32


@pytest.mark.parametrize(
    "place",
    [f"docker/{ID}", f"pids/docker/{ID}", f"system.slice/docker-{ID}.scope", f"pids/docker/{ID}/deep/inside"],
)
def test_they_are_found_by_their_group(tmp_path: Path, place: str) -> None:
    """With each cgroup driver, in each version of control groups, and in groups that a worker made below."""
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "cgroup.procs").write_text("12\n34\n")
    (tmp_path / f"docker/{'cd' * 32}").mkdir(parents=True)
    (tmp_path / f"docker/{'cd' * 32}/cgroup.procs").write_text("56\n")
    assert processes_of(ID, tmp_path) == {12, 34}


def test_nothing_can_be_seen(tmp_path: Path) -> None:
    """Where there are no control groups to look at, none are found."""
    assert processes_of(ID, tmp_path / "not-there") == set()


def test_a_group_that_goes_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a container does which has just ended: nothing runs in it any more."""
    group, real = tmp_path / "docker" / ID, os.scandir
    group.mkdir(parents=True)
    (group / "cgroup.procs").touch()

    def too_late(path: Any = ".") -> Any:
        if str(path) == str(group):
            (group / "cgroup.procs").unlink()
            group.rmdir()
        return real(path)

    monkeypatch.setattr(os, "scandir", too_late)
    assert processes_of(ID, tmp_path) == set()
    assert not group.exists()


def test_they_are_killed() -> None:
    """A real process in a real control group is found, and ended."""
    container_id = secrets.token_hex(32)
    with group_of(container_id) as group, subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
            assert processes_of(container_id) == {process.pid}
            kill(processes_of(container_id) | {0})
            assert process.wait(60) == -9
        finally:
            process.kill()
            process.wait()
        assert processes_of(container_id) == set()
