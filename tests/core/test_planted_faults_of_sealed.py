"""Faults of nodes that serve sealed sessions, planted and found by the random histories."""

from __future__ import annotations

import pytest

from gpu_server.core import events as ev
from gpu_server.core.admission import owned_session
from gpu_server.core.node import Node
from gpu_server.core.rows import Row, Table
from gpu_server.core.sessions import Session
from tests.core.hunt import CAUGHT, MakeNode, hunt, names

pytestmark = pytest.mark.timeout(300)  # some faults show in the thousandth history only


class TakesAnyWorker(Node):
    """A worker that shows another key is believed."""

    def _worker_key_shown(self, event: ev.WorkerKeyShown, now: float) -> None:
        session = self.sessions.get(event.session_id)
        if session is not None and session.sealing is not None and not session.ended:
            session.worker_key = event.key
            self._touch_session(session.id)


class NeedsNoKey(Node):
    """A worker without a key serves a sealed session."""

    def _worker_ready(self, event: ev.WorkerReady, now: float) -> None:
        session = self.sessions.get(event.session_id)
        sealing = session.sealing if session is not None else None
        if session is not None:
            session.sealing = None
        super()._worker_ready(event, now)
        if session is not None:
            session.sealing = sealing


class OpensForAnyone(Node):
    """A grant is taken for any tenant's session."""

    def _session_opened(self, event: ev.SessionOpened, now: float) -> None:
        owner = self.sessions[event.session_id].tenant if event.session_id in self.sessions else event.tenant
        given = ev.SessionOpened(
            session_id=event.session_id, tenant=owner, psk_id=event.psk_id, grant=event.grant
        )
        super()._session_opened(given, now)


class OpensBehindTheEnd(Node):
    """A grant is taken for a session whose container is being taken down."""

    def _session_opened(self, event: ev.SessionOpened, now: float) -> None:
        session = owned_session(self, event.session_id, event.tenant)
        if session.worker_key is None or not session.tearing_down:
            super()._session_opened(event, now)
            return
        session.grants[event.psk_id] = event.grant
        self._touch_session(session.id)


class KeepsTheOldestGrants(Node):
    """The newest grant goes first."""

    def _session_opened(self, event: ev.SessionOpened, now: float) -> None:
        session = self.sessions.get(event.session_id)
        before = dict(session.grants) if session is not None else {}
        super()._session_opened(event, now)
        if session is not None and len(before) >= self.rules.grants_max:
            session.grants = before


class TakesPlainTasks(Node):
    """A plain task gets into a sealed session."""

    def _task_submitted(self, event: ev.TaskSubmitted, now: float) -> None:
        session = self.sessions.get(event.session_id or "")
        sealing = session.sealing if session is not None else None
        if session is not None and event.psk_id is None:
            session.sealing = None
        try:
            super()._task_submitted(event, now)
        finally:
            if session is not None:
                session.sealing = sealing


class NeverHasEnough(Node):
    """A session that has had all its sealed tasks goes on idling."""

    def _end_if_drained(self, session: Session, now: float) -> None:
        if self.shutting_down:
            super()._end_if_drained(session, now)


class ForgetsGrants(Node):
    """Grants do not outlive the service."""

    def _row(self, table: Table, name: str) -> Row | None:
        row = super()._row(table, name)
        return {**row, "grants": {}} if row is not None and table is Table.SESSIONS else row


FAULTS: list[tuple[MakeNode, str]] = [
    (TakesAnyWorker, "is sealed otherwise|serves whom it was not opened for"),
    (NeedsNoKey, "serves whom it was not opened for"),
    (OpensForAnyone, "opened by another"),
    (OpensBehindTheEnd, "granted to one that ends"),
    (KeepsTheOldestGrants, "is sealed otherwise"),
    (TakesPlainTasks, "sealed and plain are mixed"),
    (NeverHasEnough, "takes no more tasks idles"),
    (ForgetsGrants, "is sealed otherwise|a task that its worker cannot open"),
]


@pytest.mark.parametrize(("make_node", "complaint"), FAULTS, ids=names(FAULTS))
def test_a_planted_fault_is_found(make_node: MakeNode, complaint: str) -> None:
    """What the node does gives the fault away, without a look at its state."""
    with pytest.raises(CAUGHT, match=complaint):
        hunt(make_node, inspect=False)
