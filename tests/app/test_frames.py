"""What a worker may send, and that nothing else gets through or gets out."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server import frames
from gpu_server.core.errors import Failure
from gpu_server.core.sessions import TaskState
from gpu_server.frames import MAX_FRAME_BYTES, FrameReader, ProtocolFault, encode


class Sink:
    """Keeps what a reader passes on, as (number or None, event, data), numbered as a stream would."""

    def __init__(self) -> None:
        self.events: list[tuple[int | None, str, Any]] = []
        self.numbered = 0

    def relay(self, bodies: list[bytes]) -> None:
        for body in bodies:
            assert body.endswith(b"\n\n")
            event, data = body[:-2].split(b"\n")
            self.numbered += 1
            name = event.removeprefix(b"event: ").decode()
            self.events.append((self.numbered, name, json.loads(data.removeprefix(b"data: "))))

    def note(self, event: str, data: Any) -> None:
        encode(event, data)
        self.events.append((None, event, data))

    def miss(self, count: int) -> None:
        self.events.append((None, "missed", count))
        self.numbered += count


def frame(number: int | None, event: str, data: Any) -> bytes:
    head = b"" if number is None else b"id: %d\n" % number
    return head + encode(event, data)


def delta(number: int, text: str = "x") -> bytes:
    return frame(number, "text_delta", {"delta": text})


def end(number: int, **data: Any) -> bytes:
    return frame(number, "end", {"status": "completed", **data})


def read(*chunks: bytes) -> tuple[FrameReader, Sink]:
    sink = Sink()
    reader = FrameReader(sink)
    for chunk in chunks:
        reader.feed(chunk)
    return reader, sink


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBER = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
EVENTS = st.one_of(
    st.tuples(st.just("text_delta"), st.fixed_dictionaries({"delta": TEXT}, optional={"extra": NUMBER})),
    st.tuples(st.just("text"), st.fixed_dictionaries({"text": TEXT})),
    st.tuples(
        st.just("logs"),
        st.fixed_dictionaries({"stream": st.sampled_from(["stdout", "stderr"]), "line": TEXT}),
    ),
    st.tuples(st.just("artifact"), st.fixed_dictionaries({"name": TEXT, "media_type": TEXT, "data": TEXT})),
    st.tuples(
        st.just("progress"),
        st.fixed_dictionaries({"stage": TEXT, "done": NUMBER}, optional={"total": NUMBER | st.none()}),
    ),
    st.tuples(st.just("error"), st.fixed_dictionaries({"code": TEXT, "message": TEXT})),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[tuple[int | None, str, Any]], bytes]:
    """A valid worker stream: its events, and its bytes."""
    events: list[tuple[int | None, str, Any]] = []
    raw, number = b"", 0
    for name, data in draw(st.lists(EVENTS, max_size=8)):
        if name != "progress":
            number += 1
        own = None if name == "progress" else number
        events.append((own, name, data))
        raw += frame(own, name, data)
    if draw(st.booleans()):
        raw += end(number + 1, usage={"n": number})
    return events, raw


def pieces_of(data: st.DataObject, raw: bytes) -> list[bytes]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


@given(streams(), st.data())
def test_pieces_do_not_matter(stream: tuple[list[tuple[int | None, str, Any]], bytes], data: Any) -> None:
    """A valid stream gives its events, whatever the pieces it comes in."""
    events, raw = stream
    reader, sink = read(*pieces_of(data, raw))
    assert sink.events == events
    assert (reader.end is not None) is raw.endswith(end(reader.seq, usage={"n": reader.seq - 1}))


@given(streams(), st.data())
def test_byte_by_byte(stream: tuple[list[tuple[int | None, str, Any]], bytes], data: Any) -> None:
    """A stream that trickles in byte by byte gives the same events."""
    events, raw = stream
    _, sink = read(*(bytes([byte]) for byte in raw))
    assert sink.events == events


@given(streams(), st.data())
def test_mutations(stream: tuple[list[tuple[int | None, str, Any]], bytes], data: Any) -> None:
    """Bytes that were tampered with give valid events or `ProtocolFault`, never anything else."""
    raw = bytearray(stream[1])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw)))
        raw[place : place + data.draw(st.integers(0, 6))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"\n\n", b"\n", b"id: 2\n", b"}", b"data: {}\n\n", b'"'])
        )
    sink = Sink()
    reader = FrameReader(sink)
    try:
        for piece in pieces_of(data, bytes(raw)):
            reader.feed(piece)
    except ProtocolFault:
        pass
    for number, name, value in sink.events:
        assert frames.WORKER_EVENTS[name](value)
        assert (number is None) is (name == "progress")
    assert reader.seq == sink.numbered + (reader.end is not None)


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_noise(chunks: list[bytes]) -> None:
    """Arbitrary bytes give `ProtocolFault` or nothing."""
    sink = Sink()
    reader = FrameReader(sink)
    try:
        for chunk in chunks:
            reader.feed(chunk)
    except ProtocolFault:
        pass
    assert sink.events == []


def test_what_came_before_a_fault_is_passed_on() -> None:
    """The events before a fault in the same piece reach the sink, and are counted."""
    sink = Sink()
    reader = FrameReader(sink)
    with pytest.raises(ProtocolFault, match="no frame"):
        reader.feed(delta(1, "a") + delta(2, "b") + b"garbage\n\n")
    assert [data["delta"] for _, _, data in sink.events] == ["a", "b"]
    assert reader.seq == 2


class CountingPattern:
    """The frame pattern, counting how many bytes it was asked to look at."""

    def __init__(self) -> None:
        self.pattern, self.bytes = frames._FRAME, 0

    def match(self, buffer: bytes, position: int) -> Any:
        self.bytes += len(buffer) - position
        return self.pattern.match(buffer, position)


def test_trickling_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that trickles in is looked at a bounded number of times, not once for each byte."""
    counting = CountingPattern()
    monkeypatch.setattr(frames, "_FRAME", counting)
    raw = delta(1, "x" * 20_000)
    _, sink = read(*(raw[i : i + 1] for i in range(len(raw))))
    assert len(sink.events) == 1
    assert counting.bytes < 4 * len(raw)


