"""Full disks under a service at work: a small tmpfs as STATE_DIR, or as RUN_DIR. Mounting takes root."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import STOP_SECONDS, UNNUMBERED, Caller, Service, Services, body, until

SETTINGS = {"CPU_SLOTS": 6, "DISCONNECT_GRACE_SECONDS": 60, "SHUTDOWN_GRACE_SECONDS": 1}
LONG = {"count": 200, "delay_ms": 20}
MEGABYTES = 16
EXPECTED = ("journal.failing", "certificate.not_secured", "history.not_kept", "input.not_kept")


class Disk:
    """A small file system that can be filled to the last byte."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    def make_room(self) -> None:
        self._filler.unlink()


@pytest.fixture
def mount() -> Iterator[Callable[[Path, int], Disk]]:
    """`mount(path, mode)`: a small tmpfs there until the test is over."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    with ExitStack() as stack:

        def mounted(path: Path, mode: int) -> Disk:
            path.mkdir(mode=mode)
            options = f"size={MEGABYTES}m,mode={mode:o}"
            made = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode != 0:
                pytest.skip(f"this root cannot mount a small file system: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
            return Disk(path)

        yield mounted


@pytest.fixture
def serve_on(
    services: Services, mount: Callable[[Path, int], Disk]
) -> Iterator[Callable[[str], tuple[Service, Disk]]]:
    """`serve_on("state_dir")`: a running service which has that folder on a small disk, and the disk."""
    started: list[Service] = []

    def serve(folder: str) -> tuple[Service, Disk]:
        service = services.own(**SETTINGS)
        disk = mount(getattr(service, folder), 0o711)
        started.append(service.start())
        return service, disk

    yield serve
    for service in started:
        service.close()
        assert service.residue() == []
        assert [entry for entry in service.errors() if entry.get("event") not in EXPECTED] == []


def counted(count: int) -> str:
    """What the echo worker says when it is asked for that many deltas."""
    return "".join(f"tok{n} " for n in range(count))


async def refuses_new_work(caller: Caller, session: str) -> None:
    """Every request that would make something is refused with `storage_failing`, and `/health` says why."""
    for path, wish in (
        ("/api/tasks/submit", body(session=session, prompt="x")),
        ("/api/tasks/submit", body(prompt="x")),
        ("/api/tasks/submit", body("program", oneoff=True, code="")),
        ("/api/sessions", {"model_id": "echo", "task_preset": "stream"}),
    ):
        status, problem, headers = await caller.ask("POST", path, json=wish)
        assert (status, problem["code"]) == (503, "storage_failing"), (path, wish, problem)
        assert int(headers["Retry-After"]) > 0

    async def says_so() -> dict[str, Any] | None:
        async with caller.http.get("/health") as answer:
            return await answer.json() if answer.status == 503 else None

    # Soon: the last page of a file may still have room for a few small events.
    health = await until("/health says so", says_so)
    assert (health["status"], health["ready"], health["storage_healthy"]) == ("unhealthy", False, False)


async def recovers(service: Service) -> None:
    """Wait until the service takes work again, by itself."""

    async def is_well() -> bool:
        health = await asyncio.to_thread(service.health)
        return health is not None and health["status"] == "ok" and bool(health["storage_healthy"])

    await until("the service is well again", is_well)


async def events_of(caller: Caller, task_id: str) -> list[Any]:
    async with caller.events(task_id) as events:
        await events.finish()
    return events.events


async def test_a_full_state_dir(serve_on: Callable[[str], tuple[Service, Disk]]) -> None:
    """What runs is served on, new work is refused; when there is room again all that happened is
    written down, and a service that is killed then knows it."""
    service, disk = serve_on("state_dir")
    async with service.caller() as caller:
        streaming = await caller.working(**LONG)
        behind = await caller.started(session=streaming.session_id, prompt="behind")
        cancelled = await caller.working(hang=True)
        after_it = await caller.started(session=cancelled.session_id, prompt="after it")
        killed = await caller.working(hang=True)
        alone = await caller.working(oneoff=True, count=30, delay_ms=20)
        idle = await caller.warm()

        disk.fill()
        await refuses_new_work(caller, idle)
        assert (await caller.cancel(cancelled.task_id))["state"] == "cancelled"
        assert (await cancelled.finish())["error"]["code"] == "task_cancelled"
        assert (await after_it.finish())["status"] == "completed"
        assert (await caller.kill(killed.session_id))["state"] == "draining"
        assert (await killed.finish())["error"]["code"] == "session_killed"
        assert (await caller.ended(killed.session_id))["close_reason"] == "killed"
        for task, text in ((streaming, counted(200)), (behind, "behind"), (alone, counted(30))):
            end = await task.finish()
            assert end["status"] == "completed", end
            assert task.text == text
        await caller.keep_alive(idle)
        await refuses_new_work(caller, idle)

        disk.make_room()
        await recovers(service)
        assert (await caller.run(session=idle, prompt="room again")).text == "room again"
        tasks = (streaming, behind, cancelled, after_it, killed, alone)
        views = [await caller.task(task.task_id) for task in tasks]
        await service.restart()
        for task, view in zip(tasks, views, strict=True):
            assert (await caller.task(task.task_id))["state"] == view["state"]
            assert await events_of(caller, task.task_id) == [
                event for event in task.events if event.event not in UNNUMBERED
            ]
        assert (await caller.session(killed.session_id))["close_reason"] == "killed"
        assert (await caller.session(alone.session_id))["close_reason"] == "oneoff_done"
        health = service.health()
        assert health is not None
        assert health["active_tasks"] == 0
        assert (await caller.run(session=idle, prompt="a new life")).text == "a new life"


async def test_killed_while_state_dir_is_full(serve_on: Callable[[str], tuple[Service, Disk]]) -> None:
    """The next life goes on from what was written last: a task that has ended since ends again, as it did,
    and its reader has every event once."""
    service, disk = serve_on("state_dir")
    async with service.caller() as caller:
        first = await caller.working(count=30, delay_ms=20)
        second = await caller.working(count=400, delay_ms=20)
        idle = await caller.warm()
        disk.fill()
        await refuses_new_work(caller, idle)
        assert (await first.finish())["status"] == "completed"
        service.crash()
        disk.make_room()
        service.launch()
        await service.serving()
        assert (await caller.task_in_state(first.task_id, "completed"))["error"] is None
        again = await events_of(caller, first.task_id)
        assert again[:-1] == [event for event in first.events if event.event not in UNNUMBERED][:-1]
        assert (again[-1].id, again[-1].data["status"]) == (first.events[-1].id, "completed")
        assert (await second.finish())["status"] == "completed"
        assert second.text == counted(400)
        for session in (first.session_id, idle):
            assert (await caller.run(session=session, prompt="next")).text == "next"


@pytest.mark.parametrize("folder", ["state_dir", "run_dir"])
async def test_a_start_without_room(serve_on: Callable[[str], tuple[Service, Disk]], folder: str) -> None:
    """It is refused in words, or takes up what runs; with room the next one has everything."""
    service, disk = serve_on(folder)
    async with service.caller() as caller:
        task = await caller.working(count=300, delay_ms=20)
        await task.until("text_delta")
        assert service.process is not None
        service.process.send_signal(signal.SIGUSR2)
        assert await asyncio.to_thread(service.process.wait, STOP_SECONDS) == 0
        disk.fill()
        said, process = len(service.log_text()), service.launch()

        async def has_decided() -> bool:
            return process.poll() is not None or await asyncio.to_thread(service.health) is not None

        await until("it has decided", has_decided)
        if process.poll() is not None:
            message = " ".join(service.log_text()[said:].split())
            assert (process.returncode, "Traceback" in message) == (2, False), message
            assert "The service did not start" in message
            assert str(disk.path) in message
        disk.make_room()
        if process.poll() is not None:
            service.launch()
        await service.serving()
        assert (await task.finish())["status"] == "completed"
        assert task.text == counted(300)


async def test_a_full_run_dir(serve_on: Callable[[str], tuple[Service, Disk]]) -> None:
    """Streams go on, in memory; new work is refused. With room new work is taken and streams are kept again;
    of a task that ended meanwhile the next life has all events, or says that they are gone."""
    service, disk = serve_on("run_dir")
    async with service.caller() as caller:
        streaming = await caller.working(**LONG)
        behind = await caller.started(session=streaming.session_id, prompt="behind")
        cancelled = await caller.working(hang=True)
        killed = await caller.working(hang=True)
        lasting = await caller.working(**LONG, hang=True)
        idle = await caller.warm()
        disk.fill()
        await refuses_new_work(caller, idle)
        assert (await caller.cancel(cancelled.task_id))["state"] == "cancelled"
        await caller.kill(killed.session_id)
        assert (await caller.ended(killed.session_id))["close_reason"] == "killed"
        for task, text in ((streaming, counted(200)), (behind, "behind")):
            assert (await task.finish())["status"] == "completed"
            assert task.text == text
        assert len(await events_of(caller, streaming.task_id)) > 200
        await lasting.until("text_delta", delta="tok199 ")
        disk.make_room()
        await recovers(service)
        assert (await caller.run(session=idle, prompt="room again")).text == "room again"
        assert (await caller.run(prompt="in a new session")).text == "in a new session"

        await service.restart()
        assert (await caller.task(streaming.task_id))["state"] == "completed"
        async with caller.http.get(f"/api/tasks/{streaming.task_id}/events") as answer:
            if answer.status == 410:
                assert (await answer.json(content_type=None))["code"] == "events_gone"
        if answer.status != 410:  # what others left made room for it
            events = [event for event in streaming.events if event.event not in UNNUMBERED]
            assert await events_of(caller, streaming.task_id) == events
        async with caller.events(lasting.task_id) as again:
            await again.until("text_delta", delta="tok199 ")
        assert again.text == lasting.text == counted(200)
        assert "gap" not in again.names
        await caller.cancel(lasting.task_id)
        assert (await lasting.finish())["status"] == "cancelled"
        assert (await caller.run(session=idle, prompt="a new life")).text == "a new life"


async def test_killed_while_run_dir_is_full(serve_on: Callable[[str], tuple[Service, Disk]]) -> None:
    """The start goes on with the sessions that there are; a stream whose events could not be kept goes on
    behind a gap, or from the worker's own memory."""
    service, disk = serve_on("run_dir")
    async with service.caller() as caller:
        idle = await caller.warm()
        task = await caller.working(count=400, delay_ms=20)
        await task.until("text_delta")
        disk.fill()
        await until(
            "it is seen", lambda: not (service.health() or {"storage_healthy": True})["storage_healthy"]
        )
        service.crash()
        service.launch()
        process = service.process
        assert process is not None

        async def has_started_or_ended() -> bool:
            return process.poll() is not None or await asyncio.to_thread(service.health) is not None

        await until("it has decided", has_started_or_ended)
        assert process.poll() is None, service.log_text()[-3000:]
        assert (await task.finish())["status"] == "completed"
        assert task.text == counted(400)
        disk.make_room()
        await recovers(service)
        assert (await caller.run(session=idle, prompt="room again")).text == "room again"
