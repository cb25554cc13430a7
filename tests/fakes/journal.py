"""A journal without a disk."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from gpu_server.core.rows import STATE_TABLES, Change, Row, Table
from gpu_server.ports import JournalFailing

Disk = dict[Table, dict[str, bytes]]

_CLOSED = "it is not open"


class MemoryJournal:
    """`Journal` in memory. `disk` is what is written; give it to another one, and that is the next life.

    While `refuse` is set, writes fail and say that, and nothing is secured. `wants_checkpoint` is the test's
    to set.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk: Disk = {table: {} for table in Table} if disk is None else disk
        self.refuse: str | None = None
        self.failing: str | None = None
        self.wants_checkpoint = False
        self.checkpoints = 0
        self.secured = 0
        self._pending: list[tuple[Table, str, bytes | None]] = []

    def load(self) -> dict[Table, dict[str, Row]]:
        return {
            table: {row_id: orjson.loads(text) for row_id, text in rows.items()}
            for table, rows in self.disk.items()
            if table in STATE_TABLES
        }

    def write(self, changes: Iterable[Change]) -> None:
        self._pending += [
            (
                change.table,
                change.id,
                None if change.row is None else orjson.dumps(change.row, option=orjson.OPT_NON_STR_KEYS),
            )
            for change in changes
        ]
        if not self._pending:
            return
        if self.refuse is not None:
            self.failing = self.refuse
            raise JournalFailing(self.refuse)
        for table, row_id, text in self._pending:
            if text is None:
                self.disk[table].pop(row_id, None)
            else:
                self.disk[table][row_id] = text
        self._pending.clear()
        self.failing = None

    def secure(self) -> None:
        if self.refuse is not None or self._pending:
            raise JournalFailing(self.refuse or "something waits to be written")
        self.secured += 1

    def certificate(self, record_hash: str) -> Row | None:
        text = self._certificates().get(record_hash)
        return None if text is None else orjson.loads(text)

    def certificates(self, slot_id: str, limit: int) -> tuple[Row, ...]:
        rows = [orjson.loads(text) for text in self._certificates().values()]
        mine = [row for row in rows if row["slot_id"] == slot_id]
        return tuple(mine[max(0, len(mine) - limit) :])

    def prune(self, kept: int) -> None:
        names: dict[str, list[str]] = {}
        for name, text in self._certificates().items():
            names.setdefault(orjson.loads(text)["slot_id"], []).append(name)
        old = [name for mine in names.values() for name in mine[:-kept]]
        self.write([Change(table=Table.CERTIFICATES, id=name, row=None) for name in old])

    def _certificates(self) -> dict[str, bytes]:
        if self.refuse == _CLOSED:
            raise JournalFailing(_CLOSED)
        return self.disk[Table.CERTIFICATES]

    def checkpoint(self) -> None:
        self.checkpoints += 1
        self.wants_checkpoint = False

    def close(self) -> None:
        self.refuse = _CLOSED
