"""The car wash through the whole of it: what a session leaves is gone, and that is proven to somebody who has
nothing but the bytes of certificates."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import Result
from typer.testing import CliRunner

from gpu_server import cli
from gpu_server.client import Refused
from gpu_server.sealed.wash import Verified, verify_certificate, verify_chain
from tests.e2e.harness import Caller, Service, Services, only_process, until
from tests.e2e.sealed_world import CREDENTIALS, SealedWorld, key_service
from tests.e2e.test_sealed import client_of

SLOT = "cpu0"


async def of_operator(service: Service, method: str, path: str) -> tuple[int, dict[str, Any]]:
    """What the operator is answered: the internal key, and no tenant."""
    async with (
        aiohttp.ClientSession(headers={"X-API-Key": service.key}) as http,
        http.request(method, service.url + path) as answer,
    ):
        return answer.status, await answer.json()


async def certificate(caller: Caller, h: str) -> bytes:
    """A certificate as it was signed."""
    async with caller.http.get(f"/api/certificates/{h}", headers={"Accept": "application/cbor"}) as answer:
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/cbor")
        return await answer.read()


async def chain_of(service: Service, slot_id: str = SLOT) -> list[bytes]:
    """All certificates of a slot, oldest first."""
    status, answer = await of_operator(service, "GET", f"/api/slots/{slot_id}/certificates?limit=1000")
    assert status == 200
    return [b64decode(one["certificate"]) for one in answer["certificates"]]


async def washed_after(caller: Caller, session_id: str, count: int = 1) -> dict[str, Any]:
    """The session, as soon as so many washes behind it have a certificate."""

    async def look() -> dict[str, Any] | None:
        session = await caller.session(session_id)
        return session if len(session["washed_after"]) >= count else None

    return await until("the slots are washed", look)


async def is_free(service: Service) -> None:
    await until("every slot is free", lambda: service.is_all_free(service.health()))


def residue_of(one: Verified) -> dict[str, Any]:
    """What a wash has found on the host."""
    return dict(next(step for step in one.record.steps if step.name == "residue").figures)


def wash_verify(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["wash", "verify", *map(str, arguments), "--allow-simulated"])


async def leased(caller: Caller) -> dict[str, Any]:
    """A session that has its slot; its worker is being started."""
    session_id = (await caller.open())["session_id"]
    return await caller.in_state(session_id, "preparing", "ready")


# -- certificates -------------------------------------------------------------------------------------------


async def test_a_session_ends_with_a_certificate(service: Service, caller: Caller) -> None:
    """The certificates around a session verify offline by the bytes of the interface and the node's key: they
    follow each other, and every tenant may have them, though none is named."""
    session_id = await caller.warm()
    await caller.run(session=session_id, prompt="something to leave")
    await caller.kill(session_id)
    session = await washed_after(caller, session_id)
    health = service.health()
    assert health is not None
    async with service.caller() as somebody_else:
        raws = [
            await certificate(somebody_else, h) for h in (*session["washed_before"], *session["washed_after"])
        ]
    chain = verify_chain(
        raws,
        node_key=bytes.fromhex(health["node_public_key"]),
        head=bytes.fromhex(session["washed_after"][0]),
        enclave="absent",
    )
    before, after = (one.record for one in chain.certificates)
    assert (after.slot_id, after.fence) == (session["gpu_ids"][0], session["fence"])
    assert before.fence < after.fence
    assert len(after.lease) == 32
    assert caller.tenant.encode() not in b"".join(raws)
    assert residue_of(chain.certificates[1])["run_folder"] == 1
    assert after.result("scrub") == "not_applicable"


@pytest.fixture
def own(services: Services, request: pytest.FixtureRequest) -> Iterator[Callable[..., Service]]:
    """Services of a test's own, of one slot."""
    found: list[Service] = []

    def start(**settings: object) -> Service:
        found.append(services.own(CPU_SLOTS=1, **settings).start())
        return found[-1]

    yield start
    for service in found:
        service.close()
        assert service.residue() == []


