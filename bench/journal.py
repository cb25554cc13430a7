"""What it costs that nothing is lost: `python bench/journal.py [--probes 400]`.

Decisions: the traffic of tasks on warm sessions through the core alone, with the rows of each decision made,
and with those rows written to a real journal, one transaction a decision.

Warm task: from sending a request to the last event of a task of three events, through two services in turn:
one as it is, one whose journal and spool forget everything (memory only, as if there were none).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
from relay import HEADERS, KEY, PRESETS, ROOT, percentile, start_session, until_up
from unsigned import Unsigned

from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.sessions import Rules, TaskState, TaskType, Workload
from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.journal import SqliteJournal

SESSIONS = 100
ROUNDS = 5
TASKS_A_ROUND = 2000
WORK = Workload(model_id="m", task_preset="chat")

WITHOUT = """
import sys
from gpu_server import cli, service

class Journal:
    failing, wants_checkpoint = None, False
    def __init__(self, path): pass
    def open(self): pass
    def load(self):
        from gpu_server.core.rows import Table
        return {table: {} for table in Table}
    def write(self, changes): pass
    def secure(self): pass
    def certificates(self, slot_id, limit): return ()
    def prune(self, kept): pass
    def close(self): pass

class Spool:
    fault = None
    def __init__(self, root): self.inputs = {}
    def open(self): pass
    def secret(self): return b"x" * 32, True
    def known(self): return set()
    def probe(self): pass
    def put_input(self, task_id, body): self.inputs[task_id] = body
    def input(self, task_id): return self.inputs.get(task_id)
    def drop_input(self, task_id): self.inputs.pop(task_id, None)
    def put_note(self, name, note): pass
    def drop_note(self, name): pass

class Streams(service.Streams):
    def __init__(self, *, spool, **bounds): super().__init__(**bounds)

