"""What sealing costs: events per second and the time to the first event, sealed against plain.

    python bench/sealed.py [--streams 8] [--events 20000] [--rounds 5] [--probes 300] [--worker-only]

Each is measured directly on a worker's Unix socket, and through the service, with its simulated enclave as a
process and the KMS emulator. Sealed and plain are taken in turn.

Throughput: `--streams` tasks at once of `--events` events each, on four workers (directly: one), read by one
client in a process of its own, which opens and counts what was sealed, and counts what was not.

First event: from before the request is sealed until the first `text_delta` is there in clear, on a session
that is open, so without KMS.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from relay import HEADERS, KEY, PRESETS, ROOT, call, cpu_seconds, start_session, tell, until_up

from gpu_server.client import AwsDataKeys
from gpu_server.kms_emulator import EmulatedKey, KmsEmulator
from gpu_server.sealed import attestation, delivery
from gpu_server.sealed.grant import Binding, seal_grant
from gpu_server.sealed.request import RequestSealer
from gpu_server.sealed.response import ResponseOpener

ARN = "arn:aws:kms:eu-west-1:111122223333:key/00000000-1111-4222-8333-444444444444"
TENANT, POOL, PORT = "default", "default", 18313
POOLS = "pools:\n  default: {model_id: echo, task_preset: bench}\n"
WARM_UP = 20
PLAIN_TASK = {"task_type": "session", "model_id": "echo", "task_preset": "bench"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What a client needs to seal for one session; the grant, where no service has it. Bytes are in hex."""

    session_id: str
    epoch: str
    worker_key: str
    wrapped_key: str
    data_key: str
    grant: str = ""

    @property
    def binding(self) -> Binding:
        return Binding(
            tenant=TENANT,
            pool=POOL,
            kms_key_arn=ARN,
            session_id=self.session_id,
            epoch=bytes.fromhex(self.epoch),
            worker_key=bytes.fromhex(self.worker_key),
            wrapped_key=bytes.fromhex(self.wrapped_key),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who is asked: a worker on its socket, or one session through the service. Without keys, in clear."""

    socket: str | None
    session_id: str
    keys: Keys | None = None

    async def answer(self, http: aiohttp.ClientSession, metadata: dict[str, Any]) -> AsyncIterator[bytes]:
        """The answer in clear, in the pieces that it comes in."""
        if self.keys is None:
            async with http.post(**self._plain(metadata)) as answer:
                answer.raise_for_status()
                async for piece in answer.content.iter_any():
                    yield piece
            return
        binding, request_id = self.keys.binding, secrets.token_hex(8)
        psk = binding.psk(bytes.fromhex(self.keys.data_key))
        sealer = RequestSealer(binding, psk, request_id)
        body = sealer.body(json.dumps(metadata).encode())
        opener: ResponseOpener | None = None
        async with http.post(**self._sealed(body, request_id, binding)) as answer:
            answer.raise_for_status()
            rest = b""
            async for piece in answer.content.iter_any():
                *frames, rest = (rest + piece).split(b"\n\n")
                for frame in frames:
                    head, _, data = frame.partition(b'\ndata: {"data":"')
                    if not head.endswith(b"event: sealed"):
                        continue
                    chunk = base64.b64decode(data[:-2])
                    if opener is None:
                        opener = sealer.answer(chunk)
                    else:
                        yield opener.open(chunk)
        if opener is None:
            raise SystemExit("there was no sealed answer")
        opener.close()

    def _plain(self, metadata: dict[str, Any]) -> dict[str, Any]:
        if self.socket is not None:
            return {"url": f"http://worker/tasks/{secrets.token_hex(8)}", "json": {"metadata": metadata}}
        body = PLAIN_TASK | {"session_id": self.session_id, "metadata": metadata}
        return {"url": f"http://127.0.0.1:{PORT}/api/tasks/submit", "json": body, "headers": HEADERS}

    def _sealed(self, body: bytes, request_id: str, binding: Binding) -> dict[str, Any]:
        assert self.keys is not None
        if self.socket is None:
            headers = {
                "X-API-Key": HEADERS["X-API-Key"],
                "Accept": "text/event-stream",
                "Content-Type": "application/octet-stream",
                "X-KMS-Key-ARN": ARN,
                "X-Tenant-ID": TENANT,
                "X-Model-Pool": POOL,
                "X-Request-ID": request_id,
            }
            return {"url": f"http://127.0.0.1:{PORT}/inference", "data": body, "headers": headers}
        packed = delivery.pack(
            tenant=TENANT,
            pool=POOL,
            kms_key_arn=ARN,
            request_id=request_id,
            epoch=binding.epoch,
            wrapped_key=binding.wrapped_key,
            grant=bytes.fromhex(self.keys.grant),
            body=body,
        )
        headers = {"Content-Type": delivery.MEDIA_TYPE}
        return {"url": f"http://worker/tasks/{request_id}", "data": packed, "headers": headers}

    def connector(self) -> aiohttp.BaseConnector:
        return (
            aiohttp.UnixConnector(path=self.socket, limit=0) if self.socket else aiohttp.TCPConnector(limit=0)
        )


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probes", type=int, default=300)
    parser.add_argument("--worker-only", action="store_true")
    options = parser.parse_args()
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-", dir=shm) as name:
        folder = Path(name)
        async with (
            worker(folder / "plain") as (plain, plain_pid),
            worker(folder / "sealed", sealed=True) as (sealed, sealed_pid),
        ):
            print("on the worker's socket:")
            await compare(
                {"plain": [plain], "sealed": [sealed]}, {"plain": plain_pid, "sealed": sealed_pid}, options
            )
        if options.worker_only:
            return
        async with service(folder) as (url, pid):
            sessions = {
                "plain": [
                    Target(socket=None, session_id=await start_session(url)) for _ in range(4)
                ],
                "sealed": [await open_session(url) for _ in range(4)],
            }  # fmt: skip
            print("through the service:")
            await compare(sessions, {"plain": pid, "sealed": pid}, options)


async def compare(
    targets: dict[str, list[Target]], pids: dict[str, int], options: argparse.Namespace
) -> None:
    """Both figures of both kinds. `pids`: whose CPU time is told too, since it does not depend on what else
    the machine does; so is the client's."""
    rates: dict[str, list[float]] = {name: [] for name in targets}
    for_cpu: dict[str, list[float]] = {name: [] for name in targets}
    for_client: dict[str, list[float]] = {name: [] for name in targets}
    events = options.streams * options.events
    for round_ in range(options.rounds + 1):
        for name, some in targets.items():
            before = cpu_seconds(pids[name])
            seconds, of_client = await read_all(some, options.streams, options.events)
            if round_:  # the first is a warm-up
                rates[name].append(events / seconds)
                for_cpu[name].append(events / (cpu_seconds(pids[name]) - before))
                for_client[name].append(events / of_client)
    for what, found in (
        ("second", rates),
        ("CPU second of it", for_cpu),
        ("CPU second of the client", for_client),
    ):
        ratios = sorted(a / b for a, b in zip(found["sealed"], found["plain"], strict=True))
        figures = "   ".join(f"{name} {statistics.median(found[name]):9,.0f}" for name in targets)
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  events a {what:<25} {figures}   ratio {statistics.median(ratios):.2f}   {spread}")

    times: dict[str, list[float]] = {name: [] for name in targets}
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(aiohttp.ClientSession(connector=some[0].connector()))
            for name, some in targets.items()
        }
        for number in range(options.probes + WARM_UP):
            for name, some in targets.items():
                seconds = await first_event(clients[name], some[0])
                if number >= WARM_UP:
                    times[name].append(seconds * 1000)
    print(f"  first event, {options.probes} probes each way, in turn:")
    for name, values in times.items():
        tell(name, values)
    tell("added", [a - b for a, b in zip(times["sealed"], times["plain"], strict=True)])


