"""What a wash takes, and whether a slot was ever free without one.

    python bench/carwash.py [--cycles 50] [--kill-every 10] [--fakes 1000] [--runtime docker|process]
                            [--enclave simulated|off]

Real cycles: one slot, for which sessions queue. Each is started, killed when its worker is ready, and its
slot is washed while the next one waits; in each `--kill-every`th the service is killed (-9) in the middle of
the wash, and started again. Afterwards the certificates of the slot are fetched and verified, without the
service, as one chain up to its newest record, and every lease is looked for in it: the certificate that it
began with must be there, with no other lease between the two.

Wall-clock and steps are those of the records. The wait of the next session is from telling the one before it
to end until it has the slot.

Cycles with fakes: the service's engine in this process, with runtime, GPUs and disk played, steps that fail,
cannot be reached or crash at random, and restarts. After each decision the certificate of every free slot is
verified.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from relay import KEY, ROOT, call, percentile, until_up

from gpu_server.sealed.wash import NO_CERTIFICATE, STEPS, Chain, WashRefused, verify_certificate, verify_chain

PORT = 18317
SLOT = "cpu0"
WISH = {"model_id": "echo", "task_preset": "bench"}
LOOK_SECONDS = 0.002
PRESETS = f"""
models:
  echo:
    bench:
      docker_image: gpu-server/echo:dev
      process_command: [python, {ROOT}/worker_images/echo/worker.py]
      model: none
      memory: 256m
      cpus: 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a session says of its lease."""

    session_id: str
    fence: int
    before: str


@dataclass
class Served:
    """The service, which may be killed and started again."""

    folder: Path
    runtime: str
    enclave: str
    process: asyncio.subprocess.Process | None = None
    url: str = f"http://127.0.0.1:{PORT}"

    async def start(self) -> None:
        environment = os.environ | {
            "RUNTIME": self.runtime, "CPU_SLOTS": "1", "HTTP_PORT": str(PORT), "LOG_LEVEL": "warning",
            "INTERNAL_API_KEY": KEY,
            "STATE_DIR": str(self.folder / "state"), "RUN_DIR": str(self.folder / "run"),
            "MODEL_PRESETS_FILE": str(self.folder / "presets.yaml"), "ENCLAVE": self.enclave,
            "GPU_WAIT_MAX_SECONDS": "600", "PYTHONPATH": f"{ROOT}:{ROOT}/worker_images/sdk",
        }  # fmt: skip
        with (self.folder / "service.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gpu_server.cli", "serve", env=environment, stdout=log, stderr=log
            )
        await until_up(f"{self.url}/docs")

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def session(self) -> str:
        return str((await call(self.url, "POST", "/api/sessions", WISH))["session_id"])

    async def until(self, session_id: str, *states: str) -> dict[str, Any]:
        """The session, as soon as it is in one of these states."""
        while True:
            found = await call(self.url, "GET", f"/api/sessions/{session_id}")
            if found["state"] in states:
                return found
            if found["error"]:
                raise SystemExit(
                    f"{session_id}: {found['error']}\n{(self.folder / 'service.log').read_text()}"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def slot(self) -> dict[str, Any]:
        return dict((await call(self.url, "GET", "/api/slots"))["slots"][0])


@contextlib.asynccontextmanager
async def service(runtime: str, enclave: str) -> AsyncIterator[Served]:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-", dir=shm) as name:
        folder = Path(name)
        folder.chmod(0o711)
        (folder / "presets.yaml").write_text(PRESETS)
        served = Served(folder, runtime, enclave)
        await served.start()
        try:
            yield served
        finally:
            assert served.process is not None
            served.process.terminate()
            await served.process.wait()


# -- real cycles --------------------------------------------------------------------------------------------


async def real_cycles(options: argparse.Namespace) -> None:
    waits: list[float] = []
    leases: list[Lease] = []
    killed = 0
    async with service(options.runtime, options.enclave) as served:
        present = await served.session()
        for number in range(1, options.cycles + 1):
            now = await served.until(present, "ready")
            (before,) = now["washed_before"]
            leases.append(Lease(session_id=present, fence=now["fence"], before=before))
            waiting = await served.session()
            await served.until(waiting, "waiting")
            began = time.perf_counter()
            await call(served.url, "DELETE", f"/api/sessions/{present}")
            if options.kill_every and number % options.kill_every == 0:
                killed += 1
                await asyncio.sleep(random.uniform(0, statistics.median(waits or [0.5])))
                await served.kill()
                await served.start()
            await served.until(waiting, "preparing", "ready")
            if not (options.kill_every and number % options.kill_every == 0):
                waits.append(time.perf_counter() - began)
            present = waiting
        now = await served.until(present, "ready")
        leases.append(Lease(session_id=present, fence=now["fence"], before=now["washed_before"][0]))
        await call(served.url, "DELETE", f"/api/sessions/{present}")
        while (slot := await served.slot())["state"] != "free":
            await asyncio.sleep(LOOK_SECONDS)
        health = await call(served.url, "GET", "/health")
        listed = await call(served.url, "GET", f"/api/slots/{SLOT}/certificates?limit=1000")
    chain = verify_chain(
        [base64.b64decode(one["certificate"]) for one in listed["certificates"]],
        node_key=bytes.fromhex(health["node_public_key"]),
        head=bytes.fromhex(slot["certificate"]),
        enclave="required" if options.enclave != "off" else "absent",
        allow_simulated=True,
    )
    title = (
        f"{options.cycles} cycles with real {'containers' if options.runtime == 'docker' else 'processes'}"
    )
    print(f"{title}, enclave {options.enclave}, the service killed in {killed} washes:")
    tell_times(chain, waits)
    wrong = sum(not is_proven(lease, chain) for lease in leases)
    print(f"  {len(chain.certificates)} certificates verified as one chain up to the newest record")
    print(f"  slots free without a valid certificate: {wrong} of {len(leases)} leases")


def is_proven(lease: Lease, chain: Chain) -> bool:
    """Whether the lease began with a certificate of the chain, of a wash behind all earlier leases."""
    for place, one in enumerate(chain.certificates):
        if one.record_hash.hex() == lease.before:
            later = chain.certificates[place + 1 :]
            return one.record.fence < lease.fence and all(
                lease.fence <= other.record.fence for other in later
            )
    return False


def tell_times(chain: Chain, waits: list[float]) -> None:
    records = [one.record for one in chain.certificates if one.record.lease]
    walls = [max(s.ended_ms for s in r.steps) - min(s.started_ms for s in r.steps) for r in records]
    sums = [sum(s.ended_ms - s.started_ms for s in r.steps) for r in records]
    print(f"  a wash, to its record      {of(walls)}")
    ratio = statistics.median(wall / max(sum_, 1) for wall, sum_ in zip(walls, sums, strict=True))
    print(f"  the sum of its steps       {of(sums)}   wall-clock to sum {ratio:.2f}")
    for place, name in enumerate(STEPS):
        print(f"    {name:<24} {of([r.steps[place].ended_ms - r.steps[place].started_ms for r in records])}")
    print(f"  the next session waits     {of([1000 * seconds for seconds in waits])}")


def of(values: list[float] | list[int]) -> str:
    numbers = [float(value) for value in values]
    return f"median {statistics.median(numbers):7.0f} ms   p95 {percentile(numbers, 95):7.0f} ms"


# -- with fakes ---------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Looks at every free slot: its newest certificate must be there, verify, and be of its last wash."""

    world: Any
    looks: int = 0
    wrong: int = 0
    known: dict[bytes, bool] = field(default_factory=dict)

    def look(self) -> None:
        for slot in self.world.engine.node.slots:
            if slot.state == "free":
                self.looks += 1
                self.wrong += not self._is_proven(slot)

    def _is_proven(self, slot: Any) -> bool:
        if slot.head == NO_CERTIFICATE or slot.pending is not None:
            return False
        if slot.head not in self.known:
            row = self.world.journal.certificate(slot.head.hex())
            self.known[slot.head] = row is not None and self._holds(row, slot)
        return self.known[slot.head]

    def _holds(self, row: Any, slot: Any) -> bool:
        try:
            found = verify_certificate(
                base64.b64decode(row["certificate"]), node_key=self.world.seal.public_key, enclave="absent"
            )
        except WashRefused:
            return False
        same = (found.record.slot_id, found.record.slot_uuid) == (slot.spec.id, slot.spec.uuid)
        return same and found.record.fence == slot.fence and found.hash == slot.prev


