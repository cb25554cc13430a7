"""What the scrub's program says is read strictly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.scrub_answer import MAX_ANSWER_BYTES, read_answer
from gpu_server.ports import Dirty, WashUnreachable
from gpu_server.sealed.wash import Step
from tests.fakes.gpu_wash import SIZE, scrub_figures

SPEC = SlotSpec(id="0", uuid="GPU-aa", name="NVIDIA L40S", memory_mb=SIZE >> 20, is_gpu=True)

WRITTEN = ("written", "compared", "inverted", "inverse_compared", "zeroed", "zero_compared")


def said(result: str = "passed", **changed: Any) -> bytes:
    figures = {**scrub_figures(SPEC.uuid), **changed}
    return json.dumps({"result": result, "reason": "", "figures": figures}).encode()


def test_a_pass_is_its_figures() -> None:
    """And they fit into a record."""
    figures = read_answer(said() + b"\n", SPEC)
    assert figures == scrub_figures("GPU-aa")
    Step(name="scrub", result="passed", started_ms=1, ended_ms=1, figures=figures)
    assert read_answer(said(uuid="GPU-AA"), SPEC)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"uuid": "GPU-bb"}, "another GPU"),
        ({"written": SIZE - 4}, "written"),
        ({"compared": 0}, "compared"),
        ({"inverted": SIZE - 1}, "inverted"),
        ({"inverse_compared": 0}, "inverse_compared"),
        ({"zeroed": SIZE + 4}, "zeroed"),
        ({"zero_compared": SIZE - 1}, "zero_compared"),
        ({"mismatched": 1}, "1 words were mismatched"),
        ({"inverse_mismatched": 3}, "3 words were inverse_mismatched"),
        ({"zero_mismatched": 7}, "7 words were zero_mismatched"),
        ({"bytes_total": SIZE - 1}, "more memory than there is"),
        ({"bytes_free": SIZE + 1}, "more memory than there is"),
        ({"bytes_reserved": SIZE + 1}, "more memory than there is"),
        ({"nonzero_before": SIZE // 4 + 1}, "more words"),
        ({"chunks": 0}, "reached only"),
        ({"sampled": 0}, "reached only"),
        ({"bytes_total": 2 * SIZE}, "reached only"),
    ],
)
def test_a_pass_that_does_not_add_up_is_dirty(changed: dict[str, Any], why: str) -> None:
    """Whatever the result says, the figures decide."""
    with pytest.raises(Dirty, match=why):
        read_answer(said(**changed), SPEC)


def test_the_share_is_the_service_s_to_say() -> None:
    """A program that asks for less does not pass."""
    less = said(**dict.fromkeys(("bytes_free", "bytes_allocated", *WRITTEN), SIZE * 95 // 100))
    assert read_answer(less, SPEC)
    with pytest.raises(Dirty, match="reached only"):
        read_answer(less, SPEC, min_share=960)


def test_what_was_free_was_taken() -> None:
    """A share of all is not enough, where the rest was there to be had."""
    enough = dict.fromkeys(("bytes_allocated", *WRITTEN), SIZE * 99 // 100 + 4)
    assert read_answer(said(**enough), SPEC)
    with pytest.raises(Dirty, match="bytes that were free"):
        read_answer(said(**dict.fromkeys(enough, SIZE * 98 // 100)), SPEC)


def test_the_gpu_is_as_large_as_the_inventory_says() -> None:
    """A scrub of a part of it, which the program takes for all, is none of it."""
    parts = ("bytes_total", "bytes_free", "bytes_allocated", *WRITTEN)
    with pytest.raises(Dirty, match="the GPU has 1024 MiB, and it saw 512"):
        read_answer(said(**dict.fromkeys(parts, SIZE // 2)), SPEC)


@pytest.mark.parametrize(
    ("result", "error"),
    [("failed", Dirty), ("unavailable", WashUnreachable), ("not_applicable", WashUnreachable)],
)
def test_other_results_pass_nothing(result: str, error: type[Exception]) -> None:
    """Also with the figures of a pass. A GPU that the program does not see is not a machine without one."""
    with pytest.raises(error, match="because"):
        read_answer(said(result).replace(b'"reason": ""', b'"reason": "because"'), SPEC)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"passed",
        b"\xff",
        b"[]",
        b'"passed"',
        b"[" * 8000,
        b'{"result": "passed"}',
        said("Passed"),
        said().replace(b'"passed"', b"true"),
        said().replace(b'"passed"', b'["passed"]'),
        said().replace(b'"reason": ""', b'"reason": 1'),
        said().replace(b'"reason": ""', b'"reason": "a\\nb"'),
        said().replace(b'"reason": ""', b'"reason": "", "more": 1'),
        said().replace(b'"reason": ""', b'"reason": "", "result": "passed"'),
        said().replace(b'"mismatched": 0', b'"mismatched": 1, "mismatched": 0'),
        said() + said(),
        said(mismatched=False),
        said(mismatched=0.0),
        said(mismatched=-1),
        said(mismatched="0"),
        said(mismatched=None),
        said(written=float("nan")),
        said(written=1 << 51),
        said(more=1),
        said(device="x" * 201),
        said(device="a\x1b[2J"),
        said(uuid=7),
        b'{"result": "passed", "reason": "", "figures": []}',
        said() + b" " * MAX_ANSWER_BYTES,
        said().replace(b'"mismatched": 0', b'"mismatched": ' + b"9" * 5000),
    ],
)
def test_what_is_no_answer_is_none(raw: bytes) -> None:
    """Nothing is known then, and the slot stays where it is."""
    with pytest.raises(WashUnreachable, match="no answer"):
        read_answer(raw, SPEC)


def test_a_figure_that_is_missing() -> None:
    """Each of them is required."""
    for name in scrub_figures("GPU-aa"):
        figures = scrub_figures("GPU-aa")
        del figures[name]
        raw = json.dumps({"result": "passed", "reason": "", "figures": figures}).encode()
        with pytest.raises(WashUnreachable, match="figures"):
            read_answer(raw, SPEC)
