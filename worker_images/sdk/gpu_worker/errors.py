"""What a task may raise, and what may be raised in it."""

from __future__ import annotations

import re

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class TaskError(Exception):
    """Raise it to fail the task with a `code` of your own. Any other exception gives `task_failed`.

    A code is a name, not a text: up to 64 of a-z, 0-9 and _, beginning with a letter; else ValueError.
    """

    def __init__(self, code: str, message: str) -> None:
        if not isinstance(code, str) or _CODE.fullmatch(code) is None:
            raise ValueError(f"{code!r} is no code: use up to 64 of a-z, 0-9 and _, beginning with a letter")
        super().__init__(message)
        self.code = code
        self.message = message


class Cancelled(Exception):
    """Raised by the emitter of a plain `def` task that was asked to stop. Let it pass."""
