"""The enclave's life, over a host that fails on demand and the real program."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_server.drivers.enclave_container import ContainerEnclave
from gpu_server.drivers.enclave_link import EnclaveLink
from gpu_server.drivers.enclave_process import ProcessEnclave
from gpu_server.enclave import (
    BOOT_SECONDS,
    CHECK_SECONDS,
    enclave_of,
    program_process,
    remove_leftover,
)
from gpu_server.ports import EnclaveDown, EnclaveRefused, RuntimeUnreachable
from gpu_server.sealed.attestation import verify
from gpu_server.sealed.frames import MAX_SLOTS, Code
from gpu_server.settings import Settings
from tests.app.enclave_world import NONCE, PATIENCE, another, binding, healthy, running, supervisor, until
from tests.fakes.clock import FakeClock
from tests.fakes.enclave_host import PCRS, FakeEnclaveHost
from tests.fakes.hurried_clock import HurriedClock


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeEnclaveHost]:
    made = FakeEnclaveHost(tmp_path / "s")
    yield made
    made.unreachable = None
    made.close_for_good()


async def test_start(host: FakeEnclaveHost) -> None:
    """It is started, makes its key, and its documents have the epoch that is shown."""
    async with running(supervisor(host)) as enclave:
        epoch = await healthy(enclave)
        assert enclave.health.reason is None
        document = await enclave.attest(NONCE)
        attested = verify(document, nonce=NONCE, pcrs=PCRS, allow_simulated=True)
        assert attested.epoch == epoch
        assert (host.starts, enclave.restarts) == (1, 0)


async def test_not_yet(host: FakeEnclaveHost) -> None:
    """Before it is started nothing is answered, and the reason is said."""
    enclave = supervisor(host)
    assert not enclave.health.healthy
    with pytest.raises(EnclaveDown, match="not been started"):
        await enclave.attest(NONCE)


async def test_a_bug_does_not_end_the_service(host: FakeEnclaveHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has thought of is an enclave that is down and says why, and the next start is tried."""
    crashes = [RecursionError("too deep")]
    start = host.start

    async def crashing() -> None:
        if crashes:
            raise crashes.pop()
        await start()

    monkeypatch.setattr(host, "start", crashing)
    async with running(supervisor(host, clock := FakeClock())) as enclave:
        await until(lambda: "too deep" in (enclave.health.reason or ""))
        clock.advance(3600)
        await healthy(enclave)


async def test_refusals_pass_through(host: FakeEnclaveHost) -> None:
    """What the enclave refuses is refused, and says nothing about its health."""
    async with running(supervisor(host)) as enclave:
        epoch = await healthy(enclave)
        with pytest.raises(EnclaveRefused) as refused:
            await enclave.grant(binding(epoch), b"nonsense")
        assert refused.value.code == "DECRYPT"
        assert enclave.health.healthy


async def test_a_grant_of_another_life(host: FakeEnclaveHost) -> None:
    """What was encrypted for an enclave that has gone is not asked of the one that is there now."""
    async with running(supervisor(host)) as enclave:
        await healthy(enclave)
        with pytest.raises(EnclaveDown, match="with another key"):
            await enclave.grant(binding(b"e" * 16), b"anything")


async def test_the_next_life_adopts(host: FakeEnclaveHost) -> None:
    """A handover leaves the enclave as it is, and the next life goes on with the same key."""
    async with running(supervisor(host)) as first:
        epoch = await healthy(first)
    assert host.stops == 1  # what an earlier one might have left
    async with running(supervisor(host)) as second:
        assert await healthy(second) == epoch
        assert (host.starts, host.stops, second.restarts) == (1, 1, 0)


async def test_stop(host: FakeEnclaveHost) -> None:
    """An end in order ends the enclave too, and whoever watched over it returns."""
    enclave = supervisor(host)
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(enclave.run())
        await healthy(enclave)
        await enclave.stop()
        async with asyncio.timeout(PATIENCE):
            await watching
    assert await host.ended() == "it was stopped"
    assert enclave.health.reason == "the service is stopping"
    with pytest.raises(EnclaveDown, match="stopping"):
        await enclave.renew(("gpu0",)).booted()


async def test_stop_while_it_boots(host: FakeEnclaveHost) -> None:
    """A start that will not come to an end does not hold up the end of the service."""
    enclave = supervisor(host, timeout=0.1)
    host.start = _then(host.start, host.hang)  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as group:
        group.create_task(enclave.run())
        await until(lambda: host.starts == 1)
        async with asyncio.timeout(PATIENCE):
            await enclave.stop()
    assert await host.ended() == "it was stopped"


