"""Workers as plain processes, for machines with no Docker: the demo and the tests. It isolates nothing.

A worker is a session leader with a record file beside its run folder, so a service that was killed finds its
workers again. Exits are heard on pidfds, for children and for adopted workers alike. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gpu_server.core.errors import FailureCode
from gpu_server.drivers.clock import boot_id
from gpu_server.drivers.process_output import (
    DiscardedOutput,
    PipedOutput,
    make_no_pipes,
    make_pipes,
    open_pipes,
    remove_pipes,
)
from gpu_server.drivers.process_record import (
    ProcessRecord,
    read_record,
    records,
    remove_record,
    write_record,
)
from gpu_server.drivers.process_residue import DetachedProcesses, OutsideRunFolder
from gpu_server.drivers.process_tree import Leader, is_alive, leader_now, members, open_pidfd, send
from gpu_server.drivers.residue_thread import InThread
from gpu_server.ports import (
    Belongings,
    Cleaner,
    Contract,
    CreatedWorker,
    FoundWorker,
    OutputLost,
    RuntimeUnreachable,
    SeenWorker,
    StartRefused,
    WorkerExit,
    WorkerSpec,
)

UNKNOWN_EXIT: Final = 255
"""Exit code of a worker that ended while no service was there to see it: the kernel tells parents only."""

_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "TZ")
_KILL_SECONDS: Final = 10.0
_TEMPORARY: Final = "tmp"

# The worker's program starts only when a line comes over standard input, which is after its pid was recorded.
# If the service dies in between, the shell reads the end of the file and no unrecorded worker exists.
_GATE: Final = 'read -r go || exit 125; ulimit -c 0; cd -- "$0" || exit 125; exec "$@" </dev/null'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Created:
    """A worker between create and start: what will be run, and the ends of the pipes it gets."""

    spec: WorkerSpec
    command: tuple[str, ...]
    writers: tuple[int, int]

    def let_go(self) -> None:
        for descriptor in self.writers:
            os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watch:
    """A running worker: its pidfd, readable when it ends, and the event that is set when it was heard."""

    pidfd: int
    folder: Path
    leader: Leader
    marker: str
    ended: asyncio.Event


class ProcessRuntime:
    """`ContainerRuntime` over subprocesses. `run_dir` is the root of the run folders."""

    name: Literal["docker", "process"] = "process"

    def __init__(self, instance: str, run_dir: Path, working_dir: Path) -> None:
        self.interruptions = 0  # there is no engine between us and the workers
        self.warnings: tuple[str, ...] = (
            "workers run as plain processes: no isolation of files, network, memory or GPUs between tenants;"
            " use it for demonstrations and development only",
        )
        self._instance = instance
        self._run_dir = run_dir
        self._working_dir = working_dir
        self._boot_id = boot_id()
        self._heard_exit: Callable[[WorkerExit], None] | None = None
        self._created: dict[str, _Created] = {}
        self._watched: dict[str, _Watch] = {}
        self._outputs: weakref.WeakValueDictionary[str, PipedOutput] = weakref.WeakValueDictionary()
        self._discarded: dict[str, DiscardedOutput] = {}

    async def open(self, heard_exit: Callable[[WorkerExit], None]) -> None:
        """Find the workers of an earlier life and listen. Exits that happened before are heard too, once."""
        self._heard_exit = heard_exit
        loop = asyncio.get_running_loop()
        for folder, record in records(self._run_dir, self._instance):
            if record.leader is None:
                continue
            if self._runs(record) and self._watch(folder, record, record.leader):
                self._discarded[record.name] = DiscardedOutput(folder)
                continue
            if record.exit_code is None:
                # Kept, because a code can be had only once.
                record = dataclasses.replace(record, exit_code=self._reap(record))
                with contextlib.suppress(OSError):
                    write_record(folder, record)
            loop.call_soon(heard_exit, _exit(record))

    async def close(self) -> None:
        """Stop listening. Workers go on; one that was created and not started is left as a record."""
        loop = asyncio.get_running_loop()
        for watch in self._watched.values():
            loop.remove_reader(watch.pidfd)
            os.close(watch.pidfd)
            watch.ended.set()
        self._watched.clear()
        for created in self._created.values():
            created.let_go()
        self._created.clear()
        for output in list(self._outputs.values()):
            output.close()
        for discarded in self._discarded.values():
            discarded.close()
        self._discarded.clear()
        self._heard_exit = None

    async def ping(self, limit: float = 5.0) -> None:
        """Nothing to do: the machine itself is the engine."""

    async def require_image(self, image: str) -> None:
        """Nothing to do: a process needs no image."""

    async def create(self, spec: WorkerSpec) -> CreatedWorker:
        """Write the worker's record and make its pipes. Raises `StartRefused`."""
        command = self._command(spec)
        folder = spec.folder.path
        old = read_record(folder)
        if old is not None and old.leader is not None:
            if old.name == spec.name:
                raise StartRefused(FailureCode.START_FAILED, f"worker {spec.name} has been started already")
            if self._runs(old):
                raise StartRefused(
                    FailureCode.START_FAILED, f"worker {old.name} still runs in session {old.session_id}"
                )
        if (replaced := self._created.pop(spec.name, None)) is not None:
            replaced.let_go()
        try:
            write_record(folder, self._record(spec))
            output, writers = make_no_pipes(folder) if spec.sealed else make_pipes(folder)
            (folder / _TEMPORARY).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StartRefused(FailureCode.START_FAILED, f"the run folder is not usable: {error}") from error
        self._outputs[spec.name] = output
        self._created[spec.name] = _Created(spec=spec, command=command, writers=writers)
        return CreatedWorker(name=spec.name, container_id=spec.name, output=output)

    async def start(self, name: str) -> None:
        """Spawn a created worker. Raises `StartRefused`, also if an earlier life created it, or it ran."""
        created = self._created.pop(name, None)
        if created is None:
            if name in self._watched:
                return
            raise StartRefused(FailureCode.START_FAILED, f"there is no worker {name} to start")
        folder = created.spec.folder.path
        gate_read, gate_write = os.pipe()
        try:
            pid = self._spawn(created, gate_read)
            leader = leader_now(pid)
            if leader is None:
                raise StartRefused(FailureCode.START_FAILED, f"worker {name} vanished as it started")
            record = dataclasses.replace(
                self._record(created.spec), pid=leader.pid, start_time=leader.start_time
            )
            self._watch(folder, record, leader)
            write_record(folder, record)
            with contextlib.suppress(BrokenPipeError):  # it was killed meanwhile, which is heard as an exit
                os.write(gate_write, b"go\n")
        except OSError as error:
            raise StartRefused(FailureCode.START_FAILED, f"worker {name} cannot start: {error}") from error
        finally:
            os.close(gate_read)
            os.close(gate_write)
            created.let_go()

    async def reattach(self, name: str, *, from_start: bool = False) -> FoundWorker | None:
        """See the port. Nothing that a process writes is kept, so `from_start` cannot be had."""
        found = self._find(name)
        if found is None or found[1].leader is None:
            return None
        if from_start:
            raise OutputLost(f"what worker {name} wrote is not kept")
        folder, record = found
        if (old := self._outputs.pop(name, None)) is not None:
            old.close()
        if (discarded := self._discarded.pop(name, None)) is not None:
            discarded.close()
        output = self._outputs[name] = open_pipes(folder)
        worker_exit = None if name in self._watched else _exit(record)
        if worker_exit is not None:
            output.finish()
        return FoundWorker(name=name, container_id=name, output=output, exit=worker_exit)

    async def remove(self, name: str, *, grace: float) -> None:
        """See the port. A pid is signalled only if its start time is the recorded one."""
        found = self._find(name)
        watch = self._watched.get(name)
        if watch is not None:
            # Of a worker of this life, what is in memory counts: it could have changed its own record.
            folder = watch.folder
            await self._end(watch.leader, watch.marker, watch, grace)
        elif found is None:
            return
        else:
            folder, record = found
            if record.leader is not None and record.boot_id == self._boot_id:
                await self._end(record.leader, record.marker, None, grace)
        if (created := self._created.pop(name, None)) is not None:
            created.let_go()
        if (output := self._outputs.pop(name, None)) is not None:
            output.finish()
        if (discarded := self._discarded.pop(name, None)) is not None:
            discarded.close()
        remove_pipes(folder)
        remove_record(folder)

    async def list_workers(self) -> tuple[SeenWorker, ...]:
        """All workers that have a record, started or not, running or not."""
        return tuple(
            SeenWorker(
                name=record.name,
                container_id=record.name,
                session_id=record.session_id,
                fence=record.fence,
                running=self._runs(record),
            )
            for _folder, record in records(self._run_dir, self._instance)
        )

    async def foreign_gpu_holders(self) -> Mapping[str, str]:
        """Always empty: without an engine there is nobody to ask."""
        return {}

    async def belongings(self, name: str) -> Belongings | None:
        """See the port. Whatever a process has is in its run folder."""
        return None if self._find(name) is None else Belongings(container_id=name)

    def cleaners(self) -> tuple[Cleaner, ...]:
        """See the port."""
        return InThread(DetachedProcesses(self._instance, self._run_dir)), OutsideRunFolder()

    def _find(self, name: str) -> tuple[Path, ProcessRecord] | None:
        entries = records(self._run_dir, self._instance)
        return next((entry for entry in entries if entry[1].name == name), None)

    # -- starting -----------------------------------------------------------------------------------------

    def _command(self, spec: WorkerSpec) -> tuple[str, ...]:
        if not spec.process_command:
            raise StartRefused(
                FailureCode.START_FAILED, "preset has no process_command, which RUNTIME=process needs"
            )
        program, *arguments = spec.process_command
        found = sys.executable if program == "python" else shutil.which(program)
        if found is None:
            raise StartRefused(FailureCode.START_FAILED, f"process_command: there is no program {program}")
        return (found, *arguments)

    def _record(self, spec: WorkerSpec) -> ProcessRecord:
        return ProcessRecord(
            instance=self._instance,
            name=spec.name,
            session_id=spec.session_id,
            fence=spec.fence,
            marker=f"GPU_WORKER_SOCKET={spec.folder.socket}",
            boot_id=self._boot_id,
        )

    def _spawn(self, created: _Created, gate: int) -> int:
        stdout, stderr = created.writers
        return os.posix_spawn(
            "/bin/sh",
            ("sh", "-c", _GATE, str(self._working_dir), *created.command),
            environment(created.spec),
            file_actions=(
                (os.POSIX_SPAWN_DUP2, gate, 0),
                (os.POSIX_SPAWN_DUP2, stdout, 1),
                (os.POSIX_SPAWN_DUP2, stderr, 2),
            ),
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM),
        )

    # -- ending -------------------------------------------------------------------------------------------

    def _watch(self, folder: Path, record: ProcessRecord, leader: Leader) -> bool:
        """Hear this worker's exit; False if it has ended already and nothing will be heard."""
        pidfd = open_pidfd(leader)
        if pidfd is None:
            return False
        watch = _Watch(pidfd=pidfd, folder=folder, leader=leader, marker=record.marker, ended=asyncio.Event())
        self._watched[record.name] = watch
        asyncio.get_running_loop().add_reader(pidfd, self._ended, record, watch)
        return True

    def _ended(self, record: ProcessRecord, watch: _Watch) -> None:
        asyncio.get_running_loop().remove_reader(watch.pidfd)
        os.close(watch.pidfd)
        del self._watched[record.name]
        ended = dataclasses.replace(record, exit_code=self._reap(record))
        current = read_record(watch.folder)
        if current is not None and current.name == record.name:
            with contextlib.suppress(OSError):
                write_record(watch.folder, ended)
        watch.ended.set()
        if self._heard_exit is not None:
            self._heard_exit(_exit(ended))

    def _reap(self, record: ProcessRecord) -> int:
        """The exit code of a worker that has ended, where it was our child."""
        if record.pid is None or record.boot_id != self._boot_id:
            return UNKNOWN_EXIT
        try:
            pid, status = os.waitpid(record.pid, os.WNOHANG)
        except ChildProcessError:
            return UNKNOWN_EXIT
        if pid == 0:
            return UNKNOWN_EXIT
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code

    def _runs(self, record: ProcessRecord) -> bool:
        return record.leader is not None and record.boot_id == self._boot_id and is_alive(record.leader)

    async def _end(self, leader: Leader, marker: str, watch: _Watch | None, grace: float) -> None:
        """SIGTERM to all, up to `grace` seconds for the leader, SIGKILL to all until none is left."""
        if grace > 0 and watch is not None:
            await asyncio.to_thread(_signal_all, leader, marker, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await watch.ended.wait()
        pause, waited = 0.002, 0.0
        while await asyncio.to_thread(_signal_all, leader, marker, signal.SIGKILL):
            if waited > _KILL_SECONDS:
                raise RuntimeUnreachable(f"process {leader.pid} was killed and does not end")
            await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, 0.5)
        if watch is not None:
            await watch.ended.wait()


