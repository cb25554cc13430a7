"""Relays: a task is carried to its worker, and all that comes back is in its stream, once and in order."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpu_server.core.sessions import TaskState
from gpu_server.drivers.worker_link import LinkBroken
from gpu_server.exec_output import ExecOutput
from gpu_server.frames import ProtocolFault, encode
from gpu_server.ports import CreatedWorker, Output, OutputLost, WorkerExit
from gpu_server.relay import EXEC_PIECE_BYTES, REATTACH_TRIES, End, relay_exec, relay_http
from gpu_server.stream import Stream
from tests.app.played_worker import Call, end, frame
from tests.app.reading import Event, all_events
from tests.drivers.listening_worker import BODY, Handler, Listening, answers, delta, listening, streams
from tests.fakes.runtime import FakeOutput

COMPLETED: End = (TaskState.COMPLETED, None, None)


@pytest.fixture
def path() -> Iterator[str]:
    """A socket's path, short enough for its address."""
    with tempfile.TemporaryDirectory(prefix="relay") as folder:
        yield str(Path(folder, "worker.sock"))


@pytest.fixture
def stream() -> Stream:
    """The stream of a task that is on its way to a worker."""
    stream = Stream(1 << 20)
    stream.publish("connection", {})
    return stream


@dataclass
class Host:
    """Who has the relay work for it."""

    exits: bool = False
    runs: bool = True
    delivered: list[str] = field(default_factory=list)
    asked: int = 0
    looked: int = 0

    async def exit_is_near(self) -> bool:
        self.asked += 1
        return self.exits

    async def is_running(self) -> bool:
        self.looked += 1
        self.exits = not self.runs and self.looked == 3  # its exit is told late
        return self.runs


async def relay(
    worker: Listening,
    stream: Stream,
    body: bytes | None = BODY,
    host: Host | None = None,
    *,
    sealed: bool = False,
) -> End | None:
    host = host or Host()
    return await relay_http(
        worker.link,
        "t_1",
        body,
        stream,
        delivered=lambda: host.delivered.append("t_1"),
        exit_is_near=host.exit_is_near,
        sealed=sealed,
        is_running=host.is_running,
    )


async def deltas(stream: Stream) -> list[str]:
    """What the worker said, to who reads from the beginning."""
    return [event.data["delta"] for event in await everything(stream) if event.name == "text_delta"]


async def everything(stream: Stream) -> list[Event]:
    stream.publish("task_finish", {})
    return await all_events(stream)


def in_turn(*handlers: Handler) -> Handler:
    """Each request is answered in its own way; the last way goes on."""
    left = list(handlers)

    async def handler(call: Call) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(call)

    return handler


def cut_off(*chunks: bytes) -> Handler:
    """A stream that ends in the middle."""

    async def handler(call: Call) -> None:
        await call.stream(*chunks)
        call.cut()

    return handler


async def no_answer(call: Call) -> None:
    call.cut()


def numbers(first: int, last: int) -> bytes:
    return b"".join(delta(number) for number in range(first, last + 1))


def in_another_life(*, worker: int) -> Stream:
    """The stream of a task of which an earlier life took `worker` events."""
    stream = Stream(1 << 20)
    stream.publish("connection", {})
    stream.relay([encode("text_delta", {"delta": f"d{number}"}) for number in range(1, worker + 1)])
    stream.publish("worker", {})
    return stream


# -- giving -----------------------------------------------------------------------------------------------


async def test_a_task_is_given_and_its_events_are_taken(path: str, stream: Stream) -> None:
    """Its body goes to the worker, and from when the worker has it that is known."""
    host = Host()
    async with listening(path, streams(numbers(1, 3) + end(4, usage={"n": 1}))) as worker:
        assert await relay(worker, stream, host=host) == (TaskState.COMPLETED, None, {"n": 1})
        assert worker.calls == [("POST", "/tasks/t_1", BODY)]
    assert host.delivered == ["t_1"]
    assert await deltas(stream) == ["d1", "d2", "d3"]


