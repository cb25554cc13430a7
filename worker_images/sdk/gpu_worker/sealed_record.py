"""What was asked of a sealed worker already: a request runs once, however often its bytes come.

Entries stay for the life of the worker, since a forgotten request would run again.
"""

from __future__ import annotations

RECORD_MAX = 65_536


class Refused(Exception):
    """A task that is not taken: `status` is HTTP's, `code` for programs, `message` for people. Nothing
    of what was asked is in it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


class ReplayRecord:
    """For each request id the encapsulated key that came with it, and the task that it became."""

    def __init__(self, most: int = RECORD_MAX) -> None:
        self._most = most
        self._tasks: dict[str, tuple[bytes, str]] = {}

    def task_of(self, request_id: str, enc: bytes) -> str | None:
        """The task of this very request; None where it is new. Raises `Refused` (409) for another request
        under the same id, and (503) for a new one when the record is full."""
        known = self._tasks.get(request_id)
        if known is None:
            if len(self._tasks) >= self._most:
                raise Refused(503, "this worker has taken all the requests that it may take: it is draining")
            return None
        if known[0] != enc:
            raise Refused(409, "another request came under this id", code="replay")
        return known[1]

    def add(self, request_id: str, enc: bytes, task_id: str) -> None:
        """Remember a request that is new."""
        self._tasks[request_id] = (enc, task_id)
