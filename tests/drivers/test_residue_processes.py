"""Processes that outlive their worker, and those that must."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from gpu_server.drivers.process_tree import everyone, is_ending, leader_now
from gpu_server.drivers.residue_processes import UidProcesses, containers_of, end_all, uids_of_process
from gpu_server.ports import Belongings, EndedLease
from tests.drivers.control_group import group_of

UID, OTHER = 1_900_000_001, 1_900_000_002
LEASE = EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",), uids=(UID,))
CONTAINER = "ab" * 32

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="processes of other uids need root")


def halt() -> None:
    """Nobody has given up."""


def uids_of(lease: EndedLease) -> frozenset[int]:
    return frozenset(lease.uids)


@contextmanager
def running(uid: int, code: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that has become `uid`."""
    become = f"import ctypes, os, sys, threading; os.setgid({uid}); os.setuid({uid}); "
    stay = "print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", become + (code or stay)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


@needs_root
def test_the_uids_processes_are_ended_and_no_others() -> None:
    """Another slot's worker lives on, and so does the service."""
    place = UidProcesses(uids_of)
    with running(UID) as ours, running(OTHER) as other:
        assert place.look(LEASE, halt) == 1
        place.remove(LEASE, halt)
        assert place.look(LEASE, halt) == 0
        assert ours.wait(60) == -9
        assert other.poll() is None


@needs_root
def test_a_process_does_not_hide_behind_a_dead_first_thread() -> None:
    """It looks like a zombie, and runs."""
    exit_thread = 60 if os.uname().machine == "x86_64" else 93
    code = (
        "threading.Thread(target=sys.stdin.read).start(); print('up', flush=True);"
        f" ctypes.CDLL(None).syscall({exit_thread}, 0)"
    )
    place = UidProcesses(uids_of)
    with running(UID, code) as process:
        while "Z" not in _state(process.pid):
            os.sched_yield()
        assert place.look(LEASE, halt) == 1
        place.remove(LEASE, halt)
        assert place.look(LEASE, halt) == 0
        assert process.wait(60) == -9


@needs_root
def test_a_dead_first_thread_hides_no_container() -> None:
    """A thread that has ended is in no control group any more; the process is still another container's."""
    exit_thread = 60 if os.uname().machine == "x86_64" else 93
    code = (
        "threading.Thread(target=sys.stdin.read).start(); print('up', flush=True);"
        f" ctypes.CDLL(None).syscall({exit_thread}, 0)"
    )
    place = UidProcesses(uids_of)
    with running(UID, code) as process, group_of(CONTAINER) as group:
        while "Z" not in _state(process.pid):
            os.sched_yield()
        (group / "cgroup.procs").write_text(str(process.pid))
        try:
            assert containers_of(str(process.pid)) == {CONTAINER}
            assert place.look(LEASE, halt) == 0
            place.remove(LEASE, halt)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


# The first process of a pid namespace, of the uid, which ends only when a zombie in it was reaped.
_ENDING = f"""
import ctypes, os, signal, sys
assert ctypes.CDLL(None).unshare(0x20000000) == 0
def child():
    if (pid := os.fork()) == 0:
        os.setgid({UID}); os.setuid({UID})
        os.write(there, b"x")
        signal.pause()
    os.read(here, 1)
    return pid
here, there = os.pipe()
first, second = child(), child()
os.kill(second, 9); os.waitid(os.P_PID, second, os.WEXITED | os.WNOWAIT)
os.kill(first, 9)
while not int(open(f"/proc/{{first}}/stat").read().rpartition(")")[2].split()[6]) & 4:
    os.sched_yield()
print("up", flush=True)
sys.stdin.readline()
os.waitpid(second, 0); os.waitpid(first, 0)
print("reaped", flush=True)
sys.stdin.read()
"""


@needs_root
def test_a_process_that_is_ending_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it is cannot be told any more, so it does not count if it goes, and does if it stays."""
    place = UidProcesses(uids_of)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _ENDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            with monkeypatch.context() as shorter:
                shorter.setattr("gpu_server.drivers.residue_processes._KILL_SECONDS", 0.01)
                assert place.look(LEASE, halt) == 1
            (ending,) = (p for p in everyone() if uids_of_process(p.pid) == {UID})
            assert is_ending(ending)
            monkeypatch.setattr("gpu_server.drivers.residue_processes.everyone", lambda: iter([ending]))
            reaped: list[bytes] = []

            def let_it_end(stdin: IO[bytes] = process.stdin, stdout: IO[bytes] = process.stdout) -> None:
                stdin.write(b"\n")
                stdin.flush()
                reaped.append(stdout.readline())

            calls = iter((halt, let_it_end))
            assert place.look(LEASE, lambda: next(calls, halt)()) == 0
            assert reaped == [b"reaped\n"]
        finally:
            process.kill()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@needs_root
def test_other_containers_processes_are_not_ours() -> None:
    """Another program may use the same uid in a container of its own; the worker's own container counts."""
    place = UidProcesses(uids_of)
    with running(UID) as process, group_of(CONTAINER) as group:
        (group / "cgroup.procs").write_text(str(process.pid))
        try:
            assert containers_of(str(process.pid)) == {CONTAINER}
            assert place.look(LEASE, halt) == 0
            mine = Belongings(container_id=CONTAINER)
            lease = EndedLease(session_id="s_1", fence=5, slot_ids=(), uids=(UID,), belongings=mine)
            assert place.look(lease, halt) == 1
            place.remove(LEASE, halt)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


def test_uids_of_a_process() -> None:
    """All four; none of a process that is not there."""
    assert uids_of_process(os.getpid()) == {os.geteuid()}
    assert uids_of_process(2**22 + 1) == set()
    assert containers_of(str(2**22 + 1)) == set()


def test_killing_ends_though_something_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be ended is for the next look to find; the wait for it is bounded."""
    monkeypatch.setattr("gpu_server.drivers.residue_processes._KILL_SECONDS", 0.01)
    monkeypatch.setattr("gpu_server.drivers.residue_processes.send", lambda process, number: None)
    here = leader_now(os.getpid())
    assert here is not None
    end_all(lambda: [here], halt)
