"""What a client expects of the enclave: its measurements (PCRs), of which PCR0 names the whole program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

PCR_BYTES: Final = 48
"""SHA-384."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Measurements to insist on, each 96 hex digits; None for one that may be any.

    PCR0: kernel, command line and all ramdisks. PCR1: kernel, command line, first ramdisk. PCR2: the rest.
    PCR3: the IAM role of the machine. PCR8: the certificate that signed the image (AWS Nitro Enclaves User
    Guide, "Cryptographic attestation"). Raises ValueError for what is no measurement.
    """

    pcr0: str | None = None
    pcr1: str | None = None
    pcr2: str | None = None
    pcr3: str | None = None
    pcr8: str | None = None

    def __post_init__(self) -> None:
        for index, value in self._given().items():
            if len(value) != 2 * PCR_BYTES or not re.fullmatch(r"[0-9A-Fa-f]+", value):
                raise ValueError(f"PCR{index} must be {2 * PCR_BYTES} hex digits")
            if not any(bytes.fromhex(value)):
                raise ValueError(f"PCR{index} is all zero: that is an enclave in debug mode")

    @property
    def pcrs(self) -> Mapping[int, bytes]:
        """Index -> measurement, of those that are given."""
        return {index: bytes.fromhex(value) for index, value in self._given().items()}

    def _given(self) -> dict[int, str]:
        every = {0: self.pcr0, 1: self.pcr1, 2: self.pcr2, 3: self.pcr3, 8: self.pcr8}
        return {index: value for index, value in every.items() if value is not None}
