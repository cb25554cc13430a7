"""The devices of this machine: GPUs from NVML, or CPU stand-ins where there is certainly no GPU."""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from gpu_server.core.slots import BOTH_TIERS, SlotSpec, Tier
from gpu_server.drivers.blocking import call_in_thread
from gpu_server.ports import InventoryError, SlotInventory, SlotReading

T = TypeVar("T")

_MIB: Final = 1024 * 1024


class CpuInventory:
    """`count` stand-ins without a device, for machines without a GPU.

    `tiers` names a slot "cpu0" or just "0". Their UUIDs stay the same for a `host`,
    which is this machine's name unless given.
    """

    def __init__(self, count: int, tiers: Mapping[str, Tier], host: str | None = None) -> None:
        self._count = count
        self._tiers = tiers
        self._host = hashlib.sha256((host or socket.gethostname()).encode()).hexdigest()[:12]

    async def discover(self) -> tuple[SlotSpec, ...]:
        """The stand-ins, always the same."""
        return tuple(
            SlotSpec(
                id=f"cpu{index}",
                uuid=f"CPU-{self._host}-{index}",
                name="CPU stand-in",
                memory_mb=0,
                is_gpu=False,
                tiers=_tiers_of(self._tiers, f"cpu{index}", str(index)),
            )
            for index in range(self._count)
        )

    async def readings(self) -> Mapping[str, SlotReading]:
        """Stand-ins have no memory of their own and are never at fault."""
        return {f"cpu{index}": SlotReading(memory_used_mb=0, fault=None) for index in range(self._count)}


class NvmlInventory:
    """GPUs by NVML. A slot's id is the device's index as text.

    `device_ids` limits the devices, by index or UUID (None: all), and `tiers` uses the same names. Calls run
    in a thread and are given up after `call_timeout` seconds: a driver in trouble may hang for good.
    `nvml` is the module to use, `pynvml` unless given.
    """

    def __init__(
        self,
        device_ids: tuple[str, ...] | None,
        tiers: Mapping[str, Tier],
        *,
        call_timeout: float = 10,
        nvml: Any = None,
    ) -> None:
        self._device_ids = device_ids
        self._tiers = tiers
        self._call_timeout = call_timeout
        self._nvml = nvml
        self._specs: tuple[SlotSpec, ...] = ()
        self._hung = False

    async def discover(self) -> tuple[SlotSpec, ...]:
        """Raises `InventoryError` if NVML fails, or a name in the settings fits no device, or two fit one."""
        try:
            self._specs = await self._in_thread(self._discover)
        except TimeoutError as error:
            raise InventoryError(f"NVML did not answer within {self._call_timeout:.0f} s") from error
        return self._specs

    async def readings(self) -> Mapping[str, SlotReading]:
        """One reading for each slot that was discovered; when NVML hangs, every slot is in doubt."""
        try:
            return await self._in_thread(lambda: {spec.id: self._reading(spec) for spec in self._specs})
        except TimeoutError:
            doubt = f"NVML did not answer within {self._call_timeout:.0f} s"
            return {spec.id: SlotReading(memory_used_mb=0, doubt=doubt) for spec in self._specs}

    async def _in_thread(self, do: Callable[[], T]) -> T:
        if self._hung:  # the thread of an earlier call still hangs in the driver: no second one
            raise TimeoutError

        def watched() -> T:
            self._hung = True
            try:
                return do()
            finally:
                self._hung = False

        return await call_in_thread(watched, limit=self._call_timeout, name="nvml")

    def _discover(self) -> tuple[SlotSpec, ...]:
        try:
            if self._nvml is None:
                self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
        except ImportError as error:
            raise InventoryError(f"NVML is not usable: {error}") from error
        except self._nvml.NVMLError as error:
            raise InventoryError(f"NVML is not usable: {error}") from error
        try:
            found = [self._describe(index) for index in range(self._nvml.nvmlDeviceGetCount())]
        except self._nvml.NVMLError as error:
            raise InventoryError(f"NVML cannot list the GPUs: {error}") from error
        return tuple(found) if self._device_ids is None else _chosen(found, self._device_ids)

    def _describe(self, index: int) -> SlotSpec:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        return SlotSpec(
            id=str(index),
            uuid=uuid,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_mb=nvml.nvmlDeviceGetMemoryInfo(handle).total // _MIB,
            is_gpu=True,
            tiers=_tiers_of(self._tiers, str(index), uuid),
        )

    def _reading(self, spec: SlotSpec) -> SlotReading:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(spec.uuid)
            used = self._nvml.nvmlDeviceGetMemoryInfo(handle).used // _MIB
            return SlotReading(memory_used_mb=used, fault=self._fault(handle))
        except self._nvml.NVMLError_GpuIsLost as error:
            return SlotReading(memory_used_mb=0, fault=f"the GPU is lost: {error}")
        except self._nvml.NVMLError as error:
            return SlotReading(memory_used_mb=0, doubt=f"the GPU cannot be read: {error}")

    def _fault(self, handle: object) -> str | None:
        nvml = self._nvml
        try:
            errors = nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        except nvml.NVMLError_NotSupported:
            errors = 0
        if errors:
            return f"{errors} uncorrected ECC errors since the driver was loaded"
        try:
            _corrected, _uncorrected, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        except nvml.NVMLError_NotSupported:
            return None
        if failed:
            return "a memory row could not be remapped"
        return "a memory row waits to be remapped: the GPU needs a reset" if pending else None


async def choose_inventory(
    *,
    cpu_slots: int,
    device_ids: tuple[str, ...] | None,
    tiers: Mapping[str, Tier],
    nvml: Any = None,
    nvidiactl: Path = Path("/dev/nvidiactl"),
) -> SlotInventory:
    """GPUs where NVML has any; `cpu_slots` stand-ins only where there is certainly none. Fails closed.

    Raises `InventoryError` when NVIDIA devices exist, or are asked for by `device_ids`, and NVML fails: a
    service that went on with stand-ins would start workers on a machine whose GPUs it cannot see.
    """
    gpus = NvmlInventory(device_ids, tiers, nvml=nvml)
    why = "NVML lists no GPU"
    try:
        if await gpus.discover():
            return gpus
    except InventoryError as error:
        if device_ids:
            raise
        why = str(error)
    if os.access(nvidiactl, os.F_OK):
        raise InventoryError(f"{nvidiactl} exists, but {why}")
    if device_ids:
        raise InventoryError(f"GPU_DEVICE_IDS names GPUs, but {why}")
    if cpu_slots < 1:
        raise InventoryError(f"there is nothing to serve: {why}, and CPU_SLOTS is {cpu_slots}")
    return CpuInventory(cpu_slots, tiers)


def _chosen(found: Sequence[SlotSpec], device_ids: tuple[str, ...]) -> tuple[SlotSpec, ...]:
    by_name = {name: spec for spec in found for name in (spec.id, spec.uuid)}
    chosen: dict[str, SlotSpec] = {}
    for device_id in device_ids:
        spec = by_name.get(device_id)
        if spec is None:
            known = ", ".join(f"{spec.id} ({spec.uuid})" for spec in found) or "none"
            raise InventoryError(f"GPU_DEVICE_IDS names {device_id}, which is not here; here are: {known}")
        if spec.id in chosen:
            raise InventoryError(f"GPU_DEVICE_IDS names GPU {spec.id} twice")
        chosen[spec.id] = spec
    return tuple(chosen.values())


def _tiers_of(tiers: Mapping[str, Tier], *names: str) -> frozenset[Tier]:
    listed = frozenset(tiers[name] for name in names if name in tiers)
    return listed or BOTH_TIERS


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
