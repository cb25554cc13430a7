"""Records of washes: one encoding of each, and what cannot be one is neither written nor read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_server.sealed import canonical
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.wash_record import (
    LAST_MS,
    MAX_FIGURES,
    MAX_RECORD_BYTES,
    RESULTS,
    STEPS,
    TIERS,
    Record,
    Step,
    encode_record,
    hash_of,
    read_record,
)
from tests.sealed.washes import GPU, MADE, NODE_KEY, record, steps

RAW = encode_record(record())
VALUES = canonical.decode(RAW)

NAMES = st.text("abcXYZ019._:/-", min_size=1, max_size=20)
FIGURES = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True),
    st.integers(0, 2**64 - 1)
    | st.binary(max_size=40)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    max_size=6,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record that there can be."""
    made = draw(st.integers(1, LAST_MS))
    found = []
    for name in STEPS:
        ended = draw(st.integers(1, made))
        started = draw(st.integers(1, ended))
        result = draw(st.sampled_from(RESULTS))
        figures = draw(FIGURES)
        found.append(Step(name=name, result=result, started_ms=started, ended_ms=ended, figures=figures))
    return Record(
        node_key=draw(st.binary(min_size=32, max_size=32)),
        slot_id=draw(NAMES),
        slot_uuid=draw(NAMES),
        fence=draw(st.integers(0, 2**64 - 1)),
        prev=draw(st.binary(min_size=32, max_size=32)),
        made_ms=made,
        tier=draw(st.sampled_from(TIERS)),
        lease=draw(st.just(b"") | st.binary(min_size=32, max_size=32)),
        steps=tuple(found),
    )


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(made=records())
def test_round_trip(made: Record) -> None:
    """What is written is read again, and has that one encoding."""
    raw = encode_record(made)
    assert read_record(raw) == made
    assert encode_record(read_record(raw)) == raw


def test_the_form() -> None:
    """The bytes are those that the documents describe, put together here by hand."""
    figures = [["bytes_seen", 1 << 40], ["device", "NVIDIA L40S"], ["digest", b"\1\2"]]
    listed = [
        [name, "passed", MADE - 20 + 2 * place, MADE - 10 + 2 * place, figures]
        for place, name in enumerate(("teardown", "residue", "scrub", "enclave", "gates"))
    ]
    head = ["gpu-server/1", "wash", NODE_KEY, "0", GPU, 7, bytes(32), MADE]
    assert canonical.encode([*head, ["full", b"m" * 32, listed]]) == RAW  # type: ignore[list-item]
    assert hash_of(b"abc").hex().startswith("ba7816bf")


def test_figures_have_one_order() -> None:
    """However figures were gathered, the record is the same; and nobody changes them afterwards."""
    one, other = (
        replace(steps()[0], figures=figures) for figures in ({"b": 1, "a": b"x"}, {"a": b"x", "b": 1})
    )
    rest = steps()[1:]
    assert encode_record(record(steps=(one, *rest))) == encode_record(record(steps=(other, *rest)))
    with pytest.raises(TypeError):
        one.figures["c"] = 1  # type: ignore[index]


def test_results_by_name() -> None:
    """A step's result is found by its name."""
    assert record(scrub="skipped").result("scrub") == "skipped"
    with pytest.raises(KeyError):
        record().result("polish")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("node_key", bytes(31)),
        ("node_key", "k" * 32),
        ("slot_id", ""),
        ("slot_id", "a b"),
        ("slot_id", "x" * 129),
        ("slot_uuid", "GPU\n"),
        ("slot_uuid", 5),
        ("fence", -1),
        ("fence", 1 << 64),
        ("fence", True),
        ("fence", 1.0),
        ("prev", b""),
        ("prev", bytes(33)),
        ("made_ms", 0),
        ("made_ms", LAST_MS + 1),
        ("made_ms", MADE - 100),
        ("tier", "FULL"),
        ("lease", bytes(31)),
        ("lease", None),
        ("steps", ()),
        ("steps", steps()[:4]),
        ("steps", steps()[::-1]),
        ("steps", (*steps(), steps()[4])),
    ],
)
def test_a_record_checks_itself(name: str, value: Any) -> None:
    """A value that no record has cannot be put into one."""
    with pytest.raises(Malformed):
        record(**{"steps": steps(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "polish"),
        ("result", "ok"),
        ("started_ms", 0),
        ("started_ms", 1.5),
        ("ended_ms", MADE - 30),
        ("ended_ms", LAST_MS + 1),
        ("figures", {"Bytes": 1}),
        ("figures", {"": 1}),
        ("figures", {5: 1}),
        ("figures", {"a" * 65: 1}),
        ("figures", {"a": -1}),
        ("figures", {"a": 1 << 64}),
        ("figures", {"a": True}),
        ("figures", {"a": 0.5}),
        ("figures", {"a": None}),
        ("figures", {"a": [1]}),
        ("figures", {"a": "ü"}),
        ("figures", {"a": "line\n"}),
        ("figures", {"a": "\x1b[2J"}),
        ("figures", {"a": "x" * 257}),
        ("figures", {"a": bytes(257)}),
        ("figures", {f"a{n}": n for n in range(MAX_FIGURES + 1)}),
    ],
)
def test_a_step_checks_itself(name: str, value: Any) -> None:
    """A value that no step has cannot be put into one."""
    plain: dict[str, Any] = {
        "name": "scrub",
        "result": "passed",
        "started_ms": MADE - 20,
        "ended_ms": MADE - 10,
    }
    with pytest.raises(Malformed):
        Step(**{**plain, name: value})


