"""Devices: NVML by a stand-in module that behaves like `pynvml`, and CPU stand-ins."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gpu_server.core.slots import BOTH_TIERS, Tier
from gpu_server.drivers.inventory import CpuInventory, NvmlInventory, choose_inventory
from gpu_server.ports import InventoryError
from tests.fakes.nvml import FakeNvml, Gpu


def two() -> FakeNvml:
    return FakeNvml(gpus=[Gpu("GPU-aa"), Gpu("GPU-bb")])


async def test_gpus_are_slots_by_index_with_uuid_memory_and_tier() -> None:
    """Each GPU is one slot; a tier may be given by index or UUID, and one that is not serves both."""
    tiers = {"0": Tier.LOW, "GPU-bb": Tier.HIGH}
    first, second = await NvmlInventory(None, tiers, nvml=two()).discover()
    assert (first.id, first.uuid, first.name, first.memory_mb) == ("0", "GPU-aa", "NVIDIA L40S", 46068)
    assert first.is_gpu
    assert (first.tiers, second.tiers) == (frozenset({Tier.LOW}), frozenset({Tier.HIGH}))
    (only,) = await NvmlInventory(("1",), {}, nvml=two()).discover()
    assert (only.id, only.tiers) == ("1", BOTH_TIERS)


async def test_device_ids_may_be_indexes_or_uuids_and_must_fit() -> None:
    """The settings choose GPUs in their order; a name that fits none, or a GPU named twice, is an error."""
    found = await NvmlInventory(("GPU-bb", "0"), {}, nvml=two()).discover()
    assert [spec.id for spec in found] == ["1", "0"]
    for device_ids in (("2",), ("GPU-cc",), ("0", "GPU-aa")):
        with pytest.raises(InventoryError, match="GPU_DEVICE_IDS"):
            await NvmlInventory(device_ids, {}, nvml=two()).discover()


async def test_nvml_that_fails_is_an_inventory_error() -> None:
    """A driver that is not loaded, or a GPU that cannot be described, lists nothing."""
    with pytest.raises(InventoryError, match="Driver Not Loaded"):
        await NvmlInventory(None, {}, nvml=FakeNvml(broken=True)).discover()
    with pytest.raises(InventoryError, match="GPU is lost"):
        await NvmlInventory(None, {}, nvml=FakeNvml(gpus=[Gpu("GPU-aa", lost=True)])).discover()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"ecc": None, "rows": None}, None),
        ({"rows": (4, 0, 0, 0)}, None),
        ({"ecc": 2}, "2 uncorrected ECC errors"),
        ({"rows": (0, 1, 1, 0)}, "reset"),
        ({"rows": (0, 1, 0, 1)}, "could not be remapped"),
        ({"lost": True}, "GPU is lost"),
    ],
)
async def test_readings_name_what_is_wrong_with_a_gpu(change: dict[str, object], fault: str | None) -> None:
    """Uncorrected errors, a row that waits for a remap or cannot have one, and a lost GPU are faults."""
    nvml = two()
    inventory = NvmlInventory(None, {}, nvml=nvml)
    await inventory.discover()
    for name, value in change.items():
        setattr(nvml.gpus[0], name, value)
    readings = await inventory.readings()
    assert readings["1"].fault is None
    assert readings["1"].memory_used_mb == 3
    if fault is None:
        assert readings["0"].fault is None
    else:
        assert fault in (readings["0"].fault or "")


async def test_a_driver_that_hangs_makes_every_slot_unreadable_and_gets_one_thread() -> None:
    """While one call hangs, no further one is sent after it; when it ends, readings come again."""
    nvml = two()
    inventory = NvmlInventory(None, {}, nvml=nvml, call_timeout=0.05)
    await inventory.discover()
    nvml.hang = threading.Event()
    for _ in range(3):
        readings = await inventory.readings()
        assert all("did not answer" in (reading.doubt or "") for reading in readings.values())
    (hung,) = [thread for thread in threading.enumerate() if thread.name == "nvml"]
    nvml.hang.set()
    hung.join(30)
    assert (await inventory.readings())["0"].fault is None


async def test_a_driver_that_hangs_at_start_is_an_inventory_error() -> None:
    """The service does not start on a machine whose driver does not answer."""
    hang = threading.Event()
    inventory = NvmlInventory(None, {}, nvml=FakeNvml(hang=hang), call_timeout=0.05)
    with pytest.raises(InventoryError, match="did not answer"):
        await inventory.discover()
    hang.set()


async def test_stand_ins_have_stable_names_and_no_faults() -> None:
    """The same machine gives the same UUIDs in every life, another machine others."""
    slots = await CpuInventory(2, {"0": Tier.LOW, "cpu1": Tier.HIGH}, host="a").discover()
    assert [slot.id for slot in slots] == ["cpu0", "cpu1"]
    assert [slot.tiers for slot in slots] == [frozenset({Tier.LOW}), frozenset({Tier.HIGH})]
    assert not any(slot.is_gpu for slot in slots)
    assert all(slot.uuid.startswith("CPU-") for slot in slots)
    again, other = CpuInventory(2, {}, host="a"), CpuInventory(2, {}, host="b")
    assert [slot.uuid for slot in await again.discover()] == [slot.uuid for slot in slots]
    assert {slot.uuid for slot in await other.discover()}.isdisjoint(slot.uuid for slot in slots)
    assert {reading.fault for reading in (await again.readings()).values()} == {None}


async def test_the_choice_fails_closed(tmp_path: Path) -> None:
    """Stand-ins are used only where nothing speaks of GPUs: no NVML, no device, none in the settings."""
    device, absent = tmp_path / "nvidiactl", tmp_path / "none"
    device.touch()
    broken, none = FakeNvml(broken=True), FakeNvml()

    async def choose(
        nvml: FakeNvml, nvidiactl: Path, cpu_slots: int = 2, device_ids: tuple[str, ...] | None = None
    ) -> object:
        return await choose_inventory(
            cpu_slots=cpu_slots, device_ids=device_ids, tiers={}, nvml=nvml, nvidiactl=nvidiactl
        )

    assert isinstance(await choose(two(), device), NvmlInventory)
    assert isinstance(await choose(two(), absent), NvmlInventory)
    assert isinstance(await choose(broken, absent), CpuInventory)
    assert isinstance(await choose(none, absent), CpuInventory)
    for nvml in (broken, none):
        with pytest.raises(InventoryError, match="exists"):
            await choose(nvml, device)
        with pytest.raises(InventoryError):
            await choose(nvml, absent, device_ids=("0",))
        with pytest.raises(InventoryError, match="CPU_SLOTS"):
            await choose(nvml, absent, cpu_slots=0)
