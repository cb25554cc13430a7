"""One restart of the enclave, and the washes that share it: what is known of it, and when its key is due.

There is no I/O and no task here. `enclave.py` carries a restart out, and tells it what has come of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from gpu_server.ports import Clock, EnclaveDown, EnclaveRefused, RuntimeUnreachable
from gpu_server.sealed.frames import MAX_SLOTS, Code
from gpu_server.sealed.wash import Figures

LINGER_SECONDS: Final = 10.0
"""So long the first wash that has handed in a record waits for the others."""
HOLD_SECONDS: Final = 30.0
"""So long a fresh enclave waits for any record: without its key nobody can open a session, and clients wait a
minute for that. A wash that takes longer gets another restart, once its record can be written."""
OPEN_SECONDS: Final = 10.0
"""So long the next restart waits where openings were refused during the last one: they are to come again
after `RETRY_AFTER_SECONDS`, and a pause of their own."""
HASH_BYTES: Final = 32

Failure = EnclaveDown | RuntimeUnreachable
Hello = Callable[[bytes, bytes], Awaitable[bytes]]
"""Epoch and nonce -> a document of that life of the enclave. Raises `EnclaveDown` and `EnclaveRefused`."""


class Restart:
    """The enclave is ended, booted, given the newest records, and makes its key.

    `changed` is called when a wash has done something that may make the next step due.
    """

    def __init__(self, clock: Clock, changed: Callable[[], None]) -> None:
        self._clock, self._changed = clock, changed
        self._washes: list[WashRenewal] = []
        self._progress = asyncio.Event()  # replaced at each: who waits looks again
        self._figures: Figures | None = None
        self._booted_at = self._made_at = 0.0
        self._taken: Mapping[str, bytes] | None = None
        self._epoch: bytes | None = None
        self._failure: Failure | None = None

    def join(self, slot_ids: tuple[str, ...], hello: Hello) -> WashRenewal:
        """One more wash. Not after `close`."""
        assert self._taken is None
        self._washes.append(WashRenewal(self, slot_ids, hello))
        return self._washes[-1]

    @property
    def is_wanted(self) -> bool:
        """Whether a wash waits for it."""
        return bool(self._washes)

    @property
    def progress(self) -> tuple[int, int]:
        """How many washes have handed in all their records, of how many."""
        return sum(wash.is_complete for wash in self._washes), len(self._washes)

    @property
    def due_at(self) -> float:
        """When its key is to be made, once it is booted, whoever is late."""
        late_at = self._booted_at + HOLD_SECONDS
        if all(wash.is_complete for wash in self._washes):
            return self._booted_at
        first = min((wash.handed_at for wash in self._washes if wash.handed_at is not None), default=late_at)
        return min(first + LINGER_SECONDS, late_at)

    def served_at(self, *, turned_away: bool) -> float:
        """Until when another restart must wait, so that these washes have their documents of this one, and
        whoever was turned away meanwhile has opened a session."""
        waits = any(wash.handed and not wash.is_served for wash in self._washes)
        return self._made_at + max(LINGER_SECONDS if waits else 0.0, OPEN_SECONDS if turned_away else 0.0)

    def booted(self, figures: Figures) -> None:
        """The old one was seen gone, and the fresh one answers."""
        self._figures, self._booted_at = figures, self._clock.now()
        self._tell()

    def close(self) -> Mapping[str, bytes]:
        """Its key is being made: nobody joins or hands in any more. Slot id -> newest record hash."""
        self._taken = {slot_id: found for wash in self._washes for slot_id, found in wash.handed.items()}
        return self._taken

    def made(self, epoch: bytes) -> None:
        """Its key is there."""
        self._epoch, self._made_at = epoch, self._clock.now()
        self._tell()

    def failed(self, failure: Failure) -> None:
        """It will not be made any more."""
        self._failure = failure
        self._tell()

    # -- for its washes -------------------------------------------------------------------------------------

    async def until_booted(self) -> Figures:
        """Raises why not."""
        while True:
            self._require()
            if self._figures is not None:
                return self._figures
            await self._progress.wait()

    async def until_made(self, slot_id: str, record_hash: bytes) -> bytes:
        """The epoch of the enclave that was given this record. Raises why there is none."""
        while True:
            self._require()
            if self._taken is not None and self._taken.get(slot_id) != record_hash:
                raise EnclaveDown("it was started without this record, which came too late or was withdrawn")
            if self._epoch is not None:
                return self._epoch
            await self._progress.wait()

    def now(self) -> float:
        return self._clock.now()

    def changed(self, gone: WashRenewal | None = None) -> None:
        """A wash has handed in, has its document, or is gone."""
        if gone is not None and gone in self._washes:
            self._washes.remove(gone)
        self._changed()

    def _require(self) -> None:
        if self._failure is not None:  # each gets one of his own: tracebacks grow
            raise type(self._failure)(str(self._failure)) from self._failure

    def _tell(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()


class WashRenewal:
    """`Renewal`: one wash in a restart."""

    def __init__(self, restart: Restart, slot_ids: tuple[str, ...], hello: Hello) -> None:
        self._restart, self._slot_ids, self._hello = restart, frozenset(slot_ids), hello
        self._left = False
        self._documented: set[str] = set()
        self.handed: dict[str, bytes] = {}
        """Slot id -> newest record hash."""
        self.handed_at: float | None = None
        """When the first of them came."""

    @property
    def is_complete(self) -> bool:
        """Whether all its slots' records are there."""
        return self.handed.keys() == self._slot_ids

    @property
    def is_served(self) -> bool:
        """Whether each record has its document."""
        return self.handed.keys() <= self._documented

    async def booted(self) -> Figures:
        """See the port."""
        with self._taking_part():
            return await self._restart.until_booted()

    async def attest(self, slot_id: str, record_hash: bytes) -> bytes:
        """See the port."""
        if slot_id not in self._slot_ids:
            raise ValueError(f"slot {slot_id} is not of this wash")
        if len(record_hash) != HASH_BYTES:  # one that is none would spoil it for all
            raise EnclaveRefused(Code.MALFORMED, f"a record's hash has {HASH_BYTES} bytes")
        with self._taking_part():
            await self._restart.until_booted()
            self.handed[slot_id] = record_hash
            if self.handed_at is None:
                self.handed_at = self._restart.now()
            self._restart.changed()
            epoch = await self._restart.until_made(slot_id, record_hash)
            document = await self._hello(epoch, record_hash)
            self._documented.add(slot_id)
            self._restart.changed()
            return document

    def leave(self) -> None:
        """See the port."""
        if not self._left:
            self._left = True
            self._restart.changed(gone=self)

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        if self._left:
            raise EnclaveDown("this wash has left the restart")
        try:
            yield
        except (EnclaveDown, RuntimeUnreachable, asyncio.CancelledError):
            self.leave()
            raise


def newest(records: Mapping[str, bytes], taken: Mapping[str, bytes]) -> tuple[bytes, ...]:
    """What INIT is given: each slot's newest record hash. A slot that has none yet (only zeros) is left out.
    Raises `EnclaveDown` for more slots than a document names."""
    found = tuple(record for record in {**records, **taken}.values() if any(record))
    if (why := too_many(len(found))) is not None:
        raise EnclaveDown(why)
    return found


def too_many(slots: int) -> str | None:
    """Why an enclave cannot serve so many slots; None where it can."""
    if slots <= MAX_SLOTS:
        return None
    return (
        f"this node has {slots} slots, and an attestation document names the wash records of {MAX_SLOTS}:"
        " serve fewer (GPU_DEVICE_IDS, CPU_SLOTS), or set ENCLAVE=off"
    )
