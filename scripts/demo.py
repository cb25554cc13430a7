"""The main job, seen: start the service, run two tasks in one session and a one-off, kill the service in the
middle of a stream and start it again, chat by the OpenAI interface, send a sealed request, verify the
certificate of the wash behind it; print every event.

Run it by ./scripts/demo.sh, which sets up what it needs. `--once` ends after the tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from gpu_server.client import AwsDataKeys, Client, Expected, SealedSession, TaskEvent, open_sealed
from gpu_server.kms_emulator import EmulatedKey, KmsEmulator

ROOT = Path(__file__).resolve().parent.parent
KMS_KEY = "arn:aws:kms:eu-west-1:111122223333:key/00000000-1111-4222-8333-444444444444"
START_SECONDS = 60
STOP_SECONDS = 60
COLOURS = {
    "connection": "cyan",
    "worker": "blue",
    "text_delta": "white",
    "task_finish": "green",
    "error": "red",
}

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit after the tasks")
    options = parser.parse_args()
    try:
        return asyncio.run(demo(once=options.once))
    except KeyboardInterrupt:
        return 0


async def demo(*, once: bool) -> int:
    """The whole demonstration; its exit status."""
    async with service() as served:
        url, key = served.url, served.key
        async with Client(url, key) as client:
            first = await show(
                client,
                "1. A task starts a session: its container starts, its model loads",
                {
                    "task_type": "session",
                    "model_id": "echo",
                    "task_preset": "stream",
                    "metadata": {"prompt": "The model is loaded once ...", "delay_ms": 30},
                },
            )
            second = await show(
                client,
                "2. A second task in that session: nothing is loaded again",
                {
                    "task_type": "session",
                    "model_id": "echo",
                    "task_preset": "stream",
                    "session_id": first["session_id"],
                    "metadata": {"prompt": "... and serves many tasks.", "delay_ms": 30},
                },
            )
            oneoff = await show(
                client,
                "3. A one-off task: any program, in a container of its own",
                {
                    "task_type": "oneoff",
                    "model_id": "echo",
                    "task_preset": "once",
                    "metadata": {"prompt": "Here and gone."},
                },
            )
            killed = await show(
                client,
                "4. The service is killed (kill -9) in the middle of a stream, and started again",
                {
                    "task_type": "session",
                    "model_id": "echo",
                    "task_preset": "stream",
                    "session_id": first["session_id"],
                    "metadata": {"prompt": "Nothing is lost, and nothing comes twice. " * 2, "delay_ms": 250},
                },
                after_words=(3, served.kill_and_start),
            )
            answered = await show_openai(served)
            sealed = await show_sealed(client, served)
            console.print(
                f"\nFirst word after: [bold]{first['first_word']:.2f} s[/] with a cold start,"
                f" [bold green]{second['first_word']:.3f} s[/] in the warm session."
            )
            tasks = (first, second, oneoff, killed, answered, *sealed)
            failed = [task for task in tasks if task["status"] != "completed"]
            if failed:
                console.print(f"[red]{len(failed)} of {len(tasks)} tasks did not complete[/]")
                return 1
        if once:
            console.print(f"The service ran at {url} (interactive description at {url}/docs)")
            return 0
        console.print(f"\nThe service runs at [bold]{url}[/] (description: {url}/docs), key: {key}")
        console.print("Ctrl-C ends it.")
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        console.print("Ending every session ...")
    console.print("Stopped; no container is left.")
    return 0


async def show(
    client: Client,
    title: str,
    body: dict[str, Any],
    after_words: tuple[int, Callable[[], Awaitable[None]]] | None = None,
) -> dict[str, Any]:
    """Submit a task and print each event with its time; what the summary needs. `after_words`: after so many
    words something is done."""
    console.print(f"\n[bold]{title}[/]")
    return await show_events(client.submit(body), after_words)


async def show_events(
    events: AsyncIterator[TaskEvent], after_words: tuple[int, Callable[[], Awaitable[None]]] | None = None
) -> dict[str, Any]:
    """Print a task's events, each with its time."""
    began, told = time.monotonic(), {"first_word": float("nan"), "session_id": "", "status": "failed"}
    async for event in events:
        seconds = time.monotonic() - began
        if event.event == "text_delta" and told["first_word"] != told["first_word"]:
            told["first_word"] = seconds
        told["session_id"] = event.data.get("session_id") or told["session_id"]
        if event.event == "task_finish":
            told["status"] = event.data["status"]
        details = "  ".join(f"{name}={value!r}" for name, value in event.data.items() if value is not None)
        number = f"#{event.id}" if event.id else ""
        console.print(
            f"  {seconds:8.3f} s  {number:>4}  [{COLOURS.get(event.event, 'dim')}]{event.event:<12}[/] ",
            end="",
        )
        console.print(details, markup=False)
        if event.event == "text_delta" and after_words is not None:
            words, do = after_words
            after_words = (words - 1, do) if words > 1 else None
            if words == 1:
                await do()
    return told


