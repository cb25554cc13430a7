"""The presets file: what it may say, and that every mistake in it is found and told with its place."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from gpu_server import presets
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import SealedUse
from gpu_server.core.slots import Tier
from gpu_server.ports import Contract
from gpu_server.presets import Preset, Presets, PresetsError
from gpu_server.settings import Settings

ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, text: str, *images: str) -> Presets:
    path = tmp_path / "presets.yaml"
    path.write_text(dedent(text))
    return presets.load(path, images or ("*",))


def one(tmp_path: Path, field: str = "") -> Preset:
    """A preset that says one thing beside its image."""
    text = f"models:\n  m:\n    p:\n      docker_image: image\n      {field}\n"
    return load(tmp_path, text).get("m", "p")


def problems(tmp_path: Path, text: str) -> list[str]:
    """The mistakes in a file, without its path; every one must name the file."""
    with pytest.raises(PresetsError) as caught:
        load(tmp_path, text)
    prefix = f"{tmp_path / 'presets.yaml'}:"
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all(problem.startswith(prefix) for problem in caught.value.problems)
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


def test_the_shipped_file_is_valid() -> None:
    """config/model_presets.yaml can be used as it is, with the images that are allowed by default."""
    loaded = presets.load(
        ROOT / "config/model_presets.yaml", Settings.model_fields["allowed_docker_images"].default
    )
    names = [(model_id, name) for model_id, name, _ in loaded]
    assert ("echo", "stream") in names
    for model_id, name in names:
        preset = loaded.get(model_id, name)
        if preset.model == "none":
            assert preset.process_command, "what needs no model can be run where there is no Docker"


def test_defaults(tmp_path: Path) -> None:
    """A preset needs an image only; everything else has the default that README tells."""
    preset = one(tmp_path)
    assert preset.model_dump() == {
        "docker_image": "image",
        "command": None,
        "process_command": None,
        "env_vars": {},
        "contract": "http",
        "model": "folder",
        "gpus": 1,
        "max_concurrent_tasks": 1,
        "start_timeout_seconds": 600,
        "memory": 8 << 30,
        "cpus": 4,
        "pids": 512,
        "tmp_size": 256 << 20,
        "tmp_exec": False,
        "shm_size": 64 << 20,
        "openai": False,
        "task_difficulty": None,
        "sealed": None,
        "wash": "per_lease",
    }


def test_one_preset_of_a_model_serves_openai(tmp_path: Path) -> None:
    """A request of the OpenAI routes names a model alone, so the file says which preset that means."""
    text = """
    models:
      m:
        p: {docker_image: image}
        q: {docker_image: image, openai: true}
      n:
        p: {docker_image: image}
      o:
        p: {docker_image: elsewhere/image, openai: true}
    """
    loaded = load(tmp_path, text, "image")
    found = [loaded.openai_preset(model_id) for model_id in ("m", "n", "o", "?")]
    assert [one and one[0] for one in found] == ["q", None, "p", None]
    assert loaded.openai_models() == ["m"], "the image of `o` may not be started"
    assert loaded.changed_at == int((tmp_path / "presets.yaml").stat().st_mtime)


def test_the_difficulty(tmp_path: Path) -> None:
    """A preset may name the tier of the sessions that the OpenAI routes start; by default it names none."""
    assert one(tmp_path).tier is None
    assert one(tmp_path, "task_difficulty: high").tier is Tier.HIGH
    (problem,) = problems(tmp_path, "models: {m: {p: {docker_image: image, task_difficulty: medium}}}")
    assert "task_difficulty" in problem


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", SealedUse.ALLOWED),
        ("sealed: off", SealedUse.OFF),  # which is a boolean in YAML
        ("sealed: 'off'", SealedUse.OFF),
        ("contract: exec", SealedUse.OFF),
    ],
)
def test_sealed(tmp_path: Path, line: str, expected: SealedUse) -> None:
    """A preset says whether its sessions may, or must, be sealed; by default http ones may."""
    assert one(tmp_path, line).workload("m", "p").sealed is expected


@pytest.mark.parametrize(
    ("line", "expected"), [("gpus: 1", False), ("wash: per_lease", False), ("wash: per_task", True)]
)
def test_wash(tmp_path: Path, line: str, expected: bool) -> None:
    """A preset says whether its slots are washed after every task."""
    assert one(tmp_path, line).workload("m", "p").wash_per_task is expected


def test_sealed_only(tmp_path: Path) -> None:
    """What must be sealed is served by the name of its pool."""
    text = """
    pools: {only: {model_id: m, task_preset: p}}
    models: {m: {p: {docker_image: image, sealed: required}}}
    """
    loaded = load(tmp_path, text)
    assert loaded.get(*loaded.pool("only")).workload("m", "p").sealed is SealedUse.REQUIRED


@pytest.mark.parametrize("line", ["sealed: on", "sealed: never", "sealed: required\n      contract: exec"])
def test_sealed_mistakes(tmp_path: Path, line: str) -> None:
    """Any other word is a mistake, and so is a sealed program, which has no session."""
    (problem,) = problems(tmp_path, f"models:\n  m:\n    p:\n      docker_image: image\n      {line}\n")
    assert "sealed" in problem


def test_pools(tmp_path: Path) -> None:
    """A pool is a name for a preset, and a preset may have several or none."""
    text = """
    pools:
      a/1: {model_id: m, task_preset: p}
      b: {model_id: m, task_preset: p}
    models:
      m:
        p: {docker_image: image}
        q: {docker_image: image}
    """
    loaded = load(tmp_path, text, "image")
    assert loaded.pool("a/1") == ("m", "p")
    assert (loaded.pools_of("m", "p"), loaded.pools_of("m", "q")) == (["a/1", "b"], [])
    with pytest.raises(Refusal) as refused:
        loaded.pool("c")
    assert refused.value.code is RefusalCode.POOL_NOT_FOUND


def test_every_field_is_in_the_readme() -> None:
    """README's table of presets names every field and no other."""
    section = (ROOT / "README.md").read_text().split("## Presets")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name.strip().strip("`") for cell in cells for name in cell.split(",")} == set(Preset.model_fields)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("0", 0), ("1024", 1024), ("1k", 1024), ("512m", 512 << 20), ("8G", 8 << 30), ("' 2g '", 2 << 30)],
)
def test_sizes(tmp_path: Path, size: str, expected: int) -> None:
    """Sizes are bytes, or text with a unit."""
    assert one(tmp_path, f"memory: {size}").memory == expected


