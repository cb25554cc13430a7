"""The wash of one slot with an enclave: the record is attested by one that was born after it."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path

import pytest

from gpu_server.core.rows import Row
from gpu_server.core.slots import NO_CERTIFICATE
from gpu_server.ports import Dirty, EnclaveDown, JournalFailing, RuntimeUnreachable, WashUnreachable
from gpu_server.sealed.frames import Op
from gpu_server.sealed.wash import verify_chain
from gpu_server.slot_wash import HELD_UP_SECONDS, LastMade
from gpu_server.wash_steps import FIRST_RETRY_SECONDS
from tests.app.laundry import GPUS, Laundry
from tests.app.world import slot_specs
from tests.fakes.enclave import FakeEnclave

ONE = slot_specs(1)


@pytest.fixture
def enclave() -> FakeEnclave:
    return FakeEnclave()


@pytest.fixture
def laundry(tmp_path: Path, enclave: FakeEnclave) -> Laundry:
    return Laundry(tmp_path, GPUS, enclave)


@pytest.fixture
def one(tmp_path: Path, enclave: FakeEnclave) -> Laundry:
    """With one slot, where a test moves the clock from step to step."""
    return Laundry(tmp_path, ONE, enclave)


async def test_slots_that_are_washed_together(laundry: Laundry, enclave: FakeEnclave) -> None:
    """They share one restart of the enclave; each document is for its own record, and lists both."""
    epoch = enclave.epoch
    await laundry.run()
    assert enclave.restarts == 1
    assert enclave.epoch != epoch
    found = laundry.certificates
    hashes = {certificate.record_hash for certificate in found.values()}
    for certificate in found.values():
        assert certificate.attestation is not None
        assert certificate.attestation.epoch == enclave.epoch
        assert set(certificate.attestation.slots) == hashes
    assert laundry.results()["enclave"] == "passed"
    assert dict(found["0"].record.steps[3].figures) == {"boot_ms": 0, "old": "terminated", "version": "fake"}
    assert enclave.health.healthy


async def test_washes_that_run_together(laundry: Laundry, enclave: FakeEnclave, tmp_path: Path) -> None:
    """So do those of different leases."""
    other = Laundry(tmp_path, slot_specs(4)[2:], enclave)
    enclave.boots.clear()
    async with laundry.running(), other.running():
        await laundry.until_at("enclave")
        await other.until_at("enclave")
        enclave.boots.set()
    assert (enclave.restarts, len(laundry.certificates), len(other.certificates)) == (1, 2, 2)


async def test_a_chain_with_documents(one: Laundry) -> None:
    """Certificates of several washes are one chain, up to what the newest document lists."""
    raws = []
    for number in range(3):
        await one.run(one.order(f"s_{number}", number + 1))
        raws.append(one.certificates["0"].raw)
        one.free()
    newest = one.certificates["0"]
    chain = verify_chain(
        raws, node_key=one.seal.public_key, head=newest.record_hash, enclave="required", allow_simulated=True
    )
    assert chain.head_checked
    assert newest.attestation is not None
    assert newest.record_hash in newest.attestation.slots


async def test_a_slot_that_fails_holds_up_nobody(laundry: Laundry, enclave: FakeEnclave) -> None:
    """A slot that is locked away leaves the restart, and the others go on without it."""
    laundry.machine.holders[GPUS[1].uuid] = "somebody"
    await laundry.run()
    assert laundry.failures.keys() == {"1"}
    (certificate,) = laundry.certificates.values()
    assert certificate.attestation is not None
    assert set(certificate.attestation.slots) == {certificate.record_hash}


@pytest.mark.parametrize("boots_late", [False, True])
async def test_a_step_that_is_tried_again_and_again(
    one: Laundry, enclave: FakeEnclave, boots_late: bool
) -> None:
    """After a while the enclave has its key without this slot, so that sessions can be opened; when the step
    has passed after all, the slot's record is attested by another one."""
    one.residue.failure = WashUnreachable("no answer")
    if boots_late:
        enclave.boots.clear()
    async with one.running():
        pause, began = FIRST_RETRY_SECONDS, one.clock.now()
        while one.clock.now() - began < HELD_UP_SECONDS:
            await one.clock.until_slept_to(one.clock.now() + pause)
            assert not enclave.health.healthy
            one.clock.advance(pause)
            pause = min(2 * pause, 5.0)
        await one.clock.until_slept_to(one.clock.now() + pause)
        enclave.boots.set()
        while enclave._restart is not None:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        assert (enclave.health.healthy, enclave.restarts) == (True, 1)
        one.residue.failure = None
        one.clock.advance(pause)
    certificate = one.certificates["0"]
    assert certificate.attestation is not None
    assert (certificate.attestation.epoch, enclave.restarts) == (enclave.epoch, 2)


