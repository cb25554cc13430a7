"""The journal in SQLite: what the contract suite cannot say for every journal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpu_server.core.rows import Change, Table
from gpu_server.drivers.journal import SqliteJournal
from gpu_server.ports import JournalFailing, JournalUnusable

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = 2000
BOUND = 4 << 20
PATIENCE = 30
WRITES_FOR_EVER = """
import sys
from pathlib import Path
from gpu_server.core.rows import Change, Table
from gpu_server.drivers.journal import SqliteJournal

journal = SqliteJournal(Path(sys.argv[1]))
journal.open()
number = 0
while True:
    journal.write([Change(table=Table.TASKS, id=str(number), row={"number": number})])
    print(number, flush=True)
    if journal.wants_checkpoint:
        journal.checkpoint()
    number += 1
"""

READS_FOR_LONG = """
import sqlite3, sys

shell = sqlite3.connect(sys.argv[1], isolation_level=None)
shell.execute("BEGIN")
for _ in range(2):
    print(shell.execute("SELECT count(*) FROM tasks").fetchone()[0], flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(path)
    journal.open()
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture
def journal(path: Path) -> Iterator[SqliteJournal]:
    with opened(path) as journal:
        yield journal


def task(number: int, size: int = 0) -> Change:
    return Change(table=Table.TASKS, id=str(number), row={"number": number, "filling": "x" * size})


def numbers(journal: SqliteJournal) -> list[int]:
    return [row["number"] for row in journal.load()[Table.TASKS].values()]


def size_of(path: Path, ending: str = "") -> int:
    return path.with_name(path.name + ending).stat().st_size


def fill(journal: SqliteJournal) -> int:
    """Write to one row until a checkpoint is wanted, and return how often."""
    count = 0
    while not journal.wants_checkpoint:
        journal.write([task(0, size=3000 + count % 2)])
        count += 1
    return count


# -- what survives ----------------------------------------------------------------------------------------


def test_what_was_written_survives_a_kill(path: Path) -> None:
    """Every write that returned is there after SIGKILL, in order, and at most the one under way besides."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert writer.stdout is not None
    with writer.stdout as output:
        said = [output.readline() for _ in range(ENOUGH)]
        writer.send_signal(signal.SIGKILL)
        said += [line for line in output if line.endswith(b"\n")]
    assert writer.wait() == -signal.SIGKILL
    assert size_of(path, "-wal") > 0
    with opened(path) as journal:
        found = numbers(journal)
    assert found == list(range(len(found)))
    assert len(said) <= len(found) <= len(said) + 1


def test_closing_leaves_one_file(path: Path) -> None:
    """The write-ahead log is gone, what was in it is not, and nobody else can read any of the files."""
    before = os.umask(0)
    try:
        with opened(path) as journal:
            journal.write([task(1)])
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"journal.db": 0o600, "journal.db-wal": 0o600, "journal.db-shm": 0o600}
    assert list(path.parent.iterdir()) == [path]
    with opened(path) as journal:
        assert numbers(journal) == [1]


def test_closing_empties_the_log_under_a_reader(journal: SqliteJournal, path: Path) -> None:
    """A shell that is open and reads nothing just then keeps the write-ahead log there, but nothing in it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("SELECT * FROM tasks").fetchall()
        journal.write([task(1)])
        journal.close()
        assert size_of(path, "-wal") == 0


def test_a_journal_may_be_closed_by_another_thread(path: Path) -> None:
    """Opening, writing and closing need not be the same thread's."""
    journal = SqliteJournal(path)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(journal.open).result()
        journal.write([task(1)])
        thread.submit(journal.close).result()
    with opened(path) as journal:
        assert numbers(journal) == [1]


def test_a_link_leads_to_the_journal(path: Path) -> None:
    """A journal that was moved elsewhere and linked is found with its write-ahead log."""
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    path.symlink_to(elsewhere / "real.db")
    with opened(path) as journal:
        journal.write([task(1)])
        assert size_of(elsewhere / "real.db", "-wal") > 0
    with opened(path) as journal:
        assert numbers(journal) == [1]


def test_the_log_is_not_synced_at_each_write(journal: SqliteJournal) -> None:
    """synchronous is NORMAL (1) in WAL mode, and nothing but `checkpoint` makes checkpoints."""
    assert journal._connection is not None
    settings = ("journal_mode", "synchronous", "wal_autocheckpoint")
    read = [journal._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in settings]
    assert read == ["wal", 1, 0]


# -- failing ----------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(path: Path) -> None:
    """While the disk is full, changes wait and reading goes on; once there is room, a write of nothing brings
    them all."""
    with opened(path) as journal:
        journal.write([task(0)])
        assert journal._connection is not None
        journal._connection.execute("PRAGMA max_page_count = 12")
        for number in (1, 2):
            with pytest.raises(JournalFailing, match="full"):
                journal.write([task(number, size=20_000), task(0, size=100 * number)])
            assert journal.failing is not None
            assert "full" in journal.failing
            assert numbers(journal) == [0]
        journal._connection.execute("PRAGMA max_page_count = 100000")
        journal.write(())
        assert journal.failing is None
    with opened(path) as journal:
        assert numbers(journal) == [0, 1, 2]
        assert len(journal.load()[Table.TASKS]["0"]["filling"]) == 200


def test_somebody_elses_lock_is_waited_for_briefly(journal: SqliteJournal, path: Path) -> None:
    """A shell that holds the write lock makes a write fail, and no change is lost by it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalFailing, match="locked"):
            journal.write([task(1)])
        shell.execute("ROLLBACK")
        journal.write([task(2)])
    assert numbers(journal) == [1, 2]


def test_a_write_that_fails_halfway_is_undone(journal: SqliteJournal, path: Path) -> None:
    """What it had done is not there, it holds no lock, and the next write does it all."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("ALTER TABLE slots RENAME TO away")
        with pytest.raises(JournalFailing, match="slots"):
            journal.write([task(1), Change(table=Table.SLOTS, id="s", row={})])
        assert shell.execute("SELECT count(*) FROM tasks").fetchone() == (0,)
        shell.execute("ALTER TABLE away RENAME TO slots")
    journal.write(())
    assert numbers(journal) == [1]
    assert journal.load()[Table.SLOTS] == {"s": {}}


def test_a_reader_is_in_nobodys_way(path: Path) -> None:
    """Who reads for long holds up no write, no checkpoint and no restart, and keeps seeing what there was."""
    with opened(path) as journal:
        journal.write([task(1)])
        reader = subprocess.Popen(
            [sys.executable, "-c", READS_FOR_LONG, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"1\n"
        journal.write([task(2)])
        journal.checkpoint()
        journal.write([task(3)])
    with opened(path) as journal:
        assert numbers(journal) == [1, 2, 3]
        journal.write([task(4)])
        assert reader.communicate(b"\n", timeout=PATIENCE) == (b"1\n", None)
    with opened(path) as journal:
        assert numbers(journal) == [1, 2, 3, 4]


def test_a_journal_that_was_spoilt_meanwhile_cannot_be_read(journal: SqliteJournal, path: Path) -> None:
    """A row that somebody else wrote and that is none makes `load` refuse."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("INSERT INTO tasks VALUES ('a', 'no JSON')")
    with pytest.raises(JournalUnusable, match=r"journal\.db"):
        journal.load()


# -- on the disk ------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were forced to the disk, by name."""
    names: list[str] = []
    fdatasync = os.fdatasync

    def watched(handle: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fdatasync(handle)

    monkeypatch.setattr(os, "fdatasync", watched)
    return names


def test_securing_forces_the_log_to_the_disk(journal: SqliteJournal, synced: list[str]) -> None:
    """The write-ahead log, which has all that no checkpoint has moved; a write alone forces nothing."""
    journal.write([task(1)])
    assert synced == []
    journal.secure()
    assert synced == ["journal.db-wal"]


def test_the_log_that_is_secured_is_the_one_that_is_written(path: Path) -> None:
    """However often it was emptied or begun anew, it is the same file: what is written last is in it."""
    with opened(path) as journal:
        for number in range(3):
            fill(journal)
            journal.checkpoint()
            journal.write([task(number)])
            assert journal._log is not None
            assert os.path.samestat(os.fstat(journal._log), path.with_name("journal.db-wal").stat())
        log_file = journal._log
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(log_file)


def test_a_disk_that_has_refused_is_not_believed_again(
    journal: SqliteJournal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it could not write may be gone from the kernel's memory, and the next call succeed anyway."""

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    journal.write([task(1)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        with pytest.raises(JournalFailing, match="Input/output error"):
            journal.secure()
    with pytest.raises(JournalFailing, match="Input/output error"):
        journal.secure()
    journal.close()
    with opened(path) as another:
        another.secure()
        assert numbers(another) == [1]


def test_securing_and_writes_go_side_by_side(path: Path) -> None:
    """While other threads secure and make checkpoints, every write succeeds and none is lost."""
    with opened(path) as journal, ThreadPoolExecutor(2) as threads:
        due = [threads.submit(journal.secure), threads.submit(journal.checkpoint)]
        for number in range(ENOUGH):
            journal.write([task(number, size=1000)])
            if all(one.done() for one in due):
                due = [threads.submit(journal.secure), threads.submit(journal.checkpoint)]
        for one in due:
            one.result()
        assert numbers(journal) == list(range(ENOUGH))


def test_certificates_are_found_without_reading_the_others(journal: SqliteJournal) -> None:
    """They are large and many, so what one asks for, and what is pruned, is found by an index."""
    assert journal._connection is not None
    for query in (
        "SELECT row FROM certificates WHERE id = ''",
        "SELECT row FROM certificates WHERE slot = '' ORDER BY rowid DESC LIMIT 9",
        "SELECT DISTINCT slot FROM certificates",
        "SELECT rowid FROM certificates WHERE slot = '' ORDER BY rowid DESC LIMIT 1 OFFSET 9",
    ):
        plan = [row[3] for row in journal._connection.execute(f"EXPLAIN QUERY PLAN {query}")]
        assert len(plan) == 1, plan
        assert re.search("USING (COVERING )?INDEX", plan[0])
        assert "row " in query or "COVERING" in plan[0]


# -- checkpoints ------------------------------------------------------------------------------------------


def test_a_checkpoint_is_wanted_after_a_bound(journal: SqliteJournal, path: Path) -> None:
    """After some megabytes, not before, and then the log is used from its start again, so that it stays as it
    is however much is written."""
    fill(journal)
    assert BOUND / 8 < size_of(path, "-wal") < 2 * BOUND
    journal.checkpoint()
    assert not journal.wants_checkpoint
    full = size_of(path, "-wal")
    for _ in range(3):
        fill(journal)
        journal.checkpoint()
    assert size_of(path, "-wal") < full + BOUND / 8


def test_checkpoints_and_writes_go_side_by_side(path: Path) -> None:
    """While another thread makes checkpoints, every write succeeds and none is lost."""
    with opened(path) as journal, ThreadPoolExecutor(1) as thread:
        due: Future[None] | None = None
        made = written = 0
        while written < 3 * ENOUGH or made < 3:  # a disk may take its time for a checkpoint
            journal.write([task(written, size=1000), task(written - 50, size=1100)])
            written += 1
            if journal.wants_checkpoint and (due is None or due.done()):
                due = thread.submit(journal.checkpoint)
                made += 1
        assert due is not None
        due.result()
        assert size_of(path) > BOUND
        assert sorted(numbers(journal)) == list(range(-50, written))
    with opened(path) as journal:
        assert sorted(numbers(journal)) == list(range(-50, written))


def test_a_checkpoint_needs_news(journal: SqliteJournal, path: Path) -> None:
    """None begins on a log that was copied entirely, where it could meet a write that starts the log anew; a
    write that failed is no news."""
    journal.write([task(1)])
    journal.checkpoint()
    assert journal._connection is not None
    journal._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(JournalFailing):
        journal.write([task(2)])
    aside = path.rename(path.with_name("aside"))
    with capture_logs() as lines:
        journal.checkpoint()
        assert lines == []
        journal._connection.execute("PRAGMA query_only = OFF")
        journal.write(())
        journal.checkpoint()
    aside.rename(path)
    assert [line["event"] for line in lines] == ["journal.checkpoint_failed"]


def test_a_checkpoint_that_fails_only_says_so(journal: SqliteJournal, path: Path) -> None:
    """It raises nothing, is not due again at once, and a later one makes up for it."""
    fill(journal)
    aside = path.rename(path.with_name("aside"))
    with capture_logs() as lines:
        journal.checkpoint()
    aside.rename(path)
    assert [line["log_level"] for line in lines] == ["warning"]
    assert not journal.wants_checkpoint
    before = size_of(path)
    journal.write([task(1, size=40_000)])
    journal.checkpoint()
    assert size_of(path) > before
