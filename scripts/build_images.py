"""Builds the images that the demo and the tests run, on any machine with a Docker engine.

Nothing is fetched during a build (it has no network): the locked wheels are downloaded on the host, and
the build context holds them (`wheels/`), and the worker SDK (`sdk/`) and the sealed path (`sealed/`) where an
image has them, beside the image's own files. An image carries the hash of what it was made from, so an image
that is current is left alone.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors
import requests

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
BASE = "python:3.11-slim"
BASE_SUITE = "bookworm"  # the Debian release whose own Python is 3.11
DEB_ARCHITECTURE = "amd64"  # of images that need Debian packages
CONTEXT_LABEL = "gpu-server.context"


class BuildError(Exception):
    """Something the person at the terminal can act on; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """`only_wanted`: big, so it is not among `all`; `debs`: Debian packages that its Dockerfile installs;
    `requirements`: the wheels that it does."""

    name: str
    folder: Path
    dockerfile: str = "Dockerfile"
    base: str = BASE
    requirements: str = "requirements.txt"
    has_sdk: bool = True
    has_sealed: bool = True
    debs: tuple[str, ...] = ()
    only_wanted: bool = False

    @property
    def tag(self) -> str:
        return f"gpu-server/{self.name}:dev"


IMAGES = [
    Image(name="echo", folder=ROOT / "worker_images/echo"),
    Image(name="hostile", folder=ROOT / "tests/images/hostile"),
    Image(name="enclave", folder=ROOT / "enclave_image", has_sdk=False),
    Image(name="carwash", folder=ROOT / "worker_images/carwash", has_sdk=False, has_sealed=False),
    Image(
        name="vllm-cpu",
        folder=ROOT / "worker_images/vllm",
        dockerfile="Dockerfile.cpu",
        debs=("libnuma1",),
        only_wanted=True,
    ),
    Image(
        name="vllm",
        folder=ROOT / "worker_images/vllm",
        base="vllm/vllm-openai:v0.32.0",
        requirements="requirements.sealed.txt",  # the base image has the others
        only_wanted=True,
    ),
]
FULL = ("echo", "hostile", "enclave", "carwash", "vllm-cpu")  # what all the tests need


def chosen(wanted: str) -> list[Image]:
    """The images that a word on the command line stands for."""
    if wanted == "all":
        return [image for image in IMAGES if not image.only_wanted]
    names = FULL if wanted == "full" else (wanted,)
    return [image for image in IMAGES if image.name in names]


def build(client: docker.DockerClient, image: Image) -> None:
    if not (image.folder / image.dockerfile).is_file():
        raise BuildError(f"{image.folder / image.dockerfile} is missing: is the checkout complete?")
    base_id = ensure_base(client, image.base)
    with tempfile.TemporaryDirectory(prefix=f"gpu-server-{image.name}-") as folder:
        context = Path(folder)
        stage(image, context)
        digest = fingerprint(context, base_id)
        if current_label(client, image.tag) == digest:
            print(f"images: {image.tag} is current")
            return
        print(f"images: building {image.tag}", flush=True)
        log: list[str] = []
        for line in client.api.build(
            path=str(context),
            dockerfile=image.dockerfile,
            tag=image.tag,
            labels={CONTEXT_LABEL: digest},
            network_mode="none",
            rm=True,
            forcerm=True,
            decode=True,
        ):
            log.append(line.get("stream", ""))
            if "error" in line:
                tail = "\n".join("".join(log).splitlines()[-40:])
                raise BuildError(f"{tail}\n{image.tag} could not be built: {line['error']}")


