"""A scrubber and gates that pass, until a test lets them fail."""

from __future__ import annotations

import asyncio

from gpu_server.core.slots import SlotSpec
from gpu_server.sealed.wash import Figures

SIZE = 1 << 30


def scrub_figures(uuid: str, size: int = SIZE) -> dict[str, int | str]:
    """The figures of a scrub that passed."""
    written = ("written", "compared", "inverted", "inverse_compared", "zeroed", "zero_compared")
    looks = ("write", "compare", "inverse", "inverse_compare", "zero", "zero_compare")
    times = ("open", "allocate", "look", *looks, "free")
    return {
        "uuid": uuid,
        "device": "NVIDIA L40S",
        "bytes_total": size,
        "bytes_reserved": 0,
        "bytes_free": size,
        **dict.fromkeys(("bytes_allocated", *written), size),
        "mismatched": 0,
        "inverse_mismatched": 0,
        "zero_mismatched": 0,
        "nonzero_before": 0,
        "sampled": 3072,
        "chunks": 1,
        **{f"{time}_us": 1 for time in times},
    }


class FakeScrubber:
    """`GpuScrubber` without a GPU. `failure` is raised by every scrub; `hold` lets it wait first."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.scrubbed: list[tuple[str, int]] = []
        """UUID and fence of every scrub that was begun."""
        self.running = 0
        self.leftovers = 0
        """How many an earlier life has left."""
        self.closed = False

    async def scrub(self, spec: SlotSpec, fence: int) -> Figures:
        self.scrubbed.append((spec.uuid, fence))
        self.running += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.failure is not None:
                raise self.failure
            return scrub_figures(spec.uuid, spec.memory_mb << 20 or SIZE)
        finally:
            self.running -= 1

    async def sweep(self) -> int:
        if self.failure is not None:
            raise self.failure
        swept, self.leftovers = self.leftovers, 0
        return swept

    def close(self) -> None:
        self.closed = True


class FakeGates:
    """`GpuGates` without a GPU. `refusal` is raised before a scrub, `failure` after it."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.asked: list[tuple[str, str]] = []
        """`before` or `check`, and the UUID."""

    async def before(self, spec: SlotSpec) -> None:
        self.asked.append(("before", spec.uuid))
        if self.refusal is not None:
            raise self.refusal

    async def check(self, spec: SlotSpec) -> Figures:
        self.asked.append(("check", spec.uuid))
        if self.failure is not None:
            raise self.failure
        return {
            "processes": 0,
            "memory_used": 3 << 20,
            "memory_idle": 3 << 20,
            "recovery_action": "none",
            "kernel_log": "read",
            "xids": 0,
        }
