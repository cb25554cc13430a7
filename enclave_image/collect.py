"""Makes the root of the enclave's image: Python, the program, and those modules that the program imports.

Runs while the image is built, with the program and its packages on PYTHONPATH. The program is put through all
that it does; what is loaded then is copied, and the libraries that these files are linked with. What else a
Python has (a package installer, HTTP, TLS, subprocesses) is not in the image, because nothing asked for it.
"""

from __future__ import annotations

import sys


def exercise() -> None:
    """Everything that the program can do, failures too."""
    import enclave.__main__  # noqa: F401
    from enclave.measure import measurements
    from enclave.program import Program

    from gpu_server.sealed.cms import make_recipient
    from gpu_server.sealed.frames import Code, Op, Request
    from gpu_server.sealed.grant import WorkerKey
    from gpu_server.sealed.nsm import Nsm
    from gpu_server.sealed.software_nsm import SoftwareNsm

    modules: list[bytes] = []

    class Listening(Nsm):
        """Remembers the public key that a document was asked for with."""

        def attestation(
            self,
            *,
            public_key: bytes | None = None,
            user_data: bytes | None = None,
            nonce: bytes | None = None,
        ) -> bytes:
            modules.append(public_key or b"")
            return super().attestation(public_key=public_key, user_data=user_data, nonce=nonce)

    program = Program(Listening(SoftwareNsm(measurements()).process), mode="simulated", mix=len)
    arn = "arn:aws:kms:eu-west-1:123456789012:key/00000000-0000-0000-0000-000000000000"
    names = ["tenant", "pool", arn, "session", WorkerKey.generate().public, b"wrapped"]
    for code, op, args in (
        (Code.OK, Op.STATUS, []),
        (Code.POLICY, Op.HELLO, [bytes(32)]),
        (Code.OK, Op.INIT, [bytes(32)]),
        (Code.OK, Op.HELLO, [bytes(32)]),
        (Code.MALFORMED, Op.HELLO, [b""]),
        (Code.DECRYPT, Op.GRANT, [*names, b"nonsense"]),
        (Code.MALFORMED, Op.GRANT, ["", *names[1:], b"nonsense"]),
    ):
        assert program.handle(Request(op, 1, args))[0] is code, (op, code)
    grant = [*names, make_recipient(bytes(32), modules[-1])]
    assert program.handle(Request(Op.GRANT, 1, grant))[0] is Code.OK


exercise()
LOADED = {name: module for name, module in sys.modules.items() if name != "__main__"}

# From here on nothing is traced any more.
import os  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sysconfig  # noqa: E402
from pathlib import Path  # noqa: E402

PYTHON = Path(sys.executable).resolve()
STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
BUILD = Path(__file__).resolve().parent


def target(file: Path) -> str:
    """Where a file of this stage is in the image."""
    for folder, place in ((BUILD / "app", "app"), (BUILD / "site", "app"), (STDLIB, f"usr/lib/{VERSION}")):
        if file.is_relative_to(folder):
            return f"{place}/{file.relative_to(folder)}"
    if ".so" in file.suffixes:  # an extension module that the base image has elsewhere
        return f"usr/lib/{VERSION}/lib-dynload/{file.name}"
    raise SystemExit(f"collect: {file} is neither Python's nor the program's")


def libraries(file: Path) -> dict[str, Path]:
    """Name -> library, of all that a binary is linked with, and the loader under its own path."""
    found: dict[str, Path] = {}
    listed = subprocess.run(["ldd", file], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        words = line.split()
        if "=>" in words and words[2].startswith("/"):
            found[words[0]] = Path(words[2])
        elif words and words[0].startswith("/"):
            found[words[0]] = Path(words[0])
        elif "not found" in line:
            raise SystemExit(f"collect: {file} needs {words[0]}, which is not there")
    return found


def collect(root: Path) -> None:
    """Copy everything into `root`; times and modes are the same in every build."""
    files = {
        Path(module.__file__).resolve() for module in LOADED.values() if getattr(module, "__file__", None)
    }
    # All of the program, whether it was loaded or not: that is what a simulated enclave measures.
    files |= set((BUILD / "app").rglob("*.py"))
    places = {target(file): file for file in files} | {"usr/bin/python3": PYTHON}
    binaries = [file for file in places.values() if file == PYTHON or ".so" in file.suffixes]
    linked = {name: path for file in binaries for name, path in libraries(file).items()}
    system = linked["libc.so.6"].parent  # where the loader looks without being told
    for name, path in linked.items():
        if name.startswith("/"):
            places[name.lstrip("/")] = path
        elif path.resolve().is_relative_to(BUILD):
            places[target(path.resolve())] = path
        else:
            places[f"{system.relative_to('/')}/{name}"] = path
    for place, file in sorted(places.items()):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root / place)
        (root / place).chmod(0o755 if file in binaries or ".so" in file.suffixes else 0o644)
    # Python looks for lib-dynload, an enclave's first process mounts the rest.
    for place in (f"usr/lib/{VERSION}/lib-dynload", "dev", "proc", "run", "sys", "tmp"):
        (root / place).mkdir(parents=True, exist_ok=True)
    for path in [*root.rglob("*"), root]:
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (0, 0))
    print(f"collect: {len(places)} files, {len(LOADED)} modules")


collect(Path(sys.argv[1]))