async def first_event(http: aiohttp.ClientSession, target: Target) -> float:
    began, first = time.perf_counter(), 0.0
    async for piece in target.answer(http, {"count": 3}):
        if not first and b"text_delta" in piece:
            first = time.perf_counter() - began
    return first


async def read_all(targets: list[Target], streams: int, events: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, in which a client process has read all streams and found every event."""
    jobs = [asdict(targets[number % len(targets)]) for number in range(streams)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--client", json.dumps({"jobs": jobs, "events": events, "key": KEY}),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the client failed: {out.decode()}")
    seconds, of_client = json.loads(out)
    return seconds, of_client


async def client(order: dict[str, Any]) -> None:
    """The reading side, in a process of its own: prints the seconds that it took, and of its CPU time."""
    HEADERS["X-API-Key"] = order["key"]
    targets = [
        Target(**(job | {"keys": Keys(**job["keys"]) if job["keys"] else None})) for job in order["jobs"]
    ]

    async def read(http: aiohttp.ClientSession, target: Target) -> None:
        seen = 0
        async for piece in target.answer(http, {"count": order["events"]}):
            seen += piece.count(b"event: text_delta")
        # A few names are cut by the ends of pieces; a stream that lost events lost more than that.
        if abs(seen - order["events"]) > order["events"] // 100:
            raise SystemExit(f"{seen} of {order['events']} events came")

    async with aiohttp.ClientSession(connector=targets[0].connector(), read_bufsize=1 << 18) as http:
        began, cpu_before = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for target in targets:
                group.create_task(read(http, target))
        print(json.dumps([time.perf_counter() - began, time.process_time() - cpu_before]))


# -- what is measured ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def worker(folder: Path, *, sealed: bool = False) -> AsyncIterator[tuple[Target, int]]:
    """The echo worker as a process, with nothing before it."""
    folder.mkdir()
    socket = folder / "worker.sock"
    environment = os.environ | {
        "GPU_WORKER_SOCKET": str(socket),
        "GPU_SESSION_ID": "s_bench",
        "PYTHONPATH": f"{ROOT}:{ROOT}/worker_images/sdk",
    }
    if sealed:
        environment |= {"SEALED_KMS_KEY_ARN": ARN, "SEALED_TENANT": TENANT, "SEALED_POOL": POOL}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "worker_images/echo/worker.py"), env=environment
    )
    try:
        while not socket.exists():
            await asyncio.sleep(0.05)
        health: dict[str, Any] = {"status": "loading"}
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(socket))) as http:
            while health["status"] == "loading":
                async with http.get("http://worker/health") as answer:
                    health = await answer.json()
        keys = None
        if sealed:
            keys = Keys(
                session_id="s_bench",
                epoch=bytes(16).hex(),
                worker_key=base64.b64decode(health["sealed_key"]).hex(),
                wrapped_key=b"wrapped".hex(),
                data_key=bytes(32).hex(),
            )
            keys = replace(keys, grant=seal_grant(keys.binding, bytes(32)).hex())
        yield Target(socket=str(socket), session_id="s_bench", keys=keys), process.pid
    finally:
        process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def service(folder: Path) -> AsyncIterator[tuple[str, int]]:
    """The service, its simulated enclave, and a KMS that asks nobody who he is."""
    (folder / "presets.yaml").write_text(PRESETS + POOLS)
    os.environ |= {"AWS_ACCESS_KEY_ID": "of-nobody", "AWS_SECRET_ACCESS_KEY": "of-nobody"}
    async with KmsEmulator({ARN: EmulatedKey()}, allow_simulated=True) as kms:
        environment = os.environ | {
            "RUNTIME": "process", "CPU_SLOTS": "8", "HTTP_PORT": str(PORT), "LOG_LEVEL": "error",
            "INTERNAL_API_KEY": KEY, "SESSION_QUEUE_MAX_SIZE": "64",
            "STATE_DIR": str(folder / "state"), "RUN_DIR": str(folder / "run"),
            "MODEL_PRESETS_FILE": str(folder / "presets.yaml"), "SESSION_IDLE_TIMEOUT_SECONDS": "3000",
            "ENCLAVE": "simulated", "KMS_ENDPOINT_URL": kms.url, "BENCH_KMS_URL": kms.url,
            "PYTHONPATH": f"{ROOT}:{ROOT}/worker_images/sdk",
        }  # fmt: skip
        os.environ["BENCH_KMS_URL"] = kms.url
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gpu_server.cli", "serve", env=environment
        )
        url = f"http://127.0.0.1:{PORT}"
        try:
            await until_up(f"{url}/health")
            while not (await call(url, "GET", "/health")).get("enclave_healthy"):
                await asyncio.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            await process.wait()


async def open_session(url: str) -> Target:
    """A sealed session that is ready and open."""
    asked = {"model_id": "echo", "task_preset": "bench", "kms_key_arn": ARN}
    session_id = str((await call(url, "POST", "/api/sessions", asked))["session_id"])
    while (session := await call(url, "GET", f"/api/sessions/{session_id}"))["state"] != "ready":
        await asyncio.sleep(0.05)
    keys = AwsDataKeys(endpoint_url=os.environ["BENCH_KMS_URL"])
    key = await keys.generate(ARN, {"tenant": TENANT, "pool": POOL})
    nonce = os.urandom(32)
    asked = {name: base64.b64encode(value).decode() for name, value in
             {"nonce": nonce, "wrapped_key": key.wrapped}.items()}  # fmt: skip
    opened = await call(url, "POST", f"/api/sessions/{session_id}/open", asked)
    document = base64.b64decode(opened["document"])
    attested = attestation.verify(document, nonce=nonce, pcrs={}, allow_simulated=True)
    sealing = Keys(
        session_id=session_id,
        epoch=attested.epoch.hex(),
        worker_key=base64.b64decode(session["worker_key"]).hex(),
        wrapped_key=key.wrapped.hex(),
        data_key=key.plaintext.hex(),
    )
    return Target(socket=None, session_id=session_id, keys=sealing)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        asyncio.run(client(json.loads(sys.argv[2])))
    else:
        asyncio.run(main())
