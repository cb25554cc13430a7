"""Text generation tasks: their metadata, checked, as a prompt and as arguments of vLLM's `SamplingParams`.

The contract is docs/text-generation.md. Nothing here needs vLLM, and every refusal names the parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_worker import TaskError

ROLES = ("system", "developer", "user", "assistant")
STOP_MAX = 16
STOP_LENGTH_MAX = (
    1_000  # characters: so many are held back from the stream until it is clear that none begins
)
LOGIT_BIAS_MAX = 1_024
SCHEMA_DEPTH_MAX = 32
SCHEMA_PARTS_MAX = 2_000  # 9,000 texts in an enum kept the engine's compiler busy for two minutes
SCHEMA_TEXT_MAX = 50_000  # characters, of all names and texts together
# Of all patterns, as long as they are with their {n,m} written out: ([a-z]{1,90}[0-9]{1,90}){1,50} is 9,000,
# and a second. 15 kB of such patterns were a minute and more.
PATTERNS_MAX = 10_000
# Of all bounds on lengths and counts (maxLength, minItems and the like) together.
BOUNDS_MAX = 1_000_000
MESSAGES_MAX = 4_096  # and so many parts of their contents
_INT64 = 1 << 63
_TOKEN_MAX = 1 << 31
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_SCHEMA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BOUNDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# What a pattern is made of: an escape, a repetition with numbers, or one character.
_PATTERN_PART = re.compile(r"\\.|\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}|.", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One task. Of `prompt` and `messages` one is None. `sampling` holds what was asked for and nothing else,
    by the names of `SamplingParams`; `structured` is for its `StructuredOutputsParams`."""

    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    sampling: dict[str, Any]
    structured: dict[str, Any] | None

    @property
    def logprobs(self) -> int | None:
        """How many alternatives each token is told with; None: no logprobs."""
        found: int | None = self.sampling.get("logprobs")
        return found

    @property
    def characters(self) -> int:
        """Of all messages together; a template only adds to them."""
        return sum(
            len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
            for content in (message["content"] for message in self.messages or [])
        )


def parse(metadata: Mapping[str, Any]) -> Request:
    """The request in a task's metadata. Null counts as absent. Raises `TaskError` (`invalid_request`)."""
    wish = {name: value for name, value in metadata.items() if value is not None}
    for name in wish:
        if name not in _CHECKS and name not in ("prompt", "messages", "response_format"):
            raise _refused(f"{name[:64]!r} is not a parameter of text generation")
    if ("prompt" in wish) is ("messages" in wish):
        raise _refused("give exactly one of prompt and messages")
    sampling = {name: check(name, wish[name]) for name, check in _CHECKS.items() if name in wish}
    if sampling.get("min_tokens", 0) > sampling.get("max_tokens", math.inf):
        raise _refused("min_tokens must not be more than max_tokens")
    structured = _structured(wish["response_format"]) if "response_format" in wish else None
    if structured is not None:
        # The end of what the format allows is the end: to go on would be to leave it.
        for name in ("ignore_eos", "min_tokens"):
            if sampling.get(name):
                raise _refused(f"{name} cannot go with a response_format other than text")
    return Request(
        prompt=_prompt(wish["prompt"]) if "prompt" in wish else None,
        messages=_messages(wish["messages"]) if "messages" in wish else None,
        sampling=sampling,
        structured=structured,
    )


def _refused(message: str) -> TaskError:
    return TaskError("invalid_request", message)


