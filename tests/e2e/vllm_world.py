"""The real vLLM image, the tiny model, and a service that has both; what the tests of vLLM share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from docker import APIClient

from tests.e2e.harness import ROOT, Caller, Service, Services, presets, until

VLLM_IMAGE = "gpu-server/vllm-cpu:dev"
LOAD_SECONDS = 240.0
ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True}
TASKS = 8

PRESET: dict[str, Any] = {
    "docker_image": VLLM_IMAGE,
    "openai": True,
    "max_concurrent_tasks": TASKS,
    "start_timeout_seconds": LOAD_SECONDS,
    "memory": "6g",
    "cpus": 2,
    "pids": 512,
    "tmp_size": "1g",
    "tmp_exec": True,
    "shm_size": "512m",
    "env_vars": {"VLLM_CPU_KVCACHE_SPACE": 1, "ENGINE_ARGS": json.dumps(ENGINE_ARGS)},
}


def presets_with(runtime: str) -> dict[str, Any]:
    """The presets of the other tests, and the tiny model with two: one that works."""
    wrong = {**PRESET, "openai": False, "env_vars": {"ENGINE_ARGS": json.dumps({"no_such_argument": 1})}}
    tree = presets(runtime)
    tree["models"]["tiny"] = {"cpu": PRESET, "wrong": wrong}
    tree["pools"]["tiny"] = {"model_id": "tiny", "task_preset": "cpu"}
    return tree


def require_image(engine: APIClient) -> None:
    """Fails in CI where the image is not there, else skips."""
    if not engine.images(VLLM_IMAGE):
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"no {VLLM_IMAGE}: run scripts/build_images.py vllm-cpu")


def run_in_image(
    engine: APIClient,
    *command: str,
    mounts: Mapping[Path, str],
    env: Mapping[str, str] | None = None,
    seconds: int = 300,
) -> str:
    """Run a program in the image, without a network, and give its standard output."""
    host = engine.create_host_config(
        binds=[f"{path}:{target}" for path, target in mounts.items()],
        network_mode="none",
        tmpfs={"/tmp": "exec"},
        shm_size="512m",
        init=True,
    )
    container = engine.create_container(
        VLLM_IMAGE,
        list(command),
        host_config=host,
        user=f"{os.geteuid()}:{os.getegid()}",
        environment={"HOME": "/tmp", "USER": "tests", "LOGNAME": "tests", **(env or {})},
    )["Id"]
    try:
        engine.start(container)
        with closing(connect_patiently(engine, seconds)) as patient:
            status = patient.wait(container)["StatusCode"]
        said = engine.logs(container, stdout=True, stderr=False).decode()
        told = engine.logs(container, stdout=False, stderr=True).decode()
        assert status == 0, f"{said}\n{told}"
        return said
    finally:
        engine.remove_container(container, force=True)


def connect_patiently(engine: APIClient, seconds: int) -> APIClient:
    """The same engine, by a client that waits longer for an answer."""
    return APIClient(base_url=os.environ.get("DOCKER_HOST"), version=engine.api_version, timeout=seconds)


def make_model(engine: APIClient, folder: Path) -> None:
    """The tiny model, made by its script in the image."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run_in_image(
        engine,
        "/venv/bin/python",
        "/scripts/make_tiny_model.py",
        f"/out/{folder.name}",
        mounts={ROOT / "scripts": "/scripts:ro", folder.parent: "/out"},
    )


class VllmService:
    """A service with the tiny model, and the session that the tests share: loading it takes half a minute."""

    def __init__(self, services: Services, engine: APIClient, **settings: object) -> None:
        require_image(engine)
        self.engine = engine
        # The engine shares the processors with all that looks at it, so patience.
        self.service: Service = services.own(
            CPU_SLOTS=2, SESSION_IDLE_TIMEOUT_SECONDS=600, CANCEL_GRACE_SECONDS=20, **settings
        )
        (self.service.folder / "presets.yaml").write_text(yaml.safe_dump(presets_with("docker")))
        self.model = self.service.models / "tiny"
        make_model(engine, self.model)
        self.service.start()
        self.session_id: str | None = None

    async def warm(self, caller: Caller) -> str:
        """The shared session, started when it is not there."""
        session = self.session_id
        if session is None or (await caller.session(session))["state"] not in ("ready", "working"):
            session = self.session_id = (await caller.open("cpu", model="tiny"))["session_id"]
            await caller.in_state(session, "ready", within=LOAD_SECONDS)
        return session

    async def figures(self) -> dict[str, float]:
        """What the worker's engine says of itself now."""
        (path,) = self.service.run_dir.glob(f"*/{self.session_id}/**/worker.sock")
        connector = aiohttp.UnixConnector(path=str(path))
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            http.get("http://worker/health") as answer,
        ):
            return dict((await answer.json())["figures"])

    async def running(self, count: int) -> dict[str, float]:
        """Wait until the engine runs so many requests, and none waits; its figures then."""

        async def look() -> dict[str, float] | None:
            figures = await self.figures()
            return figures if (figures["running"], figures["waiting"]) == (count, 0) else None

        return await until(f"the engine runs {count} requests", look)

    async def idle(self) -> dict[str, float]:
        """Wait until the engine runs nothing; its figures then."""
        return await self.running(0)

    def kill_engine(self) -> None:
        """SIGKILL for the engine's process inside the container; the worker's own process lives on."""
        (container,) = [c["Id"] for c in self.service.containers() if self.session_id in c["Labels"].values()]
        code = (
            "import os, pathlib, signal\n"
            "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
            "    if path.read_bytes().startswith(b'VLLM::EngineCore'):\n"
            "        os.kill(int(path.parent.name), signal.SIGKILL)\n"
        )
        run = self.engine.exec_create(container, ["/venv/bin/python", "-S", "-c", code])["Id"]
        said = self.engine.exec_start(run)
        assert self.engine.exec_inspect(run)["ExitCode"] == 0, said
