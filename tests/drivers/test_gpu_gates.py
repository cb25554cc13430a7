"""The gates of a GPU, over an NVML and a kernel's log that are played."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.gpu_gates import PATIENCE_SECONDS, TOLERANCE_BYTES, NvmlGates
from gpu_server.ports import Dirty, WashUnreachable
from gpu_server.sealed.wash import Step
from tests.fakes.clock import FakeClock
from tests.fakes.nvml import MIB, FakeNvml, Gpu

SPEC = SlotSpec(id="0", uuid="GPU-aa", name="NVIDIA L40S", memory_mb=46068, is_gpu=True)
OTHER = SlotSpec(id="1", uuid="GPU-bb", name="NVIDIA L40S", memory_mb=46068, is_gpu=True)


class Place:
    """A folder with a kernel's log, two GPUs, and gates over them, life after life."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, FakeClock()
        self.gpu, self.other = Gpu("GPU-aa"), Gpu("GPU-bb", pci=(0, 0xAF, 0))
        self.nvml = FakeNvml(gpus=[self.gpu, self.other])
        self.log: list[bytes] = [b"6,0,1,-;Linux version 6\n"]

    def gates(self, boot: str = "boot 1", *, patience: float = 0.0, **more: Any) -> NvmlGates:
        """In a life of its own. Without patience: what is found is told at once."""
        given = {"nvml": self.nvml, "kmsg": self.folder / "kmsg", "boot": boot, "patience": patience}
        return NvmlGates(self.folder, self.clock, **{**given, **more})

    def xid(self, number: int, bus: str = "3b") -> None:
        head = f"4,{len(self.log)},1,-;"
        self.log.append(f"{head}NVRM: Xid (PCI:0000:{bus}:00): {number}, pid=7\n".encode())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    from gpu_server.drivers import gpu_gates
    from gpu_server.drivers.kernel_log import KernelLog, parse

    made = Place(tmp_path)

    def read(path: Path) -> KernelLog | None:
        assert path == tmp_path / "kmsg"
        return parse(iter(made.log))

    monkeypatch.setattr(gpu_gates, "read_kernel_log", read)
    return made


async def test_a_clean_gpu_passes_with_what_was_seen(place: Place) -> None:
    """In figures that a record holds."""
    gates = place.gates()
    await gates.before(SPEC)
    figures = await gates.check(SPEC)
    assert figures == {
        "processes": 0,
        "memory_used": 3 * MIB,
        "memory_idle": 3 * MIB,
        "recovery_action": "none",
        "kernel_log": "read",
        "xids": 0,
    }
    Step(name="gates", result="passed", started_ms=1, ended_ms=1, figures=figures)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ecc": 1}, "1 uncorrected ECC"),
        ({"rows": (0, 1, 1, 0)}, "reset"),
        ({"rows": (0, 1, 0, 1)}, "could not be remapped"),
        ({"rows": None, "pages": 1}, "page waits"),
        ({"action": 1}, "recovery: gpu reset"),
        ({"action": 99}, "recovery: number 99"),
        ({"processes": (1, 0, 0)}, "1 processes"),
        ({"processes": (0, 2, None)}, "2 processes"),
        ({"processes": (0, None, 3)}, "3 processes"),
        ({"lost": True}, "lost"),
        ({"used": 4000 * MIB}, "4000 MiB of the GPU are in use"),
    ],
)
async def test_each_finding_is_dirty(place: Place, change: dict[str, Any], why: str) -> None:
    """Each of them alone; another GPU's are not this one's."""
    gates = place.gates()
    for name, value in change.items():
        setattr(place.gpu, name, value)
    with pytest.raises(Dirty, match=why):
        await gates.check(SPEC)
    assert await gates.check(OTHER)
    assert "GPU-aa" not in (place.folder / "gpus.json").read_text()


async def test_before_a_scrub_nobody_uses_it(place: Place) -> None:
    """Memory and faults are for the look after it."""
    gates = place.gates()
    place.gpu.used, place.gpu.ecc = 9000 * MIB, 4
    await gates.before(SPEC)
    place.gpu.processes = (1, 0, None)
    with pytest.raises(Dirty, match="1 processes"):
        await gates.before(SPEC)


async def test_a_driver_that_knows_less_is_asked_for_less(place: Place) -> None:
    """No rows, no ECC, no recovery action, no second kind of memory: an older driver, an older GPU."""
    place.gpu.rows = place.gpu.ecc = place.gpu.action = place.gpu.reserved = None
    place.gpu.processes = (0, None, None)
    figures = await place.gates().check(SPEC)
    assert (figures["recovery_action"], figures["memory_used"]) == ("unknown", 3 * MIB)


