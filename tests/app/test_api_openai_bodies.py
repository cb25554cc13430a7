"""Bodies of the OpenAI routes: every parameter is passed on, or refused by its name, and none is ignored."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from gpu_server.api.openai_bodies import ChatBody, CompletionBody
from gpu_server.api.openai_errors import OpenAIError, invalid

MESSAGES = [{"role": "user", "content": "hello"}]
SECRET = "my-grandmothers-recipe"
EXTRA = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"}
SCHEMA = {"type": "object", "properties": {"a": {"const": None}}}


def chat(**body: Any) -> dict[str, Any]:
    """The metadata that a chat's body makes."""
    return ChatBody.model_validate({"model": "m", "messages": MESSAGES, **body}).metadata()


def completion(**body: Any) -> dict[str, Any]:
    """The metadata that a completion's body makes."""
    return CompletionBody.model_validate({"model": "m", "prompt": "p", **body}).metadata()


def mistake(kind: type[ChatBody] | type[CompletionBody], **changes: Any) -> OpenAIError:
    """What is told of a body that is not valid."""
    base = {"messages": MESSAGES} if kind is ChatBody else {"prompt": "p"}
    body = {"model": "m", **base, **changes}
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    told = invalid([{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()], body)
    assert told.status == 400
    assert SECRET not in told.message
    assert told.param is not None
    assert told.param.rpartition(".")[2] in told.message, "the message names the parameter"
    return told


BOTH = {
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "presence_penalty": -2.0,
    "frequency_penalty": 2.0,
    "logit_bias": {"50256": -100.0},
    "seed": -3,
    "stop": ["a", "b"],
    "min_tokens": 3,
    "top_k": -1,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "ignore_eos": True,
}


@pytest.mark.parametrize("name", BOTH)
def test_what_is_passed_on(name: str) -> None:
    """What both endpoints have reaches the worker under its own name."""
    assert chat(**{name: BOTH[name]}) == {"messages": MESSAGES, name: BOTH[name]}
    assert completion(**{name: BOTH[name]}) == {"max_tokens": 16, "prompt": "p", name: BOTH[name]}


@pytest.mark.parametrize(
    ("body", "metadata"),
    [
        ({}, {}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 7}, {"max_tokens": 7}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False}, {}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        ),
        ({"user": "u", "safety_identifier": "s"}, {}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {}),
        ({"stop": []}, {}),
        ({"logit_bias": {}}, {}),
        ({"min_tokens": 0, "ignore_eos": False}, {}),
    ],
)
def test_what_a_chat_asks_for(body: dict[str, Any], metadata: dict[str, Any]) -> None:
    """A chat's own parameters, in the words of the contract."""
    assert chat(**body) == {"messages": MESSAGES, **metadata}


@pytest.mark.parametrize(
    ("body", "metadata"),
    [
        ({"prompt": ["one"]}, {"prompt": "one"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 2]}),
        ({"prompt": [[1, 2]]}, {"prompt": [1, 2]}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": 5}, {"logprobs": 5}),
        ({"max_tokens": None}, {"max_tokens": 16}),
    ],
)
def test_what_a_completion_asks_for(body: dict[str, Any], metadata: dict[str, Any]) -> None:
    """A completion's own parameters."""
    assert completion(**body) == {"prompt": "p", "max_tokens": 16, **metadata}


def test_every_parameter_is_known() -> None:
    """Each parameter of the official client is taken as null, and as a value passed on or refused by name."""
    for kind, params in (
        (ChatBody, chat_create_params.CompletionCreateParamsBase),
        (CompletionBody, completion_create_params.CompletionCreateParamsBase),
    ):
        names = set(params.__annotations__) | {"stream"}
        supported = {field.alias or name for name, field in kind.model_fields.items()}
        assert supported - names == EXTRA
        for name in names - {"model", "messages", "prompt"}:
            base = {"model": "m", "messages": MESSAGES} if kind is ChatBody else {"model": "m", "prompt": "p"}
            kind.model_validate({**base, name: None})
        for name in names - supported:
            told = mistake(kind, **{name: {SECRET: SECRET}})
            assert (told.code, told.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
        {"store": False, "metadata": {}},
        {"modalities": ["text"], "audio": None},
        {"service_tier": "auto", "verbosity": "medium", "reasoning_effort": "none"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ],
    ids=str,
)
def test_what_asks_for_nothing(body: dict[str, Any]) -> None:
    """Values that mean what happens anyway are taken, for clients send them."""
    assert chat(**body) == {"messages": MESSAGES}


