"""The durable record of the service's decisions, in one SQLite file.

It is in WAL mode with synchronous=NORMAL. What was written survives any end of the process, SIGKILL included.
A power cut or a crash of the kernel may take the last transactions, whole ones and the latest only, and never
the file's consistency; not those before a `secure` that returned. See
https://www.sqlite.org/pragma.html#pragma_synchronous and https://www.sqlite.org/wal.html. The folder must be
on a local file system.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import orjson
import structlog

from gpu_server.core.rows import Change, Row, Table
from gpu_server.drivers.journal_file import (
    MIGRATIONS,
    Migration,
    beside,
    connect,
    open_file,
    read_rows,
    sync_folder,
)
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
# Of these there may be many, and they are looked for by their slot.
_UPSERT[Table.CERTIFICATES] = (
    "INSERT INTO certificates (id, row, slot) VALUES (?1, ?2, json_extract(?2, '$.slot_id'))"
    " ON CONFLICT (id) DO UPDATE SET row = excluded.row, slot = excluded.slot"
)
_DELETE: Final = {table: f"DELETE FROM {table.value} WHERE id = ?" for table in Table}

Key = tuple[Table, str]


class SqliteJournal:
    """One writer, on the event loop: `write` blocks, for some tens of microseconds.

    `checkpoint` and `secure` are for other threads; everything else is for one thread at a time. Only one
    journal of a process may have the file open.
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
        self._syncing = threading.Lock()
        # Kept open, since a file that is opened later may not hear of what could not be written before.
        self._log: int | None = None
        self._not_synced: str | None = None

    def open(self) -> None:
        """Open the journal, made if it is not there, in a folder that is. Raises `JournalUnusable`."""
        self._path = self._path.resolve()
        self._connection = open_file(self._path, self._migrations)
        _empty_the_log(self._connection)
        try:
            self._log = os.open(beside(self._path, "-wal"), os.O_RDONLY)
            sync_folder(self._path.parent)
        except OSError as error:
            self.close()
            raise JournalUnusable(f"The journal {self._path} cannot be used now: {error}.") from error

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

    def secure(self) -> None:
        """Force the write-ahead log to the disk. Blocks, while `write` and `checkpoint` go on. What has left
        the log was synchronised by the checkpoint that moved it.

        Raises `JournalFailing`, also while changes are pending. Once the disk has refused, it does so until
        the journal is opened again: the kernel may have dropped what it could not write, and would report
        success the next time (https://lwn.net/Articles/752063/). Opening finds out what is there.
        """
        with self._syncing:
            if self._log is None or self.failing is not None:
                raise JournalFailing(f"The journal {self._path} is not secure: {self.failing or 'not open'}")
            if self._not_synced is None:
                try:
                    os.fdatasync(self._log)
                except OSError as error:
                    self._not_synced = str(error)
            if self._not_synced is not None:
                raise JournalFailing(f"The journal {self._path} did not get to its disk: {self._not_synced}")

    def certificate(self, record_hash: str) -> Row | None:
        """The certificate of this record, in hex, or None. Raises `JournalFailing`."""
        found = self._read("SELECT row FROM certificates WHERE id = ?", record_hash)
        return orjson.loads(found[0][0]) if found else None

    def certificates(self, slot_id: str, limit: int) -> tuple[Row, ...]:
        """The newest certificates of a slot, `limit` at most, the newest last. Raises `JournalFailing`."""
        query = "SELECT row FROM certificates WHERE slot = ? ORDER BY rowid DESC LIMIT ?"
        found = self._read(query, slot_id, max(0, limit))
        return tuple(orjson.loads(text) for (text,) in reversed(found))

    def prune(self, kept: int) -> None:
        """Drop all certificates but the newest `kept` of each slot, at least 1. Raises `JournalFailing`."""
        old: list[str] = []
        for (slot_id,) in self._read("SELECT DISTINCT slot FROM certificates"):
            oldest = "SELECT rowid FROM certificates WHERE slot = ? ORDER BY rowid DESC LIMIT 1 OFFSET ?"
            query = f"SELECT id FROM certificates WHERE slot = ? AND rowid <= ({oldest})"
            old += (name for (name,) in self._read(query, slot_id, slot_id, max(1, kept)))
        self.write([Change(table=Table.CERTIFICATES, id=name, row=None) for name in old])

    def _read(self, query: str, *values: str | int) -> list[tuple[str, ...]]:
        try:
            return self._opened().execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise JournalFailing(f"The journal {self._path} could not be read: {error}") from error

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
        with self._checkpointing, self._syncing:
            connection, self._connection = self._connection, None
            log_file, self._log = self._log, None
            if log_file is not None:
                os.close(log_file)
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
