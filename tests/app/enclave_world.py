"""The enclave's supervisor over a host that fails on demand, and ways to wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from gpu_server.drivers.enclave_link import EnclaveLink
from gpu_server.enclave import EnclaveSupervisor
from gpu_server.ports import Clock
from gpu_server.sealed.grant import Binding
from tests.fakes.enclave_host import FakeEnclaveHost
from tests.fakes.hurried_clock import HurriedClock

NONCE = b"n" * 32
PATIENCE = 60.0


def supervisor(
    host: FakeEnclaveHost,
    clock: Clock | None = None,
    *,
    timeout: float = 20.0,
    records: Callable[[], Mapping[str, bytes]] = dict,
) -> EnclaveSupervisor:
    link = EnclaveLink(host.path, timeout=timeout)
    return EnclaveSupervisor(host, link, mode="simulated", clock=clock or HurriedClock(), records=records)


@asynccontextmanager
async def running(made: EnclaveSupervisor) -> AsyncIterator[EnclaveSupervisor]:
    """While it watches over the enclave; at the end it is cancelled, as for a handover."""
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(made.run())
        try:
            yield made
        finally:
            watching.cancel()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for the supervisor to have seen something."""
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 -- what is waited for is made of many steps of others
            await asyncio.sleep(0.001)


async def healthy(made: EnclaveSupervisor) -> bytes:
    """Wait until it is; its epoch."""
    await until(lambda: made.health.healthy)
    assert made.health.epoch is not None
    return made.health.epoch


async def another(made: EnclaveSupervisor, epoch: bytes, end: Callable[[], None]) -> None:
    """End this one, and wait until there is another."""
    end()
    await until(lambda: made.health.healthy and made.health.epoch != epoch)


def binding(epoch: bytes) -> Binding:
    return Binding(
        tenant="t",
        pool="p",
        kms_key_arn="arn:aws:kms:eu-west-1:123456789012:key/k",
        session_id="s",
        epoch=epoch,
        worker_key=bytes(32),
        wrapped_key=b"w",
    )
