"""`/api/slots`: what the operator sees of slots and their washes, and the way out of quarantine."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from gpu_server.core import events as ev
from gpu_server.sealed.wash import verify_chain
from tests.app.api_world import KEY, TASK, Answer, Api, api_world
from tests.app.world import slot_specs

OPERATOR = {"X-API-Key": KEY}
WASH = ("POST", "/api/slots/0/wash")


async def wash(api: Api, slot_id: str = "0", headers: Any = OPERATOR) -> Answer:
    return await api.ask("POST", f"/api/slots/{slot_id}/wash", tenant=None, headers=headers)


def quarantine(api: Api, slot_id: str = "0") -> None:
    api.world.engine.report(ev.SlotChecked(slot_id=slot_id, fault="it smokes"))
    assert state(api, slot_id) == "quarantined"


def state(api: Api, slot_id: str = "0") -> str:
    return str(api.world.engine.node.slots[slot_id].state)


async def test_a_wash_that_passes(tmp_path: Path) -> None:
    """A quarantined slot is washed by order, and free when the wash has passed; not a moment before."""
    async with api_world(tmp_path, slots=slot_specs(2, gpu=True)) as api:
        quarantine(api)
        gate = api.world.runtime.gates["foreign_gpu_holders"] = asyncio.Event()
        answer = await wash(api)
        assert answer.status == 202
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json == {
            "id": "0",
            "uuid": "GPU-0000",
            "name": "GPU",
            "kind": "gpu",
            "tiers": ["high", "low"],
            "state": "washing",
            "fault": None,
            "memory_total_mb": 0,
            "memory_used_mb": None,
            "held_by": None,
            "wash": None,  # which begins behind the answer
            "certificate": api.world.engine.node.slots["0"].head.hex(),
            "doubt": None,
            "session_id": None,
            "kept_for": None,
        }
        assert state(api) == "washing"
        async with asyncio.timeout(20):
            while api.world.engine.washing["0"].steps != ("scrub",):  # noqa: ASYNC110 (it is held there)
                await asyncio.sleep(0)
        slots = (await api.ask("GET", "/api/slots", tenant=None, headers=OPERATOR)).json["slots"]
        assert (slots[0]["wash"]["steps"], slots[0]["wash"]["reason"]) == (["scrub"], None)
        (await wash(api)).problem(409, "slot_not_quarantined")
        gate.set()
        await api.world.free()
        assert state(api) == "free"
        assert (await api.ask("GET", "/health", tenant=None)).json["status"] == "ok"


async def test_a_wash_that_fails(tmp_path: Path) -> None:
    """A wash that finds the reason still there leads back into quarantine, and may be ordered again."""
    async with api_world(tmp_path, slots=slot_specs(2, gpu=True)) as api:
        quarantine(api)
        api.world.machine.holders["GPU-0000"] = "a stranger"
        assert (await wash(api)).status == 202
        await api.world.until(lambda: state(api) == "quarantined")
        await api.world.washes()
        report = (await api.ask("GET", "/health")).json
        assert "a stranger" in report["gpus"][0]["fault"]
        assert state(api, "1") == "free"
        api.world.machine.holders.clear()
        assert (await wash(api)).status == 202
        await api.world.free()


async def test_bearer(tmp_path: Path) -> None:
    """The operator's key may come as a bearer token."""
    async with api_world(tmp_path) as api:
        quarantine(api)
        assert (await wash(api, headers={"Authorization": f"Bearer {KEY}"})).status == 202
        await api.world.free()


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "wrong"}, {"X-Tenant-ID": "a"}])
async def test_needs_the_key(tmp_path: Path, headers: dict[str, str]) -> None:
    """Nobody washes without the key."""
    async with api_world(tmp_path) as api:
        quarantine(api)
        (await wash(api, headers=headers)).problem(401, "unauthorized")
        assert state(api) == "quarantined"


@pytest.mark.parametrize("tenant", ["a", "default", ""])
async def test_not_for_tenants(tmp_path: Path, tenant: str) -> None:
    """Whoever acts for a tenant is refused, and learns nothing of which slots there are."""
    async with api_world(tmp_path) as api:
        quarantine(api)
        for slot_id in ("0", "1", "never"):
            answer = await wash(api, slot_id, {**OPERATOR, "X-Tenant-ID": tenant})
            assert slot_id not in answer.problem(403, "operator_only")["detail"].split()
        assert state(api) == "quarantined"


@pytest.mark.parametrize("slot_id", ["4", "00", "-1", "GPU-0000", "%00", "x" * 1000])
async def test_unknown(tmp_path: Path, slot_id: str) -> None:
    """A slot that this node does not have is not found."""
    async with api_world(tmp_path) as api:
        (await wash(api, slot_id)).problem(404, "slot_not_found")


async def test_not_quarantined(tmp_path: Path) -> None:
    """Only a quarantined slot is washed by order: nobody's session is washed from under him."""
    async with api_world(tmp_path, slots=slot_specs(2)) as api:
        session_id = await api.session()
        held = api.world.session(session_id).slot_ids[0]
        free = next(slot.spec.id for slot in api.world.engine.node.slots if slot.spec.id != held)
        for slot_id, what in ((held, "leased"), (free, "free")):
            assert what in (await wash(api, slot_id)).problem(409, "slot_not_quarantined")["detail"]
            assert state(api, slot_id) == what
        assert (await api.submit(session_id=session_id)).events[-1].data["status"] == "completed"


