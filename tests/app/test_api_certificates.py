"""`/api/certificates`: a certificate of a wash as it was signed, and as JSON, for every key."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path

import orjson
import pytest

from gpu_server.core.rows import Table
from gpu_server.sealed.wash import verify_certificate, view
from tests.app.api_world import Api, api_world
from tests.app.world import slot_specs
from tests.fakes.enclave import FakeEnclave

CBOR = "application/cbor"


def newest(api: Api) -> str:
    return api.world.engine.node.slots["0"].head.hex()


async def test_a_certificate(tmp_path: Path) -> None:
    """Whoever has the hash, of whatever tenant, gets the certificate, which verifies offline, or its view."""
    async with api_world(tmp_path, slots=slot_specs(1)) as api:
        session_id = await api.session(tenant="a")
        await api.ask("DELETE", f"/api/sessions/{session_id}", tenant="a")
        await api.world.free()
        (h,) = (await api.ask("GET", f"/api/sessions/{session_id}", tenant="a")).json["washed_after"]
        answer = await api.ask("GET", f"/api/certificates/{h}", tenant="b", headers={"Accept": CBOR})
        assert (answer.status, answer.headers["Content-Type"]) == (200, CBOR)
        node_key = bytes.fromhex((await api.ask("GET", "/health")).json["node_public_key"])
        verified = verify_certificate(answer.raw, node_key=node_key, enclave="absent")
        assert verified.record_hash.hex() == h == newest(api)
        assert verified.record.lease == api.world.seal.lease_mark("a", session_id)
        shown = await api.ask("GET", f"/api/certificates/{h.upper()}", tenant="b")
        assert shown.headers["Content-Type"] == "application/json"
        assert shown.json == view(verified)
        assert b64decode(shown.json["certificate"]) == answer.raw


async def test_with_an_enclave(tmp_path: Path) -> None:
    """A certificate has the document of the enclave that was born after it, and the view says what it is."""
    async with api_world(tmp_path, slots=slot_specs(2), enclave=FakeEnclave(), renewed=True) as api:
        shown = (await api.ask("GET", f"/api/certificates/{newest(api)}")).json
        assert shown["attestation"]["assurance"] == "simulated"
        assert newest(api) in shown["attestation"]["slots"]
        assert len(shown["attestation"]["slots"]) == 2
        verify_certificate(
            b64decode(shown["certificate"]),
            node_key=api.world.seal.public_key,
            enclave="required",
            allow_simulated=True,
        )


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        (CBOR, CBOR),
        ("Application/CBOR;q=1, */*;q=0.1", CBOR),
        ("application/json, application/cbor", "application/json"),
        ("application/cbor-seq", "application/json"),
    ],
)
async def test_the_form(tmp_path: Path, accept: str | None, kind: str) -> None:
    """Bytes for those who ask for CBOR and not for JSON."""
    async with api_world(tmp_path) as api:
        headers = {} if accept is None else {"Accept": accept}
        answer = await api.ask("GET", f"/api/certificates/{newest(api)}", headers=headers)
        assert answer.headers["Content-Type"] == kind


@pytest.mark.parametrize("h", ["00" * 32, "0", "x" * 64, "%00", "' OR 1=1 --", "0" * 10_000])
async def test_unknown(tmp_path: Path, h: str) -> None:
    """What is no hash, or none of ours, is not found."""
    async with api_world(tmp_path) as api:
        (await api.ask("GET", f"/api/certificates/{h}")).problem(404, "certificate_not_found")


async def test_needs_a_key(tmp_path: Path) -> None:
    """Without a key nothing is told, not even whether there is one."""
    async with api_world(tmp_path) as api:
        for h in (newest(api), "00" * 32):
            (await api.ask("GET", f"/api/certificates/{h}", tenant=None)).problem(401, "unauthorized")


async def test_a_journal_that_fails(tmp_path: Path) -> None:
    """What cannot be read now is no 404: ask again."""
    async with api_world(tmp_path) as api:
        h = newest(api)
        api.world.journal.close()
        answer = await api.ask("GET", f"/api/certificates/{h}")
        answer.problem(503, "storage_failing")
        assert int(answer.headers["Retry-After"]) > 0


async def test_a_certificate_that_was_changed(tmp_path: Path) -> None:
    """A certificate that does not verify any more is shown as nothing but its bytes."""
    async with api_world(tmp_path) as api:
        h = newest(api)
        rows = api.world.disk[Table.CERTIFICATES]
        row = orjson.loads(rows[h])
        rows[h] = orjson.dumps({**row, "certificate": row["certificate"][:-4] + "AAA="})
        (await api.ask("GET", f"/api/certificates/{h}")).problem(500, "internal")
        assert (await api.ask("GET", f"/api/certificates/{h}", headers={"Accept": CBOR})).status == 200
