"""Files that outlive a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_server.drivers.residue_files import CoreFiles, OwnedFiles, SessionFolders, shared_folders
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import EndedLease, NotSeen, WashUnreachable
from tests.worker_specs import TEST_UID

UID, OTHER = 1_900_000_001, 1_900_000_002
LEASE = EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",), uids=(UID,))
NO_LEASE = EndedLease(session_id=None, fence=6, slot_ids=("cpu-0",), uids=(UID,))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files of other uids need root")


def halt() -> None:
    """Nobody has given up."""


def uids_of(lease: EndedLease) -> frozenset[int]:
    return frozenset(lease.uids)


def make(path: Path, uid: int, *, folder: bool = False, mode: int = 0o644) -> Path:
    path.mkdir() if folder else path.write_text("secret")
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


def cleaned(place: OwnedFiles | CoreFiles, lease: EndedLease = LEASE) -> int:
    """How many were found; afterwards none is."""
    found = place.look(lease, halt)
    place.remove(lease, halt)
    assert place.look(lease, halt) == 0
    return found


# -- run folders ------------------------------------------------------------------------------------------


def test_run_folders(tmp_path: Path) -> None:
    """A lease's own goes and no other; without a lease those that no worker serves."""
    folders = RunFolders(tmp_path)
    for session_id in ("s_1", "s_2", "s_3"):
        folders.create(session_id, TEST_UID, b"{}")
    place = SessionFolders(folders, {"s_2": "gpu-server-s_2-1"}.get)
    assert place.look(LEASE, halt) == 1
    place.remove(LEASE, halt)
    assert folders.names() == ("s_2", "s_3")
    assert place.look(LEASE, halt) == 0
    assert place.look(NO_LEASE, halt) == 1
    place.remove(NO_LEASE, halt)
    assert folders.names() == ("s_2",)


# -- files of a uid ---------------------------------------------------------------------------------------


@needs_root
def test_only_what_belongs_to_the_uid_goes(tmp_path: Path) -> None:
    """Trees whole, whatever their modes; links as links; nothing of others, and nothing a link leads to."""
    outside = tmp_path / "outside"
    make(outside, UID, folder=True)
    make(outside / "file", UID)
    place = tmp_path / "shm"
    place.mkdir(mode=0o1777)
    make(place / "file", UID)
    make(make(place / "tree", UID, folder=True, mode=0) / "of another", OTHER)
    (place / "link").symlink_to(outside)
    os.chown(place / "link", UID, UID, follow_symlinks=False)
    (place / "other's link").symlink_to(outside)
    os.chown(place / "other's link", OTHER, OTHER, follow_symlinks=False)
    make(place / "other", OTHER)
    make(make(place / "closed", OTHER, folder=True) / "of the uid", UID)
    assert cleaned(OwnedFiles("shm", (place, tmp_path / "not-there"), uids_of)) == 3
    assert sorted(os.listdir(place)) == ["closed", "other", "other's link"]
    assert (outside / "file").read_text() == "secret"


@needs_root
def test_folders_that_are_open_to_all_are_looked_into(tmp_path: Path) -> None:
    """Other people's too, at any depth; what is in them of others stays. A folder that comes twice counts
    once."""
    tmp_path.chmod(0o755)
    deep = make(make(tmp_path / "open", OTHER, folder=True, mode=0o777) / "deep", OTHER, folder=True)
    deep.chmod(0o1777)
    make(deep / "of the uid", UID)
    make(deep / "of another", OTHER)
    assert cleaned(OwnedFiles("tmp", (tmp_path, tmp_path / "open"), uids_of)) == 1
    assert os.listdir(deep) == ["of another"]


@needs_root
@pytest.mark.parametrize("chain", [False, True])
def test_the_search_is_bounded(tmp_path: Path, chain: bool) -> None:
    """Somebody who opens folders to all without end delays a wash; he does not let it pass, and costs few
    descriptors."""
    here = tmp_path
    for number in range(300):
        folder = make(here / str(number), OTHER, folder=True, mode=0o777)
        here = folder if chain else here
    with pytest.raises(WashUnreachable, match="too many folders"):
        OwnedFiles("tmp", (tmp_path,), uids_of).look(LEASE, halt)


@needs_root
def test_what_took_the_place_of_an_entry_is_not_the_uids(tmp_path: Path) -> None:
    """In a folder that is open to all, and not sticky, everybody may put something else in an entry's
    place."""
    place, victim = tmp_path / "open", tmp_path / "victim"
    make(make(place, OTHER, folder=True, mode=0o777) / "entry", UID, folder=True)
    make(make(victim, OTHER, folder=True) / "file", OTHER)
    calls: list[str] = []

    def swap() -> None:
        calls.append("halt")
        if len(calls) == 2:  # it was looked at, and is about to be removed
            (place / "entry").rmdir()
            victim.rename(place / "entry")

    with pytest.raises(PermissionError):
        OwnedFiles("tmp", (place,), uids_of).remove(LEASE, swap)
    assert (place / "entry/file").read_text() == "secret"


