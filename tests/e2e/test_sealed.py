"""Sealed requests through the whole of it: client, service, enclave and worker, each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from gpu_server.client import Client, DataKeyFailed, Expected, OpenRefused, Refused, TaskEvent
from gpu_server.sealed.errors import AttestationRefused
from tests.e2e.harness import Service, Services, body, until
from tests.e2e.memory import forms, found_in_files, found_in_memory, readable_bytes
from tests.e2e.sealed_world import (
    ARN,
    CREDENTIALS,
    OTHER_ARN,
    WRONG_PCR_ARN,
    WRONG_TENANT_ARN,
    SealedWorld,
    key_service,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def kms_url() -> Iterator[str]:
    """A KMS that all tests of this module share."""
    with pytest.MonkeyPatch.context() as environment, key_service() as url:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        yield url


@pytest.fixture
def settings(kms_url: str) -> dict[str, object]:
    """What makes a service serve sealed requests here."""
    return {
        "ENCLAVE": "simulated",
        "KMS_ENDPOINT_URL": kms_url,
        "DISCONNECT_GRACE_SECONDS": 20,
        **CREDENTIALS,
    }


@pytest.fixture
def world(serve: Callable[..., Service], settings: dict[str, object], kms_url: str) -> SealedWorld:
    """The service that most of these tests share."""
    return SealedWorld(serve(**settings), kms_url)


@pytest.fixture
async def client(world: SealedWorld) -> AsyncIterator[Client]:
    """A tenant of its own."""
    async with client_of(world.service) as found:
        await until("the enclave is there", lambda: enclave_is(world.service, healthy=True), within=60)
        yield found


def client_of(service: Service) -> Client:
    tenant = f"tenant-{secrets.token_hex(4)}"
    service.tenants.add(tenant)
    return Client(service.url, service.key, tenant=tenant, reconnect_seconds=60)


def enclave_is(service: Service, *, healthy: bool) -> bool:
    health = service.health()
    return health is not None and health["enclave_healthy"] is healthy


def states(service: Service) -> set[str]:
    """Of its slots."""
    health = service.health()
    return {slot["state"] for slot in health["gpus"]} if health is not None else set()


def text_of(events: list[TaskEvent]) -> str:
    return "".join(event.data["delta"] for event in events if event.event == "text_delta")


# -- it works -----------------------------------------------------------------------------------------------


async def test_a_sealed_task_is_answered(world: SealedWorld, client: Client) -> None:
    """The client verifies, seals, and reads what the worker sealed; the level is what it has verified."""
    async with await world.open(client) as session:
        assert session.assurance == "simulated"
        events = [event async for event in session.submit({"prompt": "one two three"})]
        assert text_of(events) == "one two three"
        assert all(event.sealed for event in events if event.event in ("text_delta", "text", "task_finish"))
        assert events[0].event == "connection"
        assert events[-1].data["status"] == "completed"
        again = [event async for event in session.submit({"prompt": "and again"})]
        assert text_of(again) == "and again"
        shown = await client.call("GET", f"/api/sessions/{session.session_id}")
        assert (shown["sealed"], shown["kms_key_arn"], shown["pool"]) == (True, ARN, "words")
        assert shown["log_tail"] == []


async def test_a_failure_is_told_inside(world: SealedWorld, client: Client) -> None:
    """Why a task failed may quote its input: the client reads it, the service is told only that it failed."""
    async with await world.open(client) as session:
        events = [event async for event in session.submit({"prompt": "x", "fail": "for a secret reason"})]
        assert events[-1].sealed
        assert "for a secret reason" in events[-1].data["error"]["message"]
        task_id = events[0].data["task_id"]
        assert "secret" not in str(await client.call("GET", f"/api/tasks/{task_id}"))
        assert "for a secret reason" not in world.service.log_text()


async def test_many_tasks_at_once(world: SealedWorld, client: Client) -> None:
    """Tasks of one session do not mix."""
    async with await world.open(client, pool="batch") as session:

        async def one(number: int) -> str:
            words = " ".join(f"{number}.{n}" for n in range(200))
            events = [event async for event in session.submit({"prompt": words})]
            assert text_of(events) == words
            return str(events[-1].data["status"])

        assert await asyncio.gather(*(one(n) for n in range(6))) == ["completed"] * 6


# -- what the service holds ---------------------------------------------------------------------------------


async def test_the_service_never_holds_what_is_sealed(world: SealedWorld, client: Client) -> None:
    """Neither the request nor the answer, nor the data key, is in the service's memory, logs, journal or
    spool, while a task runs and after it. The same search finds them in the worker's memory."""
    if os.geteuid() != 0 and not os.access("/proc/1/mem", os.R_OK):
        pytest.skip("reading another process's memory needs root")
    service = world.service
    mark = f"canary{secrets.token_hex(16)}"
    wanted = [*forms(mark.encode()).values(), mark.encode("utf-16-le")]
    async with await world.open(client) as session:
        data_key = world.keys.made[-1].plaintext
        secret = [*wanted, *forms(data_key).values()]
        stream = session.submit({"prompt": f"{mark} " * 40, "delay_ms": 50, "log": f"printed {mark}"})
        seen = [await anext(stream)]
        while seen[-1].event != "text_delta":
            seen.append(await anext(stream))
        assert service.process is not None
        workers = world.worker_pids(session.session_id)
        in_workers = [hit for pid in workers for hit in found_in_memory(pid, wanted)]
        assert in_workers, "the search finds nothing even where it must"
        assert readable_bytes(service.process.pid) > 20 << 20
        assert found_in_memory(service.process.pid, secret) == []
        assert found_in_files(service.folder, secret) == []
        assert [hit for pid in world.enclave_pids() for hit in found_in_memory(pid, wanted)] == []
        seen += [event async for event in stream]
        assert mark in text_of(seen)
        assert f"printed {mark}" in str([event.data for event in seen if event.event == "logs"])
    assert found_in_memory(service.process.pid, secret) == []
    assert found_in_files(service.folder, secret) == []


