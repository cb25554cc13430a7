"""A container that is removed is seen to be gone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from docker import APIClient
from docker.errors import APIError, NotFound

from gpu_server.drivers.docker_calls import EngineCalls
from gpu_server.drivers.docker_removal import remove_for_certain
from gpu_server.ports import RuntimeUnreachable
from tests.docker_engine import TEST_IMAGE

pytestmark = pytest.mark.docker


@pytest.fixture
async def calls(docker_engine: APIClient) -> AsyncIterator[EngineCalls]:
    calls = EngineCalls(None, 30.0)
    await calls.open()
    yield calls
    calls.close()


def made(engine: APIClient) -> str:
    code = "import time; time.sleep(1000)"
    container_id = str(engine.create_container(TEST_IMAGE, ["python3", "-c", code])["Id"])
    engine.start(container_id)
    return container_id


async def test_one_that_runs_is_killed_and_gone(calls: EngineCalls, docker_engine: APIClient) -> None:
    """And removing it again is no error."""
    container_id = made(docker_engine)
    for _ in range(2):
        await remove_for_certain(calls, container_id, limit=30.0)
        with pytest.raises(NotFound):
            docker_engine.inspect_container(container_id)


async def test_one_that_stays_is_not_said_to_be_gone(
    calls: EngineCalls, docker_engine: APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried until the limit, and then told with the engine's reason."""

    def busy(*_: Any, **__: Any) -> None:
        raise APIError("no", explanation="device or resource busy")

    container_id = made(docker_engine)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(APIClient, "remove_container", busy)
            with pytest.raises(RuntimeUnreachable, match="resource busy"):
                await remove_for_certain(calls, container_id, limit=0.05)
    finally:
        await remove_for_certain(calls, container_id, limit=30.0)
