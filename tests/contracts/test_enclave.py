"""The contract of the port `Enclave`: the fake, a real process, and the real image in a container."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from enclave.measure import measurements

from gpu_server.enclave import EnclaveSupervisor, enclave_of
from gpu_server.ports import Enclave, EnclaveDown, EnclaveRefused
from gpu_server.sealed.attestation import Attestation, verify
from gpu_server.sealed.cms import make_recipient
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant
from gpu_server.settings import Settings
from tests.fakes.enclave import MEASUREMENTS, FakeEnclave

ARN = "arn:aws:kms:eu-west-1:123456789012:key/00000000-0000-0000-0000-000000000000"
DATA_KEY = sha256(b"a data key").digest()
NONCE = b"n" * 32
PATIENCE = 60.0


@dataclass
class Stage:
    """An enclave, its measurements, and a way to end it."""

    enclave: Enclave
    pcrs: dict[int, bytes]

    async def attested(self, nonce: bytes = NONCE) -> Attestation:
        return verify(await self.enclave.attest(nonce), nonce=nonce, pcrs=self.pcrs, allow_simulated=True)

    async def end(self) -> None:
        if isinstance(self.enclave, FakeEnclave):
            self.enclave.down = "ended"
        else:
            assert isinstance(self.enclave, EnclaveSupervisor)
            await self.enclave.stop()


def binding(epoch: bytes, worker_key: bytes) -> Binding:
    return Binding(
        tenant="acme",
        pool="chat",
        kms_key_arn=ARN,
        session_id="s_1",
        epoch=epoch,
        worker_key=worker_key,
        wrapped_key=b"w",
    )


@asynccontextmanager
async def _supervised(runtime: str, folder: Path) -> AsyncIterator[EnclaveSupervisor]:
    settings = Settings(_env_file=None, enclave="simulated")  # type: ignore[call-arg]
    made = enclave_of(settings, runtime, f"test{secrets.token_hex(6)}", folder, None)
    assert made is not None
    async with asyncio.TaskGroup() as group:
        group.create_task(made.run())
        try:
            async with asyncio.timeout(PATIENCE):
                while not made.health.healthy:  # noqa: ASYNC110 -- as /health would be asked
                    await asyncio.sleep(0.005)
            yield made
        finally:
            await made.stop()


@pytest.fixture(params=["fake", "process", pytest.param("docker", marks=pytest.mark.docker)])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    if request.param == "fake":
        yield Stage(FakeEnclave(), MEASUREMENTS)
        return
    if request.param == "docker":
        engine = request.getfixturevalue("docker_engine")
        if not engine.images("gpu-server/enclave:dev"):
            absent = "no gpu-server/enclave:dev here: ./scripts/build_images.sh enclave"
            pytest.fail(absent) if os.environ.get("CI") else pytest.skip(absent)
    async with _supervised(request.param, tmp_path) as enclave:
        yield Stage(enclave, measurements())


async def test_health(stage: Stage) -> None:
    """A healthy one has the epoch of the key in its documents, and no reason; it says that it simulates."""
    health = stage.enclave.health
    assert health.healthy
    assert health.reason is None
    assert health.epoch == (await stage.attested()).epoch
    assert stage.enclave.mode == "simulated"
    assert stage.enclave.restarts == 0


async def test_each_document_has_its_nonce(stage: Stage) -> None:
    """Documents are fresh: the nonce is the caller's, the key stays the same."""
    first, second = await stage.attested(b"1" * 32), await stage.attested(b"2" * 32)
    assert first.public_key == second.public_key
    assert first.slots == ()


async def test_a_grant_opens_at_its_worker(stage: Stage) -> None:
    """KMS's answer becomes a grant that only this worker opens, to the key that the client computes too."""
    attested, worker = await stage.attested(), WorkerKey.generate()
    assert attested.public_key is not None
    bound = binding(attested.epoch, worker.public)
    grant = await stage.enclave.grant(bound, make_recipient(DATA_KEY, attested.public_key))
    assert open_grant(bound, grant, worker) == bound.psk(DATA_KEY)


async def test_refusals(stage: Stage) -> None:
    """What cannot be opened and what is no nonce are refused with their codes; health stays."""
    bound = binding((await stage.attested()).epoch, WorkerKey.generate().public)
    with pytest.raises(EnclaveRefused) as cannot_open:
        await stage.enclave.grant(bound, b"nonsense")
    assert cannot_open.value.code == "DECRYPT"
    with pytest.raises(EnclaveRefused) as nonce:
        await stage.enclave.attest(b"short")
    assert nonce.value.code == "MALFORMED"
    assert stage.enclave.health.healthy