async def test_a_list_of_processes_has_to_be_had(place: Place) -> None:
    """That of those who compute: without it nothing is known."""
    place.gpu.processes = (None, 0, 0)
    with pytest.raises(WashUnreachable, match="cannot be read"):
        await place.gates().before(SPEC)


# -- memory -----------------------------------------------------------------------------------------------


async def test_memory_has_to_come_back_to_what_an_idle_device_uses(place: Place) -> None:
    """Measured once in a boot while nobody is on it, also for later lives; lower is the better measure."""
    await place.gates().check(SPEC)
    place.gpu.used = 3 * MIB + TOLERANCE_BYTES
    assert (await place.gates().check(SPEC))["memory_idle"] == 3 * MIB
    place.gpu.used += 1
    with pytest.raises(Dirty, match=r"35 MiB .* 35 at most"):
        await place.gates().check(SPEC)
    place.gpu.used = 1 * MIB
    assert (await place.gates().check(SPEC))["memory_idle"] == 1 * MIB
    place.gpu.used = 3 * MIB + TOLERANCE_BYTES
    with pytest.raises(Dirty):
        await place.gates().check(SPEC)


async def test_the_first_measure_of_a_boot_is_no_context_s(place: Place) -> None:
    """Who is not seen, in a PID namespace of his own, still has a context, and it takes more than this."""
    place.gpu.used = 257 * MIB
    with pytest.raises(Dirty, match="257 MiB of the GPU are in use, and when it is idle 256 at most"):
        await place.gates().check(SPEC)
    place.gpu.reserved = None  # this driver counts its own share too
    assert (await place.gates().check(SPEC))["memory_idle"] == 257 * MIB


async def test_another_boot_measures_anew(place: Place) -> None:
    """What was known of the one before says nothing."""
    await place.gates().check(SPEC)
    place.gpu.used = 200 * MIB
    with pytest.raises(Dirty):
        await place.gates().check(SPEC)
    assert (await place.gates("boot 2").check(SPEC))["memory_idle"] == 200 * MIB
    assert json.loads((place.folder / "gpus.json").read_text())["boot_id"] == "boot 2"


async def test_it_is_not_measured_while_somebody_uses_it(place: Place) -> None:
    """Or what he uses would be what an idle device does."""
    place.gpu.processes, place.gpu.used = (1, 0, None), 300 * MIB
    with pytest.raises(Dirty):
        await place.gates().check(SPEC)
    place.gpu.processes, place.gpu.used = (0, 0, None), 2 * MIB
    assert (await place.gates().check(SPEC))["memory_idle"] == 2 * MIB


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"boot_id": "boot 1"}',
        '{"boot_id": "boot 1", "gpus": []}',
        '{"boot_id": "boot 1", "gpus": {"GPU-aa": 7}}',
        '{"boot_id": "boot 1", "gpus": {"GPU-aa": {"idle": "1", "sequence": 0}}}',
        '{"boot_id": "boot 1", "gpus": {"GPU-aa": {"idle": 99999999999}}}',
    ],
)
async def test_a_file_that_says_nothing_that_fits_is_none(place: Place, content: str) -> None:
    """Then it is measured anew, and no device that uses much is taken for idle."""
    (place.folder / "gpus.json").write_text(content)
    place.gpu.used = 4000 * MIB
    with pytest.raises(Dirty):
        await place.gates().check(SPEC)
    place.gpu.used = 3 * MIB
    assert (await place.gates().check(SPEC))["memory_idle"] == 3 * MIB


async def test_a_folder_that_cannot_be_written_passes_nothing(place: Place) -> None:
    """What is not remembered could not be compared with."""
    (place.folder / "gpus.json.new").mkdir()
    with pytest.raises(WashUnreachable, match=r"gpus\.json"):
        await place.gates().check(SPEC)


# -- patience ---------------------------------------------------------------------------------------------


async def test_what_is_about_to_go_is_waited_for(place: Place) -> None:
    """A process that was killed is listed for a moment longer, and its memory is in use."""
    gates = place.gates(patience=PATIENCE_SECONDS)
    await gates.check(SPEC)
    place.gpu.processes, place.gpu.used = (1, 0, None), 900 * MIB
    async with asyncio.TaskGroup() as group:
        check = group.create_task(gates.check(SPEC))
        await place.clock.until_slept_to(1000.1)
        place.gpu.processes = (0, 0, None)
        place.clock.advance(0.1)
        await place.clock.until_slept_to(pytest.approx(1000.2))
        place.gpu.used = 3 * MIB
        place.clock.advance(0.1)
    assert check.result()["memory_used"] == 3 * MIB


