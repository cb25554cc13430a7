"""When an engine that is silent is asked again."""

from __future__ import annotations

import pytest

from gpu_server.drivers.breaker import Breaker, Verdict


def open_breaker(at: float) -> Breaker:
    breaker = Breaker(failures=3, pause=5)
    for _ in range(3):
        breaker.failed(at)
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    """An answer in between begins the count anew."""
    breaker = Breaker(failures=3, pause=5)
    for _ in range(2):
        breaker.failed(1)
        breaker.failed(2)
        assert breaker.ask(3) is Verdict.CALL
        breaker.answered()
    for now in (4, 5, 6):
        assert breaker.ask(now) is Verdict.CALL
        breaker.failed(now)
    assert breaker.ask(7) is Verdict.REFUSE


def test_one_caller_tries_after_each_pause() -> None:
    """While it is open, one try is allowed a pause after the last failure, and the next a pause later."""
    breaker = open_breaker(at=10)
    asked = {now: breaker.ask(now) for now in (10.0, 14.9, 15.0, 15.1, 19.9, 20.0, 20.1)}
    assert [now for now, verdict in asked.items() if verdict is Verdict.TRY] == [15.0, 20.0]
    assert set(asked.values()) == {Verdict.TRY, Verdict.REFUSE}
    breaker.failed(22)
    assert breaker.ask(26.9) is Verdict.REFUSE
    assert breaker.ask(27) is Verdict.TRY


def test_one_answer_closes_it() -> None:
    """After the first success every call is made again, and it takes as many failures to open as before."""
    breaker = open_breaker(at=10)
    breaker.answered()
    assert breaker.ask(10) is Verdict.CALL
    breaker.failed(11)
    breaker.failed(12)
    assert breaker.ask(12) is Verdict.CALL


@pytest.mark.parametrize(("now", "again"), [(12, 3), (15, 0), (40, 0)])
def test_the_reason_says_since_when_and_when_it_is_asked_again(now: float, again: int) -> None:
    """Whoever reads it knows how long to wait."""
    breaker = open_breaker(at=10)
    assert breaker.why(now) == (
        f"the Docker engine has not answered for {now - 10} s; it is asked again in {again} s"
    )
