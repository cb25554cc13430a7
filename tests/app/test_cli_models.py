"""`gpu-server models`: on real folders, a real file server and a real S3 server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from click.testing import Result
from typer.testing import CliRunner

from gpu_server import cli
from gpu_server.model_manifest import dumps
from gpu_server.settings import Settings
from tests.app.processes import ROOT
from tests.drivers.models_world import (
    BUCKET,
    FILE_KEY,
    FILES,
    S3_ENVIRONMENT,
    PlayedFileService,
    as_json,
    file_service,
    laid,
    lay,
    manifest_of,
    s3_client,
    s3_server,
    tar_of,
    with_manifest,
)

PRESETS = """
models:
  org/m:
    chat: {docker_image: gpu-server/echo}
    complete: {docker_image: gpu-server/echo}
    none: {docker_image: gpu-server/echo, model: none}
"""


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A store of this test, and no setting of this machine."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets.yaml").write_text(PRESETS)
    monkeypatch.setenv("MODEL_PRESETS_FILE", str(tmp_path / "presets.yaml"))
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "models").mkdir()
    yield tmp_path / "models"
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        s3_client(url).create_bucket(Bucket=BUCKET)
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"AWS_ENDPOINT_URL": endpoint, "MODEL_SOURCE_S3_URI": "s3://models/store"}
    for name, value in {**S3_ENVIRONMENT, **settings}.items():
        monkeypatch.setenv(name, value)


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["models", *words])


def listed() -> dict[str, dict[str, object]]:
    result = run("list", "--json")
    assert result.exit_code == 0
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    return {entry["model_id"]: entry for entry in entries}


def test_list(root: Path) -> None:
    """Every model with its size, its version, what is known of it, and the presets that use it."""
    lay(root / "org/m", with_manifest(FILES))
    lay(root / "plain", {"w": b"12"})
    lay(root / "odd", {**with_manifest(FILES), "extra.py": b""})
    lay(root / "worse", {"manifest.json": b"[]"})
    assert listed()["org/m"] == {
        "model_id": "org/m",
        "bytes": sum(len(content) for content in FILES.values()),
        "files": len(FILES),
        "version": "1",
        "state": "unverified",
        "presets": ["chat", "complete"],
    }
    states = {model_id: entry["state"] for model_id, entry in listed().items()}
    assert states == {
        "org/m": "unverified",
        "plain": "no manifest",
        "odd": "extra.py: is not in the manifest",
        "worse": "manifest.json: is no manifest: the manifest must be a JSON object",
    }
    assert run("verify", "org/m").exit_code == 0
    assert listed()["org/m"]["state"] == "verified"
    table = run("list").stdout
    assert "org/m" in table
    assert "chat complete" in table


def test_list_of_odd_names(root: Path) -> None:
    """What looks like markup, or is not UTF-8, is shown as it is and breaks nothing."""
    lay(root / "marked", {"manifest.json": dumps(manifest_of(FILES, "[/v]")), **FILES})
    lay(root / "worse", {"manifest.json": dumps(manifest_of(FILES)), **FILES, "[red]a[/b]": b""})
    lay(root / "bytes", with_manifest(FILES))
    Path(os.fsdecode(os.fsencode(root / "bytes") + b"/caf\xe9.txt")).touch()
    result = run("list")
    assert result.exit_code == 0
    for text in ("[/v]", "[red]a[/b]", r"caf\udce9.txt"):
        assert text in result.stdout
    assert listed()["bytes"]["state"] == r"caf\udce9.txt: is not in the manifest"
    assert run("verify").exit_code == 1


def test_verify(root: Path) -> None:
    """Exit status 1 and a line for each bad file; all models that have a manifest by default."""
    lay(root / "good", with_manifest(FILES))
    lay(root / "plain", {"w": b"12"})
    result = run("verify")
    assert (result.exit_code, result.stdout) == (0, "good: as its manifest says\n")
    lay(root / "good", {"config.json": b"x" * len(FILES["config.json"]), "extra.py": b""})
    result = run("verify")
    assert result.exit_code == 1
    assert [line[:30] for line in result.stderr.splitlines()] == [
        "good: config.json: has SHA-256",
        "good: extra.py: is not in the ",
    ]
    assert run("verify", "plain").exit_code == 1
    assert "has no manifest.json" in run("verify", "plain").stderr
    for missing in ("none", "no:id"):
        result = run("verify", missing)
        assert result.exit_code == 1
        assert result.stderr == f"model {missing} is not in the model store\n"


def test_manifest(root: Path) -> None:
    """It is made of the files as they are, called as one likes, and replaced by order only."""
    lay(root / "m", {**FILES, ".cache/x": b"1"})
    assert run("manifest", "m").exit_code == 0
    made = as_json(root / "m/manifest.json")
    assert made["version"].startswith("sha256-")
    assert {file["path"] for file in made["files"]} == set(FILES)
    assert listed()["m"]["state"] == "verified"
    lay(root / "m", {"config.json": b"{}"})
    refused = run("manifest", "m", "--version", "v2")
    assert refused.exit_code == 1
    assert "--force replaces it" in refused.stderr
    assert as_json(root / "m/manifest.json") == made
    assert run("manifest", "m", "--version", "v2", "--force").exit_code == 0
    assert as_json(root / "m/manifest.json")["version"] == "v2"


def test_a_version_named_by_its_content(root: Path) -> None:
    """Other content has another name; a name that somebody gave stays."""
    lay(root / "m", FILES)
    versions = []
    for content in (b"{}", b"[]"):
        lay(root / "m", {"config.json": content})
        assert run("manifest", "m", "--force").exit_code == 0
        versions.append(as_json(root / "m/manifest.json")["version"])
    assert versions[0] != versions[1]
    assert run("manifest", "m", "--force", "--version", "mine").exit_code == 0
    lay(root / "m", {"config.json": b"1"})
    assert run("manifest", "m", "--force").exit_code == 0
    assert as_json(root / "m/manifest.json")["version"] == "mine"


def test_fetching_without_a_source(root: Path) -> None:
    """That is no matter for a model that is there, nor for an id that is none."""
    lay(root / "m", FILES)
    assert run("fetch", "m").exit_code == 0
    wrong = run("fetch", "../m")
    assert (wrong.exit_code, "is no model id" in wrong.stderr) == (1, True)
    missing = run("fetch", "other")
    assert (missing.exit_code, "There is no source" in missing.stderr) == (2, True)
    (root / "m/manifest.json").write_text("[]")
    assert run("manifest", "m").exit_code == 1
    assert run("manifest", "m", "--force").exit_code == 0
    assert run("manifest", "none").exit_code == 1
    lay(root / "cases", {"a": b"", "A": b""})
    assert "differ only in case" in run("manifest", "cases").stderr


@pytest.mark.usefixtures("s3")
def test_up_and_down(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model goes to S3 with its manifest, and comes back verified on another machine."""
    lay(root / "org/m", FILES)
    refused = run("upload", "org/m")
    assert refused.exit_code == 1
    assert "`gpu-server models manifest` writes one" in refused.stderr
    run("manifest", "org/m", "--version", "v1")
    sent = run("upload", "org/m")
    assert (sent.exit_code, sent.stdout) == (0, "org/m: 5 files sent, 0 were there\n")
    assert run("upload", "org/m").stdout == "org/m: 0 files sent, 5 were there\n"
    lay(root / "org/m", {"extra.json": b"{}"})
    run("manifest", "org/m", "--version", "v2", "--force")
    refused = run("upload", "org/m")
    assert refused.exit_code == 1
    assert "another version is there (v1)" in refused.stderr
    assert run("upload", "org/m", "--force").stdout == "org/m: 1 files sent, 5 were there\n"
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "other-state"))
    fetched = run("fetch", "org/m")
    assert (fetched.exit_code, fetched.stdout) == (0, f"org/m: {tmp_path}/other/org/m\n")
    assert laid(tmp_path / "other/org/m") == laid(root / "org/m")
    assert listed()["org/m"]["state"] == "verified"
    missing = run("fetch", "org/none")
    assert missing.exit_code == 1
    assert "no source has it" in missing.stderr


