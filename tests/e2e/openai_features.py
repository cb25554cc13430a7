"""What the official `openai` client may rely on, feature by feature, whatever model answers.

`test_openai.py` runs this list against the echo worker; any service with a model for the OpenAI routes can be
its target. What is said may be anything, so each feature compares answers of the same model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

TALK: list[Any] = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "one two three four five six seven eight"},
]
PROMPT = "one two three four five six seven eight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running service, and a model of it. `chooses`: the model is one that chooses between tokens, so that
    there are log probabilities, token ids and forms of an answer."""

    url: str
    key: str
    tenant: str
    model: str
    chooses: bool

    @property
    def options(self) -> dict[str, Any]:
        """How a client is made for it. It tries nothing again, so that every failure is seen."""
        return {
            "base_url": f"{self.url}/v1",
            "api_key": self.key,
            "default_headers": {"X-Tenant-ID": self.tenant},
            "max_retries": 0,
            "timeout": 300,
        }

    @asynccontextmanager
    async def client(self, **changes: Any) -> AsyncIterator[openai.AsyncOpenAI]:
        """The official client, asynchronous."""
        async with openai.AsyncOpenAI(**{**self.options, **changes}) as client:
            yield client

    def ask(self, **changes: Any) -> dict[str, Any]:
        """A chat whose answer is the same every time."""
        return {"model": self.model, "messages": TALK, "temperature": 0, "max_tokens": 8, **changes}


Feature = Callable[[Target], Awaitable[None]]
FEATURES: list[Feature] = []


def feature(function: Feature) -> Feature:
    """Put a feature on the list."""
    FEATURES.append(function)
    return function


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def answer_to(client: openai.AsyncOpenAI, target: Target, **changes: Any) -> str:
    """The text of a chat's answer."""
    answer = await client.chat.completions.create(**target.ask(**changes))
    assert answer.choices[0].message.content is not None
    return str(answer.choices[0].message.content)


@feature
async def models(target: Target) -> None:
    """The model is listed, and can be asked for by its name."""
    async with target.client() as client:
        listed = {model.id: model for model in (await client.models.list()).data}
        assert await client.models.retrieve(target.model) == listed[target.model]
        assert listed[target.model].object == "model"
        assert listed[target.model].created > 0


@feature
async def chat(target: Target) -> None:
    """A conversation is answered by the assistant, with the reason of the end and the usage."""
    async with target.client() as client:
        answer = await client.chat.completions.create(**target.ask())
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.finish_reason in ("stop", "length")
        assert answer.model == target.model
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-t_")
        assert answer._request_id == answer.id.removeprefix("chatcmpl-")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens >= 8
        assert 1 <= answer.usage.completion_tokens <= 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@feature
async def chat_streamed(target: Target) -> None:
    """Streamed, the same answer comes in chunks: the role, the text, the reason of the end."""
    async with target.client() as client:
        whole = await client.chat.completions.create(**target.ask())
        stream = await client.chat.completions.create(**target.ask(stream=True))
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert text_of(chunks) == whole.choices[0].message.content
        assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 2, "it comes in pieces"
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons[-1] == whole.choices[0].finish_reason
        assert set(reasons[:-1]) == {None}
        assert len({chunk.id for chunk in chunks}) == 1
        assert all(chunk.usage is None for chunk in chunks)


@feature
async def streaming_helper(target: Target) -> None:
    """The client's own helper for streams puts the same answer together."""
    async with (
        target.client() as client,
        client.chat.completions.stream(**target.ask(stream_options={"include_usage": True})) as stream,
    ):
        said = "".join([event.delta async for event in stream if event.type == "content.delta"])
        snapshot = stream.current_completion_snapshot
        assert said == snapshot.choices[0].message.content == await answer_to(client, target)
        assert snapshot.usage is not None


@feature
async def include_usage(target: Target) -> None:
    """With include_usage the last chunk has the usage and no choices."""
    async with target.client() as client:
        whole = await client.chat.completions.create(**target.ask())
        options = {"include_usage": True}
        stream = await client.chat.completions.create(**target.ask(stream=True, stream_options=options))
        *chunks, last = [chunk async for chunk in stream]
        assert (last.choices, last.usage) == ([], whole.usage)
        assert all(chunk.usage is None for chunk in chunks)


