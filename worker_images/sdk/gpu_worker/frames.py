"""Events as bytes, by the rules of the contract.

A frame is made here without its `id:` line; the history puts that in front when it gives out the number.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from json.encoder import encode_basestring as _quote  # JSON text, not escaped to ASCII; TypeError if no str
from typing import Any, Literal

MAX_FRAME = 1 << 20
_ID_LINE = len("id: \n") + 20

Status = Literal["completed", "failed", "cancelled"]


def dumps(value: object) -> str:
    """JSON on one line. Raises TypeError or ValueError for what JSON cannot say (NaN, for one)."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def text_delta(delta: str, more: Mapping[str, Any] | None = None) -> bytes:
    return _frame("text_delta", f'{{"delta":{_quote(delta)}{_further(more)}}}')


def text(whole: str, more: Mapping[str, Any] | None = None) -> bytes:
    return _frame("text", f'{{"text":{_quote(whole)}{_further(more)}}}')


def logs(stream: str, line: str) -> bytes:
    if stream not in ("stdout", "stderr"):
        raise ValueError(f"stream must be 'stdout' or 'stderr', not {stream!r}")
    return _frame("logs", f'{{"stream":"{stream}","line":{_quote(line)}}}')


def artifact(name: str, media_type: str, data: bytes) -> bytes:
    encoded = base64.b64encode(data).decode("ascii")
    return _frame(
        "artifact", f'{{"name":{_quote(name)},"media_type":{_quote(media_type)},"data":"{encoded}"}}'
    )


def progress(stage: str, done: float, total: float | None) -> bytes:
    return _frame("progress", dumps(progress_data(stage, done, total)))


def progress_data(stage: str, done: float, total: float | None) -> dict[str, Any]:
    """The data of a `progress` event. Raises TypeError for other types than the contract's."""
    if not isinstance(stage, str) or not _is_number(done) or not (total is None or _is_number(total)):
        raise TypeError("progress takes a text, a number, and a number or None")
    return {"stage": stage, "done": done, "total": total}


def error(code: str, message: str) -> bytes:
    return _frame("error", f'{{"code":{_quote(code)},"message":{_quote(message)}}}')


def end(
    status: Status, failure: tuple[str, str] | None = None, usage: Mapping[str, Any] | None = None
) -> bytes:
    data: dict[str, Any] = {"status": status}
    if failure is not None:
        data["error"] = {"code": failure[0], "message": failure[1]}
    if usage is not None:
        data["usage"] = dict(usage)
    return _frame("end", dumps(data))


def sealed(data: bytes) -> bytes:
    """A piece of a sealed answer: its salt, or one of its chunks."""
    return b'event: sealed\ndata: {"data":"%b"}\n\n' % base64.b64encode(data)


def _further(more: Mapping[str, Any] | None) -> str:
    """More fields of a JSON object, behind its first. Most events have none."""
    return "," + dumps(more)[1:-1] if more else ""


def _frame(event: str, data: str) -> bytes:
    # "replace" is for lone surrogates, which Python's text may hold and UTF-8 may not.
    frame = f"event: {event}\ndata: {data}\n\n".encode("utf-8", "replace")
    if len(frame) + _ID_LINE > MAX_FRAME:
        raise ValueError(f"this {event} event is {len(frame)} bytes; an event may be 1 MiB: split it")
    return frame


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
