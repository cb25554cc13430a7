"""Models that are fetched ahead, for sessions that start as soon as washes that are under way have ended.

Nothing depends on it: what goes wrong here is told by the start itself, if it still does then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

import structlog

from gpu_server.core.errors import Refusal
from gpu_server.core.node import Node
from gpu_server.core.sessions import Session, SessionState
from gpu_server.launch import Launcher
from gpu_server.ports import StartRefused

log = structlog.get_logger()


class Host(Protocol):
    """What prefetches need of the engine."""

    node: Node

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...


class Prefetches:
    """At most one for each session that waits."""

    def __init__(self, host: Host, launcher: Launcher) -> None:
        self._host, self._launcher = host, launcher
        self._running: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, session_id: str) -> None:
        """Fetch and read ahead what this session needs, if it is still there."""
        session = self._host.node.sessions.get(session_id)
        if session is None or session_id in self._running:
            return
        task = self._running[session.id] = self._host.spawn(f"{session.id}: prefetch", self._fetch(session))
        task.add_done_callback(lambda _: self._running.pop(session.id, None))

    def review(self) -> None:
        """After each decision: who does not wait any more needs none. A start has asked for itself by then,
        so that nothing shared is given up."""
        for session_id, task in list(self._running.items()):
            session = self._host.node.sessions.get(session_id)
            if session is None or session.state is not SessionState.WAITING:
                task.cancel()

    async def _fetch(self, session: Session) -> None:
        try:
            await self._launcher.fetch_ahead(session)
        except (StartRefused, Refusal) as refused:
            log.info("model.not_prefetched", session_id=session.id, reason=refused.message)
        except Exception:  # whatever it is, the start tells it again, and it is logged
            log.exception("model.not_prefetched", session_id=session.id)
