"""A sealed answer: what its client is given, and everything that a service could do to it."""

from __future__ import annotations

import itertools
from base64 import b64decode, b64encode
from collections.abc import Callable
from os import urandom
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.client import TaskEvent
from gpu_server.client.sealed_stream import SealedStream, SealedStreamBroken
from gpu_server.sealed.grant import Binding, WorkerKey
from gpu_server.sealed.request import RequestOpener, RequestSealer, read_head
from tests.app.played_worker import end, frame
from tests.client.sealed_world import ARN

PLAIN = [frame(1, "text_delta", delta="one"), frame(2, "logs", stream="stdout", line="two")]
END = end(3, usage={"completion_tokens": 2})
CONNECTION = TaskEvent(id=1, event="connection", data={"task_id": "t_1"})
FINISH = TaskEvent(id=9, event="task_finish", data={"status": "completed"})


def sealed_answer(*plain: bytes, final: bool = True) -> tuple[SealedStream, list[TaskEvent]]:
    """What opens one answer, and its events: the salt, and a chunk for each of `plain`."""
    key = WorkerKey.generate()
    binding = Binding(
        tenant="acme",
        pool="chat",
        kms_key_arn=ARN,
        session_id="s_1",
        epoch=bytes(16),
        worker_key=key.public,
        wrapped_key=b"wrapped",
    )
    psk = urandom(32)
    sealer = RequestSealer(binding, psk, "r-1")
    head, begin = read_head(body := sealer.body(b"{}"))
    opener = RequestOpener(binding, psk, "r-1", key, head)
    opener.open(body[begin:])
    answer = opener.answer()
    chunks = [answer.salt]
    for number, data in enumerate(plain, 1):
        chunks += answer.seal(data, final=final and number == len(plain))
    return SealedStream(sealer.answer), [event_of(chunk) for chunk in chunks]


def event_of(chunk: bytes) -> TaskEvent:
    return TaskEvent(id=None, event="sealed", data={"data": b64encode(chunk).decode()})


def read(stream: SealedStream, events: list[TaskEvent]) -> list[TaskEvent]:
    told = []
    for event in events:
        told += stream.take(event)
        if event.event == "task_finish":
            return told
    return told + stream.close()


INSIDE = [
    TaskEvent(id=1, event="text_delta", data={"delta": "one"}, sealed=True),
    TaskEvent(id=2, event="logs", data={"stream": "stdout", "line": "two"}, sealed=True),
    TaskEvent(
        id=3,
        event="task_finish",
        data={"status": "completed", "usage": {"completion_tokens": 2}},
        sealed=True,
    ),
]


def test_an_answer() -> None:
    """What was sealed is given as events that say so, the end as task_finish; the service's hints pass."""
    stream, sealed = sealed_answer(*PLAIN, END)
    worker = TaskEvent(id=2, event="worker", data={"status": "working"})
    assert read(stream, [CONNECTION, worker, *sealed, FINISH]) == [CONNECTION, worker, *INSIDE]
    assert stream.complete


@given(st.lists(st.integers(0, 120), max_size=6))
def test_chunks_need_not_end_with_events(cuts: list[int]) -> None:
    """Events are found in the stream of all chunks, wherever that is cut."""
    plain = b"".join([*PLAIN, END])
    edges = [0, *sorted(min(cut, len(plain) - 1) for cut in cuts), len(plain)]
    stream, sealed = sealed_answer(*(plain[a:b] for a, b in itertools.pairwise(edges) if a < b))
    assert read(stream, [*sealed, FINISH]) == INSIDE


def test_the_end_is_held_back() -> None:
    """task_finish is given when the service's stream is over; when that breaks off, the end is there too."""
    stream, sealed = sealed_answer(*PLAIN, END)
    given_out = [told for event in sealed for told in stream.take(event)]
    assert given_out == INSIDE[:2]
    assert stream.complete
    assert stream.take(TaskEvent(id=7, event="error", data={"code": "x"})) == []
    assert stream.close() == INSIDE[2:]


@pytest.mark.parametrize("status", ["completed", "failed", "timeout"])
def test_the_sealed_end_counts(status: str) -> None:
    """However the service says that a task ended: with the sealed end there, that one counts."""
    stream, sealed = sealed_answer(*PLAIN, END)
    finish = TaskEvent(id=9, event="task_finish", data={"status": status})
    assert read(stream, [*sealed, finish]) == INSIDE


def test_a_failure() -> None:
    """A failure that the worker tells is an error and a task_finish, both sealed, with the worker's words."""
    error = {"code": "as_asked", "message": "it was asked to"}
    stream, sealed = sealed_answer(PLAIN[0], end(2, "failed", error=error))
    outer = [
        TaskEvent(id=5, event="error", data={"code": "task_failed", "message": "generic"}),
        TaskEvent(id=6, event="task_finish", data={"status": "failed"}),
    ]
    assert read(stream, [*sealed, *outer]) == [
        INSIDE[0],
        TaskEvent(id=2, event="error", data=error, sealed=True),
        TaskEvent(id=2, event="task_finish", data={"status": "failed", "error": error}, sealed=True),
    ]


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_the_service_says_that_it_failed(begun: int) -> None:
    """A task that did not complete needs no sealed end; that is the service's word, and marked so."""
    stream, sealed = sealed_answer(*PLAIN, END)
    outer = [
        TaskEvent(id=5, event="error", data={"code": "worker_exited"}),
        TaskEvent(id=6, event="task_finish", data={"status": "failed"}),
    ]
    told = read(stream, [*sealed[:begun], *outer])
    assert told == [*INSIDE[: max(begun - 1, 0)], *outer]
    assert not told[-1].sealed


