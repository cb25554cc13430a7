"""Output over named pipes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_server.drivers.process_output import (
    DiscardedOutput,
    PipedOutput,
    make_no_pipes,
    make_pipes,
    open_pipes,
    remove_pipes,
)
from gpu_server.ports import Output

Pipes = tuple[PipedOutput, tuple[int, int]]


@pytest.fixture
def pipes(tmp_path: Path) -> Iterator[Pipes]:
    output, writers = make_pipes(tmp_path)
    yield output, writers
    output.close()
    for descriptor in writers:
        try:
            os.close(descriptor)
        except OSError:
            continue


async def test_both_streams_arrive_and_end_with_the_writer(pipes: Pipes) -> None:
    """A quiet stream is heard beside a loud one, and the end comes when nobody holds the pipes."""
    output, (stdout, stderr) = pipes
    os.write(stdout, b"a" * 60_000)
    os.write(stderr, b"quiet")
    first, second = await anext(output), await anext(output)
    assert {first.stream, second.stream} == {"stdout", "stderr"}
    os.close(stdout)
    os.close(stderr)
    async with asyncio.timeout(30):
        assert [piece async for piece in output] == []


async def test_a_finished_output_gives_what_is_left_and_ends(pipes: Pipes) -> None:
    """When the worker is gone the end comes, also if a stray process still holds a pipe."""
    output, (stdout, _) = pipes
    os.write(stdout, b"last words")
    output.finish()
    async with asyncio.timeout(30):
        assert [piece async for piece in output] == [Output("stdout", b"last words")]


async def test_finishing_and_closing_wake_a_reader_that_waits(pipes: Pipes) -> None:
    """A reader never waits for a worker that is gone."""
    output, _ = pipes
    asyncio.get_running_loop().call_soon(output.finish)
    async with asyncio.timeout(30):
        assert [piece async for piece in output] == []
    output.close()


async def test_pipes_of_an_adopted_worker_are_emptied(tmp_path: Path, pipes: Pipes) -> None:
    """A worker that nobody reads any more can write more than a pipe holds."""
    output, (stdout, _) = pipes
    output.close()
    discarded = DiscardedOutput(tmp_path)
    async with asyncio.timeout(30):
        await asyncio.to_thread(lambda: [os.write(stdout, b"x" * 50_000) for _ in range(20)])
    discarded.close()


async def test_pipes_that_are_there_can_be_opened_again(tmp_path: Path, pipes: Pipes) -> None:
    """A later reader gets what nobody has taken, from both streams."""
    output, (stdout, stderr) = pipes
    os.write(stdout, b"left")
    output.close()
    again = open_pipes(tmp_path)
    os.write(stderr, b"new")
    again.finish()
    async with asyncio.timeout(30):
        assert {piece.data async for piece in again} == {b"left", b"new"}


async def test_an_output_without_pipes_ends_at_once(tmp_path: Path) -> None:
    """Pipes that are gone, or links in their place, are an output with nothing in it."""
    (tmp_path / "elsewhere").write_text("not the worker's")
    (tmp_path / "stdout").symlink_to("elsewhere")
    assert [piece async for piece in open_pipes(tmp_path)] == []


def test_pipes_are_removed_once(tmp_path: Path) -> None:
    """Removing pipes that are not there is no error, and making them anew replaces what has the name."""
    (tmp_path / "stdout").touch()
    output, writers = make_pipes(tmp_path)
    for descriptor in writers:
        os.close(descriptor)
    output.close()
    remove_pipes(tmp_path)
    remove_pipes(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_an_output_that_nobody_may_read(tmp_path: Path) -> None:
    """What is written there is gone, whoever looks for it, also where there were pipes before."""
    output, before = make_pipes(tmp_path)
    output.close()
    output, writers = make_no_pipes(tmp_path)
    for descriptor in writers:
        assert os.write(descriptor, b"x" * 200_000) == 200_000
    async with asyncio.timeout(30):
        assert [piece async for piece in output] == []
        assert [piece async for piece in open_pipes(tmp_path)] == []
    assert os.listdir(tmp_path) == []
    for descriptor in (*before, *writers):
        os.close(descriptor)
