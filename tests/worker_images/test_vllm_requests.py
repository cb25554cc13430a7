"""What the vLLM worker makes of a task's metadata; vLLM itself is not needed for that."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from gpu_worker import TaskError, frames

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
steps = module("text_steps")


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


def patterns(count: int, pattern: str) -> dict[str, Any]:
    """A schema with so many properties of one pattern."""
    return {"type": "object", "properties": {f"p{n}": {"pattern": pattern} for n in range(count)}}


def test_repetitions_in_patterns_are_bounded() -> None:
    """A schema of 15 kB, whose grammar took a minute, is refused before one is made."""
    pattern = "^([a-z]{1,90}[0-9]{1,90}){1,50}$"
    accepted = requests.parse({"prompt": "a", "response_format": schema(schema=patterns(1, pattern))})
    assert accepted.structured == {"json": patterns(1, pattern)}
    for wrong in (
        patterns(200, pattern),
        {"patternProperties": {pattern: {}, pattern + "a": {}}},
        *(
            {"pattern": one}
            for one in ("a{20001}", "a{1,999999999999}", "((a{9}b{9}){99,}c){1,99}", "(a{20001}")
        ),
    ):
        assert "characters of patterns" in refusal(prompt="a", response_format=schema(schema=wrong))


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("^a+$", 4),
        ("a{90}", 90),
        ("a{2,90}", 90),
        ("a{ 2 , 90 }", 90),
        ("a{2,}", 2),
        ("(a{2}|b){10}", 30),
        ("[a-z{90}]{3}", 3),
        ("(a*b?){3}", 12),
        ("[\\]a]{3}", 3),
        ("\\{90}", 4),
        ("((ab){10}){10}c", 201),
        ("a)b", 3),
        ("{{{{(((", 4),
    ],
)
def test_a_pattern_is_measured_unrolled(pattern: str, length: int) -> None:
    """Groups and repetitions count as often as they are there; what is escaped or in a class is none."""
    assert requests._unrolled(pattern) == length


def test_bounds_in_a_schema_are_bounded() -> None:
    """Lengths and counts, together."""
    for wrong in ({"maxLength": 1_000_001}, {"a": {"minItems": 600_000}, "b": {"maxItems": 600_000}}):
        assert "minLength, maxLength" in refusal(prompt="a", response_format=schema(schema=wrong))


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_json_cannot_say_is_refused(number: float) -> None:
    """1e999 is read as infinity."""
    wrong = {"enum": [number]}
    assert "a number" in refusal(prompt="a", response_format=schema(schema=wrong))


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 1}])
def test_a_format_ends_where_it_ends(more: dict[str, Any]) -> None:
    """To go on behind the end would give text that is not of the schema."""
    for form in (schema(), {"type": "json_object"}):
        assert refusal(prompt="a", response_format=form, **more).startswith(next(iter(more)))
    requests.parse({"prompt": "a", "response_format": {"type": "text"}, **more})
    requests.parse({"prompt": "a", "response_format": schema(), "ignore_eos": False, "min_tokens": 0})


@pytest.mark.parametrize(
    ("metadata", "where"),
    [
        ({"prompt": "a\ud800"}, "prompt"),
        ({"prompt": "a", "stop": ["b", "\udc00"]}, "stop"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, "messages[0].name"),
        ({"prompt": "a", "response_format": schema(schema={"enum": ["\ud800"]})}, "response_format"),
        ({"prompt": "a", "response_format": schema(schema={"\ud800": {}})}, "response_format"),
    ],
)
def test_half_a_character_is_refused_by_name(metadata: dict[str, Any], where: str) -> None:
    """JSON may carry a surrogate alone; no tokenizer takes it."""
    message = refusal(**metadata)
    assert message.startswith(where)
    assert "half a character" in message


def test_a_token_is_biased_once() -> None:
    """Two spellings of one token id are not two entries of which one wins."""
    assert refusal(prompt="a", logit_bias={"7": 1, "007": 2}) == "logit_bias: token 7 is there twice"


def test_messages_are_bounded_in_number() -> None:
    """And so are the parts of their contents; their characters are counted before a template sees them."""
    message = {"role": "user", "content": "Hello"}
    assert refusal(messages=[message] * 4_097).startswith("messages must be up to 4096")
    parts = {"role": "user", "content": [{"type": "text", "text": "ab"}] * 2_000}
    assert refusal(messages=[parts] * 3).startswith("messages must have contents of up to 4096 parts")
    assert requests.parse({"messages": [parts, message]}).characters == 4_005
    assert requests.parse({"prompt": "a"}).characters == 0


# -- what a step becomes ------------------------------------------------------------------------------------


def entry(logprob: float, text: str = "x", rank: int | None = 1) -> SimpleNamespace:
    """As vLLM's `Logprob` is."""
    return SimpleNamespace(logprob=logprob, decoded_token=text, rank=rank)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\0" * 1_200_000, []),
        ("東" * 25_000, [steps.told(0, {n: entry(-1.0, "東" * 128, n + 1) for n in range(20)}, 20)] * 200),
        ("", [steps.told(0, {0: entry(-1.0)}, 20)] * 5_000),
    ],
)
def test_every_event_of_a_step_is_bounded(text: str, told: list[Any]) -> None:
    """A step that waited for its readers is big; its events fit, and hold all of it in order."""
    events = list(steps.events(text, told))
    assert len(events) > 1
    for delta, tokens in events:
        frames.text_delta(delta, {"logprobs": tokens})
    assert "".join(delta for delta, _ in events) == text
    assert [token for _, tokens in events for token in tokens] == told