async def test_stop_without_an_engine(host: FakeEnclaveHost) -> None:
    """Where nothing can be ended now, stopping goes on; the next life adopts or removes what is left."""
    enclave = supervisor(host)
    async with asyncio.TaskGroup() as group:
        group.create_task(enclave.run())
        await healthy(enclave)
        host.unreachable = "the engine is away"
        await enclave.stop()


async def test_crash(host: FakeEnclaveHost) -> None:
    """It is started again, with another key, and that is counted."""
    async with running(supervisor(host)) as enclave:
        epoch = await healthy(enclave)
        host.crash()
        await until(lambda: enclave.health.healthy and enclave.health.epoch != epoch)
        assert enclave.restarts == 1
        await enclave.attest(NONCE)


async def test_a_crash_is_seen_by_who_asks(host: FakeEnclaveHost) -> None:
    """The first request that fails makes the supervisor look, long before its next round."""
    clock = FakeClock()
    async with running(supervisor(host, clock)) as enclave:
        await healthy(enclave)
        await clock.until_slept_to(clock.now() + CHECK_SECONDS)
        host.crash("it met a bug")
        with pytest.raises(EnclaveDown):
            await enclave.attest(NONCE)
        await until(lambda: not enclave.health.healthy)
        await until(lambda: enclave.health.reason == "it met a bug")
        with pytest.raises(EnclaveDown, match="it met a bug"):
            await enclave.attest(NONCE)


async def test_backoff(host: FakeEnclaveHost) -> None:
    """One that does not start is tried again ever later, up to once a minute, and the reason is shown."""
    clock = FakeClock()
    host.refusal = "E27: not enough huge pages"
    async with running(supervisor(host, clock)) as enclave:
        for starts, pause in enumerate([0.5, 1, 2, 4, 8, 16, 32, 60, 60], 1):
            await clock.until_slept_to(clock.now() + pause)
            assert host.starts == starts
            assert enclave.health.reason == host.refusal
            clock.advance(pause)
        host.refusal = None
        await healthy(enclave)


async def test_backoff_begins_anew(host: FakeEnclaveHost) -> None:
    """After a minute of health a crash is the first again; one right after the other is not."""
    clock = FakeClock()
    async with running(supervisor(host, clock)) as enclave:
        await healthy(enclave)
        for lived, pause in ((CHECK_SECONDS, 0.5), (CHECK_SECONDS, 1.0), (61.0, 0.5)):
            await clock.until_slept_to(clock.now() + CHECK_SECONDS)
            host.crash()
            clock.advance(lived)
            await clock.until_slept_to(clock.now() + pause)
            clock.advance(pause)
            await healthy(enclave)


async def test_hang(host: FakeEnclaveHost) -> None:
    """One that runs and does not answer is unhealthy at once, and started again after three checks."""
    again, start = asyncio.Event(), host.start
    async with running(supervisor(host)) as enclave:
        epoch = await healthy(enclave)

        async def start_again() -> None:
            await again.wait()
            enclave._link._timeout = 20.0
            await start()

        host.start = start_again  # type: ignore[method-assign]
        enclave._link._timeout = 0.05
        host.hang()
        await until(lambda: "3 times in a row" in (enclave.health.reason or ""))
        assert not enclave.health.healthy
        again.set()
        assert await healthy(enclave) != epoch
        assert host.starts == 2


async def test_busy_is_alive(host: FakeEnclaveHost) -> None:
    """An enclave that says that it is busy is left alone."""
    clock = FakeClock()
    async with running(supervisor(host, clock)) as enclave:
        await healthy(enclave)
        host.refuses = Code.BUSY
        for _ in range(6):
            await clock.until_slept_to(clock.now() + CHECK_SECONDS)
            clock.advance(CHECK_SECONDS)
        assert enclave.health.healthy
        assert host.starts == 1


async def test_one_that_refuses_to_say_how_it_is(host: FakeEnclaveHost) -> None:
    """Any other refusal of that question is no sign of health: it is started again as if it hung."""
    async with running(supervisor(host)) as enclave:
        epoch = await healthy(enclave)
        host.refuses = Code.INTERNAL
        await until(lambda: not enclave.health.healthy)
        await until(lambda: host.starts >= 2)
        host.refuses = None
        assert await healthy(enclave) != epoch


