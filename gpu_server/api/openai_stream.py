"""A task's events as an OpenAI answer: as chunks of a stream, or as one object at the end.

Bytes in, bytes out: this reads what `Stream.read` gives, whole frames that the relay has checked, and does
no I/O. A delta that is text alone is not even parsed: its JSON string goes from the event into the chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gpu_server.api.openai_errors import ANSWER_TOO_LARGE, OpenAIError, failed, refused
from gpu_server.core.errors import FailureCode, Refusal, RefusalCode

DONE = b"data: [DONE]\n\n"
MAX_LOGPROBS_BYTES = 32 << 20
"""Of one answer that is not streamed: about 20,000 tokens with 20 alternatives each."""
_EVENT = re.compile(
    rb"id: [0-9]+\nevent: (?:"
    rb'text_delta\ndata: \{"delta":("[^"\\]*(?:\\.[^"\\]*)*")\}'
    rb"|([a-z_]+)\ndata: (\{[^\n]*\})"
    rb")\n\n"
)
_STAGE = re.compile(r"[a-z_]{1,32}")  # a worker says it, and a comment must stay one line
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_FINISH_REASONS = ("stop", "length")
_OF_THE_TEXT = (None, b"text_delta", b"text")  # None: a delta that is text alone
_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class _Broken(Exception):
    """The worker said what the contract of text generation does not allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What an answer is about: to a chat, or to a prompt."""

    chat: bool
    task_id: str
    model: str
    created: int

    def fields(self, *, chunk: bool) -> dict[str, Any]:
        """The fields that every chunk of an answer begins with, or the whole answer."""
        prefix, kind = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.task_id}",
            "object": f"{kind}.chunk" if chunk and self.chat else kind,
            "created": self.created,
            "model": self.model,
        }


class _Events:
    """Reads the events of one task up to its end; what both forms of an answer have in common.

    `failure` says why there will be no answer. After it, or when `over`, no event changes anything.
    """

    def __init__(self, heading: Heading, *, logprobs: bool) -> None:
        self.failure: OpenAIError | None = None
        self.over = False
        self._heading = heading
        self._logprobs = _Logprobs(heading.chat) if logprobs else None  # None: whatever comes is left out
        self._gap_seen = False
        self._finish_reason: str | None = None
        self._usage: dict[str, int] | None = None

    def cut_off(self) -> None:
        """There will be no further event: the service is being replaced."""
        message = "the service is being replaced by another version"
        self._fail(refused(Refusal(RefusalCode.SHUTTING_DOWN, message, retry_after=1)))

    def _read(self, frames: bytes) -> Iterator[tuple[bytes | None, bytes, bytes]]:
        """Each event up to the end as (the JSON string of a plain delta, its name, its data); the name only
        where the first is None. Raises `_Broken`."""
        for match in _EVENT.finditer(frames):
            if self.over:
                return
            if self._finish_reason is not None and match[2] in _OF_THE_TEXT:
                raise _Broken("the worker went on with the text after its `text`")
            yield match.groups()  # type: ignore[misc]

    def _fail(self, error: OpenAIError) -> None:
        self.failure, self.over = error, True

    def _lost(self) -> None:
        message = "part of the answer is lost: it was read too slowly, or it is not kept any more"
        self._fail(refused(Refusal(RefusalCode.EVENTS_GONE, message)))

    def _ended(self, data: Mapping[str, Any]) -> None:
        """The task has ended. Raises `_Broken`."""
        if data["status"] != "completed":
            error = data.get("error") or {"code": data["status"], "message": f"the task is {data['status']}"}
            self._fail(failed(error["code"], error["message"]))
            return
        if self._finish_reason is None and self._gap_seen:
            self._lost()
            return
        if self._finish_reason is None:
            raise _Broken("the worker did not say why it stopped")
        self._usage = _usage_of(data.get("usage"))
        self.over = True

    def _text_ended(self, data: Mapping[str, Any]) -> None:
        reason = data.get("finish_reason")
        if reason not in _FINISH_REASONS:
            raise _Broken("the worker's `text` has no finish_reason that is stop or length")
        self._finish_reason = reason


class Chunks(_Events):
    """The answer as a stream. `begun`: there is something to show of it."""

    def __init__(self, heading: Heading, *, include_usage: bool, logprobs: bool = False) -> None:
        super().__init__(heading, logprobs=logprobs)
        self.begun = False
        self._text_sent = False
        self._include_usage = include_usage
        self._comments: dict[bytes, None] = {}
        head = b"data: " + orjson.dumps(heading.fields(chunk=True))[:-1] + b',"choices":['
        tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._head, self._tail = head, tail
        opening, closing = (b'"delta":{"content":', b"}") if heading.chat else (b'"text":', b"")
        self._before = head + b'{"index":0,' + opening
        self._after = closing + b',"logprobs":null,"finish_reason":null}' + tail

    def feed(self, frames: bytes) -> bytes:
        """The chunks that these events make, ready to be sent; with the last of them the stream's end."""
        out: list[bytes] = []
        try:
            for quoted, name, raw in self._read(frames):
                if quoted is not None:
                    if not self.begun:
                        out.append(self._begin())
                    if quoted != b'""':
                        self._text_sent = True
                        out.append(self._before + quoted + self._after)
                else:
                    out.extend(self._take(name, raw))
        except _Broken as broken:
            self._fail(failed(FailureCode.WORKER_PROTOCOL, str(broken)))
        return b"".join(out)

    def comments(self) -> bytes:
        """What is to be said of the waiting since this was asked last: comments, which clients skip."""
        taken, self._comments = self._comments, {}
        return b"" if self.begun else b"".join(taken)

    def _take(self, name: bytes, raw: bytes) -> Iterator[bytes]:
        match name:
            case b"text_delta":
                data = orjson.loads(raw)
                logprobs = self._logprobs.take(data.get("logprobs")) if self._logprobs else None
                yield from self._say(data["delta"], logprobs)
            case b"text":
                data = orjson.loads(raw)
                self._text_ended(data)
                if not self._text_sent:
                    yield from self._say(data["text"], None)
            case b"task_finish":
                self._ended(orjson.loads(raw))
                if self.failure is None:
                    yield from self._end()
            case b"gap":
                self._lost()
            case b"connection" | b"queue" | b"progress" | b"worker" if not self.begun:
                self._comments[_comment(name, orjson.loads(raw))] = None

    def _say(self, text: str, logprobs: dict[str, Any] | None) -> Iterator[bytes]:
        if not self.begun:
            yield self._begin()
        if text or logprobs is not None:
            self._text_sent = self._text_sent or text != ""
            yield self._chunk(text, logprobs, None)

    def _begin(self) -> bytes:
        """A chat's first chunk says whose message this is."""
        self.begun = True
        if not self._heading.chat:
            return b""
        role = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return self._head + role + self._tail

    def _chunk(self, text: str | None, logprobs: dict[str, Any] | None, finish_reason: str | None) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self._heading.chat:
            choice["delta"] = {} if text is None else {"content": text}
        else:
            choice["text"] = text or ""
        choice |= {"logprobs": logprobs, "finish_reason": finish_reason}
        return self._head + orjson.dumps(choice) + self._tail

    def _end(self) -> Iterator[bytes]:
        if not self.begun:
            yield self._begin()
        yield self._chunk(None, None, self._finish_reason)
        if self._include_usage:
            yield self._head + b'],"usage":' + orjson.dumps(self._usage) + b"}\n\n"
        yield DONE


