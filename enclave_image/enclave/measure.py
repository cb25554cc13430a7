"""What stands in for an image's measurements where there is no Nitro hypervisor to take them.

A simulated enclave is named by its source: the same files give the same PCRs in a container and in a process,
so that a client can pin them in the same way. They prove nothing: whoever runs the program can report any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import gpu_server.sealed

_PACKAGES: Final = (
    ("enclave", Path(__file__).parent),
    ("gpu_server/sealed", Path(gpu_server.sealed.__file__).parent),
)


def files() -> Iterator[tuple[str, bytes]]:
    """The program's sources, each with its name in the image, in the order of the names."""
    for package, folder in _PACKAGES:
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
            yield f"{package}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def measurements() -> dict[int, bytes]:
    """PCR0, PCR1 and PCR2 of a simulated enclave: each SHA384(48 zero bytes || SHA384(content)), as AWS does.

    0 is the whole program, 1 stands for the kernel that is not there, 2 is the program again.
    """
    content = hashlib.sha384()
    for name, source in files():
        content.update(f"{name} {len(source)}\n".encode())
        content.update(source)
    kernel = hashlib.sha384(b"gpu-server simulated kernel")
    return {0: _extend(content.digest()), 1: _extend(kernel.digest()), 2: _extend(content.digest())}


def _extend(digest: bytes) -> bytes:
    return hashlib.sha384(bytes(48) + digest).digest()
