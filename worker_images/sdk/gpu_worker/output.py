"""What a task prints becomes its `logs` events, and, unless it is sealed, reaches the real stdout and stderr.

A context variable says whose output it is, so concurrent tasks are told apart, also in threads that were
started with `asyncio.to_thread`. Printing never waits: it may happen on the event loop, or under a logging
handler's lock. Lines that find the task's history full are left out, and a line says how many.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO, cast

from gpu_worker import frames
from gpu_worker.history import History

_LINE_MAX = 16_384  # characters; a longer line is cut in pieces


class TaskOutput:
    """The lines of one task. Those of a `private` one are for its history alone."""

    def __init__(self, history: History, *, private: bool = False) -> None:
        self.private = private
        self._history = history
        self._lock = threading.Lock()
        self._open_line = {"stdout": "", "stderr": ""}
        self._left_out = 0

    def write(self, stream: str, text: str) -> None:
        with self._lock:
            *lines, rest = (self._open_line[stream] + text).split("\n")
            if "\r" in rest.rstrip("\r"):  # a progress bar draws over its line
                rest = rest[rest.rstrip("\r").rindex("\r") + 1 :]
            while len(rest) > _LINE_MAX:
                lines.append(rest[:_LINE_MAX])
                rest = rest[_LINE_MAX:]
            self._open_line[stream] = rest
            for line in lines:
                self._offer(stream, line)

    def rest(self) -> list[bytes]:
        """The frames of what was begun and has no line end yet, for the task's end."""
        with self._lock:
            left = [self._notice()] if self._left_out else []
            return left + [_frame(name, line) for name, line in self._open_line.items() if line]

    def _offer(self, stream: str, line: str) -> None:
        if self._left_out and self._history.offer(self._notice()):
            self._left_out = 0
        for start in range(0, max(len(line), 1), _LINE_MAX):
            if self._left_out or not self._history.offer(_frame(stream, line[start : start + _LINE_MAX])):
                self._left_out += 1

    def _notice(self) -> bytes:
        return frames.logs(
            "stderr", f"[gpu_worker] {self._left_out} lines left out: nobody took them in time"
        )


def _frame(stream: str, line: str) -> bytes:
    return frames.logs(stream, line.rstrip("\r").rpartition("\r")[2])


current: ContextVar[TaskOutput | None] = ContextVar("gpu_worker_output", default=None)


class _Tee:
    """Stands in for sys.stdout or sys.stderr."""

    def __init__(self, name: str, real: TextIO) -> None:
        self._name = name
        self._real = real

    def write(self, text: str) -> int:
        output = current.get()
        if output is None or not output.private:
            self._real.write(text)
        if output is not None:
            output.write(self._name, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Capture sys.stdout and sys.stderr for as long as the context lasts."""
    real = sys.stdout, sys.stderr
    for stream in real:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    sys.stdout, sys.stderr = (
        cast(TextIO, _Tee(name, stream)) for name, stream in zip(("stdout", "stderr"), real, strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = real


@contextlib.contextmanager
def hushed() -> Iterator[Callable[[], None]]:
    """For a process whose output must tell nothing of its tasks. From here on the descriptors 1 and 2 are
    /dev/null, so native code and children write there. sys.stdout and sys.stderr still lead to the real ones
    until the function that this gives is called: then nothing does, also after the context. Before
    `captured`."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(Exception):  # closed, or nobody reads it
            stream.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    real = [_duplicate(number, null) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(null, number)

    def hush() -> None:
        for number in real:
            os.dup2(null, number, inheritable=False)

    with contextlib.ExitStack() as streams:
        sys.stdout, sys.stderr = (
            streams.enter_context(open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace"))
            for number in real
        )
        streams.callback(os.close, null)
        try:
            yield hush
        finally:
            sys.stdout, sys.stderr = before
            for number, other in zip((1, 2), real, strict=True):
                os.dup2(other, number)


def _duplicate(number: int, otherwise: int) -> int:
    try:
        return os.dup(number)
    except OSError:  # whoever started this process closed it
        return os.dup(otherwise)
