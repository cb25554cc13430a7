"""A real Docker engine for tests: required in CI, optional on a developer's machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from docker import APIClient
from docker.errors import DockerException

from gpu_server.drivers.docker_api import ENGINE_ERRORS, connect

TEST_IMAGE = "python:3.11-slim"


def _absent(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"CI needs a Docker engine with {TEST_IMAGE}: {reason}")
    pytest.skip(f"no Docker engine with {TEST_IMAGE}: {reason}")


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[APIClient]:
    """A client of the engine, which has the test image. Fails in CI where there is none, else skips."""
    try:
        client = connect(None, 30)
    except ENGINE_ERRORS as error:
        _absent(str(error))
        raise
    with closing(client):
        if not client.images(TEST_IMAGE):
            try:
                client.pull(TEST_IMAGE)
            except DockerException as error:
                _absent(str(error))
        yield client
