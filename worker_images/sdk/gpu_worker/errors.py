"""What a task may raise, and what may be raised in it."""

from __future__ import annotations


class TaskError(Exception):
    """Raise it to fail the task with a `code` of your own. Any other exception gives `task_failed`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Cancelled(Exception):
    """Raised by the emitter of a plain `def` task that was asked to stop. Let it pass."""
