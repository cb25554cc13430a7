"""`gpu-server attestation verify` and `gpu-server kms-emulator`, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from base64 import encodebytes
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from gpu_server.cli_sealed import attestation_app, kms_emulator
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.drivers.kms_world import ARN, CONTEXT, OTHER_ARN, aws_environment, kms_client
from tests.drivers.kms_world import document as enclave_document
from tests.sealed.documents import NONCE, PCRS, PUBLIC_KEY, USER_DATA, real_document

ROOT = Path(__file__).parents[2]
HEX = {index: data.hex() for index, data in PCRS.items()}

app = typer.Typer()
app.add_typer(attestation_app, name="attestation")
app.command("kms-emulator")(kms_emulator)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


def document() -> bytes:
    """A document of now."""
    nsm = SoftwareNsm(PCRS, now=lambda: datetime.now(UTC))
    return Nsm(nsm.process).attestation(public_key=PUBLIC_KEY, user_data=USER_DATA, nonce=NONCE)


def verify(path: Path | str, *options: str, stdin: bytes | None = None) -> Result:
    """Run `attestation verify`."""
    return CliRunner().invoke(app, ["attestation", "verify", str(path), *options], input=stdin)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "document.cbor"
    path.write_bytes(document())
    return path


def test_a_simulated_document(stored: Path) -> None:
    """With everything that is expected of it, it is shown as JSON, and called what it is."""
    result = verify(
        stored,
        "--allow-simulated",
        "--nonce",
        NONCE.hex(),
        "--pcr0",
        HEX[0],
        "--pcr1",
        HEX[1].upper(),
        "--pcr8",
        HEX[8],
    )
    assert result.exit_code == 0, result.output
    shown: dict[str, Any] = json.loads(result.stdout)
    assert shown["assurance"] == "simulated"
    assert shown["pcrs"]["PCR0"] == HEX[0]
    assert shown["nonce"] == NONCE.hex()
    assert shown["public_key"] == PUBLIC_KEY.hex()
    assert len(bytes.fromhex(shown["epoch"])) == 16
    assert [len(record) for record in shown["slots"]] == [64, 64]
    assert "proves nothing" in result.stderr


def test_a_real_document(tmp_path: Path) -> None:
    """A stored document of real hardware is verified at its own time, and is refused at any other."""
    path = tmp_path / "real.cbor"
    path.write_bytes(real_document("good"))
    result = verify(path, "--at-document-time")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["assurance"] == "isolated-worker"
    assert shown["timestamp"].startswith("2022-11-09T22:52:00.696")
    assert "epoch" not in shown
    late = verify(path)
    assert (late.exit_code, late.stdout) == (1, "")
    assert late.stderr.startswith("refused (expired)")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "root"),
        (["--allow-simulated", "--nonce", "00" * 32], "nonce"),
        (["--allow-simulated", "--pcr0", "00" * 48], "pcr"),
        (["--allow-simulated", "--pcr3", "11" * 48], "pcr"),
        (["--allow-simulated", "--max-age", "0"], "stale"),
    ],
)
def test_refusals(stored: Path, options: list[str], reason: str) -> None:
    """One line on stderr says why, with the reason's code; nothing else is printed."""
    result = verify(stored, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"refused ({reason}): ")
    assert result.stderr.count("\n") == 1


def test_several_values(stored: Path) -> None:
    """Any of several values of a register will do; and each register must have one of its own."""
    both = ("--pcr0", "11" * 48, "--pcr0", HEX[0])
    assert verify(stored, "--allow-simulated", *both).exit_code == 0
    result = verify(stored, "--allow-simulated", *both, "--pcr8", HEX[0])
    assert (result.exit_code, result.stderr) == (1, "refused (pcr): PCR8 is not what is expected\n")


def test_forms_of_a_file(stored: Path, tmp_path: Path) -> None:
    """CBOR and base64, from a file and from stdin; what is neither is malformed."""
    raw = stored.read_bytes()
    text = tmp_path / "document.b64"
    text.write_bytes(b"\n" + encodebytes(raw))
    assert verify(text, "--allow-simulated").exit_code == 0
    for data in (raw, encodebytes(raw)):
        assert verify("-", "--allow-simulated", stdin=data).exit_code == 0
    for data in (b"", b"hello", b"aGVsbG8=", b"\xff\xd8", bytes(1 << 21)):
        result = verify("-", "--allow-simulated", stdin=data)
        assert result.exit_code == 1
        assert result.stderr.startswith("refused (malformed)")


@pytest.mark.parametrize(
    "options", [["--pcr0", "xyz"], ["--pcr0", "00"], ["--nonce", "0"], ["--max-age", "-1"]]
)
def test_bad_options(stored: Path, options: list[str]) -> None:
    """An option that cannot be meant is an error of usage, never a weaker check."""
    assert verify(stored, *options).exit_code == 2


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there is said in one line."""
    result = verify(tmp_path / "none")
    assert result.exit_code == 2
    assert "No such file" in result.stderr


PROGRAM = "import typer; from gpu_server.cli_sealed import kms_emulator; typer.run(kms_emulator)"


def test_the_emulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says where it listens and what it is for, answers boto3, and ends on SIGTERM."""
    aws_environment(monkeypatch)
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({OTHER_ARN: {"conditions": {"kms:EncryptionContext:tenant": "acme"}}}))
    arguments = ["--port", "0", "--key", ARN, "--pcr0", "01" * 48, "--keys-file", str(keys)]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "for tests only" in line
        url = line.split()[3].rstrip(",")
        assert url.startswith("http://127.0.0.1:")
        client = kms_client(url)
        made = client.generate_data_key(KeyId=ARN, KeySpec="AES_256", EncryptionContext=CONTEXT)
        answer = client.decrypt(
            KeyId=ARN,
            CiphertextBlob=made["CiphertextBlob"],
            EncryptionContext=CONTEXT,
            Recipient={
                "KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256",
                "AttestationDocument": enclave_document(),
            },
        )
        assert answer["CiphertextForRecipient"]
        assert "Plaintext" not in answer
        client.generate_data_key(KeyId=OTHER_ARN, KeySpec="AES_256", EncryptionContext=CONTEXT)
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_measurement_is_for_the_keys_of_the_command_line(tmp_path: Path) -> None:
    """Keys of a file have conditions of their own: a measurement that would hold for none of them is an error
    of usage, and no emulator starts that seems to ask for it."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({OTHER_ARN: {}}))
    arguments = ["--port", "0", "--keys-file", str(keys), "--pcr0", "01" * 48]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, timeout=60, capture_output=True
    )
    assert done.returncode == 2
    assert b"--pcr0" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--key", "alias/x"],
        ["--key", ARN, "--pcr0", "00"],
        ["--keys-file", "/nonexistent"],
        ["--port", "65536"],
    ],
)
def test_the_emulator_needs_keys(options: list[str]) -> None:
    """Without a key, or with what is none, it does not start."""
    assert CliRunner().invoke(app, ["kms-emulator", *options]).exit_code == 2
