"""Events of a task as an OpenAI answer, without any I/O: every form of it, and what breaks it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gpu_server.api.openai_stream import MAX_LOGPROBS_BYTES, Chunks, Heading, Whole
from gpu_server.frames import encode
from tests.app.text_worker import USAGE, chunks, comments

CHAT = Heading(chat=True, task_id="t_1", model="org/chat", created=17)
PROMPT = Heading(chat=False, task_id="t_1", model="org/chat", created=17)
TEXT = {"text": "ab", "finish_reason": "stop", "stop_reason": None}
FINISH = {"status": "completed", "elapsed_seconds": 1.0, "usage": USAGE}


def frames(*events: tuple[str, dict[str, Any]]) -> bytes:
    """Events as a stream keeps them."""
    return b"".join(b"id: %d\n%b" % (n, encode(name, data)) for n, (name, data) in enumerate(events, 1))


def answer(*deltas: str | dict[str, Any], **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    """The events of a task that goes well."""
    told = [delta if isinstance(delta, dict) else {"delta": delta} for delta in deltas]
    text = "".join(delta["delta"] for delta in told)
    return [
        ("connection", {"status": "session_ready"}),
        ("worker", {"status": "working"}),
        *(("text_delta", delta) for delta in told),
        ("text", {**TEXT, "text": text, **changes}),
        ("worker", {"status": "waiting"}),
        ("task_finish", FINISH),
    ]


def streamed(
    heading: Heading, *events: tuple[str, dict[str, Any]], usage: bool = False, logprobs: bool = False
) -> list[Any]:
    """The chunks of a stream that ends well."""
    made = Chunks(heading, include_usage=usage, logprobs=logprobs)
    raw = made.feed(frames(*events))
    assert made.over, "there is an end"
    assert made.failure is None, made.failure
    return chunks(raw)


def whole(heading: Heading, *events: tuple[str, dict[str, Any]], logprobs: bool = False) -> Any:
    """The one object of an answer that ends well."""
    made = Whole(heading, logprobs=logprobs)
    made.feed(frames(*events))
    assert made.over
    assert made.failure is None, made.failure
    return json.loads(made.body())


def test_a_chat_in_chunks() -> None:
    """The role first, then the text, then why it ends, then `[DONE]`; in a form that OpenAI's types take."""
    *found, done = streamed(CHAT, *answer("a", "", 'b"\\é\n'))
    assert done == "[DONE]"
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk["id"] == "chatcmpl-t_1"
        assert (chunk["object"], chunk["created"], chunk["model"]) == (
            "chat.completion.chunk",
            17,
            "org/chat",
        )
        assert "usage" not in chunk
    choices = [chunk["choices"][0] for chunk in found]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": 'b"\\é\n'},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_a_completion_in_chunks() -> None:
    """The text, then why it ends."""
    *found, done = streamed(PROMPT, *answer("a", "b", finish_reason="length"))
    assert done == "[DONE]"
    for chunk in found:
        Completion.model_validate({**chunk, "choices": [c for c in chunk["choices"] if c["finish_reason"]]})
        assert (chunk["id"], chunk["object"]) == ("cmpl-t_1", "text_completion")
    choices = [chunk["choices"][0] for chunk in found]
    assert [choice["text"] for choice in choices] == ["a", "b", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_usage_comes_last_if_asked(heading: Heading) -> None:
    """With include_usage the last chunk has no choices and the usage, and the others say null."""
    *found, last, done = streamed(heading, *answer("a"), usage=True)
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert all(chunk["usage"] is None for chunk in found)


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_an_empty_answer(heading: Heading) -> None:
    """A worker that says nothing and stops has answered."""
    found = streamed(heading, *answer())
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert len(found) == (3 if heading.chat else 2)
    ChatCompletion.model_validate(whole(CHAT, *answer()), strict=True)


def test_answers_in_one_object() -> None:
    """Without streaming the answer has the whole text, why it ends, and the usage."""
    chat = whole(CHAT, *answer("a", "b"))
    ChatCompletion.model_validate(chat, strict=True)
    assert chat == {
        "id": "chatcmpl-t_1",
        "object": "chat.completion",
        "created": 17,
        "model": "org/chat",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    prompt = whole(PROMPT, *answer("a", "b", finish_reason="length"))
    Completion.model_validate(prompt, strict=True)
    assert prompt["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}]


def token(text: str, logprob: float, **others: float) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**one(text, logprob), "top_logprobs": [one(*other) for other in others.items()]}


TOKENS = [token("a", -0.5, a=-0.5, z=-1.5), token("é", -0.25)], [token("c", -1.0)]
WITH_LOGPROBS = [
    {"delta": "aé", "logprobs": TOKENS[0]},
    {"delta": ""},
    {"delta": "", "logprobs": TOKENS[1]},
]


def test_logprobs_of_a_chat() -> None:
    """Each token comes with its log probability and the alternatives, in the chunk of its text."""
    *found, _ = streamed(CHAT, *answer(*WITH_LOGPROBS), logprobs=True)
    told = [chunk["choices"][0]["logprobs"] for chunk in found]
    assert told == [
        None,
        {"content": TOKENS[0], "refusal": None},
        {"content": TOKENS[1], "refusal": None},
        None,
    ]
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    all_told = whole(CHAT, *answer(*WITH_LOGPROBS), logprobs=True)
    ChatCompletion.model_validate(all_told, strict=True)
    assert all_told["choices"][0]["logprobs"]["content"] == TOKENS[0] + TOKENS[1]


def test_logprobs_of_a_completion() -> None:
    """The old endpoint has columns, and where in the answer's text each token begins."""
    *found, _ = streamed(PROMPT, *answer(*WITH_LOGPROBS), logprobs=True)
    first = {
        "tokens": ["a", "é"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"a": -0.5, "z": -1.5}, {"é": -0.25}],
        "text_offset": [0, 1],
    }
    second = {
        "tokens": ["c"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"c": -1.0}],
        "text_offset": [2],
    }
    assert [chunk["choices"][0]["logprobs"] for chunk in found] == [first, second, None]
    all_told = whole(PROMPT, *answer(*WITH_LOGPROBS), logprobs=True)
    Completion.model_validate(all_told, strict=True)
    assert all_told["choices"][0]["logprobs"] == {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_logprobs_that_nobody_asked_for(heading: Heading) -> None:
    """They are left out, in whatever form they are, and their text is not."""
    odd = {"delta": "x", "logprobs": 5}
    found = streamed(heading, *answer(*WITH_LOGPROBS, odd))
    assert {chunk["choices"][0]["logprobs"] for chunk in found[:-1]} == {None}
    one = whole(heading, *answer(*WITH_LOGPROBS, odd))["choices"][0]
    assert one["logprobs"] is None
    assert "aéx" in json.dumps(one, ensure_ascii=False)


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_no_logprobs_where_some_were_asked_for(heading: Heading) -> None:
    """An answer without tokens has empty lists of them."""
    told = whole(heading, *answer(), logprobs=True)["choices"][0]["logprobs"]
    assert [value for name, value in told.items() if name != "refusal"] == [[]] * (1 if heading.chat else 4)


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_logprobs_are_bounded(heading: Heading) -> None:
    """What is not streamed is kept up to a bound, and then the answer fails and says what to do; a stream
    keeps nothing of what it has sent."""
    many = frames(*[("text_delta", {"delta": "", "logprobs": [token("a", -0.5)] * 500})] * 4)
    made, kept = Chunks(heading, include_usage=False, logprobs=True), Whole(heading, logprobs=True)
    made.feed(many)
    tracemalloc.start()
    try:
        for _ in range(10):
            made.feed(many)
        assert tracemalloc.get_traced_memory()[0] < len(many)
    finally:
        tracemalloc.stop()
    large = frames(("text_delta", {"delta": "", "logprobs": [{**token("a", 1), "token": "a" * (1 << 20)}]}))
    fed = 0
    while not kept.over:
        kept.feed(large)
        fed += len(large)
    assert MAX_LOGPROBS_BYTES / 2 < fed < MAX_LOGPROBS_BYTES * 1.1, "the old endpoint tells a token twice"
    assert kept.failure is not None
    assert (kept.failure.status, kept.failure.code) == (400, "answer_too_large")
    assert "stream it" in kept.failure.message


NESTED = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    "logprobs",
    [
        *(5, "x", {"a": 1}, [5], [{}], [{"token": "a"}], [{**token("a", 1), "top_logprobs": 3}]),
        *([token("a", 1) | {name: NESTED}] for name in ("token", "logprob", "bytes")),
        [{**token("a", 1), "bytes": [NESTED]}],
        [{**token("a", 1), "token": 5}],
        [{**token("a", 1), "logprob": True}],
        [{**token("a", 1), "top_logprobs": [{**token("b", 1), "token": 5}]}],
        [{**token("a", 1), "top_logprobs": [{**token("b", 1), "logprob": NESTED}]}],
    ],
    ids=lambda value: repr(value)[:60],
)
def test_logprobs_that_are_none(logprobs: Any) -> None:
    """A worker whose log probabilities are not in the promised form breaks the answer, and nothing else."""
    # Not encoded by orjson, which cannot write all that it reads.
    raw = json.dumps({"delta": "a", "logprobs": logprobs}, separators=(",", ":")).encode()
    event = b"id: 1\nevent: text_delta\ndata: " + raw + b"\n\n"
    for heading in (CHAT, PROMPT):
        made = Chunks(heading, include_usage=False, logprobs=True)
        made.feed(event)
        collected = Whole(heading, logprobs=True)
        collected.feed(event)
        assert made.failure is not None
        assert (made.failure.status, made.failure.code) == (500, "worker_protocol")
        assert collected.failure == made.failure


