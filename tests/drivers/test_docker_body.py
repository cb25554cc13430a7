"""The create request of a worker, and what it means inside a real container."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.docker_body import container_body, environment, labels, seccomp_profile
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import Contract, RunFolder, WorkerSpec
from tests.worker_specs import LIMITS, TEST_UID, worker_spec


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolders(tmp_path / "run").create("s_1", TEST_UID, b'{"metadata": {}}')


def body_of(spec: WorkerSpec, **changes: Any) -> dict[str, Any]:
    return container_body(spec, instance="i", seccomp="{}", **changes)


def test_labels_say_whose_it_is_and_hide_the_tenant(folder: RunFolder) -> None:
    """Every label of the design is there, and the tenant's name is not."""
    found = labels(worker_spec(folder, tenant="acme"), "i")
    assert found["gpu-server.instance"] == "i"
    assert found["gpu-server.session"] == "s_1"
    assert found["gpu-server.task"] == "t_1"
    assert found["gpu-server.fence"] == "1"
    assert len(found["gpu-server.tenant"]) == 16
    assert "acme" not in json.dumps(body_of(worker_spec(folder, tenant="acme")))


def test_a_sealed_worker_is_listened_to_by_nobody(folder: RunFolder) -> None:
    """Its output goes nowhere, its memory to no swap and no core file; a label says so to another life."""
    for sealed in (True, False):
        spec = worker_spec(folder, sealed=sealed)
        body = body_of(spec)
        assert (body["AttachStdout"], body["AttachStderr"]) == (not sealed, not sealed)
        assert body["Labels"].get("gpu-server.sealed") == ("yes" if sealed else None)
        host = body["HostConfig"]
        assert host["LogConfig"]["Type"] == "none"
        assert host["MemorySwap"] == host["Memory"]
        assert host["Ulimits"] == [{"Name": "core", "Soft": 0, "Hard": 0}]


def test_the_contracts_names_win_over_the_presets(folder: RunFolder) -> None:
    """A preset adds variables, and cannot move the socket, the input, the model, the home or the GPUs."""
    reserved = (
        "HOME USER LOGNAME GPU_SESSION_ID GPU_WORKER_SOCKET MODEL_PATH TASK_ID TASK_INPUT"
        " NVIDIA_VISIBLE_DEVICES"
    )
    spec = worker_spec(
        folder,
        contract=Contract.EXEC,
        model_path=Path("/fsx/m"),
        env=dict.fromkeys(reserved.split(), "evil") | {"MODEL_ID": "m"},
    )
    assert environment(spec) == {
        "MODEL_ID": "m",
        "HOME": "/tmp",
        "USER": "worker",
        "LOGNAME": "worker",
        "GPU_SESSION_ID": "s_1",
        "GPU_WORKER_SOCKET": "/run/gpu-worker/worker.sock",
        "MODEL_PATH": "/models",
        "TASK_ID": "t_1",
        "TASK_INPUT": "/task/input.json",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }


def test_gpus_are_given_by_uuid_and_never_by_count(folder: RunFolder) -> None:
    """No GPU means no device request at all, since an empty one could mean any."""
    assert body_of(worker_spec(folder))["HostConfig"]["DeviceRequests"] == []
    body = body_of(worker_spec(folder, gpu_uuids=("GPU-a", "GPU-b")))
    (request,) = body["HostConfig"]["DeviceRequests"]
    assert request["DeviceIDs"] == ["GPU-a", "GPU-b"]
    assert "Count" not in request
    assert "NVIDIA_VISIBLE_DEVICES=GPU-a,GPU-b" in body["Env"]


def test_mounts_are_what_the_contract_says(folder: RunFolder) -> None:
    """The share can be written; the task exists for exec workers only, and like the model is read-only."""

    def mounts(spec: WorkerSpec) -> dict[str, bool]:
        return {mount["Target"]: mount["ReadOnly"] for mount in body_of(spec)["HostConfig"]["Mounts"]}

    assert mounts(worker_spec(folder)) == {"/run/gpu-worker": False}
    spec = worker_spec(folder, contract=Contract.EXEC, model_path=Path("/m"))
    assert mounts(spec) == {"/run/gpu-worker": False, "/task": True, "/models": True}


def test_volumes_of_an_image_become_sized_tmpfs(folder: RunFolder) -> None:
    """An image cannot get itself an unbounded folder on the host's disk, nor cover a mount of ours."""
    body = body_of(worker_spec(folder), image_volumes=["/data", "/tmp", "/run/gpu-worker"])
    assert set(body["HostConfig"]["Tmpfs"]) == {"/data", "/tmp", "/dev/mqueue"}
    assert f"size={LIMITS.tmp_size}" in body["HostConfig"]["Tmpfs"]["/data"]


def test_logs_are_kept_for_exec_workers_only_and_bounded(folder: RunFolder) -> None:
    """An http worker's output is never written to disk."""
    assert body_of(worker_spec(folder))["HostConfig"]["LogConfig"]["Type"] == "none"
    kept = body_of(worker_spec(folder, contract=Contract.EXEC))["HostConfig"]["LogConfig"]
    assert kept["Type"] == "json-file"
    assert set(kept["Config"]) == {"max-size", "max-file"}