def environment(spec: WorkerSpec) -> dict[str, str]:
    """The worker's environment: a few names of the service's, the preset's, and the contract's, which win.

    Nothing else is inherited: the service's environment holds its keys.
    """
    reserved = {
        "HOME": str(spec.folder.share),
        "USER": "worker",
        "LOGNAME": "worker",
        "TMPDIR": str(spec.folder.path / _TEMPORARY),  # goes with the run folder
        "GPU_SESSION_ID": spec.session_id,
        "GPU_WORKER_SOCKET": str(spec.folder.socket),
        "CUDA_VISIBLE_DEVICES": ",".join(spec.gpu_uuids),
    }
    if spec.model_path is not None:
        reserved["MODEL_PATH"] = str(spec.model_path)
    if spec.contract is Contract.EXEC:
        reserved["TASK_ID"] = spec.task_id or ""
        reserved["TASK_INPUT"] = str(spec.folder.task / "input.json")
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**inherited, **spec.env, **reserved}


def _signal_all(leader: Leader, marker: str, number: signal.Signals) -> int:
    """Signal every process of a worker; how many there were."""
    found = members(leader, marker)
    for process in found:
        send(process, number)
    return len(found)


def _exit(record: ProcessRecord) -> WorkerExit:
    """The exit of a worker that has ended; its record may not have come to say with which code."""
    code = UNKNOWN_EXIT if record.exit_code is None else record.exit_code
    return WorkerExit(name=record.name, session_id=record.session_id, exit_code=code, oom_killed=False)
