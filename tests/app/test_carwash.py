"""The car wash: no certificate without proof, and each slot for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_server.core import events as ev
from gpu_server.core.effects import WashSlots
from gpu_server.core.slots import NO_CERTIFICATE, SlotSpec, WashTier
from gpu_server.ports import Belongings, Dirty, EndedLease, RuntimeUnreachable, WashUnreachable
from gpu_server.sealed.wash import Figures, hash_of
from gpu_server.wash_steps import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS
from tests.app.laundry import GPUS, Laundry
from tests.app.world import slot_specs
from tests.fakes.runtime import FakeRuntime
from tests.worker_specs import TEST_UID


@pytest.fixture
def laundry(tmp_path: Path) -> Laundry:
    return Laundry(tmp_path)


@pytest.fixture
def one(tmp_path: Path) -> Laundry:
    """With one slot, where a test moves the clock from step to step."""
    return Laundry(tmp_path, GPUS[:1])


async def test_certificates(laundry: Laundry) -> None:
    """A wash takes down container and folder, then certifies each slot: device, fence, chain, and the lease
    by a mark that names nobody."""
    await laundry.worker(fence=7)
    await laundry.run(laundry.order(fence=7))
    assert (laundry.machine.containers, laundry.folders.names()) == ({}, ())
    assert laundry.story == ["ContainerGone", "CertificateIssued", "CertificateIssued"]
    for spec in GPUS:
        record = laundry.certificates[spec.id].record
        assert (record.slot_uuid, record.fence, record.prev) == (spec.uuid, 7, NO_CERTIFICATE)
        assert (record.tier, record.lease) == ("full", laundry.seal.lease_mark("a", "s_1"))
        assert laundry.results(spec.id) == {
            "teardown": "passed",
            "residue": "passed",
            "scrub": "passed",
            "enclave": "not_applicable",
            "gates": "passed",
        }
        figures = {step.name: dict(step.figures) for step in record.steps}
        assert figures["teardown"] == {"containers": 1}
        assert figures["residue"] == {"workers": 0, "volumes": 0, "run_folder": 1}
        assert figures["scrub"]["uuid"] == spec.uuid
        assert figures["gates"]["processes"] == 0
    assert sorted(laundry.scrubber.scrubbed) == [(spec.uuid, 7) for spec in GPUS]
    assert laundry.counts.washes_failed == {}


async def test_the_order(laundry: Laundry) -> None:
    """The container is gone, and that is told, before its folder is touched or its GPU is scrubbed."""
    await laundry.worker()
    laundry.residue.hold = laundry.scrubber.hold = asyncio.Event()
    async with laundry.running():
        await laundry.until_at("residue", "scrub")
        while laundry.scrubber.running < 2:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        assert laundry.story == ["ContainerGone"]
        assert (laundry.machine.containers, laundry.folders.names()) == ({}, ("s_1",))
        assert laundry.wash.ends("s_1") == "gpu-server-s_1-1"
        laundry.residue.hold.set()
    assert [method for method, _ in laundry.runtime.calls].count("foreign_gpu_holders") == 4
    assert laundry.wash.ends("s_1") is None
    assert len(laundry.certificates) == 2


async def test_belongings_are_asked_for_before_the_removal(laundry: Laundry) -> None:
    """What a worker had outside its container is known to those who clean, also where its removal had to be
    tried again."""
    name = await laundry.worker()
    laundry.machine.volumes[f"fake-{name}"] = {"v1"}
    laundry.runtime.wrong["remove"] = RuntimeUnreachable("no answer")
    async with laundry.running():
        await laundry.clock.until_slept_to(laundry.clock.now() + FIRST_RETRY_SECONDS)
        del laundry.machine.containers[name], laundry.runtime.wrong["remove"]
        laundry.clock.advance(FIRST_RETRY_SECONDS)
    assert laundry.residue.leases[0].belongings == Belongings(container_id=f"fake-{name}", volumes=("v1",))
    assert dict(laundry.certificates["0"].record.steps[1].figures)["volumes"] == 1


async def test_a_chain(laundry: Laundry) -> None:
    """Each certificate names the one before it, of its own slot, and is not older: whatever becomes of the
    wall clock, also in another life of the service."""
    await laundry.run()
    first = laundry.certificates
    laundry.free()
    laundry.wall -= 86_400
    await laundry.run(laundry.order("s_2", 2))
    second = laundry.certificates
    assert [second[s.id].record.prev for s in GPUS] == [first[s.id].hash for s in GPUS]
    assert [second[s.id].record.made_ms for s in GPUS] == [first[s.id].record.made_ms for s in GPUS]
    steps = second["0"].record.steps
    assert all(step.ended_ms < first["0"].record.made_ms - 80_000_000 for step in steps)


async def test_only_this_lease_is_taken_down(laundry: Laundry) -> None:
    """A wash removes the container of its own fence and no other session's."""
    other = await laundry.worker("s_2")
    laundry.serving["s_2"] = other
    await laundry.run()
    assert laundry.story[0] == "ContainerGone"
    assert list(laundry.machine.containers) == [other]
    assert laundry.folders.names() == ("s_2",)


