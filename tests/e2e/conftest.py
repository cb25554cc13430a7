"""Services under test, shared where tests can share them, and what must hold after each test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from docker import APIClient

from tests.e2e.harness import ECHO_IMAGE, HOSTILE_IMAGE, Caller, Service, Services

TEST_SECONDS = 300
"""For a test that names no time of its own: a slow machine may take many times what a fast one does."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder more time than others have: they start real processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def engine_with_images(docker_engine: APIClient) -> APIClient:
    """The Docker engine, which has the images of the tests. In CI it must; elsewhere tests skip without."""
    missing = [image for image in (ECHO_IMAGE, HOSTILE_IMAGE) if not docker_engine.images(image)]
    if missing:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"no {' and no '.join(missing)}: run scripts/build_images.py all")
    return docker_engine


@pytest.fixture(scope="session", params=[pytest.param("docker", marks=pytest.mark.docker), "process"])
def runtime(request: pytest.FixtureRequest) -> str:
    """Where workers run: in containers, or as plain processes."""
    if request.param == "docker":
        request.getfixturevalue("engine_with_images")
    return str(request.param)


@pytest.fixture(scope="session")
def services(runtime: str, request: pytest.FixtureRequest) -> Iterator[Services]:
    """All services of one runtime. Their folders lie on a tmpfs where there is one."""
    shared_memory = Path("/dev/shm")
    place = shared_memory if os.access(shared_memory, os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="gs-e2e-", dir=place))
    root.chmod(0o711)
    engine = request.getfixturevalue("engine_with_images") if runtime == "docker" else None
    found = Services(runtime, root, engine)
    try:
        yield found
        found.close()
    finally:
        shutil.rmtree(root)


@pytest.fixture
async def serve(services: Services) -> AsyncIterator[Callable[..., Service]]:
    """`serve(SETTING=value)`: a running service with these settings. After the test nothing may be left."""
    used: list[Service] = []

    def shared(**settings: object) -> Service:
        used.append(services.shared(**settings))
        return used[-1]

    yield shared
    for service in used:
        await service.settle()


@pytest.fixture
def service(serve: Callable[..., Service]) -> Service:
    """The service that most tests share."""
    return serve()


@pytest.fixture
async def caller(service: Service) -> AsyncIterator[Caller]:
    """A caller of that service, with a tenant of its own."""
    async with service.caller() as found:
        yield found