@only_process
async def test_a_chain_through_a_crash(
    own: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three leases, and kill -9 of the service in the middle of a wash: one chain, whose head is in the next
    client's own attestation. That client has verified it before it sealed anything, and what comes behind it
    has another enclave."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with key_service() as kms_url:
        service = own(ENCLAVE="simulated", KMS_ENDPOINT_URL=kms_url, **CREDENTIALS)
        world = SealedWorld(service, kms_url)
        fences = []
        async with service.caller() as caller:
            for number in range(3):
                session = await leased(caller)
                fences.append(session["fence"])
                await caller.kill(session["session_id"])
                if number == 1:
                    await service.restart()
                await is_free(service)
        raws = await chain_of(service)
        async with client_of(service) as client:
            async with await world.open(client) as opened:
                chain = verify_chain(raws, node_key=opened.washes[0].record.node_key, allow_simulated=True)
                chain = chain.up_to(opened.attestation.slots)
                assert opened.washes == (chain.certificates[-1],)
            (after,) = await opened.certificates_after()
        assert chain.from_first
        washed = [one.record.fence for one in chain.certificates]
        assert washed == sorted(washed)
        for fence, following in zip(fences, [*fences[1:], after.record.fence], strict=True):
            # One that was interrupted is done again, perhaps under the same fence.
            assert any(fence <= one < following for one in washed)
        assert after.record.prev == chain.certificates[-1].hash
        files = [tmp_path / f"{number}.cbor" for number in range(len(raws))]
        for file, raw in zip(files, raws, strict=True):
            file.write_bytes(raw)
        (tmp_path / "document").write_bytes(opened.document)
        said = wash_verify(*files, "--document", tmp_path / "document")
        assert said.exit_code == 0, said.output
        assert "tail not checked" not in said.stdout
        said = wash_verify(*files[:-1], "--document", tmp_path / "document")
        assert (said.exit_code, said.stderr[:14]) == (1, "refused (head)")
        await service.settle()
        assert service.terminate() == 0


# -- what is left -------------------------------------------------------------------------------------------

DETACH = """
import subprocess
nothing = subprocess.DEVNULL
subprocess.Popen(["sleep", "1000"], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
"""


@only_process
async def test_a_process_that_was_left(service: Service, caller: Caller) -> None:
    """A process that has left its worker's session is found, counted and ended."""
    task = await caller.run("program", oneoff=True, code=DETACH)
    session = await washed_after(caller, task.session_id)
    (h,) = session["washed_after"]
    one = verify_certificate(await certificate(caller, h), node_key=None)
    assert residue_of(one)["detached_processes"] == 1
    assert service.worker_pids() == []


@only_process
async def test_a_slot_that_cannot_be_cleaned(own: Callable[..., Service]) -> None:
    """A slot whose residue cannot be removed is locked away, with the reason, also through a restart; a wash
    by order is the only way back, and passes only when the reason is gone."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a mount in the way needs root")
    service = own(WASH_GIVE_UP_SECONDS=1)

    def slot(state: str) -> dict[str, Any] | None:
        health = service.health()
        return health["gpus"][0] if health is not None and health["gpus"][0]["state"] == state else None

    async with service.caller() as caller:
        session_id = await caller.warm()
        (folder,) = service.run_dir.glob(f"*/{session_id}/share")
        mounted = await asyncio.to_thread(
            subprocess.run, ["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip("nothing can be mounted here")
        try:
            await caller.kill(session_id)
            await until("the slot is in quarantine", lambda: slot("quarantined"))
            service.crash()
            service.launch()
            found = await until("it still is", lambda: slot("quarantined"))
            assert found["fault"] == "ask with an API key"
            _, listed = await of_operator(service, "GET", "/api/slots")
            assert listed["slots"][0]["fault"].startswith("could not be washed within 1 s: residue: ")
            status, _ = await of_operator(service, "POST", f"/api/slots/{SLOT}/wash")
            assert status == 202
            await until("it is in quarantine again", lambda: slot("quarantined"))
        finally:
            await asyncio.to_thread(subprocess.run, ["umount", str(folder)], check=True)
        before = len(await chain_of(service))
        status, washed = await of_operator(service, "POST", f"/api/slots/{SLOT}/wash")
        assert (status, washed["state"]) == (202, "washing")
        await is_free(service)
        assert len(await chain_of(service)) == before + 1
        assert (await caller.run(prompt="served again")).text == "served again"
    await service.settle(expected=frozenset({"slot.quarantined", "wash.residue_left"}))


# -- which wash ---------------------------------------------------------------------------------------------


async def test_a_wash_after_every_task(caller: Caller) -> None:
    """With `wash: per_task` each task has a session of its own, which ends with it and is washed."""
    tasks = [await caller.run("per_task", prompt=f"task {number}") for number in range(2)]
    assert tasks[0].session_id != tasks[1].session_id
    for task in tasks:
        session = await washed_after(caller, task.session_id)
        assert (session["state"], session["close_reason"], session["tasks_done"]) == (
            "closed",
            "task_done",
            1,
        )
    session_id = (await caller.open("per_task"))["session_id"]
    assert (await caller.run("per_task", session=session_id, prompt="the only one")).text == "the only one"
    with pytest.raises(Refused) as refused:
        await caller.run("per_task", session=session_id, prompt="one more")
    assert refused.value.code == "session_closed"


@only_process
async def test_the_same_tenant_again(own: Callable[..., Service]) -> None:
    """With WASH_SAME_TENANT=light a slot is washed lightly for who had it, and fully before anybody else has
    it."""
    service = own(WASH_SAME_TENANT="light")
    async with service.caller() as one, service.caller() as other:
        tiers = []
        for caller in (one, one, other):
            session = await leased(caller)
            found = verify_certificate(await certificate(caller, session["washed_before"][0]), node_key=None)
            tiers.append(found.record.tier)
            await caller.kill(session["session_id"])
            await caller.ended(session["session_id"])
        assert tiers == ["full", "light", "full"]
    await service.settle()
