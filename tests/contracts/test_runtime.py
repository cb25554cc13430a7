"""One contract for every container runtime: the fake, processes, and a real Docker engine."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from gpu_server.drivers.process import ProcessRuntime
from gpu_server.ports import (
    Contract,
    EndedLease,
    NotSeen,
    OutputLost,
    RuntimeUnreachable,
    StartRefused,
    WorkerExit,
)
from tests.contracts.runtime_stage import (
    COUNTED,
    LOUD_BYTES,
    PATIENCE,
    Stage,
    read_all,
    reattached,
    started,
    until_up,
)
from tests.fakes.runtime import FakeRuntime


async def test_output_is_attached_before_the_start_and_ends_with_the_worker(stage: Stage) -> None:
    """Every byte of both streams arrives, also of a worker that ends at once."""
    runtime, listener = await stage.open()
    spec = stage.spec("hello")
    worker = await started(runtime, spec)
    assert await read_all(worker) == {"stdout": b"to stdout", "stderr": b"to stderr"}
    heard = await listener.next()
    assert heard == WorkerExit(name=spec.name, session_id="s_1", exit_code=0, oom_killed=False)


@pytest.mark.parametrize(("script", "code"), [("seven", 7), ("killed", 137)])
async def test_an_exit_is_heard_once_with_its_code(stage: Stage, script: str, code: int) -> None:
    """Exit codes follow the shell: n, or 128 + the signal; removing the worker tells nothing again."""
    runtime, listener = await stage.open()
    spec = stage.spec(script)
    await started(runtime, spec)
    assert (await listener.next()).exit_code == code
    await runtime.remove(spec.name, grace=1)
    marker = stage.spec("seven", "s_2")
    await started(runtime, marker)
    assert (await listener.next()).name == marker.name
    assert [heard.name for heard in listener.heard] == [spec.name, marker.name]


async def test_a_created_worker_is_listed_and_runs_only_after_start(stage: Stage) -> None:
    """The list shows a worker from its creation on, with session and fence, and whether it runs."""
    runtime, _ = await stage.open()
    spec = stage.spec("stays", fence=7)
    worker = await runtime.create(spec)
    (seen,) = await runtime.list_workers()
    assert (seen.name, seen.session_id, seen.fence) == (spec.name, "s_1", 7)
    assert seen.container_id == worker.container_id
    assert not seen.running
    await runtime.start(spec.name)
    await until_up(worker)
    (seen,) = await runtime.list_workers()
    assert seen.running


async def test_creating_again_replaces_a_worker_that_never_started(stage: Stage) -> None:
    """An interrupted start can be repeated under the same name, also by a new life of the service."""
    runtime, _ = await stage.open()
    spec = stage.spec("hello")
    await runtime.create(spec)
    await runtime.close()
    runtime, _ = await stage.open()
    worker = await started(runtime, spec)
    assert (await read_all(worker))["stdout"] == b"to stdout"
    assert len(await runtime.list_workers()) == 1


async def test_a_name_that_was_started_is_refused(stage: Stage) -> None:
    """A worker that runs or ran is never replaced: its name is its fence."""
    runtime, listener = await stage.open()
    spec = stage.spec("seven")
    await started(runtime, spec)
    await listener.next()
    with pytest.raises(StartRefused) as refused:
        await runtime.create(spec)
    assert refused.value.code == "start_failed"


async def test_starting_what_was_not_created_is_refused(stage: Stage) -> None:
    """A start needs a worker of that name."""
    runtime, _ = await stage.open()
    with pytest.raises(StartRefused) as refused:
        await runtime.start("s_none-1")
    assert refused.value.code == "start_failed"


async def test_a_program_never_runs_twice(stage: Stage) -> None:
    """Starting what runs changes nothing; starting what has ended is refused, also in the next life."""
    runtime, listener = await stage.open()
    spec = stage.spec("waits")
    worker = await started(runtime, spec)
    await until_up(worker)
    await runtime.start(spec.name)
    await stage.say(spec, "once")
    await listener.next()
    assert await read_all(worker) == {"stdout": b"once", "stderr": b"once"}
    for life in (1, 2):
        with pytest.raises(StartRefused) as refused:
            await runtime.start(spec.name)
        assert refused.value.code == "start_failed"
        (seen,) = await runtime.list_workers()
        assert not seen.running
        if life == 1:
            await runtime.close()
            runtime, _ = await stage.open()


async def test_removing_lets_the_worker_end_by_itself_first(stage: Stage) -> None:
    """SIGTERM comes first, and a worker that obeys it is not killed; afterwards nothing is there."""
    runtime, listener = await stage.open()
    spec = stage.spec("stays")
    worker = await started(runtime, spec)
    await until_up(worker)
    await runtime.remove(spec.name, grace=PATIENCE)
    assert (await listener.next()).exit_code == 3
    assert await runtime.list_workers() == ()
    assert await read_all(worker) == {"stdout": b"", "stderr": b""}


@pytest.mark.parametrize("grace", [0.0, 0.2])
async def test_removing_kills_what_does_not_end(stage: Stage, grace: float) -> None:
    """A worker that ignores SIGTERM is gone soon after its grace."""
    runtime, listener = await stage.open()
    spec = stage.spec("stubborn")
    worker = await started(runtime, spec)
    await until_up(worker)
    async with asyncio.timeout(PATIENCE):
        await runtime.remove(spec.name, grace=grace)
    assert (await listener.next()).exit_code == 137
    assert await runtime.list_workers() == ()


async def test_removing_is_idempotent(stage: Stage) -> None:
    """A worker that never was, never started, or is gone already is removed without complaint."""
    runtime, _ = await stage.open()
    await runtime.remove("s_none-1", grace=1)
    spec = stage.spec("stays")
    worker = await runtime.create(spec)
    await runtime.remove(spec.name, grace=1)
    await runtime.remove(spec.name, grace=1)
    assert await read_all(worker) == {"stdout": b"", "stderr": b""}
    assert await runtime.list_workers() == ()


async def test_another_instance_sees_and_touches_nothing_of_ours(stage: Stage) -> None:
    """Two services on one machine do not list, hear or remove each other's workers."""
    runtime, listener = await stage.open()
    other, other_listener = await stage.open(f"{stage.instance}-other")
    spec = stage.spec("stays")
    worker = await started(runtime, spec)
    await until_up(worker)
    assert await other.list_workers() == ()
    await other.remove(spec.name, grace=0)
    (seen,) = await runtime.list_workers()
    assert seen.running
    await runtime.remove(spec.name, grace=0)
    await listener.next()
    assert other_listener.heard == []