@pytest.mark.timeout(60)
def test_many_braces_are_linear() -> None:
    """Data made to send a pattern back and forth is decided in one go."""
    with pytest.raises(ProtocolFault):
        read(b'id: 1\nevent: text\ndata: {"text":"' + b"}" * 900_000 + b"\n\n")


@pytest.mark.parametrize(
    ("event", "good"),
    [
        ("text_delta", {"delta": "x"}),
        ("text", {"text": "x"}),
        ("logs", {"stream": "stdout", "line": "x"}),
        ("artifact", {"name": "n", "media_type": "m", "data": "eA=="}),
        ("progress", {"stage": "s", "done": 1, "total": 2.5}),
        ("error", {"code": "c", "message": "m"}),
        ("end", {"status": "failed", "error": {"code": "c", "message": "m"}, "usage": {"n": 1}}),
    ],
)
def test_fields(event: str, good: dict[str, Any]) -> None:
    """Each field of each event is needed where the contract says so, and of its type."""
    number = None if event == "progress" else 1
    read(frame(number, event, good))
    for name in good:
        optional = (event, name) in {("progress", "total"), ("end", "error"), ("end", "usage")}
        without = {other: value for other, value in good.items() if other != name}
        if optional:
            read(frame(number, event, without))
        else:
            with pytest.raises(ProtocolFault, match="lacks a field"):
                read(frame(number, event, without))
        for wrong in ([1], {"x": 1}, True, "wrong" if not isinstance(good[name], str) else 1):
            if event == "end" and name == "usage" and isinstance(wrong, dict):
                continue
            with pytest.raises(ProtocolFault, match="wrong type"):
                read(frame(number, event, {**good, name: wrong}))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (frame(1, "connection", {}), "may not emit"),
        (frame(1, "task_finish", {"status": "completed"}), "may not emit"),
        (frame(None, "text", {"text": "x"}), "has an id"),
        (frame(1, "progress", {"stage": "s", "done": 1}), "has an id"),
        (delta(2), "came after 0"),
        (delta(1) + delta(1), "came after 1"),
        (delta(1) + delta(3), "came after 1"),
        (b"id: 0\n" + encode("text", {"text": ""}), "no frame"),
        (b"id: 01\n" + encode("text", {"text": ""}), "no frame"),
        (b"id: 1\nevent: text\ndata: {\n\n", "no frame"),
        (b"id: 1\nevent: text\ndata: {,}\n\n", "not JSON"),
        (b'id: 1\nevent: text\ndata: {"text": "\xff"}\n\n', "not JSON"),
        (b'id: 1\nevent: text\ndata: {"text": NaN}\n\n', "not JSON"),
        (b"id: 1\nevent: text\ndata: []\n\n", "no frame"),
        (b'id: 1\r\nevent: text\r\ndata: {"text":""}\r\n\n\n', "no frame"),
        (b": comment\n\n", "no frame"),
        (b"id: 1\nevent: text\ndata: {}\nretry: 1\n\n", "no frame"),
        (b"event: text\nid: 1\ndata: {}\n\n", "no frame"),
        (b"\n\n", "no frame"),
    ],
)
def test_faults(raw: bytes, why: str) -> None:
    """Whatever the contract does not allow is a fault that says what it was."""
    with pytest.raises(ProtocolFault, match=why):
        read(raw)


