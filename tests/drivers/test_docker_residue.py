"""What containers leave with an engine, on a machine of folders; on a real one: test_residue_audit.py."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_server.drivers.docker_calls import EngineCalls
from gpu_server.drivers.docker_residue import ControlGroups, EngineFiles, Volumes, belongings_of
from gpu_server.ports import Belongings, Cleaner, EndedLease, NotSeen, RuntimeUnreachable
from tests.drivers.played_engine import PlayedEngine

ID = "ab" * 32
OTHER = "cd" * 32
MISSING = (
    b'HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{"message": "x"}'
)
IN_USE = MISSING.replace(b"404 Not Found", b"409 Conflict")
NO_LEASE = EndedLease(session_id=None, fence=6, slot_ids=("cpu-0",))


def lease(container_id: str = ID, *volumes: str) -> EndedLease:
    mine = Belongings(container_id=container_id, volumes=volumes)
    return EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",), belongings=mine)


def answer(body: Any) -> bytes:
    raw = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[PlayedEngine]:
    async with PlayedEngine(tmp_path / "docker.sock") as engine:
        engine.answers["/info"] = answer({"DockerRootDir": str(tmp_path / "root")})
        yield engine


@pytest.fixture
async def calls(engine: PlayedEngine) -> AsyncIterator[EngineCalls]:
    calls = EngineCalls(engine.host, 20)
    await calls.open()
    yield calls
    calls.close()


def test_belongings_are_what_can_be_written() -> None:
    """Volumes only, and of them those that are not read-only."""
    mounts = [
        {"Type": "bind", "Source": "/x", "RW": True},
        {"Type": "volume", "Name": "v1", "RW": True},
        {"Type": "volume", "Name": "v2", "RW": False},
        {"Type": "volume", "Name": "v3"},
    ]
    assert belongings_of({"Id": ID, "Mounts": mounts}) == Belongings(container_id=ID, volumes=("v1", "v3"))
    assert belongings_of({"Id": ID, "Mounts": None}) == Belongings(container_id=ID)


async def test_volumes_are_looked_for(engine: PlayedEngine, calls: EngineCalls) -> None:
    """Those that the container had, by name; one that others use stays, and is no clean slot."""
    engine.answers |= {"/volumes/v1": answer({"Name": "v1"}), "/volumes/v2": MISSING}
    volumes = Volumes(calls)
    assert await volumes.look(lease(ID, "v1", "v2")) == 1
    assert await volumes.look(lease(ID)) == 0
    await volumes.remove(lease(ID, "v2"))
    engine.answers["/volumes/v1"] = IN_USE
    with pytest.raises(RuntimeUnreachable):
        await volumes.remove(lease(ID, "v1"))


async def test_the_engines_files_are_removed_when_it_forgot_them(
    engine: PlayedEngine, calls: EngineCalls, tmp_path: Path
) -> None:
    """Never those of a container that it knows, and never another's; a link is not followed."""
    files, outside = EngineFiles(calls), tmp_path / "outside"
    outside.mkdir()
    for name in (ID, OTHER):
        folder = tmp_path / "root/containers" / name
        folder.mkdir(parents=True)
        (folder / f"{name}-json.log").write_text("secret")
        (folder / "link").symlink_to(outside)
    assert await files.look(lease()) == 1
    engine.answers[f"/containers/{ID}/json"] = answer({"Id": ID})
    with pytest.raises(RuntimeUnreachable, match="still there"):
        await files.remove(lease())
    engine.answers[f"/containers/{ID}/json"] = MISSING
    await files.remove(lease())
    assert await files.look(lease()) == 0
    assert os.listdir(tmp_path / "root/containers") == [OTHER]
    assert outside.is_dir()


async def test_a_root_that_is_not_here_is_not_seen(calls: EngineCalls) -> None:
    """The engine's folders are elsewhere for a service in a container, and for an engine on another
    machine."""
    with pytest.raises(NotSeen, match="data root"):
        await EngineFiles(calls).look(lease())


async def test_groups_are_removed_with_what_is_below(tmp_path: Path) -> None:
    """In every hierarchy; the control groups of others stay."""
    for place in (f"pids/docker/{ID}/deep", f"docker/{ID}", f"memory/docker/{OTHER}"):
        (tmp_path / place).mkdir(parents=True)
    groups = ControlGroups(tmp_path)
    assert await groups.look(lease()) == 2
    await groups.remove(lease())
    assert await groups.look(lease()) == 0
    assert (tmp_path / f"memory/docker/{OTHER}").is_dir()


@pytest.fixture
def another() -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


async def test_a_pid_that_has_become_anothers_is_left(
    another: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Between the list of a group and the signal a process may end and its number be given to another, which
    is in another group."""
    group = tmp_path / "docker" / ID
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text(f"{another.pid}\n")
    with pytest.raises(OSError, match="not empty"):
        await ControlGroups(tmp_path).remove(lease())
    assert another.poll() is None


@pytest.mark.parametrize("kind", ["volumes", "engine_files", "control_groups"])
async def test_a_container_that_was_never_seen(kind: str, calls: EngineCalls, tmp_path: Path) -> None:
    """Without a lease there is none; of a lease nobody knows which it was, and that is said. An id that no
    engine gives leads nowhere."""
    (tmp_path / "root/containers").mkdir(parents=True)
    everything: tuple[Cleaner, ...] = (Volumes(calls), EngineFiles(calls), ControlGroups(tmp_path))
    cleaner = next(cleaner for cleaner in everything if cleaner.name == kind)
    assert await cleaner.look(NO_LEASE) == 0
    await cleaner.remove(NO_LEASE)
    unknown = EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",))
    for look in (cleaner.look, cleaner.remove):
        with pytest.raises(NotSeen, match="no container was found"):
            await look(unknown)
    if kind != "volumes":
        with pytest.raises(NotSeen, match="no id"):
            await cleaner.look(lease("../../etc"))
