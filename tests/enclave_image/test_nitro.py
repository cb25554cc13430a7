"""The chain of a Nitro host but for the hardware: supervisor, runner, nitro-cli's stand-in, program."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from enclave.measure import measurements

from gpu_server.drivers.enclave_link import EnclaveLink
from gpu_server.drivers.enclave_process import ProcessEnclave
from gpu_server.enclave import EnclaveSupervisor
from gpu_server.sealed.attestation import verify
from tests.enclave_image.nitro_host import ROOT, NitroHost, nitro_host
from tests.fakes.hurried_clock import HurriedClock

NONCE = b"n" * 32
PATIENCE = 60.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NitroHost]:
    with nitro_host(tmp_path / "host") as made:
        yield made


def supervisor(host: NitroHost) -> EnclaveSupervisor:
    """As for ENCLAVE=nitro, with the runner as a process, and the stand-in's socket in place of vsock."""
    command = [
        *(sys.executable, "-BI", str(ROOT / "enclave_image/runner/runner.py"), "--eif", str(host.eif)),
        *("--memory", "512", "--cpu-count", "2", "--cid", "16", "--poll", "0.05", "--backoff", "0.01"),
    ]
    runner = ProcessEnclave("i", host.folder / "runner", command, environment=host.environment)
    return EnclaveSupervisor(runner, EnclaveLink(host.socket), mode="simulated", clock=HurriedClock())


@asynccontextmanager
async def running(made: EnclaveSupervisor) -> AsyncIterator[EnclaveSupervisor]:
    """While it watches; ended in order."""
    async with asyncio.TaskGroup() as group:
        group.create_task(made.run())
        try:
            yield made
        finally:
            await made.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 -- what is waited for happens in other processes
            await asyncio.sleep(0.005)


async def test_start_attest_stop(host: NitroHost) -> None:
    """An enclave is run, attests, and is terminated by nitro-cli when the service ends."""
    async with running(supervisor(host)) as enclave:
        await until(lambda: enclave.health.healthy)
        attested = verify(await enclave.attest(NONCE), nonce=NONCE, pcrs=measurements(), allow_simulated=True)
        assert attested.epoch == enclave.health.epoch
        assert len(host.running) == 1
    assert host.running == {}
    assert host.calls[-2:] == ["terminate-enclave", "describe-enclaves"]


async def test_e29_is_the_runners_affair(host: NitroHost) -> None:
    """A fast restart that the driver refuses at first costs a moment, and nobody hears of it."""
    host.fail_with("E29", "E29", "OK")
    async with running(supervisor(host)) as enclave:
        await until(lambda: enclave.health.healthy)
        assert enclave.restarts == 0
    assert host.calls.count("run-enclave") == 3


async def test_crash(host: NitroHost) -> None:
    """An enclave that crashes is run again, with another key."""
    async with running(supervisor(host)) as enclave:
        await until(lambda: enclave.health.healthy)
        epoch = enclave.health.epoch
        host.crash()
        await until(lambda: enclave.health.epoch not in (None, epoch))
        assert enclave.restarts >= 1
        await enclave.attest(NONCE)


@pytest.mark.parametrize(
    ("code", "word"), [("E36", "did not boot"), ("E27", "memory_mib"), ("E22", "cpu_count")]
)
async def test_errors_reach_the_operator(host: NitroHost, code: str, word: str) -> None:
    """What nitro-cli says becomes the health's reason, and once it is put right the enclave comes up."""
    async with running(supervisor(host)) as enclave:

        def told() -> bool:
            return code in (enclave.health.reason or "") and word in (enclave.health.reason or "")

        with host.broken(code):
            await until(told)
        await until(lambda: enclave.health.healthy)
        assert enclave.health.reason is None


async def test_a_wash(host: NitroHost) -> None:
    """An enclave that a wash renews is terminated, and seen gone from describe-enclaves, before the next one
    is run; a restart that fast, which the driver refuses at first, is the runner's affair."""
    host.linger(3)
    async with running(supervisor(host)) as enclave:
        await until(lambda: enclave.health.healthy)
        (before,), begun = host.running, len(host.calls)
        host.fail_with("E29", "OK")
        renewal = enclave.renew(("gpu0",))
        assert (await renewal.booted())["old"] == "terminated"
        calls = host.calls[begun:]
        terminated, run = calls.index("terminate-enclave"), calls.index("run-enclave")
        assert calls[terminated + 1 : run] == ["describe-enclaves"] * 4
        assert calls.count("run-enclave") == 2
        (after,) = host.running
        assert after != before
        document = await renewal.attest("gpu0", NONCE)
        renewal.leave()
        attested = verify(document, nonce=NONCE, pcrs=measurements(), allow_simulated=True)
        assert attested.slots == (NONCE,)
        assert enclave.restarts == 1
