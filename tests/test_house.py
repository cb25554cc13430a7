"""Laws of the house: what must stay in step, does."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_server.api.problems import STATUS
from gpu_server.core.errors import FailureCode, RefusalCode
from gpu_server.core.sessions import FAILED_REASONS, CloseReason
from gpu_server.frames import SEALED_EVENTS, WORKER_EVENTS
from gpu_server.settings import Settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpu_server"

DECLARATIONS = {
    "core/events.py": "facts without behaviour; every decision on them is tested in tests/core/test_node.py",
    "core/effects.py": "orders without behaviour; the engine's tests carry each of them out",
    "ports.py": "protocols and records; tests/contracts runs one suite over every implementation",
}
"""Modules without a test file of their own, each with the reason."""


def modules() -> list[str]:
    """Every module of the package, as a path below it."""
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def tracked() -> list[Path]:
    """The files of the repository: those git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# -- tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in modules() if not name.endswith("__init__.py")])
def test_every_module_has_tests(module: str) -> None:
    """core/ is tested in tests/core, drivers/ in tests/drivers, and so on; everything else in tests/app."""
    if module in DECLARATIONS:
        return
    folder, _, name = module.rpartition("/")
    places = {"api": "app/test_api_", "": "app/test_"} | {
        name: f"{name}/test_" for name in ("client", "core", "drivers", "sealed")
    }
    assert (ROOT / f"tests/{places[folder]}{name}").is_file()


def test_declarations_declare() -> None:
    """The modules that have no tests of their own decide nothing: no branch, no loop."""
    for module in DECLARATIONS:
        tree = ast.parse((PACKAGE / module).read_text())
        deciding = (ast.If, ast.For, ast.While, ast.Try, ast.IfExp, ast.comprehension)
        assert not [node for node in ast.walk(tree) if isinstance(node, deciding)], module


def test_every_test_says_its_promise() -> None:
    """Every test function has a docstring."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


# -- settings ---------------------------------------------------------------------------------------------


def example() -> dict[str, tuple[str, bool]]:
    """`.env.example`: name -> (value, whether it is commented out)."""
    lines = re.findall(r"^(# )?([A-Z][A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    found = {name: (value, bool(hidden)) for hidden, name, value in lines}
    assert len(found) == len(lines), "a name stands twice"
    return found


def test_settings_are_documented() -> None:
    """Settings, `.env.example` and README's table name the same settings."""
    real = {name.upper() for name in Settings.model_fields}
    section = (ROOT / "README.md").read_text().split("\n## Settings")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert set(example()) == real
    assert set(re.findall(r"`([A-Z][A-Z0-9_]+)`", "\n".join(rows))) == real