def _whole_characters(where: str, *texts: str) -> None:
    """JSON may hold half a character (a lone surrogate), of which no tokenizer makes tokens."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _refused(f"{where} holds half a character: a surrogate without its other half") from None


# -- prompt and messages ------------------------------------------------------------------------------------


def _prompt(value: Any) -> str | list[int]:
    if not value or not isinstance(value, str | list):
        raise _refused("prompt must be a text or a list of token ids, and not empty")
    if isinstance(value, list) and not all(type(token) is int and 0 <= token < _TOKEN_MAX for token in value):
        raise _refused("prompt must be a text, or hold nothing but token ids: whole numbers from 0 on")
    if isinstance(value, str):
        _whole_characters("prompt", value)
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    if not value or not isinstance(value, list):
        raise _refused("messages must be a list of messages, and not empty")
    if len(value) > MESSAGES_MAX:
        raise _refused(f"messages must be up to {MESSAGES_MAX} messages")
    contents = [message.get("content") for message in value if isinstance(message, dict)]
    if sum(len(content) for content in contents if isinstance(content, list)) > MESSAGES_MAX:
        raise _refused(f"messages must have contents of up to {MESSAGES_MAX} parts together")
    return [_message(f"messages[{number}]", message) for number, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(f"{where} must be an object with role and content")
    message = {name: field for name, field in value.items() if field is not None}
    for name in message:
        if name not in ("role", "content", "name"):
            raise _refused(f"{where}: {name[:64]!r} is not supported")
    if message.get("role") not in ROLES:
        raise _refused(f"{where}.role must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("name", ""), str):
        raise _refused(f"{where}.name must be a text")
    _whole_characters(f"{where}.name", message.get("name", ""))
    content = message.get("content")
    if isinstance(content, list) and content:
        return {
            **message,
            "content": [_part(f"{where}.content[{n}]", part) for n, part in enumerate(content)],
        }
    if not isinstance(content, str):
        raise _refused(f"{where}.content must be a text, or a list of parts of type text")
    _whole_characters(f"{where}.content", content)
    return message


def _part(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise _refused(f'{where} must be {{"type": "text", "text": ...}}: other types are not supported')
    if value.keys() != {"type", "text"} or not isinstance(value["text"], str):
        raise _refused(f"{where} must hold type and text, and text must be a text")
    _whole_characters(where, value["text"])
    return value


# -- sampling -----------------------------------------------------------------------------------------------


def _number(low: float, high: float, words: str, *, above: bool = False) -> Callable[[str, Any], float]:
    """A check for numbers from `low` (or `above` it) to `high`; `words` say so."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _float(value)
            if math.isfinite(number) and low <= number <= high and not (above and number == low):
                return number
        raise _refused(f"{name} must be {words}")

    return check


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON may have whole numbers of any length
        return math.inf


def _whole(low: int, high: int, words: str) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise _refused(f"{name} must be {words}")

    return check


def _seed(name: str, value: Any) -> int:
    """vLLM takes -1 for no seed at all; so that every number is one, negative ones are folded."""
    if type(value) is int and -_INT64 <= value < _INT64:
        return value % _INT64
    raise _refused(f"{name} must be a whole number of at most 64 bits")


def _top_k(name: str, value: Any) -> int:
    if type(value) is int and (value == -1 or 1 <= value < _TOKEN_MAX):
        return max(value, 0)
    raise _refused(f"{name} must be a whole number from 1 on, or -1 for all tokens")


def _stop(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOP_MAX:
        raise _refused(f"{name} must be a text or a list of up to {STOP_MAX} texts")
    if not all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH_MAX for stop in stops):
        raise _refused(f"{name} must hold texts of 1 to {STOP_LENGTH_MAX} characters")
    _whole_characters(name, *stops)
    return stops


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > LOGIT_BIAS_MAX:
        raise _refused(f"{name} must be an object with up to {LOGIT_BIAS_MAX} entries")
    weigh = _number(-100, 100, "an object that gives each token id a number from -100 to 100")
    bias = {}
    for token, weight in value.items():
        if _TOKEN_ID.fullmatch(token) is None or int(token) >= _TOKEN_MAX:
            raise _refused(f"{name}: {token[:64]!r} is no token id")
        if int(token) in bias:
            raise _refused(f"{name}: token {int(token)} is there twice")
        bias[int(token)] = weigh(name, weight)
    return bias


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _refused(f"{name} must be true or false")


_penalty = _number(-2, 2, "a number from -2 to 2")
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_tokens": _whole(1, _TOKEN_MAX, "a whole number from 1 on"),
    "min_tokens": _whole(0, _TOKEN_MAX, "a whole number from 0 on"),
    "temperature": _number(0, 2, "a number from 0 to 2"),
    "top_p": _number(0, 1, "a number above 0 and up to 1", above=True),
    "top_k": _top_k,
    "min_p": _number(0, 1, "a number from 0 to 1"),
    "seed": _seed,
    "stop": _stop,
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "repetition_penalty": _number(0, 1e6, "a number above 0", above=True),
    "logit_bias": _logit_bias,
    "ignore_eos": _flag,
    "logprobs": _whole(0, 20, "a whole number from 0 to 20"),
}


