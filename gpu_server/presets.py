"""Presets: `(model_id, task_preset)` -> image, command, environment, resources, contract.

The file is YAML, `models: <model_id>: <task_preset>: {...}`. Every mistake in it is reported with the file,
the path inside it and the line; a file with a mistake is not used at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import SealedUse, Workload
from gpu_server.core.slots import Tier
from gpu_server.ports import Contract, Limits

_SIZE = re.compile(r"(\d+)([kmg]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]*$"
_POOL = r"^[A-Za-z0-9._:/-]{1,128}$"
_MODEL_ID = r"^[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)?$"


class PresetsError(Exception):
    """The presets file cannot be used. `problems` holds one line for each mistake: file:line: path: what."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _bytes(value: object) -> object:
    """Accept 512m, 8g or a plain number of bytes."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(match[1]) * _UNITS[match[2].lower()]
    return value


def _env_text(value: object) -> object:
    """YAML reads `1` and `true` as number and boolean; a worker's environment is text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
EnvText = Annotated[str, BeforeValidator(_env_text)]


def _off_text(value: object) -> object:
    """YAML reads `off` as a boolean."""
    return "off" if value is False else value


SealedText = Annotated[Literal["required", "allowed", "off"], BeforeValidator(_off_text)]


class Preset(BaseModel):
    """One entry of the presets file. Sizes are bytes, or text such as `512m` and `8g`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    docker_image: Annotated[str, Field(min_length=1)]
    """Image of the worker, by tag or digest; ALLOWED_DOCKER_IMAGES must match it."""
    command: list[str] | None = None
    """Command in the container; the image's own by default."""
    process_command: list[str] | None = None
    """Command where RUNTIME is `process`; a first word `python` means the service's interpreter."""
    env_vars: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], EnvText] = Field(
        default_factory=dict
    )
    contract: Literal["http", "exec"] = "http"
    model: Literal["folder", "none"] = "folder"
    """`folder` mounts MODEL_CACHE_DIR/<model_id> at /models, `none` is for workers without weights."""
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    max_concurrent_tasks: Annotated[int, Field(ge=1, le=4096)] = 1
    start_timeout_seconds: Annotated[float, Field(gt=0, strict=False)] = 600.0
    memory: Size = 8 << 30
    cpus: Annotated[float, Field(gt=0, strict=False)] = 4.0
    pids: Annotated[int, Field(ge=8)] = 512
    tmp_size: Size = 256 << 20
    tmp_exec: bool = False
    shm_size: Size = 64 << 20
    openai: bool = False
    """Whether the OpenAI routes serve the model with this preset: its worker generates text."""
    task_difficulty: Literal["low", "high"] | None = None
    """The tier of the sessions that the OpenAI routes start; those requests cannot name one."""
    sealed: SealedText | None = None
    """Whether its sessions may be sealed, or must be; by default they may where the contract is http."""
    wash: Literal["per_lease", "per_task"] = "per_lease"
    """When its slots are washed: at a session's end, or after every task, with which its session ends."""

    @model_validator(mode="after")
    def _fields_fit(self) -> Preset:
        if self.contract == "exec" and self.max_concurrent_tasks != 1:
            raise ValueError("an exec preset runs one task: max_concurrent_tasks must be 1")
        if self.contract == "exec" and self.openai:
            raise ValueError(
                "the OpenAI routes need sessions, which an exec preset has not: openai must be false"
            )
        if self.contract == "exec" and self.sealed not in (None, "off"):
            raise ValueError("sealed requests need sessions, which an exec preset has not: it must be off")
        if self.openai and self.sealed == "required":
            raise ValueError("the OpenAI routes cannot seal: openai must be false where sealed is required")
        return self

    def workload(self, model_id: str, task_preset: str) -> Workload:
        """What the core needs to know."""
        return Workload(
            model_id=model_id,
            task_preset=task_preset,
            serves_sessions=self.contract == "http",
            gpus=self.gpus,
            max_concurrent_tasks=self.max_concurrent_tasks,
            start_timeout=self.start_timeout_seconds,
            sealed=SealedUse(self.sealed or ("allowed" if self.contract == "http" else "off")),
            wash_per_task=self.wash == "per_task",
        )

    @property
    def tier(self) -> Tier | None:
        return Tier(self.task_difficulty) if self.task_difficulty else None

    @property
    def worker_contract(self) -> Contract:
        return Contract(self.contract)

    @property
    def limits(self) -> Limits:
        return Limits(
            memory=self.memory,
            cpus=self.cpus,
            pids=self.pids,
            tmp_size=self.tmp_size,
            tmp_exec=self.tmp_exec,
            shm_size=self.shm_size,
        )


_OfOneModel = dict[Annotated[str, Field(pattern=_NAME)], Preset]


def _one_openai(presets: _OfOneModel) -> _OfOneModel:
    """A request of the OpenAI routes names a model and no preset, so there can be no choice."""
    if len(named := [name for name, preset in presets.items() if preset.openai]) > 1:
        raise ValueError(f"only one preset of a model may have openai: true; {', '.join(named)} have it")
    return presets


