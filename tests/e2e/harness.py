"""The service as a process of its own, with real workers, and callers that talk to it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import pytest
import yaml
from docker import APIClient
from docker.errors import APIError

from gpu_server.client import Client, TaskEvent, read_events

ROOT = Path(__file__).parents[2]
ECHO_IMAGE, HOSTILE_IMAGE = "gpu-server/echo:dev", "gpu-server/hostile:dev"
START_SECONDS = STOP_SECONDS = 90.0
PATIENCE = 60.0
"""For what comes by itself: the machine may be slow, and each call of a Docker engine take seconds."""
UNNUMBERED = ("queue", "progress", "gap")
T = TypeVar("T")

only_docker = pytest.mark.parametrize(
    "runtime", [pytest.param("docker", marks=pytest.mark.docker)], indirect=True, scope="session"
)
only_process = pytest.mark.parametrize("runtime", ["process"], indirect=True, scope="session")

# -- what may be run ----------------------------------------------------------------------------------------

SMALL = {"model": "none", "memory": "128m", "cpus": 1, "pids": 64, "tmp_size": "8m", "shm_size": "8m"}
HTTP = {**SMALL, "start_timeout_seconds": 120}
RUN_CODE = "import json, os; exec(json.load(open(os.environ['TASK_INPUT']))['metadata']['code'])"
ECHO = {
    **HTTP,
    "docker_image": ECHO_IMAGE,
    "process_command": ["python", str(ROOT / "worker_images/echo/worker.py")],
}
HOSTILE = {
    **HTTP,
    "docker_image": HOSTILE_IMAGE,
    "process_command": ["python", str(ROOT / "tests/images/hostile/worker.py")],
    "pids": 32,
}
PROGRAM = {
    **SMALL,
    "docker_image": HOSTILE_IMAGE,
    "contract": "exec",
    "command": ["python3", "-u", "-c", RUN_CODE],
    "process_command": ["python", "-u", "-c", RUN_CODE],
}
HOSTILE_MODES = (
    *("probe", "exit", "never_ready", "no_socket", "symlink", "folder", "flood", "many_files"),
    *("wrong_session", "slow_header", "endless_health", "endless_frame", "bad_ids", "bad_event", "no_end"),
)
# Only ever in containers: as a plain process they would go off on the machine that runs the tests.
BOMBS = ("fork_bomb", "memory_bomb")
HANGS_AT_START = {"never_ready", "no_socket", "slow_header"}


def presets(runtime: str) -> dict[str, Any]:
    """The presets file of the tests, as data."""
    hostile = {
        mode: {
            **HOSTILE,
            "env_vars": {"HOSTILE_MODE": mode},
            "start_timeout_seconds": 1.5 if mode in HANGS_AT_START else 120,
        }
        for mode in HOSTILE_MODES
    }
    if runtime == "docker":
        for mode in BOMBS:
            image_only = {name: value for name, value in HOSTILE.items() if name != "process_command"}
            hostile[mode] = {**image_only, "env_vars": {"HOSTILE_MODE": mode}, "memory": "64m"}
    return {
        "models": {
            "echo": {
                "stream": ECHO,
                "batch": {**ECHO, "max_concurrent_tasks": 3, "openai": True},
                "slow_start": {**ECHO, "env_vars": {"LOAD_SECONDS": 600}},
                "short_start": {**ECHO, "env_vars": {"LOAD_SECONDS": 2}},
                "cannot_load": {**ECHO, "env_vars": {"LOAD_FAIL": "the weights are torn"}},
                "pair": {**ECHO, "gpus": 2},
                "per_task": {**ECHO, "wash": "per_task"},
                "huge": {**ECHO, "gpus": 64},
                "program": PROGRAM,
                "forbidden": {**ECHO, "docker_image": "elsewhere/echo:1"},
                "no_image": {**ECHO, "docker_image": "gpu-server/no-such-image:0"},
                "no_command": {name: value for name, value in ECHO.items() if name != "process_command"},
            },
            "other": {"stream": ECHO},
            "slow": {"serve": {**ECHO, "openai": True, "env_vars": {"DELAY_MS": 50}}},
            "cold": {"serve": {**ECHO, "openai": True, "env_vars": {"LOAD_SECONDS": 2}}},
            "broken": {"serve": {**ECHO, "openai": True, "env_vars": {"LOAD_FAIL": "the weights are torn"}}},
            "hostile": hostile,
            "org/tiny": {"read": {**PROGRAM, "model": "folder"}, "serve": {**ECHO, "model": "folder"}},
            "org/absent": {"read": {**PROGRAM, "model": "folder"}, "serve": {**ECHO, "model": "folder"}},
            "secret": {"only_sealed": {**ECHO, "sealed": "required"}, "never": {**ECHO, "sealed": "off"}},
        },
        "pools": {
            "words": {"model_id": "echo", "task_preset": "stream"},
            "batch": {"model_id": "echo", "task_preset": "batch"},
            "slow": {"model_id": "echo", "task_preset": "short_start"},
            "only": {"model_id": "secret", "task_preset": "only_sealed"},
        },
    }


# -- waiting ------------------------------------------------------------------------------------------------


async def until(what: str, check: Callable[[], Awaitable[T] | T], *, within: float = PATIENCE) -> T:
    """Ask `check` again and again until its answer is true, and give that answer."""
    deadline = time.monotonic() + within
    while True:
        answer = check()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {within:g} s: {what} (last answer: {answer!r})"
        await asyncio.sleep(0.02)


# -- following a task ---------------------------------------------------------------------------------------


class Following:
    """One task's events as they come. At the end they are held against what every stream promises."""

    def __init__(self, events: AsyncIterator[TaskEvent], *, after: int = 0) -> None:
        self.events: list[TaskEvent] = []
        self._source, self._after = events, after

    async def until(self, name: str, **data: Any) -> TaskEvent:
        """Read on to the next event of that name with this data."""
        async with asyncio.timeout(150):
            async for event in self._source:
                self.events.append(event)
                if event.event == name and data.items() <= event.data.items():
                    return event
        raise AssertionError(f"no {name} {data} came: {self.summary}")

    async def finish(self) -> dict[str, Any]:
        """Read to the end; what `task_finish` says."""
        if not self.events or self.events[-1].event != "task_finish":
            await self.until("task_finish")
        async for event in self._source:
            raise AssertionError(f"{event} came after task_finish")
        check_events(self.events, after=self._after)
        return self.events[-1].data

    async def leave(self) -> None:
        """Go away: the connection is closed and nobody reads any more."""
        await self._source.aclose()  # type: ignore[attr-defined]

    @property
    def summary(self) -> list[str]:
        return [f"{e.id} {e.event} {str(e.data)[:120]}" for e in self.events[-20:]]

    @property
    def task_id(self) -> str:
        return str(self.events[0].data["task_id"])

    @property
    def session_id(self) -> str:
        return str(self.events[0].data["session_id"])

    @property
    def names(self) -> list[str]:
        return [event.event for event in self.events]

    @property
    def text(self) -> str:
        return "".join(e.data["delta"] for e in self.events if e.event == "text_delta")

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.event == name]


