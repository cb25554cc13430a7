"""Opening a sealed session: every step computed for real, and everything that can go wrong in one of them."""

from __future__ import annotations

import asyncio
import os
from base64 import b64decode
from pathlib import Path

import pytest

from gpu_server import opening
from gpu_server.core.sessions import SessionState
from gpu_server.sealed.frames import Op
from gpu_server.sealed.grant import GRANT_BYTES, open_grant
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.app.sealed_world import SealedApi, sealed_world
from tests.fakes.enclave import MEASUREMENTS, FakeEnclave
from tests.fakes.key_service import ARN, OTHER_ARN, UNKNOWN_ARN


def wrapped(sealed: SealedApi, *, arn: str = ARN, tenant: str = "a", pool: str = "default") -> bytes:
    """A data key of this tenant, wrapped."""
    return sealed.keys.data_key(arn, {"tenant": tenant, "pool": pool})[1]


async def test_what_comes_of_it(tmp_path: Path) -> None:
    """The client gets what it verifies, and the session a grant that its worker alone can open."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        wrapped_key = wrapped(sealed)
        answer = (await sealed.ask_to_open(session_id, wrapped_key)).json
        worker = sealed.workers.keys[session_id]
        assert b64decode(answer["worker_key"]) == worker.public
        assert bytes.fromhex(answer["epoch"]) == sealed.enclave.epoch
        assert (answer["slots"], answer["mode"]) == ([], "simulated")
        client = await sealed.open(session_id)
        (first, second) = sealed.api.world.session(session_id).grants.values()
        assert b64decode(first.wrapped_key) == wrapped_key
        assert open_grant(client.binding, b64decode(second.grant), worker) == client.psk
        assert sealed.api.service.opening.outcomes == {"granted": 2}


async def test_nothing_secret_passes(tmp_path: Path) -> None:
    """Neither the data key nor what is derived of it is in anything that the service keeps."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        data_key, wrapped_key = sealed.keys.data_key(ARN, {"tenant": "a", "pool": "default"})
        assert (await sealed.ask_to_open(session_id, wrapped_key)).status == 200
        client = await sealed.open(session_id)
        held = repr(sealed.api.world.session(session_id)) + repr(sealed.api.world.disk)
        for secret in (data_key, client.psk):
            assert secret.hex() not in held
            assert repr(secret) not in held


async def test_a_grant_outlives_the_service(tmp_path: Path) -> None:
    """It is in the journal before the client hears of it."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        (row,) = sealed.api.world.journal.load()["sessions"].values()  # type: ignore[index]
        assert list(row["grants"]) == [client.binding.psk_id.hex()]
        assert row["worker_key"] == sealed.api.world.session(client.session_id).worker_key


async def test_the_enclave_dies(tmp_path: Path) -> None:
    """What is open goes on; what is to be opened is refused, until another enclave is there."""
    async with sealed_world(tmp_path) as sealed:
        client, session_id = await sealed.client(), await sealed.start()
        sealed.enclave.down = "it is being started"
        answer = await sealed.ask_to_open(session_id, wrapped(sealed))
        assert "it is being started" in answer.problem(503, "enclave_unavailable")["detail"]
        assert answer.headers["Retry-After"] == "5"
        assert (await client.send(client.seal("x"))).status == 200
        sealed.enclave.restart()
        sealed.enclave.down = None
        again = await sealed.open(session_id)
        assert again.binding.epoch != client.binding.epoch
        assert (await again.send(again.seal("x"))).status == 200
        assert (await client.send(client.seal("y"))).status == 200


@pytest.mark.parametrize(
    ("op", "enclave_code", "status", "code"),
    [
        (Op.HELLO, "BUSY", 503, "enclave_busy"),
        (Op.HELLO, "ATTEST", 502, "attestation_failed"),
        (Op.GRANT, "KMS_DENIED", 403, "kms_denied"),
        (Op.GRANT, "KMS_DOWN", 503, "kms_down"),
        (Op.GRANT, "POLICY", 403, "enclave_refused"),
        (Op.GRANT, "REPLAY", 409, "replay"),
        (Op.GRANT, "DECRYPT", 400, "decrypt_failed"),
        (Op.GRANT, "MALFORMED", 500, "internal"),
        (Op.GRANT, "INTERNAL", 500, "internal"),
        (Op.GRANT, "A NEW ONE", 500, "internal"),
    ],
)
async def test_the_enclave_refuses(tmp_path: Path, op: Op, enclave_code: str, status: int, code: str) -> None:
    """Each of its codes has its own refusal, and nothing is granted."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        sealed.enclave.refuses[op] = enclave_code
        answer = await sealed.ask_to_open(session_id, wrapped(sealed))
        answer.problem(status, code)
        assert ("Retry-After" in answer.headers) is (status == 503)
        assert sealed.api.world.session(session_id).grants == {}
        assert sealed.api.service.opening.outcomes == {code: 1}