@pytest.mark.usefixtures("s3")
def test_what_is_damaged_is_not_uploaded(root: Path) -> None:
    """Nobody else should have it."""
    lay(root / "bad", {**with_manifest(FILES), "config.json": b"x" * len(FILES["config.json"])})
    result = run("upload", "bad", "--to", "s3://models/elsewhere")
    assert result.exit_code == 1
    assert "config.json: has SHA-256" in result.stderr
    assert run("upload", "bad", "--to", "ftp://models").exit_code == 2


def test_without_a_source(root: Path) -> None:
    """What is missing in the settings is told by name, with exit status 2."""
    for words in (("fetch", "m"), ("upload", "m")):
        result = run(*words)
        assert result.exit_code == 2
        assert "MODEL_SOURCE_S3_URI" in result.stderr


def test_from_the_file_service(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fetched once; a second fetch finds it there. The key is nowhere to be read."""
    ready, stop = threading.Event(), threading.Event()
    served: list[PlayedFileService] = []

    async def serve() -> None:
        async with file_service(models={"m": tar_of(FILES)}) as service:
            served.append(service)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        monkeypatch.setenv("FILE_SERVICE_URL", served[0].url)
        monkeypatch.setenv("FILE_SERVICE_INTERNAL_KEY", FILE_KEY)
        assert [run("fetch", "m").exit_code for _ in range(2)] == [0, 0]
        monkeypatch.setenv("FILE_SERVICE_INTERNAL_KEY", "a-wrong-key")
        refused = run("fetch", "other")
        assert refused.exit_code == 1
        assert "see FILE_SERVICE_INTERNAL_KEY" in refused.stderr
        assert "a-wrong-key" not in refused.output
    finally:
        stop.set()
        thread.join(20)
    assert served[0].asked == ["m"]
    assert set(laid(root / "m")) == {*FILES, "manifest.json"}


def test_as_a_program(root: Path) -> None:
    """Answers go to standard output, everything else to standard error."""
    lay(root / "m", {**with_manifest(FILES), "config.json": b""})
    done = subprocess.run(
        [sys.executable, "-m", "gpu_server.cli", "models", "verify"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "m: config.json: has 0 bytes, not 20\n"
