"""What every scrubber and all gates promise: the real ones over parts that are played, and the fakes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.gpu_gates import NvmlGates
from gpu_server.drivers.scrubber import ProcessScrubber
from gpu_server.ports import Dirty, GpuGates, GpuScrubber, WashUnreachable
from tests.fakes.clock import FakeClock
from tests.fakes.gpu_wash import FakeGates, FakeScrubber, scrub_figures
from tests.fakes.nvml import FakeNvml, Gpu

SPEC = SlotSpec(id="0", uuid="GPU-aa", name="NVIDIA L40S", memory_mb=1024, is_gpu=True)
Make = Callable[[str], GpuScrubber]


def fake_scrubber(how: str) -> GpuScrubber:
    scrubber = FakeScrubber()
    scrubber.failure = {"passed": None, "failed": Dirty("7 words"), "unavailable": WashUnreachable("later")}[
        how
    ]
    return scrubber


def process_scrubber(how: str) -> GpuScrubber:
    figures = scrub_figures("GPU-aa") if how == "passed" else {}
    said = json.dumps({"result": how, "reason": "", "figures": figures})
    return ProcessScrubber((sys.executable, "-c", f"print({said!r})"), environment={})


@pytest.fixture(params=[fake_scrubber, process_scrubber])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


async def test_a_scrub_ends_in_one_of_three_ways(make: Make) -> None:
    """Figures that a record holds, `Dirty`, or `WashUnreachable`."""
    assert dict(await make("passed").scrub(SPEC, 7)) == scrub_figures("GPU-aa")
    with pytest.raises(Dirty):
        await make("failed").scrub(SPEC, 7)
    with pytest.raises(WashUnreachable):
        await make("unavailable").scrub(SPEC, 7)


async def test_two_gpus_are_scrubbed_at_once(make: Make) -> None:
    """The same scrubber serves all; after its close too."""
    scrubber = make("passed")
    both = await asyncio.gather(scrubber.scrub(SPEC, 7), scrubber.scrub(SPEC, 8))
    assert [dict(figures) for figures in both] == [scrub_figures("GPU-aa")] * 2
    assert await scrubber.sweep() == 0
    scrubber.close()
    scrubber.close()


def fake_gates(folder: Path) -> tuple[GpuGates, Callable[[], None]]:
    gates = FakeGates()

    def soil() -> None:
        gates.refusal = gates.failure = Dirty("1 processes use the GPU")

    return gates, soil


def nvml_gates(folder: Path) -> tuple[GpuGates, Callable[[], None]]:
    gpu = Gpu("GPU-aa")
    kmsg = folder / "kmsg"
    gates = NvmlGates(folder, FakeClock(), nvml=FakeNvml(gpus=[gpu]), kmsg=kmsg, boot="b", patience=0.0)

    def soil() -> None:
        gpu.processes = (1, 0, None)

    return gates, soil


@pytest.mark.parametrize("build", [fake_gates, nvml_gates])
async def test_gates_pass_or_are_dirty(
    build: Callable[[Path], tuple[GpuGates, Callable[[], None]]], tmp_path: Path
) -> None:
    """The same figures from all of them, and `Dirty` before and after a scrub."""
    gates, soil = build(tmp_path)
    await gates.before(SPEC)
    figures = await gates.check(SPEC)
    wanted = {"processes", "memory_used", "memory_idle", "recovery_action", "kernel_log", "xids"}
    assert figures.keys() == wanted
    assert figures["processes"] == 0
    soil()
    for look in (gates.before, gates.check):
        with pytest.raises(Dirty, match="1 processes"):
            await look(SPEC)
