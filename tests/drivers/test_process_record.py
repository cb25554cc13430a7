"""Records of worker processes."""

from pathlib import Path

import pytest

from gpu_server.drivers.process_record import (
    ProcessRecord,
    read_record,
    records,
    remove_record,
    write_record,
)
from gpu_server.drivers.process_tree import Leader

RECORD = ProcessRecord(
    instance="i", name="s_1-1", session_id="s_1", fence=1, marker="A=b", boot_id="b", pid=7, start_time=9
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Writing and reading give the same record, whose leader is its pid and start time."""
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    assert RECORD.leader == Leader(pid=7, start_time=9)
    remove_record(tmp_path)
    remove_record(tmp_path)
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"instance": "i"}', '{"x": 1}'])
def test_what_is_no_record_is_none(tmp_path: Path, text: str) -> None:
    """A file that was cut off or is of another program is passed over."""
    (tmp_path / "process.json").write_text(text)
    assert read_record(tmp_path) is None


def test_only_this_instances_records_are_found(tmp_path: Path) -> None:
    """Folders without a record and those of other instances are not ours; a missing root holds none."""
    for name in ("s_1", "s_2", "s_3"):
        (tmp_path / name).mkdir()
    write_record(tmp_path / "s_1", RECORD)
    (tmp_path / "file").touch()
    assert list(records(tmp_path, "i")) == [(tmp_path / "s_1", RECORD)]
    assert list(records(tmp_path, "other")) == []
    assert list(records(tmp_path / "none", "i")) == []
