"""One contract for every journal: the fake and SQLite's."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.core.rows import STATE_TABLES, Change, Row, Table
from gpu_server.drivers.journal import SqliteJournal
from gpu_server.ports import Journal, JournalFailing
from tests.fakes.journal import MemoryJournal


@dataclass(kw_only=True)
class Stage:
    """A journal under test, whose writes can be made to fail, and which can have another life."""

    journal: Journal
    refuse: Callable[[Any, bool], None]
    another: Callable[[Any], Journal]

    def reopen(self) -> None:
        self.journal.close()
        self.journal = self.another(self.journal)

    def break_down(self) -> None:
        self.refuse(self.journal, True)

    def mend(self) -> None:
        self.refuse(self.journal, False)


@contextlib.contextmanager
def staged(kind: str) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.db"

        def open_sqlite(_: Any = None) -> SqliteJournal:
            journal = SqliteJournal(path)
            journal.open()
            return journal

        def refuse_sqlite(journal: Any, refuse: bool) -> None:
            journal._connection.execute(f"PRAGMA query_only = {'ON' if refuse else 'OFF'}")

        def refuse_memory(journal: Any, refuse: bool) -> None:
            journal.refuse = "disk full" if refuse else None

        stage = (
            Stage(journal=open_sqlite(), refuse=refuse_sqlite, another=open_sqlite)
            if kind == "sqlite"
            else Stage(
                journal=MemoryJournal(),
                refuse=refuse_memory,
                another=lambda journal: MemoryJournal(journal.disk),
            )
        )
        try:
            yield stage
        finally:
            stage.journal.close()


KINDS = pytest.mark.parametrize("kind", ["memory", "sqlite"])


@pytest.fixture(params=["memory", "sqlite"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with staged(request.param) as stage:
        yield stage


def put(row_id: str, row: Row | None = None, table: Table = Table.TASKS) -> Change:
    return Change(table=table, id=row_id, row={"id": row_id} if row is None else row)


def gone(row_id: str, table: Table = Table.TASKS) -> Change:
    return Change(table=table, id=row_id, row=None)


def ids(journal: Journal, table: Table = Table.TASKS) -> list[str]:
    return list(journal.load()[table])


class Word(StrEnum):
    IDLE = "idle"


# -- rows -------------------------------------------------------------------------------------------------


def test_a_new_journal_is_empty(stage: Stage) -> None:
    """Every table is there, without rows, and nothing fails."""
    assert stage.journal.load() == {table: {} for table in STATE_TABLES}
    assert stage.journal.failing is None
    assert not stage.journal.wants_checkpoint


def test_rows_come_back_in_another_life(stage: Stage) -> None:
    """JSON values of every kind are read as they were written, also by the next journal; rows of one name in
    different tables are different rows."""
    row = {"text": "ä\0\n'\"", "number": -1.5, "big": 2**63 - 1, "none": None, "list": [True, {"x": []}]}
    stage.journal.write([put("a", row), put("a", {}, Table.NODE)])
    stage.reopen()
    loaded = stage.journal.load()
    assert loaded[Table.TASKS] == {"a": row}
    assert loaded[Table.NODE] == {"a": {}}


def test_members_of_enumerations_are_their_words(stage: Stage) -> None:
    """As a value and as a key."""
    stage.journal.write([put("a", {"state": Word.IDLE, "alarms": {Word.IDLE: 1.5}})])
    assert stage.journal.load()[Table.TASKS] == {"a": {"state": "idle", "alarms": {"idle": 1.5}}}


def test_a_row_that_changes_keeps_its_place(stage: Stage) -> None:
    """Rows come in the order in which they were first written; what was gone and comes back is new."""
    stage.journal.write([put("b"), put("a"), put("c")])
    stage.journal.write([put("a", {"n": 2}), put("d")])
    assert ids(stage.journal) == ["b", "a", "c", "d"]
    stage.journal.write([gone("a")])
    stage.journal.write([gone("never was")])
    stage.journal.write([put("a"), gone("b"), put("b")])
    stage.reopen()
    assert ids(stage.journal) == ["c", "d", "a", "b"]


def test_what_is_not_json_is_refused_whole(stage: Stage) -> None:
    """A TypeError, now and not at the next write, and nothing that came with it is taken."""
    with pytest.raises(TypeError):
        stage.journal.write([put("good"), put("bad", {"x": {1, 2}})])
    stage.journal.write([put("later")])
    assert ids(stage.journal) == ["later"]


def test_what_was_given_may_change_afterwards(stage: Stage) -> None:
    """A row is taken as it is at the time of a write, also of one that fails; what is read is a copy."""
    row = {"n": 1}
    stage.break_down()
    with pytest.raises(JournalFailing):
        stage.journal.write([put("a", row)])
    row["n"] = 2
    stage.mend()
    stage.journal.write(())
    loaded: Any = stage.journal.load()
    loaded[Table.TASKS]["a"]["n"] = 3
    assert stage.journal.load()[Table.TASKS] == {"a": {"n": 1}}


# -- failing ----------------------------------------------------------------------------------------------


def test_what_could_not_be_written_goes_with_the_next(stage: Stage) -> None:
    """While writing fails, `failing` says why and reading goes on; then a write of nothing brings all."""
    stage.journal.write([put("a"), put("b")])
    stage.break_down()
    for change in (put("c"), gone("a"), put("b", {"n": 2})):
        with pytest.raises(JournalFailing):
            stage.journal.write([change])
        assert stage.journal.failing
    with pytest.raises(JournalFailing):
        stage.journal.write(())
    assert stage.journal.load()[Table.TASKS] == {"a": {"id": "a"}, "b": {"id": "b"}}
    stage.mend()
    stage.journal.write(())
    assert stage.journal.failing is None
    assert stage.journal.load()[Table.TASKS] == {"b": {"n": 2}, "c": {"id": "c"}}


def test_writing_nothing_is_nothing(stage: Stage) -> None:
    """With nothing pending nothing is tried, so nothing fails."""
    stage.break_down()
    stage.journal.write(())
    stage.journal.write(iter(()))
    assert stage.journal.failing is None


Batches = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(
            st.builds(
                Change,
                table=st.sampled_from([Table.SESSIONS, Table.TASKS]),
                id=st.sampled_from("abcd"),
                row=st.none() | st.builds(lambda n: {"n": n}, st.integers(0, 9)),
            ),
            max_size=5,
        ),
    ),
    max_size=8,
)


@KINDS
@settings(max_examples=60)
@given(batches=Batches)
def test_every_history_ends_as_in_a_dictionary(kind: str, batches: list[tuple[bool, list[Change]]]) -> None:
    """Whatever is written in whatever portions, and whichever of them fail at first: the rows and their order
    are as if each change had been made at once."""
    expected: dict[Table, dict[str, Row]] = {table: {} for table in STATE_TABLES}
    with staged(kind) as stage:
        for fails, batch in batches:
            if fails:
                stage.break_down()
            with contextlib.suppress(JournalFailing):
                stage.journal.write(batch)
            stage.mend()
            for change in batch:
                if change.row is None:
                    expected[change.table].pop(change.id, None)
                else:
                    expected[change.table][change.id] = change.row
        stage.journal.write(())
        stage.reopen()
        loaded = stage.journal.load()
    assert {table: list(rows.items()) for table, rows in loaded.items()} == {
        table: list(rows.items()) for table, rows in expected.items()
    }


# -- certificates -----------------------------------------------------------------------------------------


def certificate(number: int, slot_id: str = "g0") -> Change:
    row = {"slot_id": slot_id, "fence": number, "certificate": "aGVsbG8="}
    return Change(table=Table.CERTIFICATES, id=f"{number:064x}", row=row)


def fences(journal: Journal, slot_id: str, limit: int = 100) -> list[int]:
    return [row["fence"] for row in journal.certificates(slot_id, limit)]


def test_certificates_are_no_part_of_the_state(stage: Stage) -> None:
    """They are written with the rest, are found by the hash of their record, and are never loaded."""
    stage.journal.write([put("a"), certificate(1), certificate(2)])
    stage.reopen()
    assert stage.journal.load() == {**{table: {} for table in STATE_TABLES}, Table.TASKS: {"a": {"id": "a"}}}
    assert stage.journal.certificate(f"{2:064x}") == certificate(2).row
    assert stage.journal.certificate(f"{3:064x}") is None
    assert stage.journal.certificate("") is None


def test_the_newest_certificates_of_a_slot(stage: Stage) -> None:
    """Those of this slot alone, as many as are asked for, the newest last, also in another life."""
    for number in range(1, 7):
        stage.journal.write([certificate(number, f"g{number % 2}")])
    stage.reopen()
    assert fences(stage.journal, "g0") == [2, 4, 6]
    assert fences(stage.journal, "g1", 2) == [3, 5]
    assert fences(stage.journal, "g1", 0) == fences(stage.journal, "g2") == []


def test_pruning_keeps_the_newest_of_each_slot(stage: Stage) -> None:
    """The others are gone for good, and nothing else is; with fewer than that there is nothing to do."""
    stage.journal.write([put("a"), *(certificate(n, f"g{n % 2}") for n in range(1, 10))])
    stage.journal.write([certificate(10, "g2")])
    stage.journal.prune(2)
    stage.journal.prune(2)
    stage.reopen()
    assert (fences(stage.journal, "g0"), fences(stage.journal, "g1")) == ([6, 8], [7, 9])
    assert fences(stage.journal, "g2") == [10]
    assert stage.journal.certificate(f"{1:064x}") is None
    assert ids(stage.journal) == ["a"]
    stage.journal.write([certificate(11)])
    stage.journal.prune(1)
    assert fences(stage.journal, "g0") == [11]


def test_pruning_fails_as_a_write_does(stage: Stage) -> None:
    """What was to be dropped is dropped with the next write that succeeds."""
    stage.journal.write([certificate(1), certificate(2)])
    stage.break_down()
    with pytest.raises(JournalFailing):
        stage.journal.prune(1)
    stage.mend()
    assert fences(stage.journal, "g0") == [1, 2]
    stage.journal.write(())
    assert fences(stage.journal, "g0") == [2]


def test_what_was_written_can_be_secured(stage: Stage) -> None:
    """As often as one likes, whether or not there is anything new."""
    stage.journal.secure()
    stage.journal.write([certificate(1)])
    stage.journal.secure()
    stage.journal.checkpoint()
    stage.journal.secure()
    assert fences(stage.journal, "g0") == [1]


def test_nothing_is_secure_while_a_write_is_pending(stage: Stage) -> None:
    """A certificate that could not be written yet is not on the disk, so `secure` fails until it is."""
    stage.break_down()
    with pytest.raises(JournalFailing):
        stage.journal.write([certificate(1)])
    with pytest.raises(JournalFailing):
        stage.journal.secure()
    stage.mend()
    with pytest.raises(JournalFailing):
        stage.journal.secure()
    assert stage.journal.certificate(f"{1:064x}") is None
    stage.journal.write(())
    stage.journal.secure()
    assert stage.journal.certificate(f"{1:064x}") is not None


# -- tidying up -------------------------------------------------------------------------------------------


def test_a_checkpoint_changes_no_row(stage: Stage) -> None:
    """Before and after it the same is read, and it is not due again at once."""
    stage.journal.write([put("a")])
    stage.journal.checkpoint()
    stage.journal.checkpoint()
    assert not stage.journal.wants_checkpoint
    stage.journal.write([put("b")])
    assert ids(stage.journal) == ["a", "b"]


def test_a_closed_journal_takes_nothing(stage: Stage) -> None:
    """Closing twice is closing once; what comes later fails, and a checkpoint does nothing."""
    stage.journal.write([put("a")])
    stage.journal.close()
    stage.journal.close()
    stage.journal.checkpoint()
    with pytest.raises(JournalFailing):
        stage.journal.secure()
    with pytest.raises(JournalFailing):
        stage.journal.certificate("")
    with pytest.raises(JournalFailing):
        stage.journal.certificates("g0", 1)
    with pytest.raises(JournalFailing):
        stage.journal.prune(1)
    with pytest.raises(JournalFailing):
        stage.journal.write([put("b")])
    assert stage.journal.failing
    stage.reopen()
    assert ids(stage.journal) == ["a"]
