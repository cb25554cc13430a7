"""A worker that means harm. HOSTILE_MODE says how.

Standard library only and no SDK, so that nothing it does wrong is prevented by accident. In every mode
that serves, `/health` answers as the contract wants unless the mode says otherwise. What the modes do:

- `probe`: honest; a task looks around from the inside and reports in one `text` event, as JSON
  (`look_around`)
- before or instead of serving: `exit` (prints to stderr, exits 3), `never_ready` (loading for ever),
  `no_socket`, `symlink` (the socket is a link to HOSTILE_TARGET, /etc/passwd by default), `folder` (the
  socket is a folder), `flood` (puts HOSTILE_FLOOD bytes in the run folder, 8 MiB by default),
  `many_files` (5000 files and folders, nested), `wrong_session` (another session's id), `slow_header`
  (accepts and never answers), `endless_health`
- on a task: `endless_frame`, `bad_ids` (1, 2, 4), `bad_event` (forges `task_finish`), `no_end` (closes
  without `end`), `fork_bomb`, `memory_bomb`

The two bombs, and the parts of `probe` that try privileged calls, walk the file system or fork many
times, work only if HOSTILE_IMAGE=1, which the Dockerfile of this folder sets and nothing else may, and
never as root. Elsewhere the machine is somebody's: as root outside a container, an attempt that should
fail succeeds. (/.dockerenv is no proof: machines made from container images have it too.) What works
nevertheless is undone at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import re
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

MODE = os.environ.get("HOSTILE_MODE", "probe")
SOCKET = Path(os.environ.get("GPU_WORKER_SOCKET", "/run/gpu-worker/worker.sock"))
SESSION = os.environ.get("GPU_SESSION_ID")
MAY_HARM = os.environ.get("HOSTILE_IMAGE") == "1" and os.getuid() != 0
KIB64 = b"a" * 65536

# -- a tiny HTTP server -----------------------------------------------------------------------------------


def serve() -> None:
    beside = SOCKET.with_name("worker.sock~")
    beside.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(beside))
    listener.listen(128)
    beside.rename(SOCKET)
    held = []
    while True:
        connection, _ = listener.accept()
        if MODE == "slow_header":
            held.append(connection)
        else:
            threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    """One request, one answer, close."""
    with connection, contextlib.suppress(OSError):
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length:\s*(\d+)", head)
        while length and len(body) < int(length[1]):
            body += connection.recv(65536)
        method, target, _ = head.split(b"\r\n")[0].decode("latin-1").split(" ")
        if target == "/health":
            health(connection)
        elif method == "POST" or target.partition("?")[0].endswith("/events"):
            connection.sendall(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
            )
            for data in task():
                connection.sendall(data)
        else:
            connection.sendall(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


def health(connection: socket.socket) -> None:
    if MODE == "endless_health":
        connection.sendall(
            b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{"a":"'
        )
        while True:
            connection.sendall(KIB64)
    body = json.dumps(
        {
            "status": "loading" if MODE == "never_ready" else "ready",
            "session_id": "s_00000000000000000000000000" if MODE == "wrong_session" else SESSION,
            "progress": None,
            "message": None,
        }
    ).encode()
    length = b"content-length: %d\r\n\r\n" % len(body)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
    connection.sendall(head + length + body)


def frame(number: int, event: str, data: object) -> bytes:
    return f"id: {number}\nevent: {event}\ndata: {json.dumps(data)}\n\n".encode()


def task() -> Iterator[bytes]:
    """The bytes of a task's stream."""
    if MODE == "endless_frame":
        yield b'id: 1\nevent: text_delta\ndata: {"delta":"'
        while True:
            yield KIB64
    if MODE == "bad_ids":
        for number in (1, 2, 4):
            yield frame(number, "text_delta", {"delta": str(number)})
        yield frame(5, "end", {"status": "completed"})
    elif MODE == "bad_event":
        yield frame(1, "text_delta", {"delta": "a"})
        yield frame(2, "task_finish", {"status": "completed", "elapsed_seconds": 0})
        yield frame(3, "end", {"status": "completed"})
    elif MODE == "no_end":
        yield frame(1, "text_delta", {"delta": "a"})
    elif MODE in ("fork_bomb", "memory_bomb"):
        yield frame(1, "text", {"text": "going off"})
        fork_bomb() if MODE == "fork_bomb" else memory_bomb()
    else:
        yield frame(1, "text", {"text": json.dumps(look_around()) if MODE == "probe" else MODE})
        yield frame(2, "end", {"status": "completed"})


# -- harm -------------------------------------------------------------------------------------------------


def fork_bomb() -> None:
    while True:
        with contextlib.suppress(OSError):
            os.fork()


def memory_bomb() -> None:
    hoard = []
    while True:
        hoard.append(b"\xff" * (64 << 20))


