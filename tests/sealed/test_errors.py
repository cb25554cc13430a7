"""The errors of the sealed path."""

from __future__ import annotations

from gpu_server.sealed import errors
from gpu_server.sealed.errors import AttestationRefused, CannotOpen, SealedError


def test_one_family() -> None:
    """Whoever catches SealedError catches all of them."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) == 5
    assert all(issubclass(kind, SealedError) for kind in kinds)


def test_a_failure_to_open_says_nothing_more() -> None:
    """Every failure to open has the same words, so that nobody learns which byte was wrong."""
    assert str(CannotOpen()) == str(CannotOpen())
    assert CannotOpen().args == ("cannot be opened with these keys and names",)


def test_a_refused_attestation_has_a_reason() -> None:
    """A program reads the reason's code, a person the message."""
    refused = AttestationRefused("root", "the document's chain does not end in the root")
    assert refused.reason == "root"
    assert str(refused) == "the document's chain does not end in the root"
