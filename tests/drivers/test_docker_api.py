"""The corners of the Docker SDK."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from docker.errors import APIError

from gpu_server.drivers.docker_api import ENGINE_ERRORS, connect, short


def test_connecting_in_vain_leaks_nothing(tmp_path: Path) -> None:
    """Trying for hours while an engine is away costs no descriptor."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ENGINE_ERRORS):
            connect(f"unix://{tmp_path}/none.sock", 1)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_errors_are_one_short_line() -> None:
    """What an engine says is made fit for a log line and a JSON message."""
    assert short(APIError("500", explanation="OCI runtime\n  create failed")) == "OCI runtime create failed"
    assert len(short(OSError("x" * 10_000))) == 400


@pytest.mark.docker
@pytest.mark.usefixtures("docker_engine")
def test_a_client_ignores_the_environments_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is set for the internet does not stand before the engine."""
    monkeypatch.setenv("ALL_PROXY", "http://localhost:1")
    client = connect(None, 10)
    assert client.ping()
    client.close()