@pytest.mark.parametrize("event", ["progress", "end"])
def test_depth(event: str) -> None:
    """Data that we could read and not write again is a fault, not a crash."""
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    good = {"progress": {"stage": "s", "done": 1}, "end": {"status": "completed", "usage": {}}}[event]
    head = b"" if event == "progress" else b"id: 1\n"
    raw = json.dumps({**good, "extra": deep}).encode()
    with pytest.raises(ProtocolFault, match="too deep"):
        read(head + b"event: %b\ndata: %b\n\n" % (event.encode(), raw))


def test_end() -> None:
    """`end` is kept for the task's end and not passed on."""
    reader, sink = read(delta(1), end(2, usage={"tokens": 3}))
    assert reader.end == (TaskState.COMPLETED, None, {"tokens": 3})
    assert len(sink.events) == 1
    assert reader.seq == 2


@pytest.mark.parametrize(
    ("data", "state", "failure"),
    [
        ({"status": "completed"}, TaskState.COMPLETED, None),
        ({"status": "completed", "error": {"code": "c", "message": "m"}}, TaskState.COMPLETED, None),
        ({"status": "failed", "error": {"code": "c_1", "message": "m"}}, TaskState.FAILED, ("c_1", "m")),
        ({"status": "cancelled", "error": {"code": "c", "message": ""}}, TaskState.CANCELLED, ("c", "")),
        ({"status": "failed"}, TaskState.FAILED, ("task_failed", "the worker ended the task as failed")),
        (
            {"status": "cancelled"},
            TaskState.CANCELLED,
            ("task_cancelled", "the worker ended the task as cancelled"),
        ),
    ],
)
def test_end_states(data: dict[str, Any], state: TaskState, failure: tuple[str, str] | None) -> None:
    """A task that ended badly always has a reason, the worker's own, which says so, or ours."""
    reader, _ = read(frame(1, "end", data))
    expected = None
    if failure is not None:
        expected = Failure(code=failure[0], message=failure[1], from_worker="error" in data)
    assert reader.end == (state, expected, None)


@pytest.mark.parametrize("code", ["c", "no_voice_2", "a" * 64])
def test_a_code_is_kept(code: str) -> None:
    """A worker's own code is the task's."""
    reader, _ = read(frame(1, "end", {"status": "failed", "error": {"code": code, "message": "m"}}))
    assert reader.end is not None
    assert reader.end[1] == Failure(code=code, message="m", from_worker=True)