async def test_the_search_would_find_a_plain_task(world: SealedWorld, client: Client) -> None:
    """Positive control: what a plain task says is in the service's memory."""
    if os.geteuid() != 0 and not os.access("/proc/1/mem", os.R_OK):
        pytest.skip("reading another process's memory needs root")
    mark = f"canary{secrets.token_hex(16)}"
    events = [event async for event in client.submit(body(prompt=f"{mark} "))]
    assert mark in text_of(events)
    assert world.service.process is not None
    assert found_in_memory(world.service.process.pid, [mark.encode()])
    assert found_in_files(world.service.run_dir, [mark.encode()])


async def test_a_sealed_worker_leaves_no_log(world: SealedWorld, client: Client) -> None:
    """A worker that dies in the middle of a sealed task takes its words with it."""
    mark = f"canary{secrets.token_hex(16)}"
    session = await world.open(client)
    events = [event async for event in session.submit({"prompt": mark, "log": mark, "crash": 3})]
    assert events[-1].data["status"] == "failed"
    assert not events[-1].sealed
    shown = await client.call("GET", f"/api/sessions/{session.session_id}")
    assert shown["log_tail"] == []
    assert mark not in str(shown)
    assert mark not in world.service.log_text()
    assert found_in_files(world.service.folder, [mark.encode()]) == []


# -- restarts -----------------------------------------------------------------------------------------------


async def test_the_service_is_killed_in_the_middle(
    services: Services, settings: dict[str, object], kms_url: str
) -> None:
    """A sealed stream goes on over kill -9 of the service: every chunk once and in order, and the task runs
    once. Slots that nobody holds are washed, and so the enclave is another one; the session stays open."""
    service = services.own(**settings).start()
    world = SealedWorld(service, kms_url)
    async with client_of(service) as client:
        await until("the enclave is there", lambda: enclave_is(service, healthy=True), within=60)
        session = await world.open(client)
        epoch = session.attestation.epoch
        words = " ".join(str(n) for n in range(100))
        stream = session.submit({"prompt": words, "delay_ms": 30})
        events = []
        async for event in stream:
            events.append(event)
            if text_of(events) and text_of(events).endswith("20 "):
                await service.restart()
        assert text_of(events) == words
        await until("the other slots are free", lambda: states(service) == {"free", "leased"}, within=60)
        assert text_of([event async for event in session.submit({"prompt": "still open"})]) == "still open"
        await session.reopen()
        assert session.attestation.epoch != epoch
    await service.settle()
    assert service.terminate() == 0


