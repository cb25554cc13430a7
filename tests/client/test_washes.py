"""The washes around a sealed session: a service that cheats with them gets nothing sealed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gpu_server.client import Expected, Refused, SyncClient, WashNotProven
from gpu_server.client.washes import MAX_SLOTS, MAX_WASHES, Lease
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.app.api_world import KEY
from tests.client.sealed_world import (
    FENCE,
    MEASUREMENTS,
    NODE_KEY,
    PCR0,
    PlayedEnclave,
    SealedService,
    Washed,
    sealed_world,
    washed,
)
from tests.client.test_sealed import EXPECTED, PROMPT, asked, opened, said, submit
from tests.sealed.washes import GPU, STAND_IN

OTHER_NODE = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
SECOND: dict[str, Any] = {"slot_id": "1", "slot_uuid": GPU[:-1] + "1"}
SESSION = {"gpu_ids": ["0"], "fence": FENCE, "washed_before": ["00" * 32]}

Twist = Callable[[SealedService], object]


@cache
def other_program() -> PlayedEnclave:
    """An enclave with another PCR0."""
    return PlayedEnclave(SoftwareNsm({**MEASUREMENTS, 0: b"\7" * 48}))


def by(**fields: Any) -> Twist:
    """The wash before the session was another one."""
    return lambda service: service.washed_by(washed(**fields))


def swapped(make: Callable[[Washed], bytes]) -> Twist:
    """Behind the hash of the wash before the session stands this certificate."""

    def twist(service: SealedService) -> None:
        true = service.before[0]
        service.washes[true.h] = Washed(make(true), true.h)

    return twist


def shows(**fields: Any) -> Twist:
    return lambda service: service.session.update(fields)


def two(second: Washed, **fields: Any) -> Twist:
    """The session has two slots, of which the second was washed so."""

    def twist(service: SealedService) -> None:
        service.washed_by(washed(), second)
        service.session.update({"gpu_ids": ["0", "1"], **fields})

    return twist


def unlisted(service: SealedService) -> None:
    service.attested = [bytes(32)]


BEFORE: dict[str, tuple[str, Twist]] = {
    "no washes": ("missing", shows(washed_before=None)),
    "an empty list": ("missing", shows(washed_before=[])),
    "no slots": ("missing", shows(gpu_ids=[], washed_before=[])),
    "slots that are none": ("malformed", shows(gpu_ids=[["0"]])),
    "no list": ("malformed", shows(washed_before={"a": 1})),
    "hashes that are none": ("malformed", shows(washed_before=["x" * 64])),
    "too many": ("malformed", shows(washed_before=["00" * 32] * (MAX_SLOTS + 1))),
    "no fence": ("missing", shows(fence=None)),
    "a fence that is none": ("missing", shows(fence=True)),
    "one wash for two slots": ("missing", shows(gpu_ids=["0", "1"])),
    "the same wash twice": ("slot", two(washed())),
    "the same slot twice": ("slot", two(washed(**SECOND), gpu_ids=["0", "0"])),
    "a wash that the enclave does not list": ("unlisted", unlisted),
    "no certificate": ("not_found", lambda service: service.washes.clear()),
    "bytes": ("malformed", swapped(lambda _: b"none")),
    "too many bytes": ("malformed", swapped(lambda _: bytes(1 << 17))),
    "another certificate": ("malformed", swapped(lambda _: washed(fence=6).raw)),
    "a changed certificate": ("signature", swapped(lambda true: true.raw[:-1] + bytes([true.raw[-1] ^ 1]))),
    "no enclave": ("document", by(sealed=False)),
    "another enclave program": ("pcr", lambda s: s.washed_by(washed(other_program()))),
    "a light wash": ("tier", by(tier="light", scrub="skipped")),
    "another slot": ("slot", by(**SECOND)),
    "a wash after the lease": ("fence", by(fence=FENCE)),
    "the second slot is another": ("slot", two(washed(**SECOND), gpu_ids=["0", "2"])),
    "two slots of one device": ("slot", two(washed(slot_id="1"))),
    "two nodes": ("node_key", two(washed(key=OTHER_NODE, **SECOND))),
}


@pytest.mark.parametrize("attack", BEFORE)
async def test_a_wash_that_is_not_proven(attack: str) -> None:
    """A session whose slots are not proven to be washed is not used: nothing is sealed, and it is ended."""
    reason, twist = BEFORE[attack]
    async with sealed_world() as (client, service):
        twist(service)
        with pytest.raises(WashNotProven) as unproven:
            await opened(client, service)
        assert unproven.value.reason == reason
        assert "POST /inference" not in asked(service)
        assert service.ended == ["s_1"]


async def test_washes_that_hold() -> None:
    """The certificates are the client's to keep, of one node, in the order of the slots."""
    async with sealed_world() as (client, service):
        two(washed(**SECOND))(service)
        async with await opened(client, service, node_key=NODE_KEY) as session:
            assert [one.record.slot_id for one in session.washes] == ["0", "1"]
            assert [one.raw for one in session.washes] == [one.raw for one in service.before]
            assert {one.record.node_key for one in session.washes} == {NODE_KEY}
            assert said(await submit(session)) == said(await submit(session, PROMPT))


async def test_a_stand_in() -> None:
    """A slot without a GPU has a certificate like any other; what is not applicable is said in it."""
    async with sealed_world() as (client, service):
        service.session["gpu_ids"] = ["cpu0"]
        service.washed_by(washed(**STAND_IN))
        async with await opened(client, service) as session:
            assert session.washes[0].record.result("scrub") == "not_applicable"


