"""A model's folder: what is in it, and whether that is what its manifest says."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gpu_server.drivers.model_folder import (
    FolderFault,
    compare,
    hash_files,
    look_again,
    read_manifest,
    scan,
    verify,
    write_manifest,
)
from gpu_server.model_manifest import dumps
from tests.drivers.models_world import FILES, lay, manifest_of, sha256, with_manifest


def ignore(done: int, total: int | None) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay(tmp_path / "m", with_manifest(FILES))


def test_all_files_but_the_manifest(folder: Path) -> None:
    """They are found in all folders, with their sizes; the manifest is read apart."""
    lay(folder, {".cache/x": b"1"})
    found = {file.path: (file.size, file.hidden) for file in scan(folder)}
    assert found == {".cache/x": (1, True), **{p: (len(c), False) for p, c in FILES.items()}}
    assert read_manifest(folder) == manifest_of(FILES)


def test_links_within_the_folder(folder: Path) -> None:
    """A link counts as the file that it leads to; one to a folder leads nowhere new."""
    (folder / "alias.safetensors").symlink_to("tokenizer/../model-00001-of-00002.safetensors")
    (folder / "tokenizer/up").symlink_to("..")
    found = {file.path: file.size for file in scan(folder)}
    assert found["alias.safetensors"] == len(FILES["model-00001-of-00002.safetensors"])
    assert "tokenizer/up/config.json" not in found


@pytest.mark.parametrize("kind", ["absolute", "up", "through", "chain", "dangling", "loop", "folder"])
def test_links_that_a_container_cannot_follow(folder: Path, kind: str) -> None:
    """The container sees this folder alone, at another place: what leads out of it is refused by name."""
    lay(folder.parent / "other", {"weights": b"w"})
    (folder.parent / "m2").symlink_to("m")
    link = folder / "a-link"
    target = {
        "absolute": str(folder / "config.json"),
        "up": "../other/weights",
        "through": "../m/config.json",
        "chain": "next",
        "dangling": "nothing",
        "loop": "a-link",
        "folder": "../other",
    }[kind]
    link.symlink_to(target)
    if kind == "chain":
        (folder / "next").symlink_to("../other/weights")
    with pytest.raises(FolderFault, match="link") as caught:
        scan(folder)
    assert caught.value.path in ("a-link", "next")


def test_a_link_through_another(folder: Path) -> None:
    """What follows a link is meant from where that one leads, as the kernel reads it: a file of this machine
    is no part of a model, and one of the model is, by whatever way."""
    lay(folder.parent, {"secret": b"of this machine"})
    lay(folder, {"a/b/secret": b"decoy", "a/b/x": b"", "w": b"12"})
    (folder / "a/b/up").symlink_to("../..")
    (folder / "a/b/inside.bin").symlink_to("up/w")
    assert {file.path: file.size for file in scan(folder)}["a/b/inside.bin"] == 2
    (folder / "a/b/w.bin").symlink_to("up/../secret")
    with pytest.raises(FolderFault, match=r"w\.bin: is a link out of the model's folder"):
        scan(folder)
    (folder / "a/b/w.bin").unlink()
    (folder / "a/b/w.bin").symlink_to("none/../x")
    with pytest.raises(FolderFault, match=r"w\.bin: is a link that leads nowhere"):
        scan(folder)


def test_names_of_any_bytes(folder: Path) -> None:
    """A name that is not UTF-8, or moves the cursor of a terminal, is told so that all can print it."""
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).touch()
    (folder / "a\x1b[2J").touch()
    assert [str(fault) for fault in compare(manifest_of(FILES), scan(folder))] == [
        r"a\x1b[2J: is not in the manifest",
        r"caf\udce9.txt: is not in the manifest",
    ]


def test_what_is_no_file(folder: Path) -> None:
    """A socket or a pipe is told by name, and nobody waits for what might come out of it."""
    os.mkfifo(folder / "pipe")
    with pytest.raises(FolderFault, match=r"pipe: is no regular file"):
        scan(folder)
    (folder / "pipe").unlink()
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(FolderFault, match=r"manifest.json: "):
        read_manifest(folder)
    (folder / "manifest.json").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "manifest.json"))
        with pytest.raises(FolderFault, match=r"manifest.json: "):
            read_manifest(folder)


def test_a_manifest_that_is_none(folder: Path) -> None:
    """None at all is None; what is there and no manifest is a fault; one behind a link is not read."""
    (folder / "manifest.json").write_bytes(b"{}")
    with pytest.raises(FolderFault, match="is no manifest: the manifest has no files"):
        read_manifest(folder)
    (folder / "manifest.json").unlink()
    assert read_manifest(folder) is None
    (folder / "manifest.json").symlink_to("config.json")
    with pytest.raises(FolderFault, match="cannot be read"):
        read_manifest(folder)


def test_too_deep(tmp_path: Path) -> None:
    """A folder that no model has is left in time."""
    (tmp_path / "/".join("d" * 40)).mkdir(parents=True)
    with pytest.raises(FolderFault, match="one too many"):
        scan(tmp_path)


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    """What cannot be read is told as a fault."""
    with pytest.raises(FolderFault, match="cannot be read: No such file"):
        scan(tmp_path / "gone")


def test_what_can_be_told_without_reading(folder: Path) -> None:
    """Files that lack, have another size, or are too many are named; hidden ones are left alone."""
    (folder / "config.json").unlink()
    lay(folder, {"empty.txt": b"not", "extra.py": b"import os", ".cache/x": b"1"})
    assert [str(fault) for fault in compare(manifest_of(FILES), scan(folder))] == [
        "config.json: is missing",
        "empty.txt: has 3 bytes, not 0",
        "extra.py: is not in the manifest",
    ]


async def test_reading_all_of_it(folder: Path) -> None:
    """Every file is read and compared, each bad one is named, and bytes are counted up to the last."""
    told: list[tuple[int, int | None]] = []
    assert await verify(folder, manifest_of(FILES), scan(folder), lambda d, t: told.append((d, t))) == []
    total = sum(len(content) for content in FILES.values())
    assert told[0] == (0, total)
    changed = bytearray(FILES["model-00002-of-00002.safetensors"])
    changed[100_000] ^= 1
    lay(folder, {"model-00002-of-00002.safetensors": bytes(changed), "extra.py": b""})
    assert [str(f) for f in await verify(folder, manifest_of(FILES), scan(folder), ignore)] == [
        "extra.py: is not in the manifest",
        f"model-00002-of-00002.safetensors: has SHA-256 {sha256(bytes(changed))},"
        f" not {sha256(FILES['model-00002-of-00002.safetensors'])}",
    ]


async def test_a_file_that_changes_meanwhile(folder: Path) -> None:
    """What was found is not what was read: no hash of that is any good."""
    found = scan(folder)
    lay(folder, {"config.json": b'{"hidden_size": 512}'})
    assert not look_again(folder, next(file for file in found if file.path == "config.json"))
    with pytest.raises(FolderFault, match=r"config.json: changed while it was read"):
        await hash_files(folder, found, ignore)
    (folder / "config.json").unlink()
    with pytest.raises(FolderFault, match=r"config.json: cannot be read"):
        await hash_files(folder, found, ignore)


def test_a_manifest_is_written_whole(folder: Path) -> None:
    """It replaces the old one at once, and leaves nothing beside it."""
    before = set(os.listdir(folder))
    write_manifest(folder, dumps(manifest_of({"a": b""}, version="2")))
    assert read_manifest(folder) == manifest_of({"a": b""}, version="2")
    assert set(os.listdir(folder)) == before
