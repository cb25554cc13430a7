"""What is logged, and how; in processes of their own, because logging is set up once for a process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def logged(code: str, level: str = "info") -> list[str]:
    """The lines that `code` logs."""
    program = f"import logging, structlog\nfrom gpu_server import log\nlog.configure({level!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_lines() -> None:
    """Without a terminal each log line is one JSON object with a time, a level and an event."""
    (line,) = logged("structlog.get_logger().info('slot.leased', slot='0', text='two\\nlines')")
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {"event": "slot.leased", "level": "info", "slot": "0", "text": "two\nlines"}


def test_exceptions_are_in_the_line() -> None:
    """A traceback is a field of its line, not lines of its own."""
    (line,) = logged("try: 1 / 0\nexcept ZeroDivisionError: structlog.get_logger().exception('x.crashed')")
    assert "ZeroDivisionError" in json.loads(line)["exception"]


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_level(level: str, count: int) -> None:
    """LOG_LEVEL holds for our own lines and for those of the libraries."""
    ours = "for name in ('debug', 'info', 'warning', 'error'): getattr(structlog.get_logger(), name)('x')"
    theirs = (
        "for name in ('debug', 'info', 'warning', 'error'): getattr(logging.getLogger('uvicorn'), name)('x')"
    )
    assert len(logged(ours, level)) == count
    assert len(logged(theirs, level)) == count


def test_a_terminal() -> None:
    """On a terminal a traceback shows no variable's value: it may be a key or a prompt."""
    code = """
import io, sys
class Terminal(io.StringIO):
    def isatty(self): return True
sys.stderr, real = Terminal(), sys.stderr
from gpu_server import log
import structlog
log.configure("info")
def crash(api_key): raise ValueError("a bug")
try: crash("".join(["se", "cret"]))
except ValueError: structlog.get_logger().exception("x.crashed", session_id="s_1")
real.write(sys.stderr.getvalue())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "x.crashed" in done.stderr
    assert "ValueError: a bug" in done.stderr
    assert "secret" not in done.stderr


def test_chatty_libraries() -> None:
    """Libraries that log every call are heard from warnings on, whatever the level."""
    lines = logged("for n in ('docker', 'urllib3', 'aiohttp'): logging.getLogger(n).info('x')", "debug")
    assert lines == []