async def test_another_node_than_expected() -> None:
    """Who knows the node's key accepts no other; what is no key is told before anything is asked."""
    async with sealed_world() as (client, service):
        with pytest.raises(WashNotProven) as unproven:
            await opened(client, service, node_key=OTHER_NODE.public_key().public_bytes_raw())
        assert unproven.value.reason == "node_key"
        service.requests.clear()
        with pytest.raises(ValueError, match="32 bytes"):
            await opened(client, service, node_key=b"short")
        assert service.requests == []


async def test_the_check_can_be_left_out() -> None:
    """Without the check nothing is asked about washes, and none is claimed."""
    async with sealed_world() as (client, service):
        service.session["washed_before"] = None
        async with await opened(client, service, check_washes=False) as session:
            assert session.washes == ()
        assert "certificates" not in str(asked(service))


async def test_an_upgrade() -> None:
    """A slot that was washed beside the old program is accepted where both programs are."""
    async with sealed_world() as (client, service):
        service.washed_by(washed(other_program()))
        both = Expected(pcr0=[PCR0, (b"\7" * 48).hex()])
        async with await opened(client, service, expect=both) as session:
            assert session.assurance == "simulated"


async def test_reopening() -> None:
    """The washes must hold for the new document too: an enclave that was not started with them is refused."""
    async with sealed_world() as (client, service), await opened(client, service) as session:
        await session.reopen()
        service.attested = []
        with pytest.raises(WashNotProven) as unproven:
            await session.reopen()
        assert unproven.value.reason == "unlisted"


async def test_trouble_is_no_finding() -> None:
    """A service that cannot say it now is waited for, and then it is its refusal that is told."""
    async with sealed_world() as (client, service):

        async def ask(path: str) -> dict[str, Any]:
            raise Refused(503, {"code": "storage_failing"})

        async with await opened(client, service) as session:
            judge = session._asked.judge(session.attestation)
            with pytest.raises(Refused, match="storage_failing"):
                await judge.before(ask, Lease.of("s_1", service.view()))


@pytest.mark.parametrize("fence", [0, -1, 1.5, "8"])
def test_fences_that_are_none(fence: object) -> None:
    """A session without a lease has no washes before it."""
    with pytest.raises(WashNotProven):
        Lease.of("s_1", {**SESSION, "fence": fence})


# -- behind the session -----------------------------------------------------------------------------------


async def test_certificates_after() -> None:
    """Behind the session each slot is washed under its fence; who asks waits for that, and can keep them."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            pass

        async def wash() -> None:
            service.wash()

        service.clock.then[2] = wash
        (found,) = await session.certificates_after()
        assert found.raw == service.behind[0].raw
        assert found.record.prev == session.washes[0].hash
        assert len(service.clock.pauses) == 2


async def test_a_wash_that_was_interrupted() -> None:
    """Two certificates of one slot behind one session are a chain like any other."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            pass
        service.wash()
        service.wash()
        assert [one.raw for one in await session.certificates_after()] == [w.raw for w in service.behind]


AFTER: dict[str, tuple[str, Twist]] = {
    "none": ("missing", lambda service: None),
    "of another lease": ("fence", lambda service: service.wash(fence=FENCE + 1)),
    "of no lease": ("fence", lambda service: service.wash(lease=b"", teardown="not_applicable")),
    "of another slot too": ("slot", lambda service: (service.wash(), service.wash(**SECOND))),
    "out of order": ("order", lambda service: service.wash(prev=bytes(32))),
    "of another device": ("order", lambda service: service.wash(slot_uuid=SECOND["slot_uuid"])),
    "light": ("tier", lambda service: service.wash(tier="light")),
    "of another node": ("node_key", lambda service: service.wash(key=OTHER_NODE)),
    "lost": ("not_found", lambda service: (service.wash(), service.washes.clear())),
    "too many": (
        "malformed",
        lambda service: service.session.update(washed_after=["00" * 32] * (MAX_WASHES + 1)),
    ),
}


@pytest.mark.parametrize("attack", AFTER)
async def test_a_wash_behind_it_that_is_not_proven(attack: str) -> None:
    """Certificates that are not those of the washes behind this session are told, and how."""
    reason, twist = AFTER[attack]
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            pass
        twist(service)
        with pytest.raises(WashNotProven) as unproven:
            await session.certificates_after(seconds=5)
        assert unproven.value.reason == reason


async def test_an_enclave_that_was_not_renewed() -> None:
    """A certificate of the very enclave that had the session's keys says nothing of their end."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            pass
        last = service.before[0]
        same = washed(service.enclave, fence=FENCE, prev=last.hash)
        service.behind = [service.keep(same)]
        with pytest.raises(WashNotProven) as unproven:
            await session.certificates_after()
        assert unproven.value.reason == "epoch"


async def test_behind_an_unchecked_session() -> None:
    """Who did not check before may after: against what the service says of the lease alone."""
    async with sealed_world() as (client, service):
        async with await opened(client, service, check_washes=False) as session:
            pass
        service.wash()
        assert [one.raw for one in await session.certificates_after()] == [service.behind[0].raw]


async def test_without_asyncio() -> None:
    """The synchronous session has both."""

    def use(service: SealedService) -> None:
        options: dict[str, Any] = {
            "kms_key_arn": service.view()["kms_key_arn"],
            "pool": service.view()["pool"],
            "expect": EXPECTED,
            "keys": service.kms,
            "allow_simulated": True,
        }
        with SyncClient(f"http://127.0.0.1:{service.port}", KEY, clock=service.clock) as client:
            with client.open_sealed(**options) as session:
                assert session.washes[0].raw == service.before[0].raw
            service.wash()
            assert session.certificates_after()[0].raw == service.behind[0].raw

    async with sealed_world() as (_, service):
        await asyncio.to_thread(use, service)