async def test_an_enclave_that_dies(services: Services, settings: dict[str, object], kms_url: str) -> None:
    """Plain sessions and open sealed ones do not notice; opening is refused until the next one is there."""
    service = services.own(**settings).start()
    world = SealedWorld(service, kms_url)
    async with client_of(service) as client:
        await until("the enclave is there", lambda: enclave_is(service, healthy=True), within=60)
        session = await world.open(client, pool="batch")
        before = session.attestation.epoch
        stream = session.submit({"count": 200, "delay_ms": 20})
        seen = [await anext(stream) for _ in range(6)]
        pids = world.enclave_pids()
        assert pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # gone with the one before
                os.kill(pid, signal.SIGKILL)
        # Not by /health: the next one may be there before anybody has looked.
        await until("its death is seen", lambda: "enclave.down" in service.log_text())
        seen += [event async for event in stream]
        assert text_of(seen) == "".join(f"tok{n} " for n in range(200))
        assert text_of([event async for event in session.submit({"prompt": "still open"})]) == "still open"
        plain = [event async for event in client.submit(body(prompt="plain"))]
        assert text_of(plain) == "plain"
        await until("there is a new one", lambda: enclave_is(service, healthy=True), within=90)
        other = await world.open(client)
        assert other.attestation.epoch != before
        assert text_of([event async for event in other.submit({"prompt": "new"})]) == "new"
        assert text_of([event async for event in session.submit({"prompt": "old"})]) == "old"
    await service.settle(expected=frozenset({"enclave.down"}))
    assert service.terminate() == 0


async def test_without_an_enclave(serve: Callable[..., Service], kms_url: str) -> None:
    """A node that has none serves plain tasks, and says no to sealed ones."""
    service = serve()
    health = service.health()
    assert health is not None
    assert health["enclave_healthy"] is None
    async with client_of(service) as client:
        wish = {"pool": "words", "kms_key_arn": ARN}
        with pytest.raises(Refused) as refused:
            await client.call("POST", "/api/sessions", wish)
        assert refused.value.code in ("enclave_unavailable", "sealed_not_supported")


# -- who may do what ----------------------------------------------------------------------------------------


async def test_keys_that_kms_does_not_release(world: SealedWorld, client: Client) -> None:
    """A key whose policy wants another program, or another tenant, opens nothing, and says why."""
    with pytest.raises(Refused) as refused:
        await world.open(client, kms_key_arn=WRONG_PCR_ARN)
    assert refused.value.code == "kms_denied"
    with pytest.raises(DataKeyFailed) as failed:
        await world.open(client, kms_key_arn=WRONG_TENANT_ARN)
    assert failed.value.code == "AccessDeniedException"


async def test_a_client_that_expects_another_enclave(world: SealedWorld, client: Client) -> None:
    """With other measurements, or without accepting a simulated one, nothing is sealed."""
    with pytest.raises(AttestationRefused) as refused:
        await world.open(client, expect=Expected(pcr0="cd" * 48))
    assert refused.value.reason == "pcr"
    with pytest.raises(AttestationRefused) as refused:
        await world.open(client, allow_simulated=False)
    assert refused.value.reason == "root"


async def test_presets_decide_what_is_sealed(world: SealedWorld, client: Client) -> None:
    """`required` takes no plain work, `off` no sealed; a sealed session takes no plain task."""
    with pytest.raises(Refused) as refused:
        [e async for e in client.submit(body("only_sealed", model="secret", prompt="x"))]
    assert refused.value.code == "sealed_required"
    wish = {"model_id": "secret", "task_preset": "never", "kms_key_arn": ARN}
    with pytest.raises(Refused) as refused:
        await client.call("POST", "/api/sessions", wish)
    assert refused.value.code in ("sealed_not_supported", "invalid_request")
    async with await world.open(client, pool="only") as session:
        assert text_of([e async for e in session.submit({"prompt": "sealed"})]) == "sealed"
    async with await world.open(client) as session:
        with pytest.raises(Refused) as refused:
            [e async for e in client.submit(body(session=session.session_id, prompt="x"))]
        assert refused.value.code == "session_mismatch"


async def test_another_tenant_knows_nothing_of_it(world: SealedWorld, client: Client) -> None:
    """Another tenant can neither open, nor use, nor see the session."""
    async with await world.open(client) as session, client_of(world.service) as stranger:
        for method, path in (
            ("GET", f"/api/sessions/{session.session_id}"),
            ("DELETE", f"/api/sessions/{session.session_id}"),
        ):
            with pytest.raises(Refused) as refused:
                await stranger.call(method, path)
            assert refused.value.code == "session_not_found"
        with pytest.raises(Refused) as refused:
            await world.open(stranger, pool=None, session_id=session.session_id)
        assert refused.value.code == "session_not_found"


async def test_a_key_of_the_tenants_own_does_not_open_another_session(
    world: SealedWorld, client: Client
) -> None:
    """A session has the KMS key that it was made with, and no other."""
    async with await world.open(client) as session:
        with pytest.raises(OpenRefused):
            await world.open(client, pool=None, session_id=session.session_id, kms_key_arn=OTHER_ARN)
        assert text_of([e async for e in session.submit({"prompt": "as before"})]) == "as before"
