"""What a tenant's code finds when it looks around in its container: nothing, and nothing it could do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.e2e.harness import Caller, only_docker

pytestmark = only_docker

REPORTS: dict[str, dict[str, Any]] = {}


@pytest.fixture
async def report(caller: Caller) -> dict[str, Any]:
    """What the hostile worker's look around reports, made once, while another session lives beside it."""
    if not REPORTS:
        async with caller.service.caller() as other:
            neighbour = await other.working(hang=True)
            task = await caller.run("probe", model="hostile", seconds=60)
            assert task.events[-1].data["status"] == "completed", task.summary
            REPORTS["probe"] = json.loads(task.of("text")[0]["text"])
            REPORTS["neighbour"] = {
                "session": neighbour.session_id,
                "own": task.session_id,
                "key": caller.service.key,
            }
    return REPORTS["probe"]


async def test_it_looked_in_earnest(report: dict[str, Any]) -> None:
    """The probe ran in its image and tried everything."""
    assert report["may_harm"] is True
    assert None not in (report["syscalls"], report["writable"], report["forks"], report["setuid_files"])


async def test_it_has_no_network(report: dict[str, Any]) -> None:
    """No interface but loopback, no route out, no names, no raw sockets."""
    assert report["interfaces"] == []
    assert report["connect_out"] == "ENETUNREACH"
    assert report["resolve"] != "ok"
    for name in ("AF_PACKET", "AF_INET_RAW"):
        assert report["sockets"][name] != "ok", name


async def test_it_cannot_reach_the_enclave_or_the_kernels_crypto(report: dict[str, Any]) -> None:
    """AF_VSOCK and AF_ALG are refused by our own seccomp profile; Docker's default would allow them."""
    assert (report["sockets"]["AF_VSOCK"], report["sockets"]["AF_ALG"]) == ("EPERM", "EPERM")


async def test_it_sees_no_other_session(report: dict[str, Any]) -> None:
    """Neither its folder, nor its mounts, nor its processes; its own folder holds its socket alone."""
    neighbour = REPORTS["neighbour"]["session"]
    assert neighbour not in json.dumps(report)
    assert report["own_folder"] == ["worker.sock"]
    # An init, the worker, and at most the children of the look around itself.
    assert len(report["processes"]) <= 4


async def test_it_can_write_in_few_places(report: dict[str, Any]) -> None:
    """`/tmp`, `/dev/shm` and its run folder, each its own."""
    assert set(report["writable"]) <= {"/tmp", "/dev/shm", "/run/gpu-worker"}
    mounts = {target: (kind, options.split(",")) for target, kind, options in report["mounts"]}
    assert "ro" in mounts["/"][1]
    for target in ("/tmp", "/dev/shm"):
        kind, options = mounts[target]
        assert kind == "tmpfs"
        assert {"nosuid", "nodev", "noexec"} <= set(options)
        assert any(option.startswith("size=") for option in options)


async def test_it_has_no_privileges(report: dict[str, Any]) -> None:
    """Not root, no groups, no capabilities, no way to new ones, a seccomp filter."""
    assert report["uid"] >= 20000
    assert report["gid"] == report["uid"]
    assert set(report["groups"]) <= {report["gid"]}
    assert {int(value, 16) for value in report["capabilities"].values()} == {0}
    assert (report["no_new_privs"], report["seccomp"]) == (1, 2)


async def test_privileged_calls_are_refused(report: dict[str, Any]) -> None:
    """Mounts, namespaces, keys, bpf, perf, userfaultfd, io_uring, modules, ptrace: none of them works."""
    assert "ok" not in report["syscalls"].values()
    for name in ("mount", "unshare_user", "unshare_net", "keyctl", "add_key", "bpf", "io_uring_setup"):
        assert report["syscalls"][name] in ("EPERM", "ENOSYS"), (name, report["syscalls"])
    assert report["sysctl_write"] != "ok"
    assert report["sysrq_write"] != "ok"
    assert report["cgroup_write"] != "ok"
    assert report["readable"]["/dev/mem"] != "ok"


async def test_it_has_no_docker_and_no_devices(report: dict[str, Any]) -> None:
    """No engine's socket, no block device, no GPU that was not leased."""
    assert report["docker_socket"] == []
    assert report["block_devices"] == []
    assert not [name for name in report["devices"] if re.match(r"nvidia|kvm|mem|vsock|nitro|fuse", name)]


async def test_limits_hold(report: dict[str, Any]) -> None:
    """It cannot start more processes than its preset allows, and has the memory that its preset gives."""
    assert 0 < report["forks"] < 32
    limits = report["cgroup"]
    assert str(128 << 20) in (limits.get("memory.max"), limits.get("memory/memory.limit_in_bytes"))
    assert "32" in (limits.get("pids.max"), limits.get("pids/pids.max"))


async def test_it_is_told_no_secrets(report: dict[str, Any]) -> None:
    """Its environment is the contract's, the preset's and its image's, nothing of the service's."""
    contract = {"HOME", "USER", "LOGNAME", "GPU_SESSION_ID", "GPU_WORKER_SOCKET", "NVIDIA_VISIBLE_DEVICES"}
    contract |= {"MAX_CONCURRENT_TASKS", "GPU_COUNT", "GPU_MEMORY_UTILIZATION"}
    preset = {"MODEL_ID", "TASK_PRESET", "HOSTILE_MODE"}
    image = {"HOSTILE_IMAGE", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PATH", "HOSTNAME"}
    also_in_the_official_image = {"LANG", "GPG_KEY", "PYTHON_VERSION", "PYTHON_SHA256", "LC_CTYPE"}
    assert set(report["environment"]) <= contract | preset | image | also_in_the_official_image
    assert contract | preset <= set(report["environment"])
    assert REPORTS["neighbour"]["key"] not in json.dumps(report)
    assert report["home"] == "/tmp"


async def test_what_a_container_is_made_with(caller: Caller) -> None:
    """The engine's own record agrees: no privileges, no network, no swap, our labels, the tenant hashed."""
    task = await caller.working(hang=True)
    service = caller.service
    (listed,) = [c for c in service.containers() if task.session_id in c["Names"][0]]
    assert service.engine is not None
    found = service.engine.inspect_container(listed["Id"])
    host, labels = found["HostConfig"], found["Config"]["Labels"]
    assert (host["Privileged"], host["NetworkMode"], host["ReadonlyRootfs"]) == (False, "none", True)
    assert (host["CapDrop"], host["CapAdd"], host["IpcMode"]) == (["ALL"], None, "private")
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (128 << 20, 128 << 20, 64)
    assert host["Binds"] is None
    assert [mount["Destination"] for mount in found["Mounts"]] == ["/run/gpu-worker"]
    assert labels["gpu-server.session"] == task.session_id
    assert labels["gpu-server.instance"] == service.instance
    assert {"gpu-server.task", "gpu-server.tenant", "gpu-server.fence"} <= set(labels)
    assert caller.tenant not in json.dumps(found)
    assert service.key not in json.dumps(found)
    assert (await caller.session(task.session_id))["container_id"] == found["Id"]
