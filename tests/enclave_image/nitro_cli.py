"""A stand-in for nitro-cli: the same commands, JSON, messages and exit statuses, with a simulated enclave.

Run as a program. NITRO_STATE names its folder: `faults` has one error a line (E29, E36, ...), each for one
call of run-enclave, `broken` the one of all calls while it is there; `socket` is where the enclave listens;
`running/ID` holds a pid; `lingers` says in how many calls of describe-enclaves one that was terminated is
still listed, and `terminating/ID` in how many more; `log` has the calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
STATE = Path(os.environ.get("NITRO_STATE", "/nonexistent"))
MESSAGES = {
    "E19": "File operation failure. Such error appears when the system fails to perform the requested file"
    " operations, such as opening the EIF file when launching an enclave",
    "E22": "Insufficient CPUs available in the pool. User provided `cpu-count` is 64, which is more than the"
    " configured CPU pool size.",
    "E27": "Insufficient memory available. User provided `memory` is 512 MB, which is more than the available"
    " hugepage memory.",
    "E29": "Ioctl failure. Such error is used as a general ioctl error and appears whenever an ioctl fails.",
    "E36": "Enclave boot failure. Such error appears when attempting to receive the `ready` signal from a"
    " freshly booted enclave.",
    "E39": "Enclave process connection failure. Such error appears when the enclave manager fails to connect"
    " to at least one enclave process for retrieving the description information.",
}


def fail(code: str) -> NoReturn:
    """As nitro-cli does: on stderr, and as the exit status."""
    print("Start allocating memory...", file=sys.stderr)
    print(f"[ {code} ] {MESSAGES.get(code, 'Unspecified error.')}", file=sys.stderr)
    sys.exit(int(code[1:]))


def run_enclave(options: argparse.Namespace) -> None:
    """Boot, which is done when the program listens."""
    broken = STATE / "broken"
    if broken.exists():
        fail(broken.read_text())
    faults = STATE / "faults"
    left = faults.read_text().split() if faults.exists() else []
    if left:
        faults.write_text("\n".join(left[1:]))
        if left[0] != "OK":
            fail(left[0])
    if not Path(options.eif_path).is_file():
        fail("E19")
    if options.enclave_cid in (1, 2, 3) or list(STATE.glob("terminating/*")):
        fail("E29")
    path = STATE / "socket"
    environment = {"PYTHONPATH": f"{ROOT / 'enclave_image'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "enclave", "--simulated", "--socket", path.name]
    with (STATE / "console").open("ab") as console:
        program = subprocess.Popen(
            # It begins when its record is there: who finds that it answers finds that too.
            ["sh", "-c", 'read -r go && exec "$@" </dev/null', "sh", *command],
            cwd=STATE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
    enclave = f"i-0123456789abcdef0-enc{secrets.token_hex(8)}"
    record = STATE / "running" / enclave
    record.parent.mkdir(exist_ok=True)
    draft = STATE / f"{enclave}.draft"
    draft.write_text(str(program.pid))
    draft.rename(record)
    assert program.stdin is not None
    with program.stdin:
        program.stdin.write(b"go\n")
    while program.poll() is None and not _answers(path):
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(0.005)
    if program.poll() is not None:
        record.unlink()
        fail("E36")
    print(f"Started enclave with enclave-cid: {options.enclave_cid}", file=sys.stderr)
    show(
        {
            "EnclaveName": "enclave",
            "EnclaveID": enclave,
            "ProcessID": program.pid,
            "EnclaveCID": options.enclave_cid,
            "NumberOfCPUs": options.cpu_count,
            "CPUIDs": list(range(1, options.cpu_count + 1)),
            "MemoryMiB": options.memory,
        }
    )


def describe_enclaves(_: argparse.Namespace) -> None:
    """Those that run; one that has crashed is not listed any more."""
    listed = []
    for record in sorted(STATE.glob("running/*")):
        if _runs(int(record.read_text())):
            listed.append({"EnclaveID": record.name, "EnclaveCID": 16, "State": "RUNNING", "Flags": "NONE"})
        else:
            record.unlink()
    for record in sorted(STATE.glob("terminating/*")):
        left = int(record.read_text())
        listed.append({"EnclaveID": record.name, "EnclaveCID": 16, "State": "TERMINATING", "Flags": "NONE"})
        if left > 1:
            record.write_text(str(left - 1))
        else:
            record.unlink()
    show(listed)


def terminate_enclave(options: argparse.Namespace) -> None:
    """End one."""
    record = STATE / "running" / options.enclave_id
    if not record.exists():
        fail("E39")
    pid = int(record.read_text())
    if _runs(pid):
        os.kill(pid, signal.SIGKILL)
    while _runs(pid):
        pass
    record.unlink()
    lingers = STATE / "lingers"
    if lingers.exists():
        (STATE / "terminating").mkdir(exist_ok=True)
        (STATE / "terminating" / options.enclave_id).write_text(lingers.read_text())
    show({"EnclaveName": "enclave", "EnclaveID": options.enclave_id, "Terminated": True})


def build_enclave(options: argparse.Namespace) -> None:
    """An image file that is none, and measurements as of a real one."""
    print("Start building the Enclave Image...", file=sys.stderr)
    if options.docker_uri.startswith("missing"):
        print("[ E50 ] Docker image pull error.", file=sys.stderr)
        sys.exit(50)
    Path(options.output_file).write_bytes(b".eif")
    print("Using the locally available Docker image...")
    pcrs = {f"PCR{index}": f"{index + 1:02x}" * 48 for index in (0, 1, 2)}
    if options.signing_certificate:
        pcrs["PCR8"] = "ee" * 48
    show({"Measurements": {"HashAlgorithm": "Sha384 { ... }", **pcrs}})


def show(value: object) -> None:
    print(json.dumps(value, indent=2))


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _answers(path: Path) -> bool:
    try:
        held = os.open(path, os.O_PATH)
    except FileNotFoundError:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(f"/proc/self/fd/{held}") == 0
    finally:
        os.close(held)


def main() -> None:
    parser = argparse.ArgumentParser(prog="nitro-cli")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run-enclave")
    run.add_argument("--eif-path", required=True)
    run.add_argument("--memory", type=int, required=True)
    run.add_argument("--cpu-count", type=int, required=True)
    run.add_argument("--enclave-cid", type=int)
    run.set_defaults(do=run_enclave)
    commands.add_parser("describe-enclaves").set_defaults(do=describe_enclaves)
    terminate = commands.add_parser("terminate-enclave")
    terminate.add_argument("--enclave-id", required=True)
    terminate.set_defaults(do=terminate_enclave)
    build = commands.add_parser("build-enclave")
    build.add_argument("--docker-uri", required=True)
    build.add_argument("--output-file", required=True)
    build.add_argument("--signing-certificate")
    build.add_argument("--private-key")
    build.set_defaults(do=build_enclave)
    options = parser.parse_args()
    if STATE.is_dir():
        with (STATE / "log").open("a") as log:
            log.write(" ".join(sys.argv[1:]) + "\n")
    options.do(options)


if __name__ == "__main__":
    main()
