"""Calls to NVML, and what it says of faults."""

from __future__ import annotations

import threading

import pytest

from gpu_server.drivers.nvml import Nvml, NvmlUnusable, text
from tests.fakes.nvml import FakeNvml, Gpu


@pytest.mark.parametrize(
    ("gpu", "fault"),
    [
        (Gpu("a"), None),
        (Gpu("a", rows=(9, 9, 0, 0)), None),
        (Gpu("a", rows=(0, 0, 1, 0)), "reset"),
        (Gpu("a", rows=(0, 0, 1, 1)), "could not be remapped"),
        (Gpu("a", rows=None), None),
        (Gpu("a", rows=None, pages=0), None),
        (Gpu("a", rows=None, pages=1), "page waits"),
    ],
)
def test_rows_and_pages_that_wait(gpu: Gpu, fault: str | None) -> None:
    """Rows on newer GPUs, pages on older ones, and neither is no fault."""
    nvml = Nvml(FakeNvml(gpus=[gpu]))
    nvml.start()
    said = nvml.row_fault(gpu)
    assert said is None if fault is None else fault in (said or "")


def test_errors_that_ecc_could_not_correct() -> None:
    """None on a GPU without ECC."""
    nvml = Nvml(FakeNvml())
    nvml.start()
    assert [nvml.uncorrected_errors(Gpu("a", ecc=ecc)) for ecc in (None, 0, 3)] == [0, 0, 3]


def test_a_driver_that_does_not_start_is_said() -> None:
    """By what NVML says."""
    with pytest.raises(NvmlUnusable, match="Driver Not Loaded"):
        Nvml(FakeNvml(broken=True)).start()


async def test_one_call_may_hang_and_no_other_follows_it() -> None:
    """Each is given up; when the first has ended, calls are sent again."""
    hang = threading.Event()
    nvml = Nvml(FakeNvml(), limit=0.05)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await nvml.call(lambda: hang.wait(30))
    assert "within" in nvml.silence
    (hung,) = [thread for thread in threading.enumerate() if thread.name == "nvml"]
    hang.set()
    hung.join(30)
    nvml.limit = 30.0
    assert await nvml.call(lambda: 5) == 5


def test_text_may_be_bytes() -> None:
    """As older versions gave it."""
    assert (text(b"a"), text("b")) == ("a", "b")
