"""Washes that renew the enclave: what they share, what they wait for, and what may go wrong in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from gpu_server.drivers.enclave_link import EnclaveLink
from gpu_server.enclave import CHECK_SECONDS, EnclaveSupervisor
from gpu_server.enclave_renewal import HOLD_SECONDS, LINGER_SECONDS, OPEN_SECONDS, newest, too_many
from gpu_server.ports import EnclaveDown, EnclaveRefused, Renewal, RuntimeUnreachable
from gpu_server.sealed.attestation import verify
from gpu_server.sealed.frames import MAX_SLOTS, Code, Op
from tests.app.enclave_world import NONCE, PATIENCE, healthy, running, supervisor, until
from tests.fakes.clock import FakeClock
from tests.fakes.enclave_host import PCRS, FakeEnclaveHost

OLD = {f"gpu{number}": bytes([0xA0 + number]) * 32 for number in range(4)}
"""The newest record of each slot before any wash here."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeEnclaveHost]:
    made = FakeEnclaveHost(tmp_path / "s")
    yield made
    made.unreachable = None
    made.close_for_good()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def enclave(host: FakeEnclaveHost, clock: FakeClock) -> EnclaveSupervisor:
    return supervisor(host, clock, records=lambda: OLD)


def record(number: int, of: int = 0) -> bytes:
    """The hash of a new record of slot `number`."""
    return bytes([0x10 * of + number + 1]) * 32


def listed(document: bytes, nonce: bytes) -> tuple[bytes, ...]:
    """The records in a document, after it was verified."""
    return verify(document, nonce=nonce, pcrs=PCRS, allow_simulated=True).slots


async def booted(enclave: EnclaveSupervisor, *numbers: int) -> list[Renewal]:
    """One wash for each of these slots, all in one restart, whose enclave has booted."""
    washes = [enclave.renew((f"gpu{number}",)) for number in numbers]
    async with asyncio.timeout(PATIENCE):
        for wash in washes:
            await wash.booted()
    return washes


