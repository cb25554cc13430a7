"""The service is killed at random moments, again and again; who uses it may notice no more than a pause.

CHAOS_KILLS says how often (CHAOS_MINUTES for how long instead), CHAOS_SEED repeats the moments of a run that
printed it.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping
from itertools import takewhile
from typing import Any

import aiohttp
import pytest

from gpu_server.client import Client, Refused, TaskEvent
from gpu_server.core.errors import FailureCode
from tests.e2e.harness import Service, Services, body, check_events, until

STREAMS, SHARED = 20, 4
SETTINGS = {
    "CPU_SLOTS": 14,
    "SESSION_QUEUE_MAX_SIZE": 20,
    "DISCONNECT_GRACE_SECONDS": 30,
    "GPU_WAIT_MAX_SECONDS": 100,
    "DEFAULT_TASK_TIMEOUT": 100,
}
COUNTING = "import sys, time\nfor n in range({count}): print(n); time.sleep({delay})"


class Chaos:
    """Twenty streams that go on and on, each held against what the worker was asked to say.

    `honest` are the codes with which a stream may fail, because more than the service is being killed;
    `honest_of_starts` those of a task whose session was not ready when it came.
    """

    def __init__(
        self,
        service: Service,
        seed: int,
        honest: frozenset[str] = frozenset(),
        honest_of_starts: frozenset[str] = frozenset(),
    ) -> None:
        self.service, self.seed = service, seed
        self.honest, self.honest_of_starts = honest, honest | honest_of_starts
        self.shared: list[str] = []
        self.stopping = False
        self.kills = 0
        self.tasks: set[str] = set()
        self.done: Counter[str] = Counter()

    def client(self) -> Client:
        self.service.tenants.add("chaos")
        return Client(self.service.url, self.service.key, tenant="chaos", reconnect_seconds=300)

    async def run(self, trouble: Coroutine[Any, Any, None], patience: float) -> None:
        """Keep the streams going for as long as the trouble lasts, and then let them end."""
        async with self.client() as client, asyncio.timeout(patience):
            self.shared = [await self.new_shared(client) for _ in range(SHARED)]
            async with asyncio.TaskGroup() as group:
                for number in range(STREAMS):
                    group.create_task(self.driver(number))
                await trouble
                await until("the service serves again", lambda: self.service.health() is not None)
                self.stopping = True

    async def new_shared(self, client: Client) -> str:
        wish = {"model_id": "echo", "task_preset": "batch"}
        return str((await client.call("POST", "/api/sessions", wish))["session_id"])

    async def driver(self, number: int) -> None:
        """One stream after the other, until told to stop."""
        dice = random.Random(f"{self.seed}/{number}")
        kinds = ["shared"] * 11 + ["own"] * 3 + ["oneoff"] * 2 + ["program"] * 2 + ["detached"] * 2
        async with self.client() as client:
            while not self.stopping:
                place = dice.randrange(SHARED)
                session_id = self.shared[place]
                try:
                    await self.one_task(client, kinds[number % len(kinds)], dice, session_id)
                except Refused as refused:
                    if not self.honest or refused.code not in ("session_closed", "session_not_found"):
                        raise
                    if self.shared[place] == session_id:
                        self.shared[place] = await self.new_shared(client)

    async def one_task(self, client: Client, kind: str, dice: random.Random, session_id: str) -> None:
        count, delay = dice.choice([(20, 0), (60, 20), (200, 10), (400, 15), (3000, 0)])
        wish = {"count": count, "delay_ms": delay}
        if kind == "program":
            count = min(count, 400)
            code = COUNTING.format(count=count, delay=delay / 1000)
            content = body("program", oneoff=True, code=code)
        elif kind == "oneoff":
            content = body(oneoff=True, **wish)
        elif kind == "own":
            content = body("stream", **wish)
        else:
            content = body("batch", session=session_id, **wish)
        events: list[TaskEvent] = []
        if kind == "detached":
            accepted = await client.submit_async(content)
            source = client.follow(accepted["task_id"])
        else:
            source = client.submit(content)
        async for event in source:
            events.append(event)
        self.judge(kind, events, count)
        if kind == "own":
            await _insist(client, "DELETE", f"/api/sessions/{events[0].data['session_id']}")

    def judge(self, kind: str, events: list[TaskEvent], count: int) -> None:
        """Every event once, in order, and the end that the worker gave it."""
        check_events(events)
        task_id, end = events[0].data["task_id"], events[-1].data
        assert task_id not in self.tasks, "two submissions became one task"
        self.tasks.add(task_id)
        said = [e.data["delta"] if kind != "program" else e.data["line"] for e in events if e.event in SAID]
        wanted = [str(n) if kind == "program" else f"tok{n} " for n in range(count)]
        was_ready = events[0].data["status"] == "session_ready"
        story = _story(kind, events, said, wanted)
        if end.get("error", {}).get("code") in (self.honest if was_ready else self.honest_of_starts):
            assert said == wanted[: len(said)], story
            self.done[f"failed honestly: {end['error']['code']}"] += 1
            return
        if kind == "program" and end["status"] != "completed":
            # A plain process cannot be followed over a restart, and this is said; a container can.
            assert self.service.runtime == "process", story
            assert end["error"]["code"] == "service_restarted", story
            self.done["program, failed honestly"] += 1
            return
        assert end["status"] == "completed", story
        assert said == wanted, story
        self.done[kind] += 1

    async def kill_the_service(self, kills: int, until_time: float = 0.0) -> None:
        """kill -9 and start again, at whatever moment: at work, at rest, or in the middle of a start."""
        dice = random.Random(f"{self.seed}/killer")
        while self.kills < kills or time.monotonic() < until_time:
            await asyncio.sleep(dice.choice([dice.uniform(0, 1.5), dice.uniform(1, 4)]))
            process = self.service.process
            assert process is not None
            assert process.poll() is None, f"it ended by itself:\n{self.service.log_text()[-3000:]}"
            await asyncio.to_thread(self.service.crash)
            self.kills += 1
            self.service.launch()


SAID = ("text_delta", "logs")


def _story(kind: str, events: list[TaskEvent], said: list[str], wanted: list[str]) -> str:
    """What happened; the last line says most, since a run's report may be cut from the front."""
    seen = [f"{e.id} {e.event} {str(e.data)[:300]}" for e in events[:6] + events[-4:]]
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, wanted, strict=False)))
    end = {name: events[-1].data.get(name) for name in ("status", "error")}
    status = events[0].data.get("status")
    return "\n".join([*seen, f"{kind}, {status}: said {len(said)} of {len(wanted)}, {right} right; {end}"])


