"""`gpu-server submit --sealed` against a played service, with the KMS emulator; its plain form is tested with
the other commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from click.testing import Result
from typer.testing import CliRunner

from gpu_server import cli
from gpu_server.cli_slots import utc
from gpu_server.client import waiting
from gpu_server.drivers.kms import AwsKeyService
from gpu_server.kms_emulator import EmulatedKey, KmsEmulator
from tests.app.api_world import KEY
from tests.client.sealed_world import ARN, CANARY, NODE_KEY, PCR0, POOL, SealedService, sealed_world
from tests.client.test_sealed import STREAMS
from tests.sealed import washes

SIMULATED = ("--sealed", "--kms-key", ARN, "--allow-simulated")
PROMPT = ("--prompt", f"hello {CANARY}")
OTHER = "0b" * 48
MADE = utc(washes.MADE)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    for name in (
        "GPU_SERVER_URL",
        "GPU_SERVER_TENANT",
        "INTERNAL_API_KEY",
        "AWS_PROFILE",
        "KMS_ENDPOINT_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPU_SERVER_API_KEY", KEY)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


@asynccontextmanager
async def service(*, enabled: bool = True) -> AsyncIterator[tuple[SealedService, Any]]:
    """A played service with the KMS emulator, and what runs a command against them."""
    conditions = {"kms:RecipientAttestation:ImageSha384": PCR0, "kms:EncryptionContext:pool": POOL}
    keys = {ARN: EmulatedKey(conditions=conditions, enabled=enabled)}
    async with KmsEmulator(keys, allow_simulated=True) as kms, sealed_world() as (_, played):
        played.key_service = key_service = AwsKeyService(kms.url)
        address = ("--url", f"http://127.0.0.1:{played.port}", "--kms-endpoint", kms.url)

        async def submit(*arguments: str) -> Result:
            return await asyncio.to_thread(run, *arguments, *address)

        try:
            yield played, submit
        finally:
            key_service.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["submit", *arguments])


async def test_sealed() -> None:
    """The assurance is told first, then the events; the session is ended; the service has seen no word."""
    async with service() as (played, submit):
        result = await submit(*SIMULATED, "--pool", POOL, "--pcr0", PCR0, *PROMPT)
        assert result.exit_code == 0, result.output
        first, washed, second, *_, last = result.stdout.splitlines()
        assert first == "sealed: simulated enclave, proves nothing"
        assert washed == f"washed before: slot 0 at {MADE}; certified by node {NODE_KEY.hex()}"
        assert second.startswith("connection")
        assert f"hello{CANARY}" in result.stdout
        assert last.startswith("task_finish")
        assert "the service's word" not in result.stdout
        assert played.ended == ["s_1"]
        assert CANARY.encode() not in played.seen


async def test_as_json() -> None:
    """With --json stdout is events alone, each saying whether it came sealed; the assurance is on stderr."""
    async with service() as (_, submit):
        result = await submit(*SIMULATED, "--pool", POOL, "--json", '{"prompt": "x"}')
        events = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(event["event"], event["sealed"]) for event in events] == [
            ("connection", False),
            ("text_delta", True),
            ("task_finish", True),
        ]
        assert "simulated enclave, proves nothing\nwashed before: " in result.stderr


async def test_a_session_for_more() -> None:
    """--keep leaves the session and names it; --session takes it up, and leaves it too."""
    async with service() as (played, submit):
        kept = await submit(*SIMULATED, "m", "p", "--keep", '{"prompt": "one"}')
        assert "session: s_1" in kept.stdout
        again = await submit(*SIMULATED, "--session", "s_1", '{"prompt": "two"}')
        assert (kept.exit_code, again.exit_code) == (0, 0)
        assert "two" in again.stdout
        assert played.ended == []


async def test_washes_that_are_not_proven() -> None:
    """A session whose slot is not proven to be washed is not used, and the line says in which way; that there
    was no check is said too."""
    async with service() as (played, submit):
        played.attested = []
        result = await submit(*SIMULATED, "--pool", POOL, *PROMPT)
        assert result.exit_code == 1
        assert result.stderr.startswith("No proof of the washes (unlisted): ")
        assert (played.tasks, played.ended) == ({}, ["s_1"])
        result = await submit(*SIMULATED, "--pool", POOL, "--no-check-washes", *PROMPT)
        assert result.exit_code == 0
        assert "washes: not checked" in result.stdout.splitlines()


async def test_the_key_of_the_node() -> None:
    """Certificates of another node than the one that is named are refused."""
    async with service() as (played, submit):
        result = await submit(*SIMULATED, "--pool", POOL, "--node-key", NODE_KEY.hex(), *PROMPT)
        assert result.exit_code == 0
        result = await submit(*SIMULATED, "--pool", POOL, "--node-key", "0b" * 32, *PROMPT)
        assert result.exit_code == 1
        assert "(node_key)" in result.stderr
        assert len(played.tasks) == 1


async def test_saving_certificates(tmp_path: Path) -> None:
    """The certificate of the wash before the session is kept, and that of the wash behind it, which is waited
    for; together they are a chain. Of a session that stays there is none behind it."""
    async with service() as (played, submit):
        kept = await submit(
            *SIMULATED, "--pool", POOL, "--keep", "--save-certificates", str(tmp_path / "kept"), *PROMPT
        )
        assert kept.exit_code == 0
        assert [path.read_bytes() for path in (tmp_path / "kept").iterdir()] == [played.before[0].raw]
        played.wash()
        folder = tmp_path / "a" / "b"
        result = await submit(*SIMULATED, "--pool", POOL, "--save-certificates", str(folder), *PROMPT)
        assert result.exit_code == 0, result.output
        assert "waiting for the washes behind the session" in result.stderr
        files = sorted(folder.iterdir())
        assert [path.read_bytes() for path in files] == [played.before[0].raw, played.behind[0].raw]
        command = ["wash", "verify", *map(str, files), "--node-key", NODE_KEY.hex(), "--allow-simulated"]
        assert (await asyncio.to_thread(CliRunner().invoke, cli.app, command)).exit_code == 0
        (tmp_path / "file").write_text("")
        where = str(tmp_path / "file" / "folder")
        result = await submit(*SIMULATED, "--pool", POOL, "--save-certificates", where, *PROMPT)
        assert (result.exit_code, "Not a directory" in result.stderr) == (2, True)


async def test_another_program() -> None:
    """An enclave with other measurements is not accepted, and nothing is sealed."""
    async with service() as (played, submit):
        for wrong in (("--pcr0", OTHER), ("--pcr0", PCR0, "--pcr2", OTHER)):
            result = await submit(*SIMULATED, "--pool", POOL, *wrong, *PROMPT)
            assert result.exit_code == 1
            assert result.stderr.startswith("The enclave is not accepted (pcr)")
        strict = await submit("--sealed", "--kms-key", ARN, "--pool", POOL, "--pcr0", PCR0, *PROMPT)
        assert strict.stderr.startswith("The enclave is not accepted (root)")
        assert played.tasks == {}
        assert played.ended == ["s_1"] * 3


async def test_one_of_several_programs() -> None:
    """--pcr0 may be repeated, for an upgrade: any of them is accepted."""
    async with service() as (_, submit):
        result = await submit(*SIMULATED, "--pool", POOL, "--pcr0", OTHER, "--pcr0", PCR0, *PROMPT)
        assert result.exit_code == 0


def limit_from_the_first_reason(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The time that an opening may take begins when its first reason to wait is told, and not before."""
    limits, tell = list[asyncio.Timeout](), waiting.Waiting._tell

    def timeout(given: float) -> asyncio.Timeout:
        assert given == seconds
        limits.append(asyncio.timeout(None))
        return limits[0]

    def tell_and_begin(self: waiting.Waiting, reason: str) -> None:
        tell(self, reason)
        if limits[0].when() is None:
            limits[0].reschedule(asyncio.get_running_loop().time() + seconds)

    monkeypatch.setattr(waiting, "asyncio", SimpleNamespace(timeout=timeout))
    monkeypatch.setattr(waiting.Waiting, "_tell", tell_and_begin)


