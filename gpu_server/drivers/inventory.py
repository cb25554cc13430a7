"""The devices of this machine: GPUs from NVML, or CPU stand-ins where there is certainly no GPU."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gpu_server.core.slots import BOTH_TIERS, SlotSpec, Tier
from gpu_server.drivers.nvml import Nvml, NvmlUnusable, text
from gpu_server.ports import InventoryError, SlotInventory, SlotReading

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
        self._nvml = Nvml(nvml, limit=call_timeout)
        self._specs: tuple[SlotSpec, ...] = ()

    async def discover(self) -> tuple[SlotSpec, ...]:
        """Raises `InventoryError` if NVML fails, or a name in the settings fits no device, or two fit one."""
        try:
            self._specs = await self._nvml.call(self._discover)
        except TimeoutError as error:
            raise InventoryError(self._nvml.silence) from error
        return self._specs

    async def readings(self) -> Mapping[str, SlotReading]:
        """One reading for each slot that was discovered; when NVML hangs, every slot is in doubt."""
        try:
            return await self._nvml.call(lambda: {spec.id: self._reading(spec) for spec in self._specs})
        except TimeoutError:
            silence = self._nvml.silence
            return {spec.id: SlotReading(memory_used_mb=0, doubt=silence) for spec in self._specs}

    def _discover(self) -> tuple[SlotSpec, ...]:
        try:
            nvml = self._nvml.start()
        except NvmlUnusable as error:
            raise InventoryError(str(error)) from error
        try:
            found = [self._describe(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            raise InventoryError(f"NVML cannot list the GPUs: {error}") from error
        return tuple(found) if self._device_ids is None else _chosen(found, self._device_ids)

    def _describe(self, nvml: Any, index: int) -> SlotSpec:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = text(nvml.nvmlDeviceGetUUID(handle))
        return SlotSpec(
            id=str(index),
            uuid=uuid,
            name=text(nvml.nvmlDeviceGetName(handle)),
            memory_mb=nvml.nvmlDeviceGetMemoryInfo(handle).total // _MIB,
            is_gpu=True,
            tiers=_tiers_of(self._tiers, str(index), uuid),
        )

    def _reading(self, spec: SlotSpec) -> SlotReading:
        nvml = self._nvml.module
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(spec.uuid)
            used = nvml.nvmlDeviceGetMemoryInfo(handle).used // _MIB
            return SlotReading(memory_used_mb=used, fault=self._fault(handle))
        except nvml.NVMLError_GpuIsLost as error:
            return SlotReading(memory_used_mb=0, fault=f"the GPU is lost: {error}")
        except nvml.NVMLError as error:
            return SlotReading(memory_used_mb=0, doubt=f"the GPU cannot be read: {error}")

    def _fault(self, handle: object) -> str | None:
        if errors := self._nvml.uncorrected_errors(handle):
            return f"{errors} uncorrected ECC errors since the driver was loaded"
        return self._nvml.row_fault(handle)


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
