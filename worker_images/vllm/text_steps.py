"""What a step of the engine becomes: the events of its text and of its logprobs, each of a bounded size.

Nothing here needs vLLM. A step has more than a token where its task waited for its readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

LOGPROB_MIN = -9999.0  # as vLLM's own server writes minus infinity, which JSON cannot say
# An event may have 1 MiB. A character takes 6 bytes of it at most.
TEXT_MAX = 100_000
TOLD_MAX = 300_000


def events(text: str, told: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The text and the told tokens of a step, as deltas and what goes with each."""
    texts = (text[start:][:TEXT_MAX] for start in range(0, len(text), TEXT_MAX))
    for piece, tokens in zip_longest(texts, _portions(told)):
        yield piece or "", tokens or []


def _portions(told: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    portion: list[dict[str, Any]] = []
    size = 0
    for token in told:
        more = _size(token) + sum(map(_size, token["top_logprobs"]))
        if portion and size + more > TOLD_MAX:
            yield portion
            portion, size = [], 0
        portion.append(token)
        size += more
    if portion:
        yield portion


def _size(entry: Mapping[str, Any]) -> int:
    """Not less than its bytes as JSON: a byte of a token is 6 there at most, and 4 as a number in `bytes`."""
    return 120 + 10 * len(entry["bytes"])


def told(token: int, at: Mapping[int, Any], alternatives: int) -> dict[str, Any]:
    """A token with its logprob and the most probable tokens at its place (`Logprob`s), the best first."""
    best = sorted((p for p in at.values() if (p.rank or math.inf) <= alternatives), key=_rank)
    return {**_entry(at[token]), "top_logprobs": [_entry(entry) for entry in best]}


def _rank(entry: Any) -> int:
    return entry.rank or 0


def _entry(entry: Any) -> dict[str, Any]:
    text = entry.decoded_token or ""
    # Of what is no number, as broken weights give it, JSON says as little.
    logprob = entry.logprob if LOGPROB_MIN < entry.logprob < math.inf else LOGPROB_MIN
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