async def test_a_journal_that_cannot_be_read(
    one: Laundry, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record can be written for so long: the enclave serves meanwhile, and is not restarted each time."""

    def fail(slot_id: str, limit: int) -> tuple[Row, ...]:
        raise JournalFailing("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(one.journal, "certificates", fail)
        async with one.running():
            pause, began = FIRST_RETRY_SECONDS, one.clock.now()
            while one.clock.now() - began < 3 * HELD_UP_SECONDS:
                await one.until_retry(pause)
                pause = min(2 * pause, 5.0)
            await one.clock.until_slept_to(one.clock.now() + pause)
            assert (enclave.health.healthy, enclave.restarts) == (True, 1)
            patched.undo()
            one.clock.advance(pause)
    assert one.certificates.keys() == {"0"}
    assert enclave.restarts == 2


async def test_all_slots_fail(laundry: Laundry, enclave: FakeEnclave) -> None:
    """Then the enclave has its key without them, and serves on."""
    laundry.scrubber.failure = Dirty("mismatched")
    enclave.boots.clear()
    await laundry.run()
    assert laundry.failures.keys() == {"0", "1"}
    enclave.boots.set()
    assert enclave.health.healthy


@pytest.mark.parametrize("failure", [EnclaveDown("it ended"), RuntimeUnreachable("no answer")])
async def test_an_enclave_that_does_not_boot(
    one: Laundry, enclave: FakeEnclave, failure: EnclaveDown | RuntimeUnreachable
) -> None:
    """It is tried again alone, with what has passed; the record tells of the boot that succeeded."""
    enclave.boot_failures = [failure] * 2
    async with one.running():
        await one.until_retry(FIRST_RETRY_SECONDS)
        await one.clock.until_slept_to(one.clock.now() + 2 * FIRST_RETRY_SECONDS)
        assert one.wash.washing["0"].reason == f"enclave: {failure}"
        one.clock.advance(2 * FIRST_RETRY_SECONDS)
    assert one.results()["enclave"] == "passed"
    assert len(one.residue.leases) == 1


async def test_an_enclave_that_stays_away(one: Laundry, enclave: FakeEnclave) -> None:
    """A node with an enclave gives no certificate without it, however long that takes."""
    enclave.down = "it has no memory"
    began = one.clock.now()
    async with one.running() as washing:
        pause = FIRST_RETRY_SECONDS
        while one.clock.now() < began + 60:
            await one.until_retry(pause)
            pause = min(2 * pause, 5.0)
        await washing
    assert "could not be washed within 60 s: enclave: it has no memory" in one.failures["0"]
    assert one.certificates == {}


async def test_an_enclave_that_dies_before_it_attests(one: Laundry, enclave: FakeEnclave) -> None:
    """Another one is born, with a record that was written after that; the steps before stand."""
    enclave.gates[Op.HELLO] = asyncio.Event()
    async with one.running():
        await one.until_at("certificate")
        while Op.HELLO not in enclave.calls:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        one.clock.advance(5)
        enclave.restart()
        enclave.gates.pop(Op.HELLO).set()
        await one.clock.until_slept_to(one.clock.now() + FIRST_RETRY_SECONDS)
        assert "another key" in (one.wash.washing["0"].reason or "")
        one.clock.advance(FIRST_RETRY_SECONDS)
    certificate = one.certificates["0"]
    assert certificate.attestation is not None
    assert certificate.attestation.epoch == enclave.epoch
    steps = {step.name: step for step in certificate.record.steps}
    assert steps["enclave"].started_ms >= steps["gates"].ended_ms + 5000
    assert len(one.residue.leases) == 1


async def test_an_enclave_that_is_busy(one: Laundry, enclave: FakeEnclave) -> None:
    """It is asked again, for the same record: it was born with that one."""
    enclave.refuses[Op.HELLO] = "BUSY"
    async with one.running():
        await one.clock.until_slept_to(one.clock.now() + FIRST_RETRY_SECONDS)
        enclave.refuses.clear()
        one.clock.advance(FIRST_RETRY_SECONDS)
    assert enclave.restarts == 1
    certificate = one.certificates["0"]
    assert certificate.attestation is not None
    assert certificate.attestation.nonce == certificate.record_hash


async def test_an_enclave_that_lies(one: Laundry, enclave: FakeEnclave) -> None:
    """What it says instead of a document frees nothing: the node judges before it believes."""
    enclave.lies[Op.HELLO] = b"no document"
    await one.run()
    assert one.failures == {"0": "the node has rejected its certificate"}


async def test_the_end_of_the_service(one: Laundry, enclave: FakeEnclave) -> None:
    """A wash that is cancelled leaves the restart, so that the enclave is not kept from its key."""
    enclave.boots.clear()
    async with one.running() as washing:
        await one.until_at("enclave")
        washing.cancel()
    assert enclave._restart is None


async def test_the_journal_is_asked_for_the_last_record(one: Laundry, tmp_path: Path) -> None:
    """In another life too no record is older than the one before it. Until that is known there is none."""
    await one.run()
    row = {"slot_id": "0", "certificate": b64encode(one.certificates["0"].raw).decode()}

    class Rows:
        failing = True

        def certificates(self, slot_id: str, limit: int) -> tuple[object, ...]:
            if self.failing:
                raise JournalFailing("disk I/O error")
            return (row,) if slot_id == "0" else ()

    rows = Rows()
    last = LastMade(rows)  # type: ignore[arg-type]
    with pytest.raises(JournalFailing):
        last.of("0")
    rows.failing = False
    assert last.of("0") == one.certificates["0"].record.made_ms
    assert last.of("1") == 0
    row["certificate"] = "AAAA"
    assert LastMade(rows).of("0") == 0  # type: ignore[arg-type]
    assert one.certificates["0"].record.prev == NO_CERTIFICATE
