"""What this process and its children write to stdout and stderr, read on its way to the real ones.

vLLM's engine is a process of its own that says how far it is, and why it ends, only in its log.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from typing import Final

_PIECE = 65_536
_LINE_MAX = 1_000  # the beginning of a line
_LINE_END = re.compile(rb"[\r\n]+")
_SHARDS = re.compile(r"checkpoint shards:[^|]*\|\s{0,9}(\d{1,9})/(\d{1,9}) ")
_GRAPHS = re.compile(r"Capturing CUDA graphs[^|]*\|[^|]*\|\s{0,9}(\d{1,9})/(\d{1,9}) ")
_FAULT = re.compile(r"(?:^|\s)((?:[A-Za-z_]+\.)*[A-Za-z_]*(?:Error|Exception)\b(?::.*)?)$")
# Of the fault that ended an engine these are the echo: who waited for it tells no reason.
_ECHO = re.compile(
    r"EngineDeadError|Engine core initialization failed|EngineCore encountered an issue|Executor failed"
)
# How each line of vLLM's other processes begins, where a colour does not stand before it.
_ENGINE = re.compile(r"(?:\x1b\[[0-9;]{0,9}m)?\((?:EngineCore|Worker)")
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
_HARMLESS: Final = (" WARNING ", " INFO ", " DEBUG ")
_WARM_UP: Final = ("Model loading took", "Warming up model", "Loading weights took")

Stage = tuple[str, float, float | None]


def is_echo(message: str) -> bool:
    """Whether this says only that the engine has failed, and to look elsewhere for why."""
    return _ECHO.search(message) is not None


class Console:
    """`stage` is how far the engine has said it is, `fault` the last error that it has told."""

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.fault: str | None = None
        self._ready = False

    def ready(self) -> None:
        """The engine has started: what went wrong on the way did not end it, and from now on only its own
        processes tell why it ends. This one tells of tasks that failed, too."""
        self._ready = True
        self.stage = self.fault = None

    def hear(self, line: str) -> None:
        """Take one line of the log."""
        line = line[:_LINE_MAX]
        if self._ready:
            if _ENGINE.match(line):
                self._hear_fault(line)
        elif shards := _SHARDS.search(line):
            self.stage = ("weights", int(shards[1]), int(shards[2]))
        elif graphs := _GRAPHS.search(line):
            self.stage = ("graphs", int(graphs[1]), int(graphs[2]))
        elif any(sign in line for sign in _WARM_UP):
            self.stage = ("warm-up", 0, None)
        else:
            self._hear_fault(line)

    def _hear_fault(self, line: str) -> None:
        if any(sign in line for sign in _HARMLESS):
            return
        if died := _DIED.search(line):
            self.fault = died[0]
        elif (fault := _FAULT.search(line)) and not is_echo(line):
            self.fault = fault[1][:500]


class Tap:
    """Passes on all that is written to stdout and stderr, line by line to `hear` on the way, until `close`.

    Children started meanwhile write through it too, so it must live as long as they do.
    """

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear = hear
        self._real = {number: os.dup(number) for number in (1, 2)}
        self._threads = [self._tap(number) for number in self._real]

    def close(self, seconds: float = 0.5) -> None:
        """Let this process write directly again. What the children have written so far arrives within
        `seconds`, if nothing holds it up."""
        for number, real in self._real.items():
            os.dup2(real, number)  # closes our end of the pipe; theirs closes with them
        for thread in self._threads:
            thread.join(seconds)

    def _tap(self, number: int) -> threading.Thread:
        reading, writing = os.pipe()
        os.dup2(writing, number)
        os.close(writing)
        thread = threading.Thread(
            target=self._pass_on, args=(reading, self._real[number]), name=f"console {number}", daemon=True
        )
        thread.start()
        return thread

    def _pass_on(self, reading: int, real: int) -> None:
        begun = b""
        while piece := os.read(reading, _PIECE):
            _write_all(real, piece)
            *lines, begun = _LINE_END.split(begun + piece)
            begun = begun[:_LINE_MAX]
            for line in lines:
                self._hear(line[:_LINE_MAX].decode(errors="replace"))
        os.close(reading)


def _write_all(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]