async def show_openai(served: Served) -> dict[str, Any]:
    """A chat by the OpenAI interface, as any client of OpenAI's would ask for it; each line of the stream."""
    console.print("\n[bold]5. The OpenAI interface: a chat, as any client of OpenAI would stream it[/]")
    body = {
        "model": "echo",
        "messages": [{"role": "user", "content": "Any OpenAI client will do."}],
        "stream": True,
    }
    began, lines = time.monotonic(), []
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {served.key}"}) as http,
        http.post(f"{served.url}/v1/chat/completions", json=body) as answer,
    ):
        async for line in answer.content:
            if text := line.decode().strip():
                lines.append(text)
                console.print(f"  {time.monotonic() - began:8.3f} s  ", end="")
                console.print(text, markup=False)
    completed = answer.status == 200 and lines[-1:] == ["data: [DONE]"]
    return {"status": "completed" if completed else "failed"}


async def show_sealed(client: Client, served: Served) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request that the service cannot read, and the wash behind it. Enclave and KMS are stand-ins here, and
    it is said."""
    console.print("\n[bold]6. A sealed request: the service passes on what only the worker can read[/]")
    pcr0 = measured()
    console.print(f"  the client insists on PCR0 {pcr0[:16]}…, which it has from the program's own files")
    for idle in (await client.call("GET", "/api/sessions"))["sessions"]:
        await client.call("DELETE", f"/api/sessions/{idle['session_id']}")  # this one wants a slot too
    keys = AwsDataKeys(endpoint_url=served.kms_url)
    session = await open_sealed(
        client,
        pool="default",
        kms_key_arn=KMS_KEY,
        expect=Expected(pcr0=pcr0),
        keys=keys,
        allow_simulated=True,
    )
    async with session:
        proven = "which proves nothing: for a Nitro Enclave it would be isolated-worker"
        console.print(f"  verified before anything was sealed: [bold yellow]{session.assurance}[/], {proven}")
        (wash,) = session.washes
        console.print(
            f"  and that slot {wash.record.slot_id} was washed before: the enclave's attestation lists"
            f" certificate {wash.record_hash.hex()[:16]}…"
        )
        told = await show_events(session.submit({"prompt": "For the worker's eyes only.", "delay_ms": 30}))
    return told, await show_wash(client, session, served)


async def show_wash(client: Client, session: SealedSession, served: Served) -> dict[str, Any]:
    """The certificate of the wash behind a session that has ended, verified without the service."""
    console.print(
        "\n[bold]7. The car wash: what the session left is removed, and only a certificate frees its slot[/]"
    )
    began = time.monotonic()
    (after,) = await session.certificates_after()
    console.print(
        f"  {time.monotonic() - began:8.3f} s  washed and certified; now offline, by the files alone:"
    )
    node_key = (await client.call("GET", "/health"))["node_public_key"]
    files = []
    for name, certificate in (("before", session.washes[0]), ("behind", after)):
        files.append(served.folder / f"{name}.cbor")
        files[-1].write_bytes(certificate.raw)
    arguments = [
        *map(str, files),
        "--node-key",
        node_key,
        "--head",
        after.record_hash.hex(),
        "--allow-simulated",
    ]
    console.print("  gpu-server wash verify before.cbor behind.cbor --node-key … --head … --allow-simulated")
    verify = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gpu_server.cli", "wash", "verify", *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await verify.communicate()
    for line in said.decode().splitlines():
        console.print(f"    {line}", markup=False)
    console.print(
        "  [bold yellow]The enclave is simulated[/], and a slot without a GPU has no memory to scrub."
    )
    return {"status": "completed" if verify.returncode == 0 else "failed"}


def measured() -> str:
    """PCR0 of the simulated enclave, by the program's files in this checkout."""
    command = [sys.executable, "-m", "enclave", "--measurements"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'enclave_image'}:{ROOT}"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return str(json.loads(shown.stdout)["PCR0"])