@needs_root
def test_a_removal_that_was_given_up_ends(tmp_path: Path) -> None:
    """Also in the middle of a folder with a million files."""
    many = make(tmp_path / "many", UID, folder=True)
    for number in range(50):
        make(many / str(number), UID)
    calls = 0

    def give_up() -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise WashUnreachable("nobody waits")

    with pytest.raises(WashUnreachable):
        OwnedFiles("tmp", (tmp_path,), uids_of).remove(LEASE, give_up)
    assert len(os.listdir(many)) > 30


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="the kernel has no FUSE")
def test_a_mount_that_only_its_user_sees_is_passed_by(tmp_path: Path) -> None:
    """Programs mount their own image in /tmp; not even root may ask who owns that."""
    (tmp_path / "mount").mkdir()
    make(tmp_path / "of the uid", UID)
    in_own_mounts(f"""
options = "fd=%d,rootmode=40000,user_id=1000,group_id=1000" % os.open("/dev/fuse", os.O_RDWR)
if libc.mount(b"x", {os.fsencode(tmp_path / "mount")!r}, b"fuse", 0, options.encode()) != 0:
    sys.exit(77)
assert cleaned(OwnedFiles("tmp", (Path({str(tmp_path)!r}),), uids_of)) == 1
""")


def in_own_mounts(code: str) -> None:
    """Run this with a mount namespace of its own; 77 is a skip."""
    begin = """
import ctypes, os, sys
from pathlib import Path
from tests.drivers.test_residue_files import LEASE, OwnedFiles, cleaned, halt, uids_of
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x20000) != 0 or libc.mount(b"none", b"/", None, 0x44000, None) != 0:
    sys.exit(77)
"""
    ran = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=False)
    if ran.returncode == 77:
        pytest.skip("nothing can be mounted here")
    assert ran.returncode == 0, ran.stderr


@needs_root
@pytest.mark.parametrize("at", ["tree", "tree/inner"])
def test_nothing_behind_a_mount_is_removed(tmp_path: Path, at: str) -> None:
    """What somebody has mounted there, of the same file system too, is not the uid's to lose; the slot is not
    clean either."""
    shm, data = tmp_path / "shm", tmp_path / "data"
    shm.mkdir()
    make(make(shm / "tree", UID, folder=True) / "inner", UID, folder=True)
    make(make(data, UID, folder=True) / "file", UID)
    in_own_mounts(f"""
if libc.mount({os.fsencode(data)!r}, {os.fsencode(shm / at)!r}, None, 0x1000, None) != 0:
    sys.exit(77)
try:
    OwnedFiles("shm", (Path({str(shm)!r}),), uids_of).remove(LEASE, halt)
except OSError as error:
    assert "a mount point is in the way" in str(error), error
else:
    raise AssertionError
""")
    assert (data / "file").read_text() == "secret"


def test_shared_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once."""
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert shared_folders() == tuple(map(Path, ("/tmp", "/var/tmp", "/run/lock", "/var/crash")))


# -- core files -------------------------------------------------------------------------------------------


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    path = tmp_path / "core_pattern"
    path.write_text("core\n")
    return path


@needs_root
def test_core_files_go_by_owner_and_by_name(tmp_path: Path, pattern: Path) -> None:
    """systemd's belong to root and have the uid in their name; others' and folders stay."""
    kept = tmp_path / "cores"
    kept.mkdir()
    boot = "0123456789abcdef0123456789abcdef"
    make(kept / "core.17", UID)
    make(kept / f"core.python3\\x2e11.{UID}.{boot}.12.1700000000000000.zst", 0)
    make(kept / f"core.python3.{OTHER}.{boot}.{UID}.1700000000000000", 0)
    make(kept / f"core.{UID}", OTHER)
    make(kept / "folder", UID, folder=True)
    pattern.write_text(f"{kept}/core.%p\n")
    assert cleaned(CoreFiles(uids_of, pattern, (tmp_path / "not-there",))) == 2
    assert len(os.listdir(kept)) == 3


@needs_root
def test_a_folder_of_cores_that_is_swapped_leads_nowhere(tmp_path: Path, pattern: Path) -> None:
    """Where cores go may be a folder that others can replace: no link to another one is followed."""
    kept, outside = tmp_path / "cores", tmp_path / "outside"
    for folder in (kept, outside):
        folder.mkdir()
        make(folder / "passwd", UID)

    def swap() -> None:
        if not kept.is_symlink():
            kept.rename(tmp_path / "aside")
            kept.symlink_to(outside)

    pattern.write_text(f"{kept}/core.%p\n")
    CoreFiles(uids_of, pattern, ()).remove(LEASE, swap)
    assert (outside / "passwd").exists()


@pytest.mark.parametrize("value", ["|/usr/bin/taker %p", "|", "/cores/%u/core", "| /usr/share/apport/other"])
def test_where_cores_go_must_be_known(pattern: Path, value: str) -> None:
    """A program that is not known, or a folder that varies, is said not to be seen."""
    pattern.write_text(value)
    with pytest.raises(NotSeen):
        CoreFiles(uids_of, pattern, ()).look(LEASE, halt)


@pytest.mark.parametrize(
    "value", ["core", "", "|/usr/lib/systemd/systemd-coredump %P %u", "|/usr/share/apport/apport -p%p"]
)
def test_known_takers_are_looked_at(pattern: Path, tmp_path: Path, value: str) -> None:
    """Their folders need not exist."""
    pattern.write_text(value)
    assert CoreFiles(uids_of, pattern, (tmp_path / "none",)).look(LEASE, halt) == 0
