"""The program as the process that it is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from enclave.measure import measurements

from gpu_server.sealed.frames import Code, FrameReader, Op, decode_reply, encode_request

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'enclave_image'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
PATIENCE = 60.0


def start(*arguments: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "enclave", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_measurements() -> None:
    """They are printed as JSON, under the names that nitro-cli uses."""
    out, _ = start("--measurements").communicate(timeout=PATIENCE)
    assert json.loads(out) == {f"PCR{index}": value.hex() for index, value in measurements().items()}


@pytest.mark.parametrize("arguments", [["--simulated"], ["--socket", "s"], ["--debug"], ["more"]])
def test_bad_arguments(arguments: list[str]) -> None:
    """A simulation needs a socket, a socket a simulation, and there is nothing else."""
    process = start(*arguments)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "usage" in error


@pytest.mark.skipif(os.path.exists("/dev/nsm"), reason="this is an enclave")
def test_no_security_module() -> None:
    """Without /dev/nsm it ends, and does not simulate unasked."""
    process = start()
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "/dev/nsm" in error


def test_a_life(tmp_path: Path) -> None:
    """It serves on its socket, says two words on stderr in all its life, and ends on SIGTERM."""
    process = start("--simulated", "--socket", "s", cwd=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline() == "enclave: listening, simulated\n"
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(tmp_path / "s"))
        frames = FrameReader()
        for number, (op, args) in enumerate([(Op.INIT, []), (Op.HELLO, [b"n" * 32]), (Op.STATUS, [])], 1):
            peer.sendall(encode_request(op, number, args))
            payloads: list[bytes] = []
            while not payloads:
                payloads = frames.feed(peer.recv(65536))
            reply = decode_reply(payloads[0])
            assert (reply.id, reply.code) == (number, Code.OK)
        assert reply.result[0] == "ready"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, error) == (0, "", "")


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    """A path that it cannot listen on is said, without a traceback."""
    (tmp_path / "s").write_text("a file")
    process = start("--simulated", "--socket", "s", cwd=tmp_path)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert error.startswith("enclave: cannot start")
    assert "Traceback" not in error
