"""Washes by the hundred, with every step failing in every way, and a service that is killed in between.

No slot is ever free without a certificate of its last wash, and the certificates of a slot are one chain.
"""

from __future__ import annotations

import asyncio
import random
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.errors import Refusal
from gpu_server.core.rows import Table
from gpu_server.core.sessions import Rules
from gpu_server.core.slots import NO_CERTIFICATE, Slot
from gpu_server.drivers.residue import Residue
from gpu_server.engine import Engine
from gpu_server.ports import (
    Dirty,
    EnclaveDown,
    JournalFailing,
    RuntimeUnreachable,
    WashUnreachable,
    WorkerExit,
    worker_name,
)
from gpu_server.presets import Preset
from gpu_server.sealed.wash import encode_record, verify_certificate, verify_chain
from tests.app.mortal import Death, Killed, MortalJournal, live
from tests.app.world import IMAGE, World, machine_world, slot_specs
from tests.fakes.enclave import FakeEnclave
from tests.fakes.runtime import FakeContainer, FakeOutput, FakeRuntime, FakeScript
from tests.worker_specs import TEST_UID, worker_spec

SLOTS = (*slot_specs(2, gpu=True), *slot_specs(4)[2:])
IDLE_TURNS = 40
"""Turns of the loop after which nothing goes on but sleep."""


class Mute:
    """An attendant of a worker that does nothing: it is there, with a folder, until it is taken down."""

    log_tail = ""
    is_started = False

    def __init__(self, world: World, session_id: str, fence: int) -> None:
        self.name = worker_name(session_id, fence)
        self._world, self._session_id, self._fence = world, session_id, fence

    def start(self) -> None:
        folder = self._world.folders.create(self._session_id, TEST_UID, None)
        spec = replace(
            worker_spec(folder, image=IMAGE),
            name=self.name,
            session_id=self._session_id,
            fence=self._fence,
        )
        container = FakeContainer(instance="fake", spec=spec, script=FakeScript(), output=FakeOutput())
        container.started = True
        self._world.machine.containers[self.name] = container

    def adopt(self, *, ready: bool) -> None:
        pass

    def heard_exit(self, exit_: WorkerExit) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass
class Chaos:
    """Strikes where a wash does something: a finding, an error, a bug, a wait without end, or the service's
    own end. `rate` is how often."""

    world: World
    rng: random.Random
    rate: float
    struck: Counter[str] = field(default_factory=Counter)

    async def strike(self, where: str) -> None:
        if self.world.killed:
            raise Killed
        if self.rng.random() >= self.rate:
            return
        how = self.rng.choice(["dirty", "unreachable", "errno", "engine", "crash", "hang", "hang", "death"])
        self.struck[f"{where}: {how}"] += 1
        match how:
            case "dirty":
                raise Dirty("found")
            case "unreachable":
                raise WashUnreachable("no answer")
            case "errno":
                raise OSError(5, "I/O error")
            case "engine":
                raise RuntimeUnreachable("no engine")
            case "crash":
                raise ZeroDivisionError
            case "hang":
                await asyncio.Event().wait()
            case "death" if self.rng.random() < 0.4:
                self.world.kill()
                raise Killed


class StruckJournal(MortalJournal):
    """A journal whose disk fails now and then."""

    def __init__(self, death: Death, rng: random.Random) -> None:
        super().__init__(death)
        self._rng = rng

    def secure(self) -> None:
        if self._rng.random() < 0.1:
            raise JournalFailing("the disk says no")
        super().secure()


@dataclass
class Watch:
    """Looks at each decision of every life: what is free must have its certificate in the journal."""

    world: World
    enclave: bool
    cycles: int = 0
    freed: int = 0
    issued: list[bytes] = field(default_factory=list)
    _free: dict[str, bytes] = field(default_factory=dict)
    _ordered: dict[str, int] = field(default_factory=dict)

    def order(self, order: fx.WashSlots) -> None:
        self.cycles += len(order.slot_ids)
        for slot_id in order.slot_ids:
            self._ordered[slot_id] = order.fence
            self._free.pop(slot_id, None)

    def look(self) -> None:
        if isinstance(self.world.enclave, FakeEnclave):
            self.world.enclave.records = {slot.spec.id: slot.head for slot in self.world.engine.node.slots}
        for slot in self.world.engine.node.slots:
            if slot.state != "free" or self._free.get(slot.spec.id) == slot.prev:
                continue
            newest = self.newest(slot)
            assert newest is not None, f"slot {slot.spec.id} is free without a certificate"
            found = self.verified(newest)
            record = found.record
            assert (found.hash, found.record_hash) == (slot.prev, slot.head)
            assert (record.slot_id, record.slot_uuid) == (slot.spec.id, slot.spec.uuid)
            assert record.fence == self._ordered[slot.spec.id], "it is of another wash than the last one"
            self._free[slot.spec.id] = slot.prev
            self.freed += 1

    def new_life(self) -> None:
        self._free.clear()

    def newest(self, slot: Slot) -> bytes | None:
        text = self.world.disk[Table.CERTIFICATES].get(slot.head.hex())
        return None if text is None else b64decode(orjson.loads(text)["certificate"])

    def rows(self, slot_id: str) -> list[bytes]:
        rows = [orjson.loads(text) for text in self.world.disk[Table.CERTIFICATES].values()]
        return [b64decode(row["certificate"]) for row in rows if row["slot_id"] == slot_id]

    def verified(self, raw: bytes) -> Any:
        return verify_certificate(
            raw,
            node_key=self.world.seal.public_key,
            enclave="required" if self.enclave else "absent",
            allow_simulated=self.enclave,
        )


