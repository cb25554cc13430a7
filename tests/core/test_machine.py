"""The node in random histories: see `world.py` and `books.py` for what is checked after every step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.hunt import HISTORIES
from tests.core.machine import NodeMachine


def test_a_few_hundred_histories() -> None:
    """The same few hundred histories for everyone: a quick look after every change."""
    run_state_machine_as_test(NodeMachine, settings=settings(HISTORIES, max_examples=200, derandomize=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_thousands_of_histories() -> None:
    """Thousands of histories, new ones in every run."""
    run_state_machine_as_test(
        NodeMachine, settings=settings(HISTORIES, max_examples=2000, stateful_step_count=40)
    )