service.SqliteJournal, service.Spool, service.Streams = Journal, Spool, Streams
cli.app()
"""


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--probes", type=int, default=400)
    options = parser.parse_args()
    decisions()
    async with services() as (with_it, without):
        await warm_task(with_it, without, options.probes)


# -- decisions ----------------------------------------------------------------------------------------------


def decisions() -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-") as folder:
        journal = SqliteJournal(Path(folder) / "journal.db")
        journal.open()
        ways: dict[str, Callable[[Node], object]] = {
            "core alone": lambda node: node._touched.clear(),
            "and its rows": lambda node: node.take_changes(),
            "and the journal": lambda node: journal.write(node.take_changes()),
        }
        cost: dict[str, list[float]] = {name: [] for name in ways}
        nodes = {name: _warm_node(keep) for name, keep in ways.items()}
        for round_ in range(ROUNDS + 1):
            for name, keep in ways.items():
                seconds, count = _traffic(nodes[name], keep, f"{name}{round_}")
                if round_:
                    cost[name].append(1e6 * seconds / count)
            journal.checkpoint()  # in a thread, when it is served
        journal.close()
    print(f"a decision on {SESSIONS} warm sessions, median of {ROUNDS} (lowest to highest):")
    for name, values in cost.items():
        spread = f"({min(values):.1f} to {max(values):.1f})"
        print(f"  {name:<16} {statistics.median(values):6.1f} us   {spread}")


def _warm_node(keep: Callable[[Node], object]) -> Node:
    unsigned = Unsigned()
    node = Node(Rules(task_retention=0.5, idle_timeout=1e9, max_lifetime=1e9), judge=unsigned.judge)
    specs = tuple(
        SlotSpec(id=f"g{i}", uuid=f"GPU-{i}", name="L40S", memory_mb=46068, is_gpu=True)
        for i in range(SESSIONS)
    )
    node.handle(ev.NodeStarted(slots=specs), 0.0)
    unsigned.wash_all(node)
    for number in range(SESSIONS):
        request = ev.SessionRequested(session_id=f"s{number}", tenant="a", tier=None, workload=WORK)
        node.handle(request, 0.0)
        node.handle(ev.WorkerReady(session_id=f"s{number}"), 0.0)
    keep(node)
    return node


def _traffic(node: Node, keep: Callable[[Node], object], name: str) -> tuple[float, int]:
    """Tasks come, are read, end, and are forgotten; seconds and decisions."""
    count, now = 0, float(len(node.tasks)) + next(_HOURS)
    began = time.perf_counter()
    for number in range(TASKS_A_ROUND):
        session_id, task_id = f"s{number % SESSIONS}", f"t{name}{number}"
        now += 0.001
        for event in (
            ev.TaskSubmitted(
                task_id=task_id,
                tenant="a",
                task_type=TaskType.SESSION,
                tier=None,
                workload=WORK,
                session_id=session_id,
                new_session_id="",
                timeout=100.0,
            ),
            ev.ReaderCame(task_id=task_id),
            ev.TaskEnded(session_id=session_id, task_id=task_id, state=TaskState.COMPLETED),
            ev.ReaderLeft(task_id=task_id),
            ev.Tick(),
        ):
            node.handle(event, now)
            keep(node)
            count += 1
    return time.perf_counter() - began, count


_HOURS = itertools.count(0, 3600)


# -- a warm task --------------------------------------------------------------------------------------------


async def warm_task(with_it: str, without: str, probes: int) -> None:
    urls = {"with": with_it, "without": without}
    sessions = {name: await start_session(url) for name, url in urls.items()}
    times: dict[str, list[float]] = {name: [] for name in urls}
    async with aiohttp.ClientSession(headers=HEADERS) as http:
        for number in range(probes + 20):
            for name, url in urls.items():
                body = {"task_type": "session", "model_id": "echo", "task_preset": "bench",
                        "session_id": sessions[name], "metadata": {"count": 3}}  # fmt: skip
                began = time.perf_counter()
                async with http.post(f"{url}/api/tasks/submit", data=json.dumps(body)) as answer:
                    answer.raise_for_status()
                    await answer.read()
                if number >= 20:  # warm-up
                    times[name].append(1000 * (time.perf_counter() - began))
    print(f"\na warm task to its last event, {probes} probes each way, in turn:")
    for name, values in times.items():
        print(
            f"  {name:<8} median {statistics.median(values):6.2f} ms   p99 {percentile(values, 99):6.2f} ms"
        )
    differences = [a - b for a, b in zip(times["with"], times["without"], strict=True)]
    ratio = statistics.median(times["with"]) / statistics.median(times["without"])
    print(
        f"  the difference, median {statistics.median(differences):6.2f} ms; the ratio of medians {ratio:.2f}"
    )


@contextlib.asynccontextmanager
async def services() -> AsyncIterator[tuple[str, str]]:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="gpu-server-bench-", dir=shm) as run,
        tempfile.TemporaryDirectory(prefix="gpu-server-bench-") as disk,
    ):
        presets = Path(run) / "config" / "presets.yaml"
        presets.parent.mkdir()
        presets.write_text(PRESETS)
        processes, urls = [], []
        for name, port, program in (
            ("with", 18321, ["-m", "gpu_server.cli"]),
            ("without", 18322, ["-c", WITHOUT]),
        ):
            environment = os.environ | {
                "RUNTIME": "process", "CPU_SLOTS": "2", "HTTP_PORT": str(port), "INTERNAL_API_KEY": KEY,
                "STATE_DIR": f"{disk}/{name}", "RUN_DIR": f"{run}/{name}", "LOG_LEVEL": "error",
                "MODEL_PRESETS_FILE": str(presets), "SESSION_IDLE_TIMEOUT_SECONDS": "3000",
                "PYTHONPATH": f"{ROOT}:{ROOT}/worker_images/sdk",
            }  # fmt: skip
            processes.append(
                await asyncio.create_subprocess_exec(sys.executable, *program, "serve", env=environment)
            )
            urls.append(f"http://127.0.0.1:{port}")
        try:
            for url in urls:
                await until_up(f"{url}/health")
            yield urls[0], urls[1]
        finally:
            for process in processes:
                process.terminate()
            await asyncio.gather(*(process.wait() for process in processes))


if __name__ == "__main__":
    asyncio.run(main())
