"""A search of this machine for some bytes that a worker has left: independent of what removes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SHARED = ("/tmp", "/var/tmp", "/dev/shm")
_DEPTH = "3"
_CORES = ("/var/lib/systemd/coredump", "/var/lib/apport/coredump", "/var/crash")
_LARGEST_MAPPING = 64 << 20

# Reads the SysV objects and message queues of the IPC namespace that it runs in, without changing them.
_IPC = """
import ctypes, os, sys
libc, canary = ctypes.CDLL(None), sys.argv[1]
libc.shmat.restype = ctypes.c_void_p
def rows(kind):
    head, *rows = open(f"/proc/sysvipc/{kind}").read().splitlines()
    return [dict(zip(head.split(), map(int, row.split()))) for row in rows]
found = 0
for row in rows("shm"):
    at = libc.shmat(row["shmid"], None, 0o10000)
    if at not in (None, 2**64 - 1):
        found += canary.encode() in ctypes.string_at(at, min(row["size"], 1 << 20))
        libc.shmdt(ctypes.c_void_p(at))
print("sysv shared memory", found)
print("sysv semaphores", sum(row["key"] == int(canary[:7], 16) for row in rows("sem")))
found = 0
for row in rows("msg"):
    message = ctypes.create_string_buffer(8 + 1024)
    size = libc.msgrcv(row["msqid"], message, 1024, ctypes.c_long(0), 0o40000 | 0o4000 | 0o10000)
    found += size > 0 and canary.encode() in message.raw
print("sysv messages", found)
assert libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
assert libc.mount(b"none", b"/mnt", b"mqueue", 0, None) == 0
print("message queues", sum(canary in name for name in os.listdir("/mnt")))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Looks for `canary` (hexadecimal digits).

    `folders` are searched whole; folders that are open to all for what belongs to `uid`; the memory of
    processes that run as `uid`, have `mark` as an entry of their environment, or are in a control group
    with `container` in its name; and what the namespaces of these processes hold, if `inside`.
    """

    canary: str
    uid: int
    mark: str
    folders: dict[str, Path]
    container: str | None = None

    def found(self, *, inside: bool = False) -> dict[str, int]:
        """Place -> how often it was found there; places without it are left out."""
        count: Counter[str] = Counter()
        for name, folder in self.folders.items():
            count[name] += self._in_folder(folder)
        for place in _CORES:
            count[place] += self._in_folder(Path(place))
        owned = subprocess.run(
            ["find", *_SHARED, "-maxdepth", _DEPTH, "-uid", str(self.uid), "-print0"],
            capture_output=True,
            check=False,  # others' files go away meanwhile
        ).stdout.split(b"\0")
        for path in map(Path, map(os.fsdecode, filter(None, owned))):
            if any(path.is_relative_to(folder) for folder in self.folders.values()):
                continue
            place = next(shared for shared in _SHARED if path.is_relative_to(shared))
            count[place] += self._in_file(path)
        count.update(self._in_ipc())
        for pid, place in self._processes():
            count[place] += self._in_memory(pid)
        if inside:
            count.update(self._inside())
        return {place: number for place, number in count.items() if number}

    def _in_folder(self, folder: Path) -> int:
        return sum(
            self._in_file(Path(here, name))
            for here, folders, files in os.walk(folder)
            for name in (*folders, *files)
        )

    def _in_file(self, path: Path) -> int:
        found = self.canary in path.name
        with suppress(OSError):
            if path.is_symlink():
                found = found or self.canary in os.readlink(path)
            elif path.is_file():
                found = found or self.canary.encode() in path.read_bytes()
        return int(found)

    def _in_ipc(self, *enter: str) -> Counter[str]:
        said = subprocess.run(
            [*enter, sys.executable, "-S", "-c", _IPC, self.canary],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return Counter(
            {place: int(n) for place, _, n in (line.rpartition(" ") for line in said.splitlines())}
        )

    def _processes(self) -> Iterator[tuple[int, str]]:
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            with suppress(OSError):
                if self.mark.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    yield int(name), "memory, by environment"
                    continue
                # Not the owner of its folder: that is root while a process may not be dumped.
                if f"\nUid:\t{self.uid}\t" in Path("/proc", name, "status").read_text():
                    yield int(name), "memory, by uid"
                    continue
                if self.container is not None and self.container in Path("/proc", name, "cgroup").read_text():
                    yield int(name), "memory, by control group"

    def _in_memory(self, pid: int) -> int:
        with suppress(OSError), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                span, mode, *_ = line.split()
                start, end = (int(at, 16) for at in span.split("-"))
                if not mode.startswith("rw") or end - start > _LARGEST_MAPPING:
                    continue
                with suppress(OSError):
                    memory.seek(start)
                    if self.canary.encode() in memory.read(end - start):
                        return 1
        return 0

    def _inside(self) -> Counter[str]:
        """What a container's own namespaces hold, by its processes: its mounts, and its IPC."""
        count: Counter[str] = Counter()
        for pid, how in self._processes():
            if how != "memory, by uid":
                continue
            for folder in ("tmp", "data", "dev/shm", "var/tmp"):
                count[f"inside /{folder}"] = self._in_folder(Path(f"/proc/{pid}/root/{folder}"))
            ipc = self._in_ipc("nsenter", f"--ipc=/proc/{pid}/ns/ipc")
            count.update({f"inside {place}": number for place, number in ipc.items()})
            break
        return count
