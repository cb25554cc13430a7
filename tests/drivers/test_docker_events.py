"""The events listener, fed by a client that plays the engine."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
from docker.errors import NotFound

from gpu_server.drivers.docker_events import ExitListener
from gpu_server.ports import WorkerExit

LABELS = {"gpu-server.instance": "i", "gpu-server.session": "s_1"}


class Stream:
    """One connection's events: what is put in comes out, until it is cut."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (event := self.events.get()) is not None:
            yield event

    def close(self) -> None:
        self.events.put(None)


class Engine:
    """As much of the SDK's client as the listener uses."""

    def __init__(self) -> None:
        self.exited: dict[str, dict[str, Any]] = {}
        self.streams: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self.since: list[int] = []
        self.past: list[dict[str, Any]] = []

    def events(
        self, *, since: int, filters: dict[str, Any], decode: bool, until: int | None = None
    ) -> Stream | list[dict[str, Any]]:
        assert filters["label"] == "gpu-server.instance=i"
        if until is not None:
            return [event for event in self.past if since <= event["time"] <= until]
        self.since.append(since)
        stream = Stream()
        self.streams.put(stream)
        return stream

    def containers(self, **_: object) -> list[dict[str, Any]]:
        return [{"Id": container_id} for container_id in (*self.exited, "vanished")]

    def inspect_container(self, container_id: str) -> dict[str, Any]:
        if container_id not in self.exited:
            raise NotFound("gone")
        return self.exited[container_id]

    def close(self) -> None:
        pass


def inspect(
    name: str, code: int, *, oom: bool = False, started: str = "2026-01-01T00:00:00Z"
) -> dict[str, Any]:
    return {
        "Name": f"/{name}",
        "Config": {"Labels": LABELS},
        "State": {"Running": False, "StartedAt": started, "ExitCode": code, "OOMKilled": oom},
    }


def event(action: str, container_id: str, at: int = 100, **attributes: str) -> dict[str, Any]:
    attributes = {"name": f"w-{container_id}", **LABELS, **attributes}
    return {"Action": action, "time": at, "Actor": {"ID": container_id, "Attributes": attributes}}


class Ears:
    """A listener over an engine, and what it heard."""

    def __init__(self, engine: Engine) -> None:
        self.heard: queue.SimpleQueue[tuple[str, WorkerExit]] = queue.SimpleQueue()
        self.listener = ExitListener(
            lambda: engine,  # type: ignore[arg-type,return-value]
            "i",
            lambda container_id, worker_exit: self.heard.put((container_id, worker_exit)),
        )

    def next(self) -> tuple[str, int, bool]:
        container_id, worker_exit = self.heard.get(timeout=30)
        return container_id, worker_exit.exit_code, worker_exit.oom_killed

    def __enter__(self) -> Ears:
        self.listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close(30)
        assert not self.listener._thread.is_alive()


def test_each_exit_is_told_once_by_whichever_way_it_comes() -> None:
    """An event, its replay after a reconnect, and the listing are one exit; a failed start is none."""
    engine = Engine()
    engine.exited["missed"] = inspect("w-missed", 4)
    engine.exited["never"] = inspect("w-never", 127, started="0001-01-01T00:00:00Z")
    with Ears(engine) as ears:
        first = engine.streams.get(timeout=30)
        assert ears.next() == ("missed", 4, False)
        first.events.put(event("die", "missed", exitCode="4"))
        first.events.put(event("die", "live", at=500, exitCode="0"))
        assert ears.next() == ("live", 0, False)
        engine.exited["live"] = inspect("w-live", 0)
        engine.exited["between"] = inspect("w-between", 9)
        first.close()
        second = engine.streams.get(timeout=30)
        assert engine.since[-1] == 500
        assert ears.next() == ("between", 9, False)
        second.events.put(event("die", "live", at=500, exitCode="0"))
        second.events.put(event("die", "last", at=600, exitCode="1"))
        assert ears.next() == ("last", 1, False)
        assert ears.heard.empty()


@pytest.mark.parametrize(("past", "interruptions"), [("kept", 0), ("of another", 1), ("none", 1)])
def test_an_engine_that_was_away_for_a_moment_is_told_from_a_broken_stream(
    past: str, interruptions: int
) -> None:
    """An engine that was restarted between two connections has forgotten the events of its life before."""
    engine = Engine()
    with Ears(engine) as ears:
        first = engine.streams.get(timeout=30)
        first.events.put(event("die", "before", exitCode="0"))
        assert ears.next() == ("before", 0, False)  # what was missed has been looked for
        started = event("start", "a", at=500) | {"timeNano": 500_000_000_001}
        first.events.put(started)
        engine.past = {"kept": [started], "of another": [event("start", "b", at=500)], "none": []}[past]
        engine.exited["a"] = inspect("w-a", 0)
        first.close()
        engine.streams.get(timeout=30)
        assert ears.next() == ("a", 0, False)
        assert ears.listener.interruptions == interruptions


def test_the_memory_limit_is_known_by_event_or_by_looking() -> None:
    """An oom event before the exit counts, whatever the code; a bare 137 is looked up."""
    engine = Engine()
    with Ears(engine) as ears:
        stream = engine.streams.get(timeout=30)
        stream.events.put(event("oom", "child"))
        stream.events.put(event("die", "child", exitCode="1"))
        assert ears.next() == ("child", 1, True)
        engine.exited["looked"] = inspect("w", 137, oom=True)
        stream.events.put(event("die", "looked", exitCode="137"))
        assert ears.next() == ("looked", 137, True)
        stream.events.put(event("die", "removed", exitCode="137"))
        assert ears.next() == ("removed", 137, False)


def test_what_ended_and_was_removed_before_is_nobodys_news() -> None:
    """The stream begins a little in the past; of earlier exits only those still there are told."""
    engine = Engine()
    with Ears(engine) as ears:
        stream = engine.streams.get(timeout=30)
        old = {"timeNano": 100 * 10**9}
        stream.events.put(event("die", "removed", exitCode="0") | old)
        engine.exited["there"] = inspect("w-there", 3)
        stream.events.put(event("die", "there", exitCode="3") | old)
        assert ears.next() == ("there", 3, False)


def test_an_engine_that_is_away_is_tried_again() -> None:
    """Failing to connect is no end: the listener comes back."""
    engine, failures = Engine(), iter([OSError("away"), ValueError("half an event")])
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()

    def connect() -> Engine:
        for failure in failures:
            raise failure
        return engine

    listener = ExitListener(connect, "i", lambda container_id, _: heard.put(container_id))  # type: ignore[arg-type]
    listener.start()
    stream = engine.streams.get(timeout=30)
    stream.events.put(event("die", "a", exitCode="0"))
    assert heard.get(timeout=30) == "a"
    listener.close(30)