def test_a_usual_step_is_one_event() -> None:
    """And one that adds nothing is none."""
    told = [steps.told(5, {5: entry(-0.5, "a", 2), 6: entry(-0.1, "b", 1)}, 1)]
    assert list(steps.events("a", told)) == [("a", told)]
    assert list(steps.events("a", [])) == [("a", [])]
    assert list(steps.events("", [])) == []
    assert told == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [{"token": "b", "logprob": -0.1, "bytes": [98]}],
        }
    ]


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), float("inf"), -1e5])
def test_a_logprob_that_is_none(logprob: float) -> None:
    """JSON has no word for it."""
    assert steps.told(0, {0: entry(logprob)}, 0)["logprob"] == -9999


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


def test_the_log_of_a_ready_engine() -> None:
    """What was told before, and what this process tells of tasks, is not why the engine ends."""
    heard = console.Console()
    heard.hear("(EngineCore pid=33) WARNING 11-21 [x.py:1] ModuleNotFoundError: No module named 'triton'")
    assert heard.fault is None
    heard.hear("(EngineCore pid=33) ERROR 11-21 [x.py:1] OSError: not there, and not needed")
    heard.ready()
    assert (heard.fault, heard.stage) == (None, None)
    heard.hear("ValueError: a task that failed")
    heard.hear("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:03<00:03,  1.5s/it]")
    assert (heard.fault, heard.stage) == (None, None)
    for start in ("(EngineCore pid=33)", "\x1b[0;36m(Worker_TP0 pid=34)\x1b[0;0m"):
        heard.hear(f"{start} ERROR 11-21 [x.py:1] torch.OutOfMemoryError: {start}")
        assert heard.fault == f"torch.OutOfMemoryError: {start}"


@pytest.mark.parametrize(
    "line",
    ["checkpoint shards:" * 30_000 + "1" * 30_000, "Capturing CUDA graphs|" * 30_000, "a." * 500_000],
)
def test_a_hostile_line_is_read_quickly(line: str) -> None:
    """Whatever a line is like, a hundred of them take no time worth naming."""
    heard = console.Console()
    began = time.thread_time()
    for _ in range(100):
        heard.hear(line)
    assert time.thread_time() - began < 2
    assert heard.stage is None
