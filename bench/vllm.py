"""Language models: what a warm session saves, and what the control service costs beside vLLM's own server.

    python bench/vllm.py [--streams 8] [--tokens 200] [--rounds 9] [--starts 3]

Session start: from asking for a session to its first token, cold (the container starts and vLLM loads) and
warm (the session is there), `--starts` times each.

Tokens per second: `--streams` tasks at once, of `--tokens` tokens each, through the service, and from vLLM's
own OpenAI server (`vllm.entrypoints.openai.api_server --uds`) on its Unix socket. Both run in containers of
one image with the same limits, engine arguments, model, prompts and sampling; both are up all the time, and
are measured in turn, `--rounds` times, each time the other one first. A client in this process reads the
bytes of the streams and looks at their ends only.

It needs a Docker engine and gpu-server/vllm-cpu:dev (scripts/build_images.py vllm-cpu), and makes the tiny
model. That model takes next to no time to compute, so what is compared is all but the model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import docker
import yaml

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "gpu-server/vllm-cpu:dev"
PYTHON = "/venv/bin/python"
KEY = secrets.token_urlsafe(24)
HEADERS = {"X-API-Key": KEY}
ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True}
PRESET = {
    "docker_image": IMAGE,
    "start_timeout_seconds": 300,
    "memory": "6g",
    "cpus": os.cpu_count(),
    "pids": 512,
    "tmp_size": "1g",
    "tmp_exec": True,
    "shm_size": "512m",
    "env_vars": {"VLLM_CPU_KVCACHE_SPACE": 1, "ENGINE_ARGS": json.dumps(ENGINE_ARGS)},
}


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    engine = docker.from_env(timeout=600)
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        make_model(engine, folder / "models")
        async with service(folder, options.streams) as http:
            await starts(http, options.starts)
            async with vllm_server(engine, folder, options.streams) as vllm:
                await throughput(http, vllm, options.streams, options.tokens, options.rounds)


# -- session start ------------------------------------------------------------------------------------------


async def starts(http: aiohttp.ClientSession, count: int) -> None:
    cold, warm = [], []
    for _ in range(count):
        began = time.perf_counter()
        session = await start_session(http)
        cold.append(await first_token(http, session, began))
        await first_token(http, session, began)
        warm.append(await first_token(http, session, time.perf_counter()))
        await call(http, "DELETE", f"/api/sessions/{session}")
    print(f"from asking to the first token, median of {count} (lowest to highest):")
    print(f"  cold: a new session      {statistics.median(cold):8.2f} s    {spread(cold, '.2f')}")
    warm = [seconds * 1000 for seconds in warm]
    print(f"  warm: the session is there {statistics.median(warm):6.1f} ms   {spread(warm, '.1f')}")


async def first_token(http: aiohttp.ClientSession, session: str, began: float) -> float:
    seen = b""
    async with http.post("/api/tasks/submit", json=task(session, "Hello", 1)) as answer:
        async for piece in answer.content.iter_any():
            seen += piece
            if b"event: text" in seen:  # the whole text, where one token is half a character
                return time.perf_counter() - began
    raise RuntimeError(f"no token came: {seen[-500:]!r}")


# -- tokens per second --------------------------------------------------------------------------------------


async def throughput(
    http: aiohttp.ClientSession, vllm: aiohttp.ClientSession, streams: int, tokens: int, rounds: int
) -> None:
    session = await start_session(http)
    rates: dict[str, list[float]] = {"service": [], "vllm": []}
    for round_ in range(rounds + 1):
        prompts = [f"round {round_} stream {n}" for n in range(streams)]
        sides = ["service", "vllm"] if round_ % 2 else ["vllm", "service"]
        for side in sides:
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    if side == "service":
                        group.create_task(by_service(http, session, prompt, tokens))
                    else:
                        group.create_task(by_vllm(vllm, prompt, tokens))
            if round_:  # the first is warm-up
                rates[side].append(streams * tokens / (time.perf_counter() - began))
    print(f"tokens per second, {streams} streams of {tokens} tokens, median of {rounds} (lowest to highest):")
    for side, words in (("service", "through the service"), ("vllm", "vLLM's own server")):
        print(f"  {words:<22} {statistics.median(rates[side]):8,.0f}   {spread(rates[side], ',.0f')}")
    ratios = [ours / theirs for ours, theirs in zip(rates["service"], rates["vllm"], strict=True)]
    print(f"  {'ratio, round by round':<22} {statistics.median(ratios):8.2f}   {spread(ratios, '.2f')}")


async def by_service(http: aiohttp.ClientSession, session: str, prompt: str, tokens: int) -> None:
    async with http.post("/api/tasks/submit", json=task(session, prompt, tokens)) as answer:
        end = await last_bytes(answer)
    assert f'"completion_tokens":{tokens}'.encode() in end, end


async def by_vllm(vllm: aiohttp.ClientSession, prompt: str, tokens: int) -> None:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with vllm.post("/v1/completions", json=body) as answer:
        end = await last_bytes(answer)
    assert f'"completion_tokens":{tokens}'.encode() in end, end


async def last_bytes(answer: aiohttp.ClientResponse) -> bytes:
    assert answer.status == 200, await answer.text()
    last = b""
    async for piece in answer.content.iter_any():
        last = (last + piece)[-2000:]
    return last


def spread(values: list[float], form: str) -> str:
    return f"({min(values):{form}} to {max(values):{form}})"


# -- the service --------------------------------------------------------------------------------------------


def task(session: str, prompt: str, tokens: int) -> dict[str, Any]:
    metadata = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    wish = {"task_type": "session", "model_id": "tiny", "task_preset": "bench", "session_id": session}
    return {**wish, "metadata": metadata}


async def call(http: aiohttp.ClientSession, method: str, path: str, **more: Any) -> Any:
    async with http.request(method, path, **more) as answer:
        assert answer.status < 300, await answer.text()
        return await answer.json()


async def start_session(http: aiohttp.ClientSession) -> str:
    made = await call(http, "POST", "/api/sessions", json={"model_id": "tiny", "task_preset": "bench"})
    session = str(made["session_id"])
    while (found := await call(http, "GET", f"/api/sessions/{session}"))["state"] != "ready":
        assert found["state"] not in ("failed", "closed"), found
        await asyncio.sleep(0.02)
    return session


@contextlib.asynccontextmanager
async def service(folder: Path, streams: int) -> AsyncIterator[aiohttp.ClientSession]:
    presets = {"models": {"tiny": {"bench": {**PRESET, "max_concurrent_tasks": streams}}}}
    (folder / "presets.yaml").write_text(yaml.safe_dump(presets))
    shared_memory = Path("/dev/shm")
    place = shared_memory if os.access(shared_memory, os.W_OK) else folder
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-", dir=place) as run_dir:
        Path(run_dir).chmod(0o711)
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ},
            "RUNTIME": "docker",
            "HTTP_PORT": "18197",
            "CPU_SLOTS": "2",
            "STATE_DIR": str(folder / "state"),
            "RUN_DIR": run_dir,
            "MODEL_PRESETS_FILE": str(folder / "presets.yaml"),
            "MODEL_CACHE_DIR": str(folder / "models"),
            "INTERNAL_API_KEY": KEY,
        }
        with open(folder / "service.log", "wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gpu_server.cli", "serve"), env=environment, stdout=log, stderr=log
            )
        try:
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            async with aiohttp.ClientSession(
                "http://127.0.0.1:18197", headers=HEADERS, connector=connector, timeout=timeout
            ) as http:
                await until_answers(http, "/health", 60)
                yield http
        finally:
            process.terminate()
            await process.wait()


async def until_answers(http: aiohttp.ClientSession, path: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with http.get(path) as answer:
                if answer.status == 200:
                    return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} does not answer")
        await asyncio.sleep(0.1)


# -- vLLM's own server --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def vllm_server(
    engine: docker.DockerClient, folder: Path, streams: int
) -> AsyncIterator[aiohttp.ClientSession]:
    run = folder / "vllm"
    run.mkdir()
    run.chmod(0o777)
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--uds", "/run/vllm/vllm.sock"]
    command += ["--model", "/models", "--served-model-name", "tiny", "--max-num-seqs", str(streams)]
    command += ["--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"]
    container = engine.containers.run(
        IMAGE,
        command,
        detach=True,
        network_mode="none",
        init=True,
        mem_limit=PRESET["memory"],
        nano_cpus=round(1e9 * (os.cpu_count() or 1)),
        shm_size=PRESET["shm_size"],
        tmpfs={"/tmp": "size=1g,exec"},
        volumes=[f"{folder / 'models/tiny'}:/models:ro", f"{run}:/run/vllm"],
        environment={
            "HOME": "/tmp",
            "USER": "bench",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        },
    )
    try:
        connector = aiohttp.UnixConnector(path=str(run / "vllm.sock"), limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession("http://vllm", connector=connector, timeout=timeout) as http:
            try:
                await until_answers(http, "/health", 300)
            except RuntimeError:
                sys.exit(container.logs(tail=40).decode())
            yield http
    finally:
        container.remove(force=True)


def make_model(engine: docker.DockerClient, models: Path) -> None:
    models.mkdir()
    engine.containers.run(
        IMAGE,
        [PYTHON, "/scripts/make_tiny_model.py", "/out/tiny"],
        remove=True,
        network_mode="none",
        user=f"{os.geteuid()}:{os.getegid()}",
        environment={"HOME": "/tmp"},
        volumes=[f"{ROOT / 'scripts'}:/scripts:ro", f"{models}:/out"],
    )


if __name__ == "__main__":
    asyncio.run(main())