def check_events(events: list[TaskEvent], *, after: int = 0) -> None:
    """First `connection`, last and only once `task_finish`, ids without holes, notes repeating the last."""
    names, last = [event.event for event in events], after
    assert names[-1] == "task_finish", names
    assert names.count("task_finish") == 1, names
    if after == 0 and "gap" not in names:
        assert names[0] == "connection", names
    for event in events:
        if event.event == "gap":
            assert (event.id, event.data["from"]) == (last, last + 1)
            last = event.data["to"]
        elif event.event in UNNUMBERED:
            assert event.id == last, (event, last)
        else:
            assert event.id == last + 1, (event, last)
            last = event.id


# -- a caller -----------------------------------------------------------------------------------------------


class Caller:
    """One tenant: the project's client, and the bare HTTP below it. Use as an async context manager."""

    def __init__(self, service: Service, tenant: str) -> None:
        self.service, self.tenant = service, tenant
        self.client = Client(service.url, service.key, tenant=tenant)
        headers = {"X-API-Key": service.key, "X-Tenant-ID": tenant}
        # Less than the service keeps a connection, which could else end as it is used again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self.http = aiohttp.ClientSession(service.url, headers=headers, connector=connector)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.client._http.close()
        await self.http.close()

    def submit(
        self,
        preset: str = "stream",
        /,
        *,
        model: str = "echo",
        session: str | None = None,
        oneoff: bool = False,
        seconds: float | None = None,
        **metadata: Any,
    ) -> Following:
        """Submit a task (when its first event is asked for) and follow it with the project's client."""
        return Following(
            self.client.submit(
                body(preset, model=model, session=session, oneoff=oneoff, seconds=seconds, **metadata)
            )
        )

    async def started(self, *arguments: Any, **more: Any) -> Following:
        """Submit, and wait for the task's first event."""
        following = self.submit(*arguments, **more)
        await following.until("connection")
        return following

    async def working(self, *arguments: Any, **more: Any) -> Following:
        """Submit, and wait until the worker works on the task."""
        following = self.submit(*arguments, **more)
        await following.until("worker", status="working")
        return following

    async def run(self, *arguments: Any, **more: Any) -> Following:
        """Submit and follow to the end."""
        following = self.submit(*arguments, **more)
        await following.finish()
        return following

    async def warm(self, preset: str = "stream", *, model: str = "echo") -> str:
        """A session that is ready."""
        session_id = (await self.open(preset, model=model))["session_id"]
        await self.in_state(session_id, "ready")
        return session_id

    async def open(self, preset: str = "stream", *, model: str = "echo", **more: Any) -> dict[str, Any]:
        """Start a session ahead of its first task."""
        wish = {"model_id": model, "task_preset": preset, **more}
        return await self.client.call("POST", "/api/sessions", wish)

    async def session(self, session_id: str) -> dict[str, Any]:
        return await self.client.call("GET", f"/api/sessions/{session_id}")

    async def task(self, task_id: str) -> dict[str, Any]:
        return await self.client.call("GET", f"/api/tasks/{task_id}")

    async def kill(self, session_id: str) -> dict[str, Any]:
        return await self.client.call("DELETE", f"/api/sessions/{session_id}")

    async def cancel(self, task_id: str) -> dict[str, Any]:
        return await self.client.call("DELETE", f"/api/tasks/{task_id}")

    async def keep_alive(self, session_id: str) -> dict[str, Any]:
        return await self.client.call("POST", f"/api/sessions/{session_id}/keepalive")

    async def in_state(self, session_id: str, *states: str, within: float = PATIENCE) -> dict[str, Any]:
        """Wait until a session is in one of these states; how it looks then."""

        async def look() -> dict[str, Any] | None:
            session = await self.session(session_id)
            return session if session["state"] in states else None

        return await until(f"{session_id} is {' or '.join(states)}", look, within=within)

    async def task_in_state(self, task_id: str, *states: str, within: float = PATIENCE) -> dict[str, Any]:
        """Wait until a task is in one of these states; how it looks then."""

        async def look() -> dict[str, Any] | None:
            task = await self.task(task_id)
            return task if task["state"] in states else None

        return await until(f"{task_id} is {' or '.join(states)}", look, within=within)

    async def ended(self, session_id: str) -> dict[str, Any]:
        """Wait until a session has ended; its tombstone."""
        return await self.in_state(session_id, "closed", "failed")

    async def washed(self, session_id: str) -> dict[str, Any]:
        """Wait until it has ended, and its slot has a certificate of the wash behind it."""

        async def look() -> dict[str, Any] | None:
            found = await self.ended(session_id)
            return found if found["washed_after"] else None

        return await until(f"{session_id} is washed", look)

    @contextlib.asynccontextmanager
    async def events(self, task_id: str, *, after: int | None = None) -> AsyncIterator[Following]:
        """A task's events again, from the first or from behind number `after`."""
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        async with self.http.get(f"/api/tasks/{task_id}/events", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            yield Following(read_events(answer.content), after=after or 0)

    async def ask(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **request: Any
    ) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """A bare request that is answered with JSON: status, content, headers."""
        async with self.http.request(method, path, headers=headers, **request) as answer:
            return answer.status, json.loads(await answer.read()), answer.headers


def body(
    preset: str = "stream",
    /,
    *,
    model: str = "echo",
    session: str | None = None,
    oneoff: bool = False,
    seconds: float | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """What is posted to submit a task."""
    wish: dict[str, Any] = {
        "task_type": "oneoff" if oneoff else "session",
        "model_id": model,
        "task_preset": preset,
        "metadata": metadata,
    }
    if session is not None:
        wish["session_id"] = session
    if seconds is not None:
        wish["timeout_seconds"] = seconds
    return wish


# -- the service --------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, object] = {
    "CPU_SLOTS": 4,
    "SESSION_QUEUE_MAX_SIZE": 3,
    "STOP_GRACE_SECONDS": 1,
    "CANCEL_GRACE_SECONDS": 10,
    "DISCONNECT_GRACE_SECONDS": 1,
    "SSE_PING_SECONDS": 0.2,
    "DEFAULT_TASK_TIMEOUT": 300,
    "MAX_TASK_TIMEOUT": 600,
    "GPU_WAIT_MAX_SECONDS": 300,
    "MAX_BODY_BYTES": 1_000_000,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Service:
    """One service process, its folders and its log. A setting that is None is left out."""

    def __init__(self, runtime: str, root: Path, engine: APIClient | None, **settings: object) -> None:
        self.runtime, self.engine = runtime, engine
        self.folder = Path(tempfile.mkdtemp(prefix="s-", dir=root))
        self.folder.chmod(0o711)
        self.state_dir, self.run_dir = self.folder / "state", self.folder / "run"
        self.models, self.log = self.folder / "models", self.folder / "service.log"
        self.key = secrets.token_urlsafe(24)
        self.tenants: set[str] = set()
        self.settings = {**DEFAULTS, **settings}
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        (self.folder / "presets.yaml").write_text(yaml.safe_dump(presets(runtime)))
        tiny = self.models / "org/tiny"
        tiny.mkdir(parents=True)
        (tiny / "weights.txt").write_text("1 2 3")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the tests' own environment but what a program needs to run."""
        inherited = {n: os.environ[n] for n in ("PATH", "HOME", "LANG", "DOCKER_HOST") if n in os.environ}
        own = {
            "RUNTIME": self.runtime,
            "HTTP_PORT": self.port,
            "STATE_DIR": self.state_dir,
            "RUN_DIR": self.run_dir,
            "MODEL_PRESETS_FILE": self.folder / "presets.yaml",
            "MODEL_CACHE_DIR": self.models,
            "INTERNAL_API_KEY": self.key,
        }
        wanted = {**own, **self.settings}
        return {**inherited, **{name: str(value) for name, value in wanted.items() if value is not None}}

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process, and do not wait for anything."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_server.cli", "serve"],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self.process

    def start(self) -> Self:
        """Start the process and wait until every slot is free."""
        self.launch()
        deadline, pause = time.monotonic() + START_SECONDS, threading.Event()
        while not self.is_all_free(self.health()):
            assert self.process is not None
            assert self.process.poll() is None, f"the service did not start:\n{self.log_text()}"
            assert time.monotonic() < deadline, f"the service is not ready:\n{self.log_text()}"
            pause.wait(0.05)
        return self

    def health(self) -> dict[str, Any] | None:
        """What `/health` says, or None while nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=PATIENCE) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return dict(json.load(error))
        except (OSError, ValueError):
            return None

    @staticmethod
    def is_all_free(health: dict[str, Any] | None) -> bool:
        return health is not None and {slot["state"] for slot in health["gpus"]} == {"free"}

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def crash(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    async def serving(self) -> None:
        """Wait until the process takes work; sessions that it adopts may hold every slot."""

        async def takes_work() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the service did not start:\n{self.log_text()}"
            health = await asyncio.to_thread(self.health)
            return health is not None and health["ready"]

        await until("the service takes work", takes_work, within=START_SECONDS)

    async def restart(self) -> None:
        """kill -9, start again, and wait until it takes work."""
        await asyncio.to_thread(self.crash)
        self.launch()
        await self.serving()

    def caller(self, tenant: str | None = None) -> Caller:
        """A caller for this tenant, or for a new one."""
        tenant = tenant or f"tenant-{secrets.token_hex(4)}"
        self.tenants.add(tenant)
        return Caller(self, tenant)

    # -- what it has on this machine ------------------------------------------------------------------------

    @property
    def instance(self) -> str:
        return (self.state_dir / "instance_id").read_text().strip()

    def containers(self, *, enclave: bool = False) -> list[dict[str, Any]]:
        """This instance's workers, or its enclave's containers, running or not; none where they are
        processes."""
        if self.engine is None:
            return []
        wanted = "gpu-server.role=enclave" if enclave else "gpu-server.session"
        labels = [f"gpu-server.instance={self.instance}", wanted]
        found: list[dict[str, Any]] = self.engine.containers(all=True, filters={"label": labels})
        return found

    def run_folders(self) -> list[str]:
        """The folders of sessions; what is kept of ended tasks is no residue."""
        return sorted(path.name for path in self.run_dir.glob("*/*") if not path.parent.suffix)

    def worker_pids(self, session_id: str = "") -> list[int]:
        """Processes that were started for this service's sessions, or for one of them, where workers are
        processes."""
        marks = (f"GPU_WORKER_SOCKET={self.run_dir}/".encode(), session_id.encode())
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    environ = Path(f"/proc/{entry}/environ").read_bytes()
                    if all(mark in environ for mark in marks):
                        found.append(int(entry))
        return found

    def residue(self) -> list[str]:
        """Everything on this machine that belongs to a session of this service."""
        workers = self.worker_pids() if self.runtime == "process" else []
        return [c["Names"][0] for c in self.containers()] + self.run_folders() + [f"pid {p}" for p in workers]

    def kill_a_worker(self, dice: random.Random) -> None:
        """SIGKILL for one of the workers, if there are any."""
        if self.engine is not None:
            found = [c["Id"] for c in self.containers() if c["State"] == "running"]
            if found:
                with contextlib.suppress(APIError):
                    self.engine.kill(dice.choice(found))
        elif pids := self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(pids), signal.SIGKILL)

    def sweep(self) -> None:
        """Remove the workers that a service left which did not do it itself."""
        for container in [*self.containers(), *self.containers(enclave=True)]:
            assert self.engine is not None
            self.engine.remove_container(container["Id"], v=True, force=True)
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def memory(self, field: str = "VmRSS") -> int:
        """The process's memory in bytes: VmRSS now, VmHWM at its peak."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_entries(self) -> Iterator[dict[str, Any]]:
        """The log's lines; one that is not JSON is a `raw` entry."""
        for line in self.log_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {
                    "level": "error" if re.match(r"ERROR|CRITICAL|Traceback", line) else "raw",
                    "raw": line,
                }

    def errors(self) -> list[dict[str, Any]]:
        return [entry for entry in self.log_entries() if entry.get("level") in ("error", "critical")]

    async def settle(self, expected: frozenset[str] = frozenset()) -> None:
        """End every session, and see that nothing is left and that the log holds no error but `expected`."""
        if self.process is None or self.process.poll() is not None:
            return
        for tenant in self.tenants:
            async with self.caller(tenant) as caller:
                for session in (await caller.client.call("GET", "/api/sessions"))["sessions"]:
                    if session["state"] not in ("closed", "failed"):
                        await caller.kill(session["session_id"])
        self.tenants.clear()
        await until("every slot is free", lambda: self.is_all_free(self.health()))
        health = self.health()
        assert health is not None
        assert (health["active_sessions"], health["active_tasks"], health["waiting_sessions"]) == (0, 0, 0)
        assert self.residue() == []
        assert [entry for entry in self.errors() if entry.get("event") not in expected] == []

    def close(self) -> None:
        """Stop the process, by force if it must be."""
        if self.process is None or self.process.poll() is not None:
            return
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            self.crash()
            raise


class Services:
    """Services that tests share: one for each combination of settings, each started when first asked for."""

    def __init__(self, runtime: str, root: Path, engine: APIClient | None) -> None:
        self.runtime, self._root, self._engine = runtime, root, engine
        self._shared: dict[str, Service] = {}
        self._all: list[Service] = []

    def shared(self, **settings: object) -> Service:
        """A running service with these settings. One that has died is replaced."""
        key = json.dumps(settings, sort_keys=True)
        service = self._shared.get(key)
        if service is None or service.process is None or service.process.poll() is not None:
            service = self._shared[key] = self.own(**settings).start()
        return service

    def own(self, **settings: object) -> Service:
        """A service of the caller's own, not started."""
        service = Service(self.runtime, self._root, self._engine, **settings)
        self._all.append(service)
        return service

    def close(self) -> None:
        """Stop all; afterwards nothing of any of them may be left. What is, is removed from this machine."""
        left = []
        with ThreadPoolExecutor() as at_once:  # each takes its time to end
            list(at_once.map(Service.close, self._all))
        for service in self._all:
            if (service.state_dir / "instance_id").exists():
                left += service.residue()
                left += [c["Names"][0] for c in service.containers(enclave=True)]
                service.sweep()
        assert left == []
