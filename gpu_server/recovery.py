"""Recovery: what an earlier life of the service left, put together before the first decision.

The journal holds what was decided, the spool what was said and told. Where they differ the journal is right:
an event in the spool that no decision has counted was never shown to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from gpu_server.core.node import Node
from gpu_server.core.rows import Change, Rows, Table, moved_in_time, with_words, without_fingerprints
from gpu_server.core.state import LIFE
from gpu_server.drivers.spool import Spool
from gpu_server.inputs import Inputs
from gpu_server.ports import Journal
from gpu_server.streams import Streams

log = structlog.get_logger()


def recover(
    node: Node,
    *,
    journal: Journal,
    spool: Spool,
    streams: Streams,
    inputs: Inputs,
    boot_id: str,
    wall_offset: float,
) -> bool:
    """Fill the node, the streams and the inputs; whether the machine was restarted since.

    `boot_id` names this boot of the machine ("" where it has no name: then it counts as another one),
    `wall_offset` is what to add to the node's seconds for the time of day. Raises `RowsUnusable`.
    """
    rows: Rows = journal.load()
    before = rows[Table.NODE].get(LIFE)
    rebooted = before is not None and (not boot_id or before["boot_id"] != boot_id)
    if before is not None and rebooted:
        rows = moved_in_time(rows, before["wall_offset"] - wall_offset)
    _, made_now = spool.secret()
    if made_now:
        rows = without_fingerprints(rows)
    kept = spool.known()
    node.restore(with_words(rows, _words(spool, kept, rows)))
    # With what they belong to, so that the life after this one does not take old rows for new ones.
    anew = _all_of(rows) if rebooted or made_now else []
    life = Change(table=Table.NODE, id=LIFE, row={"boot_id": boot_id, "wall_offset": wall_offset})
    journal.write([*anew, life])
    for task in node.tasks.values():
        if task.ended:
            streams.restore_ended(task.id, task.told)
            spool.drop_input(task.id)  # left by a life that ended right behind the task
        else:
            streams.restore_live(task.id, task.told)
            inputs.restore(task.id)
    for leftover in kept - node.tasks.keys() - node.sessions.keys():
        spool.drop_input(leftover)
        spool.drop_history(leftover)
        spool.drop_note(leftover)
    log.info(
        "service.recovered",
        sessions=len(list(node.live_sessions())),
        tasks=sum(not task.ended for task in node.tasks.values()),
        rebooted=rebooted,
    )
    return rebooted


def _all_of(rows: Rows) -> list[Change]:
    return [
        Change(table=table, id=name, row=row) for table, kept in rows.items() for name, row in kept.items()
    ]


def _words(spool: Spool, kept: set[str], rows: Rows) -> Mapping[str, Mapping[str, str]]:
    """What workers said about their ends, where it is still there."""
    names = kept & (rows[Table.SESSIONS].keys() | rows[Table.TASKS].keys())
    notes: dict[str, Any] = {name: spool.note(name) for name in names}
    return {name: note for name, note in notes.items() if note}
