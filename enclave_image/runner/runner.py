"""Holds one Nitro Enclave: starts it, watches it, ends it on SIGTERM. The enclave lives as long as this does.

The first process of the runner's container. Only Python's standard library, from 3.9 on (Amazon Linux 2023).
Each line on stdout is a JSON object with an `event`: starting, retry, running, ended, terminated,
terminate_failed, not_gone, failed.

Exit status: 0 terminated on SIGTERM; 70 the enclave ended by itself (in both cases describe-enclaves does not
list it any more); 71 nitro-cli cannot be used; 72 the enclave was not seen gone; else the number of the error
of nitro-cli (E22 is 22), see https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

ENDED = 70
UNUSABLE = 71
NOT_SEEN_GONE = 72

AGAIN = "E29"
"""The driver is not done with an enclave that has just ended; some seconds later it is."""
TRIES = 6
DESCRIBE_FAILURES = 5
GONE_SECONDS = 8.0
"""So long an enclave that was terminated may be listed; whoever sent SIGTERM waits a little longer."""
GONE_POLL_SECONDS = 0.1
CLI_SECONDS = 180.0
"""For one call. nitro-cli itself waits for an enclave to boot, and then says E36."""

MEANING = {
    "E19": "a file cannot be read: is the enclave image file there, and is /var/log/nitro_enclaves writable?",
    "E22": "there are not enough CPUs in the enclaves' pool: raise cpu_count in"
    " /etc/nitro_enclaves/allocator.yaml and restart nitro-enclaves-allocator",
    "E26": "the enclave has too little memory for its image: raise ENCLAVE_MEMORY_MB",
    "E27": "there is not enough memory in huge pages: raise memory_mib in /etc/nitro_enclaves/allocator.yaml"
    " and restart nitro-enclaves-allocator",
    "E29": "the Nitro Enclaves driver refused: is this instance enabled for enclaves, and /dev/nitro_enclaves"
    " passed on?",
    "E36": "the enclave did not boot in time: is the image file whole, and the memory enough for it?",
    "E39": "there is a stale socket in /run/nitro_enclaves: remove it, or start with an empty folder there",
}


class CliFailed(Exception):
    """nitro-cli has failed. `code` is its E-number, or "" where it gave none."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> int:
        return int(self.code[1:]) if self.code else UNUSABLE


def tell(event: str, **fields: Any) -> None:
    """One line for whoever reads the container's output."""
    print(json.dumps({"event": event, **fields}), flush=True)


def nitro_cli(program: str, *arguments: str) -> Any:
    """What nitro-cli prints as JSON. Raises `CliFailed`."""
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CliFailed("", f"{program} cannot be run: {error}") from error
    if done.returncode != 0:
        named = re.search(r"\bE(\d\d)\b", done.stderr)
        number = int(named[1]) if named else done.returncode if 0 < done.returncode < 64 else 0
        code = f"E{number:02}" if number else ""
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].strip()[:300] if lines else f"status {done.returncode}"
        raise CliFailed(code, f"{code or 'nitro-cli'}: {MEANING.get(code, said)}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise CliFailed("", f"{program} {arguments[0]} did not print JSON") from error


class Runner:
    """One enclave. `stopping` is set by SIGTERM."""

    def __init__(self, options: argparse.Namespace, stopping: threading.Event) -> None:
        self._options, self._stopping = options, stopping

    def start(self) -> str:
        """Start the enclave; its id. Raises `CliFailed`."""
        options, pause = self._options, self._options.backoff
        for left in range(TRIES - 1, -1, -1):
            try:
                started = nitro_cli(
                    options.nitro_cli,
                    "run-enclave",
                    *("--eif-path", options.eif, "--memory", str(options.memory)),
                    *("--cpu-count", str(options.cpu_count), "--enclave-cid", str(options.cid)),
                )
                return str(started["EnclaveID"])
            except CliFailed as error:
                if error.code != AGAIN or not left or self._stopping.is_set():
                    raise
                tell("retry", code=error.code, message=str(error), seconds=pause)
            except (KeyError, TypeError):
                raise CliFailed("", "run-enclave did not say which enclave it started") from None
            self._stopping.wait(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def watch(self, enclave: str) -> None:
        """Return when the enclave has ended, or should end."""
        failures = 0
        while not self._stopping.wait(self._options.poll):
            try:
                states = self._states_of(enclave)
                failures = 0
            except CliFailed:
                failures += 1
                if failures >= DESCRIBE_FAILURES:
                    return
                continue
            if states != ["RUNNING"]:
                return

    def end(self, enclave: str) -> bool:
        """Terminate the enclave, if it is still there, and see it gone; False where that is not seen in time.
        Raises nothing: the container's end ends it too."""
        until = time.monotonic() + self._options.gone
        terminated, told = False, ""
        while True:
            try:
                if not terminated:
                    nitro_cli(self._options.nitro_cli, "terminate-enclave", "--enclave-id", enclave)
                terminated = True
            except CliFailed as error:
                if str(error) != told:
                    tell("terminate_failed", code=error.code, message=str(error))
                told = str(error)
            try:
                states = self._states_of(enclave)
                if not states:
                    return True
                why = f"it is listed as {states[0]}"
            except CliFailed as error:
                why = str(error)
            if time.monotonic() >= until:
                tell("not_gone", enclave=enclave, message=f"the enclave was not seen gone: {why}")
                return False
            threading.Event().wait(GONE_POLL_SECONDS)

    def _states_of(self, enclave: str) -> list[str]:
        """Its state, or none where it is not listed. Raises `CliFailed`."""
        listed = nitro_cli(self._options.nitro_cli, "describe-enclaves")
        try:
            return [str(found["State"]) for found in listed if found["EnclaveID"] == enclave]
        except (KeyError, TypeError):
            raise CliFailed("", "describe-enclaves did not print a list of enclaves") from None

    def run(self) -> int:
        """The life of one enclave; the exit status."""
        tell("starting", eif=self._options.eif, cid=self._options.cid)
        try:
            enclave = self.start()
        except CliFailed as error:
            tell("failed", code=error.code, message=str(error))
            return error.status
        tell("running", enclave=enclave, cid=self._options.cid)
        self.watch(enclave)
        if not self.end(enclave):
            return NOT_SEEN_GONE
        if self._stopping.is_set():
            tell("terminated", enclave=enclave, message="terminated as asked")
            return 0
        tell("ended", enclave=enclave, message="the enclave has ended by itself")
        return ENDED


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Holds one Nitro Enclave.")
    parser.add_argument("--eif", required=True, help="the enclave image file")
    parser.add_argument("--memory", type=int, required=True, help="in MiB")
    parser.add_argument("--cpu-count", type=int, required=True)
    parser.add_argument("--cid", type=int, required=True, help="the enclave's vsock address, from 4 on")
    parser.add_argument("--nitro-cli", default="nitro-cli", help="the program")
    parser.add_argument("--poll", type=float, default=2.0, help="seconds between two looks at the enclave")
    parser.add_argument("--gone", type=float, default=GONE_SECONDS, help="seconds to see it gone at the end")
    parser.add_argument("--backoff", type=float, default=1.0, help="seconds before the first new try")
    options = parser.parse_args()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return Runner(options, stopping).run()


if __name__ == "__main__":
    sys.exit(main())
