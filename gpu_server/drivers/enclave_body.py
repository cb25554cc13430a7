"""What the enclave's containers are made with: two pure functions, the hardening of both on one page.

The bodies are those of `POST /containers/create` of the Docker Engine API (1.41), without their labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gpu_server.drivers.docker_body import seccomp_profile

SOCKET_NAME: Final = "enclave.sock"
SOCKET_TARGET: Final = "/run/enclave"
EIF_TARGET: Final = "/enclave.eif"

_MEMORY_BYTES: Final = 256 << 20
_RUNNER_MEMORY_BYTES: Final = 512 << 20
_NITRO_DEVICE: Final = "/dev/nitro_enclaves"
_HUGEPAGES: Final = "/dev/hugepages"
# Its sockets and its log. Each container has its own, so that no stale socket of an earlier one is there.
_NITRO_CLI_WRITES: Final = ("/run/nitro_enclaves", "/var/log/nitro_enclaves", "/tmp")
# Their lines are few and hold no secrets; the last of them says why one has ended.
_LOG: Final[Mapping[str, object]] = {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}}


def simulated_body(image: Mapping[str, Any], *, folder: Path, uid: int) -> dict[str, Any]:
    """The create request for the enclave's own image, simulated: its program listens in `folder` instead of
    on vsock. No network, nothing to write to but that folder, no capability, not root."""
    program = list((image.get("Config") or {}).get("Cmd") or ())
    return {
        "Hostname": "enclave",
        "User": f"{uid}:{uid}",
        "Cmd": [*program, "--simulated", "--socket", f"{SOCKET_TARGET}/{SOCKET_NAME}"],
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "Tmpfs": {"/dev/mqueue": "ro,nosuid,nodev,noexec,size=4k"},
            "Mounts": [_bind(folder, SOCKET_TARGET, read_only=False)],
            "CapDrop": ["ALL"],
            "Privileged": False,
            "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp_profile()}"],
            "IpcMode": "private",
            "Memory": _MEMORY_BYTES,
            "MemorySwap": _MEMORY_BYTES,
            "PidsLimit": 64,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
            "RestartPolicy": {"Name": "no"},
            "LogConfig": _LOG,
        },
    }


def runner_body(*, eif: Path, memory_mb: int, cpu_count: int, cid: int) -> dict[str, Any]:
    """The create request for the container that holds a Nitro Enclave: when it ends, the enclave does.

    It is as powerful as the host's root: `nitro-cli` needs the device, huge pages and vsock, and was reported
    to need `Privileged`. It gets no network, and nothing of the enclave's memory is within its reach.
    """
    return {
        "Hostname": "enclave-runner",
        "Cmd": [
            *("--eif", EIF_TARGET, "--memory", str(memory_mb)),
            *("--cpu-count", str(cpu_count), "--cid", str(cid)),
        ],
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "Tmpfs": dict.fromkeys(_NITRO_CLI_WRITES, "rw,nosuid,nodev,noexec,size=16m,mode=0700"),
            "Mounts": [
                _bind(eif, EIF_TARGET, read_only=True),
                _bind(Path(_HUGEPAGES), _HUGEPAGES, read_only=False),
            ],
            "Devices": [
                {"PathOnHost": _NITRO_DEVICE, "PathInContainer": _NITRO_DEVICE, "CgroupPermissions": "rwm"}
            ],
            "Privileged": True,
            "Memory": _RUNNER_MEMORY_BYTES,
            "MemorySwap": _RUNNER_MEMORY_BYTES,
            "PidsLimit": 256,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            "LogConfig": _LOG,
        },
    }


def _bind(source: Path, target: str, *, read_only: bool) -> dict[str, object]:
    # A mount, not a "bind": of the latter the engine creates a missing source, as root, and says nothing.
    return {
        "Type": "bind",
        "Source": str(source),
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }
