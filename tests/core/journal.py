"""A journal in memory, and what another life of the service would make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from gpu_server.core.node import Node
from gpu_server.core.rows import STATE_TABLES, Change, Rows, Table
from gpu_server.core.sessions import Rules
from tests.core.invariants import durable, must
from tests.core.papers import judge


class Journal:
    """What was written of a node, each row as the text of its JSON."""

    def __init__(self) -> None:
        self._texts: dict[Table, dict[str, str]] = {table: {} for table in Table}

    def write(self, changes: Iterable[Change]) -> None:
        """Write the changes of one decision."""
        for change in changes:
            texts = self._texts[change.table]
            if change.row is None:
                texts.pop(change.id, None)
            else:
                texts[change.id] = json.dumps(change.row, allow_nan=False)

    def replace(self, rows: Rows) -> None:
        """Hold these rows of a state and no others."""
        for table, kept in rows.items():
            self._texts[table] = {name: json.dumps(row) for name, row in kept.items()}

    def rows(self) -> dict[Table, dict[str, Any]]:
        """What another life of the service reads."""
        return {
            table: {name: json.loads(text) for name, text in texts.items()}
            for table, texts in self._texts.items()
            if table in STATE_TABLES
        }

    def certificates(self) -> dict[str, Any]:
        """What nobody but operators and clients reads."""
        return {name: json.loads(text) for name, text in self._texts[Table.CERTIFICATES].items()}


def _new_node(rules: Rules) -> Node:
    return Node(rules, judge=judge)


def check_cut(node: Node, journal: Journal, make_node: Callable[[Rules], Node] = _new_node) -> None:
    """Raises `Broken` unless a node that is made of the journal now is this one, in all that is promised."""
    other = make_node(node.rules)
    other.restore(journal.rows())
    must(not other.take_changes(), "a node that was just restored has something to write")
    here, there = durable(node), durable(other)
    for part, mine in here.items():
        must(there[part] == mine, f"{part} would not survive:", mine, there[part])
    ends = [(other.tasks[task_id].finished_at or 0) for task_id in other._ended_tasks]
    closes = [(other.sessions[session_id].closed_at or 0) for session_id in other._ended_sessions]
    in_order = ends == sorted(ends) and closes == sorted(closes)
    must(in_order, "what has ended would not be forgotten in its order:", ends, closes)
