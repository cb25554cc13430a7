import pytest
from gpu_worker.sealed_record import RECORD_MAX, Refused, ReplayRecord


def test_the_same_request_is_known_by_its_task() -> None:
    """The same id with the same key is the same request; a new id is a new one."""
    record = ReplayRecord()
    assert record.task_of("r1", b"e1") is None
    record.add("r1", b"e1", "t1")
    assert record.task_of("r1", b"e1") == "t1"
    assert record.task_of("r2", b"e1") is None


def test_another_request_under_a_known_id_is_refused() -> None:
    """409 with the code that clients know; the first one stands."""
    record = ReplayRecord()
    record.add("r1", b"e1", "t1")
    with pytest.raises(Refused) as caught:
        record.task_of("r1", b"e2")
    assert (caught.value.status, caught.value.code) == (409, "replay")
    assert record.task_of("r1", b"e1") == "t1"


def test_a_full_record_takes_no_new_request() -> None:
    """Nothing is forgotten to make room, since it would run again; what is known is still found."""
    record = ReplayRecord(most=2)
    record.add("r1", b"e1", "t1")
    record.add("r2", b"e2", "t2")
    with pytest.raises(Refused, match="draining") as caught:
        record.task_of("r3", b"e3")
    assert caught.value.status == 503
    assert record.task_of("r1", b"e1") == "t1"
    assert RECORD_MAX == 65_536
