"""Waiting for a session to open: how long, and what the caller hears of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from gpu_server.client.service import AWAY, Client, Patience, Refused

TROUBLE: Final = frozenset({"enclave_unavailable", "enclave_busy", "kms_down", "session_not_ready"})
"""Codes of what may pass by itself, and of which the service itself says that it is well."""
MAX_REASON: Final = 500

OnWait = Callable[[str], None]

log = logging.getLogger(__name__)


class OpenTimeout(TimeoutError):
    """The session was not open in the time that was given; the message says what it waited for at last."""


class Waiting:
    """One opening, which may take `seconds`. Trouble of the enclave or of the key service is waited for
    `trouble_seconds`, since a session that waits holds its slot.

    `on_wait` hears each reason to wait once, in the service's words: they are hints, and may hold anything.
    Without it they are logged.
    """

    def __init__(self, seconds: float, trouble_seconds: float, on_wait: OnWait | None) -> None:
        self._seconds, self._trouble_seconds = seconds, trouble_seconds
        self._on_wait: OnWait = on_wait or (lambda reason: log.info("waiting: %s", reason))
        self._told: set[str] = set()
        self._last = ""

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """All of the opening happens in here. Raises `OpenTimeout`."""
        try:
            async with asyncio.timeout(self._seconds) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            waited = f"; it was {self._last}" if self._last else ""
            raise OpenTimeout(f"the session was not open after {self._seconds:g} s{waited}") from error

    def for_session(self, found: Mapping[str, Any]) -> None:
        """Tell that the session has no worker yet, and how far it is."""
        state, stage = found.get("state"), found.get("stage")
        if state == "waiting":
            self._tell("waiting for a slot: all are taken")
        elif isinstance(stage, str):
            self._tell(f"waiting for its worker, which is being started ({stage})")
        else:
            self._tell("waiting for its worker, which is being started")

    def refusals(self, client: Client) -> Refusals:
        """What decides whether a refusal is waited out."""
        return Refusals(self._tell, client.patience(), Patience(client.clock, self._trouble_seconds))

    def _tell(self, reason: str) -> None:
        self._last = reason = reason[:MAX_REASON]
        if reason not in self._told:
            self._told.add(reason)
            self._on_wait(reason)


class Refusals:
    """Refusals of one request that is made again and again."""

    def __init__(self, tell: OnWait, away: Patience, trouble: Patience) -> None:
        self._tell, self._away, self._trouble = tell, away, trouble

    async def wait_out(self, refused: Refused) -> None:
        """Return when it is time to ask again. Raises `refused` when that would not help, or did not."""
        if refused.code in TROUBLE:
            patience = self._trouble
        elif refused.status in AWAY:
            patience = self._away
        else:
            raise refused
        self._tell(f"waiting, refused with {refused.code}: {refused.problem.get('detail', 'no detail')}")
        await patience.wait(refused)

    def renew(self) -> None:
        """A sign of life of the service."""
        self._away.renew()