async def attested(wash: Renewal, number: int) -> bytes:
    """The document of slot `number`; the wash is over then, whatever comes of it."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await wash.attest(f"gpu{number}", record(number))
    finally:
        wash.leave()


async def handed_in(enclave: EnclaveSupervisor, done: int, of: int) -> None:
    """Wait until so many washes have handed in their records."""
    await until(lambda: f"{done} of {of} washes have their records" in (enclave.health.reason or ""))


async def a_round(clock: FakeClock) -> None:
    """Let the supervisor look once more, with nothing else that wakes it."""
    await a_look(clock)
    await clock.until_slept_to(clock.now() + CHECK_SECONDS)


async def a_look(clock: FakeClock) -> None:
    """Let the supervisor look once more, whatever it finds."""
    await clock.until_slept_to(clock.now() + CHECK_SECONDS)
    clock.advance(CHECK_SECONDS)


# -- what they share --------------------------------------------------------------------------------------


async def test_washes_share_a_restart(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """One that was there before, one that comes while the old one ends, one that comes when the next has
    booted: one boot, one key, and all records in each document, beside those of slots that are not washed."""
    async with running(enclave):
        await healthy(enclave)
        host.stopping = asyncio.Event()
        first = enclave.renew(("gpu0",))
        await until(lambda: host.stops == 2)
        second = enclave.renew(("gpu1",))
        host.stopping.set()
        await first.booted()
        assert await second.booted() == {"boot_ms": 0, "old": "terminated", "version": "gpu-server/1"}
        third = enclave.renew(("gpu2",))
        await third.booted()
        documents = await asyncio.gather(attested(first, 0), attested(second, 1), attested(third, 2))
        for number, document in enumerate(documents):
            wanted = (record(0), record(1), record(2), OLD["gpu3"])
            assert listed(document, record(number)) == wanted
        assert (host.starts, enclave.restarts) == (2, 1)
        assert host.asked.count(Op.INIT) == 2
        assert await enclave.attest(NONCE)


async def test_a_wash_of_several_slots(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """It is one wash, which has handed in when all its slots have."""
    async with running(enclave):
        await healthy(enclave)
        wash = enclave.renew(("gpu0", "gpu1"))
        await wash.booted()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(wash.attest("gpu0", record(0)))
            await handed_in(enclave, 0, 1)
            second = group.create_task(wash.attest("gpu1", record(1)))
        wanted = (record(0), record(1), OLD["gpu2"], OLD["gpu3"])
        assert listed(first.result(), record(0)) == listed(second.result(), record(1)) == wanted
        wash.leave()


async def test_a_start_is_as_good_as_a_restart(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """The first start of all serves the washes that are there: an enclave without a key is a fresh one."""
    wash = enclave.renew(("gpu0",))
    async with running(enclave):
        assert (await wash.booted())["old"] == "none"
        document = await attested(wash, 0)
        assert record(0) in listed(document, record(0))
        assert (host.starts, enclave.restarts) == (1, 0)


async def test_one_that_was_adopted(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """An enclave that an earlier life left is ended for a wash like any other."""
    host.replace()
    before = EnclaveLink(host.path)
    old = await before.init(())
    before.close()
    async with running(enclave):
        assert await healthy(enclave) == old
        (wash,) = await booted(enclave, 0)
        await attested(wash, 0)
        assert await healthy(enclave) != old
        assert (host.starts, enclave.restarts) == (1, 1)


async def test_one_that_comes_after_the_key(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock
) -> None:
    """Once INIT has begun a wash gets another restart, which waits until those before have documents."""
    async with running(enclave):
        await healthy(enclave)
        (first,) = await booted(enclave, 0)
        host.held = {op: threading.Event() for op in (Op.INIT, Op.HELLO)}
        async with asyncio.TaskGroup() as group:
            early = group.create_task(attested(first, 0))
            await until(lambda: host.asked.count(Op.INIT) == 2)
            second = enclave.renew(("gpu1",))
            host.held[Op.INIT].set()
            await until(lambda: Op.HELLO in host.asked)
            await a_round(clock)
            assert enclave.health.healthy, "it is not taken away from the first"
            host.held[Op.HELLO].set()
            await second.booted()
        assert listed(early.result(), record(0)) == (record(0), *list(OLD.values())[1:])
        late = await attested(second, 1)
        assert listed(late, record(1)) == (OLD["gpu0"], record(1), OLD["gpu2"], OLD["gpu3"])
        assert (host.starts, enclave.restarts) == (3, 2)


async def test_documents_are_not_waited_for_long(
    host: FakeEnclaveHost, clock: FakeClock, tmp_path: Path
) -> None:
    """A wash that never gets its document holds up the next restart for LINGER seconds."""
    enclave = supervisor(host, clock, timeout=PATIENCE)
    async with running(enclave):
        await healthy(enclave)
        (first,) = await booted(enclave, 0)
        host.held = {Op.HELLO: threading.Event()}
        async with asyncio.TaskGroup() as group:
            stuck = group.create_task(_outcome(attested(first, 0)))
            await until(lambda: Op.HELLO in host.asked)
            second = enclave.renew(("gpu1",))
            for _ in range(int(LINGER_SECONDS / CHECK_SECONDS) - 1):
                await a_round(clock)
            assert host.starts == 2
            clock.advance(CHECK_SECONDS)
            await second.booted()
            assert host.starts == 3
        assert isinstance(stuck.result(), EnclaveDown)
        second.leave()


async def test_openings_are_not_starved(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock
) -> None:
    """Washes that follow each other leave time for openings that the last restart had to refuse, OPEN seconds
    of it; where it refused none, the next begins at once."""
    async with running(enclave):
        await healthy(enclave)
        (first,) = await booted(enclave, 0)
        with pytest.raises(EnclaveDown, match="restarted by a wash"):
            await enclave.attest(NONCE)
        host.held = {Op.INIT: threading.Event()}
        async with asyncio.TaskGroup() as group:
            group.create_task(attested(first, 0))
            await until(lambda: host.asked.count(Op.INIT) == 2)
            second = enclave.renew(("gpu1",))
            host.held[Op.INIT].set()
        for _ in range(int(OPEN_SECONDS / CHECK_SECONDS) - 1):
            await a_round(clock)
            assert await enclave.attest(NONCE)
        assert host.starts == 2
        clock.advance(CHECK_SECONDS)
        await second.booted()
        host.held = {Op.INIT: threading.Event()}
        async with asyncio.TaskGroup() as group:
            group.create_task(attested(second, 1))
            await until(lambda: host.asked.count(Op.INIT) == 3)
            third = enclave.renew(("gpu2",))
            host.held[Op.INIT].set()
        await third.booted()
        assert host.starts == 4
        third.leave()


# -- who holds up whom ------------------------------------------------------------------------------------


async def test_one_that_leaves(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """A wash that is over is not waited for, and what it handed in is not listed."""
    async with running(enclave):
        await healthy(enclave)
        first, second, third = await booted(enclave, 0, 1, 2)
        async with asyncio.TaskGroup() as group:
            document = group.create_task(attested(first, 0))
            taken_back = group.create_task(_outcome(second.attest("gpu1", record(1))))
            await handed_in(enclave, 2, 3)
            second.leave()
            await handed_in(enclave, 1, 2)
            third.leave()
        assert listed(document.result(), record(0)) == (record(0), *list(OLD.values())[1:])
        assert isinstance(taken_back.result(), EnclaveDown)


async def test_one_that_is_cancelled(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """Wherever it waits: a wash that is cancelled has left, also without a word."""
    async with running(enclave):
        await healthy(enclave)
        host.stopping = asyncio.Event()
        washes = [enclave.renew((f"gpu{number}",)) for number in range(3)]
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(washes[0].booted())
            await until(lambda: host.stops == 2)
            waiting.cancel()
            host.stopping.set()
            await washes[1].booted()
            handing = group.create_task(washes[1].attest("gpu1", record(1)))
            await handed_in(enclave, 1, 2)
            handing.cancel()
            await handed_in(enclave, 0, 1)
            document = group.create_task(attested(washes[2], 2))
        assert listed(document.result(), record(2)) == (*list(OLD.values())[:2], record(2), OLD["gpu3"])
        assert host.starts == 2


async def test_all_leave(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """The enclave does not stay without a key: the records are those that were there before."""
    async with running(enclave):
        old = await healthy(enclave)
        for wash in await booted(enclave, 0, 1):
            wash.leave()
        assert await healthy(enclave) != old
        assert listed(await enclave.attest(NONCE), NONCE) == tuple(OLD.values())


async def test_one_that_leaves_at_once(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock
) -> None:
    """A restart that has not begun, and that nobody waits for, does not happen."""
    async with running(enclave):
        old = await healthy(enclave)
        enclave.renew(("gpu0",)).leave()
        await a_round(clock)
        assert await healthy(enclave) == old
        assert host.starts == 1


async def test_a_slow_one(host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock) -> None:
    """It holds up the others for LINGER seconds and no longer; then it begins again, and that is quick."""
    async with running(enclave):
        await healthy(enclave)
        fast, slow = await booted(enclave, 0, 1)
        async with asyncio.TaskGroup() as group:
            document = group.create_task(attested(fast, 0))
            await handed_in(enclave, 1, 2)
            for _ in range(int(LINGER_SECONDS / CHECK_SECONDS) - 1):
                await a_round(clock)
            assert not enclave.health.healthy
            clock.advance(CHECK_SECONDS)
        assert listed(document.result(), record(0))[:2] == (record(0), OLD["gpu1"])
        with pytest.raises(EnclaveDown, match="too late"):
            await attested(slow, 1)
        (again,) = await booted(enclave, 1)
        assert record(1) in listed(await attested(again, 1), record(1))


async def test_all_are_slow(host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock) -> None:
    """Sessions of other slots want to be opened: after HOLD seconds there is a key, whoever is not done."""
    async with running(enclave):
        await healthy(enclave)
        (wash,) = await booted(enclave, 0)
        clock.advance(HOLD_SECONDS - 1)
        await clock.until_slept_to(clock.now() + 1)
        assert not enclave.health.healthy
        clock.advance(1)
        await healthy(enclave)
        assert listed(await enclave.attest(NONCE), NONCE) == tuple(OLD.values())
        with pytest.raises(EnclaveDown, match="too late"):
            await attested(wash, 0)


# -- what goes wrong --------------------------------------------------------------------------------------


async def test_it_crashes_before_it_has_a_key(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock
) -> None:
    """All washes of this restart hear of it, those that have handed in and those that have not."""
    async with running(enclave):
        await healthy(enclave)
        first, second = await booted(enclave, 0, 1)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(_outcome(attested(first, 0)))
            await handed_in(enclave, 1, 2)
            await clock.until_slept_to(clock.now() + CHECK_SECONDS)
            host.crash("it met a bug")
            clock.advance(CHECK_SECONDS)
        assert isinstance(failure := waiting.result(), EnclaveDown)
        assert str(failure) == "it met a bug"
        with pytest.raises(EnclaveDown, match="it met a bug"):
            await attested(second, 1)
        assert enclave.health.reason == "it met a bug"
        again = enclave.renew(("gpu0",))
        await clock.until_slept_to(clock.now() + 0.5)
        clock.advance(0.5)
        await again.booted()
        assert record(0) in listed(await attested(again, 0), record(0))


async def test_it_crashes_before_the_document(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between INIT and HELLO: the wash hears of it, the next enclave starts with the records that count, and
    the wash begins another renewal."""
    hello = EnclaveLink.hello

    async def crashing(link: EnclaveLink, nonce: bytes) -> bytes:
        host.crash("it met a bug")
        return await hello(link, nonce)

    async with running(enclave):
        await healthy(enclave)
        (wash,) = await booted(enclave, 0)
        with monkeypatch.context() as patched:
            patched.setattr(EnclaveLink, "hello", crashing)
            with pytest.raises(EnclaveDown, match="cannot be reached"):
                await attested(wash, 0)
        await clock.until_slept_to(clock.now() + 0.5)
        assert enclave.health.reason == "it met a bug"
        clock.advance(0.5)
        await healthy(enclave)
        assert listed(await enclave.attest(NONCE), NONCE) == tuple(OLD.values())
        (again,) = await booted(enclave, 0)
        assert record(0) in listed(await attested(again, 0), record(0))