def test_a_record_has_a_size() -> None:
    """More than 8 KiB are neither written nor read."""
    full = {f"a{n:02}": "x" * 256 for n in range(MAX_FIGURES)}
    large = record(steps=(replace(steps()[0], figures=full), *steps()[1:]))
    with pytest.raises(Malformed, match="at most 8192 bytes"):
        encode_record(large)
    few = {name: full[name] for name in list(full)[:25]}
    raw = encode_record(record(steps=(replace(steps()[0], figures=few), *steps()[1:])))
    assert len(raw) <= MAX_RECORD_BYTES
    assert read_record(raw).steps[0].figures == few
    with pytest.raises(Malformed, match="more than 8192 bytes"):
        read_record(bytes(MAX_RECORD_BYTES + 1))


def changed(place: int, value: Any) -> bytes:
    return canonical.encode([value if index == place else old for index, old in enumerate(VALUES)])


def with_step(*values: Any) -> bytes:
    tier, lease, found = VALUES[8]  # type: ignore[misc]
    return changed(8, [tier, lease, [list(values), *found[1:]]])  # type: ignore[index, misc]


FIRST = ("teardown", "passed", MADE - 20, MADE - 10)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80",
        RAW + b"\0",
        RAW[:-1],
        b"\x98\x09" + RAW[1:],  # a head longer than needed
        b"\x9f" + RAW[1:] + b"\xff",  # an indefinite length
        canonical.encode(VALUES[:8]),
        canonical.encode([*VALUES, 0]),
        changed(0, "gpu-server/2"),
        changed(1, "grant"),
        changed(2, "k" * 32),
        changed(3, b"0"),
        changed(5, "7"),
        changed(6, 0),
        changed(7, b""),
        changed(8, []),
        changed(8, ["full", b"m" * 32]),
        changed(8, ["full", b"m" * 32, []]),
        changed(8, ["full", b"m" * 32, "steps"]),
        changed(8, [*VALUES[8], 0]),  # type: ignore[misc]
        with_step(),
        with_step(*FIRST),
        with_step(*FIRST, 0),
        with_step(*FIRST, [], []),
        with_step(*FIRST, [["a"]]),
        with_step(*FIRST, [["a", 1, 2]]),
        with_step(*FIRST, ["a", 1]),
        with_step(*FIRST, [[1, 1]]),
        with_step(*FIRST, [["a", []]]),
        with_step(*FIRST, [["b", 1], ["a", 1]]),
        with_step(*FIRST, [["a", 1], ["a", 1]]),
        with_step("teardown", 1, MADE - 20, MADE - 10, []),
        with_step("teardown", "passed", "1", MADE - 10, []),
    ],
)
def test_what_is_no_record(raw: bytes) -> None:
    """Other bytes are refused, each by the one error."""
    with pytest.raises(Malformed):
        read_record(raw)
    assert read_record(with_step(*FIRST, [["a", 1], ["b", 1]])).steps[0].figures == {"a": 1, "b": 1}


def test_another_byte_is_another_record() -> None:
    """A byte that is changed anywhere makes no record, or another one."""
    for at in range(len(RAW)):
        other = RAW[:at] + bytes([RAW[at] ^ 1 << at % 8]) + RAW[at + 1 :]
        try:
            assert read_record(other) != record()
        except Malformed:
            continue