@pytest.mark.slow
@pytest.mark.timeout(0)
async def test_chaos(services: Services) -> None:
    """Killed at random moments: every stream has every event once and in order, every task its end, no slot
    was leased twice, and nothing is left over."""
    kills = int(os.environ.get("CHAOS_KILLS", "30" if services.runtime == "docker" else "12"))
    until_time = time.monotonic() + 60 * float(os.environ.get("CHAOS_MINUTES", "0"))
    seed = int(os.environ.get("CHAOS_SEED", str(secrets.randbits(32))))
    print(f"CHAOS_SEED={seed} CHAOS_KILLS={kills}")
    service = services.own(**SETTINGS).start()
    chaos = Chaos(service, seed)
    patience = 300 + 10 * kills + 120 * float(os.environ.get("CHAOS_MINUTES", "0"))
    await chaos.run(chaos.kill_the_service(kills, until_time), patience)
    assert chaos.kills >= kills
    await account(service, chaos)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_workers_are_killed_too(services: Services) -> None:
    """Workers are killed while the service is: a stream then has its beginning, once and in order, and an
    honest end."""
    honest = frozenset({FailureCode.WORKER_EXITED, FailureCode.SERVICE_RESTARTED, FailureCode.START_FAILED})
    service = services.own(**SETTINGS).start()
    chaos = Chaos(service, secrets.randbits(32), honest)

    async def trouble() -> None:
        dice = random.Random(f"{chaos.seed}/workers")
        async with asyncio.TaskGroup() as group:
            ends = group.create_task(chaos.kill_the_service(6))
            while not ends.done():
                await asyncio.sleep(dice.uniform(0.3, 1.5))
                await asyncio.to_thread(service.kill_a_worker, dice)

    await chaos.run(trouble(), 300)
    await account(service, chaos)


async def account(service: Service, chaos: Chaos) -> None:
    """What the service itself says of the tasks: as many as were submitted, each with one end; no slot was
    leased twice; and nothing is left over."""
    print(f"{chaos.kills} kills; {chaos.done.total()} streams: {dict(chaos.done)}")
    async with chaos.client() as client:
        sessions = (await client.call("GET", "/api/sessions"))["sessions"]
        assert sum(session["tasks_done"] for session in sessions) == len(chaos.tasks)
        assert all(session["queue"]["running"] == session["queue"]["waiting"] == 0 for session in sessions)
    health = service.health()
    assert health is not None
    assert health["active_tasks"] == 0
    check_leases(service.log_entries())
    await service.settle()
    assert service.terminate() == 0
    assert service.residue() == []


def check_leases(entries: Iterable[Mapping[str, Any]]) -> None:
    """By the log of all lives: a slot goes to the next session only when a wash of it has passed, and fences
    only grow."""
    holder: dict[str, str] = {}
    highest = 0
    for entry in entries:
        match entry.get("event"):
            case "session.starting":
                assert entry["fence"] > highest, entry
                highest = entry["fence"]
                for slot in entry["slots"]:
                    assert slot not in holder, (entry, holder[slot])
                    holder[slot] = entry["session_id"]
            case "session.adopting":
                highest = max(highest, entry["fence"])
                for slot in entry["slots"]:
                    # Nobody's only where the service was killed between the lease and its line in the log.
                    assert holder.setdefault(slot, entry["session_id"]) == entry["session_id"], entry
            case "wash.passed":
                holder.pop(entry["slot"], None)


async def _insist(client: Client, method: str, path: str) -> None:
    """A request without a stream, again and again until the service is there to answer it."""

    async def asked() -> bool:
        try:
            await client.call(method, path)
        except (OSError, aiohttp.ClientError):
            return False
        return True

    await until(f"{method} {path}", asked, within=60)