async def test_the_document_of_another_life(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An enclave that was started again before it was asked answers, and its document is not passed on."""
    hello = EnclaveLink.hello

    async def late(link: EnclaveLink, nonce: bytes) -> bytes:
        epoch = enclave.health.epoch
        host.crash()
        clock.advance(CHECK_SECONDS)
        await clock.until_slept_to(clock.now() + 0.5)
        clock.advance(0.5)
        await until(lambda: enclave.health.healthy and enclave.health.epoch != epoch)
        return await hello(link, nonce)

    async with running(enclave):
        await healthy(enclave)
        (wash,) = await booted(enclave, 0)
        monkeypatch.setattr(EnclaveLink, "hello", late)
        with pytest.raises(EnclaveDown, match="another key"):
            await attested(wash, 0)


async def test_it_does_not_make_its_key(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """The washes that wait for it hear why."""
    async with running(enclave):
        await healthy(enclave)
        (wash,) = await booted(enclave, 0)
        host.refuses = Code.ATTEST
        with pytest.raises(EnclaveDown, match="does not make its key"):
            await attested(wash, 0)


async def test_somebody_else_has_its_key_made(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock
) -> None:
    """An enclave that was given records by somebody else attests no wash: it is started again."""
    foreign = EnclaveLink(host.path)
    async with running(enclave):
        await healthy(enclave)
        (wash,) = await booted(enclave, 0)
        try:
            await foreign.init((b"x" * 32,))
        finally:
            foreign.close()
        await a_look(clock)
        await until(lambda: enclave.health.reason == "what answers already has its key")
        with pytest.raises(EnclaveDown, match="already has its key"):
            await attested(wash, 0)
        clock.advance(0.5)
        await healthy(enclave)
        assert listed(await enclave.attest(NONCE), NONCE) == tuple(OLD.values())


async def test_an_engine_that_goes_away_in_between(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has been ended and the next cannot be started now: the wash hears of it, and it is tried
    again soon, or when the next wash comes."""
    away = [RuntimeUnreachable("the engine is away")]
    start = host.start

    async def starting() -> None:
        if away:
            raise away.pop()
        await start()

    async with running(enclave):
        await healthy(enclave)
        monkeypatch.setattr(host, "start", starting)
        with pytest.raises(RuntimeUnreachable):
            await enclave.renew(("gpu0",)).booted()
        await clock.until_slept_to(clock.now() + 0.5)
        assert enclave.health.reason == "the engine is away"
        again = enclave.renew(("gpu0",))
        assert (await again.booted())["old"] == "ended"
        assert record(0) in listed(await attested(again, 0), record(0))


async def test_one_that_is_busy(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """A document that was refused may be asked for again, of the same life."""
    async with running(enclave):
        await healthy(enclave)
        (wash,) = await booted(enclave, 0)
        assert await wash.attest("gpu0", record(0))
        host.refuses = Code.BUSY
        with pytest.raises(EnclaveRefused):
            await wash.attest("gpu0", record(0))
        host.refuses = None
        assert record(0) in listed(await attested(wash, 0), record(0))
        assert host.starts == 2


async def test_backoff(host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock) -> None:
    """Washes start no enclave oftener than it is started without them; each try tells why it failed."""
    async with running(enclave):
        await healthy(enclave)
        host.refusal = "E27: not enough huge pages"
        for starts, pause in enumerate([0.5, 1.0, 2.0], 2):
            wash = enclave.renew(("gpu0",))
            if starts > 2:
                clock.advance(pause / 2)
            with pytest.raises(EnclaveDown, match="E27"):
                await wash.booted()
            assert host.starts == starts
            await enclave_asleep(enclave, clock, pause)
            early = enclave.renew(("gpu1",))
            await enclave_asleep(enclave, clock, pause)
            assert host.starts == starts
            early.leave()
            clock.advance(pause / 2)
        host.refusal = None
        wash = enclave.renew(("gpu0",))
        clock.advance(1.0)
        await wash.booted()
        assert "the last time: E27" in (enclave.health.reason or "")
        await attested(wash, 0)
        assert enclave.health.healthy


async def enclave_asleep(enclave: EnclaveSupervisor, clock: FakeClock, pause: float) -> None:
    """Wait until the supervisor has seen all that there is, and sleeps for so long."""
    await until(lambda: not enclave._wake.is_set() and not enclave._turn.locked())
    await clock.until_slept_to(clock.now() + pause)


async def test_an_engine_that_is_away(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock
) -> None:
    """What cannot be ended now is left as it is, and serves on; the wash hears that nothing is known."""
    async with running(enclave):
        old = await healthy(enclave)
        host.unreachable = "the engine is away"
        with pytest.raises(RuntimeUnreachable, match="the engine is away"):
            await enclave.renew(("gpu0",)).booted()
        await clock.until_slept_to(clock.now() + CHECK_SECONDS)
        clock.advance(CHECK_SECONDS)
        assert await healthy(enclave) == old
        host.unreachable = None
        (wash,) = await booted(enclave, 0)
        await attested(wash, 0)
        assert (host.starts, enclave.restarts) == (2, 1)


async def test_an_engine_that_is_away_from_the_start(
    host: FakeEnclaveHost, enclave: EnclaveSupervisor
) -> None:
    """A wash is told so as long as nobody knows whether there is an enclave."""
    host.unreachable = "the engine is away"
    wash = enclave.renew(("gpu0",))
    async with running(enclave):
        with pytest.raises(RuntimeUnreachable):
            await wash.booted()
        assert host.starts == 0


# -- the end of the service -------------------------------------------------------------------------------


async def test_stop(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """The service ends while washes wait: they hear of it, and the enclave is ended."""
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(enclave.run())
        await healthy(enclave)
        first, second = await booted(enclave, 0, 1)
        waiting = group.create_task(_outcome(attested(first, 0)))
        await handed_in(enclave, 1, 2)
        await enclave.stop()
        async with asyncio.timeout(PATIENCE):
            await watching
        assert str(await waiting) == "the service is stopping"
        with pytest.raises(EnclaveDown, match="stopping"):
            await attested(second, 1)
        with pytest.raises(EnclaveDown, match="stopping"):
            await enclave.renew(("gpu2",)).booted()
    assert await host.ended() == "it was stopped"


async def test_stop_while_the_old_one_ends(host: FakeEnclaveHost, enclave: EnclaveSupervisor) -> None:
    """No other is started then."""
    async with asyncio.TaskGroup() as group:
        group.create_task(enclave.run())
        await healthy(enclave)
        host.stopping = asyncio.Event()
        waiting = group.create_task(_outcome(enclave.renew(("gpu0",)).booted()))
        await until(lambda: host.stops == 2)
        stopping = group.create_task(enclave.stop())
        async with asyncio.timeout(PATIENCE):
            assert str(await waiting) == "the service is stopping"
        host.stopping.set()
        await stopping
    assert host.starts == 1
    assert await host.ended() == "it was stopped"


async def test_handover(host: FakeEnclaveHost, enclave: EnclaveSupervisor, clock: FakeClock) -> None:
    """A life that ends in the middle of a renewal leaves an enclave without a key; the next life has it made,
    with the records that count, or ends it for a wash of its own."""
    async with asyncio.TaskGroup() as group:
        async with running(enclave):
            await healthy(enclave)
            first, _ = await booted(enclave, 0, 1)
            waiting = group.create_task(_outcome(attested(first, 0)))
            await handed_in(enclave, 1, 2)
        assert str(await waiting) == "the service is stopping"
    assert await host.ended() is None
    second = supervisor(host, clock, records=lambda: OLD)
    async with running(second):
        await healthy(second)
        assert listed(await second.attest(NONCE), NONCE) == tuple(OLD.values())
        assert (host.starts, second.restarts) == (2, 0)
        (wash,) = await booted(second, 0)
        assert record(0) in listed(await attested(wash, 0), record(0))
        assert (host.starts, second.restarts) == (3, 1)


# -- what INIT is given -----------------------------------------------------------------------------------


def test_newest() -> None:
    """In the order of the slots; what was handed in is newer, and a slot without a record is left out."""
    records = {"gpu0": b"a" * 32, "gpu1": bytes(32), "gpu2": bytes(32)}
    assert newest(records, {"gpu1": b"b" * 32}) == (b"a" * 32, b"b" * 32)
    assert newest(records, {"gpu0": b"b" * 32}) == (b"b" * 32,)


def test_too_many_slots() -> None:
    """As many as a document names, and the reason says what to change."""
    assert too_many(MAX_SLOTS) is None
    assert f"the wash records of {MAX_SLOTS}" in (too_many(MAX_SLOTS + 1) or "")
    with pytest.raises(EnclaveDown, match="GPU_DEVICE_IDS"):
        newest({str(number): b"r" * 32 for number in range(MAX_SLOTS + 1)}, {})


async def _outcome(done: Awaitable[object]) -> object:
    """What comes of it, or goes wrong."""
    try:
        return await done
    except (EnclaveDown, RuntimeUnreachable) as error:
        return error
