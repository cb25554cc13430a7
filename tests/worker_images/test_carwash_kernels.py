"""The kernels: what they compute, by the host's compiler; that NVRTC compiles them; and the image."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from carwash import kernels
from carwash.pattern import INVERSE, VECTOR, keys, vector
from carwash.scrub import Unavailable
from docker import APIClient

HERE = Path(__file__).parent
IMAGE = "gpu-server/carwash:dev"
SEED = 0xFEDC_BA98_7654_3210


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library of the host."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    made = tmp_path_factory.mktemp("kernels") / "kernels.so"
    source = kernels.__file__.replace("kernels.py", "kernels.cu")
    command = [compiler, "-std=c++14", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f'-DKERNELS="{source}"', "-o", str(made), str(HERE / "carwash_kernels_on_host.cpp")]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return ctypes.CDLL(str(made))


class Memory:
    """Some of the host's memory, by which the kernels are asked."""

    def __init__(self, library: ctypes.CDLL, vectors: int, threads: int) -> None:
        self._library, self._vectors, self._threads = library, vectors, threads
        self.bytes = (ctypes.c_ubyte * (vectors * VECTOR + VECTOR)).from_buffer(
            bytearray(b"\xee" * (vectors * VECTOR + VECTOR))
        )

    def fill(self, first: int, seed: int) -> None:
        self._library.host_fill(*self._head(), ctypes.c_uint64(first), *map(ctypes.c_uint32, keys(seed)))

    def unlike_pattern(self, first: int, seed: int) -> tuple[int, int]:
        counts = (ctypes.c_uint64 * 2)()
        more = (ctypes.c_uint64(first), *map(ctypes.c_uint32, keys(seed)), counts)
        self._library.host_unlike_pattern(*self._head(), *more)
        return counts[0], counts[1]

    def unlike_word(self, word: int) -> tuple[int, int]:
        counts = (ctypes.c_uint64 * 2)()
        self._library.host_unlike_word(*self._head(), ctypes.c_uint32(word), counts)
        return counts[0], counts[1]

    def _head(self) -> tuple[object, ...]:
        return ctypes.c_uint32(self._threads), self.bytes, ctypes.c_uint64(self._vectors)


@pytest.mark.parametrize(("vectors", "threads"), [(1, 256), (255, 256), (1000, 7), (4096, 64), (4099, 64)])
def test_kernels_write_and_compare_what_python_does(on_host: ctypes.CDLL, vectors: int, threads: int) -> None:
    """Every vector, once, at any size and grid; and not a byte beyond."""
    first = (1 << 32) - 5  # places on both sides of 32 bits
    memory = Memory(on_host, vectors, threads)
    memory.fill(first, SEED)
    wanted = b"".join(vector(first + at, SEED) for at in range(vectors))
    assert bytes(memory.bytes) == wanted + b"\xee" * VECTOR
    assert memory.unlike_pattern(first, SEED) == (4 * vectors, 0)
    looked, unlike = memory.unlike_pattern(first, SEED ^ 1)
    assert looked == 4 * vectors
    assert unlike > 3 * vectors
    assert memory.unlike_word(0)[0] == 4 * vectors
    assert memory.unlike_pattern(first, SEED | INVERSE) == (4 * vectors, 4 * vectors)
    memory.fill(first, SEED | INVERSE)
    assert bytes(memory.bytes) == bytes(byte ^ 0xFF for byte in wanted) + b"\xee" * VECTOR
    assert memory.unlike_pattern(first, SEED | INVERSE) == (4 * vectors, 0)


@pytest.mark.parametrize("at", [0, 4 * 4099 - 1, 777])
def test_kernels_count_every_word(on_host: ctypes.CDLL, at: int) -> None:
    """One word that is not as it should be is one, wherever it is: first, last, in the main loop or after."""
    memory = Memory(on_host, 4099, 64)
    memory.fill(0, SEED)
    memory.bytes[4 * at] ^= 0x80
    assert memory.unlike_pattern(0, SEED) == (4 * 4099, 1)
    ctypes.memset(memory.bytes, 0, 4099 * VECTOR)
    assert memory.unlike_word(0) == (4 * 4099, 0)
    memory.bytes[4 * at + 3] = 1
    assert memory.unlike_word(0) == (4 * 4099, 1)


def require_kernels(ptx: str) -> None:
    """All three for the oldest GPU that is served, in vectors of 16 bytes that pass the caches by."""
    assert re.search(r"^\.target sm_75$", ptx, re.MULTILINE)
    assert re.findall(r"\.visible \.entry (\w+)\(", ptx) == list(kernels.NAMES)
    assert "ld.global.cs.v4.u32" in ptx
    assert "st.global.cs.v4.u32" in ptx
    assert not re.search(r"\.local\b", ptx), "a kernel spills to memory"


def test_kernels_compile() -> None:
    """By NVRTC, which needs no GPU."""
    if importlib.util.find_spec("cuda") is None:
        with pytest.raises(ImportError):
            kernels.compile_kernels()
        pytest.skip("no NVRTC here; the image's build compiles them, and its test looks at that")
    require_kernels(kernels.compile_kernels().decode())


def test_without_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the image first; without them and without a compiler nothing is scrubbed."""
    monkeypatch.setattr(kernels, "_PTX", tmp_path / "kernels.ptx")
    monkeypatch.setattr(kernels, "compile_kernels", lambda: (_ for _ in ()).throw(ImportError("no cuda")))
    with pytest.raises(Unavailable, match="no cuda"):
        kernels.load()
    (tmp_path / "kernels.ptx").write_bytes(b"// PTX")
    assert kernels.load() == b"// PTX"


@pytest.fixture(scope="module")
def image(docker_engine: APIClient) -> str:
    """The image, where it was built."""
    if not docker_engine.images(IMAGE):
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(f"no {IMAGE}: run ./scripts/build_images.sh carwash")
    return IMAGE


def in_image(image: str, *command: str) -> bytes:
    hardened = ["--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    entry = ["--entrypoint", command[0]] if command else []
    ran = subprocess.run(
        ["docker", "run", "--rm", *hardened, *entry, image, *command[1:]],
        capture_output=True,
        timeout=100,
        check=True,
    )
    return ran.stdout


@pytest.mark.docker
def test_the_image_holds_compiled_kernels_and_no_compiler(image: str) -> None:
    """So that nothing has to be compiled in it but by the driver."""
    require_kernels(in_image(image, "cat", "/app/carwash/kernels.ptx").decode())
    found = json.loads(
        in_image(
            image,
            "/venv/bin/python",
            "-c",
            "import importlib.util as u, json; import cuda.bindings.driver, pynvml;"
            "print(json.dumps([bool(u.find_spec(n)) for n in ('nvidia', 'torch', 'numpy')]))",
        )
    )
    assert found == [False, False, False]


@pytest.mark.docker
def test_the_image_without_a_gpu(image: str) -> None:
    """It is not applicable, where the machine has none."""
    said = json.loads(in_image(image))
    wanted = "unavailable" if Path("/proc/driver/nvidia").exists() else "not_applicable"
    assert (said["result"], said["figures"]) == (wanted, {})
