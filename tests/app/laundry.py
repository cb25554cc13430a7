"""A car wash on its own: a node's slots, a machine, fakes for what there is not here, and what it told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpu_server.carwash import CarWash
from gpu_server.certificates import NodeSeal
from gpu_server.core import events as ev
from gpu_server.core.effects import WashSlots
from gpu_server.core.errors import CertificateRejected
from gpu_server.core.slots import Slots, SlotSpec, WashTier
from gpu_server.counts import Counts
from gpu_server.drivers.residue import Residue
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.ports import Enclave, EndedLease, worker_name
from gpu_server.sealed.wash import Figures, Verified, verify_certificate
from gpu_server.slot_wash import Equipment
from tests.app.world import IMAGE, slot_specs
from tests.fakes.clock import FakeClock
from tests.fakes.gpu_wash import FakeGates, FakeScrubber
from tests.fakes.journal import MemoryJournal
from tests.fakes.runtime import FakeEngine, FakeRuntime, FakeScript
from tests.fakes.washing import residue_in
from tests.worker_specs import TEST_UID, worker_spec

GPUS = slot_specs(2, gpu=True)
MIDNIGHT = 1_800_000_000.0
"""The wall clock of a laundry, where the node's clock says 1000."""


class TroubledResidue:
    """A `HostResidue` with switches: `failure` is raised by the removal, `again` by the second look; `hold`
    lets the removal wait first."""

    def __init__(self, residue: Residue) -> None:
        self.residue = residue
        self.failure: Exception | None = None
        self.again: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.leases: list[EndedLease] = []
        self.looks = 0

    async def clean(self, lease: EndedLease) -> Figures:
        self.leases.append(lease)
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        return await self.residue.clean(lease)

    async def second_look(self, lease: EndedLease) -> None:
        self.looks += 1
        if self.again is not None:
            raise self.again
        await self.residue.second_look(lease)


@dataclass
class Laundry:
    """A car wash, what it works on and what it works with."""

    root: Path
    specs: tuple[SlotSpec, ...] = GPUS
    enclave: Enclave | None = None
    give_up: float = 60.0
    seal_name: str = "seal"
    events: list[ev.Event] = field(default_factory=list)
    rejected: list[CertificateRejected] = field(default_factory=list)
    serving: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / self.seal_name).mkdir(exist_ok=True)
        here = self.enclave is not None
        self.seal = NodeSeal.open(self.root / self.seal_name, enclave=here, allow_simulated=here)
        self.machine = FakeEngine(images={IMAGE: FakeScript()})
        self.runtime, self.folders = FakeRuntime(self.machine), RunFolders(self.root / "run")
        self.clock, self.wall = FakeClock(), MIDNIGHT
        self.journal, self.counts = MemoryJournal(), Counts()
        self.scrubber, self.gates = FakeScrubber(), FakeGates()
        self.residue = TroubledResidue(residue_in(self.runtime, self.folders, self.serving.get))
        self.slots = Slots()
        for spec in self.specs:
            self.slots.add(spec)
        self.wash = self.car_wash()
        self.wash.swept = True

    def car_wash(self, *, has_gpu_drivers: bool = True) -> CarWash:
        """Another car wash, as another life of the service has it."""
        return CarWash(
            self.runtime,
            self.journal,
            self.clock,
            self.counts,
            Equipment(
                seal=self.seal,
                residue=self.residue,
                scrubber=self.scrubber if has_gpu_drivers else None,
                gates=self.gates if has_gpu_drivers else None,
                enclave=self.enclave,
                give_up=self.give_up,
            ),
            uid_base=20_000,
            wall=lambda: self.wall,
        )

    async def worker(
        self, session_id: str = "s_1", fence: int = 1, *, runtime: FakeRuntime | None = None
    ) -> str:
        """A running worker with its folder; its container's name."""
        folder = self.folders.create(session_id, TEST_UID, None)
        name, runtime = worker_name(session_id, fence), runtime or self.runtime
        spec = replace(worker_spec(folder, image=IMAGE), name=name, session_id=session_id, fence=fence)
        await runtime.create(spec)
        await runtime.start(name)
        return name

    def order(
        self, session_id: str | None = "s_1", fence: int = 1, *, tier: WashTier = WashTier.FULL
    ) -> WashSlots:
        """An order for all slots, which are washing under this fence."""
        slot_ids = tuple(spec.id for spec in self.specs)
        for slot_id in slot_ids:
            self.slots.begin_wash(slot_id, fence)
            self.slots[slot_id].tier = tier
        return WashSlots(
            session_id=session_id,
            fence=fence,
            slot_ids=slot_ids,
            grace=10.0,
            tier=tier,
            prevs=self.slots.prevs(slot_ids),
            tenant="a" if session_id is not None else None,
        )

    def tell(self, event: ev.Event) -> None:
        """What the node would do about it."""
        self.events.append(event)
        if isinstance(event, ev.CertificateIssued):
            try:
                self.slots.issue(self.seal.judge(event.certificate))
            except CertificateRejected as rejected:
                self.rejected.append(rejected)
        elif isinstance(event, ev.WashFailed):
            for slot_id in event.slot_ids:
                self.slots.quarantine(slot_id, event.reason)

    async def run(self, order: WashSlots | None = None) -> None:
        """Wash, to the end."""
        order = order or self.order()
        async with asyncio.timeout(20):
            await self.wash.run(order, [self.slots[slot_id] for slot_id in order.slot_ids], self.tell)

    @asynccontextmanager
    async def running(self, order: WashSlots | None = None) -> AsyncIterator[asyncio.Task[None]]:
        """Wash beside the block, and to the end behind it."""
        async with asyncio.TaskGroup() as group:
            yield group.create_task(self.run(order))

    async def until_retry(self, pause: float) -> None:
        """Until a step waits for its next attempt, so many seconds away; and let that come."""
        await self.clock.until_slept_to(self.clock.now() + pause)
        self.clock.advance(pause)

    async def until_at(self, *steps: str) -> None:
        """Until these steps of every slot are under way, and no others."""
        async with asyncio.timeout(20):
            while {view.steps for view in self.wash.washing.values()} != {steps}:  # noqa: ASYNC110 (it comes soon)
                await asyncio.sleep(0)

    @property
    def certificates(self) -> dict[str, Verified]:
        """What was issued, verified as a client does: slot id -> certificate."""
        found = [e.certificate for e in self.events if isinstance(e, ev.CertificateIssued)]
        verified = [
            verify_certificate(raw, node_key=self.seal.public_key, allow_simulated=True) for raw in found
        ]
        return {each.record.slot_id: each for each in verified}

    @property
    def failures(self) -> dict[str, str]:
        """Slot id -> why its wash failed."""
        return {
            slot_id: event.reason
            for event in self.events
            if isinstance(event, ev.WashFailed)
            for slot_id in event.slot_ids
        }

    @property
    def story(self) -> list[str]:
        """The kinds of what was told, in their order."""
        return [type(event).__name__ for event in self.events]

    def free(self) -> None:
        """As if all certificates were on the disk; they are the slots' next ones' predecessors."""
        for slot in self.slots:
            assert slot.pending is not None
            self.slots.secure(slot.spec.id, slot.pending)
            self.wash.over(slot.spec.id)

    def results(self, slot_id: str = "0") -> dict[str, str]:
        """The steps of the slot's certificate."""
        return {step.name: step.result for step in self.certificates[slot_id].record.steps}