async def test_the_key_service_refuses(tmp_path: Path) -> None:
    """A key of another context or another key's is denied, and silence is told as such."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        for wrong in (
            wrapped(sealed, tenant="b"),
            wrapped(sealed, pool="one"),
            wrapped(sealed, arn=OTHER_ARN),
            b"garbage",
        ):
            (await sealed.ask_to_open(session_id, wrong)).problem(403, "kms_denied")
        unknown = await sealed.start(kms_key_arn=UNKNOWN_ARN)
        (await sealed.ask_to_open(unknown, b"x")).problem(403, "kms_denied")
        sealed.keys.down = "no answer from KMS"
        answer = await sealed.ask_to_open(session_id, wrapped(sealed))
        assert answer.problem(503, "kms_down")["detail"] == "no answer from KMS"
        assert answer.headers["Retry-After"] == "5"


@pytest.mark.parametrize("which", ["another nonce", "debug", "no document", "no grant", "too long a grant"])
async def test_an_enclave_that_lies(tmp_path: Path, which: str) -> None:
    """A document that could convince nobody, and a grant that is none, are not passed on."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        if which == "another nonce":
            sealed.enclave.lies[Op.HELLO] = await sealed.enclave.attest(os.urandom(32))
        elif which == "debug":
            debug = FakeEnclave(SoftwareNsm(MEASUREMENTS, debug=True))
            sealed.enclave.lies[Op.HELLO] = await debug.attest(bytes(32))
        elif which == "no document":
            sealed.enclave.lies[Op.HELLO] = b"document"
        else:
            sealed.enclave.lies[Op.GRANT] = b"x" * (3 if which == "no grant" else GRANT_BYTES + 1)
        expected = (500, "internal") if "grant" in which else (502, "attestation_failed")
        (await sealed.ask_to_open(session_id, wrapped(sealed))).problem(*expected)
        assert sealed.api.world.session(session_id).grants == {}


async def test_a_simulated_document_from_a_real_enclave(tmp_path: Path) -> None:
    """Where the enclave is said to be real, a document of a software root is refused here already."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        sealed.enclave.mode = "nitro"
        problem = (await sealed.ask_to_open(session_id, wrapped(sealed))).problem(502, "attestation_failed")
        assert "root" in problem["detail"]


async def test_before_there_is_a_key(tmp_path: Path) -> None:
    """A session whose worker has not shown its key cannot be opened yet; the enclave is not even asked."""
    async with sealed_world(tmp_path) as sealed:
        sealed.api.world.prepare = lambda worker: None
        sealed.api.world.health["status"] = "loading"
        session_id = await sealed.start(ready=False)
        answer = await sealed.ask_to_open(session_id)
        answer.problem(409, "session_not_ready")
        assert answer.headers["Retry-After"] == "1"
        assert sealed.enclave.calls == []


async def test_whose_it_is(tmp_path: Path) -> None:
    """Another's session, a plain one, one that has ended, and one that never was."""
    async with sealed_world(tmp_path) as sealed:
        session_id, plain = await sealed.start(), await sealed.api.session()
        (await sealed.ask_to_open(session_id, tenant="b")).problem(404, "session_not_found")
        (await sealed.ask_to_open("s_none")).problem(404, "session_not_found")
        (await sealed.ask_to_open(plain)).problem(422, "sealed_not_supported")
        await sealed.api.ask("DELETE", f"/api/sessions/{session_id}")
        (await sealed.ask_to_open(session_id)).problem(409, "session_closed")


