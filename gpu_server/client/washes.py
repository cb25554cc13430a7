"""The washes around a sealed session: of each of its slots the one before it, and those behind it.

The service names their records by hash (`washed_before`, `washed_after`). What it says is held against the
enclave's attestation, which lists the newest record of each slot, and against the certificates themselves.
What that proves, and what not, is in docs/carwash.md.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gpu_server.client.measurements import Expected
from gpu_server.client.service import Client, Refused
from gpu_server.sealed.attestation import Attestation
from gpu_server.sealed.errors import AttestationRefused, SealedError
from gpu_server.sealed.wash import MAX_CERTIFICATE_BYTES, Verified, WashRefused, verify_certificate

NODE_KEY_BYTES: Final = 32
MAX_SLOTS: Final = 64
"""Of one session; an enclave's document has room for fewer."""
MAX_WASHES: Final = 256
"""Behind one session: one a slot, and one more for each time that a wash was interrupted."""
LOOK_SECONDS: Final = 0.5

Ask = Callable[[str], Awaitable[Mapping[str, Any]]]
"""Gets a path of the service, waiting for it where it is away. Raises `Refused`."""


class WashNotProven(SealedError):
    """It is not proven that a slot of the session was washed.

    `reason` is a short stable code. Of what the service says: missing, unlisted (the enclave was not started
    with that record), not_found. Of a certificate: those of `WashRefused`, and pcr, tier, slot, fence, order
    and epoch (the enclave is the one that served the session).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What the service says of a session's slots: unverified."""

    session_id: str
    fence: int
    slot_ids: tuple[str, ...]
    before: tuple[bytes, ...]
    """Hash of the newest record of each slot when it was leased."""

    @classmethod
    def of(cls, session_id: str, found: Mapping[str, Any]) -> Lease:
        """From a session's JSON. Raises `WashNotProven` (missing, malformed)."""
        fence, slots = found.get("fence"), found.get("gpu_ids")
        if type(fence) is not int or fence <= 0:
            raise WashNotProven("missing", "the service names no fence of the session's lease")
        if not isinstance(slots, list) or not all(isinstance(slot, str) for slot in slots):
            raise WashNotProven("malformed", "the session's slots are no list of names")
        before = _hashes(found, "washed_before", MAX_SLOTS)
        if not slots or len(before) != len(slots):
            raise WashNotProven("missing", "the service does not name a wash of each of the session's slots")
        if len({*slots}) != len(slots) or len({*before}) != len(before):
            raise WashNotProven("slot", "two slots of the session are one")
        return cls(session_id=session_id, fence=fence, slot_ids=tuple(slots), before=before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What certificates are held against: who the node must be (None: one and the same), and the enclave."""

    node_key: bytes | None
    expect: Expected
    attestation: Attestation
    """Of the session."""

    def __post_init__(self) -> None:
        if self.node_key is not None and len(self.node_key) != NODE_KEY_BYTES:
            raise ValueError(f"a node's key has {NODE_KEY_BYTES} bytes")

    async def before(self, ask: Ask, lease: Lease) -> tuple[Verified, ...]:
        """The certificates of the washes before this lease, in the order of its slots.

        Raises `WashNotProven`, and what `ask` raises.
        """
        for h in lease.before:
            if h not in self.attestation.slots:
                raise WashNotProven(
                    "unlisted", f"the enclave does not list {h.hex()}, the wash before the session"
                )
        found: list[Verified] = []
        for slot_id, h in zip(lease.slot_ids, lease.before, strict=True):
            certificate = await self._fetch(ask, h, found[0].record.node_key if found else self.node_key)
            if certificate.record.slot_id != slot_id:
                raise WashNotProven("slot", f"certificate {h.hex()} is of another slot than {slot_id}")
            if certificate.record.fence >= lease.fence:
                raise WashNotProven("fence", f"slot {slot_id} was washed after it was leased, not before")
            found.append(certificate)
        if len({one.record.slot_uuid for one in found}) != len(found):
            raise WashNotProven("slot", "two slots of the session are one device")
        return tuple(found)

    async def after(
        self, client: Client, lease: Lease, before: Sequence[Verified], *, seconds: float
    ) -> tuple[Verified, ...]:
        """The certificates of the washes behind this lease, once each slot has one: as they were made, and
        for one slot several where a wash was interrupted. `before`, where it is known, they must follow.

        Raises `WashNotProven` (missing after `seconds`), and as `Client.call_once`.
        """

        async def ask(path: str) -> Mapping[str, Any]:
            return await client.call_once("GET", path)

        node_key = before[0].record.node_key if before else self.node_key
        until, known = client.clock.now() + seconds, dict[bytes, Verified]()
        while True:
            session = await ask(f"/api/sessions/{lease.session_id}")
            hashes = _hashes(session, "washed_after", MAX_WASHES)
            for h in hashes:
                if h not in known:
                    known[h] = await self._fetch(ask, h, node_key)
                    node_key = known[h].record.node_key
            missing = {*lease.slot_ids} - {known[h].record.slot_id for h in hashes}
            if not missing:
                break
            if client.clock.now() >= until:
                raise WashNotProven(
                    "missing",
                    f"no certificate of slot {', '.join(sorted(missing))} yet: it is being washed, or is in"
                    " quarantine, or the session has not ended",
                )
            await client.clock.sleep_until(client.clock.now() + LOOK_SECONDS)
        found = tuple(known[h] for h in hashes)
        self._check_after(lease, before, found)
        return found

    def _check_after(self, lease: Lease, before: Sequence[Verified], found: Sequence[Verified]) -> None:
        last = {one.record.slot_id: one for one in before}
        marks = {one.record.lease for one in found}
        for one in found:
            record = one.record
            if record.slot_id not in lease.slot_ids:
                raise WashNotProven("slot", f"slot {record.slot_id} was never the session's")
            if record.fence != lease.fence or not record.lease or len(marks) > 1:
                raise WashNotProven("fence", f"a wash of slot {record.slot_id} is not that of this lease")
            previous = last.get(record.slot_id)
            if previous is not None and (
                record.prev != previous.hash or record.slot_uuid != previous.record.slot_uuid
            ):
                raise WashNotProven("order", f"a wash of slot {record.slot_id} does not follow the last")
            if one.attestation is None or one.attestation.epoch == self.attestation.epoch:
                raise WashNotProven("epoch", "the enclave that had the session's keys was not renewed")
            last[record.slot_id] = one

    async def _fetch(self, ask: Ask, h: bytes, node_key: bytes | None) -> Verified:
        """The certificate of this record, verified: of a full wash, with an enclave's document."""
        try:
            answer = await ask(f"/api/certificates/{h.hex()}")
        except Refused as refused:
            if refused.status != 404:
                raise
            raise WashNotProven("not_found", f"the service has no certificate {h.hex()}") from refused
        try:
            found = verify_certificate(
                _certificate(answer),
                node_key=node_key,
                enclave="required",
                allow_simulated=self.attestation.simulated,
            )
            assert found.attestation is not None
            self.expect.check(found.attestation.pcrs)
        except WashRefused as error:
            raise WashNotProven(error.reason, f"certificate {h.hex()}: {error}") from error
        except AttestationRefused as error:
            raise WashNotProven(error.reason, f"certificate {h.hex()}: {error}") from error
        if found.record_hash != h:
            raise WashNotProven("malformed", f"for certificate {h.hex()} came another one")
        if found.record.tier != "full":
            raise WashNotProven("tier", f"certificate {h.hex()} is of a light wash, which scrubs no memory")
        return found


def _hashes(found: Mapping[str, Any], name: str, most: int) -> tuple[bytes, ...]:
    texts = found.get(name)
    if texts is None:
        raise WashNotProven("missing", f"the service names no {name}")
    if not isinstance(texts, list) or len(texts) > most:
        raise WashNotProven("malformed", f"{name} is no list of hashes")
    if not all(isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) for text in texts):
        raise WashNotProven("malformed", f"{name} is no list of hashes")
    return tuple(bytes.fromhex(text) for text in texts)


def _certificate(answer: Mapping[str, Any]) -> bytes:
    """Raises `WashNotProven` (malformed)."""
    text = answer.get("certificate")
    if not isinstance(text, str) or len(text) > 2 * MAX_CERTIFICATE_BYTES:
        raise WashNotProven("malformed", "what came as a certificate is none")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise WashNotProven("malformed", "what came as a certificate is not base64") from None
