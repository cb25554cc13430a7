"""What a service remembers over kill -9, what it must never write down, and what it refuses to read."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gpu_server.client import Refused, TaskEvent
from tests.e2e.harness import STOP_SECONDS, UNNUMBERED, Caller, Following, Service, Services, body
from tests.e2e.memory import found_in_files

SETTINGS = {"CPU_SLOTS": 4, "DISCONNECT_GRACE_SECONDS": 60}
TIMES = ("created_at", "started_at", "finished_at", "closed_at", "idle_deadline", "max_deadline", "effective")


@pytest.fixture
def service(serve: Callable[..., Service]) -> Service:
    """The service that most tests here share, and kill."""
    return serve(**SETTINGS)


@pytest.fixture
def own(services: Services) -> Iterator[Service]:
    """A running service of this test's own."""
    service = services.own(**SETTINGS)
    yield service.start()
    service.close()
    assert service.residue() == []
    assert service.errors() == []


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two views of one thing agree in everything, in times to the second."""
    assert before.keys() == after.keys()
    for name in before:
        if isinstance(before[name], dict):
            same(before[name], after[name])
        elif name in TIMES and None not in (before[name], after[name]):
            apart = datetime.fromisoformat(after[name]) - datetime.fromisoformat(before[name])
            assert abs(apart.total_seconds()) < 1, (name, before[name], after[name])
        else:
            assert before[name] == after[name], name


def numbered(following: Following) -> list[TaskEvent]:
    return [event for event in following.events if event.event not in UNNUMBERED]


# -- what is remembered -------------------------------------------------------------------------------------


async def test_what_has_ended_stays_readable(service: Service, caller: Caller) -> None:
    """Over two restarts: tasks with every event, a worker's own words, sessions with their last lines."""
    session = await caller.warm()
    done = await caller.run(session=session, prompt="one two three", log="a line")
    failed = await caller.run(session=session, prompt="x", fail="the worker's own words")
    crashed = await caller.run(count=5, crash=7, log="my last line")
    cancelled = await caller.working(session=session, hang=True)
    await caller.cancel(cancelled.task_id)
    await cancelled.finish()
    late = await caller.run(session=session, seconds=0.5, hang=True)
    alone = await caller.run("program", oneoff=True, code="print('out')")
    await caller.kill(session)
    tasks = (done, failed, crashed, cancelled, late, alone)
    sessions = {task.session_id for task in tasks}
    views = {task.task_id: await caller.task(task.task_id) for task in tasks}
    tombstones = {session_id: await caller.washed(session_id) for session_id in sessions}
    assert views[failed.task_id]["error"] == {"code": "task_failed", "message": "the worker's own words"}
    assert "my last line" in tombstones[crashed.session_id]["log_tail"]
    listed = await caller.client.call("GET", "/api/sessions")

    for _ in range(2):
        await service.restart()
        for task in tasks:
            same(views[task.task_id], await caller.task(task.task_id))
            events = numbered(task)
            for after in (0, 1, len(events) - 1):
                async with caller.events(task.task_id, after=after) as again:
                    await again.finish()
                assert again.events == events[after:]
            headers = {"Last-Event-ID": str(len(events))}
            async with caller.http.get(f"/api/tasks/{task.task_id}/events", headers=headers) as answer:
                assert answer.status == 204
        for session_id in sessions:
            same(tombstones[session_id], await caller.session(session_id))
        listed_again = (await caller.client.call("GET", "/api/sessions"))["sessions"]
        assert [s["session_id"] for s in listed_again] == [s["session_id"] for s in listed["sessions"]]


async def test_what_lives_looks_the_same(service: Service, caller: Caller) -> None:
    """State, queue, place and expiry of sessions and tasks: nobody gains or loses time by a restart."""
    working = await caller.working(hang=True)
    queued = await caller.started(session=working.session_id, prompt="never")
    idle = await caller.warm()
    await caller.warm()
    await caller.warm()
    waiting = await caller.started(prompt="never")
    sessions = [working.session_id, idle, waiting.session_id]
    tasks = [task.task_id for task in (working, queued, waiting)]
    before = [await caller.session(s) for s in sessions] + [await caller.task(t) for t in tasks]
    await service.restart()
    after = [await caller.session(s) for s in sessions] + [await caller.task(t) for t in tasks]
    for one, other in zip(before, after, strict=True):
        same(one, other)
    assert after[0]["expiry"]["max_deadline"] is not None
    assert after[1]["expiry"]["reason"] == "idle_timeout"
    assert after[2]["expiry"]["reason"] == "no_available_gpu"


