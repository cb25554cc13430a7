"""Errors: stable codes, and messages that say which thing they are about."""

from __future__ import annotations

import re

import pytest

from gpu_server.core.errors import (
    CertificateRejected,
    FailureCode,
    ImpossibleTransition,
    Refusal,
    RefusalCode,
)


@pytest.mark.parametrize("code", [*RefusalCode, *FailureCode])
def test_a_code_is_its_name_in_small_letters(code: RefusalCode | FailureCode) -> None:
    """Clients match on codes, so a code is one plain word."""
    assert code.value == code.name.lower()
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code.value)


def test_a_refusal_carries_what_a_client_needs() -> None:
    """Code, message, the ids that it is about and when to come back; ids that are unknown are left out."""
    refusal = Refusal(RefusalCode.SESSION_QUEUE_FULL, "5 wait", retry_after=5, session_id="s1", task_id=None)
    assert (refusal.code, refusal.message, str(refusal)) == (
        "session_queue_full",
        "5 wait",
        "5 wait",
    )
    assert refusal.retry_after == 5
    assert refusal.ids == {"session_id": "s1"}


def test_an_impossible_transition_tells_the_story() -> None:
    """Who, from where, to where, and what went before."""
    error = ImpossibleTransition("slot", "g0", "free", "washing", ["washing->free: a", "free->leased: b"])
    assert str(error) == "slot g0: free -> washing is impossible (history: washing->free: a; free->leased: b)"
    assert "no moves yet" in str(ImpossibleTransition("slot", "g0", "free", "washing", []))


def test_a_rejected_certificate_says_why() -> None:
    """The slot and the reason."""
    assert str(CertificateRejected("g0", "no such slot")) == "slot g0: certificate rejected: no such slot"
