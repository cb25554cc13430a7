"""The wash of one slot, from the worker's end to its certificate.

1. At once: the host's residue, which the slots of a lease share; the scrub of its GPU; the enclave's renewal.
2. The gates, as soon as residue and scrub are done.
3. The record; the enclave is given its hash before it makes its key, and attests it.
4. The certificate.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from gpu_server.certificates import NodeSeal
from gpu_server.core.effects import WashSlots
from gpu_server.core.slots import SlotSpec, WashTier
from gpu_server.ports import (
    ContainerRuntime,
    Dirty,
    Enclave,
    EnclaveRefused,
    EndedLease,
    GpuGates,
    GpuScrubber,
    HostResidue,
    Journal,
    Renewal,
    WashUnreachable,
)
from gpu_server.sealed.wash import (
    STEPS,
    Figures,
    Record,
    WashRefused,
    encode_record,
    hash_of,
    verify_certificate,
)
from gpu_server.wash_steps import ENCLAVE_SECONDS, Done, Steps, Times, WashStopped

log = structlog.get_logger()

CERTIFICATE: Final = "certificate"
"""What comes after the steps of a record: the enclave attests it, and the node signs."""
HELD_UP_SECONDS: Final = 10.0
"""A step that is tried again for longer keeps nobody else from the enclave's next key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What a wash works with. A node without GPUs needs neither `scrubber` nor `gates`: a GPU without them
    is never washed. `step_seconds` bounds each attempt at a step, `give_up` a wash, in seconds."""

    seal: NodeSeal
    residue: HostResidue
    scrubber: GpuScrubber | None = None
    gates: GpuGates | None = None
    enclave: Enclave | None = None
    step_seconds: float = 60.0
    give_up: float = 300.0


class LastMade:
    """When the newest record of each slot was made, in milliseconds since 1970: none may be older than the
    one before it, whatever becomes of the wall clock."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known: dict[str, int] = {}

    def of(self, slot_id: str) -> int:
        """0 where there is none. Raises `JournalFailing`."""
        if slot_id not in self._known:
            rows = self._journal.certificates(slot_id, 1)
            self._known[slot_id] = _made_ms(b64decode(rows[-1]["certificate"])) if rows else 0
        return self._known[slot_id]

    def note(self, slot_id: str, made_ms: int) -> None:
        """A record that was signed."""
        self._known[slot_id] = made_ms


def _made_ms(raw: bytes) -> int:
    """Of a certificate of any key and enclave that this node ever had."""
    try:
        return verify_certificate(raw, node_key=None, allow_simulated=True).record.made_ms
    except WashRefused as error:
        log.warning("certificate.unreadable", reason=str(error))
        return 0