async def test_a_light_wash(laundry: Laundry) -> None:
    """It leaves out the scrub, and nothing else; its certificate says so."""
    await laundry.run(laundry.order(tier=WashTier.LIGHT))
    assert laundry.scrubber.scrubbed == []
    assert laundry.certificates["0"].record.tier == "light"
    assert laundry.results()["scrub"] == "skipped"
    assert [what for what, _ in laundry.gates.asked] == ["check", "check"]


async def test_stand_ins(tmp_path: Path) -> None:
    """Slots without a GPU have no scrub and no gates, whoever holds GPUs; but the host is looked at twice."""
    laundry = Laundry(tmp_path, slot_specs(1))
    laundry.machine.holders["all"] = "somebody"
    await laundry.run()
    assert (laundry.results()["scrub"], laundry.results()["gates"]) == ("not_applicable",) * 2
    assert "foreign_gpu_holders" not in {method for method, _ in laundry.runtime.calls}
    assert laundry.residue.looks == 1


async def test_a_wash_without_a_lease(laundry: Laundry) -> None:
    """Nothing is torn down, nobody's lease is named, and nobody is told of a container."""
    await laundry.run(laundry.order(None, 9))
    assert laundry.story == ["CertificateIssued"] * 2
    assert laundry.results()["teardown"] == "not_applicable"
    assert laundry.certificates["0"].record.lease == b""
    (lease,) = laundry.residue.leases
    assert (lease.session_id, lease.slot_ids) == (None, ("0", "1"))


# -- trouble ----------------------------------------------------------------------------------------------


def unreachable(laundry: Laundry) -> None:
    laundry.runtime.unreachable = True


def folder_stuck(laundry: Laundry) -> None:
    laundry.residue.failure = OSError(16, "Device or resource busy")


def holders_unknown(laundry: Laundry) -> None:
    laundry.runtime.wrong["foreign_gpu_holders"] = RuntimeUnreachable("no answer")


def no_scrub(laundry: Laundry) -> None:
    laundry.scrubber.failure = WashUnreachable("there is no image")


def no_look(laundry: Laundry) -> None:
    laundry.residue.again = WashUnreachable("no answer")


def no_gates(laundry: Laundry) -> None:
    laundry.gates.failure = WashUnreachable("NVML does not answer")


def nothing_for_gpus(laundry: Laundry) -> None:
    laundry.wash = laundry.car_wash(has_gpu_drivers=False)
    laundry.wash.swept = True


TROUBLE = [
    (unreachable, "teardown"),
    (folder_stuck, "residue"),
    (holders_unknown, "scrub"),
    (no_scrub, "scrub"),
    (nothing_for_gpus, "scrub"),
    (no_look, "gates"),
    (no_gates, "gates"),
]


@pytest.mark.parametrize(("trouble", "step"), TROUBLE)
async def test_giving_up(one: Laundry, trouble: Callable[[Laundry], None], step: str) -> None:
    """What cannot be reached is tried again with growing pauses, and only then locked away: no certificate
    without proof. Meanwhile it says which step it is, and why."""
    await one.worker()
    trouble(one)
    began, pauses = one.clock.now(), []
    async with one.running() as washing:
        pause = FIRST_RETRY_SECONDS
        while one.clock.now() < began + 60:
            await one.clock.until_slept_to(one.clock.now() + pause)
            assert one.failures == {}
            assert step in one.wash.washing["0"].steps
            assert (one.wash.washing["0"].reason or "").startswith(f"{step}: ")
            assert one.wash.washing["0"].since == began
            one.clock.advance(pause)
            pauses.append(pause)
            pause = min(2 * pause, LAST_RETRY_SECONDS)
        await washing
    assert max(pauses) == LAST_RETRY_SECONDS
    assert one.failures.keys() == {"0"}
    assert f"could not be washed within 60 s: {step}: " in one.failures["0"]
    assert one.story.count("ContainerGone") == (trouble is not unreachable)
    assert one.certificates == {}
    assert one.counts.washes_failed == {step: 1}
    assert one.wash.washing == {}


