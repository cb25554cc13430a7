"""Timers: deadlines set, moved, cancelled, and popped in the order in which they are due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_server.core.timers import Alarm, Timers


def test_the_earliest_deadline_is_next() -> None:
    """The order of setting does not matter."""
    timers = Timers()
    assert timers.next() is None
    timers.set(Alarm.IDLE, "b", 20.0)
    timers.set(Alarm.IDLE, "a", 10.0)
    assert timers.next() == 10.0
    assert timers.pop_due(9.9) is None
    assert timers.pop_due(30.0) == (Alarm.IDLE, "a")
    assert timers.pop_due(30.0) == (Alarm.IDLE, "b")
    assert timers.pop_due(30.0) is None


def test_a_deadline_is_due_on_time() -> None:
    """Due at ten means at ten, not after it."""
    timers = Timers()
    timers.set(Alarm.TASK, "t1", 10.0)
    assert timers.pop_due(10.0) == (Alarm.TASK, "t1")


def test_a_deadline_moves_both_ways() -> None:
    """Setting again replaces; the old time is not heard of."""
    timers = Timers()
    timers.set(Alarm.IDLE, "s", 10.0)
    timers.set(Alarm.IDLE, "s", 30.0)
    assert timers.pop_due(20.0) is None
    timers.set(Alarm.IDLE, "s", 10.0)
    timers.set(Alarm.IDLE, "s", 10.0)
    assert timers.get(Alarm.IDLE, "s") == 10.0
    assert timers.pop_due(20.0) == (Alarm.IDLE, "s")
    assert timers.pop_due(40.0) is None


def test_a_cancelled_deadline_does_not_come() -> None:
    """Cancelling is silent, also for what was never set."""
    timers = Timers()
    timers.set(Alarm.IDLE, "s", 10.0)
    timers.set(Alarm.START, "s", 12.0)
    timers.cancel(Alarm.IDLE, "s")
    timers.cancel(Alarm.IDLE, "other")
    assert timers.get(Alarm.IDLE, "s") is None
    assert timers.next() == 12.0
    assert len(timers) == 1


def test_a_deadline_that_moves_all_the_time_takes_no_room() -> None:
    """A keepalive a second for a day leaves a handful of entries, not one for each."""
    timers = Timers()
    for second in range(86_400):
        timers.set(Alarm.IDLE, "s", 300.0 + second)
    assert len(timers) == 1
    assert len(timers._heap) < 100
    assert timers.next() == 300.0 + 86_399


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set", "cancel", "pop"]),
            st.sampled_from([Alarm.IDLE, Alarm.TASK]),
            st.sampled_from("abc"),
            st.integers(0, 9),
        ),
        max_size=300,
    )
)
def test_it_is_a_dict_with_a_smallest_value(steps: list[tuple[str, Alarm, str, int]]) -> None:
    """Whatever is done to it, it answers as a plain dict of deadlines would."""
    timers, plain = Timers(), dict[tuple[Alarm, str], float]()
    for what, alarm, entity, when in steps:
        if what == "set":
            timers.set(alarm, entity, float(when))
            plain[alarm, entity] = float(when)
        elif what == "cancel":
            timers.cancel(alarm, entity)
            plain.pop((alarm, entity), None)
        else:
            earliest = min(plain.values(), default=10.0)
            key = timers.pop_due(float(when))
            assert (key is None) == (earliest > when)
            if key is not None:
                assert plain.pop(key) == earliest
        assert timers.next() == min(plain.values(), default=None)
        assert len(timers) == len(plain)
