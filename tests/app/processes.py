"""The service as a process of its own, started the way an operator starts it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEY = "the-internal-key-of-the-tests"


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    """The environment of a service on processes that keeps to `tmp_path`."""
    passed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **passed,
        "PYTHONPATH": f"{ROOT}:{ROOT}/worker_images/sdk",
        "RUNTIME": "process",
        "STATE_DIR": str(tmp_path / "state"),
        "RUN_DIR": str(tmp_path / "run"),
        "MODEL_PRESETS_FILE": str(ROOT / "config/model_presets.yaml"),
        "INTERNAL_API_KEY": KEY,
        "STOP_GRACE_SECONDS": "0.2",
        "HTTP_PORT": str(free_port()),
        **changes,
    }


def free_port() -> int:
    """A port that nobody has, and that the system gives to nobody who leaves the choice to it: so it is still
    free when somebody binds it a while later."""
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(10_000, 32_000)  # below those that are given away
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return port


@dataclass
class ServiceProcess:
    """A running service, its address and what it has logged."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)
    up: threading.Event = field(default_factory=threading.Event)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._listen)
        self.reader.start()

    def _listen(self) -> None:
        """Read the log to its end."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "Uvicorn running on" in line:
                self.up.set()
        self.up.set()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop, and wait; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def log(self) -> str:
        """What it has logged; all of that, once it has ended."""
        if self.process.poll() is not None:
            self.reader.join(60)  # the last lines may still be in the pipe
        return "".join(self.lines)


@contextmanager
def service_process(tmp_path: Path, code: str | None = None, **settings: str) -> Iterator[ServiceProcess]:
    """`gpu-server serve` in a process, up and listening; or `code` that calls it."""
    tmp_path.mkdir(exist_ok=True)
    env = environment(tmp_path, **settings)
    program = ["-c", code] if code else ["-m", "gpu_server.cli", "serve"]
    process = subprocess.Popen(
        [sys.executable, *program],
        cwd=tmp_path,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    found = ServiceProcess(process, f"http://127.0.0.1:{env['HTTP_PORT']}")
    try:
        assert found.up.wait(60), found.log
        yield found
    finally:
        process.kill()
        process.wait()
        found.reader.join()
        assert process.stderr is not None
        process.stderr.close()