async def test_a_task_whose_connection_was_closed_before_it_came_is_sent_again(
    path: str, stream: Stream
) -> None:
    """A worker may close an idle connection: nobody can tell whether it has the task, and sending it again
    does no harm."""
    host = Host()
    async with listening(path, in_turn(no_answer, streams(delta(1), end(2)))) as worker:
        assert await relay(worker, stream, host=host) == COMPLETED
        assert [method for method, *_ in worker.calls] == ["POST", "POST"]
    assert host.delivered == ["t_1"]


async def test_a_task_that_broke_before_its_first_event_is_sent_again(path: str, stream: Stream) -> None:
    """As long as nothing of it came the worker may have it or not: a known id attaches."""
    async with listening(path, in_turn(cut_off(), streams(delta(1), end(2)))) as worker:
        assert await relay(worker, stream) == COMPLETED
        assert [method for method, *_ in worker.calls] == ["POST", "POST"]


@pytest.mark.parametrize(("status", "times"), [(400, 1), (404, 1), (500, 1), (503, 1 + REATTACH_TRIES)])
async def test_a_task_that_is_not_taken(path: str, stream: Stream, status: int, times: int) -> None:
    """It fails, and the worker is not to be blamed for it; one that is not ready was asked a few times."""
    host = Host()
    async with listening(path, answers(status, {})) as worker:
        found = await relay(worker, stream, host=host)
        assert len(worker.calls) == times
    assert found is not None
    state, failure, _ = found
    assert failure is not None
    assert (state, failure.code, failure.from_worker) == (TaskState.FAILED, "worker_protocol", True)
    assert str(status) in failure.message
    assert host.delivered == []


async def test_a_worker_that_is_not_ready_is_asked_again(path: str, stream: Stream) -> None:
    """A worker that is not ready may be so a moment later; the task was not taken before, so it runs once."""
    async with listening(path, in_turn(answers(503, {}), streams(delta(1), end(2)))) as worker:
        assert await relay(worker, stream) == COMPLETED
        assert [method for method, *_ in worker.calls] == ["POST", "POST"]


async def test_a_worker_that_has_begun_to_stop(path: str, stream: Stream) -> None:
    """It says that it is not ready, and then its exit tells: that is no breach of the contract."""
    async with listening(path, answers(503, {})) as worker:
        assert await relay(worker, stream, host=Host(exits=True)) is None
        assert len(worker.calls) == 1


# -- taking up again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [cut_off, streams])
async def test_a_broken_stream_is_taken_up(path: str, stream: Stream, how: Callable[..., Handler]) -> None:
    """A stream that ends in the middle of a frame is taken up behind the last whole one: nothing is lost or
    doubled."""
    handler = in_turn(how(numbers(1, 2) + delta(3)[:20]), streams(numbers(3, 5), end(6)))
    async with listening(path, handler) as worker:
        assert await relay(worker, stream) == COMPLETED
        assert [call[1] for call in worker.calls[1:]] == ["/tasks/t_1/events?after=2"]
    assert await deltas(stream) == [f"d{n}" for n in range(1, 6)]


async def test_progress_renews_the_patience(path: str, stream: Stream) -> None:
    """A connection that breaks again and again is taken up as long as each time brings something new."""

    async def one_more(call: Call) -> None:
        seen = int(call.path.partition("after=")[2] or 0)
        await call.stream(delta(seen + 1) if seen < 9 else end(10))
        await call.done()

    async with listening(path, one_more) as worker:
        assert await relay(worker, stream) == COMPLETED
    assert await deltas(stream) == [f"d{n}" for n in range(1, 10)]


async def test_patience_ends(path: str, stream: Stream) -> None:
    """A worker that gives nothing more is asked a few times, and before each whether it is about to exit."""
    host = Host()
    async with listening(path, in_turn(cut_off(delta(1)), cut_off())) as worker:
        with pytest.raises(LinkBroken):
            await relay(worker, stream, host=host)
        assert len(worker.calls) == host.asked == 1 + REATTACH_TRIES
    assert await deltas(stream) == ["d1"]


