"""The journal's file: made whole, refused unchanged, brought up to date."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.core.rows import Change, Table, session_of
from gpu_server.core.sessions import Rules
from gpu_server.drivers.journal import SqliteJournal
from gpu_server.drivers.journal_file import APPLICATION_ID, MIGRATIONS, Migration
from gpu_server.ports import JournalUnusable
from tests.core.story import Story, work

ROOT = Path(__file__).resolve().parents[2]
ROWS = {str(number): {"number": number, "words": "x" * 40} for number in range(60)}


@contextlib.contextmanager
def opened(path: Path, migrations: Sequence[Migration] = ()) -> Iterator[SqliteJournal]:
    """A journal of version 1, or of later ones that the test makes up."""
    journal = SqliteJournal(path, migrations=migrations)
    journal.open()
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a journal that holds `ROWS`."""
    path = tmp_path / "journal.db"
    make(path)
    return path


def make(path: Path) -> None:
    with opened(path) as journal:
        journal.write(Change(table=Table.TASKS, id=row_id, row=row) for row_id, row in ROWS.items())


def make_hot(path: Path, spoil: str) -> None:
    """Put a journal at `path` whose last transaction, `spoil`, is in its write-ahead log, as after a kill."""
    origin = path.parent / "origin"
    origin.mkdir()
    make(origin / path.name)
    with closing(sqlite3.connect(origin / path.name, isolation_level=None)) as shell:
        shell.execute("PRAGMA wal_autocheckpoint = 0")
        shell.execute(spoil)
        for name in (path.name, f"{path.name}-wal"):
            shutil.copyfile(origin / name, path.parent / name)
    shutil.rmtree(origin)


