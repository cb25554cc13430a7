"""Taking up a container that was started before, with its output."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from docker import APIClient
from docker.errors import NotFound

from gpu_server.drivers.docker_api import attach
from gpu_server.drivers.docker_body import LABEL_SEALED
from gpu_server.drivers.docker_calls import EngineCalls, unreachable
from gpu_server.drivers.docker_events import NEVER_STARTED, exit_of
from gpu_server.drivers.docker_kept import KeptOutput, OpenLog, open_log
from gpu_server.drivers.docker_output import AttachedOutput, no_output
from gpu_server.ports import WorkerExit


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A container that runs or ran."""

    container_id: str
    output: AttachedOutput | KeptOutput
    exit: WorkerExit | None


def take_up(
    calls: EngineCalls, client: APIClient, inspect: dict[str, Any], *, from_start: bool
) -> Found | None:
    """The inspected container with its output, from now on or from its start; None if it never started. That
    of a sealed session's worker is not listened to.

    Blocks. Raises `OutputLost` and `ENGINE_ERRORS`, of which `NotFound` says that it went away meanwhile.
    """
    if inspect["State"]["StartedAt"] == NEVER_STARTED:
        return None
    container_id = str(inspect["Id"])
    ended = exit_of(inspect)
    if LABEL_SEALED in (inspect["Config"]["Labels"] or {}):
        return Found(container_id=container_id, output=no_output(), exit=ended)
    if from_start:
        log = open_log(client, calls.docker_host, inspect)
        return Found(
            container_id=container_id, output=KeptOutput(log, _again(calls, container_id)), exit=ended
        )
    if ended is None:
        connection = attach(client, container_id)
        try:
            ended = exit_of(client.inspect_container(container_id))
        except BaseException:
            connection.close()
            raise
        if ended is None:
            return Found(container_id=container_id, output=AttachedOutput(connection), exit=None)
        # The engine ends what is attached when a container exits, and what comes after that never.
        connection.close()
    return Found(container_id=container_id, output=no_output(), exit=ended)


def _again(calls: EngineCalls, container_id: str) -> Callable[[], Awaitable[OpenLog]]:
    def open_again(client: APIClient) -> OpenLog:
        try:
            return open_log(client, calls.docker_host, client.inspect_container(container_id))
        except NotFound:
            return OpenLog(connection=_nothing(), is_last=True)

    async def again() -> OpenLog:
        with unreachable():
            return await calls.call(open_again, discard=lambda late: late.connection.close())

    return again


def _nothing() -> socket.socket:
    """A connection that has ended."""
    ours, other = socket.socketpair()
    other.close()
    return ours
