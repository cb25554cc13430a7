"""Inputs of queued tasks: kept outside the process, bounded together, gone when nobody needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_server import inputs
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.drivers.spool import Spool
from gpu_server.inputs import Inputs
from tests.full_disk import no_room_beyond


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "kept")
    spool.open()
    return spool


@pytest.fixture
def kept(spool: Spool) -> Inputs:
    return Inputs(spool)


def refused(kept: Inputs, task_id: str, body: bytes) -> RefusalCode:
    """The code with which an input is refused. Waiting may help, whatever it is."""
    with pytest.raises(Refusal) as refusal:
        kept.put(task_id, body)
    assert refusal.value.retry_after
    assert kept.get(task_id) is None
    return refusal.value.code


def test_an_input_is_there_until_it_is_dropped(kept: Inputs, spool: Spool) -> None:
    """It comes back as it was, and dropping it leaves nothing; dropping it again is no error."""
    kept.put("t_1", b"\x00 body")
    assert kept.get("t_1") == b"\x00 body"
    kept.drop("t_1")
    kept.drop("t_1")
    assert kept.get("t_1") is None
    assert spool.known() == set()


def test_an_input_that_never_was(kept: Inputs) -> None:
    """It is not there, and can be dropped."""
    assert kept.get("t_none") is None
    kept.drop("t_none")


def test_inputs_are_bounded_together(kept: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would pass the bound is refused and leaves nothing; room comes back with each that is
    dropped."""
    monkeypatch.setattr(inputs, "MAX_BYTES", 10)
    kept.put("t_1", b"x" * 6)
    assert refused(kept, "t_2", b"x" * 5) is RefusalCode.TOO_MUCH_QUEUED
    kept.put("t_2", b"x" * 4)
    assert refused(kept, "t_3", b"x") is RefusalCode.TOO_MUCH_QUEUED
    kept.drop("t_1")
    kept.drop("t_1")
    assert refused(kept, "t_3", b"x" * 7) is RefusalCode.TOO_MUCH_QUEUED
    kept.put("t_3", b"x" * 6)


def test_no_room_for_an_input(kept: Inputs, spool: Spool) -> None:
    """Where RUN_DIR is full the task is refused, and nothing of its input is left; the others stay."""
    kept.put("t_1", b"x")
    with no_room_beyond(1000):
        assert refused(kept, "t_2", b"x" * 2000) is RefusalCode.STORAGE_FAILING
    assert spool.known() == {"t_1"}
    kept.put("t_2", b"x" * 2000)
    assert kept.get("t_1") == b"x"


def test_what_an_earlier_life_kept_counts(
    kept: Inputs, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another life has the inputs of the first, within the same bound, and drops them like its own."""
    kept.put("t_1", b"x" * 6)
    again = Inputs(spool)
    again.restore("t_1")
    again.restore("t_none")
    assert again.get("t_1") == b"x" * 6
    monkeypatch.setattr(inputs, "MAX_BYTES", 10)
    assert refused(again, "t_2", b"x" * 5) is RefusalCode.TOO_MUCH_QUEUED
    again.drop("t_1")
    again.put("t_2", b"x" * 5)
    assert spool.known() == {"t_2"}


def test_an_input_that_cannot_be_read(tmp_path: Path, kept: Inputs) -> None:
    """It counts as gone: one task's trouble is not the service's end."""
    (tmp_path / "kept" / "t_1.input").mkdir()
    assert kept.get("t_1") is None
    kept.restore("t_1")