async def test_idempotency_keys_hold(service: Service, caller: Caller) -> None:
    """Over a restart the same request is the same task or session, another one is refused, and another
    tenant's key is its own."""
    session = await caller.warm()
    wish = body(session=session, count=150, delay_ms=20)
    first = Following(caller.client.submit(wish, "task-key"))
    await first.until("text_delta")
    start = {"model_id": "echo", "task_preset": "stream"}
    headers = {"Idempotency-Key": "session-key"}
    _, made, _ = await caller.ask("POST", "/api/sessions", json=start, headers=headers)

    for life in range(3):
        again = Following(caller.client.submit(wish, "task-key"))
        await again.finish()
        assert again.task_id == first.task_id
        assert again.text == "".join(f"tok{n} " for n in range(150))
        if life == 0:
            await first.finish()
        assert numbered(again) == numbered(first)
        with pytest.raises(Refused) as refused:
            await Following(caller.client.submit(body(session=session, count=2), "task-key")).finish()
        assert (refused.value.status, refused.value.code) == (409, "idempotency_mismatch")
        status, found, _ = await caller.ask("POST", "/api/sessions", json=start, headers=headers)
        assert (status, found["session_id"]) == (201, made["session_id"])
        other = {**start, "task_preset": "batch"}
        status, problem, _ = await caller.ask("POST", "/api/sessions", json=other, headers=headers)
        assert (status, problem["code"]) == (409, "idempotency_mismatch")
        await service.restart()

    async with service.caller() as stranger:
        theirs = Following(stranger.client.submit(body(prompt="mine"), "task-key"))
        assert (await theirs.finish())["status"] == "completed"
        assert theirs.task_id != first.task_id
    assert (await caller.session(session))["tasks_done"] == 1


# -- what is never written down -----------------------------------------------------------------------------


def holds(folder: Path, word: str) -> list[str]:
    """The files below a folder that hold a word, in their bytes."""
    return sorted(str(Path(found).relative_to(folder)) for found in found_in_files(folder, [word.encode()]))


async def test_words_never_reach_the_disk(own: Service) -> None:
    """No prompt, output or error text of a worker is ever below STATE_DIR or in the log: neither while it is
    there, nor after kill -9, nor after the end. What is kept in RUN_DIR is closed to everybody else."""
    words = {name: f"canary-{name}-{os.urandom(8).hex()}" for name in WORDS}
    state, kept = own.state_dir, own.run_dir / f"{own.instance[:8]}.kept"
    async with own.caller() as caller:
        done = await caller.run(prompt=words["prompt"], log=words["line"])
        session = done.session_id
        await caller.run(session=session, prompt="x", fail=words["failure"])
        await caller.run(session=session, **{words["field"]: "1"})
        crashed = await caller.run(prompt=words["before"], crash=3, log=words["last"])
        says = f"import sys; print({words['out']!r}); print({words['err']!r}, file=sys.stderr); sys.exit(1)"
        await caller.run("program", oneoff=True, code=says)
        running = await caller.working(session=session, prompt=words["running"], hang=True)
        queued = await caller.started(session=session, prompt=words["queued"])

        def check() -> None:
            for task in (done, crashed, running, queued):
                assert any("journal.db" in name for name in holds(state, task.task_id))
            for word in words.values():
                assert holds(state, word) == []
                assert word not in own.log_text()

        check()
        for name in ("prompt", "failure", "before", "last", "out", "err", "running", "queued"):
            assert holds(kept, words[name]), name
        assert kept.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}
        own.crash()
        check()
        own.launch()
        await own.serving()
        check()
        await caller.cancel(running.task_id)
        assert (await queued.finish())["status"] == "completed"
        check()
        for task in (running, queued):
            await caller.kill(task.session_id)
        assert own.terminate() == 0
        check()
    with closing(sqlite3.connect(state / "journal.db")) as journal:
        text = "\n".join(journal.iterdump())
    assert done.task_id in text
    assert [word for word in words.values() if word in text] == []


WORDS = ("prompt", "line", "failure", "field", "before", "last", "out", "err", "running", "queued")


# -- what is refused ----------------------------------------------------------------------------------------


