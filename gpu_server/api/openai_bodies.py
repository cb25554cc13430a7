"""Bodies of the OpenAI routes: what each parameter asks for, as the metadata of a task.

Every parameter of the two endpoints is either passed on to the worker (docs/text-generation.md says what it
means there) or refused by its name. A value that asks for nothing, such as null, `n: 1` or `tools: []`, is
taken: clients send those. Nothing is ignored but what names the end user, for whom nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gpu_server.api.bodies import ClosedBody

UNSUPPORTED = "unsupported_parameter"
COMPLETION_MAX_TOKENS = 16
"""`max_tokens` of /v1/completions where it is left out, as OpenAI has it."""
MAX_MESSAGES = 4096
MAX_PARTS = 16_384
MAX_BIASES = 1024
MAX_STOPS = 16

_CHAT_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters of the endpoint that are refused, each with the values that ask for nothing."""
_COMPLETION_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "n": (1,),
    "suffix": ("",),
}
_MESSAGE_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}
"""Fields of an answer's message: clients send that back as it came."""


def _without(refused: Mapping[str, tuple[object, ...]], body: object) -> object:
    """The body without nulls, and without what asks for nothing. Raises where something else is asked."""
    if not isinstance(body, dict):
        return body
    left = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in refused:
            left[name] = value
        elif not any(type(value) is type(nothing) and value == nothing for nothing in refused[name]):
            message = f"{name} is not supported here; leave it out"
            raise PydanticCustomError(UNSUPPORTED, "{why}", {"why": message, "param": name})
    return left


class _Part(ClosedBody):
    """A part of a message's content. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


class Message(ClosedBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1, fail_fast=True)]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_an_answer(cls, message: object) -> object:
        return _without(_MESSAGE_NOT_SUPPORTED, message)


class _JsonSchema(ClosedBody):
    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class _ResponseFormat(ClosedBody):
    """What the answer must look like."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[_JsonSchema | None, Field(alias="json_schema")] = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> _ResponseFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise _wrong("json_schema", "response_format of the type json_schema needs a json_schema")
        if self.type != "json_schema" and self.schema_ is not None:
            raise _wrong("json_schema", f"response_format of the type {self.type} has no json_schema")
        return self


class _StreamOptions(ClosedBody):
    """What a stream holds beside the text."""

    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, options: object) -> object:
        return _without({"include_obfuscation": (False,)}, options)


def _few_biases(bias: object) -> object:
    """Before the entries are looked at one by one, since of those every mistake is told."""
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise _wrong("logit_bias", f"logit_bias may have at most {MAX_BIASES} entries")
    return bias


def _stops(stop: object) -> object:
    """In one sentence: of a value that may have two forms the mistakes in both would be told."""
    texts = stop if isinstance(stop, list) else [stop]
    if len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise _wrong("stop", f"stop must be a text, or a list of up to {MAX_STOPS}, none of them empty")
    return stop


_Text = Annotated[str, Field(min_length=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
_Tokens = Annotated[int, Field(ge=1, lt=1 << 31)]
_Stop = _Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)]


class _Generation(ClosedBody):
    """What both endpoints have. The five last are not OpenAI's but vLLM's: a client sends them in its
    `extra_body`."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: _Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[_TokenIdText, _Bias], BeforeValidator(_few_biases)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[_Stop, BeforeValidator(_stops)] | None = None
    user: str | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "stream_options belongs to a request with stream: true")
        if self.top_k == 0:
            raise _wrong("top_k", "top_k must be -1 (all) or at least 1")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _asked(self, alternatives: int | None) -> dict[str, Any]:
        """What was asked for, under the names of the contract; with so many alternatives for each token, or
        None where no log probabilities are asked for."""
        asked = self.model_dump(exclude_none=True, exclude=_NOT_FOR_THE_WORKER)
        for name, nothing in _NOTHING.items():
            if asked.get(name) == nothing:
                del asked[name]
        if alternatives is not None:
            asked["logprobs"] = alternatives
        return asked


_NOTHING: Mapping[str, object] = {
    "stop": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
    "min_tokens": 0,
    "ignore_eos": False,
}
"""Values that ask for nothing, also of workers that do not know the parameter."""
_NOT_FOR_THE_WORKER = {
    *("model", "stream", "stream_options", "user", "safety_identifier"),
    *("logprobs", "top_logprobs", "max_completion_tokens"),
}


def _few_parts(messages: object) -> object:
    """Of all messages together, before any of them becomes an object: a body has room for 300,000."""
    if isinstance(messages, list):
        contents = (message.get("content") for message in messages if isinstance(message, dict))
        if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
            raise _wrong("messages", f"messages may have at most {MAX_PARTS} parts together")
    return messages


class ChatBody(_Generation):
    """A conversation, to be answered by the assistant's next message."""

    messages: Annotated[
        list[Message],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_few_parts),
    ]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _ResponseFormat | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: object) -> object:
        return _without(_CHAT_NOT_SUPPORTED, body)

    @model_validator(mode="after")
    def _in_accord(self) -> ChatBody:
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            message = "max_tokens and max_completion_tokens say different things; give one of them"
            raise _wrong("max_completion_tokens", message)
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token is to be told with; None: no log probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def metadata(self) -> dict[str, Any]:
        """The task's metadata."""
        asked = self._asked(self.alternatives)
        if (most := self.max_completion_tokens or self.max_tokens) is not None:
            asked["max_tokens"] = most
        return asked


def _one_prompt(prompt: object) -> object:
    """A list that holds one prompt is that prompt."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            message = "several prompts in one request are not supported; send one request for each"
            raise PydanticCustomError(UNSUPPORTED, "{why}", {"why": message, "param": "prompt"})
        return prompt[0]
    return prompt


class CompletionBody(_Generation):
    """A prompt, to be continued."""

    prompt: Annotated[
        str | Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)],
        BeforeValidator(_one_prompt, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: object) -> object:
        return _without(_COMPLETION_NOT_SUPPORTED, body)

    @property
    def alternatives(self) -> int | None:
        """As for a chat."""
        return self.logprobs

    def metadata(self) -> dict[str, Any]:
        """The task's metadata."""
        return {"max_tokens": COMPLETION_MAX_TOKENS, **self._asked(self.alternatives)}


def _wrong(name: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{why}", {"why": message, "param": name})
