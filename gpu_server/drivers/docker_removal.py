"""Removing a container, and seeing that it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog
from docker import APIClient
from docker.errors import APIError, NotFound

from gpu_server.drivers import docker_leftover
from gpu_server.drivers.docker_api import short
from gpu_server.drivers.docker_calls import EngineCalls
from gpu_server.ports import RuntimeUnreachable

log = structlog.get_logger()


async def remove_for_certain(calls: EngineCalls, container_id: str, *, limit: float) -> None:
    """SIGKILL and remove, with anonymous volumes, until the engine says that there is no such container; and
    not before all its processes are gone, whatever the engine knows of them.

    Raises `RuntimeUnreachable`, also when it is still there after `limit` seconds, and `APIError`.
    """
    deadline = time.monotonic() + limit
    pause = 0.02
    problem = "it is still there"

    def attempt(client: APIClient) -> str | None:
        nonlocal problem
        with contextlib.suppress(NotFound):
            runs = client.inspect_container(container_id)["State"]["Running"]
            # Before it is removed: without its id nobody could find them again.
            if not runs and (outliving := docker_leftover.processes_of(container_id)):
                log.warning("container.outlived", container_id=container_id, processes=len(outliving))
                docker_leftover.kill(outliving)
                problem = "processes of it live on, though it does not run"
                return problem
        try:
            client.remove_container(container_id, v=True, force=True)
        except NotFound:
            pass
        except APIError as error:  # "already in progress", "device or resource busy"
            problem = short(error)
        try:
            client.inspect_container(container_id)
        except NotFound:
            return None
        return problem

    while await calls.call(attempt) is not None:
        if time.monotonic() > deadline:
            raise RuntimeUnreachable(f"container {container_id[:12]} cannot be removed: {problem}")
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)
