"""Typed calls to a Nitro Security Module, over whatever takes its requests.

What comes back is checked as if it came from a stranger: on hardware it comes from the hypervisor, in a
simulation and in tests from anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import cbor2

from gpu_server.sealed.cose import decode_strictly
from gpu_server.sealed.errors import Malformed

MAX_REQUEST_BYTES: Final = 0x1000
MAX_RESPONSE_BYTES: Final = 0x3000


class NsmError(Exception):
    """The module refused, or its answer is none. `code`: its word (`InvalidArgument`, ...) or `BadAnswer`."""

    def __init__(self, code: str) -> None:
        super().__init__(f"the NSM answered {code}")
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Pcr:
    """A platform configuration register: SHA-384. A locked one cannot be extended any more."""

    data: bytes
    locked: bool


class Nsm:
    """A module behind `process`, which takes a request and gives the answer: the ioctl of /dev/nsm, or
    `SoftwareNsm.process`. Every call raises `NsmError`, and whatever `process` raises."""

    def __init__(self, process: Callable[[bytes], bytes]) -> None:
        self._process = process

    def attestation(
        self, *, public_key: bytes | None = None, user_data: bytes | None = None, nonce: bytes | None = None
    ) -> bytes:
        """An attestation document with these fields in it."""
        fields = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
        return _bytes(self._ask("Attestation", fields), "document")

    def get_random(self, size: int) -> bytes:
        """`size` random bytes, asked for as often as that takes."""
        random = b""
        while len(random) < size:
            piece = _bytes(self._ask("GetRandom"), "random")
            if not piece:
                raise NsmError("BadAnswer")
            random += piece
        return random[:size]

    def describe_pcr(self, index: int) -> Pcr:
        """What is in a register."""
        answer = self._ask("DescribePCR", {"index": index})
        if not isinstance(answer.get("lock"), bool):
            raise NsmError("BadAnswer")
        return Pcr(data=_bytes(answer, "data"), locked=answer["lock"])

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """Extend a register; its new value, SHA384(old || data)."""
        return _bytes(self._ask("ExtendPCR", {"index": index, "data": data}), "data")

    def lock_pcr(self, index: int) -> None:
        """Lock a register: it cannot be extended from now on, and is part of every document."""
        self._ask("LockPCR", {"index": index})

    def _ask(self, name: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        request = cbor2.dumps(name if fields is None else {name: fields})
        if len(request) > MAX_REQUEST_BYTES:
            raise NsmError("InputTooLarge")
        try:
            answer = decode_strictly(self._process(request), max_bytes=MAX_RESPONSE_BYTES)
        except Malformed:
            raise NsmError("BadAnswer") from None
        match answer:
            case {"Error": str(code)}:
                raise NsmError(code if code.isascii() and code.isalpha() and len(code) <= 40 else "BadAnswer")
            case dict() if isinstance(answer.get(name), dict):
                found: dict[str, Any] = answer[name]
                return found
            case str() if answer == name:
                return {}
        raise NsmError("BadAnswer")


def _bytes(answer: dict[str, Any], name: str) -> bytes:
    value = answer.get(name)
    if not isinstance(value, bytes):
        raise NsmError("BadAnswer")
    return value
