"""What the scrub's program says, read strictly: one JSON object, and nothing in it that does not add up."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from gpu_server.core.slots import SlotSpec
from gpu_server.ports import Dirty, WashUnreachable
from gpu_server.sealed.wash import Figures

MAX_ANSWER_BYTES: Final = 16 << 10
MIN_SHARE: Final = 900
"""Of a GPU's memory, in thousandths, that a scrub has to reach."""

_WORD: Final = 4
_BYTES: Final = (
    "bytes_total",
    "bytes_reserved",
    "bytes_free",
    "bytes_allocated",
    "written",
    "compared",
    "inverted",
    "inverse_compared",
    "zeroed",
    "zero_compared",
)
_COUNTS: Final = (
    "mismatched",
    "inverse_mismatched",
    "zero_mismatched",
    "nonzero_before",
    "sampled",
    "chunks",
)
_TIMES: Final = (
    "open_us",
    "allocate_us",
    "look_us",
    "write_us",
    "compare_us",
    "inverse_us",
    "inverse_compare_us",
    "zero_us",
    "zero_compare_us",
    "free_us",
)
_EACH_BYTE: Final = ("written", "compared", "inverted", "inverse_compared", "zeroed", "zero_compared")
_MISMATCHES: Final = ("mismatched", "inverse_mismatched", "zero_mismatched")
_NUMBERS: Final = (*_BYTES, *_COUNTS, *_TIMES)
_TEXTS: Final = ("uuid", "device")
_LIMIT: Final = 1 << 50
_TEXT: Final = re.compile(r"[ -~]{0,200}")
_RESULTS: Final = frozenset({"passed", "failed", "unavailable", "not_applicable"})
# Thousandths of what was free when it began: what is missing may still hold what the last one has left.
_OF_FREE: Final = 990
# NVML may count a little differently for the service and in a container.
_SAME_SIZE: Final = 98


def read_answer(raw: bytes, spec: SlotSpec, *, min_share: int = MIN_SHARE) -> Figures:
    """The figures of a scrub of this GPU that passed.

    Raises `Dirty` where something is wrong with the memory, or the figures do not add up, and
    `WashUnreachable` where there was no scrub, or this is no answer of the program's.
    """
    said = _read(raw)
    result, reason, figures = said["result"], said["reason"], said["figures"]
    if result == "failed":
        raise Dirty(f"the scrub failed: {reason}")
    if result == "unavailable":
        raise WashUnreachable(f"the scrub could not be carried out: {reason}")
    if result == "not_applicable":
        raise WashUnreachable(f"the scrub sees no GPU: {reason}")
    _require_figures(figures)
    if wrong := _contradiction(figures, spec, min_share):
        raise Dirty(f"the scrub says that it passed, but {wrong}")
    return dict(figures)


def _read(raw: bytes) -> dict[str, Any]:
    try:
        if len(raw) > MAX_ANSWER_BYTES:
            raise ValueError("it is too long")
        said = json.loads(raw.decode("ascii"), object_pairs_hook=_once, parse_constant=_no_number)
        if not isinstance(said, dict) or said.keys() != {"result", "reason", "figures"}:
            raise ValueError("it is not an object of result, reason and figures")
        if not isinstance(said["result"], str) or said["result"] not in _RESULTS:
            raise ValueError("its result is none")
        if not isinstance(said["reason"], str) or not _TEXT.fullmatch(said["reason"]):
            raise ValueError("its reason is no line of text")
        if not isinstance(said["figures"], dict):
            raise ValueError("its figures are none")
    except (ValueError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else "it is not JSON"
        raise WashUnreachable(f"what the scrub wrote is no answer: {why}") from error
    return said


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _no_number(text: str) -> Any:
    raise ValueError("a number in it is none")


def _require_figures(figures: dict[str, Any]) -> None:
    if figures.keys() != {*_NUMBERS, *_TEXTS}:
        raise WashUnreachable("what the scrub wrote is no answer: its figures are not those of this version")
    for name in _NUMBERS:
        if type(figures[name]) is not int or not 0 <= figures[name] <= _LIMIT:
            raise WashUnreachable(f"what the scrub wrote is no answer: {name} is no count")
    for name in _TEXTS:
        if not isinstance(figures[name], str) or not _TEXT.fullmatch(figures[name]):
            raise WashUnreachable(f"what the scrub wrote is no answer: {name} is no line of text")


def _contradiction(figures: dict[str, Any], spec: SlotSpec, min_share: int) -> str | None:
    """Why these figures are not those of a scrub of this GPU that passed."""
    total, allocated = figures["bytes_total"], figures["bytes_allocated"]
    if figures["uuid"].lower() != spec.uuid.lower():
        return "it was another GPU"
    for name in _EACH_BYTE:
        if figures[name] != allocated:
            return f"{allocated} bytes were allocated, and {figures[name]} {name}"
    for name in _MISMATCHES:
        if figures[name]:
            return f"{figures[name]} words were {name}"
    if allocated > total or figures["bytes_reserved"] > total or figures["bytes_free"] > total:
        return "it found more memory than there is"
    if figures["nonzero_before"] * _WORD > allocated:
        return "it counted more words than it had"
    if total * 100 < (spec.memory_mb << 20) * _SAME_SIZE:
        return f"the GPU has {spec.memory_mb} MiB, and it saw {total >> 20}"
    if not figures["chunks"] or not figures["sampled"] or allocated * 1000 < total * min_share:
        return f"it reached only {allocated} of {total} bytes"
    if allocated * 1000 < figures["bytes_free"] * _OF_FREE:
        return f"it reached only {allocated} of {figures['bytes_free']} bytes that were free"
    return None
