"""Hunting planted faults: a node that is wrong in one way is driven through histories until it is caught."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from gpu_server.core.node import Node
from gpu_server.core.rows import RowsUnusable
from gpu_server.core.sessions import Rules
from gpu_server.core.slots import Slots
from gpu_server.core.waitline import WaitLine
from tests.core.invariants import Broken
from tests.core.machine import NodeMachine
from tests.core.papers import judge

HISTORIES = settings(
    stateful_step_count=50,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
HUNT = settings(
    HISTORIES,
    max_examples=300,
    phases=[Phase.generate],  # the first history that shows the fault is enough
    report_multiple_bugs=False,
)

BEGINNINGS = 10
"""A hunt that has begun badly may go on for thousands of histories; then another one finds it in a few."""

CAUGHT = (Broken, RowsUnusable)

MakeNode = Callable[[Rules], Node] | type[Node]


def hunt(make_node: MakeNode, *, inspect: bool = False, cut: bool = False, light: bool = False) -> None:
    """Drive nodes of this make until one is caught. The histories are the same in every run."""
    made = of(make_node) if isinstance(make_node, type) else make_node
    members = {"make_node": staticmethod(made), "inspect": inspect, "cut": cut, "light": light}
    for beginning in range(BEGINNINGS):
        run_state_machine_as_test(seed(beginning)(type("Planted", (NodeMachine,), members)), settings=HUNT)


def with_slots(slots: type[Slots]) -> MakeNode:
    """Nodes with slots of this kind."""

    def make(rules: Rules) -> Node:
        node = Node(rules, judge=judge)
        node.slots = slots()
        return node

    return make


def with_line(line: type[WaitLine]) -> MakeNode:
    """Nodes with a wait line of this kind."""

    def make(rules: Rules) -> Node:
        node = Node(rules, judge=judge)
        node.line = line()
        return node

    return make


def of(kind: type[Node]) -> MakeNode:
    """Nodes of this kind."""

    def make(rules: Rules) -> Node:
        return kind(rules, judge=judge)

    return make


def names(faults: list[tuple[MakeNode, str]]) -> list[str]:
    """What these faults are called in the report."""
    found = []
    for make_node, _ in faults:
        cells = getattr(make_node, "__closure__", None)
        found.append(str((cells[0].cell_contents if cells else make_node).__name__))
    return found
