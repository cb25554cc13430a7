"""build.sh, from the enclave's image to the policy of a KMS key, over the stand-in for nitro-cli."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.enclave_image.nitro_host import ROOT, NitroHost, nitro_host

ROLE = "arn:aws:iam::123456789012:role"
POLICY = [
    *("--tenant", "acme", "--tenant-arn", f"{ROLE}/client"),
    *("--node-role-arn", f"{ROLE}/node", "--admin-arn", f"{ROLE}/admin"),
]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NitroHost]:
    with nitro_host(tmp_path / "host") as made:
        yield made


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script looks at, in a place where it may write."""
    target = tmp_path / "checkout/enclave_image"
    target.mkdir(parents=True)
    for name in ("build.sh", "key_policy.py", "kms-key-policy.json.in"):
        shutil.copy(ROOT / "enclave_image" / name, target / name)
    return target


def build(checkout: Path, host: NitroHost | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = host.environment if host is not None else {"PATH": os.environ["PATH"]}
    return subprocess.run(
        [checkout / "build.sh", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_image_file_and_measurements(checkout: Path, host: NitroHost) -> None:
    """It leaves the image file, and what nitro-cli measured, as JSON and nothing else."""
    done = build(checkout, host)
    assert done.returncode == 0, done.stderr
    assert (checkout / "enclave.eif").exists()
    measured = json.loads((checkout / "measurements.json").read_text())["Measurements"]
    assert {"PCR0", "PCR1", "PCR2"} <= measured.keys()
    assert measured["PCR0"] in done.stdout
    assert not (checkout / "kms-key-policy.json").exists()


def test_policy(checkout: Path, host: NitroHost) -> None:
    """With the names of those concerned it also fills the policy."""
    done = build(checkout, host, "--", *POLICY)
    assert done.returncode == 0, done.stderr
    policy = json.loads((checkout / "kms-key-policy.json").read_text())
    assert "01" * 48 in json.dumps(policy)


def test_signed(checkout: Path, host: NitroHost) -> None:
    """A signing certificate is passed on, and its register measured."""
    done = build(checkout, host, "--sign", "cert.pem", "key.pem")
    assert done.returncode == 0, done.stderr
    assert "PCR8" in json.loads((checkout / "measurements.json").read_text())["Measurements"]


def test_no_nitro_cli(checkout: Path) -> None:
    """On a machine without nitro-cli it says where that comes from."""
    done = build(checkout, None)
    assert done.returncode == 1
    assert "no nitro-cli here" in done.stderr


def test_no_image(checkout: Path, host: NitroHost) -> None:
    """An image that is not there: how to make it, and no measurements of an older one in its place."""
    done = build(checkout, host, "--image", "missing:dev")
    assert done.returncode == 1
    assert "build_images.sh enclave" in done.stderr
    assert not (checkout / "measurements.json").exists()


def test_an_option_that_is_none(checkout: Path, host: NitroHost) -> None:
    """It is not taken for something else."""
    assert build(checkout, host, "--imaeg", "x").returncode == 2
