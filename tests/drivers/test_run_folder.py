"""Run folders against workers that try everything."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import RunFolder, RunFolderFault
from tests.drivers.open_files import open_files
from tests.worker_specs import TEST_UID

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files to another uid")


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[RunFolders]:
    folders = RunFolders(tmp_path / "run")
    yield folders
    # Some are nested deeper than pytest's own cleaning can go.
    for name in folders.names():
        folders.remove(name)


@pytest.fixture
def folder(folders: RunFolders) -> RunFolder:
    return folders.create("s_1", TEST_UID, b"{}")


@pytest.fixture
def listener(folder: RunFolder) -> Iterator[socket.socket]:
    """A worker that listens on its socket."""
    with listen(folder.socket) as sock:
        yield sock


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    # As a worker does it in a container: by a short name.
    held = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sock.bind(f"/proc/self/fd/{held}/{path.name}")
    finally:
        os.close(held)
    sock.listen()
    return sock


def test_a_folder_has_a_share_to_write_and_a_task_to_read(folder: RunFolder) -> None:
    """The input is where the worker finds it, and only the share is the worker's."""
    assert (folder.task / "input.json").read_bytes() == b"{}"
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o711
    assert stat.S_IMODE(folder.share.stat().st_mode) == 0o700
    assert folder.share.stat().st_uid == TEST_UID
    assert (folder.task / "input.json").stat().st_mode & 0o222 == 0


@as_root
def test_only_the_workers_uid_reads_the_input_and_it_cannot_change_it() -> None:
    """Another uid sees neither share nor input; the worker's own cannot write or replace its input."""
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o711)
        folder = RunFolders(Path(top) / "run").create("s_1", TEST_UID, b"{}")
        task_input = str(folder.task / "input.json")
        attempts = [
            ("-r", task_input),
            ("-w", str(folder.share)),
            ("-w", task_input),
            ("-w", str(folder.task)),
            ("-w", str(folder.path)),
        ]

        def as_uid(uid: int) -> list[bool]:
            return [
                subprocess.run(
                    ["/usr/bin/test", mode, path], user=uid, group=uid, extra_groups=[], check=False
                ).returncode
                == 0
                for mode, path in attempts
            ]

        assert as_uid(TEST_UID) == [True, True, False, False, False]
        assert as_uid(TEST_UID + 1) == [False] * 5


def test_creating_again_starts_from_nothing(folders: RunFolders, folder: RunFolder) -> None:
    """What an interrupted start left behind does not reach the next worker."""
    (folder.share / "left").touch()
    again = folders.create("s_1", TEST_UID, None)
    assert list(again.share.iterdir()) == []
    assert list(again.task.iterdir()) == []


def test_another_life_finds_the_folder(folders: RunFolders, folder: RunFolder, tmp_path: Path) -> None:
    """It is found by its session's id, as it was made; what is not there, or is no folder, is not found."""
    again = RunFolders(tmp_path / "run")
    assert again.find("s_1") == folder
    assert again.find("s_2") is None
    (tmp_path / "run" / "s_3").touch()
    assert again.find("s_3") is None
    assert RunFolders(tmp_path / "nowhere").find("s_1") is None


def test_the_owner_is_whom_it_was_made_for(folders: RunFolders, folder: RunFolder, tmp_path: Path) -> None:
    """Whoever listens there must be that uid, whichever uid the slot's workers have today."""
    found = RunFolders(tmp_path / "run").find("s_1")
    assert found is not None
    assert folders.owner(found) == TEST_UID
    folder.share.chmod(0)
    if os.geteuid() == 0:
        assert folders.owner(found) == TEST_UID


@pytest.mark.parametrize("left", ["nothing", "file", "link"])
def test_a_folder_without_its_share_has_no_owner(folders: RunFolders, folder: RunFolder, left: str) -> None:
    """A share that is gone, or something else now, is a fault; links are not followed to somebody else's."""
    before = open_files()
    folder.share.rmdir()
    if left == "file":
        folder.share.touch()
    elif left == "link":
        folder.share.symlink_to("/tmp")
    with pytest.raises(RunFolderFault):
        folders.owner(folder)
    assert open_files() - before == set()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "s-1", "s_1\n", "/etc"])
def test_names_that_are_no_session_ids_are_refused(folders: RunFolders, name: str) -> None:
    """A session id never leads out of the root."""
    with pytest.raises(ValueError, match="no session id"):
        folders.create(name, TEST_UID, None)
    with pytest.raises(ValueError, match="no session id"):
        folders.remove(name)


