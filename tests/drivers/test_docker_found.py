"""Taking up a container: the moments between two questions. The contract suite has the rest."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from docker.errors import NotFound

from gpu_server.drivers.docker_calls import EngineCalls
from gpu_server.drivers.docker_found import take_up
from gpu_server.ports import WorkerExit
from tests.drivers.open_files import nothing_left_open

RUNS = {"Running": True, "StartedAt": "2026-01-01T00:00:00Z", "ExitCode": 0, "OOMKilled": False}
ENDED = RUNS | {"Running": False, "ExitCode": 3}


def inspect(state: dict[str, Any]) -> dict[str, Any]:
    labels = {"gpu-server.session": "s_1"}
    return {"Id": "c1", "Name": "/s_1-1", "Config": {"Labels": labels}, "State": state}


class Raw:
    """What the SDK returns for an attach: a connection within a response."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._response = self

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()


class Client:
    """An engine that keeps every attached connection open, whose container is then as `state` says."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self._state = state

    def attach_socket(self, container_id: str, params: dict[str, int]) -> Raw:
        self.engine, ours = socket.socketpair()
        return Raw(ours)

    def inspect_container(self, container_id: str) -> dict[str, Any]:
        if self._state is None:
            raise NotFound("gone")
        return inspect(self._state)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Every descriptor is given back."""
    with nothing_left_open():
        yield


def taken(client: Client, state: dict[str, Any]) -> Any:
    sdk: Any = client
    return take_up(EngineCalls(None, 1), sdk, inspect(state), from_start=False)


@pytest.mark.usefixtures("descriptors")
async def test_a_worker_that_exits_while_it_is_taken_up_has_an_output_that_ends() -> None:
    """The engine would never end what was attached too late."""
    client = Client(ENDED)
    found = taken(client, RUNS)
    assert found.exit == WorkerExit(name="s_1-1", session_id="s_1", exit_code=3, oom_killed=False)
    assert [piece async for piece in found.output] == []
    client.engine.close()


@pytest.mark.usefixtures("descriptors")
async def test_a_worker_that_goes_away_while_it_is_taken_up_leaves_nothing_open() -> None:
    """A container that was removed in between is told as such."""
    client = Client(None)
    with pytest.raises(NotFound):
        taken(client, RUNS)
    client.engine.close()


@pytest.mark.usefixtures("descriptors")
async def test_a_running_worker_is_attached_to() -> None:
    """What it writes from now on comes."""
    client = Client(RUNS)
    found = taken(client, RUNS)
    assert found.exit is None
    client.engine.sendall(b"\x01\0\0\0\0\0\0\x02ok")
    client.engine.close()
    assert [piece.data async for piece in found.output] == [b"ok"]


def test_a_container_that_never_started_is_none() -> None:
    """It was created, and that is all."""
    assert taken(Client(None), RUNS | {"Running": False, "StartedAt": "0001-01-01T00:00:00Z"}) is None