@pytest.mark.parametrize("how", [cut_off(), answers(503, {})])
async def test_patience_lasts_until_it_is_known_whether_the_worker_runs(
    path: str, stream: Stream, how: Handler
) -> None:
    """While the runtime cannot say that the worker runs, its exit may have come and is only told later."""
    host = Host(runs=False)
    async with listening(path, how) as worker:
        assert await relay(worker, stream, host=host) is None
        assert len(worker.calls) == REATTACH_TRIES + 1 + host.looked


async def test_the_workers_own_end_tells_more(path: str, stream: Stream) -> None:
    """Where the worker's exit is near, the broken connection says nothing of its own."""
    async with listening(path, cut_off(delta(1))) as worker:
        assert await relay(worker, stream, host=Host(exits=True)) is None
        assert len(worker.calls) == 1


async def test_an_end_and_then_a_broken_stream(path: str, stream: Stream) -> None:
    """A task that has said its end is over, whatever becomes of the connection."""
    host = Host(exits=True)
    async with listening(path, cut_off(delta(1) + end(2, "failed"))) as worker:
        found = await relay(worker, stream, host=host)
    assert found is not None
    assert found[0] is TaskState.FAILED


async def test_a_worker_that_forgets_what_it_runs(path: str, stream: Stream) -> None:
    """A worker that gave events of a task a moment ago, and does not know it now, breaks the contract."""
    async with listening(path, in_turn(cut_off(delta(1)), answers(404, {}))) as worker:
        with pytest.raises(ProtocolFault, match="has forgotten"):
            await relay(worker, stream)


async def test_a_worker_that_will_not_go_on(path: str, stream: Stream) -> None:
    """A worker that refuses to give the rest of what it has begun breaks the contract too."""
    async with listening(path, in_turn(cut_off(delta(1)), answers(503, {}))) as worker:
        with pytest.raises(ProtocolFault, match="503"):
            await relay(worker, stream)


# -- after a restart of the service -----------------------------------------------------------------------


async def test_another_life_goes_on_where_the_first_was(path: str) -> None:
    """A task of which events are known is not sent again: it is followed behind the last of them."""
    stream = in_another_life(worker=3)
    async with listening(path, streams(numbers(4, 5), end(6))) as worker:
        assert await relay(worker, stream, BODY) == COMPLETED
        assert worker.calls == [("GET", "/tasks/t_1/events?after=3", b"")]
    assert await deltas(stream) == [f"d{n}" for n in range(1, 6)]


async def test_another_life_does_not_know_whether_it_was_sent(path: str) -> None:
    """A task of which no event is known is sent: it runs once, also where the first life had sent it."""
    stream, host = in_another_life(worker=0), Host()
    async with listening(path, streams(delta(1), end(2))) as worker:
        assert await relay(worker, stream, BODY, host) == COMPLETED
        assert worker.calls == [("POST", "/tasks/t_1", BODY)]
    assert host.delivered == ["t_1"]


async def test_a_task_that_was_delivered_is_asked_for(path: str) -> None:
    """Without its body it can only be followed from its first event."""
    stream = in_another_life(worker=0)
    async with listening(path, streams(delta(1), end(2))) as worker:
        assert await relay(worker, stream, None) == COMPLETED
        assert worker.calls == [("GET", "/tasks/t_1/events?after=0", b"")]


@pytest.mark.parametrize("seen", [0, 3])
async def test_a_task_that_nobody_knows_any_more(path: str, seen: int) -> None:
    """A task that its worker does not know fails, and the restart is why; the worker is not to blame."""
    stream = in_another_life(worker=seen)
    async with listening(path, answers(404, {})) as worker:
        found = await relay(worker, stream, None)
    assert found is not None
    state, failure, _ = found
    assert failure is not None
    assert (state, failure.code, failure.from_worker) == (TaskState.FAILED, "service_restarted", False)