async def test_workers_outlive_the_service_and_are_found_by_the_next(stage: Stage) -> None:
    """A new life lists a running worker, hears its exit, and can remove it by name."""
    first, _ = await stage.open()
    spec = stage.spec("stays")
    worker = await started(first, spec)
    await until_up(worker)
    await first.close()
    second, listener = await stage.open()
    (seen,) = await second.list_workers()
    assert (seen.name, seen.running) == (spec.name, True)
    await second.remove(spec.name, grace=PATIENCE)
    assert (await listener.next()).exit_code == 3
    assert await second.list_workers() == ()


async def test_an_exit_from_before_is_heard_by_the_next_life(stage: Stage) -> None:
    """An exit that a service was not there to hear is told to the next one, as missed."""
    first, listener = await stage.open()
    spec = stage.spec("seven")
    await started(first, spec)
    await listener.next()
    await first.close()
    _second, listener = await stage.open()
    heard = await listener.next()
    assert (heard.name, heard.exit_code) == (spec.name, 7)


async def test_a_worker_is_taken_up_with_its_output_from_now_on(stage: Stage) -> None:
    """The next life reads what a running worker writes from then on, and hears its exit once."""
    first, _ = await stage.open()
    spec = stage.spec("waits")
    worker = await started(first, spec)
    await until_up(worker)
    await first.close()
    second, listener = await stage.open()
    found = await reattached(second, spec.name)
    (seen,) = await second.list_workers()
    assert (found.container_id, found.exit) == (seen.container_id, None)
    await second.start(spec.name)
    await stage.say(spec, "later")
    assert await read_all(found) == {"stdout": b"later", "stderr": b"later"}
    assert (await listener.next()).exit_code == 5
    marker = stage.spec("seven", "s_2")
    await started(second, marker)
    await listener.next()
    assert [heard.name for heard in listener.heard] == [spec.name, marker.name]


