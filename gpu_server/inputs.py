"""Inputs of tasks that no worker has yet: in the spool, so that they outlive the service, and bounded."""

from __future__ import annotations

import structlog

from gpu_server.core.admission import RETRY_AFTER_SECONDS
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.drivers.spool import Spool

MAX_BYTES = 256 << 20

log = structlog.get_logger()


class Inputs:
    """What tasks were submitted with, until a worker has it for certain or the task has ended."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._sizes: dict[str, int] = {}
        self._total = 0

    def put(self, task_id: str, body: bytes) -> None:
        """Keep an input. Raises `Refusal` where there is no room, and then nothing is kept."""
        if self._total + len(body) > MAX_BYTES:
            message = f"the inputs of queued tasks together would pass {MAX_BYTES} bytes"
            raise Refusal(RefusalCode.TOO_MUCH_QUEUED, message, retry_after=RETRY_AFTER_SECONDS)
        try:
            self._spool.put_input(task_id, body)
        except OSError as error:
            log.error("input.not_kept", task_id=task_id, reason=str(error))
            message = f"the task's input cannot be kept: {error.strerror}"
            raise Refusal(RefusalCode.STORAGE_FAILING, message, retry_after=RETRY_AFTER_SECONDS) from error
        self._count(task_id, len(body))

    def get(self, task_id: str) -> bytes | None:
        """The input, or None when it is not there (any more)."""
        try:
            return self._spool.input(task_id)
        except OSError as error:
            log.error("input.unreadable", task_id=task_id, reason=str(error))
            return None

    def drop(self, task_id: str) -> None:
        """Nobody needs it any more; dropping it twice is dropping it once."""
        if (size := self._sizes.pop(task_id, None)) is not None:
            self._total -= size
            self._spool.drop_input(task_id)

    def restore(self, task_id: str) -> None:
        """An earlier life may have kept the input of this task."""
        if (body := self.get(task_id)) is not None:
            self._count(task_id, len(body))

    def _count(self, task_id: str, size: int) -> None:
        self._sizes[task_id] = size
        self._total += size
