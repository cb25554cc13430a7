"""The enclave as a child process, for machines without Docker, and tests. It isolates nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from gpu_server.drivers.clock import boot_id
from gpu_server.drivers.enclave_host import (
    ROLE,
    Ending,
    last_words,
    make_folder,
    make_of,
    remove_folder,
)
from gpu_server.drivers.process_record import ProcessRecord, read_record, write_record
from gpu_server.drivers.process_tree import is_alive, leader_now, members, send
from gpu_server.ports import EnclaveDown, RuntimeUnreachable

_WORDS_BYTES: Final = 4096
_KILL_SECONDS: Final = 10.0

# The program begins when a line comes, which is after its pid was recorded. If the service dies in between,
# the shell reads the end of the file, and no process is left that nobody knows.
_GATE: Final = 'read -r go || exit 125; exec </dev/null; ulimit -c 0; cd -- "$0" || exit 125; exec "$@"'


class ProcessEnclave:
    """`EnclaveHost` over one process.

    `folder` is this instance's alone, made before a start and removed after the end; the process works there.
    `make` names what else than the command it is made from, such as the version of its program.
    """

    def __init__(
        self,
        instance: str,
        folder: Path,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        make: str = "",
    ) -> None:
        self._instance, self._folder = instance, folder
        self._command = tuple(command)
        self._marker = f"GPU_SERVER_ENCLAVE={make_of([instance, self._command, dict(environment), make])}"
        self._environment = {**environment, **dict([self._marker.split("=", 1)])}
        self._boot_id = boot_id()

    async def find(self) -> bool:
        """See the port."""
        record = self._record()
        return record is not None and record.marker == self._marker and self._runs(record)

    async def start(self) -> None:
        """See the port."""
        await self.stop(0.0)
        try:
            self._spawn()
        except OSError as error:
            raise EnclaveDown(f"its process does not start: {error}") from error

    async def ended(self) -> str | None:
        """See the port; with what it wrote last."""
        record = self._record()
        if record is None:
            return "its process has gone"
        if self._runs(record):
            return None
        code = self._reap(record)
        try:
            words = last_words(self._log.read_bytes()[-_WORDS_BYTES:])
        except OSError:
            words = ""
        return f"its process has ended{f' with {code}' if code is not None else ''}{words and f': {words}'}"

    async def stop(self, grace: float) -> Ending:
        """See the port."""
        ending: Ending = "none"
        record = self._record()
        if record is not None and record.leader is not None and record.boot_id == self._boot_id:
            try:
                ending = await self._end(record, grace)
            except OSError as error:
                raise RuntimeUnreachable(f"the processes of this machine cannot be seen: {error}") from error
        remove_folder(self._folder)
        return ending

    def close(self) -> None:
        """See the port: there is nothing to let go of."""

    @property
    def _log(self) -> Path:
        return self._folder / "enclave.log"

    def _record(self) -> ProcessRecord | None:
        record = read_record(self._folder)
        return record if record is not None and record.instance == self._instance else None

    def _runs(self, record: ProcessRecord) -> bool:
        return record.leader is not None and record.boot_id == self._boot_id and is_alive(record.leader)

    def _spawn(self) -> None:
        make_folder(self._folder, os.geteuid())
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        gate_read, gate_write = os.pipe()
        try:
            pid = os.posix_spawn(
                "/bin/sh",
                ("sh", "-c", _GATE, str(self._folder), *self._command),
                self._environment,
                file_actions=(
                    (os.POSIX_SPAWN_DUP2, gate_read, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ),
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM),
            )
            leader = leader_now(pid)
            if leader is None:
                raise ProcessLookupError("it vanished as it started")
            write_record(
                self._folder,
                ProcessRecord(
                    instance=self._instance,
                    name=ROLE,
                    session_id="",
                    fence=0,
                    marker=self._marker,
                    boot_id=self._boot_id,
                    pid=leader.pid,
                    start_time=leader.start_time,
                ),
            )
            with contextlib.suppress(BrokenPipeError):
                os.write(gate_write, b"go\n")
        finally:
            for descriptor in (log, gate_read, gate_write):
                os.close(descriptor)

    def _reap(self, record: ProcessRecord) -> int | None:
        """The exit code of a process that has ended, where it was our child and this is the first to ask."""
        if record.pid is None or record.boot_id != self._boot_id:
            return None
        try:
            pid, status = os.waitpid(record.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        return os.waitstatus_to_exitcode(status) if pid else None

    async def _end(self, record: ProcessRecord, grace: float) -> Ending:
        if await self._wait(record, 0.0):
            return "ended"
        if grace > 0:
            self._signal(record, signal.SIGTERM)
            if await self._wait(record, grace):
                return "terminated"
        self._signal(record, signal.SIGKILL)
        if not await self._wait(record, _KILL_SECONDS):
            raise RuntimeUnreachable(f"process {record.pid} was killed and does not end")
        return "killed"

    def _signal(self, record: ProcessRecord, number: signal.Signals) -> None:
        if record.leader is not None:
            for process in members(record.leader, record.marker):
                send(process, number)

    async def _wait(self, record: ProcessRecord, patience: float) -> bool:
        """Whether none of its processes is left, within `patience` seconds."""
        pause, waited = 0.002, 0.0
        while record.leader is not None and members(record.leader, record.marker):
            if waited >= patience:
                return False
            await asyncio.sleep(pause)
            waited += pause
            pause = min(2 * pause, 0.1)
        self._reap(record)
        return True
