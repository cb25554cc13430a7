"""Certificates that nobody has signed, for measurements of a node alone: cheap to make and to judge."""

from __future__ import annotations

from hashlib import sha256

from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.slots import Certificate, Slot


class Unsigned:
    """Makes certificates, and judges those that it has made."""

    def __init__(self) -> None:
        self._made: dict[bytes, Certificate] = {}

    def judge(self, raw: bytes) -> Certificate:
        """The node's judge."""
        return self._made.pop(raw)

    def wash(self, slot: Slot) -> tuple[ev.Event, ev.Event]:
        """What a wash of this slot comes to: its certificate, and that it is on the disk."""
        raw = f"{slot.spec.id} {slot.fence}".encode() + slot.prev
        hash_ = sha256(raw).digest()
        self._made[raw] = Certificate(
            raw=raw,
            hash=hash_,
            record_hash=hash_,
            slot_id=slot.spec.id,
            slot_uuid=slot.spec.uuid,
            fence=slot.fence,
            prev=slot.prev,
            tier=slot.tier,
        )
        issued = ev.CertificateIssued(certificate=raw)
        return issued, ev.CertificateSecured(slot_id=slot.spec.id, certificate_hash=hash_)

    def wash_all(self, node: Node) -> None:
        """Every slot is free after that."""
        for slot in node.slots:
            for event in self.wash(slot):
                node.handle(event, 0.0)
