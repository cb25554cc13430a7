"""Processes whose engine has forgotten that it started them."""

from __future__ import annotations

import subprocess
from pathlib import Path

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


def test_they_are_killed() -> None:
    """A real process in a real control group is found, and ended."""
    with group_of(ID) as group, subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
            assert processes_of(ID) == {process.pid}
            kill(processes_of(ID) | {0})
            assert process.wait(10) == -9
        finally:
            process.kill()
            process.wait()
        assert processes_of(ID) == set()