async def test_what_does_not_go_is_dirty_in_the_end(place: Place) -> None:
    """After the patience, not before."""
    gates = place.gates(patience=PATIENCE_SECONDS)
    place.gpu.processes = (1, 0, None)
    failure: list[Dirty] = []

    async def before() -> None:
        with pytest.raises(Dirty) as caught:
            await gates.before(SPEC)
        failure.append(caught.value)

    async with asyncio.TaskGroup() as group:
        group.create_task(before())
        await place.clock.until_slept_to(1000.1)
        assert not failure
        place.clock.advance(PATIENCE_SECONDS)
    assert "1 processes" in str(failure[0])


# -- the kernel's log -------------------------------------------------------------------------------------


async def test_a_new_xid_is_dirty(place: Place) -> None:
    """Of this GPU, since it last passed; an operator's wash after that begins with what came since."""
    place.xid(79, bus="af")
    gates = place.gates()
    assert (await gates.check(SPEC))["xids"] == 0
    place.xid(48)
    with pytest.raises(Dirty, match="XID 48"):
        await gates.check(SPEC)
    assert (await gates.check(SPEC))["xids"] == 1
    assert (await place.gates().check(SPEC))["xids"] == 0
    place.xid(95)
    with pytest.raises(Dirty, match="XID 95"):
        await gates.check(SPEC)


async def test_a_life_that_dies_after_an_xid_does_not_forget_it(place: Place) -> None:
    """Only a wash that has passed moves the mark on the disk."""
    await place.gates().check(SPEC)
    place.xid(79)
    for _ in range(2):
        with pytest.raises(Dirty, match="XID 79"):
            await place.gates().check(SPEC)


async def test_what_a_program_brings_about_is_counted(place: Place) -> None:
    """A tenant whose kernels run wild does not lock the GPU away from the others; nor does a reset that was
    asked for, and done."""
    gates = place.gates()
    numbers = (11, 13, 25, 31, 37, 43, 45, 68, 69, 137, 154)
    for number in numbers:
        place.xid(number)
    assert (await gates.check(SPEC))["xids"] == len(numbers)
    assert (await gates.check(SPEC))["xids"] == 0
    for number in (32, 48, 63, 64, 74, 79, 94, 95, 109, 119, 140, 999):
        place.xid(31)
        place.xid(number)
        with pytest.raises(Dirty, match=f"XID {number}"):
            await gates.check(SPEC)
        await gates.check(SPEC)


async def test_a_log_that_cannot_be_read_is_said(place: Place) -> None:
    """In the figures; and what was dropped from it is too."""
    gates = place.gates()
    read, place.log = place.log, []
    assert (await gates.check(SPEC))["kernel_log"] == "unreadable"
    place.log = read
    assert (await gates.check(SPEC))["kernel_log"] == "read"
    place.log = [b"6,9,1,-;much was written meanwhile\n"]
    assert (await gates.check(SPEC))["kernel_log"] == "gap"
    assert (await gates.check(SPEC))["kernel_log"] == "read"


# -- a driver in trouble ----------------------------------------------------------------------------------


async def test_a_driver_that_does_not_answer_is_not_clean(place: Place) -> None:
    """Broken, without this GPU, or hanging: nothing is known."""
    place.nvml.broken = True
    with pytest.raises(WashUnreachable, match="Driver Not Loaded"):
        await place.gates().before(SPEC)
    place.nvml.broken, place.nvml.gpus = False, []
    with pytest.raises(WashUnreachable, match="Not Found"):
        await place.gates().check(SPEC)
    place.nvml.hang = threading.Event()
    gates = place.gates(call_timeout=0.05)
    for ask in (gates.before, gates.check):
        with pytest.raises(WashUnreachable, match="did not answer"):
            await ask(SPEC)
    place.nvml.hang.set()


async def test_several_slots_are_looked_at_one_by_one(place: Place) -> None:
    """No wash takes another's call for a driver that hangs, and each one's state is kept."""
    gates = place.gates()
    await asyncio.gather(*(gates.check(spec) for spec in (SPEC, OTHER) * 4))
    kept = json.loads((place.folder / "gpus.json").read_text())["gpus"]
    assert kept.keys() == {"GPU-aa", "GPU-bb"}
