"""The enclave's image: what is in it, what is not, that it is the same each time, and that it works."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient
from enclave.measure import measurements

from tests.test_scripts import build_images

ROOT = Path(__file__).parents[2]
TAG = "gpu-server/enclave:dev"

pytestmark = pytest.mark.docker
Listing = dict[str, tuple[str, int, int, int, int, str]]

ABSENT = (
    "asyncio",
    "concurrent",
    "ctypes",
    "ensurepip",
    "ftplib",
    "http",
    "multiprocessing",
    "pdb",
    "pip",
    "pickle",
    "pty",
    "requests",
    "shutil",
    "smtplib",
    "socketserver",
    "sqlite3",
    "ssl",
    "subprocess",
    "telnetlib",
    "tempfile",
    "urllib.request",
    "venv",
    "webbrowser",
    "xmlrpc",
    "zipfile",
)


@pytest.fixture(scope="module")
def image(docker_engine: APIClient) -> str:
    """The image as it is built from this checkout."""
    done = subprocess.run(
        [sys.executable, "scripts/build_images.py", "enclave"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return TAG


@pytest.fixture(scope="module")
def files(docker_engine: APIClient, image: str) -> Listing:
    return listing(docker_engine, image)


def listing(engine: APIClient, image: str) -> Listing:
    """Everything in an image's layers: type, mode, owner, time and content by name."""
    archive = io.BytesIO(b"".join(engine.get_image(image)))
    found: Listing = {}
    with tarfile.open(fileobj=archive) as saved:
        manifest = json.load(saved.extractfile("manifest.json"))  # type: ignore[arg-type]
        for layer in manifest[0]["Layers"]:
            with tarfile.open(fileobj=saved.extractfile(layer)) as tar:
                for entry in tar:
                    data = tar.extractfile(entry) if entry.isfile() else None
                    digest = hashlib.sha256(data.read()).hexdigest() if data is not None else ""
                    found[entry.name.rstrip("/")] = (
                        entry.type.decode(),
                        entry.mode,
                        entry.uid,
                        entry.gid,
                        int(entry.mtime),
                        digest,
                    )
    return found


@pytest.fixture
def container(docker_engine: APIClient, image: str) -> Iterator[Any]:
    """Runs the image's Python with a piece of code, hardened as the service runs it; (status, output)."""
    made: list[str] = []

    def run(code: str, *, command: list[str] | None = None) -> tuple[int, str]:
        created = docker_engine.create_container(
            image,
            command or ["/usr/bin/python3", "-BSs", "-c", code],
            user="65532:65532",
            host_config=docker_engine.create_host_config(
                network_mode="none", read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges"]
            ),
        )
        made.append(created["Id"])
        docker_engine.start(created["Id"])
        status = docker_engine.wait(created["Id"])["StatusCode"]
        return status, docker_engine.logs(created["Id"]).decode()

    yield run
    for name in made:
        docker_engine.remove_container(name, force=True)


def test_no_shell_and_no_installer(files: Listing) -> None:
    """The one program that can be run is Python; nothing is setuid, and nothing installs anything."""
    programs = [
        name
        for name, (kind, mode, *_) in files.items()
        if kind == "0" and mode & 0o111 and ".so" not in name.rpartition("/")[2]
    ]
    assert programs == ["usr/bin/python3"]
    assert not [name for name, (_, mode, *_) in files.items() if mode & 0o6000]
    words = ("busybox", "bin/sh", "bash", "dpkg", "apt", "pip/", "setuptools", "ensurepip")
    assert not [name for name in files if any(word in name for word in words)]
    assert not [name for name in files if name.endswith((".pyc", ".egg-info", ".whl"))]


def test_only_what_the_program_imports(container: Any) -> None:
    """HTTP, TLS, processes, event loops and the like cannot be imported: they are not there."""
    code = (
        "import importlib, json\n"
        "found = []\n"
        f"for name in {ABSENT!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError: continue\n"
        "    found.append(name)\n"
        "print(json.dumps(found))\n"
    )
    status, output = container(code)
    assert (status, json.loads(output)) == (0, [])


def test_the_image_is_small(docker_engine: APIClient, image: str, files: Listing) -> None:
    """A tenth of a Python image; nobody reviews what is not needed."""
    assert docker_engine.inspect_image(image)["Size"] < 60_000_000
    assert len(files) < 600


def test_its_command_is_what_nitro_cli_takes(docker_engine: APIClient, image: str) -> None:
    """A command and an environment, no entrypoint; not root where that is for Docker to say."""
    config = docker_engine.inspect_image(image)["Config"]
    assert config["Cmd"] == ["/usr/bin/python3", "-BSs", "/app/enclave/__main__.py"]
    assert config["Entrypoint"] is None
    assert "PYTHONPATH=/app" in config["Env"]
    assert config["User"] == "65532:65532"


def test_without_a_security_module(container: Any, docker_engine: APIClient, image: str) -> None:
    """Its own command, where there is no /dev/nsm, ends at once and says why: it never simulates unasked."""
    command = docker_engine.inspect_image(image)["Config"]["Cmd"]
    status, output = container("", command=command)
    assert status == 1
    assert "/dev/nsm" in output


def test_measurements_are_those_of_the_checkout(container: Any, docker_engine: APIClient, image: str) -> None:
    """What a client pins of a simulated enclave is the same in a container and in a process."""
    command = docker_engine.inspect_image(image)["Config"]["Cmd"]
    status, output = container("", command=[*command, "--measurements"])
    assert status == 0
    assert json.loads(output) == {f"PCR{index}": value.hex() for index, value in measurements().items()}


def test_every_time_is_the_same(files: Listing) -> None:
    """No file carries the time of its build, or the user who built it."""
    assert {(uid, gid, mtime) for _, _, uid, gid, mtime, _ in files.values()} == {(0, 0, 0)}
    assert not [name for name, (_, mode, *_) in files.items() if mode & 0o022]


@pytest.mark.slow
def test_two_builds_are_equal(docker_engine: APIClient, image: str, files: Listing) -> None:
    """Built twice from nothing, byte for byte the same files with the same names, modes and times."""
    script = build_images()
    (wanted,) = script.chosen("enclave")
    tag = "gpu-server/enclave-again:test"
    with tempfile.TemporaryDirectory() as folder:
        script.stage(wanted, Path(folder))
        built, stage = "", ""
        for line in docker_engine.build(
            path=folder, tag=tag, nocache=True, network_mode="none", rm=True, forcerm=True, decode=True
        ):
            assert "error" not in line, line
            words = line.get("stream", "").split()
            if words[:1] == ["--->"]:
                built = words[-1]
            elif words[-2:] == ["FROM", "scratch"]:
                stage = built
    try:
        again = listing(docker_engine, tag)
    finally:
        docker_engine.remove_image(tag, force=True)
        docker_engine.remove_image(stage)
    assert again.keys() == files.keys()
    assert again == files
