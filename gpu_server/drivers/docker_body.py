"""What a worker's container is made with: one pure function, the hardening of every worker on one page.

The body is the one of `POST /containers/create` of the Docker Engine API (1.41).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Final

from gpu_server.ports import Contract, WorkerSpec

LABEL_INSTANCE: Final = "gpu-server.instance"
LABEL_SESSION: Final = "gpu-server.session"
LABEL_TASK: Final = "gpu-server.task"
LABEL_TENANT: Final = "gpu-server.tenant"
LABEL_FENCE: Final = "gpu-server.fence"
LABEL_SEALED: Final = "gpu-server.sealed"

SHARE_TARGET: Final = "/run/gpu-worker"
TASK_TARGET: Final = "/task"
MODEL_TARGET: Final = "/models"


LOG_BYTES: Final = 16_000_000
"""How much of what an `exec` worker writes can be read again, counted as its log has it."""

KEPT_LOG: Final[Mapping[str, object]] = {
    "Type": "json-file",
    "Config": {"max-size": str(LOG_BYTES), "max-file": "2"},
}
"""How the engine keeps what an `exec` worker writes: two files of `LOG_BYTES`, so the disk is bounded."""


def seccomp_profile() -> str:
    """The project's seccomp profile, as the engine takes it inline.

    It is Docker's default list (see the engine's own documentation of seccomp) without what needs a
    capability that no worker has, and with less: sockets only of the families UNIX, INET, INET6 and NETLINK
    (AF_VSOCK reaches the enclave), no io_uring (its socket operation passes filters by), no ptrace, and no
    32-bit system calls (there, `socketcall` hides the family behind a pointer that no filter can read).
    """
    return resources.files(__package__).joinpath("seccomp.json").read_text(encoding="utf-8")


def labels(spec: WorkerSpec, instance: str) -> dict[str, str]:
    """The labels by which a service knows its own containers, also after a restart.

    The tenant is a hash: whoever may list containers should not learn who the tenants are.
    """
    return {
        LABEL_INSTANCE: instance,
        LABEL_SESSION: spec.session_id,
        LABEL_TASK: spec.task_id or "",
        LABEL_TENANT: hashlib.sha256(spec.tenant.encode()).hexdigest()[:16],
        LABEL_FENCE: str(spec.fence),
        **({LABEL_SEALED: "yes"} if spec.sealed else {}),
    }


def environment(spec: WorkerSpec) -> dict[str, str]:
    """The worker's environment: the preset's, under the names that are the contract's and always win.

    NVIDIA_VISIBLE_DEVICES is always set. An image may carry "all", and an engine whose default runtime is
    NVIDIA's would obey it; "void" gives no GPU.
    """
    reserved = {
        "HOME": "/tmp",
        "USER": "worker",
        "LOGNAME": "worker",
        "GPU_SESSION_ID": spec.session_id,
        "GPU_WORKER_SOCKET": f"{SHARE_TARGET}/worker.sock",
        "NVIDIA_VISIBLE_DEVICES": ",".join(spec.gpu_uuids) or "void",
    }
    if spec.model_path is not None:
        reserved["MODEL_PATH"] = MODEL_TARGET
    if spec.contract is Contract.EXEC:
        reserved["TASK_ID"] = spec.task_id or ""
        reserved["TASK_INPUT"] = f"{TASK_TARGET}/input.json"
    return {**spec.env, **reserved}


def container_body(
    spec: WorkerSpec, *, instance: str, seccomp: str, image_volumes: Iterable[str] = ()
) -> dict[str, Any]:
    """The create request for a worker.

    `image_volumes` are the VOLUME paths of its image. Docker would give each a writable folder on the host's
    disk, without a bound; each becomes a sized tmpfs instead, charged to the worker's own memory.
    """
    body: dict[str, Any] = {
        "Image": spec.image,
        "Hostname": "worker",
        "User": f"{spec.uid}:{spec.uid}",
        "Env": [f"{name}={value}" for name, value in environment(spec).items()],
        "Labels": labels(spec, instance),
        "AttachStdin": False,
        "AttachStdout": not spec.sealed,
        "AttachStderr": not spec.sealed,
        "OpenStdin": False,
        "Tty": False,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": _host_config(spec, seccomp, image_volumes),
    }
    if spec.command is not None:
        body["Cmd"] = list(spec.command)
    return body


def _host_config(spec: WorkerSpec, seccomp: str, image_volumes: Iterable[str]) -> dict[str, Any]:
    limits = spec.limits
    scratch = f"rw,nosuid,nodev,noexec,size={limits.tmp_size},mode=1777"
    tmp = scratch.replace("noexec", "exec") if limits.tmp_exec else scratch
    mounts = [_bind(str(spec.folder.share), SHARE_TARGET, read_only=False)]
    if spec.contract is Contract.EXEC:
        mounts.append(_bind(str(spec.folder.task), TASK_TARGET, read_only=True))
    if spec.model_path is not None:
        mounts.append(_bind(str(spec.model_path), MODEL_TARGET, read_only=True))
    targets = {str(mount["Target"]) for mount in mounts} | {"/tmp"}
    return {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "Tmpfs": {
            **{path: scratch for path in image_volumes if path not in targets},
            "/tmp": tmp,
            # The engine mounts a message queue file system there, which any uid may write to.
            "/dev/mqueue": "ro,nosuid,nodev,noexec,size=4k",
        },
        "Mounts": mounts,
        "CapDrop": ["ALL"],
        "Privileged": False,
        "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp}"],
        "IpcMode": "private",
        "ShmSize": limits.shm_size,
        "Memory": limits.memory,
        "MemorySwap": limits.memory,
        "NanoCpus": round(limits.cpus * 1e9),
        "PidsLimit": limits.pids,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "Init": True,
        "RestartPolicy": {"Name": "no"},
        "LogConfig": _log_config(spec.contract),
        "DeviceRequests": device_requests(spec.gpu_uuids),
    }


def _bind(source: str, target: str, *, read_only: bool) -> dict[str, object]:
    # A mount, not a "bind": of the latter the engine creates a missing source, as root, and says nothing.
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }


def _log_config(contract: Contract) -> Mapping[str, object]:
    if contract is Contract.EXEC:
        return KEPT_LOG
    return {"Type": "none", "Config": {}}


def device_requests(uuids: tuple[str, ...]) -> list[Mapping[str, object]]:
    """For exactly these GPUs, by UUID."""
    # An empty list of DeviceIDs would mean "count", so no GPU means no request at all.
    if not uuids:
        return []
    return [
        {
            "Driver": "nvidia",
            "DeviceIDs": list(uuids),
            "Capabilities": [["gpu", "compute", "utility"]],
        }
    ]
