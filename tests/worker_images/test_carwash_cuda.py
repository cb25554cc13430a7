"""The GPU's memory over a driver that is played: which calls are made, and what its errors become."""

from __future__ import annotations

import ctypes
import enum
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from carwash.cuda_memory import CudaDevice, open_gpu
from carwash.host_memory import HostDevice
from carwash.pattern import INVERSE
from carwash.scrub import Absent, Chunk, DeviceError, Figures, Unavailable, scrub

from tests.fakes.nvml import MIB, FakeNvml, Gpu

RAW_UUID = bytes(range(16))
UUID = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
PIECE = 4096


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ECC_UNCORRECTABLE = 214


class PlayedCuda:
    """As much of `cuda.bindings.driver` as is used, over the host's memory; `fails` names a call and its
    error."""

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16)

    def __init__(self, size: int = 16 * PIECE, *, count: int = 1, uuid: bytes = RAW_UUID) -> None:
        self.memory = HostDevice(size)
        self.fails: dict[str, Result] = {}
        self.called: list[str] = []
        self.image = b""
        self._count, self._uuid = count, uuid

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return super().__getattribute__(name)
        self.called.append(name)
        if name in self.fails:
            error = self.fails[name]
            return lambda *_: (error, None)
        try:
            call = super().__getattribute__(f"_{name}")
        except AttributeError:
            return lambda *_: (Result.CUDA_SUCCESS,)

        def answer(*arguments: Any) -> tuple[Any, ...]:
            got = call(*arguments)
            return got if isinstance(got, tuple) else (Result.CUDA_SUCCESS, got)

        return answer

    def _cuDeviceGetCount(self) -> int:
        return self._count

    def _cuDeviceGet(self, number: int) -> int:
        return number

    def _cuDeviceGetUuid(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(bytes=self._uuid)

    def _cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        assert attribute == 16
        return 3

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return "context"

    def _cuModuleLoadData(self, image: bytes) -> str:
        self.image = image
        return "module"

    def _cuModuleGetFunction(self, module: str, name: bytes) -> str:
        return name.decode()

    def _cuMemAlloc(self, size: int) -> tuple[Result, int | None]:
        address = self.memory.allocate(-(-size // 256) * 256)
        return (Result.CUDA_ERROR_OUT_OF_MEMORY if address is None else Result.CUDA_SUCCESS, address)

    def _cuMemFree(self, address: int) -> tuple[Result]:
        self.memory.free(address)
        return (Result.CUDA_SUCCESS,)

    def _cuMemGetInfo(self) -> tuple[Result, int, int]:
        memory = self.memory.memory()
        return Result.CUDA_SUCCESS, memory.free, memory.total

    def _cuMemsetD32(self, address: int, word: int, count: int) -> tuple[Result]:
        self.memory.write(address, struct.pack("<I", word) * count)
        return (Result.CUDA_SUCCESS,)

    def _cuMemcpyDtoH(self, target: bytearray, source: int, size: int) -> tuple[Result]:
        target[:] = self.memory.read(source, size)
        return (Result.CUDA_SUCCESS,)

    def _cuMemcpyHtoD(self, target: int, source: bytes, size: int) -> tuple[Result]:
        self.memory.write(target, source[:size])
        return (Result.CUDA_SUCCESS,)

    def _cuMemcpyDtoD(self, target: int, source: int, size: int) -> tuple[Result]:
        self.memory.write(target, self.memory.read(source, size))
        return (Result.CUDA_SUCCESS,)

    def _cuLaunchKernel(self, kernel: str, *given: Any) -> tuple[Result]:
        blocks, _, _, threads, _, _, shared, stream, (values, kinds), extra = given
        assert (threads, shared, stream, extra) == (256, 0, 0, 0)
        assert 1 <= blocks <= 24
        address, vectors, *more = values
        wanted = [ctypes.c_void_p, ctypes.c_uint64]
        if kernel == "unlike_word":
            chunk = Chunk(address=address, size=vectors * 16, first=0)
            count = self.memory.unlike_word([chunk], more[0])
            wanted += [ctypes.c_uint32, ctypes.c_void_p]
        else:
            chunk = Chunk(address=address, size=vectors * 16, first=more[0])
            assert more[3] in (0, 0xFFFF_FFFF)
            seed = more[1] | more[2] << 32 | (INVERSE if more[3] else 0)
            wanted += [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32]
            if kernel == "fill":
                self.memory.fill([chunk], seed)
                assert list(kinds) == wanted
                return (Result.CUDA_SUCCESS,)
            count = self.memory.unlike_pattern([chunk], seed)
            wanted += [ctypes.c_void_p]
        assert list(kinds) == wanted
        sums = struct.unpack("<2Q", self.memory.read(more[-1], 16))
        self.memory.write(more[-1], struct.pack("<2Q", sums[0] + count.looked, sums[1] + count.unlike))
        return (Result.CUDA_SUCCESS,)


class Nvml(FakeNvml):
    """A GPU as large as the memory that is played."""

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> SimpleNamespace:
        super().nvmlDeviceGetMemoryInfo(gpu, version)
        return SimpleNamespace(total=16 * PIECE, reserved=7)


def opened(
    cuda: PlayedCuda | None = None, nvml: FakeNvml | None = None, uuid: str | None = UUID,
    *, signs: Sequence[str] = ("/dev/nvidiactl",), ptx: Callable[[], bytes] = lambda: b"// PTX",
) -> CudaDevice:  # fmt: skip
    return CudaDevice(cuda or PlayedCuda(), nvml or Nvml(gpus=[Gpu(UUID)]), uuid, signs=signs, ptx=ptx)


def test_a_scrub_by_cuda() -> None:
    """The whole of it, in the driver's calls; nothing is left, and its context goes."""
    cuda = PlayedCuda()
    device = opened(cuda)
    figures: Figures = {}
    scrub(device, figures, smallest=PIECE, seed=5, min_share=900)
    assert (device.uuid, device.name, device.processes) == (UUID, "NVIDIA L40S", 0)
    assert figures["bytes_total"] == 16 * PIECE
    assert figures["bytes_reserved"] == 7
    assert figures["zero_compared"] == figures["bytes_allocated"] == 15 * PIECE
    assert cuda.image == b"// PTX\0"
    device.close()
    device.close()
    assert cuda.called.count("cuDevicePrimaryCtxRelease") == 1
    assert len(cuda.memory.taken) == 1, "the counters alone, which go with the context"


def test_all_kernels_have_run_before_the_memory_is_taken() -> None:
    """The driver may load a kernel at its first launch only, and then finds no memory for it."""

    class LoadsLate(PlayedCuda):
        """A kernel that is not loaded takes memory at its first launch, as memset and copies do."""

        def __init__(self) -> None:
            super().__init__()
            self.loaded: set[str] = set()

        def _load(self, name: str) -> bool:
            if name not in self.loaded and self.memory.allocate(256) is None:
                return False
            self.loaded.add(name)
            return True

        def _cuLaunchKernel(self, kernel: str, *given: Any) -> tuple[Result]:
            loaded = self._load(kernel)
            return super()._cuLaunchKernel(kernel, *given) if loaded else (Result.CUDA_ERROR_OUT_OF_MEMORY,)

        def _cuMemsetD32(self, address: int, word: int, count: int) -> tuple[Result]:
            loaded = self._load("memset")
            return (
                super()._cuMemsetD32(address, word, count) if loaded else (Result.CUDA_ERROR_OUT_OF_MEMORY,)
            )

    cuda = LoadsLate()
    device = opened(cuda)
    figures: Figures = {}
    scrub(device, figures, smallest=256, seed=5)
    assert figures["zero_compared"] == figures["bytes_allocated"]
    assert cuda.loaded == {"fill", "unlike_pattern", "unlike_word", "memset"}


def test_it_waits_for_what_it_started() -> None:
    """A time that is measured is that of the work, not of its start."""
    cuda = PlayedCuda()
    device = opened(cuda)
    chunk = Chunk(address=device.allocate(PIECE) or 0, size=PIECE, first=0)
    for work in (
        lambda: device.fill([chunk], 1),
        lambda: device.zero([chunk]),
        lambda: device.copy(chunk.address, chunk.address, PIECE),
    ):
        work()
        assert cuda.called[-1] == "cuCtxSynchronize"
    device.unlike_word([chunk], 0)
    assert cuda.called[-2:] == ["cuCtxSynchronize", "cuMemcpyDtoH"]


def test_no_memory_is_no_error() -> None:
    """But any other failure is."""
    cuda = PlayedCuda()
    device = opened(cuda)
    assert device.allocate(1 << 40) is None
    cuda.fails["cuMemAlloc"] = Result.CUDA_ERROR_ECC_UNCORRECTABLE
    with pytest.raises(DeviceError, match="cuMemAlloc: CUDA_ERROR_ECC_UNCORRECTABLE"):
        device.allocate(PIECE)
    cuda.fails["cuCtxSynchronize"] = Result.CUDA_ERROR_ECC_UNCORRECTABLE
    with pytest.raises(DeviceError, match="cuCtxSynchronize"):
        device.unlike_word([Chunk(address=1 << 32, size=PIECE, first=0)], 0)


def test_processes_are_counted_before_there_is_a_context() -> None:
    """Those that compute, draw and share the GPU by MPS."""
    cuda, nvml = PlayedCuda(), Nvml(gpus=[Gpu(UUID, processes=(1, 2, 4))])
    assert opened(cuda, nvml).processes == 7
    assert opened(nvml=Nvml(gpus=[Gpu(UUID, processes=(1, None, None))])).processes == 1
    with pytest.raises(Unavailable, match="processes"):
        opened(nvml=Nvml(gpus=[Gpu(UUID, processes=(None, 0, 0))]))


@pytest.mark.parametrize(
    ("cuda", "nvml", "uuid", "why"),
    [
        (PlayedCuda(count=2), None, UUID, "2 GPUs"),
        (PlayedCuda(uuid=bytes(16)), None, UUID, "CUDA shows GPU-0000"),
        (None, FakeNvml(gpus=[Gpu(UUID)]), "GPU-other", "Not Found"),
        (None, FakeNvml(gpus=[Gpu(UUID), Gpu("GPU-2")]), None, "several"),
        (None, FakeNvml(), None, "no GPU"),
        (None, FakeNvml(broken=True), None, "Driver Not Loaded"),
    ],
)
def test_another_gpu_than_was_asked_for_is_left_alone(
    cuda: PlayedCuda | None, nvml: FakeNvml | None, uuid: str | None, why: str
) -> None:
    """It has to be the one, and the only one that this process sees."""
    with pytest.raises(Unavailable, match=why):
        opened(cuda, nvml, uuid)


def test_a_driver_that_fails_at_the_start() -> None:
    """Nothing was found wrong with the memory; and what was opened is closed."""
    cuda = PlayedCuda()
    cuda.fails["cuModuleLoadData"] = Result.CUDA_ERROR_NO_DEVICE
    with pytest.raises(Unavailable, match="cuModuleLoadData: CUDA_ERROR_NO_DEVICE"):
        opened(cuda)
    assert cuda.called[-1] == "cuDevicePrimaryCtxRelease"

    class NoLibrary(PlayedCuda):
        def _cuInit(self, flags: int) -> None:
            raise RuntimeError("libcuda.so.1 is not here")

    with pytest.raises(Unavailable, match="cannot be loaded"):
        opened(NoLibrary())


def test_no_gpu_is_said_only_where_nothing_speaks_of_one() -> None:
    """A device file, or the driver's folder in /proc, and it may be that this process was not given it."""
    for nvml in (FakeNvml(broken=True), FakeNvml()):
        with pytest.raises(Absent):
            opened(nvml=nvml, uuid=None, signs=())
    with pytest.raises(Unavailable):
        open_gpu(exists=lambda path: path == "/proc/driver/nvidia")


def test_the_driver_may_not_know_what_it_reserves() -> None:
    """Then none is told; without a total there is no scrub."""

    class Old(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> SimpleNamespace:
            if version is not None:
                raise self.NVMLError_FunctionNotFound
            return SimpleNamespace(total=5 * MIB)

    memory = opened(nvml=Old(gpus=[Gpu(UUID)])).memory()
    assert (memory.total, memory.reserved) == (5 * MIB, 0)
    with pytest.raises(DeviceError, match="how much"):
        opened(nvml=FakeNvml(gpus=[Gpu(UUID, lost=True)])).memory()