@pytest.mark.parametrize(
    "events",
    [
        [("text_delta", {"delta": "a"}), ("task_finish", FINISH)],
        [("text", {"text": "a"}), ("task_finish", FINISH)],
        [("text", {**TEXT, "finish_reason": "bored"}), ("task_finish", FINISH)],
    ],
)
def test_a_worker_that_does_not_say_why_it_stopped(events: list[tuple[str, dict[str, Any]]]) -> None:
    """An end without `text`, or with a reason that is none, is no clean end."""
    made, collected = Chunks(CHAT, include_usage=False), Whole(CHAT, logprobs=False)
    raw = made.feed(frames(*events))
    collected.feed(frames(*events))
    for one in (made, collected):
        assert one.over
        assert one.failure is not None
        assert one.failure.code == "worker_protocol"
    assert b"[DONE]" not in raw


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_a_text_without_deltas(heading: Heading) -> None:
    """A worker that tells its text at the end alone is streamed as well, in one chunk."""
    events = [event for event in answer("ab") if event[0] != "text_delta"]
    for more in ([], [("text_delta", {"delta": ""})]):
        found = streamed(heading, *more, *events)
        choices = [chunk["choices"][0] for chunk in found[:-1]]
        texts = [one["delta"].get("content") if heading.chat else one["text"] for one in choices]
        assert [text for text in texts if text] == ["ab"]
        assert choices[-1]["finish_reason"] == "stop"
    assert [c["choices"][0]["finish_reason"] for c in streamed(PROMPT, *answer("a"))[:-1]] == [None, "stop"]


