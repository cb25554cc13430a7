"""What the vLLM worker makes of a task's metadata; vLLM itself is not needed for that."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_worker import TaskError

FOLDER = Path(__file__).parents[2] / "worker_images/vllm"


def module(name: str) -> ModuleType:
    """A file of the worker, which is a program and no package."""
    spec = importlib.util.spec_from_file_location(f"vllm_worker_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


requests = module("text_request")
console = module("console")


def refusal(**metadata: Any) -> str:
    """The message with which it is refused."""
    with pytest.raises(TaskError) as refused:
        requests.parse(metadata)
    assert refused.value.code == "invalid_request"
    return refused.value.message


def schema(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, **more}}


def test_a_prompt_alone() -> None:
    """Nothing is asked for that the caller did not ask for: defaults are the model's."""
    assert requests.parse({"prompt": "Hello", "stop": None, "messages": None}) == requests.Request(
        prompt="Hello", messages=None, sampling={}, structured=None
    )
    assert requests.parse({"prompt": [1, 2]}).prompt == [1, 2]


def test_every_parameter() -> None:
    """Each becomes the engine's parameter of the same name."""
    asked = {
        "max_tokens": 10,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["\n", "END"],
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "logit_bias": {"15": -100, "0": 3.5},
        "ignore_eos": True,
        "logprobs": 20,
    }
    request = requests.parse({"prompt": "Hello", **asked})
    assert request.sampling == {**asked, "logit_bias": {15: -100, 0: 3.5}}
    assert request.logprobs == 20


