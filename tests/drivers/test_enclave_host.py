"""The small things that both hosts of the enclave share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_server.drivers.enclave_host import last_words, make_folder, make_of, remove_folder


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"first\nlast\n", "last"),
        (b'{"event": "failed", "code": "E27", "message": "too little memory"}\n', "too little memory"),
        (b'{"event": "running"}', ""),
        (b"[1, 2]", ""),
        (b"\xff\xfe broken", "\ufffd\ufffd broken"),
        (b"x" * 5000, "x" * 400),
        (b"[" * 4096, "[" * 400),
        (b"\x1b[31mred\x07 \xe2\x80\xaefile", "[31mred file"),
        (b'{"message": "\\u001b[2Jgone"}', "[2Jgone"),
    ],
)
def test_last_words(output: bytes, words: str) -> None:
    """The last line, of a line of JSON its message; never long, never an error, and never more than text: who
    wrote it may be hostile, and it is logged."""
    assert last_words(output) == words


def test_make() -> None:
    """The same for the same, and another for anything that differs."""
    assert make_of([1, {"a": 1, "b": 2}]) == make_of([1, {"b": 2, "a": 1}])
    assert make_of([1]) != make_of([2])


def test_folder(tmp_path: Path) -> None:
    """Only its owner may look inside, also where it was there before with other rights; it goes with all."""
    folder = tmp_path / "a/b"
    make_folder(folder, os.geteuid())
    folder.chmod(0o777)
    make_folder(folder, os.geteuid())
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "link").symlink_to("/etc")
    remove_folder(folder)
    remove_folder(folder)
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_for_somebody_else(tmp_path: Path) -> None:
    """As root it is the enclave's user that owns it."""
    make_folder(tmp_path / "f", 65532)
    assert (tmp_path / "f").stat().st_uid == 65532