def torn(path: Path) -> None:
    """The roots of some tables, which begin the second and third page, turned over."""
    content = bytearray(path.read_bytes())
    for start in (4096, 8192):
        content[start : start + 64] = bytes(byte ^ 0xFF for byte in content[start : start + 64])
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 6000)


def text(path: Path) -> None:
    path.write_text("these are my notes, and no journal\n" * 200)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def twisted(path: Path) -> None:
    """Sound for SQLite, and no state of a session."""
    content = path.read_bytes()
    assert b'"state":"working"' in content
    path.write_bytes(content.replace(b'"state":"working"', b'"state":"wobbles"'))


def forgetful(path: Path) -> None:
    """Sound for SQLite, but a session has a task that is not there."""
    with closing(sqlite3.connect(path)) as journal, journal:
        journal.execute("DELETE FROM tasks")


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as journal:
        (version,) = journal.execute("PRAGMA user_version").fetchone()
        journal.execute(f"PRAGMA user_version = {version + 1}")


def content_of(folder: Path) -> dict[str, bytes]:
    """The journal and what lies beside it."""
    return {path.name: path.read_bytes() for path in folder.glob("journal.db*")}


async def test_a_journal_that_cannot_be_read(own: Service) -> None:
    """The start is refused with the file's name, and nothing of it changes; without it the service starts
    with no memory, removes what it finds of itself, and has every slot free."""
    journal = own.state_dir / "journal.db"
    async with own.caller() as caller:
        task = await caller.working(hang=True)
        session_id, idle = task.session_id, await caller.warm()
        assert own.process is not None
        own.process.send_signal(signal.SIGUSR2)
        assert own.process.wait(STOP_SECONDS) == 0
        assert list(content_of(own.state_dir)) == ["journal.db"], "it was closed in order"
        whole = journal.read_bytes()
        for damage, says in (
            (torn, "damaged"),
            (cut, "damaged"),
            (text, "no journal of this program"),
            (empty, "damaged"),
            (twisted, "move it away"),
            (forgetful, "move it away"),
            (newer, "newer version"),
        ):
            journal.write_bytes(whole)
            damage(journal)
            _refused(own, says)
        residue = own.residue()
        assert session_id in str(residue)
        assert idle in str(residue)

        journal.write_bytes(whole)
        own.launch()
        await own.serving()
        assert (await caller.task(task.task_id))["state"] == "running", "the journal was good after all"
        await task.leave()
        own.crash()
        assert (own.state_dir / "journal.db-wal").stat().st_size > 0
        text(journal)
        _refused(own, "no journal of this program")
        for path in own.state_dir.glob("journal.db*"):
            path.rename(own.folder / path.name)
        own.start()
        assert own.residue() == []
        status, problem, _ = await caller.ask("GET", f"/api/tasks/{task.task_id}")
        assert (status, problem["code"]) == (404, "task_not_found")
        assert await caller.client.call("GET", "/api/sessions") == {"sessions": []}
        assert (await caller.run(prompt="a new memory")).text == "a new memory"


def _refused(service: Service, says: str) -> None:
    """The start is refused, with these words, and no byte of the journal changes."""
    before, said = content_of(service.state_dir), len(service.log_text())
    assert service.launch().wait(STOP_SECONDS) == 2
    message = " ".join(service.log_text()[said:].split())
    assert "The service did not start" in message
    assert str(service.state_dir / "journal.db") in message
    assert says in message
    assert "Traceback" not in message
    assert content_of(service.state_dir) == before


async def test_a_lost_run_dir(own: Service) -> None:
    """Without what was in RUN_DIR the service starts all the same: what ended is known without its events."""
    async with own.caller() as caller:
        done = await caller.run(prompt="x", fail="gone with the spool")
        own.crash()
        for path in (own.run_dir / f"{own.instance[:8]}.kept").iterdir():
            path.unlink()
        own.launch()
        await own.serving()
        view = await caller.task(done.task_id)
        assert (view["state"], view["error"]["code"]) == ("failed", "task_failed")
        assert view["error"]["message"] == "(the worker's own words were not kept)"
        status, problem, _ = await caller.ask("GET", f"/api/tasks/{done.task_id}/events")
        assert (status, problem["code"]) == (410, "events_gone")
        assert (await caller.run(session=done.session_id, prompt="next")).text == "next"