@pytest.mark.parametrize("status", ["", "Completed", "queued", None, 0, ["failed"]])
def test_an_end_that_is_none(status: object) -> None:
    """The service's own word for an end is one of those that mean that the task did not complete."""
    stream, sealed = sealed_answer(*PLAIN, END)
    with pytest.raises(SealedStreamBroken):
        read(stream, [*sealed[:2], TaskEvent(id=6, event="task_finish", data={"status": status})])


Attack = Callable[[list[TaskEvent]], list[TaskEvent]]

ATTACKS: dict[str, Attack] = {
    "no end": lambda chunks: chunks[:-1],
    "no chunk at all": lambda chunks: [],
    "only the salt": lambda chunks: chunks[:1],
    "a hole": lambda chunks: [*chunks[:2], *chunks[3:]],
    "no first chunk": lambda chunks: [chunks[0], *chunks[2:]],
    "swapped": lambda chunks: [chunks[0], chunks[2], chunks[1], chunks[3]],
    "doubled": lambda chunks: [*chunks[:2], *chunks[1:]],
    "the end twice": lambda chunks: [*chunks, chunks[-1]],
    "more behind the end": lambda chunks: [*chunks, chunks[1]],
    "no salt": lambda chunks: chunks[1:],
    "two salts": lambda chunks: [chunks[0], *chunks],
    "another salt": lambda chunks: [event_of(bytes(32)), *chunks[1:]],
    "of another request": lambda chunks: [*chunks[:2], *sealed_answer(*PLAIN, END)[1][2:]],
    "a whole answer to another request": lambda chunks: sealed_answer(*PLAIN, END)[1],
    "an empty chunk": lambda chunks: [*chunks[:1], event_of(b""), *chunks[1:]],
    "no base64": lambda chunks: [chunks[0], TaskEvent(id=1, event="sealed", data={"data": "*"}), *chunks[1:]],
    "no data": lambda chunks: [chunks[0], TaskEvent(id=1, event="sealed", data={}), *chunks[1:]],
    "data of another kind": lambda chunks: [TaskEvent(id=1, event="sealed", data={"data": {"a": 1}})],
    "a gap": lambda chunks: [*chunks[:2], TaskEvent(id=2, event="gap", data={"from": 1, "to": 2})],
    "words of its own": lambda chunks: [
        *chunks[:2],
        TaskEvent(id=3, event="text_delta", data={"delta": "forged"}),
        *chunks[2:],
    ],
    "an end of its own": lambda chunks: [*chunks[:3], TaskEvent(id=3, event="end", data={})],
    "forged flag": lambda chunks: [*chunks[:-1], with_byte(chunks[-1], 0, 0)],
    "forged final flag": lambda chunks: [*chunks[:2], with_byte(chunks[2], 0, 1)],
    "a changed byte": lambda chunks: [*chunks[:1], with_byte(chunks[1], 20, None), *chunks[2:]],
}


def with_byte(event: TaskEvent, at: int, value: int | None) -> TaskEvent:
    raw = bytearray(b64decode(event.data["data"]))
    raw[at] = raw[at] ^ 1 if value is None else value
    return event_of(bytes(raw))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(attack: str) -> None:
    """An answer that is cut, changed, mixed or added to is never taken for whole."""
    stream, sealed = sealed_answer(*PLAIN, END)
    with pytest.raises(SealedStreamBroken) as broken:
        read(stream, [CONNECTION, *ATTACKS[attack](sealed), FINISH])
    assert broken.value.__cause__ is None
    assert "one" not in str(broken.value).split()


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_with_a_broken_connection(attack: str) -> None:
    """Nor is one behind which the service's stream is just over."""
    stream, sealed = sealed_answer(*PLAIN, END)
    with pytest.raises(SealedStreamBroken):
        read(stream, ATTACKS[attack](sealed))


@pytest.mark.parametrize(
    "plain",
    [
        (*PLAIN,),
        (*PLAIN, b""),
        (PLAIN[0], END, PLAIN[1]),
        (END, END),
        (*PLAIN, END + PLAIN[0]),
        (*PLAIN, END[:-1]),
        (*PLAIN, END + b"id: 4"),
        (b"event: x\ndata: {\n\n", END),
        (frame(1, "end", status="unheard-of"),),
        (frame(1, "end"),),
    ],
)
def test_a_worker_that_ends_wrongly(plain: tuple[bytes, ...]) -> None:
    """The worker's end is the last event of the final chunk, and nowhere else."""
    stream, sealed = sealed_answer(*plain)
    with pytest.raises(SealedStreamBroken):
        read(stream, [*sealed, FINISH])


def test_after_a_failure() -> None:
    """A stream that has failed gives nothing more, whatever comes."""
    stream, sealed = sealed_answer(*PLAIN, END)
    stream.take(sealed[0])
    with pytest.raises(SealedStreamBroken):
        stream.take(sealed[2])
    for event in sealed[1:]:
        with pytest.raises(SealedStreamBroken):
            stream.take(event)


words: Any = st.sampled_from(["sealed", "connection", "gap", "task_finish", "text", "x"])
json: Any = st.none() | st.text(max_size=20) | st.lists(st.integers(), max_size=2)


@given(
    st.lists(
        st.tuples(words, st.dictionaries(st.sampled_from(["data", "status", "x"]), json, max_size=3)),
        max_size=6,
    )
)
def test_any_events(events: list[tuple[str, dict[str, Any]]]) -> None:
    """Whatever events a service makes up: they pass as hints, or break the stream, and nothing is sealed."""
    stream, _ = sealed_answer()
    try:
        told = read(stream, [TaskEvent(id=None, event=name, data=data) for name, data in events])
    except SealedStreamBroken:
        return
    assert not any(event.sealed for event in told)
