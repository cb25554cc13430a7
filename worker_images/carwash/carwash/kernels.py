"""The kernels as PTX: made when the image is built (`python -m carwash.kernels FILE`), read when it runs.

NVRTC compiles without a GPU. The driver turns PTX into the code of its own GPU, so one file serves every GPU
from `ARCHITECTURE` on, and the image needs no compiler.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Final

from carwash.scrub import Unavailable

ARCHITECTURE: Final = "compute_75"
NAMES: Final = ("fill", "unlike_pattern", "unlike_word")
_HERE: Final = Path(__file__).parent
_SOURCE: Final = _HERE / "kernels.cu"
_PTX: Final = _HERE / "kernels.ptx"


def load() -> bytes:
    """The PTX of this image, or, where it was not built, compiled now. Raises `Unavailable`."""
    try:
        return _PTX.read_bytes()
    except FileNotFoundError:
        pass
    try:
        return compile_kernels()
    except ImportError as error:
        raise Unavailable(f"neither the kernels nor NVRTC are installed: {error}") from error


def compile_kernels(architecture: str = ARCHITECTURE) -> bytes:
    """PTX, as text. Raises ImportError without NVIDIA's packages, and `Unavailable`."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    def checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise Unavailable(f"the kernels cannot be compiled: {result[0]!s}")
        return result[1] if len(result) > 1 else None

    try:
        program = checked(nvrtc.nvrtcCreateProgram(_SOURCE.read_bytes(), b"kernels.cu", 0, None, None))
    except RuntimeError as error:  # the package is there, its library is not
        raise Unavailable(f"NVRTC cannot be loaded: {type(error).__name__}") from error
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++14"]
        result = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(result[0]) != 0:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise Unavailable(f"the kernels cannot be compiled: {bytes(log).decode(errors='replace')}")
        ptx = bytearray(checked(nvrtc.nvrtcGetPTXSize(program)))
        checked(nvrtc.nvrtcGetPTX(program, ptx))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(ptx).rstrip(b"\0")


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(compile_kernels())
