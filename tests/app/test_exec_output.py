"""Programs of the `exec` contract: which of their lines are events, and which are logs."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.exec_output import MAX_LOG_LINE_BYTES, ExecOutput
from gpu_server.frames import MAX_FRAME_BYTES
from gpu_server.ports import Output
from gpu_server.stream import Stream
from tests.app.reading import Event, all_events


async def run(*pieces: tuple[Literal["stdout", "stderr"], bytes]) -> list[Event]:
    """The events of a program that wrote these pieces."""
    stream = Stream(1 << 24)
    output = ExecOutput(stream)
    for name, data in pieces:
        output.feed(Output(name, data))
    output.close()
    stream.publish("task_finish", {})
    return (await all_events(stream))[:-1]


def logs(*lines: str, stream: str = "stdout") -> list[tuple[str, Any]]:
    return [("logs", {"stream": stream, "line": line}) for line in lines]


def bare(events: list[Event]) -> list[tuple[str, Any]]:
    return [(event.name, event.data) for event in events]


async def test_events_and_logs() -> None:
    """A line that is an event becomes it, its other keys being the data; every other line is a log line."""
    events = await run(("stdout", b'hello\n{"event": "text_delta", "delta": "x", "n": 1}\nbye\r\n'))
    assert bare(events) == [*logs("hello"), ("text_delta", {"delta": "x", "n": 1}), *logs("bye")]
    assert [event.number for event in events] == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "end", "status": "completed"}',
        '{"event": "task_finish", "status": "completed"}',
        '{"event": "connection"}',
        '{"event": "text_delta"}',
        '{"event": "text_delta", "delta": 1}',
        '{"event": ["text"], "text": "x"}',
        '{"event": null}',
        '{"delta": "x"}',
        '{"event": "text_delta", "delta": ',
        ' {"event": "text_delta", "delta": "x"}',
        '["event"]',
        "",
    ],
)
async def test_no_events(line: str) -> None:
    """A line that is not quite an event, or one that only the service may send, is a log line."""
    assert bare(await run(("stdout", line.encode() + b"\n"))) == logs(line)


async def test_stderr_is_logs() -> None:
    """What comes on stderr is never an event."""
    line = '{"event": "text_delta", "delta": "x"}'
    assert bare(await run(("stderr", line.encode() + b"\n"))) == logs(line, stream="stderr")


async def test_too_deep() -> None:
    """An event that could be read and not written is a log line, not a crash."""
    line = '{"event":"text","text":"","deep":' + "[" * 300 + "]" * 300 + "}"
    assert bare(await run(("stdout", line.encode()))) == logs(line)


async def test_not_utf8() -> None:
    """Bytes that are no UTF-8 are replaced."""
    assert bare(await run(("stdout", b"a\xffb\n"))) == logs("a\ufffdb")


async def test_last_line_without_end() -> None:
    """What has no line end when the program ends is a line too."""
    assert bare(await run(("stdout", b"a\nb"), ("stderr", b"c"))) == [
        *logs("a", "b"),
        *logs("c", stream="stderr"),
    ]


async def test_streams_do_not_mix() -> None:
    """Halves of lines on the two outputs are put together for each."""
    events = await run(("stdout", b"one "), ("stderr", b"1 "), ("stdout", b"two\n"), ("stderr", b"2\n"))
    assert bare(events) == [*logs("one two"), *logs("1 2", stream="stderr")]


async def test_long_lines_are_cut() -> None:
    """A long line becomes several log lines, in order and whole."""
    line = b"".join(b"%07d " % n for n in range(0, 3 * MAX_LOG_LINE_BYTES, 8))
    events = await run(("stdout", line + b"\n"))
    assert len(events) == 3
    assert "".join(event.data["line"] for event in events).encode() == line


async def test_endless_line() -> None:
    """A line that never ends is given out when it is longer than a frame, so that memory is bounded."""
    stream = Stream(1 << 24)
    output = ExecOutput(stream)
    for _ in range(2 * MAX_FRAME_BYTES // 4096 + 4):
        output.feed(Output("stdout", b"x" * 4096))
        assert len(output._rest["stdout"]) <= MAX_FRAME_BYTES
    assert stream.last_id >= 2 * MAX_FRAME_BYTES // MAX_LOG_LINE_BYTES


async def test_progress_keeps_its_place() -> None:
    """`progress` has no number and goes out between the events around it."""
    stream = Stream(1 << 20)
    seen: list[tuple[str, Any]] = []
    stream.note = lambda event, data: seen.append((event, data))
    relay = stream.relay
    stream.relay = lambda bodies: (seen.append(("relay", len(bodies))), relay(bodies))[1]
    ExecOutput(stream).feed(Output("stdout", b'a\nb\n{"event":"progress","stage":"s","done":1}\nc\n'))
    assert seen == [("relay", 2), ("progress", {"stage": "s", "done": 1}), ("relay", 1)]


@given(st.data())
async def test_pieces_do_not_matter(data: Any) -> None:
    """The same output in other pieces gives the same events."""
    lines = data.draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12)
            | st.builds(lambda text: json.dumps({"event": "text", "text": text}), st.text(max_size=5)),
            max_size=8,
        )
    )
    raw = "\n".join(lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    whole, cut = await run(("stdout", raw)), await run(*(("stdout", piece) for piece in pieces))
    assert whole == cut
