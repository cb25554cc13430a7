"""Decisions per second in the core, as sessions grow: `python bench/core.py`.

A decision is one event handled by the node. Two kinds of traffic are measured on a node of 1,000 slots:

tasks     on warm sessions: a task is submitted, gets a reader, ends, loses its reader, and time passes
turnover  of sessions: one is killed, its container goes, its slot is washed, the next session takes the slot
          and gets ready, a new one joins, the oldest tombstone is forgotten

Sessions beyond the slots are over (tombstones, still readable) or waiting in the line. Whenever the line
moves everyone in it gets a new place, so there the work of one turnover grows with the line, which is bounded
by `GPU_WAIT_MAX_TASKS` (100 unless set).
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unsigned import Unsigned

from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.sessions import Rules, TaskState, TaskType, Workload
from gpu_server.core.slots import SlotSpec

SLOTS = 1000
ROUNDS = 5
SECONDS_A_ROUND = 0.3
FOR_EVER = 1e9
TASKS_KEPT = 1000
WORK = Workload(model_id="m", task_preset="chat")
CASES = [  # sessions with slots, tombstones, waiting
    (10, 0, 0),
    (100, 0, 0),
    (1000, 0, 0),
    (1000, 9000, 0),
    (1000, 0, 100),
    (1000, 0, 1000),
    (1000, 0, 9000),
]


class Traffic:
    """A node in a steady state: so many sessions have slots, so many are over, so many wait."""

    def __init__(self, live: int, over: int, waiting: int) -> None:
        rules = Rules(
            ended_sessions_max=1_000_000,
            ended_tasks_max=1_000_000,
            idle_timeout=FOR_EVER,
            max_lifetime=FOR_EVER,
            gpu_wait_max=FOR_EVER,
            gpu_wait_max_tasks=waiting + 1,
            task_retention=TASKS_KEPT / 1000,
            tombstone_retention=over + 0.5,
        )
        self.unsigned = Unsigned()
        self.node = Node(rules, judge=self.unsigned.judge)
        self.now = 0.0
        self.decisions = 0
        self._names = itertools.count()
        specs = [
            SlotSpec(id=f"g{i}", uuid=f"GPU-{i}", name="L40S", memory_mb=46068, is_gpu=True)
            for i in range(SLOTS)
        ]
        self._send(ev.NodeStarted(slots=tuple(specs)))
        for spec in specs:
            self._wash(spec.id)
        self.warm = [self._join() for _ in range(live)]
        for session_id in self.warm:
            self._send(ev.WorkerReady(session_id=session_id))
        for place in range(over):
            self.turn_over(place % live)
        for _ in range(waiting if live == SLOTS else 0):
            self._join()
        assert len(self.node.sessions) == live + over + waiting, len(self.node.sessions)

    def run_task(self, place: int) -> None:
        """One task on a warm session, from its first event to its last, takes a millisecond."""
        session_id, task_id = self.warm[place], f"t{next(self._names)}"
        self._send(
            ev.TaskSubmitted(
                task_id=task_id,
                tenant="ann",
                task_type=TaskType.SESSION,
                tier=None,
                workload=WORK,
                session_id=session_id,
                new_session_id="",
                timeout=60.0,
            )
        )
        self._send(ev.ReaderCame(task_id=task_id))
        self.now += 0.001
        self._send(ev.TaskEnded(session_id=session_id, task_id=task_id, state=TaskState.COMPLETED))
        self._send(ev.ReaderLeft(task_id=task_id))
        self._send(ev.Tick())

    def turn_over(self, place: int) -> None:
        """One session ends, and its slot goes to the next."""
        ended = self.warm[place]
        (slot_id,) = self.node.sessions[ended].slot_ids
        self._send(ev.SessionKillRequested(session_id=ended, tenant="ann"))
        self._send(ev.ContainerGone(session_id=ended))
        new = self._join()
        self._wash(slot_id)
        self.warm[place] = self.node.slots[slot_id].holder or new
        self._send(ev.WorkerReady(session_id=self.warm[place]))
        self.now += 1.0
        self._send(ev.Tick())

    def _join(self) -> str:
        name = f"s{next(self._names)}"
        self._send(ev.SessionRequested(session_id=name, tenant="ann", tier=None, workload=WORK))
        return name

    def _wash(self, slot_id: str) -> None:
        for event in self.unsigned.wash(self.node.slots[slot_id]):
            self._send(event)

    def _send(self, event: ev.Event) -> None:
        self.decisions += 1
        self.node.handle(event, self.now)
        self.node.next_deadline()  # as the engine does after every event


def rate(traffic: Traffic, step: Callable[[int], None]) -> float:
    """Decisions per second: the median of some rounds."""
    rates, place = [], 0
    for _ in range(ROUNDS):
        gc.collect()
        decisions, start = traffic.decisions, time.perf_counter()
        while time.perf_counter() - start < SECONDS_A_ROUND:
            place = (place + 7919) % len(traffic.warm)
            step(place)
        rates.append((traffic.decisions - decisions) / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    print(f"decisions per second, {SLOTS} slots")
    print(f"{'sessions':>9}{'with slots':>12}{'over':>7}{'waiting':>9}{'tasks':>12}{'turnover':>12}")
    for live, over, waiting in CASES:
        traffic = Traffic(live, over, waiting)
        tasks, turnover = rate(traffic, traffic.run_task), rate(traffic, traffic.turn_over)
        total = live + over + waiting
        print(f"{total:>9,}{live:>12,}{over:>7,}{waiting:>9,}{tasks:>12,.0f}{turnover:>12,.0f}", flush=True)


if __name__ == "__main__":
    main()