def flood() -> None:
    with (SOCKET.parent / "flood").open("wb") as file:
        for _ in range(0, int(os.environ.get("HOSTILE_FLOOD", 8 << 20)), len(KIB64)):
            file.write(KIB64)


def many_files() -> None:
    folder = SOCKET.parent
    for number in range(2500):
        if number % 50 == 0:
            folder = SOCKET.parent / f"deep{number}"
        folder = folder / "d"
        folder.mkdir(parents=True)
        (folder / "f").touch()


def wait() -> None:
    while True:
        signal.pause()


# -- the look around --------------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)
# Numbers for x86_64 and aarch64.
SYSCALLS = {
    "keyctl": (250, 219, (0, -3, 0)),
    "add_key": (248, 217, (0, 0, 0, 0, -3)),
    "bpf": (321, 280, (0, 0, 0)),
    "perf_event_open": (298, 241, (0, 0, -1, -1, 0)),
    "userfaultfd": (323, 282, (0,)),
    "io_uring_setup": (425, 425, (1, 0)),
    "open_by_handle_at": (304, 265, (-1, 0, 0)),
    "init_module": (175, 105, (0, 0, 0)),
    "kexec_load": (246, 104, (0, 0, 0, -1)),
    "pivot_root": (155, 41, (0, 0)),
    "setns": (308, 268, (-1, 0)),
}


def name_of(number: int) -> str:
    return "ok" if number == 0 else errno.errorcode.get(number, str(number))


def outcome(attempt: Callable[[], object]) -> str:
    """ "ok", or the name of the errno."""
    try:
        attempt()
    except OSError as error:
        return name_of(error.errno) if error.errno else type(error).__name__
    return "ok"


