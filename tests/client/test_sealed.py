"""Sealed sessions against a service that may cheat: what is verified before anything is sealed, and after."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from os import urandom
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from gpu_server.client import (
    AttestationRefused,
    Client,
    DataKey,
    DataKeyFailed,
    Expected,
    Malformed,
    OpenRefused,
    OpenTimeout,
    Refused,
    SealedSession,
    SealedStreamBroken,
    SessionEnded,
    TaskEvent,
    WashNotProven,
    open_sealed,
    waiting,
)
from gpu_server.client import sealed as module
from gpu_server.sealed import attestation, wash
from gpu_server.sealed.grant import WorkerKey
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.app.api_world import KEY
from tests.client.sealed_world import (
    ARN,
    CANARY,
    MEASUREMENTS,
    PCR0,
    POOL,
    TENANT,
    PlayedEnclave,
    SealedService,
    epoch_of,
    sealed_world,
    text,
    washed,
)

EXPECTED = Expected(pcr0=PCR0)
PROMPT = {"prompt": f"hello {CANARY} again"}
ZEROS = "00" * 48


async def opened(client: Client, service: SealedService, **options: Any) -> SealedSession:
    defaults = {"kms_key_arn": ARN, "pool": POOL, "expect": EXPECTED, "keys": service.kms}
    return await open_sealed(client, **{**defaults, "allow_simulated": True, **options})


async def submit(session: SealedSession, metadata: dict[str, Any] = PROMPT) -> list[TaskEvent]:
    return [event async for event in session.submit(metadata)]


def said(events: list[TaskEvent]) -> list[str]:
    return [event.data["delta"] for event in events if event.event == "text_delta"]


def asked(service: SealedService) -> list[str]:
    return [f"{request.method} {request.path}" for request in service.requests]


# -- as it should be --------------------------------------------------------------------------------------


async def test_a_sealed_session() -> None:
    """A session is started, opened, used and ended; the service sees nothing of what is said."""
    async with sealed_world() as (client, service):
        service.looks = 3
        async with await opened(client, service) as session:
            assert (session.session_id, session.tenant, session.pool) == ("s_1", TENANT, POOL)
            assert session.assurance == "simulated"
            assert session.attestation.epoch == epoch_of(service.enclave)
            kept = attestation.verify(
                session.document,
                nonce=service.nonces[0],
                pcrs={0: MEASUREMENTS[0]},
                allow_simulated=True,
            )
            assert kept == session.attestation
            first, second = await submit(session), await submit(session, {"prompt": "more"})
        assert said(first) == ["hello", CANARY, "again"]
        assert said(second) == ["more"]
        assert [event.event for event in first if not event.sealed] == ["connection"]
        assert first[-1].sealed
        assert first[-1].event == "task_finish"
        assert first[-1].data == {"status": "completed", "usage": {"completion_tokens": 3}}
        assert [task.metadata for task in service.tasks.values()] == [PROMPT, {"prompt": "more"}]
        assert len({task.request_id for task in service.tasks.values()}) == 2
        assert CANARY.encode() not in service.seen
        assert service.ended == ["s_1"]
        assert service.kms.contexts == [{"tenant": TENANT, "pool": POOL}]
        look, inference = "GET /api/sessions/s_1", "POST /inference"
        start, end = "POST /api/sessions", "DELETE /api/sessions/s_1"
        wash = f"GET /api/certificates/{service.before[0].h.hex()}"
        assert asked(service) == [start, *[look] * 3, f"{start}/s_1/open", wash, inference, inference, end]


async def test_a_session_to_keep() -> None:
    """A session that is to be kept, or that was there before, is not ended with its use."""
    async with sealed_world() as (client, service):
        async with await opened(client, service, keep=True):
            pass
        async with await opened(client, service, pool=None, session_id="s_1") as session:
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        assert service.ended == []
        assert asked(service).count("POST /api/sessions") == 1


async def test_by_model_and_preset() -> None:
    """What a session is started with reaches the service; the pool is then the one it names."""
    async with sealed_world() as (client, service):
        wanted = {"model_id": "m", "task_preset": "p", "task_difficulty": "low"}
        async with await opened(client, service, pool=None, **wanted) as session:
            assert session.pool == POOL
        assert b'"task_difficulty":"low"' in service.bodies[0]
        assert b'"model_id":"m","task_preset":"p"' in service.bodies[0]


def trust(monkeypatch: pytest.MonkeyPatch, nsm: SoftwareNsm) -> None:
    """The root of this one is AWS's."""
    fingerprint = attestation.hashlib.sha256(nsm.root).digest()
    monkeypatch.setattr(attestation, "AWS_ROOT_SHA256", fingerprint)
    for verify in (attestation.verify, wash.verify_certificate):
        monkeypatch.setitem(verify.__kwdefaults__, "roots", (fingerprint,))