class Whole(_Events):
    """The answer as one object; `body` is that, once it is `over`."""

    def __init__(self, heading: Heading, *, logprobs: bool = False) -> None:
        super().__init__(heading, logprobs=logprobs)
        self._text = ""
        self._told = {name: bytearray() for name in (("content",) if heading.chat else _COLUMNS)}

    def feed(self, frames: bytes) -> None:
        """Take some events."""
        try:
            for quoted, name, raw in self._read(frames):
                if quoted is None:
                    self._take(name, raw)
        except _Broken as broken:
            self._fail(failed(FailureCode.WORKER_PROTOCOL, str(broken)))

    def _take(self, name: bytes, raw: bytes) -> None:
        match name:
            case b"text_delta" if self._logprobs:
                if told := self._logprobs.take(orjson.loads(raw).get("logprobs")):
                    self._keep(told)
            case b"text":
                data = orjson.loads(raw)
                self._text_ended(data)
                self._text = data["text"]
            case b"task_finish":
                self._ended(orjson.loads(raw))
            case b"gap":
                # What `text` says is the whole text, whatever was lost before it.
                self._gap_seen = True
                if self._logprobs or self._finish_reason is not None:
                    self._lost()

    def _keep(self, told: Mapping[str, Any]) -> None:
        """Encoded, since the objects would take many times as much memory."""
        for name, kept in self._told.items():
            kept += (b"," if kept else b"") + orjson.dumps(told[name])[1:-1]
        if sum(map(len, self._told.values())) > MAX_LOGPROBS_BYTES:
            message = (
                f"the log probabilities of this answer take more than {MAX_LOGPROBS_BYTES} bytes;"
                " stream it, or ask for fewer alternatives or tokens"
            )
            self._fail(failed(ANSWER_TOO_LARGE, message))

    def body(self) -> bytes:
        """The answer."""
        choice: dict[str, Any] = {"index": 0}
        if self._heading.chat:
            choice["message"] = {"role": "assistant", "content": self._text, "refusal": None}
        else:
            choice["text"] = self._text
        choice["logprobs"] = None
        if self._logprobs:
            told = {name: orjson.Fragment(b"[" + kept + b"]") for name, kept in self._told.items()}
            choice["logprobs"] = {**told, "refusal": None} if self._heading.chat else told
        choice["finish_reason"] = self._finish_reason
        answer = self._heading.fields(chunk=False) | {"choices": [choice], "usage": self._usage}
        return orjson.dumps(answer)