async def fake_cycles(cycles: int, seed: int) -> None:
    """Sessions come and go on two played GPUs, whose washes fail at random."""
    sys.path[:0] = [str(ROOT), str(ROOT / "enclave_image"), str(ROOT / "worker_images/sdk")]
    from gpu_server.core import events as ev
    from gpu_server.ports import Dirty, WashUnreachable
    from tests.app.world import engine_life, machine_world, slot_specs

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    dice, outcomes = random.Random(seed), Counter[str]()
    troubles: list[Exception | None] = [
        None,
        None,
        Dirty("a word"),
        WashUnreachable("away"),
        RuntimeError("a bug"),
    ]
    began, done, looks, wrong, lives = time.perf_counter(), 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="gpu-server-bench-") as name:
        async with machine_world(Path(name), slots=slot_specs(2, gpu=True), give_up=20.0) as world:
            while done < cycles:
                lives += 1
                world.scrubber.failure = world.gates.failure = None
                async with engine_life(world) as engine:
                    watch = Watch(world)
                    engine.on_decided = lambda watch=watch: (world.decided(), watch.look())
                    for _ in range(dice.randint(20, 60)):
                        for slot in engine.node.slots:
                            if slot.state == "quarantined":
                                engine.decide(ev.SlotWashOrdered(slot_id=slot.spec.id))
                        await settle(world)
                        if not any(slot.state == "free" for slot in engine.node.slots):
                            world.scrubber.failure = world.gates.failure = None
                            continue
                        done += 1
                        session_id = world.request(f"s_{lives}x{done}")
                        await world.ready(session_id)
                        world.scrubber.failure, world.gates.failure = (
                            dice.choice(troubles),
                            dice.choice(troubles),
                        )
                        engine.decide(ev.SessionKillRequested(session_id=session_id, tenant="a"))
                        if dice.random() < 0.05:
                            break  # this life ends in the middle of the wash
                        await settle(world)
                        outcomes.update(str(slot.state) for slot in engine.node.slots)
                        world.scrubber.failure = world.gates.failure = None
                    world.kill()
                looks, wrong = looks + watch.looks, wrong + watch.wrong
    seconds = time.perf_counter() - began
    print(f"{done} cycles with fakes, in {lives} lives of the service, seed {seed}, {seconds:.0f} s:")
    print(
        f"  slots behind their washes: {', '.join(f'{n} {state}' for state, n in sorted(outcomes.items()))}"
    )
    print(f"  slots free without a valid certificate: {wrong} of {looks} looks")


async def settle(world: Any) -> None:
    """Until nothing is being washed; time goes on for those who wait."""
    while any(slot.state == "washing" for slot in world.engine.node.slots):
        await asyncio.sleep(0.0005)
        if not world.scrubber.running:
            world.clock.advance(0.5)


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--kill-every", type=int, default=10, metavar="N")
    parser.add_argument("--fakes", type=int, default=1000, metavar="CYCLES")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runtime", choices=("docker", "process"), default="docker")
    parser.add_argument("--enclave", choices=("simulated", "off"), default="simulated")
    options = parser.parse_args()
    if options.cycles:
        await real_cycles(options)
    if options.fakes:
        await fake_cycles(options.fakes, options.seed)


if __name__ == "__main__":
    asyncio.run(main())
