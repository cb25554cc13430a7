"""Programs of the `exec` contract: which of their lines are events, and which are logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.exec_output import MAX_LINE_BYTES, MAX_LOG_LINE_BYTES, ExecOutput, Name, count_by_stream
from gpu_server.frames import encode
from gpu_server.ports import Output
from gpu_server.stream import Stream
from tests.app.reading import Event, all_events


async def run(*pieces: tuple[Name, bytes], skip: Mapping[Name, int] | None = None) -> list[Event]:
    """The events of a program that wrote these pieces."""
    stream = Stream(1 << 24)
    output = ExecOutput(stream, skip)
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
        '{"event": "logs", "line": "x"}',
        '{"event": "logs", "stream": "stderr", "line": "x"}',
        '{"event": "logs", "stream": "stdout", "line": "x", "stream": "stderr"}',
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
    for _ in range(2 * MAX_LINE_BYTES // 4096 + 4):
        output.feed(Output("stdout", b"x" * 4096))
        assert len(output._rest["stdout"]) <= MAX_LINE_BYTES
    assert stream.last_id >= 2 * MAX_LINE_BYTES // MAX_LOG_LINE_BYTES


@pytest.mark.parametrize("step", [1000, 4096, 1 << 20, 1 << 23])
async def test_a_line_that_is_too_long(step: int) -> None:
    """It is cut up in the same places whatever the pieces it comes in, and no part of it is an event."""
    event = b'{"event": "text", "text": "x"}'
    line = event.ljust(MAX_LINE_BYTES) + event.rjust(MAX_LINE_BYTES + 5) + event
    raw = line + b"\n" + event + b"\n"
    events = bare(await run(*(("stdout", raw[i : i + step]) for i in range(0, len(raw), step))))
    assert "".join(data["line"] for _, data in events[:-1]).encode() == line
    lengths = [len(data["line"]) for _, data in events[:-1]]
    assert lengths == [MAX_LOG_LINE_BYTES] * (2 * MAX_LINE_BYTES // MAX_LOG_LINE_BYTES) + [35]
    assert events[-1] == ("text", {"text": "x"})


async def test_the_longest_event() -> None:
    """A line of just the permitted length may be an event."""
    line = b'{"event": "text", "text": "x"}'.ljust(MAX_LINE_BYTES)
    assert bare(await run(("stdout", line + b"\n"))) == [("text", {"text": "x"})]


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


# -- reading again ------------------------------------------------------------------------------------------


def encoded(events: list[Event], *, notes: bool = False) -> bytes:
    """Events as a stream keeps them: numbered, with their data as they were written."""
    return b"".join(
        b"id: %d\n%b" % (event.number, encode(event.name, event.data))
        for event in events
        if event.number is not None and (notes or event.name != "progress")
    )


LINES = (
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8)
    | st.sampled_from(
        [
            '"stream":"stderr"',
            '{"stream":"stderr","line":"x"}',
            'event: logs\\ndata: {"stream":"stderr",',
            "event: progress",
            "x" * (MAX_LOG_LINE_BYTES + 1),
            '{"event": "progress", "stage": "s", "done": 1}',
            '{"event": "logs", "stream": "stderr", "line": "x"}',
            '{"event": "logs", "line": "{\\"stream\\":\\"stderr\\"", "stream": "stdout"}',
        ]
    )
    | st.builds(lambda text: json.dumps({"event": "text", "text": text}), st.text(max_size=5))
)


@st.composite
def programs(draw: st.DrawFn) -> dict[Name, bytes]:
    """What a program writes to each of its streams."""
    lines = st.lists(LINES, max_size=6)
    return {"stdout": "\n".join(draw(lines)).encode(), "stderr": "\n".join(draw(lines)).encode()}


def interleaved(data: st.DataObject, program: dict[Name, bytes]) -> list[tuple[Name, bytes]]:
    """A program's output in pieces, as they may be read."""
    left, pieces = dict(program), list[tuple[Name, bytes]]()
    for _ in range(data.draw(st.integers(0, 8))):
        name: Name = data.draw(st.sampled_from(["stdout", "stderr"]))
        length = data.draw(st.integers(0, len(left[name])))
        pieces.append((name, left[name][:length]))
        left[name] = left[name][length:]
    return [*pieces, *left.items()]


@given(programs(), st.data())
async def test_going_on(program: dict[Name, bytes], data: st.DataObject) -> None:
    """However much was kept of what came before, and however the streams are mixed when they are read again,
    every event comes exactly once."""
    whole = [event for event in await run(*interleaved(data, program)) if event.name != "progress"]
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    behind = await run(*interleaved(data, program), skip=count_by_stream(encoded(kept)))
    for name in ("stdout", "stderr"):
        alone = [event for event in await run((name, program[name])) if event.name != "progress"]
        assert bare([event for event in kept + behind if came_from(event) == name]) == bare(alone)
    assert [event.number for event in behind if event.name != "progress"] == [
        *range(1, len(whole) - len(kept) + 1)
    ]


def came_from(event: Event) -> str | None:
    if event.name == "progress":
        return None
    return "stderr" if event.name == "logs" and event.data["stream"] == "stderr" else "stdout"


@given(programs(), st.data())
async def test_counting(program: dict[Name, bytes], data: st.DataObject) -> None:
    """The numbered events of each stream are counted by their own fields, whatever their texts say."""
    events = await run(*interleaved(data, program))
    counted = count_by_stream(encoded(events, notes=True))
    assert counted == {
        name: sum(came_from(event) == name for event in events) for name in ("stdout", "stderr")
    }


async def test_nothing_to_count() -> None:
    """A program that has said nothing is read from its beginning."""
    assert count_by_stream(b"") == {"stdout": 0, "stderr": 0}


async def test_progress_that_was_seen() -> None:
    """What is skipped is skipped with its `progress`; what comes behind it tells of its own."""

    def progress(done: int) -> bytes:
        return b'{"event":"progress","stage":"s","done":%d}\n' % done

    seen: list[Any] = []
    stream = Stream(1 << 20)
    stream.note = lambda event, data: seen.append(data["done"])
    output = ExecOutput(stream, {"stdout": 2})
    output.feed(Output("stdout", progress(0) + b"a\n" + progress(1) + b"b\n" + progress(2) + b"c\n"))
    assert (seen, stream.last_id) == ([2], 1)


async def test_skipping_ends_within_a_line() -> None:
    """Of a line that was cut up only the pieces that are missing are given out again."""
    line = b"a" * MAX_LOG_LINE_BYTES + b"b" * MAX_LOG_LINE_BYTES + b"c\n"
    assert bare(await run(("stderr", line), skip={"stderr": 2})) == logs("c", stream="stderr")
