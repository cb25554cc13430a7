"""The durable record of the service's decisions, in one SQLite file.

It is in WAL mode with synchronous=NORMAL. What was written survives any end of the process, SIGKILL included.
A power cut or a crash of the kernel may take the last transactions, whole ones and the latest only, and never
the file's consistency. See https://www.sqlite.org/pragma.html#pragma_synchronous and
https://www.sqlite.org/wal.html. The folder must be on a local file system.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import orjson
import structlog

from gpu_server.core.rows import Change, Row, Table
from gpu_server.drivers.journal_file import MIGRATIONS, Migration, connect, open_file, read_rows
from gpu_server.ports import JournalFailing, JournalUnusable

log = structlog.get_logger()

_BOUND: Final = 4 << 20
# A change writes about two pages to the log, one of the table and one of its index, each with its header.
_CHANGE_SIZE: Final = 2 * (4096 + 24)

_UPSERT: Final = {
    table: (
        f"INSERT INTO {table.value} (id, row) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET row = excluded.row"
    )
    for table in Table
}
_DELETE: Final = {table: f"DELETE FROM {table.value} WHERE id = ?" for table in Table}

Key = tuple[Table, str]


class SqliteJournal:
    """One writer, on the event loop: `write` blocks, for some tens of microseconds.

    `checkpoint` is for another thread; everything else is for one thread at a time. Only one journal of a
    process may have the file open.
    """

    def __init__(self, path: Path, *, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        self.failing: str | None = None
        self._path = path
        self._migrations = migrations
        self._connection: sqlite3.Connection | None = None
        # Pending, in the order in which it is written: a row that was gone and came back is in both.
        self._gone: dict[Key, None] = {}
        self._kept: dict[Key, str] = {}
        # Bytes of the log, counted from the start: of all writes begun, up to the last one that succeeded,
        # and of all that had begun when the last checkpoint ended.
        self._begun = 0
        self._written = 0
        self._covered = 0
        self._checkpointing = threading.Lock()

    def open(self) -> None:
        """Open the journal, made if it is not there, in a folder that is. Raises `JournalUnusable`."""
        self._path = self._path.resolve()
        self._connection = open_file(self._path, self._migrations)
        _empty_the_log(self._connection)

    def load(self) -> dict[Table, dict[str, Row]]:
        """All rows that are written, in the order in which they were first. Raises `JournalUnusable`."""
        try:
            return read_rows(self._opened())
        except (sqlite3.Error, ValueError) as error:
            raise JournalUnusable(
                f"The journal {self._path} can no longer be read: {error}. The next start checks it."
            ) from error

    def write(self, changes: Iterable[Change]) -> None:
        """Write these changes and all that are pending, in one transaction.

        Raises `JournalFailing`, and then they stay pending: `write(())` tries again. What is not JSON is a
        TypeError, and then nothing of it was taken.
        """
        # Names of alarms are keys, and members of an enumeration.
        taken = [
            (
                (change.table, change.id),
                None if change.row is None else orjson.dumps(change.row, option=orjson.OPT_NON_STR_KEYS),
            )
            for change in changes
        ]
        for key, text in taken:
            if text is None:
                self._kept.pop(key, None)
                self._gone[key] = None
            else:
                self._kept[key] = text.decode()
        if self._gone or self._kept:
            self._write_pending()

    def _write_pending(self) -> None:
        self._begun += sum(map(len, self._kept.values()))
        self._begun += _CHANGE_SIZE * (len(self._kept) + len(self._gone))
        try:
            self._transact(self._opened())
        except sqlite3.Error as error:
            self.failing = str(error)
            raise JournalFailing(f"The journal {self._path} could not be written: {error}") from error
        self._gone.clear()
        self._kept.clear()
        self._written = self._begun
        self.failing = None

    def _transact(self, connection: sqlite3.Connection) -> None:
        run = connection.cursor().execute
        try:
            run("BEGIN IMMEDIATE")
            for table, row_id in self._gone:
                run(_DELETE[table], (row_id,))
            for (table, row_id), text in self._kept.items():
                run(_UPSERT[table], (row_id, text))
            run("COMMIT")
        finally:
            # A full disk may have ended the transaction already. (https://www.sqlite.org/lang_transaction.html)
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    run("ROLLBACK")

    @property
    def wants_checkpoint(self) -> bool:
        """Whether more than 4 MiB were written since the last checkpoint, reckoned from above."""
        return self._written - self._covered > _BOUND

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the file. Blocks, while `write` goes on: it is PASSIVE, and has a
        connection of its own.

        It begins only if a write succeeded that had begun after the last checkpoint: up to SQLite 3.51.2, one
        that begins on a log copied entirely, while a write starts the log anew, can lose that write's pages
        (https://www.sqlite.org/wal.html#walresetbug).
        """
        with self._checkpointing:
            if self._connection is None or self._written <= self._covered:
                return
            try:
                with closing(connect(self._path)) as connection:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                log.warning("journal.checkpoint_failed", error=str(error))
            finally:
                self._covered = self._begun

    def close(self) -> None:
        """Leave one file, unless somebody reads it; what is pending is lost. Closing twice is no error."""
        with self._checkpointing:
            connection, self._connection = self._connection, None
            if connection is not None:
                _empty_the_log(connection)
                connection.close()

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("it is not open")
        return self._connection


def _empty_the_log(connection: sqlite3.Connection) -> None:
    """Copy the whole write-ahead log into the file and empty it, unless a reader still needs it."""
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        log.warning("journal.checkpoint_failed", error=str(error))