# -- structured output --------------------------------------------------------------------------------------


def _structured(value: Any) -> dict[str, Any] | None:
    name = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise _refused(f'{name} must be an object whose type is "text", "json_object" or "json_schema"')
    allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    for field, content in value.items():
        if field not in allowed and content is not None:
            raise _refused(f"{name}: {field[:64]!r} is not supported with type {kind}")
    if kind == "text":
        return None
    return {"json_object": True} if kind == "json_object" else {"json": _schema(value.get("json_schema"))}


def _schema(value: Any) -> dict[str, Any]:
    where = "response_format.json_schema"
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict):
        raise _refused(f"{where} must be an object with name and schema, and schema an object")
    for field, kind in (("name", str), ("description", str), ("strict", bool)):
        if value.get(field) is not None and not isinstance(value[field], kind):
            raise _refused(f"{where}.{field} must be {'a text' if kind is str else 'true or false'}")
    for field in value:
        if field not in ("name", "schema", "description", "strict"):
            raise _refused(f"{where}: {field[:64]!r} is not supported")
    if _SCHEMA_NAME.fullmatch(value.get("name") or "") is None:
        raise _refused(f"{where}.name must be up to 64 letters, digits, _ and -")
    _check_size(f"{where}.schema", value["schema"])
    schema: dict[str, Any] = value["schema"]
    return schema


def _check_size(where: str, schema: Any) -> None:
    """A grammar is made of the schema before anything is generated, and grows faster than it."""
    level, parts, text, patterns, bounds = [schema], 0, 0, 0, 0
    for _ in range(SCHEMA_DEPTH_MAX):
        inside: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _whole_characters(where, *node)
                text += sum(map(len, node))
                # One that bounds nothing (a property of that name, in an example) is counted all the same.
                bounds += sum(_bound(node.get(name)) for name in _BOUNDS)
                patterns += _unrolled(node.get("pattern"))
                properties = node.get("patternProperties")
                patterns += sum(map(_unrolled, properties)) if isinstance(properties, dict) else 0
            inside += node.values() if isinstance(node, dict) else node
        parts += len(inside)
        texts = [part for part in inside if isinstance(part, str)]
        _whole_characters(where, *texts)
        text += sum(map(len, texts))
        if not all(math.isfinite(part) for part in inside if isinstance(part, float)):
            raise _refused(f"{where} has a number that is too big, or none")
        for count, most, what in (
            (parts, SCHEMA_PARTS_MAX, "parts"),
            (text, SCHEMA_TEXT_MAX, "characters of names and texts"),
            (patterns, PATTERNS_MAX, "characters of patterns, with their repetitions written out"),
            (bounds, BOUNDS_MAX, f"as the sum of {', '.join(_BOUNDS)}"),
        ):
            if count > most:
                raise _refused(f"{where} has more than {most} {what}")
        level = [part for part in inside if isinstance(part, dict | list)]
        if not level:
            return
    raise _refused(f"{where} is nested more than {SCHEMA_DEPTH_MAX} levels deep")


def _bound(value: Any) -> int:
    return min(max(value, 0), BOUNDS_MAX + 1) if type(value) is int else 0


def _unrolled(pattern: Any) -> int:
    """The length of a pattern with each {n,m} written out; a class of characters is one."""
    if not isinstance(pattern, str):
        return 0
    outer: list[int] = []
    length = last = 0  # so far in this group, and its last part
    in_class = False
    for part in _PATTERN_PART.finditer(pattern):
        if in_class:
            in_class = part[0] != "]"
        elif part[1] is not None:
            times = max(_times(part[1]), _times(part[2] or ""), 1)
            length, last = length + last * (times - 1), last * times
        elif part[0] == "(":
            outer.append(length)
            length = last = 0
        elif part[0] == ")" and outer:
            length, last = outer.pop() + length, length
        elif part[0] in "*+?":
            length += 1
        elif part[0] != "|":
            length, last = length + 1, 1
            in_class = part[0] == "["
        if length > PATTERNS_MAX:
            break
    return length + sum(outer)


def _times(digits: str) -> int:
    """Long numbers are not read: they are too many anyway, and take quadratic time."""
    return int(digits or 0) if len(digits) < 10 else 1 << 31