def test_a_socket_is_reached_however_long_its_path_is(tmp_path: Path) -> None:
    """The 108 bytes of a socket address are no limit."""
    folders = RunFolders(tmp_path / ("x" * 100) / ("y" * 100))
    folder = folders.create("s_1", TEST_UID, None)
    assert folders.connect_path(folder) is None
    with listen(folder.socket), socket.socket(socket.AF_UNIX) as client:
        held = folders.connect_path(folder)
        assert held is not None
        with held:
            client.connect(held.path)


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "file", "pipe", "link_to_socket"])
def test_anything_but_a_socket_is_a_fault(folders: RunFolders, folder: RunFolder, kind: str) -> None:
    """No link is followed, not even to a socket, and nothing else is opened or waited for."""
    before = open_files()
    path = folder.socket
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "dangling":
        path.symlink_to("/nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with listen(folder.share / "other.sock"):
            path.symlink_to("other.sock")
    with pytest.raises(RunFolderFault):
        folders.connect_path(folder)
    assert open_files() - before == set()


def test_a_share_that_became_a_link_is_a_fault(
    folders: RunFolders, folder: RunFolder, tmp_path: Path
) -> None:
    """The share itself is not followed either."""
    folder.share.rmdir()
    folder.share.symlink_to(tmp_path)
    with pytest.raises(RunFolderFault):
        folders.connect_path(folder)
    with pytest.raises(RunFolderFault):
        folders.check(folder)


def test_a_socket_that_is_swapped_after_the_look_changes_nothing(
    folders: RunFolders, folder: RunFolder, listener: socket.socket
) -> None:
    """The connection goes to the inode that was looked at, whatever has its name by then."""
    held = folders.connect_path(folder)
    assert held is not None
    folder.socket.unlink()
    with held, listen(folder.socket) as swapped, socket.socket(socket.AF_UNIX) as client:
        client.connect(held.path)
        accepted, _ = listener.accept()
        accepted.close()
        swapped.setblocking(False)
        with pytest.raises(BlockingIOError):
            swapped.accept()


def test_a_held_socket_is_let_go_once(
    folders: RunFolders, folder: RunFolder, listener: socket.socket
) -> None:
    """Closing twice closes no descriptor of somebody else's, and dropping it closes it."""
    before = open_files()
    held = folders.connect_path(folder)
    assert held is not None
    held.close()
    held.close()
    dropped = folders.connect_path(folder)
    del dropped
    assert open_files() - before == set()


def test_a_modest_folder_passes(folders: RunFolders, folder: RunFolder, listener: socket.socket) -> None:
    """A socket and some small files are what the bounds are for."""
    (folder.share / "deep/er").mkdir(parents=True)
    (folder.share / "deep/er/file").write_bytes(b"x" * 1000)
    (folder.share / "link").symlink_to("/")
    folders.check(folder)


@pytest.mark.parametrize("kind", ["big", "sparse", "many", "deep", "wide_and_deep"])
def test_a_folder_that_is_filled_is_a_fault(folders: RunFolders, folder: RunFolder, kind: str) -> None:
    """Bytes, lengths without bytes, entries and depth are all bounded."""
    before = open_files()
    if kind == "big":
        (folder.share / "a").write_bytes(b"x" * (600 << 10))
        (folder.share / "b").write_bytes(b"x" * (600 << 10))
    elif kind == "sparse":
        with (folder.share / "a").open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "many":
        for number in range(65):
            (folder.share / str(number)).touch()
    elif kind == "deep":
        nest(folder.share, 3000)
    else:
        for number in range(60):
            (folder.share / f"d{number}").mkdir()
        nest(folder.share / "d30", 100)
    with pytest.raises(RunFolderFault):
        folders.check(folder)
    assert open_files() - before == set()


def nest(top: Path, depth: int) -> None:
    """Folders in folders, deeper than any path may be long."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_removing_takes_everything_and_nothing_outside(
    folders: RunFolders, folder: RunFolder, tmp_path: Path
) -> None:
    """Links are not followed; thousands of nested folders, pipes and sockets go; it is idempotent."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (folder.share / "link").symlink_to(outside)
    (folder.share / "inner").mkdir()
    (folder.share / "inner/link").symlink_to(outside)
    os.mkfifo(folder.share / "pipe")
    (folder.share / "closed").mkdir()
    (folder.share / "closed/file").touch()
    (folder.share / "closed").chmod(0)
    listen(folder.share / "sock").close()
    nest(folder.share, 5000)
    for number in range(2500):
        (folder.share / f"file{number}").touch()
    before = open_files()
    folders.remove("s_1")
    folders.remove("s_1")
    assert open_files() - before == set()
    assert not folder.path.exists()
    assert (outside / "precious").exists()
    assert folders.names() == ()


def test_a_session_folder_that_is_a_link_is_unlinked(folders: RunFolders, tmp_path: Path) -> None:
    """Removing never goes through a link in the root."""
    folders.create("s_0", TEST_UID, None)
    (tmp_path / "outside").mkdir()
    (tmp_path / "run/s_1").symlink_to(tmp_path / "outside")
    folders.remove("s_1")
    assert (tmp_path / "outside").exists()
    assert folders.names() == ("s_0",)


def test_names_are_the_sessions_that_have_a_folder(folders: RunFolders, tmp_path: Path) -> None:
    """Other entries of the root are not sessions, and a root that is not there holds none."""
    assert folders.names() == ()
    folders.remove("s_none")
    folders.create("s_2", TEST_UID, None)
    folders.create("s_1", TEST_UID, None)
    (tmp_path / "run/lost+found").mkdir()
    assert folders.names() == ("s_1", "s_2")
