"""Which uids are the workers' alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_server.drivers.residue_uids import trusted_uids, why_blind, workers_uids
from gpu_server.ports import EndedLease, NotSeen


def lease(*uids: int) -> EndedLease:
    return EndedLease(session_id="s_1", fence=5, slot_ids=("cpu-0",), uids=uids)


def test_workers_have_uids_of_their_own_only_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each slot's number; without root they have the service's."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert workers_uids(20_000, (0, 3)) == (20_000, 20_003)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert workers_uids(20_000, (0, 3)) == ()
    with pytest.raises(NotSeen, match="no uid of their own"):
        trusted_uids()(lease(20_000))


def test_a_uid_that_others_have_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account of the machine, root first of all, is never taken for a worker."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert trusted_uids()(lease(1_900_000_001, 1_900_000_002)) == {1_900_000_001, 1_900_000_002}
    with pytest.raises(NotSeen, match="uid 0 is an account"):
        trusted_uids()(lease(1_900_000_001, 0))
    with pytest.raises(NotSeen, match="no uid of their own"):
        trusted_uids()(lease())
    with pytest.raises(NotSeen, match="it is dark"):
        trusted_uids("it is dark")(lease(1_900_000_001))


def test_own_namespaces_are_known(tmp_path: Path) -> None:
    """Who is in a container sees the container, and says so."""
    for name in ("pid", "ipc", "user"):
        (tmp_path / name).touch()
    reason = why_blind(tmp_path)
    assert reason is not None
    assert "pid namespaces of its own" in reason
    for name in ("pid", "ipc"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(f"/proc/self/ns/{name}")
    if "pid" not in (why_blind() or "") and "ipc" not in (why_blind() or ""):
        assert "user namespaces of its own" in (why_blind(tmp_path) or "")
    assert why_blind(tmp_path / "not-there") == "the service cannot tell which namespaces it is in"