@pytest.mark.parametrize("size", ["1t", "-1", "1.5g", "g", "big", "[]", "true", "null", "''"])
def test_wrong_sizes(tmp_path: Path, size: str) -> None:
    """Any other size is a mistake on its own line."""
    text = f"models:\n  m:\n    p:\n      docker_image: image\n      memory: {size}\n"
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("5: models.m.p.memory: ")


def test_environment_is_text(tmp_path: Path) -> None:
    """Numbers and booleans of YAML become the text that was meant."""
    preset = one(tmp_path, "env_vars: {A: 1, B: 1.5, C: true, D: text, E: 'no'}")
    assert preset.env_vars == {"A": "1", "B": "1.5", "C": "true", "D": "text", "E": "no"}


def test_workload_and_limits(tmp_path: Path) -> None:
    """What the core and the runtimes get is what the file says."""
    fields = ("gpus: 2", "contract: exec", "start_timeout_seconds: 7", "cpus: 0.5", "pids: 9")
    preset = one(tmp_path, "\n      ".join(fields))
    workload = preset.workload("m", "p")
    assert (workload.model_id, workload.task_preset, workload.gpus) == ("m", "p", 2)
    assert workload.serves_sessions is False
    assert workload.start_timeout == 7
    assert preset.worker_contract is Contract.EXEC
    assert (preset.limits.cpus, preset.limits.pids, preset.limits.memory) == (0.5, 9, 8 << 30)


