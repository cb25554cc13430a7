"""The HTTP interface over an engine in process: the real application on a real port, and a client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI

from gpu_server import presets
from gpu_server.app import Server, create_app
from gpu_server.drivers.models import FolderModelStore
from gpu_server.ports import Enclave, KeyService
from gpu_server.service import Service
from gpu_server.settings import Settings
from tests.app.reading import Event, parse
from tests.app.world import IMAGE, World, engine_world, slot_specs, unwrapped

KEY = "the-internal-key-of-the-tests"
PRESETS = f"""
pools:
  default: {{model_id: m, task_preset: p}}
  closed: {{model_id: m, task_preset: closed}}
  never: {{model_id: m, task_preset: never}}
  one: {{model_id: m, task_preset: two}}
  other: {{model_id: m, task_preset: two}}
models:
  m:
    p: {{docker_image: {IMAGE}, model: none, env_vars: {{SECRET_OF_PRESET: hidden}}}}
    q: {{docker_image: {IMAGE}, model: none}}
    two: {{docker_image: {IMAGE}, model: none, gpus: 2}}
    nine: {{docker_image: {IMAGE}, model: none, gpus: 9}}
    exec: {{docker_image: {IMAGE}, model: none, contract: exec}}
    closed: {{docker_image: {IMAGE}, model: none, sealed: required}}
    never: {{docker_image: {IMAGE}, model: none, sealed: "off"}}
    forbidden: {{docker_image: elsewhere/image, model: none}}
  org/chat:
    p: {{docker_image: {IMAGE}, model: none}}
    serve: {{docker_image: {IMAGE}, model: none, openai: true, max_concurrent_tasks: 2}}
  hard:
    serve: {{docker_image: {IMAGE}, model: none, openai: true, task_difficulty: high}}
  closed:
    serve: {{docker_image: elsewhere/image, model: none, openai: true}}
"""
TASK = {"task_type": "session", "model_id": "m", "task_preset": "p"}


@dataclass(frozen=True)
class Answer:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def events(self) -> list[Event]:
        return parse(self.raw)

    def problem(self, status: int, code: str) -> dict[str, Any]:
        """The answer's problem, which must be this one and in the promised form."""
        problem = self.json
        assert (self.status, problem["code"]) == (status, code), problem
        assert self.headers["Content-Type"] == "application/problem+json"
        assert problem["status"] == status
        assert problem["type"] == f"urn:gpu-server:{code}"
        assert problem["title"]
        assert problem["detail"]
        return problem


@dataclass
class Api:
    """A running application."""

    world: World
    service: Service
    app: FastAPI
    url: str
    http: aiohttp.ClientSession

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        tenant: str | None = "a",
        key: str = KEY,
        **more: Any,
    ) -> Answer:
        """One request as a tenant (None: without a key)."""
        headers = {**({"X-API-Key": key, "X-Tenant-ID": tenant} if tenant else {}), **more.pop("headers", {})}
        if body is not None and "data" not in more:
            more["json"] = body
        async with asyncio.timeout(20), self.http.request(method, path, headers=headers, **more) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def submit(self, tenant: str = "a", **changes: Any) -> Answer:
        """Submit a task and follow it to its end, or to its refusal."""
        return await self.ask("POST", "/api/tasks/submit", {**TASK, **changes}, tenant=tenant)

    async def session(self, tenant: str = "a", preset: str = "p", model: str = "m") -> str:
        """A session whose worker is ready."""
        answer = await self.ask(
            "POST", "/api/sessions", {"model_id": model, "task_preset": preset}, tenant=tenant
        )
        assert answer.status == 201, answer.raw
        await self.world.ready(answer.json["session_id"])
        return str(answer.json["session_id"])


@asynccontextmanager
async def api_world(
    tmp_path: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    warnings: tuple[str, ...] = (),
    enclave: Enclave | None = None,
    keys: KeyService | None = None,
    renewed: bool = False,
    **engine: Any,
) -> AsyncIterator[Api]:
    """The application over a world of `engine_world(**engine)`. Washes leave the enclave alone, unless
    `renewed`: each would cost a key."""
    file = _presets_file(tmp_path)
    config = Settings(_env_file=None, **(settings or {}))
    loaded = presets.load(file, ("gpu-server/*",))
    engine = {"slots": slot_specs(4), "rules": config.rules(), "find_preset": loaded.get, **engine}
    if renewed:
        engine["enclave"] = enclave
    async with unwrapped(), engine_world(tmp_path, **engine) as world:
        service = Service(
            settings=config,
            engine=world.engine,
            presets=loaded,
            models=FolderModelStore(tmp_path / "models"),
            runtime=world.runtime,
            clock=world.clock,
            internal_key=KEY,
            fingerprint_key=b"of the tests",
            seal=world.seal,
            enclave=enclave,
            keys=keys,
            warnings=warnings,
        )
        app = create_app(service)
        async with serving(app) as url, aiohttp.ClientSession(url) as http:
            yield Api(world, service, app, url, http)


def _presets_file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "presets.yaml"
    file.write_text(PRESETS)
    return file


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """An ASGI application on a free port; its address."""
    # With its protocol named asyncio switches Nagle's algorithm off, as it does where it makes the socket.
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, timeout_graceful_shutdown=1, server_header=False
        )
        server = Server(config)
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = server.force_exit = True
