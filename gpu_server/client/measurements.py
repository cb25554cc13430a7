"""What a client expects of the enclave: its measurements (PCRs), of which PCR0 names the whole program."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from gpu_server.sealed.errors import AttestationRefused

PCR_BYTES: Final = 48
"""SHA-384."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Measurements to insist on, each 96 hex digits; None for one that may be any. Several for one register
    are alternatives: during an upgrade, PCR0 of the old program and of the new one.

    PCR0: kernel, command line and all ramdisks. PCR1: kernel, command line, first ramdisk. PCR2: the rest.
    PCR3: the IAM role of the machine. PCR8: the certificate that signed the image (AWS Nitro Enclaves User
    Guide, "Cryptographic attestation"). Raises ValueError for what is no measurement.
    """

    pcr0: str | Collection[str] | None = None
    pcr1: str | Collection[str] | None = None
    pcr2: str | Collection[str] | None = None
    pcr3: str | Collection[str] | None = None
    pcr8: str | Collection[str] | None = None

    def __post_init__(self) -> None:
        for index, value in self._given().items():
            values = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, f"pcr{index}", values)  # nobody can add one later
            if not values:
                raise ValueError(f"PCR{index} has no value that would do: None is for any")
            for text in values:
                _check(index, text)

    @property
    def pcrs(self) -> Mapping[int, tuple[bytes, ...]]:
        """Index -> the measurements that will do, of those that are given."""
        return {index: tuple(map(bytes.fromhex, values)) for index, values in self._given().items()}

    @property
    def names_a_program(self) -> bool:
        """Whether a program is named, or who signs it: without either any enclave would do."""
        return self.pcr0 is not None or self.pcr8 is not None

    def check(self, found: Mapping[int, bytes]) -> None:
        """Compare with a verified document's. Raises `AttestationRefused` (pcr)."""
        for index, wanted in self.pcrs.items():
            if found.get(index) not in wanted:
                raise AttestationRefused("pcr", f"PCR{index} is not what is expected")

    def _given(self) -> dict[int, str | Collection[str]]:
        every = {0: self.pcr0, 1: self.pcr1, 2: self.pcr2, 3: self.pcr3, 8: self.pcr8}
        return {index: value for index, value in every.items() if value is not None}


def _check(index: int, value: str) -> None:
    if len(value) != 2 * PCR_BYTES or not re.fullmatch(r"[0-9A-Fa-f]+", value):
        raise ValueError(f"PCR{index} must be {2 * PCR_BYTES} hex digits")
    if not any(bytes.fromhex(value)):
        raise ValueError(f"PCR{index} is all zero: that is an enclave in debug mode")
