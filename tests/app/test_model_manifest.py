"""Manifests: exactly what one is, and nothing that is not."""

from __future__ import annotations

import contextlib
import json
import os.path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.model_manifest import (
    MAX_FILES,
    Manifest,
    ManifestError,
    ModelFile,
    check_path,
    check_paths,
    dumps,
    make,
    parse,
)

SHA = "ab" * 32
FILE = {"path": "model.safetensors", "size": 7, "sha256": SHA}


def text(**changes: Any) -> bytes:
    return json.dumps({"version": "1", "files": [FILE], **changes}).encode()


def entry(**changes: Any) -> bytes:
    return text(files=[{**FILE, **changes}])


def test_a_manifest_is_read_as_it_was_written() -> None:
    """Version and files come back, in order of their paths, and the digest is of what is said, not how."""
    files = (
        ModelFile(path="z.bin", size=0, sha256=SHA),
        ModelFile(path="a/b c-é.json", size=1 << 40, sha256="0" * 64),
    )
    manifest = parse(dumps(Manifest(version="v1 \u00df", files=files)))
    assert manifest == Manifest(version="v1 \u00df", files=files[::-1])
    assert manifest.total == 1 << 40
    loose = json.dumps(json.loads(dumps(manifest)), indent=7, ensure_ascii=True).encode()
    assert parse(loose).digest == manifest.digest
    assert parse(text()).digest != parse(text(version="2")).digest


def test_a_version_can_be_made_of_the_content() -> None:
    """Without a name a version is called by its files: the same files the same, others another."""
    one = make([ModelFile(path="a", size=1, sha256=SHA)])
    assert one == make([ModelFile(path="a", size=1, sha256=SHA)])
    assert one.version != make([ModelFile(path="b", size=1, sha256=SHA)]).version
    assert one.version.startswith("sha256-")
    with pytest.raises(ManifestError):
        make([])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"version": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b'{"version": NaN}', "NaN"),
        (b"[]", "must be a JSON object"),
        (b"{}", "has no files"),
        (b'{"version": "1", "version": "2", "files": []}', "same key twice"),
        (b" " * ((16 << 20) + 1), "larger than"),
        (text(more=1), "'more', which is not known"),
        (text(version=1), "version must be"),
        (text(version=""), "version must be"),
        (text(version="a\nb"), "version must be"),
        (text(version="v" * 129), "version must be"),
        (text(files=[]), "a file in it"),
        (text(files={}), "a file in it"),
        (text(files=[FILE] * (MAX_FILES + 1)), "more than"),
        (text(files=["a"]), "file 0 must be a JSON object"),
        (text(files=[{"path": "a"}]), "file 0 has no sha256"),
        (text(files=[FILE, FILE]), "are the same file"),
        (entry(path=7), "path must be a text"),
        (entry(size=-1), "size must be"),
        (entry(size=True), "size must be"),
        (entry(size=1.0), "size must be"),
        (entry(size="7"), "size must be"),
        (entry(size=1 << 51), "size must be"),
        (entry(sha256=SHA.upper()), "sha256 must be"),
        (entry(sha256=SHA + "\n"), "sha256 must be"),
        (entry(sha256=None), "sha256 must be"),
        (entry(path="manifest.json"), "where the manifest lies"),
        (entry(path="Manifest.JSON"), "where the manifest lies"),
    ],
)
def test_what_is_no_manifest(raw: bytes, message: str) -> None:
    """Everything else is refused, and told what is wrong with it."""
    with pytest.raises(ManifestError, match=message):
        parse(raw)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
        "a\ud800",
        "e\u0301",
        "a" * 256,
        "/".join("a" * 17),
        "/".join(["a" * 250] * 5),
    ],
)
def test_paths_that_are_refused(path: str) -> None:
    """A path that leaves the folder, or that two readers would read differently, is no path of a model."""
    with pytest.raises(ManifestError):
        check_path(path)


@pytest.mark.parametrize(
    "paths",
    [["a", "a"], ["a", "A"], ["stra\u00dfe", "STRASSE"], ["a", "a/b"], ["A/b", "a"], ["x/Y", "X/y/z"]],
)
def test_paths_that_are_refused_together(paths: list[str]) -> None:
    """One name for two files, for whoever does not tell cases apart too, or for a file and a folder."""
    for path in paths:
        check_path(path)
    with pytest.raises(ManifestError):
        check_paths(paths)


@given(st.binary(max_size=400))
def test_any_bytes(raw: bytes) -> None:
    """Whatever is read, it is a manifest or a ManifestError."""
    with contextlib.suppress(ManifestError):
        parse(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(SHA),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["version", "files", "path", "size", "sha256", "x"]), inner)
    ),
    max_leaves=12,
)


@given(JSON | st.fixed_dictionaries({"version": JSON, "files": st.lists(JSON, max_size=3)}))
def test_any_json(value: Any) -> None:
    """Whatever JSON says, what is taken for a manifest survives being written and read."""
    try:
        manifest = parse(json.dumps(value).encode())
    except ManifestError:
        return
    assert parse(dumps(manifest)) == manifest


@given(st.text(max_size=60))
def test_any_path(path: str) -> None:
    """A path that is taken stays below the folder, and is itself when it is normalised."""
    try:
        check_path(path)
    except ManifestError:
        return
    assert os.path.normpath(path) == path
    assert not os.path.isabs(path)
    assert ".." not in path.split("/")
