"""What a simulated enclave is known by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from enclave import measure

ROOT = Path(__file__).parents[2]


def test_every_source_is_measured() -> None:
    """All of the program and of the sealed path, under their names in the image, in one order."""
    wanted = [f"enclave/{path.name}" for path in sorted((ROOT / "enclave_image/enclave").glob("*.py"))]
    wanted += [f"gpu_server/sealed/{path.name}" for path in sorted((ROOT / "gpu_server/sealed").glob("*.py"))]
    assert [name for name, _ in measure.files()] == wanted


def test_registers() -> None:
    """Each is SHA384(48 zero bytes || SHA384(content)), as AWS computes its own."""
    found = measure.measurements()
    assert sorted(found) == [0, 1, 2]
    assert (
        found[1]
        == hashlib.sha384(bytes(48) + hashlib.sha384(b"gpu-server simulated kernel").digest()).digest()
    )
    assert {len(value) for value in found.values()} == {48}


def test_a_change_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more byte, another name, a line moved from one file to the next: each is another program."""
    seen = set()
    for number, sources in enumerate(
        [
            {"a.py": b"1"},
            {"a.py": b"1 "},
            {"b.py": b"1"},
            {"a.py": b"", "b.py": b"1"},
            {"a.py": b"1", "b.py": b""},
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in sources.items():
            (folder / name).write_bytes(content)
        monkeypatch.setattr(measure, "_PACKAGES", (("program", folder),))
        seen.add(measure.measurements()[0])
    assert len(seen) == 5
