"""NVML, as the service calls it: in a thread that may hang, over a module that tests replace."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from gpu_server.drivers.blocking import call_in_thread

T = TypeVar("T")


class NvmlUnusable(Exception):
    """There is no NVML here, or it does not start. The message says why."""


class Nvml:
    """One user's calls to NVML. `module` is `pynvml` unless given; `limit` bounds a call, in seconds."""

    def __init__(self, module: Any = None, *, limit: float = 10.0) -> None:
        self.limit = limit
        self._module = module
        self._hung = False

    @property
    def module(self) -> Any:
        """The module, after `start`."""
        return self._module

    async def call(self, do: Callable[[], T]) -> T:
        """Run `do` in a thread. Raises TimeoutError when a driver in trouble does not answer, and whatever
        `do` raises. While a call hangs no other is sent after it."""
        if self._hung:
            raise TimeoutError

        def watched() -> T:
            self._hung = True
            try:
                return do()
            finally:
                self._hung = False

        return await call_in_thread(watched, limit=self.limit, name="nvml")

    @property
    def silence(self) -> str:
        """What a TimeoutError of `call` means."""
        return f"NVML did not answer within {self.limit:.0f} s"

    def start(self) -> Any:
        """Load and initialise it, which may be done again and again; the module. Raises `NvmlUnusable`."""
        try:
            if self._module is None:
                self._module = importlib.import_module("pynvml")
            self._module.nvmlInit()
        except ImportError as error:
            raise NvmlUnusable(f"NVML is not usable: {error}") from error
        except self._module.NVMLError as error:
            raise NvmlUnusable(f"NVML is not usable: {error}") from error
        return self._module

    def uncorrected_errors(self, handle: object) -> int:
        """Memory errors that ECC could not correct since the driver was loaded; 0 on a GPU without ECC."""
        nvml = self._module
        try:
            return int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )
        except nvml.NVMLError_NotSupported:
            return 0

    def row_fault(self, handle: object) -> str | None:
        """What is wrong with the rows of its memory, or pages on older GPUs; None where nothing is known."""
        nvml = self._module
        try:
            _corrected, _uncorrected, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        except nvml.NVMLError_NotSupported:
            return self._page_fault(handle)
        if failed:
            return "a memory row could not be remapped"
        return "a memory row waits to be remapped: the GPU needs a reset" if pending else None

    def _page_fault(self, handle: object) -> str | None:
        nvml = self._module
        try:
            pending = nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)
        except nvml.NVMLError_NotSupported:
            return None
        return "a memory page waits to be retired: the GPU needs a reset" if pending else None


def text(value: str | bytes) -> str:
    """A text of NVML's, which older versions gave as bytes."""
    return value.decode() if isinstance(value, bytes) else value
