"""Processes by pid and start time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_server.drivers.process_tree import (
    Leader,
    environment_of,
    everyone,
    is_alive,
    is_ending,
    leader_now,
    members,
    open_pidfd,
    send,
)

MARK = "PROCESS_TREE_TEST=this"
FAMILY = "sleep 300 & setsid sh -c 'echo $$; exec sleep 300' & wait"


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], Leader, int]]:
    """A session leader with a child in its session, and one that left for a session of its own."""
    name, _, value = MARK.partition("=")
    with subprocess.Popen(
        ["/bin/sh", "-c", FAMILY],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, name: value},
    ) as process:
        assert process.stdout is not None
        stray = int(process.stdout.readline())
        leader = leader_now(process.pid)
        assert leader is not None
        try:
            yield process, leader, stray
        finally:
            for member in members(leader, MARK):
                send(member, signal.SIGKILL)
            os.kill(stray, signal.SIGKILL)


def test_a_session_is_its_leader_and_the_leaders_children(
    family: tuple[subprocess.Popen[str], Leader, int],
) -> None:
    """All processes of the session are members, and no others."""
    process, leader, stray = family
    assert is_alive(leader)
    found = {member.pid for member in members(leader, MARK)}
    assert process.pid in found
    assert len(found) == 2
    assert stray not in found


def test_children_of_a_leader_that_is_gone_are_found_by_their_mark(
    family: tuple[subprocess.Popen[str], Leader, int],
) -> None:
    """What a dead leader left behind is still the worker's, if its environment says so."""
    process, leader, _ = family
    send(leader, signal.SIGKILL)
    process.wait(30)
    assert not is_alive(leader)
    assert len(members(leader, MARK)) == 1
    assert members(leader, "PROCESS_TREE_TEST=other") == ()


def test_a_pid_that_is_somebody_elses_now_is_not_touched(
    family: tuple[subprocess.Popen[str], Leader, int],
) -> None:
    """With another start time the same pid is another process: not alive, no members, no signal."""
    process, leader, _ = family
    stranger = replace(leader, start_time=leader.start_time - 1)
    assert not is_alive(stranger)
    assert members(stranger, MARK) == ()
    assert open_pidfd(stranger) is None
    send(stranger, signal.SIGKILL)
    assert process.poll() is None
    assert is_alive(leader)


def test_a_process_that_waits_to_be_reaped_is_not_alive() -> None:
    """A zombie runs nothing; one that was reaped is nothing."""
    with subprocess.Popen(["/bin/true"], start_new_session=True) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        leader = leader_now(process.pid)
        assert leader is not None
        assert not is_alive(leader)
        assert members(leader, MARK) == ()
    assert leader_now(process.pid) is None


def test_who_is_ending() -> None:
    """Not one that runs; one that was killed, or is another by now."""
    with subprocess.Popen(["sleep", "300"]) as process:
        leader = leader_now(process.pid)
        assert leader is not None
        assert not is_ending(leader)
        assert is_ending(replace(leader, start_time=leader.start_time + 1))
        process.kill()
        process.wait()
        assert is_ending(leader)


def test_a_process_lives_as_long_as_one_of_its_threads() -> None:
    """A first thread that has ended makes it look like a zombie; it is still a member, and listed, and
    its environment can be read."""
    name, _, value = MARK.partition("=")
    exit_thread = 60 if os.uname().machine == "x86_64" else 93
    code = (
        "import ctypes, sys, threading; threading.Thread(target=sys.stdin.read).start();"
        f" print('up', flush=True); ctypes.CDLL(None).syscall({exit_thread}, 0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, name: value},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            leader = leader_now(process.pid)
            assert leader is not None
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                os.sched_yield()
            assert is_alive(leader)
            assert members(leader, MARK) == (leader,)
            assert leader in everyone()
            assert MARK.encode() in environment_of(process.pid)
        finally:
            process.kill()
    assert not is_alive(leader)
    assert environment_of(process.pid) == ()
