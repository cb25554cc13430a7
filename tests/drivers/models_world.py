"""Places that models come from, as real as they can be here: an HTTP server that breaks, and an S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from gpu_server.model_manifest import Manifest, ModelFile, dumps

FILE_KEY = "the-key-of-the-file-service"
FILES = {
    "config.json": b'{"hidden_size": 256}',
    "model-00001-of-00002.safetensors": os.urandom(300_000),
    "model-00002-of-00002.safetensors": os.urandom(200_001),
    "tokenizer/vocab.txt": b"a\nb\n",
    "empty.txt": b"",
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest_of(files: dict[str, bytes], version: str = "1") -> Manifest:
    listed = (ModelFile(path=p, size=len(c), sha256=sha256(c)) for p, c in sorted(files.items()))
    return Manifest(version=version, files=tuple(listed))


def with_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {**files, "manifest.json": dumps(manifest_of(files))}


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    """Files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def laid(folder: Path) -> dict[str, bytes]:
    """What lies in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def until_times_move(file: Path, probe: Path) -> None:
    """Until a change of this file shows in its times: some kernels count them in steps of milliseconds.
    `probe` is another file of that file system."""
    probe.touch()
    while probe.stat().st_ctime_ns <= file.stat().st_ctime_ns:
        probe.touch()


def tar_of(files: dict[str, bytes], prefix: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(prefix + path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


# -- the file service -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class PlayedFileService:
    """Answers tar streams, and breaks as it is told to. `breaks` holds, for each answer to come, after how
    many bytes the connection breaks."""

    url: str = ""
    models: dict[str, bytes] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    hold_at: int | None = None
    claim: int | None = None
    asked: list[str] = field(default_factory=list)
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def download(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("X-Internal-Key") != FILE_KEY:
            return web.Response(status=403)
        model_id = (await request.json())["model_id"]
        self.asked.append(model_id)
        if self.statuses:
            return web.Response(status=self.statuses.pop(0), headers=self.headers)
        if model_id not in self.models:
            return web.Response(status=404)
        tar = self.models[model_id]
        answer = web.StreamResponse(headers={"Content-Type": "application/x-tar", **self.headers})
        if not self.chunked:
            answer.content_length = self.claim if self.claim is not None else len(tar)
        await answer.prepare(request)
        end = self.breaks.pop(0) if self.breaks else len(tar)
        for at in range(0, end, 1 << 16):
            if self.hold_at is not None and at >= self.hold_at:
                self.holding.set()
                await self.go_on.wait()
            await answer.write(tar[at : min(at + (1 << 16), end)])
        if (end < len(tar) or self.claim is not None) and request.transport is not None:
            request.transport.close()
        return answer


@asynccontextmanager
async def file_service(**kwargs: Any) -> AsyncIterator[PlayedFileService]:
    played = PlayedFileService(**kwargs)
    app = web.Application()
    app.router.add_post("/api/models/download", played.download)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    played.url = f"http://127.0.0.1:{port}"
    try:
        yield played
    finally:
        played.go_on.set()
        await runner.cleanup()


# -- S3 ---------------------------------------------------------------------------------------------------

BUCKET = "models"
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """A real S3 server over HTTP, in a process of its own; its address."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert server.stdout is not None
            ready, port = server.stdout.readline().split()
            assert ready == b"ready"
            yield f"http://127.0.0.1:{int(port)}"
        finally:
            server.kill()


_SERVER = """
import threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("ready", server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


def s3_client(endpoint: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="us-east-1",
    )


def put(endpoint: str, model_id: str, files: dict[str, bytes], *, bucket: str = BUCKET) -> None:
    """A model in S3, below the prefix `store`."""
    client = s3_client(endpoint)
    client.create_bucket(Bucket=bucket)
    for path, content in files.items():
        client.put_object(Bucket=bucket, Key=f"store/{model_id}/{path}", Body=content)


class Tap:
    """A proxy before the S3 server that counts the bytes of content it passes on, and breaks when told."""

    def __init__(self, target: str) -> None:
        self.target, self.url = target, ""
        self.ranges: list[tuple[str, str]] = []
        self.break_next = 0
        self.hold_after: int | None = None
        self.deny_after, self.deny_with = 0, list[str]()
        self.holding, self.go_on = asyncio.Event(), asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        import aiohttp

        body = await request.read()
        drop = ("Host", "Content-Length", "Transfer-Encoding")
        headers = {k: v for k, v in request.headers.items() if k not in drop}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method, f"{self.target}{request.raw_path}", data=body, headers=headers
            ) as answer,
        ):
            content = await answer.read()
            kept = {k: v for k, v in answer.headers.items() if k not in ("Transfer-Encoding", "Connection")}
            if request.method == "GET" and "Range" in request.headers:
                if self.deny_with and len(self.ranges) >= self.deny_after:
                    code = self.deny_with.pop(0)
                    return web.Response(status=403, text=f"<Error><Code>{code}</Code></Error>")
                self.ranges.append((request.path, request.headers["Range"]))
                if self.hold_after is not None and len(self.ranges) > self.hold_after:
                    self.holding.set()
                    await self.go_on.wait()
                if self.break_next:
                    self.break_next -= 1
                    reply = web.StreamResponse(status=answer.status, headers=kept)
                    await reply.prepare(request)
                    await reply.write(content[: len(content) // 2])
                    assert request.transport is not None
                    request.transport.close()
                    return reply
            return web.Response(status=answer.status, headers=kept, body=content)


@asynccontextmanager
async def tapped(target: str) -> AsyncIterator[Tap]:
    tap = Tap(target)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", tap.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    tap.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    try:
        yield tap
    finally:
        tap.go_on.set()
        await runner.cleanup()


# -- locks ------------------------------------------------------------------------------------------------


@contextmanager
def told_when_taken() -> Iterator[asyncio.Event]:
    """Set when somebody in this process has found a lock taken, and waits for it."""
    import fcntl

    loop, taken, real = asyncio.get_running_loop(), asyncio.Event(), fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        try:
            real(descriptor, how)
        except BlockingIOError:
            loop.call_soon_threadsafe(taken.set)
            raise

    fcntl.flock = flock
    try:
        yield taken
    finally:
        fcntl.flock = real


# -- file systems -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes, where this user may mount one."""
    import pytest

    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def as_json(path: Path) -> Any:
    return json.loads(path.read_text())
