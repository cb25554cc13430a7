"""The runner as the program that it is, over the stand-in for nitro-cli."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.enclave_image.nitro_host import ROOT, NitroHost, nitro_host

RUNNER = ROOT / "enclave_image/runner/runner.py"
PATIENCE = 60.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NitroHost]:
    with nitro_host(tmp_path / "host") as made:
        yield made


class Running:
    """A runner that was started."""

    def __init__(self, host: NitroHost, **changed: str) -> None:
        options = {"eif": str(host.eif), "memory": "512", "cpu-count": "2", "cid": "16", "poll": "0.02"}
        options |= {"backoff": "0.01", "nitro-cli": "nitro-cli", **changed}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [sys.executable, "-BI", str(RUNNER), *arguments],
            env=host.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []

    def until(self, event: str) -> dict[str, Any]:
        """Read to the line with this event."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"it ended without {event}: {self.lines}")

    def end(self) -> int:
        """Its exit status; reads the rest."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        self.lines += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


def test_start_and_stop(host: NitroHost) -> None:
    """It starts the enclave, watches it, and ends it on SIGTERM with status 0."""
    runner = Running(host)
    started = runner.until("running")
    assert list(host.running) == [started["enclave"]]
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 0
    assert runner.events == ["starting", "running", "terminated"]
    assert host.running == {}
    assert host.calls[0] == "run-enclave"
    assert host.calls[-2:] == ["terminate-enclave", "describe-enclaves"]


def test_it_sees_the_enclave_gone(host: NitroHost) -> None:
    """Only when nitro-cli does not list the enclave any more the runner ends, with status 0."""
    host.linger(3)
    runner = Running(host)
    runner.until("running")
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 0
    assert host.calls[-5:] == ["terminate-enclave", *["describe-enclaves"] * 4]


def test_one_that_does_not_go(host: NitroHost) -> None:
    """An enclave that stays listed has not been seen gone: that is told, and has a status of its own."""
    host.linger(1_000_000)
    runner = Running(host, gone="0.3")
    started = runner.until("running")
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 72
    assert runner.lines[-1]["event"] == "not_gone"
    assert runner.lines[-1]["enclave"] == started["enclave"]
    assert "TERMINATING" in runner.lines[-1]["message"]


def test_a_nitro_cli_that_breaks(host: NitroHost) -> None:
    """Where nobody can say any more what runs, nothing was seen gone."""
    runner = Running(host, gone="0.3")
    runner.until("running")
    host.program.write_text("#!/bin/sh\necho '[{}]'\n")
    assert runner.end() == 72
    assert runner.events[-1] == "not_gone"
    assert "did not print a list" in runner.lines[-1]["message"]


def test_a_crash_is_seen(host: NitroHost) -> None:
    """An enclave that ends by itself ends the runner, with a status of its own."""
    runner = Running(host)
    runner.until("running")
    host.crash()
    assert runner.end() == 70
    assert runner.lines[-1]["event"] == "ended"


def test_e29_is_tried_again(host: NitroHost) -> None:
    """The driver is not done with an enclave that has just ended: the runner waits longer each time."""
    host.fail_with("E29", "E29", "OK")
    runner = Running(host)
    runner.until("running")
    assert runner.events == ["starting", "retry", "retry", "running"]
    assert [line["seconds"] for line in runner.lines if line["event"] == "retry"] == [0.01, 0.02]
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 0


def test_e29_for_good(host: NitroHost) -> None:
    """After six tries it gives up, and says what to look at."""
    host.fail_with(*["E29"] * 20)
    runner = Running(host)
    assert runner.end() == 29
    assert host.calls == ["run-enclave"] * 6
    assert "/dev/nitro_enclaves" in runner.lines[-1]["message"]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("E22", "cpu_count"),
        ("E27", "memory_mib"),
        ("E36", "did not boot"),
        ("E39", "stale"),
        ("E33", "Unspec"),
    ],
)
def test_errors_are_told(host: NitroHost, code: str, word: str) -> None:
    """Each is the exit status, and a line that says what to change; none of these is tried again."""
    host.fail_with(code)
    runner = Running(host)
    assert runner.end() == int(code[1:])
    assert runner.lines[-1]["event"] == "failed"
    assert runner.lines[-1]["code"] == code
    assert word in runner.lines[-1]["message"]
    assert host.calls == ["run-enclave"]


def test_no_image_file(host: NitroHost) -> None:
    """A file that is not there is E19."""
    assert Running(host, eif="/nonexistent.eif").end() == 19


def test_no_nitro_cli(host: NitroHost) -> None:
    """A host without the program is told so."""
    runner = Running(host, **{"nitro-cli": "/nonexistent/nitro-cli"})
    assert runner.end() == 71
    assert "cannot be run" in runner.lines[-1]["message"]


def test_sigterm_while_it_retries(host: NitroHost) -> None:
    """It does not wait out a pause, and does not start an enclave that nobody wants any more."""
    host.fail_with(*["E29"] * 20)
    runner = Running(host, backoff="30")
    runner.until("retry")
    runner.process.send_signal(signal.SIGTERM)
    assert runner.end() == 29
    assert host.running == {}


def test_the_runner_needs_only_what_amazon_linux_has() -> None:
    """Python 3.9's grammar, and modules of the standard library alone."""
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 9))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported <= sys.stdlib_module_names
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Match)]
