import base64
import json

import pytest
from gpu_worker import frames
from hypothesis import given
from hypothesis import strategies as st


@given(st.text())
def test_any_text_is_three_lines(text: str) -> None:
    """Whatever the text holds, its frame is an event line, one data line and an empty line."""
    event, data, *rest = frames.text_delta(text).split(b"\n")
    assert event == b"event: text_delta"
    assert rest == [b"", b""]
    assert b"\r" not in data
    assert json.loads(data.removeprefix(b"data: "))["delta"] == text


def test_text_is_not_escaped_to_ascii() -> None:
    """Text goes out as UTF-8."""
    assert "Größe".encode() in frames.text("Größe")


def test_lone_surrogates_do_not_fail() -> None:
    """What Python's text can hold and UTF-8 cannot becomes a question mark."""
    assert b'{"delta":"a?b"}' in frames.text_delta("a\udc80b")


def test_every_event_has_the_contracts_shape() -> None:
    """Names and data are those of the contract's table."""
    made = {
        frames.text("a"): ("text", {"text": "a"}),
        frames.logs("stderr", "a"): ("logs", {"stream": "stderr", "line": "a"}),
        frames.artifact("n", "m/t", b"\xff"): (
            "artifact",
            {"name": "n", "media_type": "m/t", "data": base64.b64encode(b"\xff").decode()},
        ),
        frames.progress("s", 1, None): ("progress", {"stage": "s", "done": 1, "total": None}),
        frames.error("c", "m"): ("error", {"code": "c", "message": "m"}),
        frames.end("failed", ("c", "m"), {"n": 1}): (
            "end",
            {"status": "failed", "error": {"code": "c", "message": "m"}, "usage": {"n": 1}},
        ),
    }
    for frame, (event, data) in made.items():
        first, second = frame.decode().split("\n")[:2]
        assert first == f"event: {event}"
        assert json.loads(second.removeprefix("data: ")) == data


def test_wrong_types_are_refused() -> None:
    """A host is never sent data of another type than the contract's."""
    with pytest.raises(TypeError):
        frames.text_delta(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        frames.progress("s", True, None)
    with pytest.raises(ValueError, match="stream"):
        frames.logs("stdin", "a")
    with pytest.raises(ValueError, match="JSON"):
        frames.end("completed", usage={"n": float("nan")})


def test_a_frame_may_be_one_mebibyte() -> None:
    """The bound includes the id line, and what is beyond it raises an error that says what to do."""
    frames.text_delta("a" * (frames.MAX_FRAME - 100))
    with pytest.raises(ValueError, match="1 MiB: split it"):
        frames.text_delta("a" * frames.MAX_FRAME)
