"""Washes of an engine: what frees a slot, and what a wash that goes wrong costs."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gpu_server import engine as engine_module
from gpu_server.core import events as ev
from gpu_server.core.rows import Change, Table
from gpu_server.sealed.wash import verify_certificate
from gpu_server.wash_steps import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS
from tests.app.world import World, engine_life, engine_world, machine_world, slot_specs
from tests.fakes.enclave import FakeEnclave
from tests.fakes.journal import MemoryJournal

BROKEN = "disk I/O error"


class SlowDisk(MemoryJournal):
    """A journal whose disk can be broken, or held."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def write(self, changes: Iterable[Change]) -> None:
        changes = list(changes)
        self.events += ["certificate" for change in changes if change.table is Table.CERTIFICATES]
        self.events += [
            str(change.row["state"]) for change in changes if change.table is Table.SLOTS and change.row
        ]
        super().write(changes)

    def secure(self) -> None:
        super().secure()
        self.events.append("secured")


async def test_a_slot_is_free_when_its_certificate_is_on_the_disk(tmp_path: Path) -> None:
    """It is written with the decision that accepts it, forced to the disk, and then the slot is free."""
    journal = SlowDisk()
    async with engine_world(tmp_path, journal=journal, slots=slot_specs(1)) as world:
        assert journal.events == ["washing", "certificate", "washing", "secured", "free"]
        slot = world.engine.node.slots["0"]
        row = journal.certificate(slot.head.hex())
        assert row is not None
        assert row["hash"] == slot.prev.hex()
        counts = world.engine.counts
        assert (counts.washes_passed, counts.washes_failed) == (1, {})
        assert {step: found.total for step, found in counts.wash_seconds.items()} == dict.fromkeys(
            ("teardown", "residue", "gates", "certificate", "disk", "total"), 1
        )
        assert world.engine.washing == {}


async def test_a_disk_that_fails(tmp_path: Path) -> None:
    """The slot stays as it is, for as long as that takes, and says why."""
    journal = SlowDisk()
    async with engine_world(tmp_path, journal=journal) as world:
        _, session_id = world.submit(oneoff=True)
        await world.until(lambda: world.session(session_id).state == "draining")
        journal.refuse = BROKEN
        pause = FIRST_RETRY_SECONDS
        for _ in range(20):
            await world.clock.until_slept_to(world.clock.now() + pause)
            assert world.engine.node.slots["0"].state == "washing"
            assert world.engine.washing["0"].reason == f"disk: {BROKEN}"
            world.clock.advance(pause)
            pause = min(2 * pause, LAST_RETRY_SECONDS)
        await world.clock.until_slept_to(world.clock.now() + pause)
        journal.refuse = None
        world.engine.save()
        world.clock.advance(pause)
        await world.free()
        assert world.session(session_id).washed_after == (world.engine.node.slots["0"].head.hex(),)


async def test_many_at_once(tmp_path: Path) -> None:
    """Certificates that come together go to the disk together, and free their slots in their order."""
    journal = SlowDisk()
    async with engine_world(tmp_path, journal=journal, slots=slot_specs(8)) as world:
        assert journal.events.count("certificate") == 8
        assert journal.secured <= 2
        freed = [event.slot_id for event in world.told(ev.CertificateSecured)]
        assert freed == [str(number) for number in range(8)]


@pytest.mark.parametrize("certificate", [b"", b"no certificate", None])
async def test_what_is_no_certificate(tmp_path: Path, certificate: bytes | None) -> None:
    """Anything but the certificate of the wash that was ordered frees nothing, and breaks nothing: no old one
    either."""
    async with engine_world(tmp_path) as world:
        (row,) = world.journal.certificates("0", 1)
        old = b64decode(row["certificate"])
        _, session_id = world.submit()
        await world.ready(session_id)
        world.runtime.gates["remove"] = gate = asyncio.Event()
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        world.engine.report(ev.CertificateIssued(certificate=old if certificate is None else certificate))
        slot = world.engine.node.slots["0"]
        world.engine.report(ev.CertificateSecured(slot_id="0", certificate_hash=slot.prev))
        assert (slot.state, slot.pending, world.broke) == ("washing", None, [])
        gate.set()
        await world.free()


async def test_a_slot_whose_health_goes_bad(tmp_path: Path) -> None:
    """It is locked away when its wash has ended, and no wash has passed."""
    async with engine_world(tmp_path) as world:
        _, session_id = world.submit()
        await world.ready(session_id)
        world.engine.report(ev.SlotChecked(slot_id="0", fault="row remap pending"))
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        await world.washes()
        assert world.engine.node.slots["0"].state == "quarantined"
        assert world.engine.counts.washes_passed == 1
        assert world.engine.washing == {}