@pytest.mark.parametrize("code", ["", "C", "1", "_a", "a-b", "a b", "a\n", "ä", "a" * 65, "my secret is 5"])
def test_words_are_no_code(code: str) -> None:
    """What a worker writes in the place of a code, and is none, goes no further."""
    reader, _ = read(frame(1, "end", {"status": "failed", "error": {"code": code, "message": "m"}}))
    assert reader.end is not None
    assert reader.end[1] == Failure(code="task_failed", message="m", from_worker=True)


@pytest.mark.parametrize("after", [delta(2), end(2), frame(None, "progress", {"stage": "s", "done": 1})])
@pytest.mark.parametrize("together", [True, False])
def test_nothing_comes_after_end(after: bytes, together: bool) -> None:
    """An event after `end` is a fault, in the same piece or in the next."""
    chunks = [end(1) + after] if together else [end(1), after]
    with pytest.raises(ProtocolFault, match="after `end`"):
        read(*chunks)


def sized(length: int) -> bytes:
    empty = len(delta(1, ""))
    return delta(1, "x" * (length - empty))


@pytest.mark.parametrize("step", [1 << 16, 1 << 21])
def test_size(step: int) -> None:
    """A frame of 1 MiB is taken and one byte more is not, in pieces or in one."""
    for length, taken in ((MAX_FRAME_BYTES, True), (MAX_FRAME_BYTES + 1, False)):
        raw = sized(length)
        chunks = [raw[i : i + step] for i in range(0, len(raw), step)]
        if taken:
            assert len(read(*chunks)[1].events) == 1
        else:
            with pytest.raises(ProtocolFault, match="longer"):
                read(*chunks)