@pytest.mark.parametrize(("seen", "body"), [(0, BODY), (0, None), (3, None)])
async def test_events_that_the_worker_has_dropped(path: str, seen: int, body: bytes | None) -> None:
    """The relay goes on with the oldest event that the worker still has, and readers get a gap there."""
    stream = in_another_life(worker=seen)
    own = stream.last_id
    handler = in_turn(answers(410, {"oldest": 8}), streams(numbers(8, 9), end(10)))
    async with listening(path, handler) as worker:
        assert await relay(worker, stream, body) == COMPLETED
        assert worker.calls[1][1] == "/tasks/t_1/events?after=7"
    stream.publish("task_finish", {})
    events = await all_events(stream, after=own)
    told = [(event.number, event.name) for event in events]
    first = own + 8 - seen  # each number of the worker is a known base behind its own
    assert told == [
        (own, "gap"),
        (first, "text_delta"),
        (first + 1, "text_delta"),
        (first + 2, "task_finish"),
    ]
    assert events[0].data == {"from": own + 1, "to": first - 1}
    assert [event.data["delta"] for event in events[1:3]] == ["d8", "d9"]


async def test_a_worker_that_drops_faster_than_it_is_read(path: str, stream: Stream) -> None:
    """That it may do a few times, not for ever."""
    asked: list[str] = []

    async def ever_later(call: Call) -> None:
        asked.append(call.path)
        await call.answer(410, {"oldest": 10 * len(asked)})

    async with listening(path, ever_later) as worker:
        with pytest.raises(ProtocolFault, match="again and again"):
            await relay(worker, stream, None)
    assert len(asked) == 1 + REATTACH_TRIES


# -- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\n\n", frame(1, "connection", status="allocated"), delta(7), end(2) + end(3)]
)
async def test_what_came_before_a_fault_is_kept(path: str, stream: Stream, garbage: bytes) -> None:
    """A worker that breaks the contract is told of; what it sent properly before has been passed on."""
    async with listening(path, streams(delta(1), garbage)) as worker:
        with pytest.raises(ProtocolFault):
            await relay(worker, stream)
    assert await deltas(stream) == ["d1"]


async def test_a_task_is_over_when_it_says_so(path: str, stream: Stream) -> None:
    """A worker that keeps the response open after `end` does not keep its task running."""

    async def keeps_it_open(call: Call) -> None:
        await call.stream(delta(1), end(2))
        await asyncio.Event().wait()

    async with listening(path, keeps_it_open) as worker:
        assert await relay(worker, stream) == COMPLETED


# -- programs ---------------------------------------------------------------------------------------------

SILENCE = 0.02
EXIT = WorkerExit(name="w", session_id="s_1", exit_code=0, oom_killed=False)