@feature
async def completions(target: Target) -> None:
    """A prompt is continued, whole or in chunks, with 16 tokens at most where nobody says how many."""
    async with target.client() as client:
        whole = await client.completions.create(model=target.model, prompt=PROMPT, temperature=0)
        assert whole.choices[0].text
        assert whole.object == "text_completion"
        assert whole.id.startswith("cmpl-t_")
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 16
        stream = await client.completions.create(
            model=target.model,
            prompt=[PROMPT],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert (last.choices, last.usage) == ([], whole.usage)


@feature
async def most_tokens(target: Target) -> None:
    """max_tokens and max_completion_tokens end an answer with the reason `length`; both may say the same."""
    async with target.client() as client:
        for limits in (
            {"max_tokens": 3},
            {"max_tokens": None, "max_completion_tokens": 3},
            {"max_tokens": 3, "max_completion_tokens": 3},
        ):
            answer = await client.chat.completions.create(**target.ask(**limits))
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(**target.ask(max_tokens=3, max_completion_tokens=4))
        assert raised.value.param == "max_completion_tokens"


@feature
async def stop(target: Target) -> None:
    """An answer ends before a stop text, which is not in it; one of several stops it as well."""
    async with target.client() as client:
        text = await answer_to(client, target)
        middle = text[len(text) // 2 : len(text) // 2 + 3]
        for texts in (middle, [middle], ["\x00never", middle]):
            whole = await client.chat.completions.create(**target.ask(stop=texts))
            assert whole.choices[0].message.content == text[: text.index(middle)]
            assert whole.choices[0].finish_reason == "stop"
            stream = await client.chat.completions.create(**target.ask(stop=texts, stream=True))
            chunks = [chunk async for chunk in stream]
            assert text_of(chunks) == whole.choices[0].message.content
            assert chunks[-1].choices[0].finish_reason == "stop"


@feature
async def seed(target: Target) -> None:
    """The same seed gives the same answer, also where tokens are chosen by chance."""
    async with target.client() as client:
        answers = [await answer_to(client, target, temperature=1, top_p=0.9, seed=7) for _ in range(2)]
        assert answers[0] == answers[1]


@feature
async def further_parameters(target: Target) -> None:
    """Penalties, a bias that biases nothing and vLLM's own parameters in `extra_body` are taken."""
    async with target.client() as client:
        extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0}
        assert await answer_to(
            client,
            target,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logit_bias={},
            user="somebody",
            n=1,
            extra_body=extra,
        )


@feature
async def logprobs(target: Target) -> None:
    """Each token is told with its log probability and the alternatives, in the form of either endpoint; a
    worker that has none refuses, and names the parameter."""
    async with target.client() as client:
        asked = target.ask(logprobs=True, top_logprobs=2, max_tokens=4)
        if not target.chooses:
            with pytest.raises(openai.BadRequestError, match="logprobs"):
                await client.chat.completions.create(**asked)
            return
        answer = await client.chat.completions.create(**asked)
        told = answer.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert answer.usage is not None
        assert len(told.content) == answer.usage.completion_tokens
        for token in told.content:
            assert len(token.top_logprobs) == 2
            assert token.logprob <= 0
        chunks = [c async for c in await client.chat.completions.create(**asked, stream=True)]
        streamed = [chunk.choices[0].logprobs for chunk in chunks]
        assert [token for one in streamed if one for token in one.content or []] == told.content
        old = await client.completions.create(
            model=target.model, prompt=PROMPT, temperature=0, logprobs=1, max_tokens=4
        )
        columns = old.choices[0].logprobs
        assert columns is not None
        assert columns.tokens is not None
        assert columns.token_logprobs is not None
        assert len(columns.tokens) == len(columns.token_logprobs) == 4


@feature
async def token_ids(target: Target) -> None:
    """A prompt may be token ids, for a model that has such."""
    async with target.client() as client:
        asked = client.completions.create(model=target.model, prompt=[5, 6, 7], max_tokens=2, temperature=0)
        if target.chooses:
            answer = await asked
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == 3
            return
        with pytest.raises(openai.BadRequestError, match="prompt"):
            await asked


@feature
async def response_format(target: Target) -> None:
    """An answer has the form that was asked for, with a model that can; else the parameter is refused."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    async with target.client() as client:
        if target.chooses:
            answer = json.loads(await answer_to(client, target, response_format=form, max_tokens=64))
            assert answer["colour"] in ("red", "green")
            return
        with pytest.raises(openai.BadRequestError, match="response_format"):
            await client.chat.completions.create(**target.ask(response_format=form))


@feature
async def least_tokens(target: Target) -> None:
    """vLLM's min_tokens and ignore_eos keep a model going; a worker without them refuses."""
    async with target.client() as client:
        for extra in ({"ignore_eos": True}, {"min_tokens": 8}):
            asked = client.chat.completions.create(**target.ask(), extra_body=extra)
            if target.chooses:
                answer = await asked
                assert answer.usage is not None
                assert answer.usage.completion_tokens == 8
                continue
            with pytest.raises(openai.BadRequestError, match=next(iter(extra))):
                await asked


@feature
async def too_long_a_prompt(target: Target) -> None:
    """A prompt that is longer than the model's context is told by its own code."""
    if not target.chooses:
        return  # it has no context to fill
    async with target.client() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.completions.create(model=target.model, prompt=[5] * 200_000)
        assert raised.value.code == "context_length_exceeded"


@feature
async def wrong_parameters(target: Target) -> None:
    """A wrong value, an unsupported parameter and an unknown one are refused, each by its name."""
    async with target.client() as client:
        for changes, code, param in (
            ({"temperature": 3}, "invalid_value", "temperature"),
            ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
            ({"n": 2}, "unsupported_parameter", "n"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
            ({"extra_body": {"best_of_all": True}}, "unknown_parameter", "best_of_all"),
        ):
            with pytest.raises(openai.BadRequestError) as raised:
                await client.chat.completions.create(**target.ask(**changes))
            assert (raised.value.code, raised.value.param) == (code, param)
            assert raised.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError) as raised:
            await client.completions.create(model=target.model, prompt=["a", "b"])
        assert raised.value.param == "prompt"


@feature
async def unknown_models_and_keys(target: Target) -> None:
    """A model that is not there is 404, a key that is wrong 401."""
    async with target.client() as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(**target.ask(model="no/such-model"))
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("no/such-model")
    async with target.client(api_key="wrong") as client:
        for call in (client.chat.completions.create(**target.ask()), client.models.list()):
            with pytest.raises(openai.AuthenticationError) as unknown:
                await call
            assert unknown.value.code == "invalid_api_key"


@feature
async def a_session_is_used_again(target: Target) -> None:
    """The second request finds the first one's session; `X-Session-ID` names it, and may ask for it."""
    async with target.client() as client:
        first = await client.chat.completions.with_raw_response.create(**target.ask())
        session = first.headers["x-session-id"]
        second = await client.chat.completions.with_raw_response.create(**target.ask())
        pin = {"X-Session-ID": session}
        third = await client.chat.completions.with_raw_response.create(**target.ask(), extra_headers=pin)
        assert [second.headers["x-session-id"], third.headers["x-session-id"]] == [session, session]
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        stranger = {**pin, "X-Tenant-ID": f"{target.tenant}-not"}
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(**target.ask(), extra_headers=stranger)
        assert raised.value.code == "session_not_found"


@feature
async def several_at_once(target: Target) -> None:
    """Requests that come together are all answered, and alike."""
    async with target.client() as client, asyncio.TaskGroup() as group:
        asking = [group.create_task(answer_to(client, target)) for _ in range(3)]
    assert len({task.result() for task in asking}) == 1


@feature
async def synchronous_client(target: Target) -> None:
    """The client that blocks works as well, streaming and not."""

    def use_it() -> tuple[str | None, str]:
        with openai.OpenAI(**target.options) as client:
            whole = client.chat.completions.create(**target.ask())
            with client.chat.completions.create(**target.ask(stream=True)) as stream:
                return whole.choices[0].message.content, text_of(list(stream))

    whole, streamed = await asyncio.to_thread(use_it)
    assert whole == streamed