async def test_one_that_somebody_else_initialised(
    host: FakeEnclaveHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was faster with INIT chose what documents say of the slots; and what is ready right after a start
    may be the enclave before it, which has not quite gone. Neither is taken for the one that was started."""
    foreign = EnclaveLink(host.path)
    start = host.start

    async def and_init() -> None:
        await start()
        if host.starts == 1:
            await foreign.init((b"x" * 32,))

    host.start = and_init  # type: ignore[method-assign]
    monkeypatch.setattr("gpu_server.enclave.BOOT_PAUSE_SECONDS", 5.0)
    clock = HurriedClock()
    before = clock.now()
    async with running(supervisor(host, clock)) as enclave:
        await until(lambda: "already has its key" in (enclave.health.reason or ""))
        assert clock.now() - before >= BOOT_SECONDS
        await healthy(enclave)
        assert host.starts == 2
        attested = verify(await enclave.attest(NONCE), nonce=NONCE, pcrs=PCRS, allow_simulated=True)
        assert attested.slots == ()
    foreign.close()


async def test_an_engine_that_is_away(host: FakeEnclaveHost) -> None:
    """What cannot be known is not concluded: no second enclave is started beside one that may run."""
    host.replace()
    host.unreachable = "the engine is away"
    async with running(supervisor(host)) as enclave:
        await until(lambda: enclave.health.reason == "the engine is away")
        assert host.starts == 0
        host.unreachable = None
        await healthy(enclave)
        assert host.starts == 0


async def test_an_engine_that_goes_away(host: FakeEnclaveHost) -> None:
    """An enclave that answers is healthy, whether the engine does or not."""
    clock = FakeClock()
    async with running(supervisor(host, clock)) as enclave:
        await healthy(enclave)
        host.unreachable = "the engine is away"
        await clock.until_slept_to(clock.now() + CHECK_SECONDS)
        clock.advance(CHECK_SECONDS)
        await clock.until_slept_to(clock.now() + CHECK_SECONDS)
        assert enclave.health.healthy


async def test_restarts_are_starts(host: FakeEnclaveHost) -> None:
    """While the engine is away nothing can be started, so nothing is counted."""
    async with running(supervisor(host)) as enclave:
        await healthy(enclave)
        host.unreachable = "the engine is away"
        for _ in range(3):
            with pytest.raises(RuntimeUnreachable, match="away"):
                await enclave.renew(("gpu0",)).booted()
        host.unreachable = None
        await healthy(enclave)
        assert host.starts == 1 + enclave.restarts


async def test_another_kind_of_enclave(tmp_path: Path) -> None:
    """Where a simulated enclave is wanted a Nitro Enclave is none, and the other way about: never healthy."""
    host = FakeEnclaveHost(tmp_path / "s", mode="nitro")
    try:
        async with running(supervisor(host)) as enclave:
            await until(lambda: host.starts >= 2)
            assert not enclave.health.healthy
            await until(lambda: "not a simulated one" in (enclave.health.reason or ""))
    finally:
        host.close_for_good()


async def test_replaced_by_somebody(host: FakeEnclaveHost) -> None:
    """An enclave that somebody else restarted is given its key like one that was started here."""
    async with running(supervisor(host)) as enclave:
        epoch = await healthy(enclave)
        host.replace()
        await until(lambda: enclave.health.epoch not in (None, epoch))
        assert host.starts == 1


async def test_records(host: FakeEnclaveHost) -> None:
    """Documents name the newest records as they were at the start, in the order of the slots; a slot that has
    none yet is left out."""
    records = {"gpu0": b"a" * 32, "gpu1": b"b" * 32, "gpu2": bytes(32)}
    async with running(supervisor(host, records=lambda: records)) as enclave:
        epoch = await healthy(enclave)
        records["gpu0"] = b"c" * 32
        for wanted in ((b"a" * 32, b"b" * 32), (b"c" * 32, b"b" * 32)):
            document = await enclave.attest(NONCE)
            attested = verify(document, nonce=NONCE, pcrs=PCRS, allow_simulated=True)
            assert attested.slots == wanted
            await another(enclave, epoch, host.crash)
            epoch = await healthy(enclave)


async def test_more_slots_than_a_document_names(host: FakeEnclaveHost) -> None:
    """It has no key then, and the reason says what to change."""
    records = {f"gpu{number}": bytes([number + 1]) * 32 for number in range(MAX_SLOTS + 1)}
    async with running(supervisor(host, records=lambda: records)) as enclave:
        await until(lambda: f"this node has {MAX_SLOTS + 1} slots" in (enclave.health.reason or ""))
        assert "GPU_DEVICE_IDS" in (enclave.health.reason or "")
        del records["gpu0"]
        await healthy(enclave)


async def test_one_that_never_answers(host: FakeEnclaveHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start is given up after a time, and begun again."""
    monkeypatch.setattr("gpu_server.enclave.BOOT_PAUSE_SECONDS", 5.0)
    clock = HurriedClock()
    host.start = _then(host.start, lambda: host.path.unlink())  # type: ignore[method-assign]
    before = clock.now()
    async with running(supervisor(host, clock)) as enclave:
        await until(lambda: "does not answer" in (enclave.health.reason or ""))
        assert clock.now() - before >= BOOT_SECONDS


def _then(start: Callable[[], object], do: Callable[[], None]) -> Callable[[], object]:
    async def both() -> None:
        await start()  # type: ignore[misc]
        do()

    return both


# -- what the settings want -------------------------------------------------------------------------------


def settings(**changed: object) -> Settings:
    return Settings(_env_file=None, **changed)  # type: ignore[arg-type, call-arg]


def test_off(tmp_path: Path) -> None:
    """No enclave unless one is asked for."""
    assert enclave_of(settings(), "docker", "i" * 16, tmp_path, None) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="without root the enclave runs as the service does")