async def test_why_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the session is not open, stderr says why, once and in one line; and there is an end to it."""
    async with service() as (played, submit):
        played.session = {"worker_key": None, "state": "waiting"}
        with monkeypatch.context() as patch:
            limit_from_the_first_reason(patch, 0.2)
            result = await submit(*SIMULATED, "--pool", POOL, "--open-seconds", "0.2", *PROMPT)
        first, second = result.stderr.splitlines()
        assert first == "waiting for a slot: all are taken"
        assert second.startswith("the session was not open after 0.2 s; it was waiting for a slot")
        assert result.exit_code == 1
        assert played.ended == ["s_1"]
        played.session = {}
        played.refusals = [(503, "enclave_unavailable")] * 3
        result = await submit(*SIMULATED, "--pool", POOL, *PROMPT)
        assert result.stderr == "waiting, refused with enclave_unavailable: some detail\n"
        assert result.exit_code == 0


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell has its background jobs ignore Ctrl-C: if these tests are one, their programs inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_ending_it_while_it_waits(number: int) -> None:
    """SIGTERM and Ctrl-C end the session that was started, and say so."""
    async with service() as (played, _):
        played.session = {"worker_key": None, "state": "waiting"}
        command = [sys.executable, "-m", "gpu_server.cli", "submit", *SIMULATED, "--pool", POOL, *PROMPT]
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "GPU_SERVER_URL": f"http://127.0.0.1:{played.port}"},
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        assert await process.stderr.readline() == b"waiting for a slot: all are taken\n"
        process.send_signal(number)
        _, said = await process.communicate()
        assert (process.returncode, said) == (1, b"interrupted; what was started for it is ended\n")
        assert played.ended == ["s_1"]


async def test_where_the_kms_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """KMS_ENDPOINT_URL says it too, and disturbs no plain task."""
    monkeypatch.setenv("KMS_ENDPOINT_URL", "http://127.0.0.1:9")
    plain = await asyncio.to_thread(run, "m", "p", "--url", "http://127.0.0.1:9")
    assert plain.exit_code == 1
    assert "cannot be reached" in plain.stderr
    async with service() as (played, submit):
        result = await submit(*SIMULATED, "--pool", POOL, *PROMPT)  # the option counts before it
        assert result.exit_code == 0
        address = ("--url", f"http://127.0.0.1:{played.port}")
        result = await asyncio.to_thread(run, *SIMULATED, "--pool", POOL, *PROMPT, *address)
        assert result.stderr.startswith("No data key: unreachable")


async def test_an_answer_that_is_not_whole() -> None:
    """An answer that was cut is an error, whatever the service says."""
    async with service() as (played, submit):
        played.stream = STREAMS["the end dropped"]
        result = await submit(*SIMULATED, "--pool", POOL, "--prompt", "one two three")
        assert result.exit_code == 1
        assert result.stderr.startswith("Refused by this client")


@pytest.mark.parametrize("status", ["", "completed", "failed", "timeout"])
async def test_an_end_that_nothing_sealed_says(status: str) -> None:
    """Only a sealed end is status 0: whatever the service says of a task that never ran."""
    async with service() as (played, submit):
        finish = orjson.dumps({"status": status})
        played.stream = lambda frames: [b"id: 1\nevent: task_finish\ndata: %b\n\n" % finish]
        result = await submit(*SIMULATED, "--pool", POOL, *PROMPT)
        assert result.exit_code == 1


async def test_no_data_key() -> None:
    """What KMS says when there is no data key is told."""
    async with service(enabled=False) as (played, submit):
        result = await submit(*SIMULATED, "--pool", POOL, *PROMPT)
        assert result.exit_code == 1
        assert result.stderr.startswith("No data key: DisabledException")
        assert played.ended == ["s_1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sealed", "--pool", "x"), "--kms-key"),
        (("--sealed", "--pool", "x", "--kms-key", "alias/x", "--allow-simulated"), "ARN"),
        (("--sealed", "--pool", "x", "--kms-key", ARN), "--pcr0"),
        (("--sealed", "--pool", "x", "--kms-key", ARN), "--allow-simulated"),
        (("--sealed", "--pool", "x", "--kms-key", ARN, "--pcr3", PCR0), "--pcr8"),
        (("--sealed", "--pool", "x", "--kms-key", ARN, "--pcr0", "12"), "96 hex digits"),
        (("--sealed", "--pool", "x", "--kms-key", ARN, "--pcr0", "00" * 48), "debug"),
        (SIMULATED, "--pool"),
        ((*SIMULATED, "m"), "task_preset"),
        ((*SIMULATED, "--session", "s_1", "m", "p"), "leave them out"),
        ((*SIMULATED, "--session", "s_1", "--difficulty", "low"), "leave them out"),
        ((*SIMULATED, "--pool", "x", "m", "p"), "leave them out"),
        ((*SIMULATED, "--pool", "x", "--oneoff"), "--oneoff"),
        ((*SIMULATED, "--pool", "x", "--detach"), "--detach"),
        ((*SIMULATED, "--pool", "x", "--timeout", "3"), "--timeout"),
        ((*SIMULATED, "--pool", "x", "--idempotency-key", "k"), "--idempotency-key"),
        ((*SIMULATED, "--pool", "x", "{"), "not JSON"),
        (("m", "p", "--pool", "x"), "--pool is for --sealed"),
        (("m", "p", "--kms-key", ARN), "--kms-key is for --sealed"),
        (("m", "p", "--allow-simulated"), "--allow-simulated is for --sealed"),
        (("m", "p", "--keep"), "--keep is for --sealed"),
        (("m", "p", "--node-key", "0b" * 32), "--node-key is for --sealed"),
        (("m", "p", "--no-check-washes"), "--no-check-washes is for --sealed"),
        (("m", "p", "--save-certificates", "x"), "--save-certificates is for --sealed"),
        ((*SIMULATED, "--pool", "x", "--node-key", "0b"), "32 bytes"),
        ((*SIMULATED, "--pool", "x", "--no-check-washes", "--node-key", "0b" * 32), "checked"),
        (("m", "p", "--open-seconds", "0"), "--open-seconds is for --sealed"),
        (("m",), "task_preset"),
        ((), "model_id"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[str, ...], words: str) -> None:
    """Options that are missing or do not go together are told before anything is sent; the status is 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