class Program:
    """A program, its output, and what is read of it."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.output = stream, FakeOutput()
        self.exited: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self.remembered = b""
        self.interrupted = False

    def says(self, data: bytes) -> None:
        self.output.feed(Output("stdout", data))

    def remember(self, piece: Output) -> None:
        self.remembered += piece.data

    async def read(self, skip: int = 0, silence: float = SILENCE) -> bool:
        worker = CreatedWorker(name="w", container_id="c", output=self.output)
        async with asyncio.timeout(20):
            return await relay_exec(
                worker,
                ExecOutput(self.stream, {"stdout": skip}),
                self.exited,
                remember=self.remember,
                is_interrupted=lambda: self.interrupted,
                silence=silence,
            )

    async def lines(self) -> list[str]:
        return [event.data["line"] for event in await everything(self.stream) if event.name == "logs"]


async def test_a_program_is_read_to_its_end(stream: Stream) -> None:
    """All that it wrote, a last line without an end too, is in its stream when it is over."""
    program = Program(stream)
    program.says(b"1\n2\n")
    program.says(b"3")
    program.output.end()
    program.exited.set_result(EXIT)
    assert await program.read()
    assert await program.lines() == ["1", "2", "3"]
    assert program.remembered == b"1\n2\n3"


async def test_what_comes_behind_the_exit(stream: Stream) -> None:
    """The news of the exit may overtake the last of the output."""
    program = Program(stream)
    program.exited.set_result(EXIT)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(program.read(silence=10))
        for number in range(3):
            await asyncio.sleep(0)
            program.says(b"%d\n" % number)
        program.output.end()
    assert reading.result()
    assert await program.lines() == ["0", "1", "2"]


async def test_what_a_program_left_behind(stream: Stream) -> None:
    """A child that holds its output open holds nothing up: after a silence it is let go of."""
    program = Program(stream)
    program.says(b"1\n")
    program.exited.set_result(EXIT)
    assert await program.read()
    program.says(b"too late\n")
    assert await program.lines() == ["1"]


async def test_a_program_that_closes_its_output(stream: Stream) -> None:
    """It is over when it has exited, not when it has nothing more to say."""
    program = Program(stream)
    program.says(b"1\n")
    program.output.end()
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(program.read(silence=0.001))
        await asyncio.sleep(0.01)
        assert not reading.done()
        program.exited.set_result(EXIT)
    assert reading.result()


@pytest.mark.parametrize("exited", [False, True])
async def test_an_interrupted_reading(stream: Stream, exited: bool) -> None:
    """Where the runtime was lost the output may have ended before its end: that is told, and nothing is made
    of half a line, so that it can be read again from the beginning."""
    program = Program(stream)
    program.says(b"1\n2\nhal")
    program.output.end()
    program.interrupted = True
    if exited:
        program.exited.set_result(EXIT)
    assert not await program.read()
    again = Program(stream)
    again.says(b"1\n2\nhalf\n")
    again.output.end()
    again.exited.set_result(EXIT)
    assert await again.read(skip=2)
    assert await again.lines() == ["1", "2", "half"]


async def test_an_output_that_is_lost(stream: Stream) -> None:
    """What the runtime has dropped is missed, whatever came before it."""

    class Dropped(FakeOutput):
        async def __anext__(self) -> Output:
            if not self._pieces:
                raise OutputLost("too much")
            return await super().__anext__()

    program = Program(stream)
    program.output = Dropped()
    program.says(b"1\n")
    program.exited.set_result(EXIT)
    with pytest.raises(OutputLost, match="too much"):
        await program.read()
    assert await program.lines() == ["1"]


async def test_a_program_that_writes_a_lot_at_once(stream: Stream) -> None:
    """Others get their turn while it is read."""
    program = Program(stream)
    program.says(b"\n" * (20 * EXEC_PIECE_BYTES))
    program.output.end()
    program.exited.set_result(EXIT)
    turns = 0
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(program.read())
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
    assert turns > 20
    assert stream.worker_seq == 20 * EXEC_PIECE_BYTES


# -- sealed tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, {"error": "no", "code": "decrypt"}, "decrypt_failed"),
        (409, {"error": "no", "code": "replay"}, "replay"),
        (410, {"error": "no", "code": "gone"}, "events_gone"),
        (415, {"error": "no"}, "worker_protocol"),
        (500, {"error": "no"}, "worker_protocol"),
    ],
)
async def test_a_sealed_task_is_refused(
    path: str, stream: Stream, status: int, body: dict[str, str], code: str
) -> None:
    """A worker that cannot open a request, or had it before, has its own code, and words of ours."""
    async with listening(path, answers(status, body)) as worker:
        end = await relay(worker, stream, sealed=True)
    assert end is not None
    state, failure, _ = end
    assert state is TaskState.FAILED
    assert failure is not None
    assert failure.code == code


async def test_a_sealed_task(path: str, stream: Stream) -> None:
    """Its events are passed on as they came, and nothing else is taken."""
    raw = frame(1, "sealed", data="AQID") + frame(2, "sealed", data="BAUG") + end(3, usage={"words": 1})
    async with listening(path, streams(raw)) as worker:
        assert await relay(worker, stream, sealed=True) == COMPLETED
        sealed = [event.data["data"] for event in await everything(stream) if event.name == "sealed"]
        assert sealed == ["AQID", "BAUG"]
    async with listening(path + "2", streams(delta(1))) as worker:
        with pytest.raises(ProtocolFault):
            await relay(worker, Stream(1 << 20), sealed=True)