async def test_a_worker_that_ended_meanwhile_tells_its_exit(stage: Stage) -> None:
    """Taking up a worker that has ended gives its exit, and an output that ends at once."""
    first, listener = await stage.open()
    spec = stage.spec("seven")
    await started(first, spec)
    heard = await listener.next()
    await first.close()
    second, listener = await stage.open()
    found = await reattached(second, spec.name)
    assert found.exit == heard
    assert await read_all(found) == {"stdout": b"", "stderr": b""}
    assert await listener.next() == heard


async def test_what_never_started_cannot_be_taken_up(stage: Stage) -> None:
    """A worker that never was, was only created, or is another instance's is none; one created can start."""
    first, _ = await stage.open()
    spec, running = stage.spec("hello"), stage.spec("stays", "s_2")
    await first.create(spec)
    await started(first, running)
    await first.close()
    second, _ = await stage.open()
    for from_start in (False, True):
        assert await second.reattach("s_none-1", from_start=from_start) is None
        assert await second.reattach(spec.name, from_start=from_start) is None
    other, _ = await stage.open(f"{stage.instance}-other")
    assert await other.reattach(running.name) is None
    worker = await started(second, spec)
    assert (await read_all(worker))["stdout"] == b"to stdout"


async def test_taking_up_a_worker_ends_what_was_attached_before(stage: Stage) -> None:
    """A worker's output has one reader: the last."""
    runtime, _ = await stage.open()
    spec = stage.spec("waits")
    worker = await started(runtime, spec)
    await until_up(worker)
    found = await reattached(runtime, spec.name)
    assert await read_all(worker) == {"stdout": b"", "stderr": b""}
    await stage.say(spec, "later")
    assert await read_all(found) == {"stdout": b"later", "stderr": b"later"}


@pytest.mark.parametrize("ended", [False, True])
async def test_what_an_exec_worker_wrote_is_read_again_from_its_first_byte(stage: Stage, ended: bool) -> None:
    """Each stream comes whole and in order, also if it was read before and if the worker has ended; a runtime
    that keeps no output says so."""
    first, listener = await stage.open()
    spec = stage.spec("counts", contract=Contract.EXEC)
    worker = await started(first, spec)
    seen = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(PATIENCE):
        while not seen["stdout"].endswith(b"up\n"):
            piece = await anext(worker.output)
            seen[piece.stream] += piece.data
    if ended:
        await stage.say(spec, "the end")
        await listener.next()
    await first.close()
    second, listener = await stage.open()
    if isinstance(second, ProcessRuntime):
        with pytest.raises(OutputLost):
            await second.reattach(spec.name, from_start=True)
        return
    found = await reattached(second, spec.name, from_start=True)
    if not ended:
        await stage.say(spec, "the end")
    assert (found.exit is not None) is ended
    assert await read_all(found) == {name: text + b"the end" for name, text in COUNTED.items()}
    assert (await listener.next()).exit_code == 5


async def test_what_an_http_worker_wrote_is_not_kept(stage: Stage) -> None:
    """Its output is never written down, so it cannot be had from the start; it can be from now on."""
    runtime, _ = await stage.open()
    spec = stage.spec("waits")
    worker = await started(runtime, spec)
    await until_up(worker)
    with pytest.raises(OutputLost):
        await runtime.reattach(spec.name, from_start=True)
    await stage.say(spec, "later")
    assert await read_all(worker) == {"stdout": b"later", "stderr": b"later"}


async def test_a_sign_of_life_is_there_before_opening_and_after(stage: Stage) -> None:
    """Whether the engine answers can be asked at any time."""
    await stage.make(stage.instance).ping()
    runtime, _ = await stage.open()
    await runtime.ping(limit=PATIENCE)


async def test_a_loud_worker_loses_nothing(stage: Stage) -> None:
    """Output far beyond any buffer arrives whole."""
    runtime, _ = await stage.open()
    worker = await started(runtime, stage.spec("loud"))
    assert await read_all(worker) == {"stdout": b"x" * LOUD_BYTES, "stderr": b""}