@pytest.mark.parametrize("trouble", [trouble for trouble, _ in TROUBLE if trouble is not nothing_for_gpus])
async def test_trouble_that_passes(one: Laundry, trouble: Callable[[Laundry], None]) -> None:
    """A wash goes on where it was, does nothing twice that has passed, and tells of the container once."""
    await one.worker()
    trouble(one)
    async with one.running():
        for pause in (0.1, 0.2, 0.4):
            await one.until_retry(pause)
        await one.clock.until_slept_to(one.clock.now() + 0.8)
        one.runtime.unreachable = False
        one.runtime.wrong.clear()
        one.residue.failure = one.residue.again = None
        one.scrubber.failure = one.gates.failure = None
        one.clock.advance(0.8)
    assert one.story == ["ContainerGone", "CertificateIssued"]
    assert [method for method, _ in one.runtime.calls].count("remove") == 1
    assert len(one.scrubber.scrubbed) == (5 if trouble is no_scrub else 1)


@pytest.mark.parametrize("slow", ["remove", "residue", "scrub", "foreign_gpu_holders"])
async def test_a_step_that_hangs(one: Laundry, slow: str) -> None:
    """Every attempt has its time. One that takes longer is cancelled, and the step tried again."""
    await one.worker()
    hold = asyncio.Event()
    if slow == "residue":
        one.residue.hold = hold
    elif slow == "scrub":
        one.scrubber.hold = hold
    else:
        one.runtime.gates[slow] = hold
    limit = {"remove": 70.0, "scrub": 120.0, "foreign_gpu_holders": 120.0}.get(slow, 60.0)
    one.give_up = 300.0
    one.wash = one.car_wash()
    one.wash.swept = True
    async with one.running():
        await one.clock.until_slept_to(one.clock.now() + limit)
        await one.until_at({"remove": "teardown", "residue": "residue"}.get(slow, "scrub"))
        one.clock.advance(limit)
        await one.clock.until_slept_to(one.clock.now() + FIRST_RETRY_SECONDS)
        assert one.scrubber.running == 0
        assert f"not done within {limit:g} s" in (one.wash.washing["0"].reason or "")
        hold.set()
        one.clock.advance(FIRST_RETRY_SECONDS)
    assert len(one.certificates) == 1
    assert one.clock.slept_to == ()


def crash_in_scrub(laundry: Laundry) -> None:
    laundry.scrubber.failure = ZeroDivisionError("a bug")


def crash_in_gates(laundry: Laundry) -> None:
    laundry.gates.failure = KeyError("a bug")


def dirty_residue(laundry: Laundry) -> None:
    laundry.residue.failure = Dirty("run_folder: 1 still there after removing them")


def dirty_again(laundry: Laundry) -> None:
    laundry.residue.again = Dirty("dev_shm: 1 found on the second look")


def dirty_gpu(laundry: Laundry) -> None:
    laundry.scrubber.failure = Dirty("3 words were mismatched")


def gpu_in_use(laundry: Laundry) -> None:
    laundry.gates.refusal = Dirty("2 processes use the GPU")


def bad_gpu(laundry: Laundry) -> None:
    laundry.gates.failure = Dirty("the GPU is lost")


def crash_in_teardown(laundry: Laundry) -> None:
    laundry.runtime.wrong["remove"] = ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("finding", "step", "words"),
    [
        (dirty_residue, "residue", "still there"),
        (dirty_again, "gates", "second look"),
        (dirty_gpu, "scrub", "mismatched"),
        (gpu_in_use, "scrub", "processes use the GPU"),
        (bad_gpu, "gates", "is lost"),
        (crash_in_scrub, "scrub", "the wash crashed: scrub: ZeroDivisionError"),
        (crash_in_gates, "gates", "the wash crashed: gates: KeyError"),
        (crash_in_teardown, "teardown", "the wash crashed: teardown"),
    ],
)
async def test_a_finding(laundry: Laundry, finding: Callable[[Laundry], None], step: str, words: str) -> None:
    """What is found wrong is not tried again: the slots are locked away with the reason."""
    finding(laundry)
    await laundry.run()
    assert laundry.failures.keys() == {"0", "1"}
    assert all(words in reason for reason in laundry.failures.values())
    assert laundry.certificates == {}
    assert laundry.counts.washes_failed == {step: 2}
    assert laundry.clock.now() == 1000.0