def stage(image: Image, context: Path) -> None:
    """Puts into `context` all that the image's Dockerfile may copy."""
    made_here = ("wheels", "sdk", "*.eif", "measurements.json", "kms-key-policy.json")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*", *made_here)
    shutil.copytree(image.folder, context, dirs_exist_ok=True, ignore=unwanted)
    requirements = image.folder / image.requirements
    if not requirements.is_file():
        return
    if image.has_sealed:
        shutil.copytree(ROOT / "gpu_server/sealed", context / "sealed", ignore=unwanted)
    if image.has_sdk:
        shutil.copytree(ROOT / "worker_images/sdk", context / "sdk", ignore=unwanted)
    shutil.copytree(wheels(image.name, requirements), context / "wheels", copy_function=link_or_copy)
    if image.debs:
        shutil.copytree(debs(image), context / "debs")


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file that nobody changes, where both lie on one file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def debs(image: Image) -> Path:
    """The folder with an image's Debian packages, from this machine's own package sources, or put there."""
    folder = CACHE / "debs" / image.name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in image.debs if not any(folder.glob(f"{name}_*.deb"))]
    if missing and host_packages_fit():
        print(f"images: downloading {' '.join(missing)} for {image.name}", flush=True)
        if os.environ.get("CI") and os.geteuid() == 0:
            quietly("apt-get", "update", "-q")
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=folder, capture_output=True)
        missing = [name for name in image.debs if not any(folder.glob(f"{name}_*.deb"))]
    if missing:
        raise BuildError(
            f"{image.tag} needs Debian packages that apt-get cannot download here: {' '.join(missing)}.\n"
            f"        Put those of {BASE_SUITE}, {DEB_ARCHITECTURE}, into {folder} (packages.debian.org).\n"
            f"        On Debian {BASE_SUITE} with {DEB_ARCHITECTURE} it is enough to run apt-get update."
        )
    return folder


def host_packages_fit() -> bool:
    """Whether this machine's own packages are those of the base image."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return False
    system = platform.freedesktop_os_release()
    return (
        system.get("ID") == "debian"
        and system.get("VERSION_CODENAME") == BASE_SUITE
        and quietly("dpkg", "--print-architecture").strip() == DEB_ARCHITECTURE
    )


def wheels(name: str, requirements: Path) -> Path:
    """The folder with the wheels of a locked requirements file, for the images' Python on this processor."""
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    folder = CACHE / "wheels" / name
    stamp = folder.with_suffix(".stamp")
    wanted = f"{hashlib.sha256(requirements.read_bytes()).hexdigest()} {machine}"
    if folder.is_dir() and stamp.is_file() and stamp.read_text() == wanted:
        return folder
    print(f"images: downloading the wheels for {name}", flush=True)
    # What is there already, for older requirements or put there, is not loaded again.
    stamp.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "-r", str(requirements), "--dest", str(folder)]
    command += [
        "--implementation",
        "cp",
        "--python-version",
        "3.11",
        "--abi",
        "cp311",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    # pip takes these literally, so every glibc up to that of the base image (2.36) is named.
    for glibc in range(36, 4, -1):
        command += ["--platform", f"manylinux_2_{glibc}_{machine}"]
    command += ["--platform", f"manylinux2014_{machine}", "--platform", f"manylinux1_{machine}"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        readme = requirements.with_name("README.md")
        hint = f"; {readme} says where they come from" if readme.is_file() else ""
        raise BuildError(
            f"{result.stderr[-4000:]}\nthe wheels of {requirements} could not be downloaded (see above){hint}"
        )
    locked = requirements.read_text()
    for path in folder.iterdir():
        with path.open("rb") as file:
            unwanted = hashlib.file_digest(file, "sha256").hexdigest() not in locked
        if unwanted:
            path.unlink()
    stamp.write_text(wanted)
    return folder


def fingerprint(context: Path, base_id: str) -> str:
    digest = hashlib.sha256(base_id.encode())
    for path in sorted(path for path in context.rglob("*") if path.is_file()):
        mode = path.stat().st_mode & 0o777
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(context)} {mode:o} {content}\n".encode())
    return digest.hexdigest()


def current_label(client: docker.DockerClient, tag: str) -> str | None:
    try:
        labels: dict[str, str] = client.images.get(tag).labels
    except docker.errors.ImageNotFound:
        return None
    return labels.get(CONTEXT_LABEL)


def ensure_base(client: docker.DockerClient, base: str) -> str:
    """The id of the base image: the one that is here, else pulled, else, for Python's, a stand-in."""
    try:
        return str(client.images.get(base).id)
    except docker.errors.ImageNotFound:
        pass
    print(f"images: pulling {base}", flush=True)
    try:
        return str(client.images.pull(base).id)
    except (docker.errors.APIError, requests.RequestException) as error:
        problem = f"{base} cannot be pulled: {getattr(error, 'explanation', None) or error}"
    if base != BASE:
        raise BuildError(problem)
    print(f"images: {problem}", flush=True)
    import_stand_in(client)
    return str(client.images.get(BASE).id)


def import_stand_in(client: docker.DockerClient) -> None:
    rootfs = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu-server/base-rootfs.tar"
    if not rootfs.is_file():
        make_rootfs(rootfs)
    client.api.import_image(
        src=str(rootfs),
        repository=BASE.partition(":")[0],
        tag=BASE.partition(":")[2],
        changes=['CMD ["python3"]', "LABEL gpu-server.stand-in=true"],
    )
    print(f"images: NOTE: {BASE} here is now a STAND-IN made from Debian packages, not the official image.")
    print(f"images:       To be rid of it: docker image rm {BASE}, and delete {rootfs}", flush=True)


def make_rootfs(rootfs: Path) -> None:
    """Makes a root file system that Dockerfiles written for the official image build on.

    Takes under a minute; needs root, debootstrap and the machine's own package mirror.
    """
    if os.environ.get("CI") and os.geteuid() == 0 and shutil.which("debootstrap") is None:
        quietly("apt-get", "update", "-q")
        quietly("apt-get", "install", "-qy", "--no-install-recommends", "debootstrap")
    mirror = debian_mirror()
    missing = []
    if os.geteuid() != 0:
        missing.append("root")
    if shutil.which("debootstrap") is None:
        missing.append("debootstrap")
    if mirror is None:
        missing.append("a Debian mirror among the machine's package sources")
    if mirror is None or missing:
        raise BuildError(
            f"{BASE} is neither here nor can it be pulled, and a stand-in needs {' and '.join(missing)}.\n"
            f"        Give this engine the image: docker pull {BASE}, or docker load a saved one."
        )

    print(f"images: making a stand-in for {BASE} with debootstrap (about a minute, once)", flush=True)
    rootfs.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-server-base-") as folder:
        root = Path(folder) / "root"
        include = "--include=python3,python3-pip,python3-venv,ca-certificates"
        quietly("debootstrap", "--variant=minbase", include, BASE_SUITE, str(root), mirror)
        # In the official image `python` is on the path and pip installs into the system.
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)
        for leftovers in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
            shutil.rmtree(root / leftovers)
            (root / leftovers).mkdir()
        unfinished = rootfs.with_suffix(".partial")
        with tarfile.open(unfinished, "w") as archive:
            archive.add(root, arcname=".")
        unfinished.rename(rootfs)