def do(path: Path, *statements: str) -> None:
    """Do something to a journal that this program never does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        for statement in statements:
            shell.execute(statement)


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as shell:
        return int(shell.execute("PRAGMA user_version").fetchone()[0])


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def is_refused(path: Path, migrations: Sequence[Migration] = ()) -> str:
    """Why the journal is refused. No byte of it may have changed, and nothing be beside it that was not."""
    before = files(path.parent)
    with pytest.raises(JournalUnusable) as refusal:
        SqliteJournal(path, migrations=migrations).open()
    assert files(path.parent) == before
    assert str(path) in str(refusal.value)
    return str(refusal.value)


# -- making -----------------------------------------------------------------------------------------------


def test_a_new_journal_says_whose_it_is(tmp_path: Path) -> None:
    """The file names the program and the version of its tables, each of them one of `Table`."""
    path = tmp_path / "journal.db"
    with opened(path, MIGRATIONS):
        pass
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert shell.execute("PRAGMA user_version").fetchone() == (1 + len(MIGRATIONS),)
        names = {name for (name,) in shell.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == {table.value for table in Table}


def test_a_journal_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """What was stopped while making it leaves no journal, and the next start makes one."""

    def stop(connection: sqlite3.Connection) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "journal.db"
    with pytest.raises(KeyboardInterrupt):
        SqliteJournal(path, migrations=[stop]).open()
    assert not path.exists()
    (tmp_path / "journal.db.new-journal").write_bytes(b"of the draft that was left")
    with opened(path) as journal:
        assert journal.load()[Table.TASKS] == {}
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_alone_is_not_taken_for_a_new_journals(tmp_path: Path) -> None:
    """A write-ahead log that was left behind when its journal was moved is not mixed with another one."""
    path = tmp_path / "journal.db"
    make_hot(path, "DELETE FROM tasks")
    path.unlink()
    assert "journal.db-wal" in is_refused(path)


@pytest.mark.parametrize("place", ["missing/journal.db", "file/journal.db"])
def test_a_place_out_of_reach_is_no_damage(tmp_path: Path, place: str) -> None:
    """Where no journal can be opened or made, the message says why and does not advise to move it away."""
    (tmp_path / "file").touch()
    with pytest.raises(JournalUnusable) as refusal:
        SqliteJournal(tmp_path / place).open()
    assert "directory" in str(refusal.value)
    assert "move it away" not in str(refusal.value)


@pytest.mark.parametrize("make_it", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_read(tmp_path: Path, make_it: Callable[[Path], None]) -> None:
    """A folder, or a pipe, on which reading would wait for ever."""
    make_it(tmp_path / "journal.db")
    with pytest.raises(JournalUnusable, match="not a regular file"):
        SqliteJournal(tmp_path / "journal.db").open()


def test_a_locked_journal_is_no_damage(path: Path) -> None:
    """While somebody else has it for himself, the journal is left alone, and not called damaged."""
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("PRAGMA locking_mode = EXCLUSIVE")
        shell.execute("BEGIN IMMEDIATE")
        shell.execute("DELETE FROM tasks")
        shell.execute("ROLLBACK")
        with pytest.raises(JournalUnusable, match=r"cannot be used now.*locked"):
            SqliteJournal(path).open()
    with opened(path) as journal:
        assert journal.load()[Table.TASKS] == ROWS


# -- refusing ---------------------------------------------------------------------------------------------


def other_program(path: Path) -> None:
    path.unlink()
    do(path, "CREATE TABLE tasks (id TEXT PRIMARY KEY NOT NULL, row TEXT NOT NULL)")


def truncated(path: Path) -> None:
    os.truncate(path, 3 * 4096)


def index_apart(path: Path) -> None:
    """The name of a row, in the table alone."""
    content = path.read_bytes()
    at = content.index(b'59{"number":59')
    path.write_bytes(content[:at] + b"7" + content[at + 1 :])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("node:\n  tasks: []\n" * 20), "not an SQLite database"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "not an SQLite database"),
        (other_program, "another program's"),
        (lambda path: do(path, "PRAGMA application_id = 0"), "another program's"),
        (lambda path: do(path, "PRAGMA user_version = 0"), "no version"),
        (lambda path: do(path, "PRAGMA user_version = 99"), "newer version"),
        (truncated, "damaged"),
        (index_apart, "index"),
        (lambda path: do(path, "DROP TABLE slots"), "missing.*slots"),
        (lambda path: do(path, "ALTER TABLE slots RENAME COLUMN row TO line"), "not as it was made.*slots"),
        (lambda path: do(path, "INSERT INTO node VALUES ('a', '[]')"), "'node' is not a JSON object"),
        (lambda path: do(path, "INSERT INTO node VALUES ('a', '{')"), "damaged"),
        (lambda path: do(path, "INSERT INTO node VALUES ('a', CAST(x'7b22ff227d' AS TEXT))"), "damaged"),
        (lambda path: do(path, "INSERT INTO node VALUES (x'00', '{}')"), "'node' is not"),
    ],
)
def test_what_is_not_a_sound_journal_is_refused(
    path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    """The message says what is wrong and what to do, and the file stays as it is, for somebody to look at."""
    spoil(path)
    message = is_refused(path)
    assert re.search(why, message)
    assert "move it away" in message
    assert "without memory" in message


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("PRAGMA user_version = 99", "newer version"),
        ("PRAGMA user_version = 0", "no version"),
        ("DROP TABLE slots", "slots"),
        ("UPDATE tasks SET row = '[]' WHERE id = '59'", "JSON object"),
    ],
)
def test_a_log_is_read_before_it_is_used(tmp_path: Path, spoil: str, why: str) -> None:
    """What makes a journal unfit is also found in its write-ahead log, and that too stays as it is."""
    path = tmp_path / "journal.db"
    make_hot(path, spoil)
    assert why in is_refused(path)
    assert set(files(tmp_path)) == {"journal.db", "journal.db-wal"}


def test_a_log_is_part_of_the_journal(tmp_path: Path) -> None:
    """A journal whose process was killed is opened with what its write-ahead log says, and that emptied."""
    path = tmp_path / "journal.db"
    make_hot(path, "DELETE FROM tasks WHERE id != '7'")
    with opened(path) as journal:
        assert journal.load()[Table.TASKS] == {"7": ROWS["7"]}
        assert path.with_name("journal.db-wal").stat().st_size == 0


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "journal.db"
    make(path)
    return path.read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_refused_or_harmless(sound: bytes, data: st.DataObject) -> None:
    """Whatever became of the bytes, the journal is either refused as it is, or it is opened, can be read, and
    takes a row that is there in its next life."""
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        # The first bytes of a page say how the rest is read.
        page = data.draw(st.integers(0, len(sound) // 4096 - 1))
        at = page * 4096 + data.draw(st.integers(0, 120) | st.integers(0, 4095))
        content[at : at + data.draw(st.integers(1, 9))] = data.draw(st.binary(min_size=1, max_size=8))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.db"
        path.write_bytes(content)
        try:
            with opened(path) as journal:
                rows = {**journal.load()[Table.TASKS], "new": {"number": 1}}
                journal.write([Change(table=Table.TASKS, id="new", row={"number": 1})])
            with opened(path) as journal:
                assert journal.load()[Table.TASKS] == rows
        except JournalUnusable:
            assert files(Path(folder)) == {"journal.db": bytes(content)}


# -- bringing up to date ----------------------------------------------------------------------------------


def count_words(connection: sqlite3.Connection) -> None:
    connection.execute(
        "UPDATE tasks SET row = json_set(row, '$.count', length(json_extract(row, '$.words')))"
    )


def add_a_table(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE notes (id TEXT PRIMARY KEY NOT NULL, row TEXT NOT NULL)")


COUNTED = {row_id: {**row, "count": 40} for row_id, row in ROWS.items()}


def test_an_old_journal_is_brought_up_to_date(path: Path) -> None:
    """Every step is taken once, in order, and the old journal is beside the new one, to go back by hand."""
    for _ in range(2):
        with opened(path, [count_words, add_a_table]) as journal:
            assert journal.load()[Table.TASKS] == COUNTED
    copy = path.with_name("journal.db.v1")
    assert set(path.parent.iterdir()) == {path, copy}
    assert copy.stat().st_mode & 0o777 == 0o600
    assert "newer version" in is_refused(path)
    copy.rename(path)
    with opened(path) as journal:
        assert journal.load()[Table.TASKS] == ROWS


def test_a_new_journal_is_up_to_date(tmp_path: Path) -> None:
    """It takes the same steps, and has nothing to be copied."""
    path = tmp_path / "journal.db"
    with opened(path, [count_words, add_a_table]) as journal:
        assert journal.load()[Table.TASKS] == {}
    assert version(path) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_brought_up_to_date(tmp_path: Path) -> None:
    """What is only in the write-ahead log takes part, and is in the copy."""
    path = tmp_path / "journal.db"
    make_hot(path, "DELETE FROM tasks WHERE id != '7'")
    with opened(path, [count_words]) as journal:
        assert journal.load()[Table.TASKS] == {"7": COUNTED["7"]}
    with opened(tmp_path / "journal.db.v1") as journal:
        assert journal.load()[Table.TASKS] == {"7": ROWS["7"]}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), ValueError(), KeyError("words")])
def test_a_step_that_fails_leaves_the_version_before_it(path: Path, error: BaseException) -> None:
    """The steps before it stand, nothing of it does, and the next start takes it up from there."""

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM tasks")
        raise error

    is_data = isinstance(error, LookupError | ValueError)
    with pytest.raises(JournalUnusable if is_data else type(error)):
        SqliteJournal(path, migrations=[count_words, half]).open()
    assert version(path) == 2
    with opened(path, [count_words]) as journal:
        assert journal.load()[Table.TASKS] == COUNTED
    with opened(path, [count_words, add_a_table]) as journal:
        assert journal.load()[Table.TASKS] == COUNTED
    assert version(path.with_name("journal.db.v1")) == 1
    assert version(path.with_name("journal.db.v2")) == 2


def test_a_process_that_dies_in_a_step_leaves_the_version_before_it(path: Path) -> None:
    """The same where nothing was rolled back by anybody."""
    dies = (
        "import os, sys; from pathlib import Path; from gpu_server.drivers.journal import SqliteJournal\n"
        "def die(connection): connection.execute('DELETE FROM tasks'); os._exit(7)\n"
        "SqliteJournal(Path(sys.argv[1]), migrations=[die]).open()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", dies, str(path)], env=environment, check=False)
    assert ended.returncode == 7
    with opened(path) as journal:
        assert journal.load()[Table.TASKS] == ROWS


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE tasks SET row = '[]' WHERE id = '59'", "JSON object"),
        ("UPDATE tasks SET row = NULL", "NOT NULL"),
        ("UPDATE no_such_table SET row = ''", "no such table"),
    ],
)
def test_a_step_to_no_sound_journal_is_not_taken(path: Path, statement: str, why: str) -> None:
    """What comes out of the last step is checked before it counts; else the journal is refused as it was."""

    def spoil(connection: sqlite3.Connection) -> None:
        if connection.execute("SELECT count(*) FROM tasks").fetchone() != (0,):
            connection.execute(statement)

    before = path.read_bytes()
    with pytest.raises(JournalUnusable, match=why):
        SqliteJournal(path, migrations=[spoil]).open()
    assert path.read_bytes() == before


def as_of_version_2(row: Any) -> dict[str, Any]:
    """A session's or a slot's row, as it was before there were certificates."""
    row = json.loads(json.dumps(row))
    new = ("prev", "head", "tier", "tenant", "kept_for")
    if "workload" in row:
        del row["workload"]["wash_per_task"]
        new = ("tasks_taken", "washed_before", "washed_after")
    for name in new:
        del row[name]
    return row


@pytest.mark.parametrize(("serves", "sealed"), [(True, "allowed"), (False, "off")])
def test_sessions_of_before_sealed_ones(tmp_path: Path, serves: bool, sealed: str) -> None:
    """Version 2 knows sealed sessions. Those that are there are plain, and go on as they were."""
    story = Story()
    story.ask("s1", workload=work(serves_sessions=True))
    row = as_of_version_2(story.journal.rows()[Table.SESSIONS]["s1"])
    for name in ("sealing", "worker_key", "grants", "sealed_tasks"):
        del row[name]
    del row["workload"]["sealed"]
    row["workload"]["serves_sessions"] = serves
    path = tmp_path / "journal.db"
    with opened(path) as journal:
        journal.write([Change(table=Table.SESSIONS, id="s1", row=row)])
    with opened(path, MIGRATIONS) as journal:
        session = session_of("s1", journal.load()[Table.SESSIONS]["s1"])
    assert (session.sealing, session.worker_key, session.grants, session.sealed_tasks) == (None, None, {}, 0)
    assert session.workload.sealed == sealed
    assert session.created_at == story.session().created_at
    assert "newer version" in is_refused(path)


def test_slots_of_before_certificates(tmp_path: Path) -> None:
    """Version 3 knows certificates. A journal of the last release opens, and its slots and sessions go on: a
    leased one as leased, with no certificate before it."""
    story = Story("g0", "g1")
    story.ask("s1")
    story.ready("s1")
    rows = story.journal.rows()
    path = tmp_path / "journal.db"
    with opened(path, MIGRATIONS[:1]) as journal:
        for table in (Table.NODE, Table.SLOTS, Table.SESSIONS):
            old = {
                name: row if table is Table.NODE else as_of_version_2(row)
                for name, row in rows[table].items()
            }
            journal.write(Change(table=table, id=name, row=row) for name, row in old.items())
    with opened(path, MIGRATIONS) as journal:
        journal.prune(1)
        assert journal.certificates("g0", 10) == ()
        story.node = story.make_node(Rules())
        story.node.restore(journal.load())
    session, slot = story.session(), story.node.slots["g0"]
    assert (slot.state, slot.holder, slot.prev, slot.head) == ("leased", "s1", bytes(32), bytes(32))
    assert (slot.tier, slot.tenant, slot.kept_for, slot.pending) == ("full", None, None, None)
    assert (session.washed_before, session.washed_after) == (("00" * 32,), ())
    assert (session.tasks_taken, session.workload.wash_per_task) == (0, False)
    assert "newer version" in is_refused(path, MIGRATIONS[:1])
