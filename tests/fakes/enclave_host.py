"""A host of the enclave that fails on demand; what runs on it is the real program, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from enclave.program import Program
from enclave.server import Server, listen_unix

from gpu_server.drivers.enclave_host import Ending
from gpu_server.ports import EnclaveDown, RuntimeUnreachable
from gpu_server.sealed.canonical import Value
from gpu_server.sealed.frames import Code, Op, Request
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm

PCRS = {0: b"\1" * 48, 1: b"\2" * 48, 2: b"\3" * 48}


class FakeEnclaveHost:
    """`EnclaveHost` whose enclave listens at `path`. It outlives its users; `close_for_good` ends it."""

    def __init__(self, path: Path, *, mode: Literal["nitro", "simulated"] = "simulated") -> None:
        self.path, self.mode = path, mode
        self.starts = self.stops = 0
        self.refusal: str | None = None
        """What `start` fails with."""
        self.unreachable: str | None = None
        """Why nothing is known; every method raises."""
        self.refuses: Code | None = None
        """What every request is answered with."""
        self.asked: list[Op] = []
        """The requests that were begun."""
        self.held: dict[Op, threading.Event] = {}
        """Requests of these kinds wait until the event is set."""
        self.stopping: asyncio.Event | None = None
        """Holds `stop` until it is set."""
        self._why: str | None = "it was never started"
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self._unblocked = threading.Event()

    async def find(self) -> bool:
        self._require()
        return self._why is None

    async def start(self) -> None:
        self._require()
        self.starts += 1
        if self.refusal is not None:
            raise EnclaveDown(self.refusal)
        self.replace()

    async def ended(self) -> str | None:
        self._require()
        return self._why

    async def stop(self, grace: float) -> Ending:
        self._require()
        self.stops += 1
        ending: Ending = "terminated" if self._why is None else "ended" if self.starts else "none"
        if self.stopping is not None:
            await self.stopping.wait()
        self.crash("it was stopped")
        return ending

    def close(self) -> None:
        pass

    # -- what tests do to it --------------------------------------------------------------------------------

    def replace(self) -> None:
        """Another enclave is at the same place, as after a restart by somebody else."""
        self.crash("replaced")
        program = Program(Nsm(SoftwareNsm(PCRS).process), mode=self.mode, mix=len)
        self._unblocked = unblocked = threading.Event()
        unblocked.set()

        def handle(request: Request) -> tuple[Code, Sequence[Value]]:
            unblocked.wait()
            self.asked.append(request.op)
            if request.op in self.held:
                self.held[request.op].wait()
            return (self.refuses, ()) if self.refuses is not None else program.handle(request)

        self._server = Server(listen_unix(str(self.path)), handle)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self._why = None

    def crash(self, why: str = "it crashed") -> None:
        """The enclave ends."""
        server, self._server = self._server, None
        self._unblocked.set()
        for held in self.held.values():
            held.set()
        if server is not None and self._thread is not None:
            server.close()
            self._thread.join()
        self._why = why

    def hang(self) -> None:
        """It runs, takes connections, and does not answer any more."""
        self._unblocked.clear()

    def close_for_good(self) -> None:
        """The machine goes away."""
        self.crash()

    def _require(self) -> None:
        if self.unreachable is not None:
            raise RuntimeUnreachable(self.unreachable)