MISTAKES = {
    "unknown field": (
        """\
        models:
          m:
            p:
              docker_image: image

              # a comment, and then the mistake
              gpu: 1
        """,
        ["7: models.m.p.gpu: Extra inputs are not permitted"],
    ),
    "two for openai": (
        """\
        models:
          m:
            p: {docker_image: image, openai: true}
            q: {docker_image: image}
            r: {docker_image: image, openai: true}
        """,
        ["2: models.m: Value error, only one preset of a model may have openai: true; p, r have it"],
    ),
    "openai without sessions": (
        """\
        models:
          m:
            p: {docker_image: image, contract: exec, openai: true}
        """,
        ["3: models.m.p: Value error, the OpenAI routes need sessions, which an exec preset has not"],
    ),
    "openai without seals": (
        """\
        models:
          m:
            p: {docker_image: image, openai: true, sealed: required}
        pools: {only: {model_id: m, task_preset: p}}
        """,
        ["3: models.m.p: Value error, the OpenAI routes cannot seal: openai must be false"],
    ),
    "missing field": (
        """\
        models:
          m:
            p:
              gpus: 1
        """,
        ["3: models.m.p.docker_image: Field required"],
    ),
    "wrong types": (
        """\
        models:
          m:
            p:
              docker_image: 1
              gpus: two
              tmp_exec: 1
              command: echo hello
              cpus: 0
              process_command: [python, 3]
        """,
        [
            "4: models.m.p.docker_image: Input should be a valid string",
            "7: models.m.p.command: Input should be a valid list",
            "9: models.m.p.process_command.1: Input should be a valid string",
            "5: models.m.p.gpus: Input should be a valid integer",
            "8: models.m.p.cpus: Input should be greater than 0",
            "6: models.m.p.tmp_exec: Input should be a valid boolean",
        ],
    ),
    "several presets": (
        """\
        models:
          a:
            p: {docker_image: image, gpus: 0}
            q: {docker_image: image}
          b/c:
            r:
              docker_image: image
              contract: grpc
        """,
        [
            "3: models.a.p.gpus: Input should be greater than or equal to 1",
            "8: models.b/c.r.contract: Input should be 'http' or 'exec'",
        ],
    ),
    "a rule over two fields": (
        """\
        models:
          m:
            p:
              docker_image: image
              contract: exec
              max_concurrent_tasks: 2
        """,
        ["3: models.m.p: Value error, an exec preset runs one task: max_concurrent_tasks must be 1"],
    ),
    "environment": (
        """\
        models:
          m:
            p:
              docker_image: image
              env_vars:
                GOOD: 1
                BAD-NAME: 2
                LIST: [1]
        """,
        [
            "7: models.m.p.env_vars.BAD-NAME: String should match pattern",
            "8: models.m.p.env_vars.LIST: Input should be a valid string",
        ],
    ),
    "pools": (
        """\
        models:
          m:
            p: {docker_image: image}
            e: {docker_image: image, contract: exec}
        pools:
          there: {model_id: m, task_preset: p}
          nowhere: {model_id: m, task_preset: x}
          program: {model_id: m, task_preset: e}
        """,
        [
            "7: pools.nowhere: there is no preset m/x",
            "8: pools.program: preset m/e has the exec contract",
        ],
    ),
    "sealed without a pool": (
        """\
        pools:
          q: {model_id: m, task_preset: q}
          n: {model_id: n, task_preset: p}
        models:
          m:
            p: {docker_image: image, sealed: required}
            q: {docker_image: image, sealed: required}
        """,
        [
            "3: pools.n: there is no preset n/p",
            "6: models.m.p: sealed is required, and no pool stands for this preset",
        ],
    ),
    "names of pools": (
        """\
        models: {}
        pools:
          "a b": {model_id: m}
        """,
        ["3: pools.a b: String should match pattern", "3: pools.a b.task_preset: Field required"],
    ),
    "names": (
        """\
        models:
          ../escape:
            p: {docker_image: image}
          m:
            "a b": {docker_image: image}
          7:
            p: {docker_image: image}
        """,
        [
            "2: models.../escape: String should match pattern",
            "5: models.m.a b: String should match pattern",
            "6: models.7: Input should be a valid string",
        ],
    ),
    "top level": (
        """\
        model:
          m: {}
        """,
        ["1: models: Field required", "1: model: Extra inputs are not permitted"],
    ),
    "a list": ("- models", ["1: (file): Input should be a valid dictionary"]),
    "a text": ("models", ["1: (file): Input should be a valid dictionary"]),
    "no presets": ("models:\n  m: null", ["2: models.m: Input should be a valid dictionary"]),
    "empty": ("", ["1: the file is empty"]),
    "only comments": ("# nothing\n# here\n", ["1: the file is empty"]),
    "not YAML": ("models:\n  m: [1\n  n: 2\n", ["3: not YAML: expected ',' or ']'"]),
    "a tab": ("models:\n\tm: 1\n", ["2: not YAML: found character"]),
    "two documents": ("models: {}\n---\nmodels: {}\n", ["2: not YAML: but found another document"]),
    "a tag": (
        "models:\n  m: !python/object:os.system {}\n",
        ["2: not YAML: could not determine a constructor"],
    ),
    "a key that is a list": ("models:\n  ? [a]\n  : {}\n", ["2: not YAML: found unhashable key"]),
    "no date": ("models:\n  m: 2024-13-45\n", ["1: not YAML: month must be in 1..12"]),
    "doubled keys": (
        """\
        models:
          m:
            p:
              docker_image: image
              gpus: 1
              docker_image: other
            p: {docker_image: image}
          m: {}
        """,
        [
            "6: models.m.p.docker_image: this key stands twice",
            "7: models.m.p: this key stands twice",
            "8: models.m: this key stands twice",
        ],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path: Path, mistake: str) -> None:
    """Every mistake in the file is told, with file, line and path."""
    text, expected = MISTAKES[mistake]
    found = problems(tmp_path, text)
    assert len(found) == len(expected), found
    for problem, beginning in zip(sorted(found), sorted(expected), strict=True):
        assert problem.startswith(beginning)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is missing, is a folder or is no text is told as such."""
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(PresetsError, match="cannot be read"):
            presets.load(path, ("*",))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"models: \xff")
    with pytest.raises(PresetsError, match="cannot be read"):
        presets.load(binary, ("*",))


PINNED = "registry.example/team/model@sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("image", "allowed", "expected"),
    [
        ("gpu-server/echo:dev", ("gpu-server/*",), True),
        ("gpu-server-evil/echo", ("gpu-server/*",), False),
        ("x/gpu-server/echo", ("gpu-server/*",), False),
        ("gpu-server/a/b", ("gpu-server/*",), True),
        ("image", (), False),
        ("image", ("other", "image"), True),
        ("IMAGE", ("image",), False),
        (PINNED, (PINNED,), True),
        (PINNED.replace("00", "01", 1), (PINNED,), False),
        (PINNED, ("registry.example/team/*@sha256:*",), True),
        ("registry.example/team/model:latest", ("registry.example/team/*@sha256:*",), False),
    ],
)
def test_allowed_images(tmp_path: Path, image: str, allowed: tuple[str, ...], expected: bool) -> None:
    """An image may be started if a pattern matches all of it; a digest is matched like any other text."""
    path = tmp_path / "presets.yaml"
    path.write_text(f"models:\n  m:\n    p: {{docker_image: '{image}'}}\n")
    loaded = presets.load(path, allowed)
    assert loaded.allows(image) is expected
    if expected:
        assert loaded.get("m", "p").docker_image == image
    else:
        with pytest.raises(Refusal) as refused:
            loaded.get("m", "p")
        assert refused.value.code is RefusalCode.IMAGE_NOT_ALLOWED


def test_unknown_names(tmp_path: Path) -> None:
    """A model that is not there and a preset that is not there are told apart."""
    loaded = load(tmp_path, "models:\n  m:\n    p: {docker_image: i}\n    a: {docker_image: i}\n")
    with pytest.raises(Refusal, match="no preset for model 'x'") as refused:
        loaded.get("x", "p")
    assert refused.value.code is RefusalCode.MODEL_NOT_FOUND
    with pytest.raises(Refusal, match="it has a, p") as refused:
        loaded.get("m", "x")
    assert refused.value.code is RefusalCode.PRESET_NOT_FOUND