async def test_a_foreign_holder(laundry: Laundry) -> None:
    """A container that is not ours quarantines the slot whose GPU it has, and no other; it is left alone, and
    its GPU is not written to."""
    laundry.machine.holders[GPUS[1].uuid] = "somebody/notebook (abc123)"
    await laundry.run()
    assert laundry.failures.keys() == {"1"}
    assert "somebody/notebook" in laundry.failures["1"]
    assert laundry.certificates.keys() == {"0"}
    assert laundry.scrubber.scrubbed == [(GPUS[0].uuid, 1)]


async def test_a_slot_that_fails_first(laundry: Laundry) -> None:
    """It does not end what is done for the others too."""
    laundry.machine.holders[GPUS[1].uuid] = "somebody"
    laundry.residue.hold = asyncio.Event()
    async with laundry.running():
        while not laundry.failures:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        await laundry.until_at("residue")
        laundry.residue.hold.set()
    assert laundry.failures.keys() == {"1"}
    assert laundry.certificates.keys() == {"0"}


async def test_a_foreign_holder_of_all(laundry: Laundry) -> None:
    """A foreign container that was given every GPU quarantines every slot."""
    laundry.machine.holders["all"] = "somebody"
    await laundry.run()
    assert laundry.failures.keys() == {"0", "1"}