def test_what_asks_for_nothing_of_a_completion() -> None:
    """The same at the old endpoint."""
    body = {"n": 1, "best_of": 1, "echo": False, "suffix": ""}
    assert completion(**body) == {"max_tokens": 16, "prompt": "p"}


def test_a_message_of_an_answer_comes_back() -> None:
    """The message of an answer can be sent again as it is, with all its nulls."""
    nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    message = {"role": "assistant", "content": "a"}
    assert chat(messages=[*MESSAGES, message | nothing])["messages"] == [*MESSAGES, message]


def test_messages() -> None:
    """Every role of the contract, with text or parts of text, and a name."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": ""}]},
        {"role": "user", "content": "u", "name": "ann"},
        {"role": "assistant", "content": "a"},
    ]
    assert chat(messages=messages)["messages"] == messages


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"n": True}, "unsupported_parameter", "n"),
        ({"tools": [{}]}, "unsupported_parameter", "tools"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({SECRET: 1}, "unknown_parameter", SECRET),
        ({"prompt": "p"}, "unknown_parameter", "prompt"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"model": ""}, "invalid_value", "model"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": SECRET}, "invalid_value", "messages"),
        ({"messages": [SECRET]}, "invalid_value", "messages[0]"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "missing_required_parameter", "messages[1].content"),
        ({"messages": [{"role": SECRET, "content": SECRET}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_k": 0}, "invalid_value", "top_k"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_completion_tokens"),
        ({"seed": 1 << 63}, "invalid_value", "seed"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop"),
        ({"stop": ["a", ""]}, "invalid_value", "stop"),
        ({"stop": 5}, "invalid_value", "stop"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "invalid_value", "logit_bias"),
        ({"messages": MESSAGES * 4097}, "invalid_value", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 8193}] * 2},
            "invalid_value",
            "messages",
        ),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias.x"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"response_format": {"type": "grammar"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "unsupported_parameter",
            "stream_options.include_obfuscation",
        ),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"ignore_eos": 1}, "invalid_value", "ignore_eos"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_mistakes_of_a_chat(body: dict[str, Any], code: str, param: str) -> None:
    """Each is told with the parameter, and without what stood there."""
    if SECRET in body:  # a parameter's name is no secret
        with pytest.raises(ValidationError):
            chat(**body)
        return
    told = mistake(ChatBody, **body)
    assert (told.code, told.param) == (code, param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": 5}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [SECRET, SECRET]}, "unsupported_parameter", "prompt"),
        ({"prompt": [[1], [2]]}, "unsupported_parameter", "prompt"),
        ({"prompt": [1, SECRET]}, "invalid_value", "prompt[1]"),
        ({"prompt": [-1]}, "invalid_value", "prompt[0]"),
        ({"messages": MESSAGES}, "unknown_parameter", "messages"),
        ({"max_completion_tokens": 5}, "unknown_parameter", "max_completion_tokens"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"suffix": SECRET}, "unsupported_parameter", "suffix"),
        ({"logprobs": True}, "invalid_value", "logprobs"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_mistakes_of_a_completion(body: dict[str, Any], code: str, param: str) -> None:
    """The same at the old endpoint."""
    told = mistake(CompletionBody, **body)
    assert (told.code, told.param) == (code, param)


MANY = {f"x{number}": 0 for number in range(100_000)}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [5] * 100_000},
        {"messages": [{**MESSAGES[0], **MANY}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", **MANY}]}]},
        {"stop": [5] * 100_000},
        {"logit_bias": MANY},
        {"response_format": {"type": "text", **MANY}},
        {"stream": True, "stream_options": MANY},
        MANY,
    ],
    ids=lambda body: next(iter(body)),
)
def test_many_mistakes_cost_little(body: dict[str, Any]) -> None:
    """What is not valid many times over is left at the first mistake."""
    with pytest.raises(ValidationError) as raised:
        chat(**body)
    assert raised.value.error_count() <= 3


def test_stops_are_told_in_one_sentence() -> None:
    """What is wrong with `stop` is told for both of its forms at once."""
    told = mistake(ChatBody, stop=["a"] * 17)
    assert told.message == "stop must be a text, or a list of up to 16, none of them empty"