class Pool(BaseModel):
    """The preset that a pool stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_id: str
    task_preset: str


class PresetsFile(BaseModel):
    """The whole file. `pools` are names for presets, which sealed requests carry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[
        Annotated[str, Field(pattern=_MODEL_ID)], Annotated[_OfOneModel, AfterValidator(_one_openai)]
    ]
    pools: dict[Annotated[str, Field(pattern=_POOL)], Pool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pools_fit(self) -> PresetsFile:
        """A pool stands for a preset with sessions, and what must be sealed has a pool: a sealed session is
        always one of a pool, so nothing could ever use it without."""
        mistakes: list[InitErrorDetails] = []
        for name, pool in self.pools.items():
            preset = self.models.get(pool.model_id, {}).get(pool.task_preset)
            where = f"{pool.model_id}/{pool.task_preset}"
            if preset is None:
                mistakes.append(_mistake(f"there is no preset {where}", "pools", name))
            elif preset.contract == "exec":
                mistakes.append(
                    _mistake(f"preset {where} has the exec contract, so no sessions", "pools", name)
                )
        in_pools = {(pool.model_id, pool.task_preset) for pool in self.pools.values()}
        for model_id, presets in self.models.items():
            for name, preset in presets.items():
                if preset.sealed == "required" and (model_id, name) not in in_pools:
                    what = "sealed is required, and no pool stands for this preset: name one under `pools:`"
                    mistakes.append(_mistake(what, "models", model_id, name))
        if mistakes:
            raise ValidationError.from_exception_data("PresetsFile", mistakes)
        return self


def _mistake(what: str, *where: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("pool", "{what}", {"what": what}), loc=where, input=None)


class Presets:
    """The presets in use, and the images that may be started. `changed_at` is when their file was last
    changed, in seconds since 1970."""

    def __init__(self, file: PresetsFile, allowed_images: tuple[str, ...], changed_at: int = 0) -> None:
        self.changed_at = changed_at
        self._models, self._pools = file.models, file.pools
        self._allowed = allowed_images

    def __iter__(self) -> Iterator[tuple[str, str, Preset]]:
        for model_id, presets in self._models.items():
            for name, preset in presets.items():
                yield model_id, name, preset

    def get(self, model_id: str, task_preset: str) -> Preset:
        """The preset. Raises `Refusal` when there is none, or when its image is not allowed."""
        presets = self._models.get(model_id)
        if presets is None:
            raise Refusal(RefusalCode.MODEL_NOT_FOUND, f"no preset for model {model_id!r}")
        preset = presets.get(task_preset)
        if preset is None:
            known = ", ".join(sorted(presets))
            raise Refusal(
                RefusalCode.PRESET_NOT_FOUND,
                f"model {model_id!r} has no preset {task_preset!r}; it has {known}",
            )
        if not self.allows(preset.docker_image):
            raise Refusal(
                RefusalCode.IMAGE_NOT_ALLOWED,
                f"image {preset.docker_image} of {model_id}/{task_preset} is not in ALLOWED_DOCKER_IMAGES",
            )
        return preset

    def pool(self, name: str) -> tuple[str, str]:
        """The model and the preset that a pool stands for. Raises `Refusal`."""
        pool = self._pools.get(name)
        if pool is None:
            raise Refusal(RefusalCode.POOL_NOT_FOUND, f"no pool {name!r} is served here")
        return pool.model_id, pool.task_preset

    def pools_of(self, model_id: str, task_preset: str) -> list[str]:
        """The names of the pools that stand for a preset."""
        return [
            name for name, p in self._pools.items() if (p.model_id, p.task_preset) == (model_id, task_preset)
        ]

    def openai_preset(self, model_id: str) -> tuple[str, Preset] | None:
        """The preset that serves the OpenAI routes for this model, and its name; None where there is none."""
        presets = self._models.get(model_id, {})
        return next(((name, preset) for name, preset in presets.items() if preset.openai), None)

    def openai_models(self) -> list[str]:
        """The models that the OpenAI routes serve, but those whose image may not be started."""
        return [
            model_id for model_id, _, preset in self if preset.openai and self.allows(preset.docker_image)
        ]

    def allows(self, image: str) -> bool:
        """Whether ALLOWED_DOCKER_IMAGES names this image, literally or by a shell pattern."""
        return any(fnmatchcase(image, pattern) for pattern in self._allowed)


def load(path: Path, allowed_images: tuple[str, ...]) -> Presets:
    """Read and check a presets file. Raises `PresetsError` with every mistake found."""
    try:
        text, changed_at = path.read_text(encoding="utf-8"), int(path.stat().st_mtime)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise PresetsError([f"{path}: cannot be read: {error}"]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise PresetsError([f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}"]) from error
    except ValueError as error:  # the YAML reader's, for a date such as 2024-13-45
        raise PresetsError([f"{path}:1: not YAML: {error}"]) from error
    if tree is None:
        raise PresetsError([f"{path}:1: the file is empty; it needs a `models:` section"])
    doubled = [f"{path}:{line}: {where}: this key stands twice" for where, line in _doubled_keys(tree)]
    if doubled:
        raise PresetsError(doubled)
    try:
        file = PresetsFile.model_validate(content)
    except ValidationError as error:
        raise PresetsError([_problem(path, tree, detail) for detail in error.errors()]) from error
    return Presets(file, allowed_images, changed_at)


def _problem(path: Path, tree: yaml.Node, detail: Mapping[str, Any]) -> str:
    where = [part for part in detail["loc"] if part != "[key]"]
    return f"{path}:{_line_of(tree, where)}: {'.'.join(map(str, where)) or '(file)'}: {detail['msg']}"


def _line_of(node: yaml.Node, where: list[Any]) -> int:
    """The line of the deepest node on this path that exists."""
    line = node.start_mark.line
    for part in where:
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _doubled_keys(node: yaml.Node, where: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _doubled_keys(child, where)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        path = f"{where}.{key.value}" if where else str(key.value)
        if key.value in seen:
            yield path, key.start_mark.line + 1
        seen.add(key.value)
        yield from _doubled_keys(value, path)