async def test_closing_the_output_ends_a_reader_that_waits(stage: Stage) -> None:
    """Output can be let go of at any time, twice, and the worker goes on."""
    runtime, _ = await stage.open()
    worker = await started(runtime, stage.spec("stays"))
    await until_up(worker)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        reader = group.create_task(read_all(worker), name="reader")
        asyncio.get_running_loop().call_soon(worker.output.close)
    assert reader.result() == {"stdout": b"", "stderr": b""}
    worker.output.close()
    (seen,) = await runtime.list_workers()
    assert seen.running


async def test_the_fake_can_be_slow_wrong_and_unreachable() -> None:
    """The switches of the fake do what tests of the engine rely on."""
    runtime = FakeRuntime()
    runtime.unreachable = True
    with pytest.raises(RuntimeUnreachable):
        await runtime.list_workers()
    with pytest.raises(RuntimeUnreachable):
        await runtime.ping()
    runtime.unreachable = False
    runtime.wrong["require_image"] = StartRefused("image_missing", "no")
    with pytest.raises(StartRefused):
        await runtime.require_image("any")
    gate = runtime.gates["list_workers"] = asyncio.Event()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        waiting = group.create_task(runtime.list_workers(), name="list")
        asyncio.get_running_loop().call_soon(gate.set)
    assert waiting.result() == ()


@pytest.mark.parametrize("script", ["hello", "loud"])
async def test_what_a_sealed_worker_writes_is_read_by_nobody(stage: Stage, script: str) -> None:
    """It has no output, now or when it is taken up again, and is not held back however much it writes."""
    first, listener = await stage.open()
    spec, staying = stage.spec(script, sealed=True), stage.spec("stays", "s_2", sealed=True)
    nothing = {"stdout": b"", "stderr": b""}
    assert await read_all(await started(first, spec)) == nothing
    assert (await listener.next()).exit_code == 0
    assert await read_all(await started(first, staying)) == nothing
    await first.close()
    second, _ = await stage.open()
    assert await read_all(await reattached(second, spec.name)) == nothing
    found = await reattached(second, staying.name)
    assert found.exit is None
    assert await read_all(found) == nothing


async def test_what_a_worker_has_is_seen_gone(stage: Stage) -> None:
    """Asked while it is there, running or not, a worker's belongings name it; when it was removed, no cleaner
    finds anything of it, or says that it cannot see."""
    runtime, _ = await stage.open()
    assert await runtime.belongings("s_none-1") is None
    spec = stage.spec("stays")
    worker = await runtime.create(spec)
    belongings = await runtime.belongings(spec.name)
    assert belongings is not None
    assert belongings.container_id == worker.container_id
    await runtime.start(spec.name)
    await until_up(worker)
    assert await runtime.belongings(spec.name) == belongings
    await runtime.remove(spec.name, grace=0)
    assert await runtime.belongings(spec.name) is None
    lease = EndedLease(session_id="s_1", fence=1, slot_ids=("cpu-0",), belongings=belongings)
    for cleaner in runtime.cleaners():
        with contextlib.suppress(NotSeen):
            assert await cleaner.look(lease) == 0
            await cleaner.remove(lease)


async def test_another_instances_worker_is_not_told_of(stage: Stage) -> None:
    """What it has is its own instance's to know."""
    runtime, _ = await stage.open()
    other, _ = await stage.open("another")
    spec = stage.spec("hello")
    await runtime.create(spec)
    assert await other.belongings(spec.name) is None


async def test_cleaning_after_one_worker_leaves_another_alone(stage: Stage) -> None:
    """Not only where there is nothing to do: a worker of another session runs on."""
    runtime, _ = await stage.open()
    gone, stays = stage.spec("stays"), stage.spec("waits", "s_2")
    for spec in (gone, stays):
        await until_up(await started(runtime, spec))
    belongings = await runtime.belongings(gone.name)
    await runtime.remove(gone.name, grace=0)
    without = EndedLease(session_id=None, fence=2, slot_ids=("cpu-0",))
    for lease in (replace(without, session_id="s_1", belongings=belongings), without):
        for cleaner in runtime.cleaners():
            with contextlib.suppress(NotSeen):
                await cleaner.remove(lease)
    (seen,) = await runtime.list_workers()
    assert (seen.name, seen.running) == (stays.name, True)