@pytest.mark.parametrize(
    ("name", "value", "becomes"),
    [
        ("top_k", -1, 0),
        ("seed", -1, (1 << 63) - 1),
        ("stop", "END", ["END"]),
        ("stop", [], []),
        ("temperature", 0, 0),
        ("logprobs", 0, 0),
        ("logit_bias", {}, {}),
    ],
)
def test_other_ways_to_say_it(name: str, value: Any, becomes: Any) -> None:
    """What the engine says in another way is translated."""
    assert requests.parse({"prompt": "Hello", name: value}).sampling == {name: becomes}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", wrong) for wrong in (0, -1, 1.0, "1", True, 1 << 40)),
        *(("min_tokens", wrong) for wrong in (-1, 0.5, False)),
        *(("temperature", wrong) for wrong in (-0.1, 2.1, "0", True, float("nan"), float("inf"), 10**400)),
        *(("top_p", wrong) for wrong in (0, 1.1, [])),
        *(("top_k", wrong) for wrong in (0, -2, 1.5, True)),
        *(("min_p", wrong) for wrong in (-0.1, 1.5)),
        *(("seed", wrong) for wrong in (1.5, "1", True, 1 << 63, -(1 << 63) - 1)),
        *(("stop", wrong) for wrong in ("", [""], [1], ["a"] * 17, {"a": 1}, "a" * 1001)),
        *(("presence_penalty", wrong) for wrong in (-2.1, 2.1, "1")),
        *(("frequency_penalty", wrong) for wrong in (-2.1, 2.1, None.__class__)),
        *(("repetition_penalty", wrong) for wrong in (0, -1, float("inf"))),
        *(("logit_bias", wrong) for wrong in ([], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "1"}, {"²": 1})),
        ("logit_bias", {"9" * 10: 1}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        *(("ignore_eos", wrong) for wrong in (0, "true")),
        *(("logprobs", wrong) for wrong in (-1, 21, True, 1.5)),
        *(("prompt", wrong) for wrong in ("", [], 1, [1, "a"], [-1], [True], [1 << 31], {"a": 1})),
        ("response_format", "json_object"),
        ("response_format", {"type": "regex"}),
        ("response_format", {"type": "json_object", "schema": {}}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", schema(name=None)),
        ("response_format", schema(name="two words")),
        ("response_format", schema(strict="yes")),
        ("response_format", schema(schema=[])),
        ("response_format", schema(example={})),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    """The message names the parameter."""
    assert refusal(**{"prompt": "Hello", name: value}).startswith(name)


def test_what_is_not_known_is_refused() -> None:
    """Nothing is ignored silently, and a long name is not quoted whole."""
    assert refusal(prompt="Hello", best_of=2) == "'best_of' is not a parameter of text generation"
    assert len(refusal(prompt="Hello", **{"x" * 10_000: 1})) < 200


def test_prompt_or_messages() -> None:
    """One of them and not both."""
    wanted = "give exactly one of prompt and messages"
    assert refusal() == wanted
    assert refusal(prompt="Hello", messages=[{"role": "user", "content": "Hello"}]) == wanted


def test_min_tokens_and_max_tokens() -> None:
    """They must fit each other."""
    assert refusal(prompt="Hello", min_tokens=3, max_tokens=2).startswith("min_tokens")


def test_messages() -> None:
    """All roles, a name, and content in parts."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "Ada"},
        {"role": "assistant", "content": ""},
    ]
    asked = [*messages[:3], {**messages[3], "tool_calls": None}]
    assert requests.parse({"messages": asked}).messages == messages


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("Hello", "messages[1] must be an object"),
        ({"content": "Hello"}, "messages[1].role must be one of system, developer, user, assistant"),
        ({"role": "tool", "content": "Hello"}, "messages[1].role"),
        ({"role": ["user"], "content": "Hello"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": 1}, "messages[1].content"),
        ({"role": "user", "content": "Hello", "name": 1}, "messages[1].name"),
        ({"role": "user", "content": "Hello", "tool_calls": []}, "messages[1]: 'tool_calls'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[1].content[0]"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: Any, says: str) -> None:
    """Which message, and which part of it."""
    assert refusal(messages=[{"role": "user", "content": "Hello"}, message]).startswith(says)


@pytest.mark.parametrize("wrong", [[], "Hello", {"role": "user"}])
def test_messages_are_a_list(wrong: Any) -> None:
    """And not an empty one."""
    assert refusal(messages=wrong).startswith("messages must be")


def test_response_format() -> None:
    """Its three types; the schema goes to the engine as it is."""
    formats = [{"type": "text"}, {"type": "json_object", "json_schema": None}, schema(strict=True)]
    assert [requests.parse({"prompt": "a", "response_format": f}).structured for f in formats] == [
        None,
        {"json_object": True},
        {"json": {"type": "object"}},
    ]


def test_a_schema_is_bounded() -> None:
    """In depth and in size: a grammar grows faster than its schema."""
    deep: Any = {}
    for _ in range(40):
        deep = {"properties": deep}
    assert "nested more than 32" in refusal(prompt="a", response_format=schema(schema=deep))
    wide = {"enum": list(range(2_001))}
    assert "more than 2000 parts" in refusal(prompt="a", response_format=schema(schema=wide))
    for long in ({"pattern": "a" * 50_001}, {"a" * 25_000: {"a" * 25_001: {}}}):
        assert "more than 50000 characters" in refusal(prompt="a", response_format=schema(schema=long))


# -- what the engine's log says -----------------------------------------------------------------------------


def test_the_log_tells_how_far_the_engine_is() -> None:
    """Shards of weights and captured graphs are counted; the rest is a stage without a measure."""
    heard = console.Console()
    assert heard.stage is None
    for line, stage in [
        (
            "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:03<00:03,  1.5s/it]",
            ("weights", 2, 4),
        ),
        ("(Worker pid=4) INFO 11-21 10:00:00 [x.py:1] Model loading took 14 GiB", ("warm-up", 0, None)),
        ("Capturing CUDA graphs (decode, FULL):  10%|#  | 3/35 [00:01<00:09, 3it/s]", ("graphs", 3, 35)),
    ]:
        heard.hear(line)
        assert heard.stage == stage


def test_the_log_tells_why_the_engine_failed() -> None:
    """The last error that is no echo of another, without what stands before it in the log."""
    heard = console.Console()
    heard.hear(
        "(EngineCore pid=29) ERROR 11-21 10:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory."
    )
    heard.hear("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See above.")
    heard.hear("RuntimeError: Engine core initialization failed. See root cause above.")
    heard.hear("an Error in the middle of a line: is none")
    assert heard.fault == "torch.OutOfMemoryError: CUDA out of memory."
    heard.hear(
        "ERROR 11-21 [x.py:1] Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down."
    )
    heard.hear("RuntimeError: Executor failed.")
    assert heard.fault == "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"
    assert console.is_echo("Engine core initialization failed. See root cause above.")