def test_defaults_are_true(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`.env.example` as it stands changes nothing."""
    for name in example():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shown = {name: value for name, (value, hidden) in example().items() if not hidden}
    plain = Settings()
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    assert Settings() == plain


def test_other_names_are_real() -> None:
    """A name in capitals that the documents set in code type is a setting, or one we know of."""
    known = {name.upper() for name in Settings.model_fields} | {
        "DELETE",
        "GPU_COUNT",
        "GPU_SERVER_API_KEY",
        "GPU_SERVER_URL",
        "GPU_SERVER_TENANT",
        "GPU_SESSION_ID",
        "GPU_WORKER_SOCKET",
        "HOME",
        "LOGNAME",
        "MAX_CONCURRENT_TASKS",
        "POST",
        "MODEL_ID",
        "SEALED_KMS_KEY_ARN",
        "SEALED_POOL",
        "SEALED_TENANT",
        "TASK_ID",
        "TASK_PRESET",
        "USER",
    }
    for path in (ROOT / "docs").glob("*.md"):
        named = set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", path.read_text()))
        assert named <= known, path.name


# -- codes and events -------------------------------------------------------------------------------------


def table(heading: str) -> list[list[str]]:
    """The rows of a table of docs/errors.md, cell by cell."""
    section = (ROOT / "docs/errors.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_refusals_are_documented() -> None:
    """docs/errors.md lists every refusal with its status, and no other."""
    rows = table("Refusals")
    documented = {row[0].strip("`"): int(row[1]) for row in rows}
    assert documented == {str(code): status for code, status in STATUS.items()}
    assert set(STATUS) == set(RefusalCode)
    assert len(rows) == len(documented)
    assert all(row[2] for row in rows)


def test_failures_are_documented() -> None:
    """docs/errors.md lists every failure code, and no other."""
    rows = table("Failures")
    assert sorted(row[0].strip("`") for row in rows) == sorted(FailureCode)
    assert all(row[1] in ("task", "session", "task, session") and row[2] for row in rows)


def test_close_reasons_are_documented() -> None:
    """docs/errors.md lists every reason for a session's end, and which of them are failures."""
    rows = table("Why a session ended")
    assert sorted(row[0].strip("`") for row in rows) == sorted(CloseReason)
    assert {row[0].strip("`") for row in rows if row[1] == "yes"} == set(FAILED_REASONS)


def test_every_code_is_used() -> None:
    """A code that nothing raises or publishes is a promise that nobody keeps."""
    sources = (
        "\n".join(
            path.read_text()
            for path in PACKAGE.rglob("*.py")
            if path.name not in ("errors.py", "problems.py")
        )
        + (PACKAGE / "api/problems.py").read_text().split("log = structlog")[1]
    )
    for kind, codes in (("RefusalCode", RefusalCode), ("FailureCode", FailureCode)):
        unused = [code.name for code in codes if not re.search(rf"{kind}\.{code.name}\b", sources)]
        assert unused == []


def test_events_are_documented() -> None:
    """README's table of events names every event that can be in a task's stream, and no other."""
    section = (ROOT / "README.md").read_text().split("| event | data |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    documented = {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}
    published: set[str] = {*WORKER_EVENTS, *SEALED_EVENTS}
    for path in (PACKAGE / "core/notices.py", PACKAGE / "stream.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                published |= _event_named(node)
    assert documented == published


def _event_named(call: ast.Call) -> set[str]:
    """The event that a call publishes, where it says so by name."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    candidates: list[Any] = [
        word.value for word in call.keywords if name == "Publish" and word.arg == "event"
    ]
    candidates += call.args[:1] if name == "encode" else []
    return {node.value for node in candidates if isinstance(node, ast.Constant)}


def test_publishing_is_in_one_place() -> None:
    """Only the notices make events of the service, so that the table above can be complete."""
    makers = {name for name in modules() if re.search(r"\bPublish\(\w+=", (PACKAGE / name).read_text())}
    assert makers == {"core/notices.py"}


# -- words ------------------------------------------------------------------------------------------------


def undocumented(path: Path) -> Iterator[str]:
    """Public modules, classes and functions without a docstring."""
    tree = ast.parse(path.read_text())
    if not ast.get_docstring(tree):
        yield f"{path.name}: the module"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node) and not _says_all(node):
            yield f"{path.name}:{node.lineno} {node.name}"


def _says_all(node: ast.AST) -> bool:
    """A class of names and types alone: an enum, or a record whose fields say what it is."""
    return isinstance(node, ast.ClassDef) and all(
        isinstance(line, ast.AnnAssign | ast.Assign | ast.Pass | ast.Expr) for line in node.body
    )


@pytest.mark.parametrize("module", modules())
def test_docstrings(module: str) -> None:
    """Every module, and every public class and function in it, says what it is."""
    assert list(undocumented(PACKAGE / module)) == []


def test_links_resolve() -> None:
    """Every relative link of the documents leads to a file, and every anchor to a heading."""
    broken = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name) if name else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


PRIVATE = re.compile(
    r"/(?:work|home/(?!somebody)\w+|Users)/"  # paths of somebody's machine
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\bAKIA[0-9A-Z]{16}\b|\bghp_\w{36}\b|\bhf_\w{30,}\b|\bsk-\w{20,}\b|\bxox[bp]-\w+"
    r"|\b(?:[\w-]+\.)+(?:internal|corp|lan)(?::\d+)?/"  # hosts that only one network knows
    r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}(?:\.\d{1,3})?:\d+"
    r"|index-url\s*[= ]\s*http|https?://[^\s/@]+:[^\s/@]+@"
)


def test_nothing_private() -> None:
    """No file names a path of somebody's machine, a registry of somebody's network, or a secret."""
    found = []
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in PRIVATE.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "name",
    ["gpu_server", "worker_images", "config", "tests", "scripts", "bench", "docs", ".env.example", "LICENSE"],
)
def test_top_level(name: str) -> None:
    """The folders that README and ARCHITECTURE speak of are there."""
    assert (ROOT / name).exists()
