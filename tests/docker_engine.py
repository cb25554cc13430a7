"""Real Docker engines for tests: the machine's own, required in CI and optional on a developer's machine, and
a spare one that a test may restart, kill and freeze."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
from docker import APIClient
from docker.errors import DockerException

from gpu_server.drivers.docker_api import ENGINE_ERRORS, connect

TEST_IMAGE = "python:3.11-slim"

_PATIENCE = 60.0
_CGROUPS = Path("/sys/fs/cgroup")
# The first process of the spare engine's namespaces: it ends with its standard input, and what its children
# leave behind is reaped, or a new engine would take an old one's number for alive. A containerd of the
# machine's own is hidden, or the engine would use that. The engine's data are in memory: to write an image to
# a disk and to remove it again takes longer than all that is done with it.
_FIRST = (
    "mkdir -p /run/containerd && mount -t tmpfs none /run/containerd && "
    + 'mount -t tmpfs none "$1" && exec '
    + sys.executable
    + ' -S -c "'
    + "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True);"
    + ' sys.stdin.read()"'
)


def _absent(what: str, reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"CI needs {what}: {reason}")
    pytest.skip(f"no {what}: {reason}")


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[APIClient]:
    """A client of the engine, which has the test image. Fails in CI where there is none, else skips."""
    what = f"a Docker engine with {TEST_IMAGE}"
    try:
        client = connect(None, 30)
    except ENGINE_ERRORS as error:
        _absent(what, str(error))
    with closing(client):
        if not client.images(TEST_IMAGE):
            try:
                client.pull(TEST_IMAGE)
            except DockerException as error:
                _absent(what, str(error))
        yield client


@contextlib.contextmanager
def spare_engine(source: APIClient, *images: str) -> Iterator[SpareEngine]:
    """A running spare engine with some images of `source`. Fails in CI where there is none, else skips."""
    what = "a second Docker engine"
    missing = [program for program in ("dockerd", "unshare", "nsenter") if shutil.which(program) is None]
    if missing:
        _absent(what, f"there is no {' and no '.join(missing)}")
    if os.geteuid() != 0:
        _absent(what, "only root can start one")
    folder = Path(tempfile.mkdtemp(prefix="gs-spare-"))
    try:
        with contextlib.ExitStack() as stack:
            try:
                spare = SpareEngine(folder)
                stack.callback(spare.end)
                spare.start()
                for image in images:
                    spare.load(image, source)
            except (OSError, *ENGINE_ERRORS) as error:
                _absent(what, str(error))
            yield spare
    finally:
        shutil.rmtree(folder)


class SpareEngine:
    """A second engine, to be restarted, killed and frozen. It shares the machine's files and nothing else.

    It lives in namespaces of its own (processes, mounts, network), whose first process ends when its standard
    input is closed, also because the tests were killed; whatever the engine started and mounted goes with
    that. All methods block, and return when their effect is there.
    """

    def __init__(self, folder: Path) -> None:
        """Make the namespaces. Raises OSError."""
        self.host = f"unix://{folder}/docker.sock"
        self._folder = folder
        self._cgroup = folder.name
        self._entered: subprocess.Popen[bytes] | None = None
        self._pid = 0
        # Nothing of the machine's own settings.
        (folder / "daemon.json").write_text("{}")
        (folder / "data").mkdir()
        self._space = subprocess.Popen(
            [
                "unshare",
                "--fork",
                "--kill-child",
                "--pid",
                "--mount-proc",
                "--mount",
                "--net",
                "sh",
                "-c",
                _FIRST,
                "sh",
                str(folder / "data"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._space.stdout is not None
        if self._space.stdout.readline() != b"up\n":
            self.end()
            raise OSError("no namespaces can be made here")
        self._first = _child(self._space.pid)

    def start(self, *, live_restore: bool = False) -> None:
        """Start the engine; with `live_restore`, workers live on while it is away."""
        assert self._entered is None
        for stale in ("docker.pid", "exec/containerd/containerd.pid"):
            (self._folder / stale).unlink(missing_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._entered = subprocess.Popen(
                [
                    *("nsenter", f"--target={self._first}", "--pid", "--mount", "--net"),
                    *("dockerd", f"--host={self.host}", f"--config-file={self._folder}/daemon.json"),
                    *(f"--data-root={self._folder}/data", f"--exec-root={self._folder}/exec"),
                    *(f"--pidfile={self._folder}/docker.pid", f"--cgroup-parent=/{self._cgroup}"),
                    *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"),
                    *(["--live-restore"] if live_restore else []),
                ],
                stdout=log,
                stderr=log,
            )
        _wait_until(self._answers, "the spare engine answers")
        self._pid = _child(self._entered.pid)

    def stop(self) -> None:
        """End the engine as an operator does (SIGTERM); without live restore that ends its workers."""
        self._end_with(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL of the engine; its containerd ends with it, its workers do not."""
        self._end_with(signal.SIGKILL)

    def restart(self, *, live_restore: bool = False) -> None:
        """Stop and start. Whether workers live on is for the life that ends to say."""
        self.stop()
        self.start(live_restore=live_restore)

    def freeze(self) -> None:
        """From now on the engine takes connections and never answers."""
        os.kill(self._pid, signal.SIGSTOP)
        _wait_until(self._is_stopped, "the spare engine is frozen")

    def thaw(self) -> None:
        """The engine goes on."""
        assert self._entered is not None
        # Who entered the namespaces for it has stopped with it.
        for pid in (self._pid, self._entered.pid):
            os.kill(pid, signal.SIGCONT)

    def load(self, image: str, source: APIClient) -> None:
        """Copy an image from another engine."""
        archive = source.get_image(image)
        with closing(connect(self.host, 120)) as client:
            engine: Any = client  # the library's stubs say nothing of this method
            for line in engine.load_image(archive):
                if "error" in line:
                    raise OSError(str(line["error"]))

    def end(self) -> None:
        """Remove the engine, its workers, what they mounted, and their cgroups."""
        self._space.communicate(timeout=_PATIENCE)
        if self._entered is not None:
            self._entered.kill()
            self._entered.wait(_PATIENCE)
        # Not by a glob: that is an error where somebody else's group goes away meanwhile.
        for found in [folder for folder, _, _ in os.walk(_CGROUPS) if Path(folder).name == self._cgroup]:
            for cgroup, _, _ in os.walk(found, topdown=False):
                os.rmdir(cgroup)

    def _answers(self) -> bool:
        assert self._entered is not None
        if self._entered.poll() is not None:
            last = (self._folder / "log").read_text(errors="replace").splitlines()[-3:]
            raise OSError(f"the spare engine does not start: {' '.join(last)}")
        try:
            connect(self.host, 5).close()
        except ENGINE_ERRORS:
            return False
        return True

    def _is_stopped(self) -> bool:
        threads = Path(f"/proc/{self._pid}/task").glob("*/stat")
        try:
            return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)
        except OSError:  # a thread has just ended
            return False

    def _end_with(self, number: signal.Signals) -> None:
        assert self._entered is not None
        os.kill(self._pid, number)
        self._entered.wait(_PATIENCE)
        self._entered = None


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    pause = threading.Event()
    while not holds():
        if time.monotonic() > deadline:
            raise OSError(f"{what}: not within {_PATIENCE:.0f} s")
        pause.wait(0.05)
