"""A host with Nitro Enclaves, but for the hardware: the stand-in for nitro-cli, and its folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


class NitroHost:
    """`program` is the nitro-cli, `environment` what it needs; `folder` holds its state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.program = folder / "bin/nitro-cli"
        self.program.parent.mkdir()
        stand_in = ROOT / "tests/enclave_image/nitro_cli.py"
        self.program.write_text(f'#!/bin/sh\nexec {sys.executable} {stand_in} "$@"\n')
        self.program.chmod(0o755)
        self.eif = folder / "enclave.eif"
        self.eif.write_bytes(b".eif")
        self.environment = {"NITRO_STATE": str(folder), "PATH": f"{self.program.parent}:{os.environ['PATH']}"}
        self.socket = folder / "socket"

    def fail_with(self, *codes: str) -> None:
        """The next calls of run-enclave go wrong like this; OK lets one pass."""
        (self.folder / "faults").write_text("\n".join(codes))

    @contextmanager
    def broken(self, code: str) -> Iterator[None]:
        """Every call of run-enclave goes wrong like this, until the operator has put it right."""
        marker = self.folder / "broken"
        marker.write_text(code)
        yield
        marker.unlink()

    def linger(self, calls: int) -> None:
        """One that is terminated is still listed by so many calls of describe-enclaves."""
        (self.folder / "lingers").write_text(str(calls))

    @property
    def calls(self) -> list[str]:
        """The commands that were called, without their options."""
        log = self.folder / "log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def running(self) -> dict[str, int]:
        """Enclave id -> pid, of those that were started and not terminated."""
        found = {}
        for record in self.folder.glob("running/*"):
            with suppress(FileNotFoundError):  # terminated meanwhile
                found[record.name] = int(record.read_text())
        return found

    def crash(self) -> None:
        """Every enclave ends without a word."""
        for pid in self.running.values():
            os.kill(pid, signal.SIGKILL)


@contextmanager
def nitro_host(folder: Path) -> Iterator[NitroHost]:
    """A host; its enclaves end with it."""
    host = NitroHost(folder)
    try:
        yield host
    finally:
        for pid in host.running.values():
            with suppress(FileNotFoundError, ProcessLookupError):
                if "--simulated" in Path(f"/proc/{pid}/cmdline").read_text():  # and not another's by now
                    os.kill(pid, signal.SIGKILL)
