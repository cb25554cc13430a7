"""Where the enclave runs: one seam, for `enclave_container.py` and `enclave_process.py`.

A host keeps no state of its own: a container's labels, or a process's record file, say what runs and what it
was made from, also to the next life of the service.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Final, Literal, Protocol

from gpu_server.drivers.docker_api import one_line

ROLE: Final = "enclave"
NOT_SEEN_GONE: Final = frozenset({71, 72})
"""Exit statuses of a Nitro Enclave's runner that has ended, and not seen its enclave gone: where `nitro-cli`
could not be used it may have started one and not have said so."""
KILLED: Final = 128
"""From this exit status on, a program was ended by a signal."""

Ending = Literal["none", "ended", "terminated", "killed"]
"""How an enclave came to be gone: there was none, it had ended before, it ended as it was asked to, or what
held it was killed. On a Nitro host `ended` and `terminated` mean that `nitro-cli describe-enclaves` did not
list it any more, or that `nitro-cli` had refused to start it; after `killed` it is the kernel's driver that
ends it, with the process that held it."""


class EnclaveHost(Protocol):
    """Starts and ends the one enclave of this instance."""

    async def find(self) -> bool:
        """Take up the enclave that an earlier life of the service started; False if none of the same make
        runs. Raises `EnclaveDown` and `RuntimeUnreachable`."""

    async def start(self) -> None:
        """Start a new one; what is left of an earlier one is removed first. Raises `EnclaveDown` and
        `RuntimeUnreachable`."""

    async def ended(self) -> str | None:
        """Why it does not run; None while it does. Raises `RuntimeUnreachable` when that is not known."""

    async def stop(self, grace: float) -> Ending:
        """SIGTERM, up to `grace` seconds, SIGKILL, gone for certain, and how. Raises `RuntimeUnreachable`."""

    def close(self) -> None:
        """Let go; the enclave is left as it is."""


def make_of(what: object) -> str:
    """A short name for what something was made from: the same for the same, and only then."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_folder(folder: Path, uid: int) -> None:
    """A folder that only `uid` (and root) may look into, for the enclave's socket. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(folder, uid, uid)
    folder.chmod(0o700)


def remove_folder(folder: Path) -> None:
    """Remove it with all that is in it, as far as that is possible: it is on a tmpfs, and made anew."""
    shutil.rmtree(folder, ignore_errors=True)


def last_words(output: bytes) -> str:
    """The last line that a program wrote, shortened; of a line of JSON its `message`. Only what is printable,
    since it is logged, and a hostile program may have written it."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return ""
    words = lines[-1]
    with contextlib.suppress(ValueError, RecursionError):  # not JSON, or more brackets than anybody reads
        said = json.loads(words)
        words = str(said["message"]) if isinstance(said, dict) and "message" in said else ""
    return one_line("".join(sign if sign.isprintable() else " " for sign in words))
