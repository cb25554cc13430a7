"""What the control service costs: events per second through it, and the time to a task's first event.

    python bench/relay.py [--streams 16] [--events 5000] [--busy 100] [--probes 300]

Throughput: `--streams` tasks at once, on four workers, `--events` events each, read by one client in a
process of its own, from the service and from the floor: a plain Starlette `StreamingResponse` under the same
uvicorn, which yields the very same frames one by one and has nothing behind it. The two are measured in turn,
five times.

First event: from sending the request to the first `text_delta`, through the service on a warm session,
directly on the worker's Unix socket, and from a route that answers the same request at once on the same HTTP
stack (FastAPI, sse-starlette), in turn; then once more while `--busy` other sessions stream 20 events a
second each.

Workers are plain processes, so that nothing but the service differs between the two sides.
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

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
KEY = secrets.token_urlsafe(24)
HEADERS = {"X-API-Key": KEY, "Content-Type": "application/json"}

PRESETS = f"""
models:
  echo:
    bench:
      docker_image: gpu-server/echo:dev
      process_command: [python, {ROOT}/worker_images/echo/worker.py]
      model: none
      max_concurrent_tasks: 64
"""

FLOOR = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

async def stream(request):
    count = int(request.query_params["count"])
    frame = b'id: %d\\nevent: text_delta\\ndata: {"delta":"tok%d "}\\n\\n'
    frames = [frame % (i + 3, i) for i in range(count)]
    async def body():
        for frame in frames:
            yield frame
    return StreamingResponse(body(), media_type="text/event-stream")

from typing import Any
from fastapi import FastAPI
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

class Body(BaseModel):
    task_type: str
    model_id: str
    task_preset: str
    session_id: str
    metadata: dict[str, Any]

http = FastAPI()

@http.post("/at-once")
async def at_once(body: Body):
    async def events():
        yield b'id: 1\\nevent: text_delta\\ndata: {"delta":"tok0 "}\\n\\n'
    return EventSourceResponse(events(), sep="\\n")

app = Starlette(routes=[Route("/stream", stream, methods=["POST"])])
app.mount("/http", http)
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--events", type=int, default=5000)
    parser.add_argument("--busy", type=int, default=100)
    parser.add_argument("--probes", type=int, default=300)
    options = parser.parse_args()
    async with servers(slots=max(4, options.busy + 1)) as (service, floor, run_dir, service_pid):
        await throughput(service, floor, service_pid, options.streams, options.events)
        await first_event(service, floor, run_dir, options.busy, options.probes)


# -- throughput ---------------------------------------------------------------------------------------------


async def throughput(service: str, floor: str, service_pid: int, streams: int, events: int) -> None:
    sessions = [await start_session(service) for _ in range(4)]
    rates: dict[str, list[float]] = {"service": [], "floor": []}
    cpu: list[float] = []
    for round_ in range(ROUNDS + 1):
        for name in ("service", "floor"):
            before = cpu_seconds(service_pid)
            seconds = await read_all(name, service if name == "service" else floor, sessions, streams, events)
            if round_ == 0:
                continue  # warm-up
            rates[name].append(streams * events / seconds)
            if name == "service":
                cpu.append(streams * events / (cpu_seconds(service_pid) - before))
    for session_id in sessions:
        await call(service, "DELETE", f"/api/sessions/{session_id}")
    through, plain = statistics.median(rates["service"]), statistics.median(rates["floor"])
    ratios = sorted(a / b for a, b in zip(rates["service"], rates["floor"], strict=True))
    print(f"throughput, {streams} streams of {events} events, median of {ROUNDS}:")
    print(f"  through the service      {through:10,.0f} events/s   (4 workers, service, client)")
    print(f"  plain Starlette stream   {plain:10,.0f} events/s   (server and client)")
    spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"  ratio                    {statistics.median(ratios):10.2f}   {spread}")
    print(f"  the service's own CPU    {statistics.median(cpu):10,.0f} events for each CPU second")


async def read_all(name: str, url: str, sessions: list[str], streams: int, events: int) -> float:
    """Seconds until a client process has read all streams; it checks that every event came."""
    jobs = []
    for index in range(streams):
        if name == "floor":
            jobs.append((f"{url}/stream?count={events}", None))
        else:
            body = {
                "task_type": "session", "model_id": "echo", "task_preset": "bench",
                "session_id": sessions[index % len(sessions)], "metadata": {"count": events},
            }  # fmt: skip
            jobs.append((f"{url}/api/tasks/submit", json.dumps(body)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--client",
        json.dumps({"jobs": jobs, "events": events, "headers": HEADERS}),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the client failed: {out.decode()}")
    return float(out)


async def client(order: dict[str, Any]) -> None:
    """The reading side, in a process of its own: prints the seconds it took."""

    async def read(http: aiohttp.ClientSession, url: str, body: str | None) -> None:
        seen = 0
        async with http.post(url, data=body, headers=order["headers"]) as answer:
            answer.raise_for_status()
            async for chunk in answer.content.iter_any():
                seen += chunk.count(b"event: text_delta")
        # A few names are cut by the ends of chunks; a stream that lost events lost more than that.
        if abs(seen - order["events"]) > order["events"] // 100:
            raise SystemExit(f"{seen} of {order['events']} events came")

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 18) as http:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for url, body in order["jobs"]:
                group.create_task(read(http, url, body))
        print(time.perf_counter() - began)


# -- first event --------------------------------------------------------------------------------------------


async def first_event(service: str, floor: str, run_dir: Path, busy: int, probes: int) -> None:
    probe = await start_session(service)
    (socket,) = run_dir.glob(f"*/{probe}/share/worker.sock")
    print(f"\nfirst event of a task on a warm session, {probes} probes each way, in turn:")
    await compare("nothing else runs", service, floor, socket, probe, probes)
    if busy:
        sessions = [await start_session(service) for _ in range(busy)]
        body = {"task_type": "session", "model_id": "echo", "task_preset": "bench",
                "metadata": {"count": 1_000_000, "delay_ms": 50}, "timeout_seconds": 3600}  # fmt: skip
        jobs = [(f"{service}/api/tasks/submit", json.dumps(body | {"session_id": s})) for s in sessions]
        order = json.dumps({"jobs": jobs, "events": 1_000_000, "headers": HEADERS})
        reader = await asyncio.create_subprocess_exec(sys.executable, __file__, "--client", order)
        await asyncio.sleep(3)
        await compare(f"{busy} sessions busy", service, floor, socket, probe, probes)
        reader.kill()
        await reader.wait()


async def compare(title: str, service: str, floor: str, socket: Path, session_id: str, probes: int) -> None:
    times: dict[str, list[float]] = {"service": [], "worker": [], "http stack": []}
    metadata = {"count": 3}
    body = {"task_type": "session", "model_id": "echo", "task_preset": "bench",
            "session_id": session_id, "metadata": metadata}  # fmt: skip
    unix = aiohttp.UnixConnector(path=str(socket))
    async with aiohttp.ClientSession() as http, aiohttp.ClientSession(connector=unix) as direct:
        for number in range(probes + 20):
            own = f"http://worker/tasks/bench-{secrets.token_hex(8)}"
            taken = {
                "service": await time_to_first(
                    http, f"{service}/api/tasks/submit", {"json": body, "headers": HEADERS}
                ),
                "worker": await time_to_first(direct, own, {"json": {"metadata": metadata}}),
                "http stack": await time_to_first(http, f"{floor}/http/at-once", {"json": body}),
            }
            if number >= 20:  # warm-up
                for name, seconds in taken.items():
                    times[name].append(seconds * 1000)
    print(f"  {title}:")
    for name, values in times.items():
        tell(name, values)
    rows = list(zip(*times.values(), strict=True))
    tell("beyond the worker", [through - alone for through, alone, _ in rows])
    tell("beyond both", [through - alone - stack for through, alone, stack in rows])


def tell(name: str, values: list[float]) -> None:
    print(f"    {name:<18} median {statistics.median(values):6.2f} ms   p99 {percentile(values, 99):6.2f} ms")


async def time_to_first(http: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> float:
    began = time.perf_counter()
    first = 0.0
    async with http.post(url, **request) as answer:
        answer.raise_for_status()
        async for chunk in answer.content.iter_any():
            if not first and b"text_delta" in chunk:
                first = time.perf_counter() - began
    return first


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


# -- the servers --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def servers(slots: int) -> AsyncIterator[tuple[str, str, Path, int]]:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-", dir=shm) as name:
        folder = Path(name)
        (folder / "config").mkdir()
        presets = folder / "config" / "presets.yaml"
        presets.write_text(PRESETS)
        port, floor_port = 18311, 18312
        environment = os.environ | {
            "RUNTIME": "process", "CPU_SLOTS": str(slots), "HTTP_PORT": str(port), "INTERNAL_API_KEY": KEY,
            "STATE_DIR": str(folder / "state"), "RUN_DIR": str(folder / "run"), "LOG_LEVEL": "error",
            "MODEL_PRESETS_FILE": str(presets), "SESSION_QUEUE_MAX_SIZE": "64",
            "SESSION_IDLE_TIMEOUT_SECONDS": "3000",
            "PYTHONPATH": f"{ROOT}:{ROOT}/worker_images/sdk",
        }  # fmt: skip
        service = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gpu_server.cli", "serve", env=environment
        )
        floor = await asyncio.create_subprocess_exec(sys.executable, "-c", FLOOR, str(floor_port))
        try:
            await until_up(f"http://127.0.0.1:{port}/health")
            await until_up(f"http://127.0.0.1:{floor_port}/")
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{floor_port}", folder / "run", service.pid
        finally:
            service.terminate()
            floor.terminate()
            await asyncio.gather(service.wait(), floor.wait())


async def until_up(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(300):
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(url) as answer:
                    if answer.status in (200, 404):
                        return
            await asyncio.sleep(0.1)
    raise SystemExit(f"{url} did not come up")


async def start_session(service: str) -> str:
    """A session whose worker is ready."""
    body = {"model_id": "echo", "task_preset": "bench"}
    session_id = str((await call(service, "POST", "/api/sessions", body))["session_id"])
    while (await call(service, "GET", f"/api/sessions/{session_id}"))["state"] != "ready":
        await asyncio.sleep(0.05)
    return session_id


async def call(service: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, service + path, json=body, headers=HEADERS) as answer,
    ):
        answer.raise_for_status()
        return dict(await answer.json())


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        asyncio.run(client(json.loads(sys.argv[2])))
    else:
        asyncio.run(main())