async def test_many_at_once(stage: Stage) -> None:
    """Requests that come together are all answered, each with its own."""
    nonces = [bytes([number]) * 32 for number in range(24)]
    found = await asyncio.gather(*(stage.attested(nonce) for nonce in nonces))
    assert len({attested.epoch for attested in found}) == 1


async def test_one_that_is_down(stage: Stage) -> None:
    """Nothing is answered, the reason is said, and there is no epoch."""
    await stage.end()
    assert not stage.enclave.health.healthy
    assert stage.enclave.health.reason
    assert stage.enclave.health.epoch is None
    with pytest.raises(EnclaveDown):
        await stage.enclave.attest(NONCE)
    with pytest.raises(EnclaveDown):
        await stage.enclave.grant(binding(bytes(16), bytes(32)), b"x")
    renewal = stage.enclave.renew(("gpu0",))
    with pytest.raises(EnclaveDown):
        await renewal.booted()


# -- renewals ---------------------------------------------------------------------------------------------


async def test_a_wash_renews_it(stage: Stage) -> None:
    """A fresh one boots, and waits without a key for the wash's records; its documents name them. What is no
    record is refused, before it could spoil the restart for others."""
    old = (await stage.attested()).epoch
    renewal = stage.enclave.renew(("gpu0", "gpu1"))
    figures = await renewal.booted()
    assert figures["old"] == "terminated"
    assert not stage.enclave.health.healthy
    assert stage.enclave.health.epoch is None
    with pytest.raises(EnclaveDown, match="restarted by a wash"):
        await stage.enclave.attest(NONCE)
    with pytest.raises(EnclaveDown):
        await stage.enclave.grant(binding(old, bytes(32)), b"x")
    with pytest.raises(EnclaveRefused) as refused:
        await renewal.attest("gpu0", b"short")
    assert refused.value.code == "MALFORMED"
    with pytest.raises(ValueError, match="gpu7"):
        await renewal.attest("gpu7", b"h" * 32)
    records = {"gpu0": b"0" * 32, "gpu1": b"1" * 32}
    documents = await asyncio.gather(*(renewal.attest(slot, found) for slot, found in records.items()))
    for document, nonce in zip(documents, records.values(), strict=True):
        attested = verify(document, nonce=nonce, pcrs=stage.pcrs, allow_simulated=True)
        assert sorted(attested.slots) == [b"0" * 32, b"1" * 32]
        assert attested.epoch == stage.enclave.health.epoch != old
    renewal.leave()
    assert stage.enclave.restarts == 1
    with pytest.raises(EnclaveDown, match="another key"):
        await stage.enclave.grant(binding(old, bytes(32)), b"x")


async def test_washes_share_a_restart(stage: Stage) -> None:
    """Two that overlap have one restart, and the key waits for both; one that leaves is not waited for."""
    first, second, third = (stage.enclave.renew((f"gpu{number}",)) for number in range(3))
    for renewal in (first, second, third):
        await renewal.booted()
    async with asyncio.TaskGroup() as group:
        one = group.create_task(first.attest("gpu0", b"0" * 32))
        two = group.create_task(second.attest("gpu1", b"1" * 32))
        third.leave()
        third.leave()
    for task, nonce in ((one, b"0" * 32), (two, b"1" * 32)):
        attested = verify(task.result(), nonce=nonce, pcrs=stage.pcrs, allow_simulated=True)
        assert sorted(attested.slots) == [b"0" * 32, b"1" * 32]
    first.leave()
    second.leave()
    assert stage.enclave.restarts == 1
    with pytest.raises(EnclaveDown, match="left"):
        await third.attest("gpu2", b"2" * 32)


async def test_a_later_wash_has_a_restart_of_its_own(stage: Stage) -> None:
    """A key that has been made is for nobody who comes later."""
    epochs = []
    for number in range(2):
        renewal = stage.enclave.renew(("gpu0",))
        await renewal.booted()
        nonce = bytes([number + 1]) * 32
        document = await renewal.attest("gpu0", nonce)
        renewal.leave()
        epochs.append(verify(document, nonce=nonce, pcrs=stage.pcrs, allow_simulated=True).epoch)
    assert epochs[0] != epochs[1]
    assert stage.enclave.restarts == 2
