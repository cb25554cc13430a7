"""Pulling images."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from docker import APIClient

from gpu_server.drivers.docker_api import connect
from gpu_server.drivers.docker_images import image_missing, pull
from tests.docker_engine import TEST_IMAGE


def test_an_engine_that_is_away_is_a_reason() -> None:
    """The pull tells why it could not even begin."""

    def nowhere() -> APIClient:
        return connect("unix:///nowhere/docker.sock", 1)

    assert "No such file" in (pull(nowhere, TEST_IMAGE, threading.Event()) or "")


@pytest.mark.docker
@pytest.mark.usefixtures("docker_engine")
def test_a_registry_that_is_away_is_a_reason() -> None:
    """The engine's own words come back."""
    reason = pull(lambda: connect(None, 30), "localhost:1/none:1", threading.Event())
    assert reason is not None
    assert "localhost:1" in reason


def test_the_refusal_names_the_image() -> None:
    """A user reads which image is missing and why."""
    refused = image_missing("a/b:1", "no route")
    assert refused.code == "image_missing"
    assert "a/b:1" in refused.message
    assert "no route" in refused.message


def test_a_pull_that_was_given_up_stops_at_the_next_line() -> None:
    """Closing the service does not wait for gigabytes."""

    class Endless:
        def pull(self, *_: object, **__: object) -> object:
            while True:
                yield {"status": "Downloading"}

        def close(self) -> None:
            pass

    stop = threading.Event()
    stop.set()
    with closing(Endless()) as client:
        assert pull(lambda: client, "a:1", stop) == "the download was given up"  # type: ignore[arg-type,return-value]