@dataclass(slots=True, kw_only=True)
class SlotWash:
    """One slot of one order. `prev` is what its certificate must name, `lease` what of the lease is nobody
    else's yet, `teardown` what was done for all slots together, `residue` what the lease's residue comes to.
    `run` once."""

    spec: SlotSpec
    order: WashSlots
    prev: bytes
    lease: Callable[[], EndedLease]
    teardown: Done
    residue: Callable[[], Awaitable[Done]]
    runtime: ContainerRuntime
    equipment: Equipment
    steps: Steps
    times: Times
    last_made: LastMade
    _renewal: Renewal | None = None
    _renewed: Done | None = None
    _record: bytes = b""
    _done: dict[str, Done] = field(default_factory=dict)
    _is_held_up: bool = False

    async def run(self) -> bytes:
        """Its certificate. Raises `WashStopped`."""
        self._done["teardown"] = self.teardown
        try:
            await self._clean()
            self._done["gates"] = await self._check_gates()
            limit = self.equipment.step_seconds + ENCLAVE_SECONDS
            certificate, _ = await self.steps.do(CERTIFICATE, self._certify, limit=limit)
        finally:
            self._leave()
        return certificate

    async def _clean(self) -> None:
        """Raises `WashStopped` as soon as one of the three has come to nothing: the others are cancelled."""
        stopped: list[WashStopped] = []

        async def carry_out(name: str, step: Callable[[], Awaitable[Done]]) -> None:
            try:
                self._done[name] = await step()
                if name == "enclave" and self._is_held_up and not self._done.keys() >= {"residue", "scrub"}:
                    self._leave()
            except WashStopped as error:
                stopped.append(error)
                for task in tasks:
                    task.cancel()

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(carry_out("residue", self.residue)),
                group.create_task(carry_out("scrub", self._scrub)),
                group.create_task(carry_out("enclave", self._renew_enclave)),
            ]
        if stopped:
            raise stopped[0]

    # -- the GPU --------------------------------------------------------------------------------------------

    async def _scrub(self) -> Done:
        if not self.spec.is_gpu:
            return self.steps.nothing("not_applicable")
        if self.order.tier is WashTier.LIGHT:
            return self.steps.nothing("skipped")
        # The scrub has a limit of its own, of a step's length, and then has to be ended.
        return await self.steps.figures("scrub", self._scrub_once, limit=2 * self.equipment.step_seconds)

    async def _scrub_once(self) -> Figures:
        if self.equipment.scrubber is None or self.equipment.gates is None:
            raise WashUnreachable("there is nothing on this node that could scrub a GPU")
        await self._require_alone()
        await self.equipment.gates.before(self.spec)
        return await self.equipment.scrubber.scrub(self.spec, self.order.fence)

    async def _require_alone(self) -> None:
        """Raises `Dirty` where a container that is not ours was given this GPU."""
        holders = await self.runtime.foreign_gpu_holders()
        holder = next((who for name, who in holders.items() if self.spec.is_meant_by(name)), None)
        if holder is not None:
            raise Dirty(f"in use by a container that is not ours: {holder}")

    async def _check_gates(self) -> Done:
        """A slot without a GPU has no gates, but the host is looked at again for it too."""
        done = await self.steps.figures("gates", self._check_once, limit=self.equipment.step_seconds)
        return done if self.spec.is_gpu else replace(done, result="not_applicable")

    async def _check_once(self) -> Figures:
        await self.equipment.residue.second_look(self.lease())
        if not self.spec.is_gpu:
            return {}
        if self.equipment.gates is None:
            raise WashUnreachable("there is nothing on this node that could look at a GPU")
        await self._require_alone()
        return await self.equipment.gates.check(self.spec)

    # -- the enclave ----------------------------------------------------------------------------------------

    async def _renew_enclave(self) -> Done:
        enclave = self.equipment.enclave
        if enclave is None:
            return self.steps.nothing("not_applicable")
        limit = self.equipment.step_seconds + ENCLAVE_SECONDS
        return await self.steps.figures("enclave", lambda: self._boot(enclave), limit=limit)

    async def _boot(self, enclave: Enclave) -> Figures:
        """See the old one gone and a fresh one wait for its key."""
        self._leave()
        # One for each slot: slots that are washed together need not be done together.
        self._renewal = enclave.renew((self.spec.id,))
        try:
            return await self._renewal.booted()
        except BaseException:
            self._leave()
            raise

    async def _attest(self, enclave: Enclave, renewal: Renewal) -> bytes:
        """A document that lists this slot's record."""
        try:
            return await renewal.attest(self.spec.id, hash_of(self._record))
        except EnclaveRefused:
            raise  # it may be asked again
        except BaseException:
            self._leave()  # nothing comes of this renewal any more
            raise

    def held_up(self, step: str, seconds: float) -> None:
        """A step is tried again, after so long: the fresh enclave gets its key without this slot, which
        begins another renewal when it comes to that. One that has not booted yet is waited for."""
        if step == "enclave" or seconds < HELD_UP_SECONDS or self._record:
            return
        self._is_held_up = True
        if "enclave" in self._done:
            self._leave()

    def _leave(self) -> None:
        if self._renewal is not None:
            self._renewal.leave()
        self._renewal, self._record = None, b""

    # -- the certificate ------------------------------------------------------------------------------------

    async def _certify(self) -> bytes:
        """Record, document, certificate; a renewal of which nothing came is begun anew."""
        enclave, document = self.equipment.enclave, None
        self.last_made.of(self.spec.id)  # no enclave is restarted for a record that cannot be written
        if enclave is not None:
            if self._renewal is None:
                started = self.steps.now()
                figures = await self._boot(enclave)
                self._done["enclave"] = Done(started=started, ended=self.steps.now(), figures=figures)
            renewal = self._renewal
            assert renewal is not None
            self._record = self._record or self._write_record()
            document = await self._attest(enclave, renewal)
        else:
            self._record = self._write_record()
        return self.equipment.seal.issue(self._record, document)

    def _write_record(self) -> bytes:
        """Raises `Malformed` where a figure is none, and `JournalFailing`."""
        order, seal = self.order, self.equipment.seal
        now = self.times.ms(self.steps.now())
        lease = b""
        if order.session_id is not None:
            assert order.tenant is not None
            lease = seal.lease_mark(order.tenant, order.session_id)
        made_ms = max(now, self.last_made.of(self.spec.id))
        record = Record(
            node_key=seal.public_key,
            slot_id=self.spec.id,
            slot_uuid=self.spec.uuid,
            fence=order.fence,
            prev=self.prev,
            made_ms=made_ms,
            tier=order.tier.value,
            lease=lease,
            steps=tuple(self._done[name].step(name, self.times) for name in STEPS),
        )
        self.last_made.note(self.spec.id, made_ms)
        return encode_record(record)