def test_no_worker_has_its_uid(tmp_path: Path) -> None:
    """Whatever the workers' uids are: the enclave's folder and socket are closed to all of them."""
    for base in (1000, 20000, 65532, 65000):
        wanted = settings(enclave="simulated", worker_uid_base=base)
        found = enclave_of(wanted, "docker", "i" * 16, tmp_path, None)
        assert found is not None
        assert isinstance(found._host, ContainerEnclave)
        assert 0 < found._host._uid < base


@pytest.mark.parametrize(("runtime", "kind"), [("docker", ContainerEnclave), ("process", ProcessEnclave)])
def test_simulated(tmp_path: Path, runtime: str, kind: type) -> None:
    """A container where workers are containers, else a process."""
    found = enclave_of(settings(enclave="simulated"), runtime, "i" * 16, tmp_path, None)
    assert found is not None
    assert found.mode == "simulated"
    assert isinstance(found._host, kind)


async def test_nitro_without_its_image_file(tmp_path: Path, docker_engine: object) -> None:
    """The reason says what is missing and what makes it."""
    wanted = settings(
        enclave="nitro", enclave_eif_path=tmp_path / "no.eif", enclave_runner_image="python:3.11-slim"
    )
    found = enclave_of(wanted, "docker", "nitro-test-instance", tmp_path, None)
    assert found is not None
    assert found.mode == "nitro"
    async with running(found):
        await until(lambda: "enclave_image/build.sh" in (found.health.reason or ""))


@pytest.mark.parametrize(
    ("mode", "makes"),
    [
        ("nitro", "docker build -t gpu-server/missing:dev enclave_image/runner makes it"),
        ("simulated", "./scripts/build_images.sh enclave makes it"),
    ],
)
async def test_without_its_image(tmp_path: Path, docker_engine: object, mode: str, makes: str) -> None:
    """The reason names the command that makes the image that is missing, the runner's or the program's."""
    missing = "gpu-server/missing:dev"
    wanted = settings(enclave=mode, enclave_runner_image=missing, enclave_image=missing)
    found = enclave_of(wanted, "docker", f"{mode}-without-image", tmp_path, None)
    assert found is not None
    async with running(found):
        await until(lambda: f"there is no image {missing}" in (found.health.reason or ""))
        assert makes in (found.health.reason or "")


async def test_a_long_run_dir(tmp_path: Path) -> None:
    """A path that is too long for a socket is none the less one where the enclave can be reached."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    found = enclave_of(settings(enclave="simulated"), "process", "i" * 16, folder, None)
    assert found is not None
    async with asyncio.TaskGroup() as group:
        group.create_task(found.run())
        try:
            await healthy(found)
        finally:
            with contextlib.suppress(Exception):
                await found.stop()
    assert list(folder.iterdir()) == []


async def test_what_an_earlier_life_left(tmp_path: Path) -> None:
    """A service without an enclave ends the one that was there; where there is none, nothing happens."""
    await remove_leftover("process", "i" * 16, tmp_path, None)
    left = program_process("i" * 16, tmp_path / "iiiiiiii.enclave")
    await left.start()
    assert await left.ended() is None
    await remove_leftover("process", "i" * 16, tmp_path, None)
    assert await left.ended() == "its process has gone"
    await remove_leftover("docker", "i" * 16, tmp_path, f"unix://{tmp_path}/no-engine.sock")