class _Logprobs:
    """Log probabilities as the worker tells them, in the form of either endpoint."""

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self._offset = 0

    def take(self, tokens: object) -> dict[str, Any] | None:
        """Those of one delta, as a chunk tells them; None where there are none. Raises `_Broken`."""
        if not tokens:
            return None
        try:
            checked = [
                _checked(token) | {"top_logprobs": [_checked(other) for other in token["top_logprobs"]]}
                for token in tokens  # type: ignore[attr-defined]
            ]
        except (KeyError, TypeError):
            raise _Broken("the worker's logprobs are not what the contract says") from None
        return {"content": checked, "refusal": None} if self._chat else self._legacy(checked)

    def _legacy(self, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        """As the old endpoint has it: columns, and where each token begins in the text of the answer."""
        told: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for token in tokens:
            others = {other["token"]: other["logprob"] for other in token["top_logprobs"]}
            told["tokens"].append(token["token"])
            told["token_logprobs"].append(token["logprob"])
            told["top_logprobs"].append(others | {token["token"]: token["logprob"]})
            told["text_offset"].append(self._offset)
            self._offset += len(token["token"])
        return told


def _checked(token: Any) -> dict[str, Any]:
    """A token, its log probability and its bytes. Raises KeyError and TypeError. The types are looked at,
    since not all that can be read from JSON can be written again."""
    text, logprob, raw = token["token"], token["logprob"], token["bytes"]
    of_bytes = raw is None or (type(raw) is list and all(type(byte) is int for byte in raw))
    if type(text) is not str or type(logprob) not in (int, float) or not of_bytes:
        raise TypeError("not the types of the contract")
    return {"token": text, "logprob": logprob, "bytes": raw}


def _comment(name: bytes, data: Mapping[str, Any]) -> bytes:
    """`: queued 2`, `: loading 0.4`, ...: why nothing comes yet."""
    match name:
        case b"queue":
            words = f"queued {data['position']}"
        case b"progress" if _STAGE.fullmatch(data["stage"]):
            total, words = data.get("total"), data["stage"]
            if total and 0 <= (part := data["done"] / total) <= 1:
                words += f" {part:.3g}"
        case b"connection" | b"worker":
            words = data["status"]
        case _:
            return b""
    return f": {words}\n\n".encode()


def _usage_of(usage: object) -> dict[str, int] | None:
    """The counts that a client may rely on: all of them, or none."""
    if not isinstance(usage, dict) or not all(type(usage.get(name)) is int for name in _USAGE):
        return None
    return {name: usage[name] for name in _USAGE}