@pytest.mark.parametrize("name", ["X-API-Key", "X-Tenant-ID", "Authorization"])
async def test_headers_that_come_twice(tmp_path: Path, name: str) -> None:
    """A header that decides who asks may come once, whatever it says: a proxy may have believed the other."""
    value = {"X-API-Key": KEY, "X-Tenant-ID": "a", "Authorization": f"Bearer {KEY}"}[name]
    beside = [("X-API-Key", KEY)] if name == "X-Tenant-ID" else []
    routes = [("GET", "/api/sessions"), ("POST", "/api/tasks/submit"), ("GET", "/health"), WASH]
    async with api_world(tmp_path) as api:
        quarantine(api)
        for values in ([value, value], [value, "b"], ["b", value]):
            headers = [*beside, *((name, each) for each in values)]
            for method, path in routes:
                body = TASK if path.endswith("submit") else None
                async with api.http.request(method, path, headers=headers, json=body) as got:
                    answer = Answer(got.status, got.headers, await got.read())
                if name == "X-Tenant-ID" and (method, path) == WASH:
                    answer.problem(403, "operator_only")
                else:
                    assert name.lower() in answer.problem(422, "invalid_request")["detail"]
        assert state(api) == "quarantined"
        assert api.world.engine.node.tasks == {}


# -- what there is to see ---------------------------------------------------------------------------------


async def test_the_slots(tmp_path: Path) -> None:
    """Every slot, with who has it, what is wrong with it, and why nothing is known of it now."""
    async with api_world(tmp_path) as api:
        quarantine(api, "3")
        for slot_id in ("1", "2"):
            api.world.engine.report(ev.SlotChecked(slot_id=slot_id, fault=None, doubt="no answer"))
        session_id = await api.session(tenant="b")
        answer = await api.ask("GET", "/api/slots", tenant=None, headers=OPERATOR)
        slots = answer.json["slots"]
        shown = [(slot["id"], slot["state"], slot["session_id"], slot["held_by"]) for slot in slots]
        assert shown == [
            ("0", "leased", session_id, None),
            ("1", "free", None, None),
            ("2", "free", None, None),
            ("3", "quarantined", None, None),
        ]
        assert [slot["doubt"] for slot in slots] == [None, "no answer", "no answer", None]
        assert [slot["fault"] for slot in slots] == [None, None, None, "it smokes"]
        assert all(len(slot["certificate"]) == 64 for slot in slots)


async def test_a_slot_that_is_kept(tmp_path: Path) -> None:
    """After a light wash a slot says whom it is kept for, and its certificate says that it was light."""
    settings = {"wash_same_tenant": "light"}
    async with api_world(tmp_path, settings=settings, slots=slot_specs(1)) as api:
        await api.ask("DELETE", f"/api/sessions/{await api.session(tenant='b')}", tenant="b")
        await api.world.free()
        slot = (await api.ask("GET", "/api/slots", tenant=None, headers=OPERATOR)).json["slots"][0]
        assert (slot["state"], slot["kept_for"]) == ("free", "b")
        assert [one["tier"] for one in (await chain(api)).json["certificates"]] == ["full", "light"]


async def chain(api: Api, slot_id: str = "0", query: str = "", **headers: str) -> Answer:
    path = f"/api/slots/{slot_id}/certificates{query}"
    return await api.ask("GET", path, tenant=None, headers={**OPERATOR, **headers})


async def test_the_chain_of_a_slot(tmp_path: Path) -> None:
    """A slot's certificates come oldest first, as JSON and as a CBOR sequence, and verify offline as a chain
    up to the newest record; where there are more than are asked for it is the newest."""
    async with api_world(tmp_path, slots=slot_specs(1)) as api:
        for _ in range(3):
            await api.ask("DELETE", f"/api/sessions/{await api.session()}")
            await api.world.free()
        listed = (await chain(api)).json["certificates"]
        raws = [b64decode(one["certificate"]) for one in listed]
        node_key, head = api.world.seal.public_key, api.world.engine.node.slots["0"].head
        verified = verify_chain(raws, node_key=node_key, head=head, enclave="absent")
        assert len(verified.certificates) == 4
        assert verified.from_first
        for one, certificate in zip(listed, verified.certificates, strict=True):
            record = certificate.record
            assert one == {
                "record_hash": certificate.record_hash.hex(),
                "hash": certificate.hash.hex(),
                "prev": record.prev.hex(),
                "slot_id": "0",
                "slot_uuid": record.slot_uuid,
                "fence": record.fence,
                "tier": "full",
                "certificate": one["certificate"],
            }
        answer = await chain(api, Accept="application/cbor-seq")
        assert answer.headers["Content-Type"] == "application/cbor-seq"
        assert answer.raw == b"".join(raws)
        assert (await chain(api, query="?limit=2")).json["certificates"] == listed[-2:]


async def test_chains_that_are_none(tmp_path: Path) -> None:
    """A slot that never was has none; a limit has its limits; a journal that cannot be read is told."""
    async with api_world(tmp_path) as api:
        (await chain(api, "4")).problem(404, "slot_not_found")
        for query in ("?limit=0", "?limit=1001", "?limit=x"):
            (await chain(api, query=query)).problem(422, "invalid_request")
        api.world.journal.close()
        assert (await chain(api)).problem(503, "storage_failing")
        assert (await chain(api)).headers["Retry-After"]


@pytest.mark.parametrize("path", ["/api/slots", "/api/slots/0/certificates"])
async def test_looking_is_the_operators(tmp_path: Path, path: str) -> None:
    """Tenants do not see whose the slots are, nor all of their washes."""
    async with api_world(tmp_path) as api:
        (await api.ask("GET", path, tenant=None)).problem(401, "unauthorized")
        (await api.ask("GET", path, tenant="a")).problem(403, "operator_only")