async def test_isolated_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document below the trusted root is `isolated-worker`, whatever the answer claims of itself."""
    nsm = SoftwareNsm(MEASUREMENTS)
    trust(monkeypatch, nsm)
    async with sealed_world() as (client, service):
        service.enclave = PlayedEnclave(nsm)
        with pytest.raises(WashNotProven) as unproven:  # a simulated enclave vouches for the wash
            await opened(client, service, allow_simulated=False)
        assert unproven.value.reason == "document"
        service.washed_by(washed(PlayedEnclave(nsm)))
        async with await opened(client, service, allow_simulated=False) as session:
            assert session.assurance == "isolated-worker"
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        with pytest.raises(AttestationRefused) as refused:
            await opened(client, service, expect=None)
        assert refused.value.reason == "pcr"


async def test_a_signed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate that signed the program may be pinned alone, also several of them."""
    signed = {**MEASUREMENTS, 8: bytes([8]) * 48}
    nsm = SoftwareNsm(signed)
    trust(monkeypatch, nsm)
    async with sealed_world() as (client, service):
        service.washed_by(washed(PlayedEnclave(nsm)))
        service.enclave = PlayedEnclave(nsm)
        for values in (signed[8].hex(), [PCR0, signed[8].hex()]):
            async with await opened(
                client, service, expect=Expected(pcr8=values), allow_simulated=False
            ) as session:
                assert said(await submit(session)) == ["hello", CANARY, "again"]
        with pytest.raises(AttestationRefused) as refused:
            await opened(client, service, expect=Expected(pcr8=PCR0), allow_simulated=False)
        assert refused.value.reason == "pcr"


async def test_an_upgrade() -> None:
    """The old program and the new one are both accepted where both are expected, and a third is not."""
    async with sealed_world() as (client, service):
        both = Expected(pcr0=["0b" * 48, PCR0])
        async with await opened(client, service, expect=both) as session:
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        with pytest.raises(AttestationRefused):
            await opened(client, service, expect=Expected(pcr0=["0b" * 48, "0c" * 48]))


# -- what is asked of the caller --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"expect": None, "allow_simulated": False},
        {"expect": Expected(pcr1=PCR0, pcr3=PCR0), "allow_simulated": False},
        {"pool": None},
        {"pool": None, "model_id": "m"},
        {"model_id": "m"},
        {"model_id": "m", "task_preset": "p"},
        {"session_id": "s_1", "model_id": "m", "task_preset": "p"},
        {"session_id": "s_1", "task_difficulty": "low"},
    ],
)
async def test_what_must_be_said(options: dict[str, Any]) -> None:
    """PCR0 or PCR8 must be pinned where a simulation will not do; and a session must be named one way."""
    async with sealed_world() as (client, service):
        with pytest.raises(ValueError):  # noqa: PT011  # each has words of its own
            await opened(client, service, **options)
        assert service.requests == []


