"""Attestation documents for tests: real ones where they are at hand, and made ones, good and bad."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest

from gpu_server.sealed import canonical
from gpu_server.sealed.cose import decode_strictly, read_sign1
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm, sign_document
from gpu_server.sealed.software_pki import Holder, issue_below, make_root

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
PCRS = {0: b"\1" * 48, 1: b"\2" * 48, 2: b"\3" * 48, 8: b"\x08" * 48}
NONCE = bytes(range(32))
SLOTS = (b"a" * 32, b"b" * 32)
USER_DATA = canonical.encode(["gpu-server/1", list(SLOTS)])
PUBLIC_KEY = b"spki" * 70
MODULE_ID = "i-0123456789abcdef0-enc0123456789abcdef"

REAL = Path(__file__).parents[3] / "shared/vectors"
"""Documents of real hardware, beside the repository."""


def real_document(name: str) -> bytes:
    """A document of real hardware; skips the test where it is not at hand."""
    path = REAL / f"{name}.cbor"
    if not path.is_file():
        pytest.skip("the documents of real hardware are not beside this repository")
    return path.read_bytes()


def software_nsm(**options: Any) -> SoftwareNsm:
    """A module whose clock stands at NOW."""
    return SoftwareNsm(PCRS, module_id=MODULE_ID, **{"now": lambda: NOW, **options})


def software_document(nsm: SoftwareNsm | None = None) -> bytes:
    """A document with everything in it, made at NOW."""
    made = Nsm((nsm or software_nsm()).process)
    return made.attestation(public_key=PUBLIC_KEY, user_data=USER_DATA, nonce=NONCE)


def payload_of(document: bytes) -> dict[str, Any]:
    """What is in a document, unverified."""
    payload: dict[str, Any] = decode_strictly(
        read_sign1(document, max_bytes=1 << 16).payload, max_bytes=1 << 16
    )
    return payload


class Forge:
    """A root of its own and all keys below it: signs whatever a test wants to have signed."""

    def __init__(self, root: Holder | None = None) -> None:
        self.root = root or make_root(NOW)
        *self.middle, self.leaf = issue_below(self.root, module_id=MODULE_ID, now=NOW)

    @property
    def bundle(self) -> list[bytes]:
        """Root first."""
        return [self.root.der, *(holder.der for holder in self.middle)]

    def payload(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A document's payload, with some fields changed."""
        plain = {
            "module_id": MODULE_ID,
            "digest": "SHA384",
            "timestamp": int(NOW.timestamp() * 1000),
            "pcrs": dict(PCRS),
            "certificate": self.leaf.der,
            "cabundle": self.bundle,
            "public_key": PUBLIC_KEY,
            "user_data": USER_DATA,
            "nonce": NONCE,
        }
        return {**plain, **(changes or {})}

    def document(self, changes: Mapping[str, Any] | None = None) -> bytes:
        """A document, signed, with some fields changed."""
        return sign_document(cbor2.dumps(self.payload(changes)), self.leaf.key)
