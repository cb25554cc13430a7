"""The journal's file: made whole, checked before it is touched, brought to this version, or refused as it is.

A file that is refused keeps every byte, so that somebody can look at what happened to it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import orjson

from gpu_server.core.rows import STATE_TABLES, Row, Table
from gpu_server.ports import JournalUnusable

Migration = Callable[[sqlite3.Connection], None]


def _know_sealed_sessions(connection: sqlite3.Connection) -> None:
    """Sessions may be sealed. Those that are there are not."""
    for session_id, text in connection.execute("SELECT id, row FROM sessions").fetchall():
        row = orjson.loads(text)
        serves = row["workload"]["serves_sessions"]
        row["workload"]["sealed"] = "allowed" if serves else "off"
        row |= {"sealing": None, "worker_key": None, "grants": {}, "sealed_tasks": 0}
        text = orjson.dumps(row).decode()
        connection.execute("UPDATE sessions SET row = ? WHERE id = ?", (text, session_id))


def _know_certificates(connection: sqlite3.Connection) -> None:
    """Slots are washed with certificates, of which there are none yet. The tasks that sessions have taken
    before are not counted: only presets that are washed after every task ask, and there were none."""
    connection.execute(
        "CREATE TABLE certificates (id TEXT PRIMARY KEY NOT NULL, row TEXT NOT NULL, slot TEXT NOT NULL)"
    )
    connection.execute("CREATE INDEX certificates_of_a_slot ON certificates (slot)")
    none = bytes(32).hex()
    for slot_id, text in connection.execute("SELECT id, row FROM slots").fetchall():
        row = orjson.loads(text) | {
            "prev": none,
            "head": none,
            "tier": "full",
            "tenant": None,
            "kept_for": None,
        }
        connection.execute("UPDATE slots SET row = ? WHERE id = ?", (orjson.dumps(row).decode(), slot_id))
    for session_id, text in connection.execute("SELECT id, row FROM sessions").fetchall():
        row = orjson.loads(text)
        row["workload"]["wash_per_task"] = False
        row |= {"tasks_taken": 0, "washed_before": [none for _ in row["slot_ids"]], "washed_after": []}
        text = orjson.dumps(row).decode()
        connection.execute("UPDATE sessions SET row = ? WHERE id = ?", (text, session_id))


MIGRATIONS: Final[tuple[Migration, ...]] = (_know_sealed_sessions, _know_certificates)
"""Entry k brings version k + 1 to version k + 2. It runs inside a transaction and must not end it, so
`executescript`, which commits, is forbidden to it. A new journal is version 1, migrated."""

APPLICATION_ID: Final = int.from_bytes(b"gpuj")

# What version 1 held, whatever `Table` holds today: later tables come by a migration.
_FIRST_TABLES: Final = ("node", "slots", "sessions", "tasks")
# The event loop waits for a lock that an operator's shell holds, so it does not wait long.
_LOCK_PATIENCE: Final = 0.1

# https://www.sqlite.org/fileformat2.html#the_database_header
_MAGIC: Final = b"SQLite format 3\0"
_HEADER_SIZE: Final = 100
_APPLICATION_ID: Final = slice(68, 72)

_NOT_THE_FILES_FAULT: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)


def connect(path: Path, how: str = "mode=rw") -> sqlite3.Connection:
    """A connection to a file that is there; never makes one. Transactions are begun and ended by hand."""
    return sqlite3.connect(
        f"{path.as_uri()}?{how}",
        uri=True,
        timeout=_LOCK_PATIENCE,
        isolation_level=None,
        check_same_thread=False,
    )


def open_file(path: Path, migrations: Sequence[Migration]) -> sqlite3.Connection:
    """The writer's connection to the journal at `path`, made if it is not there. Raises `JournalUnusable`."""
    try:
        if not path.exists():
            _make(path, migrations)
        _check(path, migrations)
        connection = connect(path)
        try:
            _set_up(path, connection)
            _migrate(path, connection, migrations)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise _refusal(path, error) from error
    except OSError as error:
        raise _out_of_reach(path, error) from error
    return connection


def read_rows(connection: sqlite3.Connection) -> dict[Table, dict[str, Row]]:
    """Every row of a state, in the order in which they were first inserted. Raises ValueError for what is not
    one."""
    return {
        table: dict(
            _parsed(table, *found)
            for found in connection.execute(f"SELECT id, row FROM {table.value} ORDER BY rowid")
        )
        for table in STATE_TABLES
    }


def _parsed(table: Table, row_id: object, text: str) -> tuple[str, Row]:
    row = orjson.loads(text)
    if not isinstance(row_id, str) or not isinstance(row, dict):
        raise ValueError(f"a row of {table.value!r} is not a JSON object with a name")
    return row_id, row


# -- refusing ---------------------------------------------------------------------------------------------


def _move_away(path: Path) -> str:
    return (
        f"To go on without it, move it away, with {path.name}-wal and {path.name}-shm if they are there: the "
        "service then starts without memory of its sessions, and removes their containers."
    )


def _damaged(path: Path, what: object) -> JournalUnusable:
    return JournalUnusable(f"The journal {path} is damaged: {what}. {_move_away(path)}")


def _foreign(path: Path, what: str) -> JournalUnusable:
    return JournalUnusable(f"{path} is no journal of this program: {what}. {_move_away(path)}")


def _newer(path: Path, version: int, newest: int) -> JournalUnusable:
    return JournalUnusable(
        f"The journal {path} was written by a newer version of this program: it is of version {version}, and "
        f"this program reads up to {newest}. Start the newer program. {_move_away(path)} If the upgrade left "
        f"a copy, {path.name}.v{newest}, that can be put in its place."
    )