def test_the_profile_allows_none_of_the_calls_it_is_there_to_stop() -> None:
    """What reaches the enclave, the kernel's riskiest corners or other processes is on no list."""
    profile = json.loads(seccomp_profile())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {
        name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]
    }
    forbidden = (
        "socketcall keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup io_uring_enter"
        " io_uring_register unshare setns clone3 mount umount2 pivot_root ptrace process_vm_readv"
        " open_by_handle_at"
        " kexec_load init_module finit_module delete_module reboot swapon settimeofday syslog acct quotactl"
    )
    assert allowed.isdisjoint(forbidden.split())
    assert not any(arch["subArchitectures"] for arch in profile["archMap"])
    for rule in profile["syscalls"]:
        if "socket" in rule["names"] or "clone" in rule["names"]:
            assert rule["args"], "these two are allowed with conditions only"


async def inside(engine: APIClient, folder: RunFolder, code: str, **changes: Any) -> tuple[str, int]:
    """Run `code` in a worker's container; what it wrote, and its exit code."""
    runtime = DockerRuntime(f"body-{folder.path.parent.parent.name}")
    exits: asyncio.Queue[int] = asyncio.Queue()
    async with asyncio.timeout(60):
        await runtime.open(lambda heard: exits.put_nowait(heard.exit_code))
        try:
            worker = await runtime.create(worker_spec(folder, code, **changes))
            try:
                await runtime.start(worker.name)
                text = b"".join([piece.data async for piece in worker.output])
                return text.decode(), await exits.get()
            finally:
                await runtime.remove(worker.name, grace=0)
                label = f"gpu-server.instance={runtime._instance}"
                assert engine.containers(all=True, filters={"label": label}) == []
        finally:
            await runtime.close()


LOOK_AROUND = """
import json, os, subprocess, resource
def can(act):
    try: act()
    except OSError as error: return error.strerror
    return True
def status(key):
    return [l.split()[1] for l in open("/proc/self/status") if l.startswith(key + ":")][0]
def mount(path):
    return [l.split()[3] for l in open("/proc/mounts") if l.split()[1] == path]
def fill():
    with open("/tmp/fill", "wb") as f: f.write(b"x" * (20 << 20))
def script():
    open("/tmp/x", "w").write("#!/bin/sh\\nexit 0"); os.chmod("/tmp/x", 0o755); subprocess.run(["/tmp/x"])
print(json.dumps({
    "uid": os.getresuid() + os.getresgid(), "groups": os.getgroups(),
    "caps": [status(k) for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": status("NoNewPrivs"), "seccomp": status("Seccomp"),
    "root": can(lambda: open("/x", "w")), "home": can(lambda: open(os.path.expanduser("~/x"), "w")),
    "tmp": mount("/tmp")[0], "script": can(script), "fill": can(fill),
    "share": can(lambda: open("/run/gpu-worker/x", "w")),
    "model": can(lambda: open("/models/x", "w")), "model_read": open("/models/weights").read(),
    "task": can(lambda: open("/task/input.json", "w")),
    "task_read": json.load(open(os.environ["TASK_INPUT"])),
    "core": resource.getrlimit(resource.RLIMIT_CORE), "links": os.listdir("/sys/class/net"),
    "init": open("/proc/1/cmdline").read(), "engine": os.path.exists("/var/run/docker.sock"),
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "user": [os.environ[k] for k in ("HOME", "USER", "LOGNAME")], "host": os.uname().nodename,
}))
"""


@pytest.mark.docker
async def test_a_worker_finds_itself_locked_in(
    docker_engine: APIClient, folder: RunFolder, tmp_path: Path
) -> None:
    """From inside: no privileges, no network, no place to write but the share and a small /tmp."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("w")
    model.chmod(0o777)
    text, code = await inside(docker_engine, folder, LOOK_AROUND, contract=Contract.EXEC, model_path=model)
    assert code == 0, text
    found = json.loads(text)
    assert found["uid"] == [TEST_UID] * 6
    assert set(found["groups"]) <= {TEST_UID}
    assert found["caps"] == ["0" * 16] * 5
    assert (found["no_new_privs"], found["seccomp"]) == ("1", "2")
    assert found["root"] == "Read-only file system"
    assert found["home"] is True
    assert {"nosuid", "nodev", "noexec"} <= set(found["tmp"].split(","))
    assert found["script"] == "Permission denied"
    assert found["fill"] == "No space left on device"
    assert found["share"] is True
    assert found["model"] == "Read-only file system"
    assert found["model_read"] == "w"
    assert found["task"] in {"Read-only file system", "Permission denied"}
    assert found["task_read"] == {"metadata": {}}
    assert found["core"] == [0, 0]
    assert found["links"] == ["lo"]
    assert "init" in found["init"]
    assert found["engine"] is False
    assert found["shm"] == LIMITS.shm_size
    assert found["user"] == ["/tmp", "worker", "worker"]
    assert found["host"] == "worker"


SOCKETS = """
import ctypes, errno, json, os, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
def raw(domain, kind):
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_ulong(domain), ctypes.c_long(kind), ctypes.c_long(0))
    return "open" if fd >= 0 else errno.errorcode[ctypes.get_errno()]