def test_endless_frame() -> None:
    """A frame that never ends is refused before it has filled the memory."""
    reader, _ = read(*[b"x" * 4096] * (MAX_FRAME_BYTES // 4096))
    with pytest.raises(ProtocolFault, match="longer"):
        reader.feed(b"x")


def test_reconnected() -> None:
    """A new connection starts at the beginning of the event after the last one taken."""
    whole = delta(2, "whole")
    reader, sink = read(delta(1) + whole[:-10])
    reader.reconnected()
    reader.feed(whole)
    assert [data["delta"] for _, _, data in sink.events] == ["x", "whole"]


def test_beginning_in_the_middle() -> None:
    """A reader that begins behind event n takes event n + 1 first, and no other."""
    sink = Sink()
    reader = FrameReader(sink, 41)
    reader.feed(delta(42, "next"))
    assert [data["delta"] for _, _, data in sink.events] == ["next"]
    assert reader.seq == 42
    for number in (1, 41, 43):
        with pytest.raises(ProtocolFault, match="came after 41"):
            FrameReader(sink, 41).feed(delta(number))


def test_skipping() -> None:
    """Events that the worker has dropped are told as missed, once, and the next is the one behind them."""
    reader, sink = read(delta(1), delta(2))
    reader.skip_to(7)
    assert reader.seq == 7
    reader.feed(delta(8, "behind"))
    assert [event[1:] for event in sink.events[2:]] == [("missed", 5), ("text_delta", {"delta": "behind"})]
    assert sink.numbered == 8
    for seq in (8, 3):
        with pytest.raises(ValueError, match="not ahead"):
            reader.skip_to(seq)
    assert reader.seq == 8


def test_encode() -> None:
    """What the service encodes itself is a frame by its own grammar."""
    raw = encode("error", {"code": "c", "message": "a\nb\r\nc\u2028"})
    assert frames._FRAME.fullmatch(raw) is not None
    assert orjson.loads(raw.split(b"data: ")[1]) == {"code": "c", "message": "a\nb\r\nc\u2028"}


def test_an_end_may_say_only_so_much() -> None:
    """What a task used is kept with its history, so it is bounded more narrowly than a frame."""
    sink = read()[1]
    reader = FrameReader(sink)
    with pytest.raises(ProtocolFault, match="longer than"):
        reader.feed(frame(1, "end", {"status": "completed", "usage": {"x": "y" * 20_000}}))
    assert reader.end is None


# -- sealed sessions --------------------------------------------------------------------------------------

CHUNK = "AQID"


def said(number: int | None, event: str, **data: Any) -> bytes:
    return frame(number, event, data)


def sealed_reader(*chunks: bytes) -> tuple[FrameReader, Sink]:
    """What a reader of a sealed session makes of these bytes."""
    sink = Sink()
    reader = FrameReader(sink, sealed=True)
    for chunk in chunks:
        reader.feed(chunk)
    return reader, sink


def test_sealed_events() -> None:
    """A sealed session's worker says base64, and how the task ended."""
    raw = said(1, "sealed", data=CHUNK) + said(2, "sealed", data="AQ==") + end(3)
    reader, sink = sealed_reader(raw)
    assert [(number, name) for number, name, _ in sink.events] == [(1, "sealed"), (2, "sealed")]
    assert reader.end == (TaskState.COMPLETED, None, None)


@pytest.mark.parametrize(
    "raw",
    [
        said(1, "text_delta", delta="a word"),
        said(1, "text", text="a word"),
        said(1, "logs", stream="stdout", line="a word"),
        said(1, "artifact", name="a word", media_type="", data=""),
        said(1, "error", code="a_word", message="a word"),
        said(None, "progress", stage="a word", done=1, total=None),
        said(None, "sealed", data=CHUNK),
        said(1, "sealed", data=""),
        said(1, "sealed", data="a word"),
        said(1, "sealed", data="AQI"),
        said(1, "sealed", data="AQID\n"),
        said(1, "sealed", data="AQID="),
        said(1, "sealed", data="A==="),
        said(1, "sealed", data=CHUNK, more="a word"),
        said(1, "sealed", data=[CHUNK]),
        said(1, "sealed"),
        said(1, "sealed", data="A" * (1 << 20)),
    ],
)
def test_a_sealed_session_is_not_spoken_to_in_the_clear(raw: bytes) -> None:
    """Anything but base64 of a bounded length is a fault, and not a byte of it is passed on."""
    sink = Sink()
    with pytest.raises(ProtocolFault):
        FrameReader(sink, sealed=True).feed(raw)
    assert sink.events == []


def test_a_plain_session_has_nothing_sealed() -> None:
    """Who reads a plain session's events is not made to take any of them for sealed."""
    with pytest.raises(ProtocolFault, match="may not emit"):
        read(said(1, "sealed", data=CHUNK))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"status": "completed", "usage": {"a word": 1}}, (TaskState.COMPLETED, None)),
        ({"status": "completed", "error": {"code": "a_word", "message": ""}}, (TaskState.COMPLETED, None)),
        ({"status": "failed"}, (TaskState.FAILED, "task_failed")),
        (
            {"status": "failed", "error": {"code": "a_word", "message": "a word"}},
            (TaskState.FAILED, "task_failed"),
        ),
        (
            {"status": "failed", "error": {"code": "request_refused", "message": "a word"}},
            (TaskState.FAILED, "request_refused"),
        ),
        (
            {"status": "cancelled", "error": {"code": "a_word", "message": "a word"}},
            (TaskState.CANCELLED, "task_cancelled"),
        ),
    ],
)
def test_the_plain_end_of_a_sealed_task(data: dict[str, Any], expected: tuple[TaskState, str | None]) -> None:
    """Of it a status and one of two codes are taken: words and figures could be the tenant's."""
    reader, _ = sealed_reader(said(1, "end", **data))
    assert reader.end is not None
    state, failure, usage = reader.end
    assert (state, failure and failure.code, usage) == (*expected, None)
    assert "word" not in repr(reader.end)
    assert failure is None or not failure.from_worker
