"""An enclave in this process: the real program over a software NSM, and failures to order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from enclave.program import Program

from gpu_server.ports import EnclaveDown, EnclaveHealth, EnclaveRefused
from gpu_server.sealed.canonical import Value
from gpu_server.sealed.frames import Code, Op, Request
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm

MEASUREMENTS = {index: bytes([index + 1]) * 48 for index in range(3)}


class FakeEnclave:
    """`Enclave` without a process, a socket or a host.

    Switches: `down` says why it is away; `refuses[op]` is the code that it answers with; `gates[op]` holds an
    operation until the event is set; `lies[op]` is what it answers instead. `calls` tells what was asked.
    """

    mode: Literal["simulated", "nitro"] = "simulated"

    def __init__(self, nsm: SoftwareNsm | None = None) -> None:
        self.restarts = 0
        self.down: str | None = None
        self.refuses: dict[Op, str] = {}
        self.gates: dict[Op, asyncio.Event] = {}
        self.lies: dict[Op, bytes] = {}
        self.calls: list[Op] = []
        self._nsm = nsm or SoftwareNsm(MEASUREMENTS)
        self._boot()

    def _boot(self) -> None:
        self._program = Program(Nsm(self._nsm.process), mode=self.mode, mix=lambda _: None)
        code, result = self._program.handle(Request(op=Op.INIT, id=1, args=()))
        assert code is Code.OK
        assert isinstance(result[0], bytes)
        self.epoch = result[0]

    def restart(self) -> None:
        """It has died and is there again, with another key."""
        self.restarts += 1
        self._boot()

    @property
    def health(self) -> EnclaveHealth:
        up = self.down is None
        return EnclaveHealth(healthy=up, reason=self.down, epoch=self.epoch if up else None)

    async def attest(self, nonce: bytes) -> bytes:
        return await self._ask(Op.HELLO, nonce)

    async def grant(
        self,
        *,
        tenant: str,
        pool: str,
        kms_key_arn: str,
        session_id: str,
        worker_key: bytes,
        wrapped_key: bytes,
        for_recipient: bytes,
    ) -> bytes:
        names = (tenant, pool, kms_key_arn, session_id)
        return await self._ask(Op.GRANT, *names, worker_key, wrapped_key, for_recipient)

    async def _ask(self, op: Op, *args: str | bytes) -> bytes:
        self.calls.append(op)
        if op in self.gates:
            await self.gates[op].wait()
        if self.down is not None:
            raise EnclaveDown(self.down)
        if op in self.refuses:
            raise EnclaveRefused(self.refuses[op], "to order")
        if op in self.lies:
            return self.lies[op]
        values: Sequence[Value] = args
        code, result = self._program.handle(Request(op=op, id=1, args=values))
        if code is not Code.OK:
            raise EnclaveRefused(code, "the program says so")
        assert isinstance(result[0], bytes)
        return result[0]
