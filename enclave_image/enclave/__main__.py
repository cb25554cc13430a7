"""The program's command line: in an enclave it has no arguments.

python -m enclave                            in a Nitro Enclave: /dev/nsm, vsock port 5000
python -m enclave --simulated --socket PATH  elsewhere: a software NSM, a Unix socket; proves nothing
python -m enclave --measurements             the PCRs of the simulated enclave, as JSON
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Final

from enclave.device import NsmDevice
from enclave.measure import measurements
from enclave.program import Program
from enclave.server import Server, listen_unix, listen_vsock
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm

PORT: Final = 5000


def mix(randomness: bytes) -> None:
    """Into the kernel's pool, where it counts as nothing, and every later random number depends on it."""
    with open("/dev/urandom", "wb", buffering=0) as pool:
        pool.write(randomness)


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="enclave", description="Moves data keys from KMS to workers.")
    parser.add_argument("--simulated", action="store_true", help="a software NSM, which proves nothing")
    parser.add_argument("--socket", metavar="PATH", help="with --simulated: listen on this Unix socket")
    parser.add_argument("--measurements", action="store_true", help="print the simulated PCRs and exit")
    options = parser.parse_args()
    if options.measurements:
        print(json.dumps({f"PCR{index}": value.hex() for index, value in measurements().items()}))
        return 0
    if options.simulated != (options.socket is not None):
        parser.error("--simulated and --socket go together")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if options.simulated:
            program = Program(Nsm(SoftwareNsm(measurements()).process), mode="simulated", mix=mix)
            listening = listen_unix(options.socket)
        else:
            program = Program(Nsm(NsmDevice().process), mode="nitro", mix=mix)
            listening = listen_vsock(PORT)
    except OSError as error:
        print(f"enclave: cannot start: {error}", file=sys.stderr)
        return 1
    print(f"enclave: listening, {'simulated' if options.simulated else 'nitro'}", file=sys.stderr, flush=True)
    Server(listening, program.handle).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