def in_child(call: Callable[[], int]) -> str:
    """The outcome of a libc call (-1 and errno), in a child because it might work."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.set_errno(0)
        os.write(writing, name_of(ctypes.get_errno() if call() < 0 else 0).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said or f"killed by signal {os.WTERMSIG(status)}"


def look_around() -> dict[str, object]:
    """Everything a tenant's code can find out, or do, from here. Outcomes are "ok" or an errno's name."""
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    return {
        "may_harm": MAY_HARM,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "capabilities": {
            kind: status[kind].strip() for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        },
        "no_new_privs": int(status["NoNewPrivs"]),
        "seccomp": int(status["Seccomp"]),
        "interfaces": [name for _, name in socket.if_nameindex() if name != "lo"],
        "connect_out": outcome(connect_out),
        "resolve": resolve(),
        "sockets": {
            name: outcome(lambda f=family, k=kind: socket.socket(f, k).close())
            for name, family, kind in (
                ("AF_VSOCK", 40, socket.SOCK_STREAM),
                ("AF_ALG", 38, socket.SOCK_SEQPACKET),
                ("AF_PACKET", 17, socket.SOCK_RAW),
                ("AF_NETLINK", 16, socket.SOCK_RAW),
                ("AF_INET_RAW", 2, socket.SOCK_RAW),
            )
        },
        "syscalls": syscalls() if MAY_HARM else None,
        "writable": writable_folders() if MAY_HARM else None,
        "mounts": [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()],
        "siblings": listing(SOCKET.parent.parent),
        "own_folder": listing(SOCKET.parent),
        "docker_socket": [
            name for name in ("/var/run/docker.sock", "/run/docker.sock") if Path(name).exists()
        ],
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()),
        "forks": count_forks() if MAY_HARM else None,
        "environment": sorted(os.environ),
        "home": os.environ.get("HOME"),
        "devices": listing(Path("/dev")),
        "block_devices": [name for name in listing(Path("/dev")) if is_block_device(Path("/dev") / name)],
        "readable": {
            name: readable(Path(name))
            for name in ("/proc/kcore", "/proc/keys", "/proc/1/environ", "/dev/mem")
        },
        "sysctl_write": opens_for_writing("/proc/sys/kernel/core_pattern") if MAY_HARM else None,
        "sysrq_write": opens_for_writing("/proc/sysrq-trigger") if MAY_HARM else None,
        "cgroup": cgroup(),
        "cgroup_write": outcome(try_cgroup) if MAY_HARM else None,
        "setuid_files": setuid_files() if MAY_HARM else None,
        "sees_init": os.readlink("/proc/1/exe")
        if outcome(lambda: os.readlink("/proc/1/exe")) == "ok"
        else None,
    }


def try_cgroup() -> None:
    folder = Path("/sys/fs/cgroup/hostile")
    folder.mkdir()
    folder.rmdir()


def opens_for_writing(name: str) -> str:
    return outcome(lambda: os.close(os.open(name, os.O_WRONLY)))


def connect_out() -> None:
    socket.create_connection(("1.1.1.1", 53), timeout=0.3).close()


def resolve() -> str:
    """In a child with a deadline: a resolver may try for long."""

    def attempt() -> int:
        signal.alarm(2)
        try:
            socket.getaddrinfo("example.com", 443)
        except OSError:
            ctypes.set_errno(errno.EHOSTUNREACH)
            return -1
        return 0

    return in_child(attempt)


def syscalls() -> dict[str, str]:
    column = 1 if platform.machine() == "aarch64" else 0
    report = {
        name: in_child(lambda n=entry[column], a=entry[2]: libc.syscall(n, *map(ctypes.c_long, a)))
        for name, entry in SYSCALLS.items()
    }
    report["mount"] = in_child(try_mount)
    report["umount"] = in_child(lambda: libc.umount2(b"/no/such/mount", 0))
    report["unshare_user"] = in_child(lambda: libc.unshare(0x10000000))
    report["unshare_net"] = in_child(lambda: libc.unshare(0x40000000))
    report["ptrace_init"] = in_child(lambda: libc.ptrace(0x4206, 1, None, None))
    report["setuid_root"] = in_child(lambda: libc.setuid(0))
    report["chroot"] = in_child(lambda: libc.chroot(b"/"))
    report["mknod_block"] = in_child(try_mknod)
    return report


def try_mount() -> int:
    """On a folder made for it, so that nothing is covered where it works."""
    target = tempfile.mkdtemp().encode()
    result: int = libc.mount(b"none", target, b"tmpfs", 0, None)
    failed_with = ctypes.get_errno()
    if result == 0:
        libc.umount2(target, 2)
    os.rmdir(target)
    ctypes.set_errno(failed_with)
    return result


def try_mknod() -> int:
    path = os.path.join(tempfile.gettempdir(), f"hostile-{os.getpid()}").encode()
    result: int = libc.mknod(path, stat.S_IFBLK | 0o600, ctypes.c_ulong(0x800))
    failed_with = ctypes.get_errno()
    if result == 0:
        os.unlink(path)
    ctypes.set_errno(failed_with)
    return result


def writable_folders(most: int = 50_000) -> list[str]:
    """Every folder in which a file can be created, /proc and /sys aside."""
    found = []
    for count, (folder, below, _) in enumerate(os.walk("/")):
        if folder == "/":
            below[:] = [name for name in below if name not in ("proc", "sys")]
        if count >= most:
            found.append("...")
            break
        name = os.path.join(folder, ".hostile")
        with contextlib.suppress(OSError):
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.unlink(name)
            found.append(folder)
    return found


def setuid_files() -> list[str]:
    found = []
    for folder, below, names in os.walk("/"):
        if folder == "/":
            below[:] = [name for name in below if name not in ("proc", "sys")]
        for name in names:
            with contextlib.suppress(OSError):
                mode = os.lstat(os.path.join(folder, name)).st_mode
                if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                    found.append(os.path.join(folder, name))
    return found


def count_forks(most: int = 2000) -> int:
    """How many children could be started (up to `most`); all are gone afterwards."""
    children = []
    try:
        while len(children) < most:
            child = os.fork()
            if child == 0:
                libc.prctl(1, signal.SIGKILL)
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    return len(children)


def listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        return [f"({name_of(error.errno or 0)})"]


def is_block_device(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(path.lstat().st_mode)
    return False


def readable(path: Path) -> str:
    def attempt() -> None:
        with path.open("rb") as file:
            file.read(1)

    return outcome(attempt)


def cgroup() -> dict[str, str]:
    """The limits, where the cgroup tree can be seen (v2 first, then v1's names)."""
    report = {}
    for name in (
        "memory.max",
        "memory.swap.max",
        "pids.max",
        "cpu.max",
        "memory/memory.limit_in_bytes",
        "memory/memory.memsw.limit_in_bytes",
        "pids/pids.max",
        "cpu/cpu.cfs_quota_us",
        "cpu/cpu.cfs_period_us",
    ):
        with contextlib.suppress(OSError):
            report[name] = (Path("/sys/fs/cgroup") / name).read_text().strip()
    return report


# -- start ------------------------------------------------------------------------------------------------


def main() -> None:
    if MODE.endswith("_bomb") and not MAY_HARM:
        sys.exit(f"{MODE} runs in the hostile image only, and not as root")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if MODE == "exit":
        print("this worker gives up at once", file=sys.stderr, flush=True)
        os._exit(3)
    elif MODE == "no_socket":
        wait()
    elif MODE == "symlink":
        SOCKET.symlink_to(os.environ.get("HOSTILE_TARGET", "/etc/passwd"))
        wait()
    elif MODE == "folder":
        SOCKET.mkdir()
        wait()
    elif MODE == "flood":
        flood()
    elif MODE == "many_files":
        many_files()
    serve()


if __name__ == "__main__":
    main()