@dataclass
class Tenants:
    """Take leases and give them back, order washes, and offer the node whatever is no certificate of now."""

    world: World
    watch: Watch
    rng: random.Random
    until: int
    number: int = 0

    async def __call__(self) -> None:
        """A life, until there were so many cycles."""
        world = self.world
        while self.watch.cycles < self.until:
            await self.settle()
            slots, decide = world.engine.node.slots, world.engine.decide
            for slot in [slot for slot in slots if slot.state == "quarantined"]:
                if self.rng.random() < 0.6:
                    decide(ev.SlotWashOrdered(slot_id=slot.spec.id))
            for session in list(world.engine.node.live_sessions()):
                if not session.tearing_down and self.rng.random() < 0.7:
                    decide(ev.SessionKillRequested(session_id=session.id, tenant=session.tenant))
            self.forge()
            for _ in range(self.rng.randint(1, 4)):
                self.take_lease()

    def take_lease(self) -> None:
        self.number += 1
        with suppress(Refusal):  # no capacity left, or the journal fails
            self.world.engine.request_session(
                f"s_{self.number}",
                tenant=self.rng.choice(["a", "b"]),
                tier=None,
                model_id="m",
                task_preset=self.rng.choice(["p", "two"]),
            )

    def forge(self) -> None:
        """Certificates that were, or are another slot's: what they free shows in the watch."""
        engine, report = self.world.engine, self.world.engine.report
        before = {slot.spec.id: slot.state for slot in engine.node.slots}
        for raw in self.rng.sample(self.watch.issued, min(2, len(self.watch.issued))):
            report(ev.CertificateIssued(certificate=raw))
            report(ev.CertificateIssued(certificate=raw[:-1] + bytes([raw[-1] ^ 1])))
        for slot in engine.node.slots:
            pending = slot.pending
            for raw in () if self.watch.enclave else self.lies(slot):
                report(ev.CertificateIssued(certificate=raw))
                assert slot.pending == pending
            for value in (slot.prev, NO_CERTIFICATE, slot.head):
                if slot.pending != value:
                    report(ev.CertificateSecured(slot_id=slot.spec.id, certificate_hash=value))
        after = {slot.spec.id: slot.state for slot in engine.node.slots}
        assert after == before

    def lies(self, slot: Slot) -> Iterator[bytes]:
        """What this node would sign of this slot's wash, but for one thing each."""
        newest = self.watch.newest(slot)
        if newest is None:
            return
        last = self.watch.verified(newest).record
        truth = replace(
            last,
            slot_id=slot.spec.id,
            slot_uuid=slot.spec.uuid,
            fence=slot.fence,
            prev=slot.prev,
            tier="full",
            steps=tuple(
                replace(step, result="passed") if step.result == "skipped" else step for step in last.steps
            ),
        )
        others = [other for other in self.world.engine.node.slots if other.spec.id != slot.spec.id]
        lies: list[dict[str, Any]] = [
            {"fence": slot.fence - 1},
            {"fence": slot.fence + 1},
            {"prev": bytes(31) + b"1"},
            {"slot_uuid": f"{slot.spec.uuid}-other"},
            {"slot_id": others[0].spec.id},
            {"slot_id": "gone"},
        ]
        for lie in self.rng.sample(lies, 2):
            yield self.world.seal.issue(encode_record(replace(truth, **lie)), None)

    async def settle(self) -> None:
        """Let go on what can; time passes where nothing does. Not always to the end."""
        for _ in range(self.rng.randint(1, 12)):
            for _ in range(IDLE_TURNS):
                await asyncio.sleep(0)
            clock = self.world.clock
            if not clock.slept_to or not len(self.world.engine._washes):
                return
            clock.advance(clock.slept_to[0] - clock.now())