above = 1 << 32
print(json.dumps({
    "unix": raw(socket.AF_UNIX, 1), "inet": raw(socket.AF_INET, 1), "inet6": raw(socket.AF_INET6, 1),
    "netlink": raw(socket.AF_NETLINK, 3), "vsock": raw(40, 1), "vsock_dgram": raw(40, 2), "alg": raw(38, 5),
    "packet": raw(17, 3), "vsock_above": raw(above | 40, 1), "alg_above": raw(above | 38, 5),
}))
"""


@pytest.mark.docker
async def test_no_worker_opens_a_socket_to_the_enclave(docker_engine: APIClient, folder: RunFolder) -> None:
    """AF_VSOCK and AF_ALG are EPERM, also with bits that the kernel ignores; ordinary sockets work."""
    text, code = await inside(docker_engine, folder, SOCKETS)
    assert code == 0, text
    found = json.loads(text)
    allowed = {"unix", "inet", "inet6", "netlink"}
    assert {name for name, result in found.items() if result == "open"} >= allowed - {"inet6"}
    assert {result for name, result in found.items() if name not in allowed} == {"EPERM"}


INT80 = """
import ctypes, mmap, platform, struct, sys
if platform.machine() != "x86_64":
    sys.exit(0)
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, prot=7)  # MAP_32BIT
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
page[256:268] = struct.pack("<III", 40, 1, 0)
# push rbx; mov eax, socketcall; mov ebx, SYS_SOCKET; mov ecx, arguments; int 0x80; pop rbx; ret
word = lambda number: struct.pack("<I", number)
code = (b"\\x53\\xb8" + word(102) + b"\\xbb" + word(1) + b"\\xb9" + word(address + 256)
    + b"\\xcd\\x80\\x5b\\xc3")
page[0:len(code)] = code
sys.exit(1 if ctypes.CFUNCTYPE(ctypes.c_int)(address)() >= 0 else 0)
"""


@pytest.mark.docker
async def test_no_32_bit_call_goes_round_the_filter(docker_engine: APIClient, folder: RunFolder) -> None:
    """`socketcall` by int 0x80, which hides the family behind a pointer, opens nothing."""
    _, code = await inside(docker_engine, folder, INT80)
    assert code in {0, 128 + 31, 128 + 11}


FORBIDDEN = """
import ctypes, errno, json, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
x86 = {"ptrace": 101, "unshare": 272, "mount": 165, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
       "userfaultfd": 323, "io_uring_setup": 425, "clone3": 435, "setns": 308, "add_key": 248}
arm = {"ptrace": 117, "unshare": 97, "mount": 40, "keyctl": 219, "bpf": 280, "perf_event_open": 241,
       "userfaultfd": 282, "io_uring_setup": 425, "clone3": 435, "setns": 268, "add_key": 217}
found = {}
for name, number in (x86 if platform.machine() == "x86_64" else arm).items():
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(0)] * 5)
    found[name] = "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
CLONE = 56 if platform.machine() == "x86_64" else 220
result = libc.syscall(ctypes.c_long(CLONE), ctypes.c_long(0x10000000 | 17), *[ctypes.c_long(0)] * 4)
found["clone_newuser"] = "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
print(json.dumps(found))
"""


@pytest.mark.docker
async def test_the_kernels_risky_corners_are_closed(docker_engine: APIClient, folder: RunFolder) -> None:
    """Namespaces, tracing, keys, BPF and io_uring answer EPERM; clone3 ENOSYS, so that libc falls back."""
    text, code = await inside(docker_engine, folder, FORBIDDEN)
    assert code == 0, text
    found = json.loads(text)
    assert found.pop("clone3") == "ENOSYS"
    assert set(found.values()) == {"EPERM"}


@pytest.mark.docker
async def test_a_setuid_program_gives_nothing(docker_engine: APIClient, folder: RunFolder) -> None:
    """A setuid-root program of the image, or one that the worker makes in its share, runs as the worker."""
    code = """
import os, shutil, subprocess
for path in ("/tmp/id", "/run/gpu-worker/id"):
    shutil.copy("/usr/bin/id", path); os.chmod(path, 0o6755)
setuid = [p for p in ("/bin/su", "/usr/bin/su", "/usr/bin/passwd", "/bin/mount") if os.path.exists(p)]
print(subprocess.run(["/run/gpu-worker/id", "-u"], capture_output=True, text=True).stdout.strip())
print(subprocess.run(["su", "-c", "id -u"], capture_output=True, stdin=subprocess.DEVNULL).returncode != 0)
"""
    text, _ = await inside(docker_engine, folder, code)
    assert text.split() == [str(TEST_UID), "True"]
