"""The one Docker events stream, from which every exit of every worker is heard.

One thread reads it, because the SDK blocks. It never waits for a single container: with a blocking wait for
each, a small thread pool is full after a few workers and nothing else runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
from docker import APIClient
from docker.errors import NotFound
from docker.types.daemon import CancellableStream

from gpu_server.drivers.docker_api import ENGINE_ERRORS
from gpu_server.drivers.docker_body import LABEL_INSTANCE, LABEL_SESSION
from gpu_server.ports import WorkerExit

log = structlog.get_logger()

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_REMEMBERED: Final = 10_000
_KILLED: Final = 137

NEVER_STARTED: Final = "0001-01-01T00:00:00Z"
"""`State.StartedAt` of a container that was created and has not run."""


class ExitListener:
    """Hears the exits of one instance's containers, across restarts of the engine, each container once.

    `heard` is called in the listening thread with the container's id and the exit. Exits from before the
    first connection, and those that happened while the engine was away, are found by listing.
    """

    def __init__(
        self,
        connect: Callable[[], APIClient],
        instance: str,
        heard: Callable[[str, WorkerExit], None],
    ) -> None:
        self._connect = connect
        self._wanted: Final[dict[str, Any]] = {
            "type": "container",
            "label": f"{LABEL_INSTANCE}={instance}",
            "event": ["start", "oom", "die"],  # `start` as a witness only
        }
        self._heard = heard
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._stream: CancellableStream[dict[str, Any]] | None = None
        self._told: OrderedDict[str, None] = OrderedDict()
        self._oom: OrderedDict[str, None] = OrderedDict()
        # Some seconds back: the answer's headers come before the engine has subscribed us.
        self._began = time.time_ns()
        self._since = self._began // 1_000_000_000 - 10
        self._pause = _FIRST_PAUSE
        self.interruptions = 0
        self._connected = False
        self._witness: tuple[object, ...] | None = None
        self._thread = threading.Thread(target=self._run, name="docker-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Stop listening; blocks for up to `timeout` seconds until the thread has ended."""
        self._closing.set()
        with self._lock:
            if self._stream is not None:
                _cut(self._stream)
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._listen()
            except ENGINE_ERRORS:
                pass
            except Exception:  # half an event, or an odd one; deaf is what this must never be
                log.exception("docker.events_failed")
            if not self._connected:
                self.interruptions += 1  # the engine is away
            self._closing.wait(self._pause)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _listen(self) -> None:
        again, self._connected = self._connected, False
        client = self._connect()
        stream: CancellableStream[dict[str, Any]] | None = None
        try:
            stream = client.events(since=self._since, filters=self._wanted, decode=True)
            with self._lock:
                if self._closing.is_set():
                    return
                self._stream = stream
            if again and not self._is_the_same_engine(client):
                self.interruptions += 1  # it was away for less than our pause
            self._pause = _FIRST_PAUSE
            self._connected = True
            self._tell_missed(client)
            for event in stream:
                self._take(client, event)
        finally:
            with self._lock:
                self._stream = None
                if stream is not None:
                    _cut(stream)
            client.close()

    def _is_the_same_engine(self, client: APIClient) -> bool:
        """Whether the stream only broke, which loses no output: an engine keeps its last events in memory, so
        one that has the last we saw has lived since then. One that has not may be new."""
        if self._witness is None:
            return False
        past = client.events(
            since=self._since, until=self._since + 1, filters=self._wanted, decode=True
        )  # ends by itself
        return any(_identity(event) == self._witness for event in past)

    def _tell_missed(self, client: APIClient) -> None:
        found = client.containers(
            all=True,
            filters={"label": self._wanted["label"], "status": ["exited", "dead"]},
        )
        for container in found:
            container_id = str(container["Id"])
            if container_id in self._told:
                continue
            try:
                inspect = client.inspect_container(container_id)
            except NotFound:
                continue
            if (worker_exit := exit_of(inspect)) is not None:
                self._tell(container_id, worker_exit)

    def _take(self, client: APIClient, event: Mapping[str, Any]) -> None:
        self._since = int(event.get("time") or self._since)
        self._witness = _identity(event)
        actor = event["Actor"]
        container_id, attributes = str(actor["ID"]), actor["Attributes"]
        if event["Action"] == "oom":
            _remember(self._oom, container_id)
        elif event["Action"] == "die" and container_id not in self._told:
            if int(event.get("timeNano") or self._began) < self._began and _is_gone(client, container_id):
                return  # it ended and was removed before this listener began: an earlier one's affair
            exit_code = int(attributes.get("exitCode", "0"))
            oom = container_id in self._oom
            if exit_code == _KILLED and not oom:
                oom = _was_out_of_memory(client, container_id)
            session_id = attributes.get(LABEL_SESSION, "")
            worker_exit = WorkerExit(
                name=attributes["name"], session_id=session_id, exit_code=exit_code, oom_killed=oom
            )
            self._tell(container_id, worker_exit)

    def _tell(self, container_id: str, worker_exit: WorkerExit) -> None:
        _remember(self._told, container_id)
        self._heard(container_id, worker_exit)


def exit_of(inspect: Mapping[str, Any]) -> WorkerExit | None:
    """How a container has ended, as inspecting tells; None while it runs, and if it never did."""
    state = inspect["State"]
    if state["Running"] or state["StartedAt"] == NEVER_STARTED:
        return None
    return WorkerExit(
        name=str(inspect["Name"]).lstrip("/"),
        session_id=(inspect["Config"]["Labels"] or {}).get(LABEL_SESSION, ""),
        exit_code=int(state["ExitCode"]),
        oom_killed=bool(state["OOMKilled"]),
    )


def _identity(event: Mapping[str, Any]) -> tuple[object, ...]:
    return event.get("timeNano"), event["Action"], event["Actor"]["ID"]


def _remember(ids: OrderedDict[str, None], container_id: str) -> None:
    ids[container_id] = None
    while len(ids) > _REMEMBERED:
        ids.popitem(last=False)


def _is_gone(client: APIClient, container_id: str) -> bool:
    try:
        client.inspect_container(container_id)
    except NotFound:
        return True
    return False


def _was_out_of_memory(client: APIClient, container_id: str) -> bool:
    try:
        return bool(client.inspect_container(container_id)["State"]["OOMKilled"])
    except ENGINE_ERRORS:
        return False


def _cut(stream: CancellableStream[dict[str, Any]]) -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # it has ended by itself
        stream.close()