@pytest.mark.parametrize("step", [Op.HELLO, Op.GRANT, "release"])
async def test_the_session_ends_meanwhile(tmp_path: Path, step: Op | str) -> None:
    """However far it has come, what has ended is not opened."""
    async with sealed_world(tmp_path) as sealed:
        session_id, gate = await sealed.start(), asyncio.Event()
        if isinstance(step, Op):
            sealed.enclave.gates[step] = gate
        else:
            sealed.keys.gate = gate
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(sealed.ask_to_open(session_id, wrapped(sealed)))
            await _until(lambda: step in sealed.enclave.calls or (step == "release" and sealed.enclave.calls))
            await sealed.api.ask("DELETE", f"/api/sessions/{session_id}")
            gate.set()
        opening.result().problem(409, "session_closed")


async def test_the_enclave_is_started_anew_meanwhile(tmp_path: Path) -> None:
    """What was released to the one before is of no use to the new one: that passes by asking again."""
    async with sealed_world(tmp_path) as sealed:
        session_id, gate = await sealed.start(), asyncio.Event()
        sealed.enclave.gates[Op.GRANT] = gate
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(sealed.ask_to_open(session_id, wrapped(sealed)))
            await _until(lambda: Op.GRANT in sealed.enclave.calls)
            sealed.enclave.restart()
            gate.set()
        opening.result().problem(503, "enclave_unavailable")
        assert opening.result().headers["Retry-After"] == "5"
        await sealed.open(session_id)


async def _until(holds: object) -> None:
    assert callable(holds)
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 (it comes soon)
            await asyncio.sleep(0)


async def test_a_client_that_goes_away(tmp_path: Path) -> None:
    """The opening is carried to its end without it, and the next client may open too."""
    async with sealed_world(tmp_path) as sealed:
        session_id, gate = await sealed.start(), asyncio.Event()
        sealed.enclave.gates[Op.GRANT] = gate
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(sealed.ask_to_open(session_id, wrapped(sealed)))
            await _until(lambda: Op.GRANT in sealed.enclave.calls)
            asking.cancel()
        session = sealed.api.world.session(session_id)
        gate.set()
        await sealed.api.world.until(lambda: session.grants)
        assert session.state is SessionState.READY
        await sealed.open(session_id)
        assert len(session.grants) == 2


async def test_so_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Openings are bounded, of all sessions and of one, which takes no other's turn; whoever comes too many
    is told to come again, and later has its turn."""
    monkeypatch.setattr(opening, "MAX_AT_ONCE", 3)
    async with sealed_world(tmp_path) as sealed:
        greedy, other, gate = await sealed.start(), await sealed.start(), asyncio.Event()
        sealed.enclave.gates[Op.HELLO] = gate
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(sealed.ask_to_open(greedy, wrapped(sealed))) for _ in range(2)]
            await _until(lambda: len(sealed.enclave.calls) == 2)
            one_more = await sealed.ask_to_open(greedy, wrapped(sealed))
            asked.append(group.create_task(sealed.ask_to_open(other, wrapped(sealed))))
            await _until(lambda: len(sealed.enclave.calls) == 3)
            for answer in (one_more, await sealed.ask_to_open(other, wrapped(sealed))):
                answer.problem(503, "enclave_busy")
                assert answer.headers["Retry-After"] == "1"
            gate.set()
        assert [one.result().status for one in asked] == [200, 200, 200]
        for session_id in (greedy, other):
            assert (await sealed.ask_to_open(session_id, wrapped(sealed))).status == 200


@pytest.mark.parametrize(("who", "code"), [("enclave", "enclave_unavailable"), ("keys", "kms_down")])
async def test_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, code: str) -> None:
    """A step that never ends is given up, and holds up no other."""
    monkeypatch.setattr(opening, "STEP_SECONDS", 0.05)
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        if who == "enclave":
            sealed.enclave.gates[Op.HELLO] = asyncio.Event()
        else:
            sealed.keys.gate = asyncio.Event()
        for _ in range(opening.MAX_OF_ONE_SESSION):
            (await sealed.ask_to_open(session_id, wrapped(sealed))).problem(503, code)
        sealed.enclave.gates.clear()
        sealed.keys.gate = None
        monkeypatch.undo()
        await sealed.open(session_id)


async def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A grant that could be forgotten is not promised to anybody."""
    async with sealed_world(tmp_path) as sealed:
        session_id = await sealed.start()
        sealed.api.world.journal.refuse = "the disk is full"  # type: ignore[attr-defined]
        for _ in range(3):
            (await sealed.ask_to_open(session_id, wrapped(sealed))).problem(503, "storage_failing")
        grants = sealed.api.world.session(session_id).grants
        assert len(grants) == 1, "those that were promised are not pushed out by those that are not"
