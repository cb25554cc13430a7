"""What a worker process may leave: processes of its own that have left its session, and so its signals.

They are known by the entry of their environment that only this session's worker was given. A program that
hides that is not found by it: processes are not isolated, and the runtime says so.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpu_server.drivers.process_record import records
from gpu_server.drivers.process_tree import Leader, environment_of, everyone
from gpu_server.drivers.residue_processes import end_all
from gpu_server.drivers.residue_thread import Halt
from gpu_server.drivers.run_folder import SESSION_ID
from gpu_server.ports import EndedLease, NotSeen


class DetachedProcesses:
    """Processes of the session's worker; without a session, of workers that have no record any more."""

    name = "detached_processes"

    def __init__(self, instance: str, run_dir: Path) -> None:
        self._instance, self._run_dir = instance, run_dir
        marker = rf"GPU_WORKER_SOCKET={re.escape(str(run_dir))}/({SESSION_ID.pattern})/share/worker\.sock"
        self._marker = re.compile(os.fsencode(marker))

    def look(self, lease: EndedLease, halt: Halt) -> int:
        return len(self._find(lease, halt))

    def remove(self, lease: EndedLease, halt: Halt) -> None:
        end_all(lambda: self._find(lease, halt), halt)

    def _find(self, lease: EndedLease, halt: Halt) -> list[Leader]:
        found = []
        for process in everyone():
            halt()
            sessions = self._sessions(process) if process.pid != os.getpid() else set()
            if lease.session_id is None:
                # Recorded before they are started, so this is asked afterwards.
                if sessions and not sessions & {
                    r.session_id for _, r in records(self._run_dir, self._instance)
                }:
                    found.append(process)
            elif lease.session_id in sessions:
                found.append(process)
        return found

    def _sessions(self, process: Leader) -> set[str]:
        entries = environment_of(process.pid)
        return {os.fsdecode(match[1]) for entry in entries if (match := self._marker.fullmatch(entry))}


class OutsideRunFolder:
    """What this runtime cannot know: its workers have the service's uid, also where each slot has one."""

    name = "outside_run_folder"

    async def look(self, lease: EndedLease) -> int:
        """Always raises `NotSeen`."""
        raise NotSeen("workers run as the service, so what they leave there cannot be told from others'")

    async def remove(self, lease: EndedLease) -> None:
        """See the port; there is nothing to do."""
