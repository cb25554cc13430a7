"""Fifty clients at once do whatever they like; afterwards everything is accounted for.

CROWD_SECONDS says for how long, CROWD_SEED repeats what the clients decided in a run that printed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import time
from collections import Counter
from typing import Any

import pytest

from gpu_server.client import Refused, read_events
from gpu_server.core.errors import FailureCode, RefusalCode
from tests.e2e.harness import Caller, Following, Service, Services, body, until

CLIENTS, TENANTS = 50, 10
SETTINGS = {
    "CPU_SLOTS": 4,
    "GPU_WAIT_MAX_SECONDS": 6,
    "GPU_WAIT_MAX_TASKS": 25,
    "SESSION_IDLE_TIMEOUT_SECONDS": 2,
    "SESSION_MAX_LIFETIME_SECONDS": 15,
    "LIFETIME_GRACE_SECONDS": 1,
    "CANCEL_GRACE_SECONDS": 1,
}
WISHES: list[dict[str, Any]] = [
    {"prompt": "one two three four"},
    {"count": 40, "delay_ms": 10},
    {"count": 2000},
    {"hang": True},
    {"hang": True, "ignore_cancel": True},
    {"fail": "no luck"},
    {"crash": 3},
    {"garbage": True},
    {"half_frame": True},
]
WEIGHTS = [30, 20, 8, 14, 3, 8, 4, 2, 2]


class Crowd:
    """What the clients did, for the account at the end."""

    def __init__(self, service: Service, seed: int, seconds: float) -> None:
        self.service, self.seed = service, seed
        self.until = time.monotonic() + seconds
        self.accepted: dict[str, str] = {}
        self.refused: Counter[str] = Counter()
        self.sessions: dict[str, list[tuple[str, str]]] = {f"crowd-{n}": [] for n in range(TENANTS)}

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until

    async def client(self, number: int) -> None:
        """One client: submits again and again, and treats each task as it pleases."""
        dice = random.Random(f"{self.seed}/{number}")
        tenant = f"crowd-{number % TENANTS}"
        async with self.service.caller(tenant) as caller:
            while self.goes_on:
                try:
                    await self.one_task(caller, dice)
                except Refused as refused:
                    self.refused[refused.code] += 1
                    await asyncio.sleep(dice.uniform(0, 0.5))

    async def one_task(self, caller: Caller, dice: random.Random) -> None:
        sessions, kind = self.sessions[caller.tenant], dice.random()
        wish = dice.choices(WISHES, WEIGHTS)[0]
        if kind < 0.15:
            content = body("program", oneoff=True, code=dice.choice(["print(1)", "1/0", "while True: pass"]))
        elif kind < 0.25:
            content = body(oneoff=True, **wish)
        elif kind < 0.32:
            content = body(dice.choice(["exit", "bad_event", "no_end", "symlink"]), model="hostile")
        elif kind < 0.7 and sessions:
            session_id, preset = dice.choice(sessions[-2:])
            content = body(preset, session=session_id, **wish)
        else:
            content = body(dice.choice(["stream", "batch"]), **wish)
        content["timeout_seconds"] = dice.uniform(0.2, 4)
        async with caller.http.post("/api/tasks/submit", json=content) as answer:
            if answer.status != 200:
                if "session_id" in content:
                    with contextlib.suppress(ValueError):
                        sessions.remove((content["session_id"], content["task_preset"]))
                raise Refused(answer.status, await answer.json(content_type=None))
            task = Following(read_events(answer.content))
            await task.until("connection")
            self.accepted[task.task_id] = caller.tenant
            entry = (task.session_id, content["task_preset"])
            if content["task_type"] == "session" and content["model_id"] == "echo" and entry not in sessions:
                sessions.append(entry)
            fate = dice.choice(["stay", "stay", "stay", "stay", "cancel", "leave", "kill", "look"])
            patience = 60.0 if fate == "stay" else dice.expovariate(1.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    async for _ in task._source:
                        pass
            if fate == "cancel":
                await caller.cancel(task.task_id)
            elif fate == "kill":
                await asyncio.gather(caller.kill(task.session_id), caller.kill(task.session_id))
            elif fate == "look":
                await caller.session(task.session_id)
                await caller.keep_alive(task.session_id)
            elif fate == "leave":
                return
            if fate != "look":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(60):
                        async for _ in task._source:
                            pass

    async def outsider(self) -> None:
        """Somebody who kills workers behind the service's back."""
        dice = random.Random(f"{self.seed}/outsider")
        while self.goes_on:
            await asyncio.sleep(dice.uniform(0.5, 2))
            await asyncio.to_thread(self.service.kill_a_worker, dice)

    async def account(self) -> Counter[str]:
        """Read every accepted task again; how they ended."""
        ends: Counter[str] = Counter()
        callers = {tenant: self.service.caller(tenant) for tenant in self.sessions}
        async with contextlib.AsyncExitStack() as stack:
            for caller in callers.values():
                await stack.enter_async_context(caller)
            for task_id, tenant in self.accepted.items():
                async with callers[tenant].events(task_id) as again:
                    end = await again.finish()
                ends[end.get("error", {}).get("code", end["status"])] += 1
        return ends


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_crowd(services: Services) -> None:
    """Every task accepted has one end, every refusal a reason, and nothing is left of any of it."""
    seconds = float(os.environ.get("CROWD_SECONDS", "60"))
    if services.runtime == "process":
        seconds /= 3
    seed = int(os.environ.get("CROWD_SEED", str(secrets.randbits(32))))
    print(f"CROWD_SEED={seed} CROWD_SECONDS={seconds:g}")
    service = services.own(**SETTINGS).start()
    crowd = Crowd(service, seed, seconds)
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.outsider())
        for number in range(CLIENTS):
            group.create_task(crowd.client(number))

    await service.settle()
    ends = await crowd.account()
    print(f"{len(crowd.accepted)} tasks: {dict(ends)}; refused: {dict(crowd.refused)}")
    known = set(RefusalCode) - {RefusalCode.INTERNAL, RefusalCode.INVALID_REQUEST, RefusalCode.UNAUTHORIZED}
    assert set(crowd.refused) <= known
    assert "completed" in ends
    assert set(ends) <= {*FailureCode, "completed"} - {FailureCode.INTERNAL, FailureCode.NOT_CLEANED}
    async with service.caller() as caller:
        assert (await caller.run(prompt="and on it goes")).text == "and on it goes"
    assert service.terminate() == 0
    await until("nothing is left", lambda: not service.residue())
    assert service.errors() == []