def _out_of_reach(path: Path, error: Exception) -> JournalUnusable:
    return JournalUnusable(
        f"The journal {path} cannot be used now: {error}. Nothing says that it is damaged: correct that, and "
        "start again."
    )


def _refusal(path: Path, error: sqlite3.Error) -> JournalUnusable:
    # The module's own errors (text that is not UTF-8) have no code, and are about what is in the file.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return _out_of_reach(path, error) if code in _NOT_THE_FILES_FAULT else _damaged(path, error)


# -- making -----------------------------------------------------------------------------------------------


def _make(path: Path, migrations: Sequence[Migration]) -> None:
    if _is_filled(beside(path, "-wal")):
        # SQLite would take it for the new file's own.
        raise JournalUnusable(
            f"The journal {path} is gone, and {path.name}-wal, which is of no use alone, is still there. "
            "Bring the journal back, or move that away too."
        )
    with _draft_of(path) as draft, closing(connect(draft)) as connection, _transaction(connection):
        _build(connection, migrations)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_newest(migrations)}")


def _build(connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    for table in _FIRST_TABLES:
        connection.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY NOT NULL, row TEXT NOT NULL)")
    for migrate in migrations:
        migrate(connection)


def _newest(migrations: Sequence[Migration]) -> int:
    return 1 + len(migrations)


def sync_folder(folder: Path) -> None:
    """What was made or renamed in this folder is on the disk when this returns. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """An empty private file that becomes `path` at the end: whole and on the disk, or not at all."""
    draft = beside(path, ".new")
    for ending in ("", "-journal", "-wal", "-shm"):  # what a crash left
        beside(draft, ending).unlink(missing_ok=True)
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    yield draft
    draft.rename(path)
    sync_folder(path.parent)


def beside(path: Path, ending: str) -> Path:
    """The file next to this one whose name has this ending more."""
    return path.with_name(path.name + ending)


def _is_filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


# -- checking ---------------------------------------------------------------------------------------------


def _check(path: Path, migrations: Sequence[Migration]) -> None:
    """Raise `JournalUnusable` unless the file is a sound journal of ours, of this version or an older one."""
    _check_header(path)
    index = beside(path, "-shm")
    # With a write-ahead log the truth is in both files, and reading them takes the index. Without one, the
    # file is read as it lies there, and nothing appears beside it.
    is_hot, had_index = _is_filled(beside(path, "-wal")), index.exists()
    with closing(connect(path, "mode=ro" if is_hot else "mode=ro&immutable=1")) as connection:
        try:
            _check_content(path, connection, migrations)
        except BaseException:
            connection.close()
            if not had_index:
                index.unlink(missing_ok=True)
            raise


def _check_header(path: Path) -> None:
    if not path.is_file():
        raise _foreign(path, "it is not a regular file")
    # Closing a file drops every lock this process has on it (https://www.sqlite.org/howtocorrupt.html, 2.2):
    # this must stay before the first connection.
    with path.open("rb") as file:
        header = file.read(_HEADER_SIZE)
    if not header:
        raise _damaged(path, "it is empty")
    if not header.startswith(_MAGIC) or len(header) < _HEADER_SIZE:
        raise _foreign(path, "it is not an SQLite database")
    if int.from_bytes(header[_APPLICATION_ID]) != APPLICATION_ID:
        raise _foreign(path, "it is another program's database")


def _check_content(path: Path, connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    version, newest = _version(connection), _newest(migrations)
    if version > newest:
        raise _newer(path, version, newest)
    if version < 1:
        raise _damaged(path, "it has no version")
    # Rather than quick_check, which does not compare the index with its table.
    complaint = _value(connection, "PRAGMA integrity_check(1)")
    if complaint != "ok":
        raise _damaged(path, complaint)
    if version == newest:
        _check_rows(path, connection, migrations)


def _check_rows(path: Path, connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    """Raise `JournalUnusable` unless there are the tables of a new journal, with rows in them."""
    with closing(sqlite3.connect(":memory:")) as model:
        _build(model, migrations)
        missing = _schema(model) - _schema(connection)
    if missing:
        names = ", ".join(sorted({table for _, table, _ in missing}))
        raise _damaged(path, f"missing or not as it was made: {names}")
    try:
        read_rows(connection)
    except ValueError as error:
        raise _damaged(path, error) from error


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str, str | None]]:
    return set(connection.execute("SELECT name, tbl_name, sql FROM sqlite_master"))


def _version(connection: sqlite3.Connection) -> int:
    return int(_value(connection, "PRAGMA user_version"))


def _value(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


# -- bringing up to date ----------------------------------------------------------------------------------


def _set_up(path: Path, connection: sqlite3.Connection) -> None:
    if _value(connection, "PRAGMA journal_mode = WAL") != "wal":
        raise JournalUnusable(
            f"The journal {path} lies on a file system without shared memory. Put it on a local one."
        )
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")


def _migrate(path: Path, connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    """Bring the file to the newest version, step by step. A step that fails leaves the version before it."""
    version, newest = _version(connection), _newest(migrations)
    if version == newest:
        return
    with _draft_of(beside(path, f".v{version}")) as draft, closing(connect(draft)) as copy:
        connection.backup(copy)
    for step in range(version, newest):
        with _transaction(connection):
            try:
                migrations[step - 1](connection)
            except (LookupError, TypeError, ValueError) as error:
                raise _damaged(path, f"no way from version {step} to {step + 1}: {error!r}") from error
            connection.execute(f"PRAGMA user_version = {step + 1}")
            if step + 1 == newest:
                _check_rows(path, connection, migrations)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or none: what fails in here ends with the connection's closing, which rolls it back."""
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("COMMIT")
