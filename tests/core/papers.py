"""Certificates on the tests' own paper: they say of themselves what the real ones do, and are sealed with
something that only these tests know. The real ones are tested elsewhere."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass, replace

from gpu_server.core.errors import CertificateRejected
from gpu_server.core.slots import Certificate, Slot, WashTier

_KEY = b"this node's"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a certificate says. `result` is what its wash came to, `serial` tells it from others like it."""

    slot_id: str
    slot_uuid: str
    fence: int
    prev: bytes
    tier: WashTier = WashTier.FULL
    result: str = "passed"
    serial: int = 0

    def signed(self, key: bytes = _KEY) -> bytes:
        said = {**vars(self), "prev": self.prev.hex()}
        text = json.dumps(said, sort_keys=True)
        return json.dumps([text, hmac.new(key, text.encode(), "sha256").hexdigest()]).encode()


def paper_for(slot: Slot, **lies: object) -> Paper:
    """What would free this slot now, but for these lies."""
    good = Paper(
        slot_id=slot.spec.id,
        slot_uuid=slot.spec.uuid,
        fence=slot.fence,
        prev=slot.prev,
        tier=slot.tier,
    )
    return replace(good, **lies)  # type: ignore[arg-type]


def judge(raw: bytes) -> Certificate:
    """The judge of the tests. Raises `CertificateRejected` for what this node has not signed, and for a wash
    that has not passed."""
    try:
        text, seal = json.loads(raw)
        said = json.loads(text)
    except (ValueError, TypeError) as error:
        raise CertificateRejected("?", "it cannot be read") from error
    if not hmac.compare_digest(seal, hmac.new(_KEY, text.encode(), "sha256").hexdigest()):
        raise CertificateRejected(said["slot_id"], "another's signature")
    if said["result"] != "passed":
        raise CertificateRejected(said["slot_id"], "a step has not passed")
    return Certificate(
        raw=raw,
        hash=hashlib.sha256(raw).digest(),
        record_hash=hashlib.sha256(b"record" + text.encode()).digest(),
        slot_id=said["slot_id"],
        slot_uuid=said["slot_uuid"],
        fence=said["fence"],
        prev=bytes.fromhex(said["prev"]),
        tier=WashTier(said["tier"]),
    )


def certificate_for(slot: Slot, **lies: object) -> Certificate:
    """The certificate that would free this slot now, but for these lies."""
    return judge(paper_for(slot, **lies).signed())
