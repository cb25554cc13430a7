"""The record of a wash: what was done to one slot between two leases, and what was found. `wash.py` signs it.

`C(["gpu-server/1", "wash", node key, slot id, slot uuid, fence, prev, made_ms, [tier, lease, [step …]]])`, a
step being `[name, result, started_ms, ended_ms, [[figure, value] …]]`. No floats: a record has one encoding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Final, TypeAlias

from gpu_server.sealed.canonical import Value, decode, encode
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.names import check_name

VERSION: Final = "gpu-server/1"
KIND: Final = "wash"
STEPS: Final = ("teardown", "residue", "scrub", "enclave", "gates")
"""Every record has these five, in this order."""
RESULTS: Final = ("passed", "not_applicable", "skipped", "failed")
TIERS: Final = ("full", "light")
NO_CERTIFICATE: Final = bytes(32)
"""`prev` of a slot's first certificate."""

KEY_BYTES: Final = 32
HASH_BYTES: Final = 32
MARK_BYTES: Final = 32
MAX_RECORD_BYTES: Final = 8192
MAX_FIGURES: Final = 32
"""Of one step."""
MAX_VALUE: Final = 256
"""Characters or bytes of a figure."""
LAST_MS: Final = 253_402_300_799_999
"""The end of the year 9999."""

_FIGURE: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEXT: Final = re.compile(r"[ -~]*")

Figures: TypeAlias = "Mapping[str, int | str | bytes]"
"""What a step has counted and found: unsigned integers below 2^64, printable ASCII, or bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a wash. Times are in milliseconds since 1970. Checks itself: raises `Malformed`.

    Each result of `RESULTS` can be written down; `wash.py` says which of them count as clean.
    """

    name: str
    result: str
    started_ms: int
    ended_ms: int
    figures: Figures = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in STEPS or self.result not in RESULTS:
            raise Malformed("a step or a result that no wash has")
        if not _is_time(self.started_ms) or not _is_time(self.ended_ms):
            raise Malformed("a step's times are milliseconds since 1970")
        if self.ended_ms < self.started_ms:
            raise Malformed(f"step {self.name} ends before it begins")
        if len(self.figures) > MAX_FIGURES:
            raise Malformed(f"a step has at most {MAX_FIGURES} figures")
        for name, value in self.figures.items():
            if not isinstance(name, str) or not _FIGURE.fullmatch(name):
                raise Malformed(f"a figure of step {self.name} has a name that none has")
            if not _is_value(value):
                raise Malformed(f"figure {name} of step {self.name} is nothing that a record can hold")
        ordered = MappingProxyType(dict(sorted(self.figures.items())))
        object.__setattr__(self, "figures", ordered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was done to one slot. Checks itself: raises `Malformed`.

    `prev` is the hash of the slot's certificate before this one, `NO_CERTIFICATE` for its first. `fence` is
    that of the lease that ended, or of a wash without one. `lease` is the node's mark of tenant and session
    (`NodeSeal.lease_mark`), empty where no lease ended.
    """

    node_key: bytes
    """The node's Ed25519 public key."""
    slot_id: str
    slot_uuid: str
    fence: int
    prev: bytes
    made_ms: int
    """Milliseconds since 1970; no step ends later."""
    tier: str
    lease: bytes
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        check_name(self.slot_id, "the slot's id")
        check_name(self.slot_uuid, "the slot's uuid")
        if not _is_bytes(self.node_key, KEY_BYTES):
            raise Malformed(f"a node's key has {KEY_BYTES} bytes")
        if not _is_bytes(self.prev, HASH_BYTES):
            raise Malformed(f"a certificate's hash has {HASH_BYTES} bytes")
        if not _is_bytes(self.lease, 0, MARK_BYTES):
            raise Malformed(f"the mark of a lease has {MARK_BYTES} bytes, or none")
        if type(self.fence) is not int or not 0 <= self.fence < 1 << 64:
            raise Malformed("a fence is an unsigned integer below 2^64")
        if not _is_time(self.made_ms):
            raise Malformed("a record's time is milliseconds since 1970")
        if self.tier not in TIERS:
            raise Malformed("a tier that no wash has")
        if tuple(step.name for step in self.steps) != STEPS:
            raise Malformed(f"a wash has the steps {', '.join(STEPS)}, in this order")
        if any(step.ended_ms > self.made_ms for step in self.steps):
            raise Malformed("a step ends after the record was made")

    def result(self, step: str) -> str:
        """The result of one of `STEPS`. Raises KeyError."""
        return {found.name: found.result for found in self.steps}[step]


def encode_record(record: Record) -> bytes:
    """The one encoding of a record, at most 8 KiB. Raises `Malformed` for one that is larger."""
    steps: list[Value] = [
        [
            *(step.name, step.result, step.started_ms, step.ended_ms),
            [[name, value] for name, value in step.figures.items()],
        ]
        for step in record.steps
    ]
    findings: list[Value] = [record.tier, record.lease, steps]
    slot: list[Value] = [record.slot_id, record.slot_uuid, record.fence, record.prev, record.made_ms]
    raw = encode([VERSION, KIND, record.node_key, *slot, findings])
    if len(raw) > MAX_RECORD_BYTES:
        raise Malformed(f"a record has at most {MAX_RECORD_BYTES} bytes")
    return raw


def read_record(raw: bytes) -> Record:
    """The record that `raw` is the one encoding of. Raises `Malformed` for anything else."""
    match decode(raw, max_bytes=MAX_RECORD_BYTES):
        case [
            str(version),
            str(kind),
            bytes() as node_key,
            str() as slot_id,
            str() as slot_uuid,
            int() as fence,
            bytes() as prev,
            int() as made_ms,
            [str() as tier, bytes() as lease, [*steps]],
        ] if version == VERSION and kind == KIND and len(steps) == len(STEPS):
            return Record(
                node_key=node_key,
                slot_id=slot_id,
                slot_uuid=slot_uuid,
                fence=fence,
                prev=prev,
                made_ms=made_ms,
                tier=tier,
                lease=lease,
                steps=tuple(_step(step) for step in steps),
            )
    raise Malformed("not the record of a wash")


def hash_of(raw: bytes) -> bytes:
    """SHA-256: `h` of a record, and what the next record's `prev` is of a certificate."""
    return sha256(raw).digest()


def _step(value: Value) -> Step:
    match value:
        case [str() as name, str() as result, int() as started, int() as ended, [*pairs]]:
            figures = _figures(pairs)
            return Step(name=name, result=result, started_ms=started, ended_ms=ended, figures=figures)
    raise Malformed("not a step of a wash")


def _figures(pairs: Sequence[Value]) -> Figures:
    """Figures, which stand in the order of their names, each name once."""
    found: dict[str, int | str | bytes] = {}
    last = ""
    for pair in pairs:
        match pair:
            case [str() as name, int() | str() | bytes() as value] if name > last:
                found[name] = value
                last = name
            case _:
                raise Malformed("a step's figures are pairs, in the order of their names")
    return found


def _is_time(value: object) -> bool:
    return type(value) is int and 0 < value <= LAST_MS


def _is_bytes(value: object, *sizes: int) -> bool:
    return type(value) is bytes and len(value) in sizes


def _is_value(value: object) -> bool:
    if type(value) is int:
        return 0 <= value < 1 << 64
    if type(value) is bytes:
        return len(value) <= MAX_VALUE
    return type(value) is str and len(value) <= MAX_VALUE and _TEXT.fullmatch(value) is not None
