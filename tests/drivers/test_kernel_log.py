"""XIDs in the kernel's log, by records as /dev/kmsg gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_server.drivers.kernel_log import KernelLog, Xid, _records, parse, read_kernel_log

XID = b"4,%d,7,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n SUBSYSTEM=pci\n"


def parsed(*records: bytes) -> KernelLog | None:
    return parse(iter(records))


def test_xids_are_found_with_their_place() -> None:
    """In all spellings of the place, also of a part of the GPU; other lines only count as read."""
    log = parsed(
        b"6,10,1,-;usb 1-1: new device\n",
        XID % 11,
        b"3,15,9,-;NVRM: Xid (0001:af:1f): 31, Ch 0000000e\n",
        b"3,16,9,-,caller=T7;NVRM: Xid (PCI:0000:3b:00 GPU-I:01 GPU-CI:02): 48, pid=1, name=x, Ch 0000000e\n",
    )
    assert log == KernelLog(
        xids=(
            Xid(sequence=11, place=(0, 0x3B, 0), number=79),
            Xid(sequence=15, place=(1, 0xAF, 0x1F), number=31),
            Xid(sequence=16, place=(0, 0x3B, 0), number=48),
        ),
        first=10,
        last=16,
    )


@pytest.mark.parametrize(
    "record",
    [
        b"12,11,1,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n",  # a program wrote it: facility 1
        b"4,11,1,-;said: NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n",
        b"4,11,1,-;NVRM: Xid (PCI:0000:3b): 79\n",
        b"4,11,1,-;NVRM: loading\n",
    ],
)
def test_what_is_no_xid_of_the_driver_s_is_none(record: bytes) -> None:
    """A program may write to the log what it likes."""
    assert parsed(record) == KernelLog(xids=(), first=11, last=11)


def test_a_log_without_records_is_none() -> None:
    """It was not read, then."""
    assert parsed() is None
    assert parsed(b"", b"no record", b"x,1,2,-;text") is None


def test_reading_goes_on_over_what_was_overwritten() -> None:
    """The kernel says so once, and the next reading gets the oldest that is left."""
    steps: Iterator[bytes | type[Exception]] = iter([b"a", BrokenPipeError, b"b", BlockingIOError])

    def read() -> bytes:
        step = next(steps)
        if isinstance(step, bytes):
            return step
        raise step

    assert list(_records(read)) == [b"a", b"b"]


def test_a_log_that_never_ends_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes faster than is read does not keep the reader."""
    monkeypatch.setattr("gpu_server.drivers.kernel_log._MAX_RECORDS", 100)
    read: Callable[[], bytes] = lambda: XID % 5  # noqa: E731
    assert len(list(_records(read))) == 100


def test_a_log_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """None there, none allowed, or a file that is no log."""
    assert read_kernel_log(tmp_path / "none") is None
    assert read_kernel_log(tmp_path) is None
    (tmp_path / "empty").touch()
    assert read_kernel_log(tmp_path / "empty") is None


def test_the_machine_s_own() -> None:
    """Where it can be read, it is, and does not wait for more."""
    log = read_kernel_log()
    assert log is None or log.first <= log.last
