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

    async def grant(self, worker_key: bytes, for_recipient: bytes, **changed: str | bytes) -> bytes:
        names = {
            "tenant": "acme",
            "pool": "chat",
            "kms_key_arn": ARN,
            "session_id": "s_1",
            "wrapped_key": b"w",
        }
        return await self.enclave.grant(
            worker_key=worker_key,
            for_recipient=for_recipient,
            **{**names, **changed},  # type: ignore[arg-type]
        )

    async def end(self) -> None:
        if isinstance(self.enclave, FakeEnclave):
            self.enclave.down = "ended"
        else:
            assert isinstance(self.enclave, EnclaveSupervisor)
            await self.enclave.stop()


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
    grant = await stage.grant(worker.public, make_recipient(DATA_KEY, attested.public_key))
    binding = Binding(
        tenant="acme",
        pool="chat",
        kms_key_arn=ARN,
        session_id="s_1",
        epoch=attested.epoch,
        worker_key=worker.public,
        wrapped_key=b"w",
    )
    assert open_grant(binding, grant, worker) == binding.psk(DATA_KEY)


async def test_refusals(stage: Stage) -> None:
    """What cannot be opened and what is no name are refused with their codes; health stays."""
    worker = WorkerKey.generate().public
    with pytest.raises(EnclaveRefused) as cannot_open:
        await stage.grant(worker, b"nonsense")
    assert cannot_open.value.code == "DECRYPT"
    with pytest.raises(EnclaveRefused) as malformed:
        await stage.grant(worker, b"nonsense", tenant="a tenant")
    assert malformed.value.code == "MALFORMED"
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
        await stage.grant(bytes(32), b"x")