@pytest.mark.parametrize(
    "late",
    [
        ("text_delta", {"delta": "c"}),
        ("text_delta", {"delta": "c", "logprobs": []}),
        ("text", {**TEXT, "text": "abc"}),
    ],
)
def test_text_after_the_text(late: tuple[str, dict[str, Any]]) -> None:
    """A worker that goes on after its `text` breaks the answer: nobody could tell which of both is right."""
    events = answer("a", "b")
    made, collected = Chunks(CHAT, include_usage=False), Whole(CHAT)
    for one in (made, collected):
        one.feed(frames(*events[:-2], late, *events[-2:]))
        assert one.failure is not None
        assert one.failure.code == "worker_protocol"


@pytest.mark.parametrize("usage", [None, {}, {**USAGE, "total_tokens": "5"}, {"deltas": 2}, [1]])
def test_usage_that_is_none(usage: Any) -> None:
    """Counts that are not all there are told as null, never guessed."""
    events = [*answer("a")[:-1], ("task_finish", {**FINISH, "usage": usage})]
    assert whole(CHAT, *events)["usage"] is None
    assert streamed(CHAT, *events, usage=True)[-2]["usage"] is None


@pytest.mark.parametrize(
    ("finish", "status", "code", "retry"),
    [
        ({"status": "failed", "error": {"code": "engine_dead", "message": "m"}}, 500, "engine_dead", False),
        ({"status": "failed", "error": {"code": "invalid_request", "message": "m"}}, 400, None, False),
        (
            {"status": "failed", "error": {"code": "context_length_exceeded", "message": "m"}},
            400,
            None,
            False,
        ),
        ({"status": "failed", "error": {"code": "worker_exited", "message": "m"}}, 500, None, False),
        ({"status": "failed", "error": {"code": "slot_lost", "message": "m"}}, 503, None, True),
        ({"status": "timeout", "error": {"code": "task_timeout", "message": "m"}}, 504, None, False),
        ({"status": "timeout", "error": {"code": "gpu_wait_timeout", "message": "m"}}, 503, None, True),
        ({"status": "cancelled", "error": {"code": "task_cancelled", "message": "m"}}, 409, None, False),
        ({"status": "cancelled"}, 500, "cancelled", False),
    ],
)
def test_failures(finish: dict[str, Any], status: int, code: str | None, retry: bool) -> None:
    """A task that does not complete is an error with a status of its own, also after some text."""
    for deltas in ([], ["a"]):
        events = [*answer(*deltas)[:-3], ("error", {"code": "x", "message": "y"}), ("task_finish", finish)]
        made, collected = Chunks(CHAT, include_usage=True), Whole(CHAT, logprobs=False)
        raw = made.feed(frames(*events))
        collected.feed(frames(*events))
        assert b"[DONE]" not in raw
        assert made.begun is bool(deltas)
        assert made.failure == collected.failure
        assert made.failure is not None
        assert made.failure.status == status
        assert made.failure.code == code or code is None
        assert made.failure.headers()["x-should-retry"] == str(retry).lower()