def debian_mirror() -> str | None:
    """The Debian archive this machine installs from, in apt's own reading of its package sources."""
    if shutil.which("apt-get") is None:
        return None
    system = platform.freedesktop_os_release()
    if system.get("ID") != "debian":
        return None
    layout = "$(RELEASE) $(COMPONENT) $(REPO_URI)"
    targets = quietly(
        "apt-get", "indextargets", "--no-release-info", "--format", layout, "Created-By: Packages"
    )
    for line in targets.splitlines():
        release, component, uri = line.split(maxsplit=2)
        if (release, component) == (system.get("VERSION_CODENAME"), "main"):
            return uri  # of this machine's release; the archive serves the others too
    return None


def quietly(*command: str) -> str:
    """What the command printed; a failure shows it."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise BuildError(f"{result.stdout[-4000:]}\n{command[0]} failed with status {result.returncode}")
    return result.stdout


@contextmanager
def alone() -> Iterator[None]:
    """Waits while another run in this checkout builds."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "build_images.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the images that the demo and the tests run.")
    names = [image.name for image in IMAGES]
    parser.add_argument(
        "image",
        nargs="?",
        default="all",
        choices=[*names, "all", "full"],
        help=f"all (the default) leaves out the big ones; full is {', '.join(FULL)}",
    )
    wanted = parser.parse_args().image
    try:
        # Minutes, since the engine answers an import or a slow build step only when it is done.
        client = docker.from_env(timeout=600)
        client.ping()
    except (docker.errors.DockerException, requests.RequestException) as error:
        print(f"images: no Docker engine answers ({error}).", file=sys.stderr)
        print(
            "        Start Docker, or set DOCKER_HOST to an engine that this user may use.", file=sys.stderr
        )
        return 1
    try:
        with alone():
            for image in chosen(wanted):
                build(client, image)
    except (BuildError, docker.errors.DockerException, requests.RequestException) as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
