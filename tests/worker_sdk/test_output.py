import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_worker
import pytest
from gpu_worker import BlockingEmitter, Emitter, Task, Worker
from gpu_worker.history import History
from gpu_worker.output import TaskOutput, captured, current


def lines(events: list[Any]) -> list[tuple[str, str]]:
    return [(data["stream"], data["line"]) for _, event, data in events if event == "logs"]


async def test_concurrent_tasks_are_told_apart(start: Callable[..., Any]) -> None:
    """Each of two tasks that print in turns gets its own lines and no other, also from threads."""
    worker = Worker()
    both = asyncio.Barrier(2)

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        for number in range(3):
            await both.wait()
            print(task.id, number)
            await asyncio.to_thread(print, task.id, "thread", number, file=sys.stderr)

    async with start(worker) as client, asyncio.TaskGroup() as group:
        runs = {name: group.create_task(client.run(name)) for name in ("a", "b")}
    for name, run in runs.items():
        assert lines(run.result()) == [
            line
            for number in range(3)
            for line in (("stdout", f"{name} {number}"), ("stderr", f"{name} thread {number}"))
        ]


async def test_a_plain_function_prints_too(
    start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines come whole, the last one also without its line end, and all reach the real streams."""
    worker = Worker()

    @worker.task
    def run(task: Task, emit: BlockingEmitter) -> None:
        print("be", end="")
        emit.text("x")
        print("gun")
        sys.stdout.writelines(["one\n", "two\n"])
        print("no end", end="")

    async with start(worker) as client:
        events = await client.run("t")
    assert [event for _, event, _ in events] == ["text", "logs", "logs", "logs", "logs", "end"]
    assert lines(events) == [("stdout", line) for line in ("begun", "one", "two", "no end")]
    assert capsys.readouterr().out == "begun\none\ntwo\nno end"


async def test_what_is_printed_outside_a_task_belongs_to_none(
    start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading prints to the real stream only."""
    worker = Worker()

    @worker.load
    async def load(progress: Any) -> None:
        print("loading")

    @worker.task
    async def run(task: Task, emit: Emitter) -> None:
        print("running")

    async with start(worker) as client:
        assert lines(await client.run("t")) == [("stdout", "running")]
    assert capsys.readouterr().out == "loading\nrunning\n"


async def read(history: History) -> bytes:
    with history.reader(0) as reader:
        data = await reader.ready()
        reader.took()
        return data


async def test_a_progress_bar_leaves_its_last_state() -> None:
    """What was drawn over with carriage returns is not kept."""
    history = History(100_000)
    output = TaskOutput(history)
    for step in range(1000):
        output.write("stderr", f"\r{step} of 999")
    output.write("stderr", "\n")
    assert (await read(history)).count(b"data:") == 1
    assert b'"line":"999 of 999"' in await read(history)


async def test_a_very_long_line_is_cut() -> None:
    """Output without line ends is sent in pieces and does not pile up."""
    history = History(1 << 20)
    output = TaskOutput(history)
    output.write("stdout", "a" * 40_000)
    assert history.last == 2
    output.write("stdout", "b" * 20_000 + "\n")
    assert history.last == 4


async def test_printing_never_waits_and_says_what_it_left_out() -> None:
    """Lines that find the history full are counted, and the count is told when there is room again."""
    history = History(1000)
    output = TaskOutput(history)
    for _ in range(100):
        output.write("stdout", "line\n")
    kept = history.last
    await read(history)
    output.write("stdout", "room again\n")
    with history.reader(kept) as reader:
        data = await reader.ready()
    assert f"{100 - kept} lines left out".encode() in data
    assert b"room again" in data


async def test_lines_left_out_at_the_end_are_told_too() -> None:
    """A task that ends with a full history still says how many lines are missing."""
    history = History(200)
    output = TaskOutput(history)
    for _ in range(10):
        output.write("stdout", "line\n")
    assert b"lines left out" in output.rest()[0]


async def test_a_private_task_prints_for_itself_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines are its events, and not the process's output."""
    history = History(1000)
    with captured():
        token = current.set(TaskOutput(history, private=True))
        print("secret")
        current.reset(token)
        print("not of a task")
    assert b"secret" in await read(history)
    assert capsys.readouterr().out == "not of a task\n"


def test_a_hushed_process() -> None:
    """Native code writes nowhere from the beginning, Python's own streams from when it is asked for on."""
    program = (
        "import os, sys\n"
        "from gpu_worker.output import hushed\n"
        "with hushed() as hush:\n"
        "    os.write(1, b'native'); os.system('echo child')\n"
        "    print('before', flush=True); print('before', file=sys.stderr)\n"
        "    hush()\n"
        "    print('after', flush=True); print('after', file=sys.stderr)\n"
        "print('when all is over')\n"
    )
    ended = run_program(program)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("before\n", "before\n", 0)


def test_a_process_that_is_never_hushed_has_its_descriptors_back() -> None:
    """So it can still say why it ends, where nothing had begun that it must not tell."""
    program = (
        "from gpu_worker.output import hushed\n"
        "with hushed():\n"
        "    pass\n"
        "print('ends', flush=True)\n"
        "raise OSError('the reason')\n"
    )
    ended = run_program(program)
    assert ended.stdout == "ends\n"
    assert ended.stderr.endswith("OSError: the reason\n")


def test_a_hushed_process_without_streams() -> None:
    """Whoever starts it may have closed them."""
    program = (
        "import os\n"
        "os.close(1); os.close(2)\n"
        "from gpu_worker.output import hushed\n"
        "with hushed() as hush:\n"
        "    print('before', flush=True); hush(); print('after', flush=True)\n"
    )
    assert run_program(program).returncode == 0


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(gpu_worker.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