async def test_a_slot_that_is_done_before_the_others(
    laundry: Laundry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be leased again by then, and a new worker have its uid: what that one has is not the residue of
    the slots that are washed still."""
    monkeypatch.setattr(
        "gpu_server.carwash.workers_uids", lambda base, numbers: tuple(base + n for n in numbers)
    )
    looked: list[tuple[int, ...]] = []
    second_look = laundry.residue.second_look

    async def look(lease: EndedLease) -> None:
        looked.append(lease.uids)
        await second_look(lease)

    check = laundry.gates.check

    async def refuse_once(spec: SlotSpec) -> Figures:
        if spec == GPUS[1] and len(looked) == 2:
            raise WashUnreachable("no answer")
        return await check(spec)

    monkeypatch.setattr(laundry.residue, "second_look", look)
    monkeypatch.setattr(laundry.gates, "check", refuse_once)
    async with laundry.running():
        await laundry.clock.until_slept_to(laundry.clock.now() + FIRST_RETRY_SECONDS)
        first = laundry.slots["0"]
        while first.pending is None:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        laundry.slots.secure("0", first.pending)
        laundry.slots.lease(["0"], "s_2", 2, "b")
        laundry.clock.advance(FIRST_RETRY_SECONDS)
    assert looked == [(20_000, 20_001), (20_000, 20_001), (20_001,)]
    assert laundry.certificates.keys() == {"0", "1"}


async def test_a_certificate_that_is_rejected(laundry: Laundry) -> None:
    """A slot whose certificate the node does not accept is locked away: nobody else would end its wash."""
    order = laundry.order()
    laundry.slots["1"].prev = bytes(31) + b"1"
    await laundry.run(order)
    assert laundry.failures == {"1": "the node has rejected its certificate"}
    assert [rejected.slot_id for rejected in laundry.rejected] == ["1"]
    assert laundry.slots["0"].pending == laundry.certificates["0"].hash


async def test_the_end_of_the_service(laundry: Laundry) -> None:
    """A wash that is cancelled runs nothing any more, and nothing was certified."""
    laundry.scrubber.hold = asyncio.Event()
    async with laundry.running() as washing:
        while laundry.scrubber.running < 2:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        washing.cancel()
    assert laundry.scrubber.running == 0
    assert laundry.story == ["ContainerGone"]
    assert laundry.clock.slept_to == ()


async def test_a_session_without_slots(laundry: Laundry) -> None:
    """One whose devices are gone is taken down too, with what it left."""
    await laundry.worker()
    order = WashSlots(
        session_id="s_1", fence=1, slot_ids=(), grace=0.0, tier=WashTier.FULL, prevs=(), tenant="a"
    )
    await laundry.run(order)
    assert laundry.story == ["ContainerGone"]
    assert (laundry.machine.containers, laundry.folders.names()) == ({}, ())


# -- the first wash of a life -----------------------------------------------------------------------------


@pytest.mark.parametrize("session_id", [None, "s_1"])
async def test_no_slot_is_free_before_residue_is_gone(laundry: Laundry, session_id: str | None) -> None:
    """What an earlier life left may be on any slot, workers, folders and scrubs: the first wash of a life
    removes it first, whatever it was ordered for. Live sessions and other instances are left alone."""
    laundry.wash.swept = False
    await laundry.worker("s_old", 3)
    laundry.folders.create("s_older", TEST_UID, None)
    live = laundry.serving["s_live"] = await laundry.worker("s_live", 4)
    theirs = FakeRuntime(laundry.machine, instance="other")
    other = await laundry.worker("s_theirs", runtime=theirs)
    laundry.folders.remove("s_theirs")
    laundry.scrubber.leftovers = 1
    laundry.scrubber.hold = asyncio.Event()
    async with laundry.running(laundry.order(session_id)):
        while laundry.scrubber.running < 2:  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)
        assert set(laundry.machine.containers) == {live, other}
        assert set(laundry.folders.names()) == {"s_live"}
        assert laundry.scrubber.leftovers == 0
        laundry.scrubber.hold.set()
    figures = laundry.certificates["0"].record.steps[0].figures
    assert figures["swept"] == 4
    assert laundry.wash.swept


async def test_what_cannot_be_swept(laundry: Laundry) -> None:
    """Nothing is certified while something of a former life is left, or may be."""
    laundry.wash.swept = False
    await laundry.worker("s_old")
    laundry.runtime.wrong["remove"] = RuntimeUnreachable("no answer")
    async with laundry.running(laundry.order(None)):
        await laundry.until_retry(FIRST_RETRY_SECONDS)
        await laundry.clock.until_slept_to(laundry.clock.now() + 0.2)
        assert (laundry.events, laundry.wash.swept) == ([], False)
        laundry.runtime.wrong.clear()
        laundry.clock.advance(0.2)
    assert laundry.story == ["CertificateIssued"] * 2


async def test_two_first_washes(laundry: Laundry) -> None:
    """Washes that begin together sweep once: a scrub that one of them has begun is no leftover."""
    laundry.wash.swept = False
    slots = [laundry.slots[spec.id] for spec in GPUS]
    whole = laundry.order(None)
    orders = [
        WashSlots(
            session_id=None,
            fence=whole.fence,
            slot_ids=(slot.spec.id,),
            grace=0.0,
            tier=whole.tier,
            prevs=(slot.prev,),
            tenant=None,
        )
        for slot in slots
    ]
    laundry.residue.hold = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for order, slot in zip(orders, slots, strict=True):
            group.create_task(laundry.wash.run(order, [slot], laundry.tell))
        await laundry.until_at("teardown")
        laundry.residue.hold.set()
    assert [lease.slot_ids for lease in laundry.residue.leases].count(()) == 1
    assert len(laundry.certificates) == 2


async def test_a_former_container_of_a_session_that_has_another(laundry: Laundry) -> None:
    """Only the container that serves a session now is its own: one of an earlier lease is residue. The folder
    is the session's, whichever container uses it."""
    old, now = await laundry.worker(fence=3), await laundry.worker(fence=4)
    laundry.serving["s_1"] = now
    assert set(laundry.machine.containers) == {old, now}
    assert await laundry.wash.remove_residue() == 1
    assert set(laundry.machine.containers) == {now}
    assert laundry.folders.names() == ("s_1",)


async def test_count_of_residue(laundry: Laundry) -> None:
    """`remove_residue` says how much it removed, and nothing the second time."""
    await laundry.worker()
    assert await laundry.wash.remove_residue() == 2
    assert await laundry.wash.remove_residue() == 0


async def test_certificates_are_not_alike(laundry: Laundry) -> None:
    """Two slots that were washed together have two records."""
    await laundry.run()
    assert len({found.record_hash for found in laundry.certificates.values()}) == 2
    raw = next(event.certificate for event in laundry.events if isinstance(event, ev.CertificateIssued))
    assert hash_of(raw) in {slot.pending for slot in laundry.slots}
