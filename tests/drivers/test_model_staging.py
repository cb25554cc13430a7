"""Where models are put together: one at a time, whole or not at all, and nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpu_server.drivers import model_staging
from gpu_server.drivers.model_staging import (
    STALE_SECONDS,
    Staging,
    StagingFault,
    fault_of,
    staging_for,
    sweep,
)
from tests.drivers.models_world import FILES, laid, lay, remount_read_only, small_disk, told_when_taken
from tests.drivers.open_files import nothing_left_open


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_staging, "LOCK_POLL_SECONDS", 0.01)


async def test_one_rename_makes_a_model(tmp_path: Path) -> None:
    """Until then there is nothing to be seen, and afterwards nothing of how it was made."""
    async with staging_for(tmp_path, "org/m") as staging:
        staging.begin("here")
        lay(staging.files, FILES)
        assert not (tmp_path / "org").exists()
        assert staging.publish(staging.files) == tmp_path / "org/m"
    assert laid(tmp_path / "org/m") == FILES
    assert list((tmp_path / ".staging").iterdir()) == []


async def test_workers_can_read_it(tmp_path: Path) -> None:
    """They have uids of their own, whatever the umask of the service is."""
    before = os.umask(0o077)
    try:
        async with staging_for(tmp_path, "org/m") as staging:
            staging.begin("here")
            lay(staging.files, FILES)
            staging.open_to_workers(staging.files)
            staging.publish(staging.files)
    finally:
        os.umask(before)
    assert {oct((tmp_path / "org/m" / path).stat().st_mode & 0o777) for path in FILES} == {"0o644"}
    for folder in ("org", "org/m", "org/m/tokenizer"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o755


async def test_an_inner_folder_may_be_the_model(tmp_path: Path) -> None:
    """What lies around it goes."""
    async with staging_for(tmp_path, "m") as staging:
        staging.begin("here")
        lay(staging.files / "m", FILES)
        staging.publish(staging.files / "m")
    assert laid(tmp_path) == {f"m/{path}": content for path, content in FILES.items()}


async def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    """An empty folder is no model; one with a file in it is somebody's."""
    (tmp_path / "m").mkdir()
    for taken in (False, True):
        async with staging_for(tmp_path, "m") as staging:
            staging.begin("here")
            lay(staging.files, FILES)
            if taken:
                with pytest.raises(StagingFault, match="something else"):
                    staging.publish(staging.files)
            else:
                staging.publish(staging.files)


@pytest.mark.parametrize("model_id", ["m", "org/m"])
async def test_the_root_itself_may_be_a_link(tmp_path: Path, model_id: str) -> None:
    """An operator may link the store to where the mount is."""
    lay(tmp_path / "mount", {})
    (tmp_path / "root").symlink_to("mount")
    async with staging_for(tmp_path / "root", model_id) as staging:
        staging.begin("here")
        lay(staging.files, FILES)
        staging.publish(staging.files)
    assert laid(tmp_path / "mount" / model_id) == FILES


async def test_not_behind_a_link(tmp_path: Path) -> None:
    """An organisation's folder that leads elsewhere gets no model."""
    root = lay(tmp_path / "root", {})
    lay(tmp_path / "elsewhere", {})
    (root / "org").symlink_to(tmp_path / "elsewhere")
    async with staging_for(root, "org/m") as staging:
        staging.begin("here")
        lay(staging.files, FILES)
        with pytest.raises(StagingFault, match="org is a link"):
            staging.publish(staging.files)
    assert laid(tmp_path / "elsewhere") == {}


async def test_one_at_a_time(tmp_path: Path) -> None:
    """A second one waits until the first is done; another model's does not."""
    order = []

    async def second() -> None:
        async with staging_for(tmp_path, "m"):
            order.append("second")

    with told_when_taken() as taken:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group, staging_for(tmp_path, "m"):
            group.create_task(second())
            async with staging_for(tmp_path, "n"):
                await taken.wait()
            order.append("first")
    assert order == ["first", "second"]


async def test_a_lock_that_is_got_when_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that answers after its caller has left holds up nobody who comes later."""
    loop, real = asyncio.get_running_loop(), fcntl.flock
    trying, go_on = asyncio.Event(), threading.Event()

    def slow(descriptor: int, how: int) -> None:
        loop.call_soon_threadsafe(trying.set)
        go_on.wait(20)
        real(descriptor, how)

    async def want() -> None:
        async with staging_for(tmp_path, "m"):
            pass

    monkeypatch.setattr(fcntl, "flock", slow)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(want())
        await trying.wait()
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        await want()
    assert task.cancelled()


async def test_letting_go_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system is not asked on the event loop, which everybody else needs."""
    threads, real = [], Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        threads.append(threading.current_thread())
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    async with staging_for(tmp_path, "m"):
        pass
    assert len(threads) == 1
    assert threads != [threading.current_thread()]


async def test_names_that_look_like_locks(tmp_path: Path) -> None:
    """No model's name is another one's lock."""
    async with staging_for(tmp_path, "x.lock") as staging:
        staging.begin("here")
        async with asyncio.timeout(20), staging_for(tmp_path, "x"):
            pass


