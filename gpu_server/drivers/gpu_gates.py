"""The gates of a GPU: what has to be true of it, by NVML and the kernel's log, before it is leased again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.clock import boot_id
from gpu_server.drivers.kernel_log import KMSG, KernelLog, read_kernel_log
from gpu_server.drivers.nvml import Nvml, NvmlUnusable
from gpu_server.ports import Clock, Dirty, WashUnreachable
from gpu_server.sealed.wash import Figures

T = TypeVar("T")

PATIENCE_SECONDS: Final = 10.0
"""How long a process may take to vanish, and its memory to come back, after it has ended. NVIDIA names no
time; Meta's GCM looks three times, three seconds apart."""
PAUSE_SECONDS: Final = 0.1
TOLERANCE_BYTES: Final = 32 << 20
"""What an idle device's use of memory may vary by. NVIDIA names no figure; GCM allows an idle device 15 MiB
in all."""
APPLICATION_XIDS: Final = frozenset({11, 13, 25, 31, 37, 43, 45, 68, 69, 137, 154})
"""XIDs that a program brings about, or its sudden end: with those a tenant could lock every GPU away, so they
are counted, and nothing more.

By NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html) 13, 31, 43, 45 and 137
are faults of an application, or logged when it is killed; after 11, 25, 37 and 69 at most the application is
started again, and it is what to look at (CHECK_APP/CUDA). 68, of the video decoder, is passed over by
NVIDIA's k8s-device-plugin too. 154 only announces the recovery action, which NVML is asked for; behind a
reset it says that there is none.

All others count as the GPU's. Among them are 32 (the same advice, but "generally not caused by user
application actions"), 94 (a contained memory error), and 109, which that plugin passes over, and after which
the catalogue wants a reset.
"""
FILE: Final = "gpus.json"

