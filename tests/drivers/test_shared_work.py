"""Work that several want and that is done once."""

from __future__ import annotations

import asyncio

import pytest

from gpu_server.drivers.shared_work import SharedWork, Tell


class Work:
    """Waits until it may go on, and counts how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.go_on, self.cancelled = asyncio.Event(), asyncio.Event()
        self.at_work = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, tell: Tell) -> str:
        self.begun += 1
        tell(1, 10)
        self.at_work.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        tell(10, 10)
        if self.failure is not None:
            raise self.failure
        return "done"


def ignore(done: int, total: int | None) -> None:
    pass


async def test_ten_who_want_the_same() -> None:
    """It is done once, all get what it comes to, and all hear how far it is, the late ones too."""
    shared: SharedWork[str] = SharedWork()
    work, told = Work(), [[] for _ in range(10)]  # type: list[list[int]]
    async with asyncio.timeout(20), shared.open(), asyncio.TaskGroup() as group:
        first = group.create_task(shared.do("m", work, lambda done, total: told[0].append(done)))
        await work.at_work.wait()
        others = [
            group.create_task(shared.do("m", work, lambda done, total, mine=mine: mine.append(done)))
            for mine in told[1:]
        ]
        await asyncio.sleep(0)
        work.go_on.set()
        assert {await task for task in (first, *others)} == {"done"}
    assert work.begun == 1
    assert told == [[1, 10]] * 10


async def test_one_who_leaves_ends_nothing() -> None:
    """The work goes on for those who stay, also when it was begun for the one who left."""
    shared: SharedWork[str] = SharedWork()
    work = Work()
    async with asyncio.timeout(20), shared.open(), asyncio.TaskGroup() as group:
        first = group.create_task(shared.do("m", work, ignore))
        await work.at_work.wait()
        second = group.create_task(shared.do("m", work, lambda done, total: None))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        work.go_on.set()
        assert await second == "done"
    assert first.cancelled()
    assert work.begun == 1
    assert not work.cancelled.is_set()


async def test_the_last_who_leaves_ends_it() -> None:
    """Nobody wants it any more: it is cancelled, and who comes then begins anew."""
    shared: SharedWork[str] = SharedWork()
    work, another = Work(), Work()
    another.go_on.set()
    async with asyncio.timeout(20), shared.open(), asyncio.TaskGroup() as group:
        first = group.create_task(shared.do("m", work, ignore))
        await work.at_work.wait()
        first.cancel()
        await asyncio.wait([first])
        assert await shared.do("m", another, ignore) == "done"
        await work.cancelled.wait()
    assert another.begun == 1


async def test_what_lingers_goes_on() -> None:
    """Where it is of use later, the last who leaves does not end it: who comes then joins it."""
    shared: SharedWork[str] = SharedWork(lingers=True)
    work = Work()
    async with asyncio.timeout(20), shared.open(), asyncio.TaskGroup() as group:
        first = group.create_task(shared.do("m", work, ignore))
        await work.at_work.wait()
        first.cancel()
        await asyncio.wait([first])
        work.go_on.set()
        assert await shared.do("m", work, ignore) == "done"
    assert work.begun == 1


async def test_a_failure_is_everybodys() -> None:
    """All who wait hear of it, and the next try begins anew."""
    shared: SharedWork[str] = SharedWork()
    work = Work()
    work.failure = KeyError("no")
    async with asyncio.timeout(20), shared.open(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(_outcome(shared, work)) for _ in range(3)]
        await work.at_work.wait()
        work.go_on.set()
        assert [await task for task in tasks] == ["KeyError"] * 3
        work.failure = None
        assert await shared.do("m", work, ignore) == "done"
    assert work.begun == 2


async def _outcome(shared: SharedWork[str], work: Work) -> str:
    try:
        return await shared.do("m", work, lambda done, total: None)
    except KeyError as error:
        return type(error).__name__


async def test_the_end_of_the_owner_is_the_end_of_the_work() -> None:
    """What still runs when the store closes is cancelled, and nobody waits for ever."""
    shared: SharedWork[str] = SharedWork()
    work = Work()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        async with shared.open():
            task = group.create_task(shared.do("m", work, ignore))
            await work.at_work.wait()
        await asyncio.wait([task])
    assert task.cancelled()
    assert work.cancelled.is_set()


async def test_the_end_comes_before_the_work_has_begun() -> None:
    """Nobody waits for ever then either."""
    shared: SharedWork[str] = SharedWork()
    work = Work()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        async with shared.open():
            task = group.create_task(shared.do("m", work, ignore))
            await asyncio.sleep(0)
        await asyncio.wait([task])
    assert task.cancelled()
    assert work.begun == 0


async def test_the_owners_own_failures_are_told_as_they_are() -> None:
    """What goes wrong in the service meanwhile is not wrapped into anything."""
    shared: SharedWork[str] = SharedWork()
    with pytest.raises(OSError, match="port is taken"):
        async with shared.open():
            raise OSError("port is taken")


async def test_without_an_owner_each_does_its_own() -> None:
    """Outside `open` nothing is shared."""
    shared: SharedWork[str] = SharedWork()
    work = Work()
    work.go_on.set()
    assert [await shared.do("m", work, ignore) for _ in range(2)] == ["done"] * 2
    assert work.begun == 2
    with pytest.raises(RuntimeError):
        await shared.do("m", _broken, ignore)


async def _broken(tell: Tell) -> str:
    raise RuntimeError("no")