class Served:
    """A service of its own: free port, temporary folders, random key."""

    def __init__(self, folder: Path, kms_url: str) -> None:
        self.key, self.kms_url = secrets.token_urlsafe(24), kms_url
        self.folder, self._log, self._port = folder, folder / "service.log", free_port()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> dict[str, Any]:
        """Start it; what /health says when it is ready."""
        environment = {
            **os.environ,
            "HTTP_PORT": str(self._port),
            "INTERNAL_API_KEY": self.key,
            "STATE_DIR": str(self.folder / "state"),
            "RUN_DIR": str(self.folder / "run"),
            "MODEL_PRESETS_FILE": str(ROOT / "config" / "model_presets.yaml"),
            "LOG_LEVEL": "warning",
            "ENCLAVE": "simulated",
            "KMS_ENDPOINT_URL": self.kms_url,
        }
        with self._log.open("ab") as log_file:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gpu_server.cli", "serve",
                env=environment, cwd=self.folder, stdout=log_file, stderr=log_file, start_new_session=True,
            )  # fmt: skip
        return await until_ready(self.url, self.key, self._process, self._log)

    async def kill_and_start(self) -> None:
        """kill -9, and a new life."""
        assert self._process is not None
        console.print("             [bold red]kill -9[/]")
        self._process.kill()
        await self._process.wait()
        began = time.monotonic()
        await self.start()
        console.print(
            f"             [bold green]started again[/], ready after {time.monotonic() - began:.1f} s"
        )

    async def end(self) -> None:
        """End it, containers and all."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)


@asynccontextmanager
async def service() -> AsyncIterator[Served]:
    """A running service; afterwards nothing is left of it."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="gpu-server-demo-", dir=shm if os.access(shm, os.W_OK) else None))
    folder.chmod(0o711)  # workers with uids of their own pass through to their run folders
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "of-nobody"  # the KMS of this demonstration asks nobody who he is
    policy = {"kms:RecipientAttestation:PCR0": measured()}
    async with KmsEmulator({KMS_KEY: EmulatedKey(conditions=policy)}, allow_simulated=True) as kms:
        served = Served(folder, kms.url)
        try:
            health = await served.start()
            slots = ", ".join(f"{slot['id']} ({slot['name']})" for slot in health["gpus"])
            runtime = health["runtime"]
            console.print(f"[bold]gpu-server[/] at {served.url}, runtime [bold]{runtime}[/], slots: {slots}")
            for warning in health["warnings"]:
                console.print(f"[yellow]warning:[/] {warning}")
            yield served
        finally:
            await served.end()
            shutil.rmtree(folder, ignore_errors=True)


async def until_ready(url: str, key: str, process: asyncio.subprocess.Process, log: Path) -> dict[str, Any]:
    """Poll /health; the answer once it is ready. Prints the log if the service ends instead."""
    give_up = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as http:
        while process.returncode is None and time.monotonic() < give_up:
            with suppress(aiohttp.ClientError):
                async with http.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return await answer.json()
            await asyncio.sleep(0.05)
    console.print("[red]The service did not start. Its log:[/]")
    console.print(log.read_text(errors="replace"), markup=False)
    raise SystemExit(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