def test_a_gap_is_no_text() -> None:
    """Where events are lost the stream ends with an error; one object needs the text at the end alone."""
    events = answer("a", "b")
    events[3] = ("gap", {"from": 4, "to": 4})
    made = Chunks(CHAT, include_usage=False)
    raw = made.feed(frames(*events))
    assert made.failure is not None
    assert (made.failure.status, made.failure.code) == (410, "events_gone")
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks(raw)] == ["", "a"]
    assert made.feed(frames(*answer("c"))) == b"", "nothing comes after a failure"

    collected = Whole(CHAT, logprobs=False)
    collected.feed(frames(*events))
    assert collected.failure is None
    with_logprobs = Whole(CHAT, logprobs=True)
    with_logprobs.feed(frames(*events))
    assert with_logprobs.failure == made.failure
    behind = Whole(CHAT, logprobs=False)
    behind.feed(frames(*events[:-2], ("gap", {"from": 9, "to": 9})))
    assert behind.failure == made.failure, "what comes after the text may be lost no more than the text"


@pytest.mark.parametrize("heading", [CHAT, PROMPT])
def test_a_gap_that_took_the_text(heading: Heading) -> None:
    """Where nothing is left but the end the answer is gone, and the worker is not to blame."""
    left = frames(("gap", {"from": 1, "to": 9}), ("task_finish", FINISH))
    for one in (Chunks(heading, include_usage=False), Whole(heading)):
        one.feed(left)
        assert one.failure is not None
        assert (one.failure.status, one.failure.code) == (410, "events_gone")
    failed = {"status": "failed", "error": {"code": "engine_dead", "message": "m"}}
    kept = Whole(heading)
    kept.feed(frames(("gap", {"from": 1, "to": 9}), ("task_finish", failed)))
    assert kept.failure is not None
    assert kept.failure.code == "engine_dead", "the end tells enough"


def test_cut_off() -> None:
    """A stream that ends because the service is being replaced may be asked for again."""
    made = Chunks(CHAT, include_usage=False)
    made.cut_off()
    assert made.failure is not None
    assert (made.failure.status, made.failure.retry_after) == (503, 1)


@pytest.mark.parametrize(
    "progress",
    [
        {"done": 1},
        {"done": 1, "total": None},
        {"done": -5, "total": 2},
        {"done": 3, "total": 2},
        {"done": 1e308, "total": 1e-300},
        {"done": 1, "total": 0},
    ],
    ids=repr,
)
def test_progress_that_is_no_part(progress: dict[str, Any]) -> None:
    """How far a stage is, is told where that is a part of a whole, and else the stage alone."""
    made = Chunks(CHAT, include_usage=False)
    made.feed(frames(("progress", {"stage": "loading", **progress})))
    assert comments(made.comments()) == ["loading"]


def test_comments_say_why_it_takes_long() -> None:
    """While nothing is there to show, comments tell of the wait: each once, and none after the first text."""
    made = Chunks(CHAT, include_usage=False)
    made.feed(
        frames(
            ("connection", {"status": "queued"}),
            ("queue", {"position": 2, "eta_seconds": None}),
            ("queue", {"position": 2, "eta_seconds": None}),
            ("progress", {"stage": "loading", "done": 2, "total": 5}),
            ("progress", {"stage": "model", "done": 7, "total": None}),
            ("progress", {"stage": "a\n\ndata: x", "done": 7, "total": None}),
            ("progress", {"stage": "loading", "done": 0, "total": 0}),
            ("worker", {"status": "created"}),
            ("logs", {"stream": "stdout", "line": "no business of the client's"}),
        )
    )
    raw = made.comments()
    assert comments(raw) == ["queued", "queued 2", "loading 0.4", "model", "loading", "created"]
    assert made.comments() == b""
    made.feed(frames(("queue", {"position": 1, "eta_seconds": None}), ("text_delta", {"delta": "a"})))
    made.feed(frames(("progress", {"stage": "decoding", "done": 1, "total": 2})))
    assert made.comments() == b""


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]))), st.data())
def test_any_text_in_any_pieces(deltas: list[str], data: st.DataObject) -> None:
    """Whatever the text is, and however its events come together, it arrives as it was said."""
    events = answer(*deltas)
    made, raw = Chunks(CHAT, include_usage=False), b""
    while events:
        count = data.draw(st.integers(1, len(events)))
        raw += made.feed(frames(*events[:count]))
        events = events[count:]
    *found, done = chunks(raw)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found) == "".join(deltas)
    assert [c["choices"][0]["delta"]["content"] for c in found[1:-1]] == [text for text in deltas if text]
