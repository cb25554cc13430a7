"""An enclave in this process: the real program over a software NSM, and failures to order."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Literal

from enclave.program import Program

from gpu_server.enclave_renewal import Restart, newest
from gpu_server.ports import EnclaveDown, EnclaveHealth, EnclaveRefused, RuntimeUnreachable
from gpu_server.sealed.canonical import Value
from gpu_server.sealed.frames import Code, Op, Request
from gpu_server.sealed.grant import Binding
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm
from gpu_server.sealed.wash import Figures
from tests.fakes.clock import FakeClock

MEASUREMENTS = {index: bytes([index + 1]) * 48 for index in range(3)}
BEING_RESTARTED = "it is being restarted by a wash"


class FakeEnclave:
    """`Enclave` without a process, a socket or a host.

    Switches: `down` says why it is away; `refuses[op]` is the code that it answers with; `gates[op]` holds an
    operation until the event is set; `lies[op]` is what it answers instead. `calls` tells what was asked.

    For washes: `boots` is an event that holds each boot until it is set; `boot_failures` are what the next
    boots fail with, in order; `records` are the newest records of slots that no wash hands in; `late` ends a
    restart without those that have not handed in. Its clock does not move by itself.
    """

    mode: Literal["simulated", "nitro"] = "simulated"

    def __init__(self, nsm: SoftwareNsm | None = None, records: Mapping[str, bytes] | None = None) -> None:
        self.restarts = 0
        self.down: str | None = None
        self.refuses: dict[Op, str] = {}
        self.gates: dict[Op, asyncio.Event] = {}
        self.lies: dict[Op, bytes] = {}
        self.calls: list[Op] = []
        self.boots = asyncio.Event()
        self.boots.set()
        self.boot_failures: list[EnclaveDown | RuntimeUnreachable] = []
        self.records = dict(records or {})
        self._nsm = nsm or SoftwareNsm(MEASUREMENTS)
        self._restart: Restart | None = None
        self._booted = False
        self._boot()
        self._make_key()

    def _boot(self) -> None:
        self._program = Program(Nsm(self._nsm.process), mode=self.mode, mix=lambda _: None)

    def _make_key(self, taken: Mapping[str, bytes] | None = None) -> None:
        records: Sequence[Value] = newest(self.records, taken or {})
        code, result = self._program.handle(Request(op=Op.INIT, id=1, args=list(records)))
        assert code is Code.OK
        assert isinstance(result[0], bytes)
        self.epoch = result[0]

    def restart(self) -> None:
        """It has died and is there again, with another key. Washes that were renewing it begin again."""
        self.restarts += 1
        if self._restart is not None:
            self._restart.failed(EnclaveDown("it has died"))
            self._restart = None
        self._boot()
        self._make_key()

    def late(self) -> None:
        """Whoever has not handed in yet is too late."""
        if self._restart is not None:
            self._finish(self._restart)

    @property
    def health(self) -> EnclaveHealth:
        why = BEING_RESTARTED if self._restart is not None and self.down is None else self.down
        return EnclaveHealth(healthy=why is None, reason=why, epoch=self.epoch if why is None else None)

    def renew(self, slot_ids: tuple[str, ...]) -> FakeRenewal:
        if self._restart is None:
            self._restart, self._booted = Restart(FakeClock(), self._changed), False
        return FakeRenewal(self, self._restart, slot_ids)

    async def attest(self, nonce: bytes) -> bytes:
        return await self._ask(Op.HELLO, nonce)

    async def grant(self, binding: Binding, for_recipient: bytes) -> bytes:
        names = (binding.tenant, binding.pool, binding.kms_key_arn, binding.session_id)
        try:
            return await self._ask(Op.GRANT, *names, binding.worker_key, binding.wrapped_key, for_recipient)
        except EnclaveRefused:
            self._require(binding.epoch)
            raise

    async def hello(self, epoch: bytes, nonce: bytes) -> bytes:
        self._require(epoch)
        document = await self.attest(nonce)
        self._require(epoch)
        return document

    def _require(self, epoch: bytes) -> None:
        if self.health.epoch != epoch:
            raise EnclaveDown("it was started anew meanwhile, with another key")

    # -- renewals -------------------------------------------------------------------------------------------

    async def boot(self, restart: Restart) -> None:
        """By the first wash that waits for it."""
        await self.boots.wait()
        if restart is not self._restart or self._booted:
            return
        if self.down is not None or self.boot_failures:
            failure = self.boot_failures.pop(0) if self.boot_failures else EnclaveDown(self.down or "")
            self._restart = None
            restart.failed(failure)
            return
        self.restarts += 1
        self._boot()
        self._booted = True
        restart.booted({"boot_ms": 0, "old": "terminated", "version": "fake"})
        self._changed()

    def _changed(self) -> None:
        restart = self._restart
        if restart is None:
            return
        if self._booted:
            done, of = restart.progress
            if done == of:
                self._finish(restart)
        elif not restart.is_wanted:
            self._restart = None

    def _finish(self, restart: Restart) -> None:
        self._restart = None
        self._make_key(restart.close())
        restart.made(self.epoch)

    async def _ask(self, op: Op, *args: str | bytes) -> bytes:
        self.calls.append(op)
        if op in self.gates:
            await self.gates[op].wait()
        if (why := self.health.reason) is not None:
            raise EnclaveDown(why)
        if op in self.refuses:
            raise EnclaveRefused(self.refuses[op], "to order")
        if op in self.lies:
            return self.lies[op]
        values: Sequence[Value] = args
        code, result = self._program.handle(Request(op=op, id=1, args=list(values)))
        if code is not Code.OK:
            raise EnclaveRefused(code, "the program says so")
        assert isinstance(result[0], bytes)
        return result[0]


class FakeRenewal:
    """`Renewal`; the first wash of a restart that waits for it makes it boot."""

    def __init__(self, enclave: FakeEnclave, restart: Restart, slot_ids: tuple[str, ...]) -> None:
        self._enclave, self._restart = enclave, restart
        self._wash = restart.join(slot_ids, enclave.hello)

    async def booted(self) -> Figures:
        try:
            await self._enclave.boot(self._restart)
        except asyncio.CancelledError:
            self.leave()
            raise
        return await self._wash.booted()

    async def attest(self, slot_id: str, record_hash: bytes) -> bytes:
        await self.booted()
        return await self._wash.attest(slot_id, record_hash)

    def leave(self) -> None:
        self._wash.leave()