async def test_not_into_a_model(tmp_path: Path) -> None:
    """A folder that holds files is a model, and gets no model into it; hidden files make no model."""
    lay(tmp_path / "m", FILES)
    lay(tmp_path / "org", {".listing": b""})
    for model_id in ("m/x", "org/x"):
        async with staging_for(tmp_path, model_id) as staging:
            staging.begin("here")
            lay(staging.files, FILES)
            if model_id == "m/x":
                with pytest.raises(StagingFault, match="m holds files"):
                    staging.publish(staging.files)
            else:
                staging.publish(staging.files)
    assert laid(tmp_path / "m") == laid(tmp_path / "org/x") == FILES


@pytest.mark.parametrize(
    ("number", "keeps"),
    [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True), (errno.ESTALE, True)],
)
def test_what_may_pass(number: int, keeps: bool) -> None:
    """A disk that is full needs its room back; after any other error a download may be gone on with."""
    assert fault_of(OSError(number, os.strerror(number))).keeps is keeps


@contextmanager
def holding(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which holds the lock."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            yield holder
        finally:
            holder.kill()


async def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """What another process holds is waited for, and is free when that is killed."""
    (tmp_path / ".staging").mkdir()
    lock = tmp_path / ".staging/m~lock"
    with holding(lock) as holder:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), staging_for(tmp_path, "m"):
                pass
        holder.kill()
        async with asyncio.timeout(20), staging_for(tmp_path, "m"):
            pass


async def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had it removed it just before this one got hold of it: a third one would get another file."""
    lock, removed, real = tmp_path / ".staging/m~lock", [], fcntl.flock

    def too_late(descriptor: int, how: int) -> None:
        real(descriptor, how)
        if not removed:
            lock.unlink()
            removed.append(True)

    monkeypatch.setattr(fcntl, "flock", too_late)
    async with staging_for(tmp_path, "m"):
        held = os.listdir(tmp_path / ".staging")
    assert (removed, held) == ([True], ["m~lock"])


async def test_what_an_earlier_try_left(tmp_path: Path) -> None:
    """It stays for who comes from the same origin, and goes for everybody else."""
    async with staging_for(tmp_path, "m") as staging:
        staging.begin("here")
        lay(staging.files, FILES)
    for origin, kept in (("here", FILES), ("elsewhere", {})):
        async with staging_for(tmp_path, "m") as staging:
            staging.begin(origin)
            assert laid(staging.files) == kept


async def test_room(tmp_path: Path) -> None:
    """Both numbers are told when there is not enough."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        async with staging_for(disk, "m") as staging:
            staging.begin("here")
            staging.require_room(2 << 20)
            with pytest.raises(StagingFault, match=r"it needs 4194304 bytes, .* has \d+ bytes free"):
                staging.require_room(4 << 20)


async def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    """A read-only mount, and one that is not there, are told as what they are."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        remount_read_only(disk)
        with pytest.raises(StagingFault, match=r"Read-only file system.*mount it writable"):
            async with staging_for(disk, "m"):
                pass
    with pytest.raises(StagingFault, match="is not there"):
        async with staging_for(tmp_path / "none", "m"):
            pass


async def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre locks files only where it is mounted to: that is told, and nothing left open."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with nothing_left_open(), pytest.raises(StagingFault, match="mount it with -o flock"):
        async with staging_for(tmp_path, "m"):
            pass


async def test_sweeping(tmp_path: Path) -> None:
    """What belongs to a model that is there, and what nobody went on with for long, is removed; what somebody
    works on, or may go on with, and what is no model's, is not."""
    (tmp_path / ".staging/foo bar").mkdir(parents=True)

    def is_there(model_id: str) -> bool:
        if model_id == "foo bar":
            raise ValueError("no model id")
        return model_id in ("org/there", "held")

    for name in ("org%there", "stale", "held", "fresh"):
        lay(tmp_path / ".staging" / name, {"files/x": b"1", "origin": b"here"})
    for path in (tmp_path / ".staging/stale").rglob("*"):
        os.utime(path, (0, 0))
    os.utime(tmp_path / ".staging/stale", (0, 0))
    async with staging_for(tmp_path, "held"):
        sweep(tmp_path, is_there)
        assert set(os.listdir(tmp_path / ".staging")) == {"held", "held~lock", "fresh", "foo bar"}
    sweep(tmp_path, lambda model_id: False, now=STALE_SECONDS + 1e10)
    assert os.listdir(tmp_path / ".staging") == []
    sweep(tmp_path / "none", lambda model_id: False)


def test_clearing(tmp_path: Path) -> None:
    """A try that begins anew has an empty folder and no notes."""
    staging = Staging(tmp_path, "m")
    staging.begin("here")
    lay(staging.files, FILES)
    staging.notes.write_text("done")
    staging.clear()
    assert laid(staging.files) == {}
    assert not staging.notes.exists()
    staging.remove()
    assert laid(tmp_path) == {}
