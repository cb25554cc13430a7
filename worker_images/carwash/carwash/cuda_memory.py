"""A GPU's memory, by the CUDA driver API (NVIDIA's cuda-bindings) and NVML."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from carwash import kernels
from carwash.pattern import WORD, keys
from carwash.scrub import Absent, Chunk, Count, DeviceError, Memory, Unavailable

_THREADS: Final = 256
_BLOCKS_PER_PROCESSOR: Final = 8
_TRIAL_BYTES: Final = 32 << 10
_COUNTS: Final = struct.Struct("<2Q")
_SIGNS_OF_A_GPU: Final = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/proc/driver/nvidia")

_POINTER, _U64, _U32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32


def open_gpu(uuid: str | None = None, *, exists: Callable[[str], bool] = os.path.exists) -> CudaDevice:
    """The one GPU that this process sees, which must be `uuid` where one is given.

    Raises `Absent` where there is certainly no GPU, and `Unavailable` where there may be one.
    """
    signs = [sign for sign in _SIGNS_OF_A_GPU if exists(sign)]
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
        nvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        if not signs:
            raise Absent("no NVIDIA device is here") from error
        raise Unavailable(f"NVIDIA's packages are not installed: {error}") from error
    return CudaDevice(driver, nvml, uuid, signs=signs, ptx=kernels.load)


class CudaDevice:
    """`Device` over `cuda.bindings.driver`. `nvml` is `pynvml`; `signs` are what speaks of a GPU here.

    The memory is what `cuMemAlloc` gives: never managed memory, which the driver could move to the host.
    """

    def __init__(
        self, driver: Any, nvml: Any, uuid: str | None, *, signs: Sequence[str], ptx: Callable[[], bytes]
    ) -> None:
        self._cuda, self._nvml = driver, nvml
        self._device: Any = None
        self._handle = self._find(uuid, signs)
        self.uuid = _text(nvml.nvmlDeviceGetUUID(self._handle))
        self.name = _text(nvml.nvmlDeviceGetName(self._handle))
        # Before there is a context, or this process would be among them.
        self.processes = self._count_processes()
        try:
            self._open(ptx())
        except DeviceError as error:
            self.close()
            raise Unavailable(str(error)) from error

    # -- opening ------------------------------------------------------------------------------------------

    def _find(self, uuid: str | None, signs: Sequence[str]) -> Any:
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            if nvml.nvmlDeviceGetCount() == 0:
                raise Absent("NVML lists no GPU") if not signs else Unavailable("NVML lists no GPU")
            if uuid is not None:
                return nvml.nvmlDeviceGetHandleByUUID(uuid)
            if nvml.nvmlDeviceGetCount() != 1:
                raise Unavailable("there are several GPUs: say which by --uuid")
            return nvml.nvmlDeviceGetHandleByIndex(0)
        except nvml.NVMLError as error:
            if not signs:
                raise Absent("no NVIDIA device is here, and NVML is not usable") from error
            raise Unavailable(f"NVML is not usable: {error}") from error

    def _count_processes(self) -> int:
        nvml, found = self._nvml, 0
        asks = (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
            nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        )
        for ask in asks:
            try:
                found += len(ask(self._handle))
            except nvml.NVMLError_NotSupported as error:
                if ask is asks[0]:
                    raise Unavailable("NVML does not list this GPU's processes") from error
            except nvml.NVMLError as error:
                raise Unavailable(f"NVML does not list this GPU's processes: {error}") from error
        return found

    def _open(self, ptx: bytes) -> None:
        cuda = self._cuda
        try:
            self._do("cuInit", 0)
        except RuntimeError as error:  # cuda-bindings without the driver's library
            raise Unavailable(f"the CUDA driver cannot be loaded: {type(error).__name__}") from error
        count = self._do("cuDeviceGetCount")
        if count != 1:
            raise Unavailable(f"CUDA shows {count} GPUs to this process, and not one")
        device = self._do("cuDeviceGet", 0)
        seen = _uuid_text(bytes(self._do("cuDeviceGetUuid", device).bytes))
        if seen.lower() != self.uuid.lower():
            raise Unavailable(f"CUDA shows {seen}, and NVML {self.uuid}")
        processors = self._do(
            "cuDeviceGetAttribute",
            cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            device,
        )
        self._blocks = processors * _BLOCKS_PER_PROCESSOR
        # The primary context: how contexts of one's own are made differs between versions of CUDA.
        context = self._do("cuDevicePrimaryCtxRetain", device)
        self._device = device
        self._do("cuCtxSetCurrent", context)
        module = self._do("cuModuleLoadData", ptx + b"\0")
        self._kernels = {
            name: self._do("cuModuleGetFunction", module, name.encode()) for name in kernels.NAMES
        }
        self._counts = int(self._do("cuMemAlloc", _COUNTS.size))
        self._try_out()

    def _try_out(self) -> None:
        """Do all that is done later, once and on little.

        The driver may load a kernel as late as its first launch ("Lazy Loading" of the CUDA programming
        guide), and there is no memory left for it once all is taken.
        """
        chunk = Chunk(address=int(self._do("cuMemAlloc", _TRIAL_BYTES)), size=_TRIAL_BYTES, first=0)
        self.fill([chunk], 0)
        self.unlike_pattern([chunk], 0)
        self.zero([chunk])
        self.unlike_word([chunk], 0)
        self.free(chunk.address)

    def close(self) -> None:
        """See `Device`. Its context goes, and all memory with it."""
        device, self._device = self._device, None
        if device is not None:
            self._do("cuDevicePrimaryCtxRelease", device)

    # -- memory -------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """See `Device`. `total` is NVML's, as the inventory of the service has it; `free` is CUDA's."""
        nvml, reserved = self._nvml, 0
        try:
            total = int(nvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        except nvml.NVMLError as error:
            raise DeviceError(f"NVML does not say how much memory there is: {error}") from error
        with contextlib.suppress(nvml.NVMLError):  # an older driver
            reserved = int(nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2).reserved)
        free, _ = self._do("cuMemGetInfo")
        return Memory(total=total, reserved=reserved, free=int(free))

    def allocate(self, size: int) -> int | None:
        """See `Device`."""
        error, address = self._cuda.cuMemAlloc(size)
        if error == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return None
        self._require("cuMemAlloc", error)
        return int(address)

    def free(self, address: int) -> None:
        """See `Device`."""
        self._do("cuMemFree", address)

    def fill(self, chunks: Sequence[Chunk], seed: int) -> None:
        """See `Device`."""
        for chunk in chunks:
            self._launch("fill", chunk, (_U64, chunk.first), *((_U32, key) for key in keys(seed)))
        self._finish()

    def zero(self, chunks: Sequence[Chunk]) -> None:
        """See `Device`."""
        for chunk in chunks:
            self.set(chunk, 0)

    def unlike_pattern(self, chunks: Sequence[Chunk], seed: int) -> Count:
        """See `Device`."""
        places = {chunk: [(_U64, chunk.first), *((_U32, key) for key in keys(seed))] for chunk in chunks}
        return self._count("unlike_pattern", places)

    def unlike_word(self, chunks: Sequence[Chunk], word: int) -> Count:
        """See `Device`."""
        return self._count("unlike_word", {chunk: [(_U32, word)] for chunk in chunks})

    def read(self, address: int, size: int) -> bytes:
        """See `Device`."""
        data = bytearray(size)
        self._do("cuMemcpyDtoH", data, address, size)
        return bytes(data)

    def set(self, chunk: Chunk, word: int) -> None:
        """Write this word everywhere."""
        self._do("cuMemsetD32", chunk.address, word, chunk.size // WORD)
        self._finish()

    def copy(self, target: int, source: int, size: int) -> None:
        """A plain copy within the device, for who measures how fast its memory is."""
        self._do("cuMemcpyDtoD", target, source, size)
        self._finish()

    # -- calls --------------------------------------------------------------------------------------------

    def _count(self, kernel: str, chunks: dict[Chunk, list[tuple[Any, int]]]) -> Count:
        self._do("cuMemcpyHtoD", self._counts, bytes(_COUNTS.size), _COUNTS.size)
        for chunk, more in chunks.items():
            self._launch(kernel, chunk, *more, (_POINTER, self._counts))
        self._finish()
        looked, unlike = _COUNTS.unpack(self.read(self._counts, _COUNTS.size))
        return Count(looked=looked, unlike=unlike)

    def _launch(self, kernel: str, chunk: Chunk, *more: tuple[Any, int]) -> None:
        given = [(_POINTER, chunk.address), (_U64, chunk.vectors), *more]
        blocks = max(1, min(self._blocks, -(-chunk.vectors // _THREADS)))
        parameters = (tuple(value for _, value in given), tuple(kind for kind, _ in given))
        self._do("cuLaunchKernel", self._kernels[kernel], blocks, 1, 1, _THREADS, 1, 1, 0, 0, parameters, 0)

    def _finish(self) -> None:
        self._do("cuCtxSynchronize")

    def _do(self, name: str, *arguments: Any) -> Any:
        """Call the driver: what it returns, one value as such. Raises `DeviceError`."""
        error, *returned = getattr(self._cuda, name)(*arguments)
        self._require(name, error)
        return returned[0] if len(returned) == 1 else returned

    def _require(self, name: str, error: Any) -> None:
        if error != self._cuda.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name}: {getattr(error, 'name', error)}")


def _uuid_text(raw: bytes) -> str:
    """As NVML writes it."""
    digits = raw.hex()
    return "GPU-" + "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