# What an idle device may use at most, or it was not idle when that was first measured: less than a context of
# CUDA alone. An older driver counts what it keeps for itself too, which is a share of the memory.
_IDLE_BYTES: Final = 256 << 20
_IDLE_SHARE: Final = 20
_ACTIONS: Final = {
    0: "none",
    1: "gpu reset",
    2: "node reboot",
    3: "drain p2p",
    4: "drain and reset",
    5: "recover imex domain",
    6: "bus reset",
    7: "system reboot",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Of one GPU in this boot: bytes in use when nobody uses it, and the last record of the kernel's log when
    it passed."""

    idle: int
    sequence: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    processes: int
    used: int
    idle_limit: int
    fault: str | None
    action: str
    place: tuple[int, int, int]


class NvmlGates:
    """`GpuGates` over NVML; what has to be known from wash to wash is in `state_dir`/gpus.json, and counts
    for this boot alone.

    `nvml` is the module to use, `pynvml` unless given. Processes that NVML cannot see, those of other PID
    namespaces where the service runs in a container, still show by the memory that they use.
    """

    def __init__(
        self,
        state_dir: Path,
        clock: Clock,
        *,
        nvml: Any = None,
        kmsg: Path = KMSG,
        boot: str | None = None,
        patience: float = PATIENCE_SECONDS,
        call_timeout: float = 10.0,
    ) -> None:
        self._path, self._clock, self._kmsg = state_dir / FILE, clock, kmsg
        self._boot = boot_id() if boot is None else boot
        self._patience = patience
        self._nvml = Nvml(nvml, limit=call_timeout)
        self._one_by_one = asyncio.Lock()
        self._known: dict[str, _Known] | None = None
        self._told: dict[str, int] = {}
        """UUID -> the last record of the log that a wash has failed for: the next wash is an operator's."""

    async def before(self, spec: SlotSpec) -> None:
        """See the port."""
        await self._settled(spec, self._in_use)

    async def check(self, spec: SlotSpec) -> Figures:
        """See the port. The kernel's log is read from where it ended when the GPU last passed."""
        known = (await self._call(self._load)).get(spec.uuid)

        def unsettled(seen: _Seen) -> str | None:
            return self._in_use(seen) or _not_idle(seen, known)

        seen = await self._settled(spec, unsettled)
        if seen.fault is not None:
            raise Dirty(seen.fault)
        if seen.action not in ("none", "unknown"):
            raise Dirty(f"the GPU's driver asks for a recovery: {seen.action}")
        log = await self._call(lambda: read_kernel_log(self._kmsg))
        since = known.sequence if known else -1
        xids = self._new_xids(spec, seen, log, since)
        idle = min(seen.used, known.idle) if known else seen.used
        sequence = since if log is None else log.last
        await self._call(lambda: self._remember(spec.uuid, _Known(idle=idle, sequence=sequence)))
        return {
            "processes": seen.processes,
            "memory_used": seen.used,
            "memory_idle": idle,
            "recovery_action": seen.action,
            "kernel_log": "unreadable" if log is None else "gap" if log.first > since + 1 else "read",
            "xids": xids,
        }

    # -- judging ------------------------------------------------------------------------------------------

    async def _settled(self, spec: SlotSpec, unsettled: Callable[[_Seen], str | None]) -> _Seen:
        """What is seen as soon as nothing is unsettled. Raises `Dirty` with what is, after some patience."""
        give_up_at = self._clock.now() + self._patience
        while True:
            seen = await self._call(lambda: self._look(spec))
            why = unsettled(seen)
            if why is None:
                return seen
            if self._clock.now() >= give_up_at:
                raise Dirty(why)
            await self._clock.sleep_until(self._clock.now() + PAUSE_SECONDS)

    @staticmethod
    def _in_use(seen: _Seen) -> str | None:
        return f"{seen.processes} processes use the GPU" if seen.processes else None

    def _new_xids(self, spec: SlotSpec, seen: _Seen, log: KernelLog | None, since: int) -> int:
        """How many XIDs of programs the log has since then. Raises `Dirty` for others."""
        if log is None:
            return 0
        new = [xid for xid in log.xids if xid.sequence > since and xid.place == seen.place]
        told = max(since, self._told.get(spec.uuid, -1))
        for xid in new:
            if xid.number not in APPLICATION_XIDS and xid.sequence > told:
                self._told[spec.uuid] = log.last
                raise Dirty(f"the GPU's driver has reported XID {xid.number}")
        return len(new)

    # -- in NVML's thread ---------------------------------------------------------------------------------

    async def _call(self, do: Callable[[], T]) -> T:
        """One call at a time, however many slots are being washed."""
        async with self._one_by_one:
            try:
                return await self._nvml.call(do)
            except TimeoutError as error:
                raise WashUnreachable(self._nvml.silence) from error
            except NvmlUnusable as error:
                raise WashUnreachable(str(error)) from error
            except OSError as error:
                raise WashUnreachable(f"{FILE} cannot be used: {error.strerror}") from error

    def _look(self, spec: SlotSpec) -> _Seen:
        nvml = self._nvml.start()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(spec.uuid)
            used, idle_limit = self._memory(handle)
            pci = nvml.nvmlDeviceGetPciInfo(handle)
            errors = self._nvml.uncorrected_errors(handle)
            ecc = f"{errors} uncorrected ECC errors since the driver was loaded" if errors else None
            return _Seen(
                processes=self._processes(handle),
                used=used,
                idle_limit=idle_limit,
                fault=ecc or self._nvml.row_fault(handle),
                action=self._action(handle),
                place=(pci.domain, pci.bus, pci.device),
            )
        except nvml.NVMLError_GpuIsLost as error:
            raise Dirty(f"the GPU is lost: {error}") from error
        except nvml.NVMLError as error:
            raise WashUnreachable(f"the GPU cannot be read: {error}") from error

    def _processes(self, handle: object) -> int:
        """Raises NVMLError where not even the list of computing processes is to be had."""
        nvml = self._nvml.module
        found = len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        for more in (
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
            nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        ):
            with contextlib.suppress(nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
                found += len(more(handle))
        return found

    def _memory(self, handle: object) -> tuple[int, int]:
        """Bytes in use, and what may be at most while nobody uses it. What the driver keeps for itself is not
        in use, where it tells."""
        nvml = self._nvml.module
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_ArgumentVersionMismatch,
        ):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return int(memory.used), int(memory.total) // _IDLE_SHARE + _IDLE_BYTES
        return int(memory.used), _IDLE_BYTES

    def _action(self, handle: object) -> str:
        """What the driver says has to be done to the GPU; "unknown" where it does not say."""
        nvml = self._nvml.module
        try:
            (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_InvalidArgument,
        ):
            return "unknown"
        if field.nvmlReturn != nvml.NVML_SUCCESS:
            return "unknown"
        number = int(field.value.uiVal)
        return _ACTIONS.get(number, f"number {number}")

    # -- the file -----------------------------------------------------------------------------------------

    def _load(self) -> dict[str, _Known]:
        """What is known of the GPUs in this boot; nothing where the file says nothing that fits."""
        if self._known is None:
            self._known = {}
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
                read = json.loads(self._path.read_bytes())
                if self._boot and read["boot_id"] == self._boot:
                    self._known = {uuid: _known(**known) for uuid, known in read["gpus"].items()}
        return self._known

    def _remember(self, uuid: str, known: _Known) -> None:
        gpus = {**self._load(), uuid: known}
        draft = self._path.with_name(f"{FILE}.new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(
                {"boot_id": self._boot, "gpus": {name: asdict(each) for name, each in gpus.items()}}, file
            )
        # It need not outlive a power cut: that is another boot.
        os.replace(draft, self._path)
        self._known = gpus


def _known(*, idle: object, sequence: object) -> _Known:
    if type(idle) is not int or type(sequence) is not int:
        raise TypeError
    return _Known(idle=idle, sequence=sequence)


def _not_idle(seen: _Seen, known: _Known | None) -> str | None:
    """Why this is more memory than an idle device uses."""
    limit = seen.idle_limit if known is None else known.idle + TOLERANCE_BYTES
    if seen.used <= limit:
        return None
    return f"{seen.used >> 20} MiB of the GPU are in use, and when it is idle {limit >> 20} at most"
