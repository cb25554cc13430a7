"""What is remembered of verifications."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_server.drivers.model_folder import scan
from gpu_server.drivers.model_memory import VerifiedModels
from tests.drivers.models_world import FILES, lay, manifest_of, until_times_move, with_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay(tmp_path / "m", with_manifest(FILES))


def test_remembered_in_another_life(folder: Path, tmp_path: Path) -> None:
    """What one has verified the next knows; without a folder it is known as long as it lives."""
    manifest, found = manifest_of(FILES), scan(folder)
    one, homeless = VerifiedModels(tmp_path / "state"), VerifiedModels()
    assert not one.knows(folder, manifest, found)
    for verified in (one, homeless):
        verified.remember(folder, manifest, found)
        assert verified.knows(folder, manifest, found)
    assert VerifiedModels(tmp_path / "state").knows(folder, manifest, found)
    assert not VerifiedModels().knows(folder, manifest, found)


@pytest.mark.parametrize("change", ["content", "touch", "replace", "manifest", "place"])
def test_anything_that_changes_is_verified_again(folder: Path, tmp_path: Path, change: str) -> None:
    """Also what has the same size and the same time of writing: the time of change cannot be set."""
    manifest, verified = manifest_of(FILES), VerifiedModels(tmp_path / "state")
    verified.remember(folder, manifest, scan(folder))
    file = folder / "config.json"
    times = file.stat().st_mtime_ns
    until_times_move(file, tmp_path / "probe")
    match change:
        case "content":
            file.write_bytes(b"x" * file.stat().st_size)
            os.utime(file, ns=(times, times))
        case "touch":
            os.utime(file)
        case "replace":
            (folder / "new").write_bytes(file.read_bytes())
            os.utime(folder / "new", ns=(times, times))
            (folder / "new").rename(file)
        case "manifest":
            manifest = manifest_of(FILES, version="2")
        case "place":
            folder = folder.rename(tmp_path / "elsewhere")
    for again in (verified, VerifiedModels(tmp_path / "state")):
        assert not again.knows(folder, manifest, scan(folder))


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"null"])
def test_a_damaged_record(folder: Path, tmp_path: Path, damage: bytes) -> None:
    """A record that cannot be read means: verify again, and then it is whole."""
    manifest, found = manifest_of(FILES), scan(folder)
    VerifiedModels(tmp_path / "state").remember(folder, manifest, found)
    (record,) = (tmp_path / "state").iterdir()
    record.write_bytes(damage)
    again = VerifiedModels(tmp_path / "state")
    assert not again.knows(folder, manifest, found)
    again.remember(folder, manifest, found)
    assert VerifiedModels(tmp_path / "state").knows(folder, manifest, found)


def test_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    """It is known as long as this lives, and nobody is bothered."""
    (tmp_path / "file").touch()
    verified = VerifiedModels(tmp_path / "file/state")
    verified.remember(folder, manifest_of(FILES), scan(folder))
    assert verified.knows(folder, manifest_of(FILES), scan(folder))