async def test_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wash that crashes outside its steps has proven nothing: its slots are locked away, others serve."""
    async with engine_world(tmp_path, slots=slot_specs(2)) as world:
        _, session_id = world.submit()
        await world.ready(session_id)

        async def crash(*_: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(world.engine.wash, "_run", crash)
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        await world.washes()
        slots = world.engine.node.slots
        assert [slot.state for slot in slots] == ["quarantined", "free"]
        assert slots["0"].fault == "the wash crashed: ZeroDivisionError"
        assert (world.broke, world.engine.washing, world.engine.attendants) == ([], {}, {})
        assert world.engine.counts.washes_failed == {"crash": 1}
        monkeypatch.undo()
        world.engine.decide(ev.SlotWashOrdered(slot_id="0"))
        await world.free()


async def test_what_a_wash_cleans_is_its_own(tmp_path: Path) -> None:
    """A session that is closed, and whose folder is being removed by its wash, is left alone by who looks for
    residue meanwhile."""
    async with engine_world(tmp_path) as world:
        _, session_id = world.submit()
        await world.ready(session_id)
        name = world.container(session_id)
        gate = world.runtime.gates["list_workers"] = asyncio.Event()
        world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        await world.until(lambda: world.session(session_id).ended)
        assert (world.engine.served_by(session_id), world.engine.attendants) == (name, {})
        assert world.folders.names() == (session_id,)
        gate.set()
        await world.washes()
        assert world.engine.served_by(session_id) is None
        assert world.folders.names() == ()


async def test_old_certificates_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each slot so many are kept as there should be, once there are many more; the newest stay."""
    monkeypatch.setattr(engine_module, "PRUNE_EVERY", 3)
    async with engine_world(tmp_path) as world:
        engine = world.engine
        engine._certificates_kept, engine._since_pruned = 2, 0
        for count in (2, 3, 4):
            await wash_once(world)
            await engine.tend_storage()
            assert len(world.journal.certificates("0", 10)) == (2 if count == 4 else count)
        assert world.journal.certificate(engine.node.slots["0"].head.hex()) is not None
        await wash_once(world)
        assert len(world.journal.certificates("0", 10)) == 3


async def wash_once(world: World) -> None:
    """A lease of the only slot, to its end."""
    number = len(world.engine.node.sessions)
    session_id = world.request(f"s_once{number}")
    world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
    await world.washes()


async def test_with_an_enclave(tmp_path: Path) -> None:
    """Each slot's certificate has a document; slots that are washed together share one restart, also with a
    lease that ends at the same time."""
    enclave = FakeEnclave()
    async with engine_world(tmp_path, slots=slot_specs(3), enclave=enclave) as world:
        assert enclave.restarts == 1
        for session_id in ("s_1", "s_2"):
            world.request(session_id)
            await world.ready(session_id)
        for session_id in ("s_1", "s_2"):
            world.engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
        await world.washes()
        assert enclave.restarts == 2
        rows = [world.journal.certificates(slot.spec.id, 1)[0] for slot in world.engine.node.slots]
        for row in rows:
            raw = b64decode(row["certificate"])
            found = verify_certificate(
                raw, node_key=world.seal.public_key, enclave="required", allow_simulated=True
            )
            assert found.attestation is not None


async def test_a_service_that_ends_meanwhile(tmp_path: Path) -> None:
    """The next life washes from the beginning, for a certificate at the same place of the chain."""
    async with machine_world(tmp_path) as world:
        async with engine_life(world):
            await world.free()
            first = world.engine.node.slots["0"].prev
            world.request("s_1")
            await world.ready("s_1")
            world.runtime.gates["remove"] = asyncio.Event()
            world.engine.decide(ev.SessionKillRequested(session_id="s_1", tenant="a"))
        async with engine_life(world):
            assert world.engine.node.slots["0"].state == "washing"
            await world.free()
            (row,) = world.journal.certificates("0", 1)
            assert row["prev"] == first.hex()
            assert world.session("s_1").washed_after == (world.engine.node.slots["0"].head.hex(),)


async def test_a_service_that_ends_when_the_session_has_closed(tmp_path: Path) -> None:
    """The next life's wash is still that of the lease: its certificate has the lease's mark and fence, and
    the session names it."""
    enclave = FakeEnclave()
    async with machine_world(tmp_path, enclave=enclave) as world:
        async with engine_life(world):
            await world.free()
            world.request("s_1")
            await world.ready("s_1")
            enclave.boots.clear()
            world.engine.decide(ev.SessionKillRequested(session_id="s_1", tenant="a"))
            await world.until(lambda: world.session("s_1").ended)
        assert world.session("s_1").washed_after == ()
        enclave.boots.set()
        async with engine_life(world):
            await world.free()
            (row,) = world.journal.certificates("0", 1)
            assert world.session("s_1").washed_after == (world.engine.node.slots["0"].head.hex(),)
            found = verify_certificate(
                b64decode(row["certificate"]), node_key=world.seal.public_key, allow_simulated=True
            )
            assert found.record.fence == world.session("s_1").fence
            assert found.record.lease == world.seal.lease_mark("a", "s_1")