@pytest.mark.parametrize(
    "options",
    [{"kms_key_arn": "alias/mine"}, {"kms_key_arn": ARN + "\n"}, {"session_id": "../x?y", "pool": None}],
)
async def test_names_that_are_none(options: dict[str, Any]) -> None:
    """A key that is no key's ARN, or a session that is no name, is never asked for."""
    async with sealed_world() as (client, service):
        with pytest.raises(Malformed):
            await opened(client, service, **options)
        assert service.requests == []


# -- a service that cheats when a session is opened -------------------------------------------------------

Twist = Callable[[SealedService], None]


def answers(**twisted: Callable[[SealedService], Any]) -> Twist:
    """The opening answers these instead of the true ones."""

    def twist(service: SealedService) -> None:
        service.answer = lambda true: true | {name: make(service) for name, make in twisted.items()}

    return twist


def document(make: Callable[[SealedService], bytes]) -> Twist:
    return answers(document=lambda service: text(make(service)))


def of(**options: Any) -> Callable[[SealedService], bytes]:
    """A document of another enclave than the true one."""
    measurements = options.pop("measurements", MEASUREMENTS)
    return lambda service: PlayedEnclave(SoftwareNsm(measurements, **options)).attest(service.nonces[-1])


def broken(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


DOCUMENTS = {
    "a stale nonce": ("nonce", document(lambda s: s.enclave.attest(urandom(32)))),
    "another program": ("pcr", document(of(measurements={**MEASUREMENTS, 0: bytes([9]) * 48}))),
    "debug mode": ("debug", document(of(debug=True))),
    "a changed byte": ("signature", document(lambda s: broken(s.enclave.attest(s.nonces[-1])))),
    "no document": ("malformed", document(lambda s: b"not CBOR")),
    "an empty document": ("malformed", document(lambda s: b"")),
}


@pytest.mark.parametrize("attack", DOCUMENTS)
async def test_another_document(attack: str) -> None:
    """Only the document that answers this client's nonce, of the program it expects, is accepted; otherwise
    nothing is sealed, and the session that was started for it is ended."""
    reason, twist = DOCUMENTS[attack]
    async with sealed_world() as (client, service):
        twist(service)
        with pytest.raises(AttestationRefused) as refused:
            await opened(client, service)
        assert refused.value.reason == reason
        assert "POST /inference" not in asked(service)
        assert service.ended == ["s_1"]


@pytest.mark.parametrize("mode", ["nitro", "simulated", None])
async def test_a_simulation_that_was_not_allowed(mode: str | None) -> None:
    """Without `allow_simulated` a simulated enclave is refused, whatever the service says that it is."""
    async with sealed_world() as (client, service):
        answers(mode=lambda _: mode)(service)
        with pytest.raises(AttestationRefused) as refused:
            await opened(client, service, allow_simulated=False)
        assert refused.value.reason == "root"


async def test_a_claim_is_no_assurance() -> None:
    """An answer that claims to come from Nitro makes a simulation no more than it is."""
    async with sealed_world() as (client, service):
        answers(mode=lambda _: "nitro")(service)
        async with await opened(client, service) as session:
            assert session.assurance == "simulated"


REFUSED: dict[str, Twist] = {
    "a swapped worker key": answers(worker_key=lambda _: text(WorkerKey.generate().public)),
    "a short worker key": answers(worker_key=lambda _: text(bytes(31))),
    "no worker key": answers(worker_key=lambda _: None),
    "no base64": answers(document=lambda _: "*"),
    "a document that is no text": answers(document=lambda _: [1]),
    "a slot that is not attested": answers(slots=lambda _: [text(bytes(32))]),
    "slots that are none": answers(slots=lambda _: {"a": 1}),
    "another tenant": lambda service: service.session.update(tenant="other"),
    "another pool": lambda service: service.session.update(pool="other"),
    "another KMS key": lambda service: service.session.update(kms_key_arn=ARN[:-1] + "2"),
    "no tenant": lambda service: service.session.update(tenant=None),
    "a state that is none": lambda service: service.session.update(state=["failed"], worker_key=None),
    "a plain session": lambda service: service.session.update(sealed=False, worker_key=None),
    "a worker key of another length": lambda service: service.session.update(worker_key=text(bytes(33))),
}


@pytest.mark.parametrize("attack", REFUSED)
async def test_another_session(attack: str) -> None:
    """A session that is not the one that was asked for is not used."""
    async with sealed_world(tenant=TENANT) as (client, service):
        REFUSED[attack](service)
        with pytest.raises(OpenRefused):
            await opened(client, service)
        assert "POST /inference" not in asked(service)
        assert service.ended == ["s_1"]


async def test_another_session_than_named() -> None:
    """An answer about another session than the one that was named is not used; nor is a name that is none."""
    async with sealed_world() as (client, service):
        service.session = {"session_id": "s_2"}
        with pytest.raises(OpenRefused):
            await opened(client, service, pool=None, session_id="s_1")
        for wrong in ("../admin", "", 7, None):
            service.session = {"session_id": wrong}
            with pytest.raises((OpenRefused, Malformed)):
                await opened(client, service)
        assert service.ended == []


async def test_the_tenant_that_was_said() -> None:
    """Who says whose client it is, is not taken for another; who does not, has the service's word for it."""
    async with sealed_world() as (client, service):
        with pytest.raises(OpenRefused, match="tenant"):
            await opened(client, service, tenant="other")
        async with await opened(client, service) as session:
            assert session.tenant == TENANT


@pytest.mark.parametrize(
    "epoch", [bytes(16), urandom(16), b"", None], ids=["zeros", "random", "empty", "none"]
)
async def test_the_epoch_is_the_documents(epoch: bytes | None) -> None:
    """The epoch comes from the document: what the answer says of it changes nothing."""
    async with sealed_world() as (client, service):
        answers(epoch=lambda _: None if epoch is None else epoch.hex())(service)
        async with await opened(client, service) as session:
            assert said(await submit(session)) == ["hello", CANARY, "again"]


async def test_a_document_of_another_enclave() -> None:
    """A good document of an enclave that did not make the grant leads nowhere: no worker can open what is
    sealed then."""
    async with sealed_world() as (client, service):
        document(lambda s: PlayedEnclave().attest(s.nonces[-1], tuple(s.attested)))(service)
        async with await opened(client, service) as session:
            with pytest.raises(Refused) as refused:
                await submit(session)
        assert refused.value.code == "session_not_open"
        assert service.tasks == {}


async def test_a_worker_key_that_is_no_point() -> None:
    """A key from which everybody could compute the secret is not used."""
    async with sealed_world() as (client, service):
        service.session["worker_key"] = text(bytes(32))
        answers(worker_key=lambda _: text(bytes(32)))(service)
        session = await opened(client, service)
        with pytest.raises(module.SealedError):
            await submit(session)
        assert "POST /inference" not in asked(service)


async def test_slots_that_are_attested() -> None:
    """Wash records that are in the document are accepted."""
    async with sealed_world() as (client, service):
        service.attested.append(urandom(32))
        async with await opened(client, service) as session:
            assert list(session.attestation.slots) == service.attested


# -- waiting ----------------------------------------------------------------------------------------------


class Limits:
    """The limits of all openings, each over when the test says so, however long the machine takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def timeout(self, seconds: float) -> asyncio.Timeout:
        self.seconds.append(seconds)
        self._last = asyncio.timeout(None)
        return self._last

    async def over(self) -> None:
        """The last one's time is up."""
        self._last.reschedule(asyncio.get_running_loop().time())


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    limits = Limits()
    monkeypatch.setattr(waiting, "asyncio", SimpleNamespace(timeout=limits.timeout))
    return limits


@pytest.mark.parametrize("state", ["draining", "closed", "failed"])
async def test_a_session_that_ends(state: str) -> None:
    """A session that ends before its worker shows a key is told with its reason."""
    async with sealed_world() as (client, service):
        service.session = {
            "worker_key": None,
            "state": state,
            "error": {"code": "image_missing", "message": "no image"},
        }
        with pytest.raises(SessionEnded, match="no image") as ended:
            await opened(client, service)
        assert ended.value.code == "image_missing"
        for error in (None, "words", {"code": 7, "message": []}):
            service.session = {"worker_key": None, "state": state, "close_reason": "killed", "error": error}
            with pytest.raises(SessionEnded, match="killed"):
                await opened(client, service)


async def test_what_is_not_there_yet() -> None:
    """An enclave that is being started, a KMS that is away, a worker not ready: they are waited for."""
    passing = [(409, "session_not_ready"), (503, "enclave_unavailable"), (503, "kms_down")]
    async with sealed_world() as (client, service):
        service.refusals = list(passing)
        heard: list[str] = []
        async with await opened(client, service, on_wait=heard.append) as session:
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        assert len(service.clock.pauses) == len(passing)
        assert heard == [f"waiting, refused with {code}: some detail" for _, code in passing]


async def test_why_it_waits() -> None:
    """Who waits for a slot and a worker hears it, each reason once."""
    async with sealed_world() as (client, service):
        service.looks = 4
        service.session = {"state": "waiting", "stage": None}

        async def leased() -> None:
            service.session = {"state": "preparing", "stage": "container"}

        service.clock.then[2] = leased
        heard: list[str] = []
        async with await opened(client, service, on_wait=heard.append):
            pass
        assert heard == [
            "waiting for a slot: all are taken",
            "waiting for its worker, which is being started (container)",
        ]


async def test_waiting_is_bounded(limits: Limits) -> None:
    """What does not come is told with the last refusal; and the whole opening has its time."""
    async with sealed_world(reconnect_seconds=1000) as (client, service):
        for code in ("enclave_unavailable", "kms_down"):
            service.clock.pauses.clear()
            service.refusals = [(503, code)] * 100
            with pytest.raises(Refused, match=code):
                await opened(client, service, trouble_seconds=10)
            assert sum(service.clock.pauses) == pytest.approx(10)
        assert service.ended == ["s_1"] * 2
        service.refusals = []
        service.session = {"worker_key": None, "state": "waiting"}
        service.clock.then[len(service.clock.pauses) + 3] = limits.over
        with pytest.raises(OpenTimeout, match="not open after 7 s; it was waiting for a slot"):
            await opened(client, service, open_seconds=7)
        assert limits.seconds[-1] == 7
        assert service.ended == ["s_1"] * 3


async def test_reopening_is_bounded(limits: Limits) -> None:
    """A service that never answers does not hold a reopening for ever."""
    over = asyncio.Event()
    async with sealed_world() as (client, service):
        session = await opened(client, service, open_seconds=7)
        release = service.kms.release

        async def never(**options: Any) -> bytes:
            await limits.over()
            await over.wait()
            return await release(**options)

        service.kms.release = never  # type: ignore[method-assign]
        try:
            with pytest.raises(OpenTimeout):
                await session.reopen()
            assert limits.seconds == [7, 7]
        finally:
            over.set()


@pytest.mark.parametrize("code", ["kms_denied", "enclave_refused", "decrypt_failed"])
async def test_what_will_not_pass(code: str) -> None:
    """A refusal for good is told at once."""
    async with sealed_world() as (client, service):
        service.refusals = [(403, code)]
        with pytest.raises(Refused, match=code):
            await opened(client, service)
        assert service.clock.pauses == []


async def test_no_data_key() -> None:
    """Without a data key nothing is opened, and what was started is ended."""

    class NoKeys:
        async def generate(self, kms_key_arn: str, context: object) -> DataKey:
            raise DataKeyFailed("AccessDeniedException", "not yours")

    async with sealed_world() as (client, service):
        with pytest.raises(DataKeyFailed, match="not yours"):
            await opened(client, service, keys=NoKeys())
        assert asked(service)[-1] == "DELETE /api/sessions/s_1"


# -- a service that cheats, or breaks, when a task runs ----------------------------------------------------


async def test_a_lost_connection() -> None:
    """A stream that breaks is taken up behind the last event, as often as it takes, and nothing is lost."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            service.cuts = [1, 1, 1, 1]
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        assert len(service.tasks) == 1
        resumed = [request.headers.get("Last-Event-ID") for request in service.requests]
        assert [number for number in resumed if number] == ["1", "2", "3", "4"]


async def test_a_lost_answer() -> None:
    """An answer that was lost before its first event is asked for with the same bytes, and runs once."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            service.cuts = [0]
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        sent = [
            body
            for request, body in zip(service.requests, service.bodies, strict=True)
            if request.path == "/inference"
        ]
        assert len(service.tasks) == 1
        assert len(set(sent)) == 1


async def test_a_restart_of_the_enclave() -> None:
    """An enclave that is restarted leaves an open session working; a new opening has the new epoch."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            before = session.attestation.epoch
            service.enclave = PlayedEnclave()
            assert said(await submit(session)) == ["hello", CANARY, "again"]
            await session.reopen()
            assert session.attestation.epoch == epoch_of(service.enclave) != before
            assert said(await submit(session)) == ["hello", CANARY, "again"]
        assert len(service.psks) == 2
        assert len(set(service.nonces)) == 2


async def test_reopening() -> None:
    """A service that has forgotten the grant is given a new one; a worker that was swapped is not."""
    async with sealed_world() as (client, service), await opened(client, service) as session:
        service.psks.clear()
        with pytest.raises(Refused, match="session_not_open"):
            await submit(session)
        await session.reopen()
        assert said(await submit(session)) == ["hello", CANARY, "again"]
        service.worker = WorkerKey.generate()
        with pytest.raises(OpenRefused, match="another key"):
            await session.reopen()


Frames = Callable[[list[bytes]], list[bytes]]

# Frames: connection, salt, three words and the end, task_finish.
STREAMS: dict[str, Frames] = {
    "the end dropped": lambda f: [*f[:5], f[6]],
    "a word dropped": lambda f: [*f[:3], *f[4:]],
    "two words swapped": lambda f: [*f[:2], f[3], f[2], *f[4:]],
    "a word doubled": lambda f: [*f[:3], *f[2:]],
    "more behind the end": lambda f: [*f[:6], f[3], f[6]],
    "a gap": lambda f: [*f[:2], b'event: gap\ndata: {"from":3,"to":3}\n\n', *f[3:]],
    "a word replaced": lambda f: [*f[:2], sealed_frame(urandom(273)), *f[3:]],
    "clear words": lambda f: [*f[:2], b'id: 3\nevent: text_delta\ndata: {"delta":"x"}\n\n', *f[2:]],
    "completed at once": lambda f: f[-1:],
}


def sealed_frame(data: bytes) -> bytes:
    return b'id: 3\nevent: sealed\ndata: {"data":"%b"}\n\n' % text(data).encode()


@pytest.mark.parametrize("attack", STREAMS)
async def test_attacks_on_an_answer(attack: str) -> None:
    """An answer that is not whole, in order and the worker's own is an error, and not an end."""
    async with sealed_world() as (client, service):
        service.stream = STREAMS[attack]
        async with await opened(client, service) as session:
            with pytest.raises(SealedStreamBroken):
                await submit(session)


async def test_the_answer_to_another_request() -> None:
    """What was answered to one request is no answer to another, though it was sealed by the same worker."""
    async with sealed_world() as (client, service), await opened(client, service) as session:
        await submit(session)
        first = service.tasks["t_1"].frames
        service.stream = lambda frames: first
        with pytest.raises(SealedStreamBroken):
            await submit(session)


async def test_a_task_that_failed_outside() -> None:
    """What the service says of a task's failure is given, and marked as not sealed."""
    async with sealed_world() as (client, service):
        service.stream = lambda frames: [
            *frames[:4],
            b'id: 5\nevent: task_finish\ndata: {"status":"failed","error":{"code":"worker_exited"}}\n\n',
        ]
        async with await opened(client, service) as session:
            events = await submit(session)
        assert said(events) == ["hello", CANARY]
        assert events[-1].data["error"]["code"] == "worker_exited"
        assert not events[-1].sealed


async def test_a_service_that_dies_for_good() -> None:
    """A service that does not come back is given up; but an answer whose end is there is whole."""
    async with sealed_world(reconnect_seconds=5) as (client, service):
        session = await opened(client, service)
        service.cuts = [6]  # up to the sealed end
        assert (await submit(session))[-1].sealed
        service.cuts = [4]
        events = session.submit(PROMPT)
        got = [await anext(events) for _ in range(3)]
        assert said(got) == ["hello", CANARY]
        await service.die()
        with pytest.raises(aiohttp.ClientConnectionError):
            await anext(events)


LEAVING = """
import asyncio
from tests.client.test_sealed import *

async def main(how):
    global events
    async with sealed_world() as (client, service):
        service.stream = lambda frames: frames[:4]
        async with await opened(client, service) as session:
            if how == "break":
                async for event in session.submit(PROMPT):
                    break
            elif how == "kept":
                events = [session.submit(PROMPT) for _ in range(20)]  # the loop closes them in any order
                for one in events:
                    await anext(one)
            elif how == "timeout":
                try:
                    async with asyncio.timeout(0.05):
                        async for event in session.submit(PROMPT):
                            await asyncio.Event().wait()
                except TimeoutError:
                    pass

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["break", "kept", "timeout"])
def test_leaving_in_the_middle(how: str) -> None:
    """Who leaves the loop over the events, with or without keeping the generator, or is cancelled in it,
    hears nothing of it at the program's end."""
    done = subprocess.run([sys.executable, "-c", LEAVING, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


async def test_many_at_once() -> None:
    """Tasks of one session may run side by side."""
    async with sealed_world() as (client, service):
        async with await opened(client, service) as session:
            prompts = [{"prompt": f"number {n}"} for n in range(8)]
            done = await asyncio.gather(*(submit(session, prompt) for prompt in prompts))
        assert [said(events) for events in done] == [["number", str(n)] for n in range(8)]


async def test_a_long_answer() -> None:
    """Words of any size come through, also those that need more than one chunk."""
    async with sealed_world() as (client, service), await opened(client, service) as session:
        long = "x" * 700_000
        assert said(await submit(session, {"prompt": long})) == [long]


# -- what it is -------------------------------------------------------------------------------------------


async def test_nothing_secret_is_shown() -> None:
    """Neither a session nor a data key shows its key."""
    async with sealed_world() as (client, service), await opened(client, service) as session:
        psk = session._opened.psk
        assert psk.hex() not in repr(vars(session))
        assert repr(psk) not in repr(vars(session))
    key = DataKey(plaintext=b"k" * 32, wrapped=b"w")
    assert "kkk" not in repr(key)


def test_no_server_dependencies() -> None:
    """Who imports the client loads nothing of the server, and no boto3 before a data key is wanted."""
    program = "import sys, gpu_server.client; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    server = {"fastapi", "pydantic", "docker", "uvicorn", "starlette", "structlog", "typer", "rich", "yaml"}
    assert {"aiohttp", "gpu_server"} <= loaded
    assert not loaded & (server | {"boto3", "botocore", "prometheus_client"})


async def test_the_nonce_is_fresh() -> None:
    """Every opening has a nonce of its own, of 32 bytes."""
    async with sealed_world() as (client, service):
        for _ in range(2):
            await opened(client, service)
        assert len(set(service.nonces)) == 2
        assert {len(nonce) for nonce in service.nonces} == {32}
        assert b64decode(text(service.nonces[0])) == service.nonces[0]
        assert all(request.headers["X-API-Key"] == KEY for request in service.requests)
