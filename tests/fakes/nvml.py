"""The functions of `pynvml` that are used, over a list of GPUs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

MIB = 1024 * 1024


class NvmlError(Exception):
    pass


class NotSupported(NvmlError):
    pass


class FunctionNotFound(NvmlError):
    pass


class InvalidArgument(NvmlError):
    pass


class GpuIsLost(NvmlError):
    pass


@dataclass
class Gpu:
    """One GPU. None where it does not support something; `processes` of computing, graphics and MPS."""

    uuid: str
    used: int = 3 * MIB
    ecc: int | None = 0
    rows: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    pages: int | None = None
    lost: bool = False
    processes: tuple[int | None, int | None, int | None] = (0, 0, None)
    action: int | None = 0
    pci: tuple[int, int, int] = (0, 0x3B, 0)
    reserved: int | None = 0


@dataclass
class FakeNvml:
    """`broken` fails at its start, `hang` lets every call wait for it."""

    gpus: list[Gpu] = field(default_factory=list)
    broken: bool = False
    hang: threading.Event | None = None
    inits: int = 0

    NVMLError = NvmlError
    NVMLError_NotSupported = NotSupported
    NVMLError_FunctionNotFound = FunctionNotFound
    NVMLError_ArgumentVersionMismatch = FunctionNotFound
    NVMLError_InvalidArgument = InvalidArgument
    NVMLError_GpuIsLost = GpuIsLost
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_SUCCESS = 0
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
    nvmlMemory_v2 = 33554472

    def nvmlInit(self) -> None:
        self.inits += 1
        if self.hang is not None:
            self.hang.wait(30)
        if self.broken:
            raise NvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        if self.hang is not None:
            self.hang.wait(30)
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NvmlError("Not Found")

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> bytes:
        return gpu.uuid.encode()

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return "NVIDIA L40S"

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> SimpleNamespace:
        if gpu.lost:
            raise GpuIsLost("GPU is lost")
        if version is None:
            return SimpleNamespace(total=46068 * MIB, used=gpu.used + (gpu.reserved or 0), free=0)
        if gpu.reserved is None:
            raise FunctionNotFound
        return SimpleNamespace(total=46068 * MIB, used=gpu.used, free=0, reserved=gpu.reserved)

    def nvmlDeviceGetPciInfo(self, gpu: Gpu) -> SimpleNamespace:
        domain, bus, device = gpu.pci
        return SimpleNamespace(domain=domain, bus=bus, device=device)

    def nvmlDeviceGetTotalEccErrors(self, gpu: Gpu, kind: int, counter: int) -> int:
        assert (kind, counter) == (1, 0)
        return _supported(gpu.ecc)

    def nvmlDeviceGetRemappedRows(self, gpu: Gpu) -> tuple[int, int, int, int]:
        return _supported(gpu.rows)

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu: Gpu) -> int:
        return _supported(gpu.pages)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[object]:
        return [object()] * _supported(gpu.processes[0])

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: Gpu) -> list[object]:
        return [object()] * _supported(gpu.processes[1])

    def nvmlDeviceGetMPSComputeRunningProcesses(self, gpu: Gpu) -> list[object]:
        return [object()] * _supported(gpu.processes[2])

    def nvmlDeviceGetFieldValues(self, gpu: Gpu, fields: list[int]) -> list[SimpleNamespace]:
        assert fields == [230]
        if gpu.action is None:
            return [SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=0))]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=gpu.action))]


def _supported(value: Any) -> Any:
    if value is None:
        raise NotSupported
    return value