@contextmanager
def struck(world: World, chaos: Chaos, watch: Watch) -> Iterator[None]:
    """Chaos at every step, the watch at every decision, and no threads, so that a seed tells all."""

    def before(owner: Any, method: str, where: str) -> None:
        real = getattr(owner, method)

        async def stricken(*args: Any, **named: Any) -> Any:
            await chaos.strike(where)
            return await real(*args, **named)

        patch.setattr(owner, method, stricken)

    async def inline(do: Callable[..., Any], *args: Any) -> Any:
        return do(*args)

    def attend(engine: Engine, session_id: str, slot_ids: tuple[str, ...]) -> Mute:
        mute = Mute(world, session_id, engine.node.sessions[session_id].fence)
        engine.attendants[session_id] = mute  # type: ignore[assignment]
        return mute

    start = Engine._start

    def watched(engine: Engine, effect: fx.Effect) -> None:
        if world.killed:
            raise Killed
        if isinstance(effect, fx.WashSlots):
            watch.order(effect)
        start(engine, effect)

    decide = Engine.decide

    def looked_at(engine: Engine, event: ev.Event) -> None:
        if world.killed:
            raise Killed
        if isinstance(event, ev.CertificateIssued) and event.certificate not in watch.issued:
            watch.issued.append(event.certificate)
        decide(engine, event)
        watch.look()

    with pytest.MonkeyPatch.context() as patch, structlog.testing.capture_logs():
        before(FakeRuntime, "remove", "teardown")
        before(FakeRuntime, "foreign_gpu_holders", "gates")
        before(Residue, "clean", "residue")
        before(Residue, "second_look", "second look")
        before(world.scrubber, "scrub", "scrub")
        before(world.gates, "before", "gates")
        before(world.gates, "check", "gates")
        patch.setattr(asyncio, "to_thread", inline)
        patch.setattr(Engine, "_attend", attend)
        patch.setattr(Engine, "_start", watched)
        patch.setattr(Engine, "decide", looked_at)
        yield


class StruckEnclave(FakeEnclave):
    """An enclave that fails to boot, is busy, or dies, when chaos wants it."""

    chaos: Chaos | None = None

    def renew(self, slot_ids: tuple[str, ...]) -> Any:
        if self.chaos is not None and self.chaos.rng.random() < self.chaos.rate:
            self.boot_failures.append(EnclaveDown("no memory"))
        return super().renew(slot_ids)

    async def hello(self, epoch: bytes, nonce: bytes) -> bytes:
        if self.chaos is not None:
            await self.chaos.strike("enclave")
            if self.chaos.rng.random() < self.chaos.rate:
                self.restart()
        return await super().hello(epoch, nonce)


@pytest.mark.parametrize(("seed", "cycles", "enclave"), [(1, 510, False), (2, 510, False), (3, 50, True)])
async def test_cycles(tmp_path: Path, seed: int, cycles: int, enclave: bool) -> None:
    """Slots that are free without a valid certificate of their last wash: none, at any moment of any life. At
    the end each slot's certificates are one chain from its first one, up to the one that freed it."""
    rng = random.Random(seed)
    nitro = StruckEnclave() if enclave else None
    async with machine_world(
        tmp_path, slots=SLOTS, rules=Rules(light_wash=True), enclave=nitro, give_up=200.0
    ) as world:
        chaos, watch = Chaos(world, rng, 0.08), Watch(world, enclave)
        world.presets["two"] = Preset(docker_image=IMAGE, model="none", gpus=2)
        if nitro is not None:
            nitro.chaos = chaos
        lives = 0
        with struck(world, chaos, watch):
            tenants = Tenants(world, watch, rng, cycles)
            while watch.cycles < cycles:
                lives += 1
                watch.new_life()
                death = Death(world, at=rng.randint(1, 300), written=rng.random() < 0.5)
                await live(world, tenants, journal=StruckJournal(death, rng))
            chaos.rate = 0.0
            watch.new_life()
            assert await live(world, lambda: all_free(world))
        assert lives >= 2
        kinds = {kind.split(": ")[0] for kind in chaos.struck}
        assert kinds >= ({"enclave"} if enclave else {"teardown", "residue", "scrub", "gates", "second look"})
        assert watch.freed > cycles / 4
        for slot in world.engine.node.slots:
            raws = watch.rows(slot.spec.id)
            chain = verify_chain(
                raws, node_key=world.seal.public_key, head=slot.head, allow_simulated=enclave
            )
            assert chain.from_first
            assert chain.certificates[-1].hash == slot.prev
            assert len(raws) > cycles / 20


async def all_free(world: World) -> None:
    """A life without troubles: whatever was locked away comes back by an order to wash it, and what is leased
    by its end."""
    decide = world.engine.decide
    for slot in world.engine.node.slots:
        if slot.state == "quarantined":
            decide(ev.SlotWashOrdered(slot_id=slot.spec.id))
    async with asyncio.timeout(60):
        while not all(slot.state == "free" for slot in world.engine.node.slots):
            for session in list(world.engine.node.live_sessions()):
                if not session.tearing_down:
                    decide(ev.SessionKillRequested(session_id=session.id, tenant=session.tenant))
            for _ in range(IDLE_TURNS):
                await asyncio.sleep(0)
            if world.clock.slept_to:
                world.clock.advance(world.clock.slept_to[0] - world.clock.now())
