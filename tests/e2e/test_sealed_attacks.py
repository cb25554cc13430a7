"""The sealed protocol by hand, at the real service and worker: what is changed on the way opens nothing."""

from __future__ import annotations

import base64
import io
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

import aiohttp
import pytest

from gpu_server.sealed import attestation
from gpu_server.sealed.chunks import ChunkReader, frame
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.grant import Binding
from gpu_server.sealed.request import Head, RequestSealer, read_head
from tests.e2e.harness import Caller, Service, Services, until
from tests.e2e.sealed_world import ARN, CREDENTIALS, OTHER_ARN, SeenDataKeys, key_service

pytestmark = pytest.mark.timeout(240)
MANY = "word " * 120_000  # three chunks


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A session that was opened by hand."""

    binding: Binding
    psk: bytes

    def sealer(self, request_id: str | None = None) -> tuple[str, RequestSealer]:
        request_id = request_id or f"r-{secrets.token_hex(8)}"
        return request_id, RequestSealer(self.binding, self.psk, request_id)


@dataclass(frozen=True, kw_only=True)
class Answered:
    status: int
    code: str | None
    raw: bytes
    cut: bool = False


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
    more = {"DISCONNECT_GRACE_SECONDS": 20, "MAX_BODY_BYTES": 4_000_000}
    return {"ENCLAVE": "simulated", "KMS_ENDPOINT_URL": kms_url, **more, **CREDENTIALS}


@pytest.fixture
async def caller(serve: Callable[..., Service], settings: dict[str, object]) -> AsyncIterator[Caller]:
    """A tenant of its own, of a service whose enclave is there."""
    service = serve(**settings)
    await with_enclave(service)
    async with service.caller() as found:
        yield found


async def with_enclave(service: Service) -> None:
    await until("the enclave is there", lambda: (service.health() or {}).get("enclave_healthy"), within=60)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def started(caller: Caller, pool: str = "words", arn: str = ARN) -> dict[str, str]:
    """A sealed session that has shown its worker's key."""
    session = await caller.client.call("POST", "/api/sessions", {"pool": pool, "kms_key_arn": arn})

    async def shown() -> dict[str, str] | None:
        found = await caller.session(session["session_id"])
        assert found["state"] not in ("closed", "failed"), found
        return found if found["worker_key"] else None

    return await until("the worker shows its key", shown, within=60)


async def opened(caller: Caller, kms_url: str, session: dict[str, str]) -> Opened:
    """Open it by hand, as docs/sealed.md says."""
    context = {"tenant": caller.tenant, "pool": session["pool"]}
    key = await SeenDataKeys(kms_url).generate(session["kms_key_arn"], context)
    nonce = secrets.token_bytes(32)
    answer = await caller.client.call(
        "POST",
        f"/api/sessions/{session['session_id']}/open",
        {"nonce": b64(nonce), "wrapped_key": b64(key.wrapped)},
    )
    document = attestation.verify(
        base64.b64decode(answer["document"]), nonce=nonce, pcrs={}, allow_simulated=True
    )
    binding = Binding(
        tenant=caller.tenant,
        pool=session["pool"],
        kms_key_arn=session["kms_key_arn"],
        session_id=session["session_id"],
        epoch=document.epoch,
        worker_key=base64.b64decode(session["worker_key"]),
        wrapped_key=key.wrapped,
    )
    return Opened(binding=binding, psk=binding.psk(key.plaintext))


async def post(caller: Caller, opened: Opened, request_id: str, body: bytes, **changed: str) -> Answered:
    """One request; `changed` are headers with other values."""
    headers = {
        "X-KMS-Key-ARN": opened.binding.kms_key_arn,
        "X-Tenant-ID": opened.binding.tenant,
        "X-Model-Pool": opened.binding.pool,
        "X-Request-ID": request_id,
        "Content-Type": "application/octet-stream",
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    cut, raw = False, b""
    async with caller.http.post("/inference", data=io.BytesIO(body), headers=headers) as answer:
        try:
            async for piece in answer.content.iter_any():
                raw += piece
        except (OSError, aiohttp.ClientPayloadError):
            cut = True
        code = json.loads(raw)["code"] if answer.status >= 400 else None
    return Answered(status=answer.status, code=code, raw=raw, cut=cut)


def read(sealer: RequestSealer, answered: Answered) -> str:
    """The worker's plaintext. Raises `SealedError` for anything but a whole and authentic answer."""
    reader = ChunkReader()
    opener = sealer.answer(answered.raw[:32])
    text = b"".join(opener.open(chunk) for chunk in reader.feed(answered.raw[32:]))
    reader.close()
    opener.close()
    return text.decode()


def is_refused(sealer: RequestSealer, answered: Answered) -> bool:
    """Whether the one who asked has an error, and nothing that opens."""
    if answered.status >= 400:
        return True
    try:
        read(sealer, answered)
    except SealedError:
        return True
    return False


def ask(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt}).encode()


# -- the octet stream ---------------------------------------------------------------------------------------


async def test_the_octet_stream_form(caller: Caller, kms_url: str) -> None:
    """Salt and framed chunks; inside, the frames of a plain task and its end."""
    session = await opened(caller, kms_url, await started(caller))
    request_id, sealer = session.sealer()
    answered = await post(caller, session, request_id, sealer.body(ask("one two")))
    assert (answered.status, answered.cut) == (200, False)
    text = read(sealer, answered)
    assert 'event: text_delta\ndata: {"delta":"one "}' in text
    assert '"status":"completed"' in text


async def test_a_request_of_several_chunks(caller: Caller, kms_url: str) -> None:
    """A request and an answer that are longer than a chunk arrive whole."""
    session = await opened(caller, kms_url, await started(caller))
    request_id, sealer = session.sealer()
    answered = await post(caller, session, request_id, sealer.body(ask(MANY)))
    assert read(sealer, answered).count('"delta":"word ') == 120_000


async def test_the_same_bytes_run_once(caller: Caller, kms_url: str) -> None:
    """Sent again they give the same bytes back; other bytes under that id are a replay."""
    session = await opened(caller, kms_url, await started(caller))
    request_id, sealer = session.sealer()
    body = sealer.body(ask("once"))
    first = await post(caller, session, request_id, body)
    second = await post(caller, session, request_id, body)
    assert first.raw == second.raw
    assert '"once"' in read(sealer, first)
    _, other = session.sealer(request_id)
    refused = await post(caller, session, request_id, other.body(ask("twice")))
    assert (refused.status, refused.code) == (409, "replay")
    assert (await caller.session(session.binding.session_id))["tasks_done"] == 1


async def test_the_same_bytes_run_once_over_a_kill(
    services: Services, settings: dict[str, object], kms_url: str
) -> None:
    """A request that was accepted and not yet given to the worker, and then the service was killed: sent
    again, it is the same task, and runs once."""
    service = services.own(**settings).start()
    await with_enclave(service)
    async with service.caller() as caller:
        # Its worker shows its key while it loads, so this request has to wait for it in the service.
        session = await opened(caller, kms_url, await started(caller, pool="slow"))
        request_id, sealer = session.sealer()
        body = sealer.body(ask("once"))
        headers = {
            "X-KMS-Key-ARN": session.binding.kms_key_arn,
            "X-Model-Pool": session.binding.pool,
            "X-Request-ID": request_id,
            "Content-Type": "application/octet-stream",
            "Accept": "text/event-stream",
        }
        async with caller.http.post("/inference", data=body, headers=headers) as answer:
            assert answer.status == 200
            await answer.content.readany()
            location = answer.headers["Location"]
            await service.restart()
        answered = await post(caller, session, request_id, body)
        assert '"once"' in read(sealer, answered)
        shown = await caller.session(session.binding.session_id)
        assert shown["tasks_done"] == 1
        assert (await caller.task(location.rpartition("/")[2]))["state"] == "completed"
    await service.settle()
    assert service.terminate() == 0


# -- what is changed on the way -----------------------------------------------------------------------------


async def test_every_header_is_bound(caller: Caller, kms_url: str) -> None:
    """One header with another value, each in turn: an error, and no answer that opens."""
    session = await opened(caller, kms_url, await started(caller))
    for name, value in (
        ("X_KMS_Key_ARN", OTHER_ARN),
        ("X_KMS_Key_ARN", "not an arn"),
        ("X_Tenant_ID", "somebody-else"),
        ("X_Model_Pool", "batch"),
        ("X_Model_Pool", "no such pool"),
        ("X_Request_ID", "another-id"),
        ("X_Request_ID", "x" * 129),
    ):
        request_id, sealer = session.sealer()
        answered = await post(caller, session, request_id, sealer.body(ask("x")), **{name: value})
        assert is_refused(sealer, answered), (name, value)


async def test_every_field_of_the_head_is_bound(caller: Caller, kms_url: str) -> None:
    """One field of the head with another value, each in turn: an error, and no answer that opens."""
    session = await opened(caller, kms_url, await started(caller))
    other = await opened(caller, kms_url, await started(caller))
    for change in (
        {"session_id": other.binding.session_id},
        {"session_id": "s_00000000000000000000000000"},
        {"psk_id": other.binding.psk_id},
        {"psk_id": secrets.token_bytes(32)},
        {"enc": secrets.token_bytes(32)},
        {"enc": bytes(32)},
    ):
        request_id, sealer = session.sealer()
        body = sealer.body(ask("x"))
        head, at = read_head(body)
        fields = {"session_id": head.session_id, "psk_id": head.psk_id, "enc": head.enc, **change}
        answered = await post(caller, session, request_id, Head(**fields).pack() + body[at:])  # type: ignore[arg-type]
        assert is_refused(sealer, answered), change


async def test_chunks_are_bound_to_their_place(caller: Caller, kms_url: str) -> None:
    """Cut, exchanged, doubled, left out, with another flag or one other bit: an error, nothing runs."""
    session = await opened(caller, kms_url, await started(caller))

    def broken(chunks: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
        a, b, c = chunks
        yield "exchanged", [b, a, c]
        yield "doubled", [a, a, b, c]
        yield "left out", [a, c]
        yield "cut", [a, b]
        yield "behind the end", [a, b, c, c]
        yield "flag", [a, b, b"\x00" + c[1:]]
        yield "early end", [b"\x01" + a[1:]]
        yield "a bit", [a[:-1] + bytes([a[-1] ^ 1]), b, c]
        yield "none", []

    request_id, sealer = session.sealer()
    whole = sealer.body(ask(MANY))
    _, at = read_head(whole)
    names = [name for name, _ in broken(ChunkReader().feed(whole[at:]))]
    for number, name in enumerate(names):
        request_id, sealer = session.sealer()
        body = sealer.body(ask(MANY))
        _, at = read_head(body)
        chunks = list(broken(ChunkReader().feed(body[at:])))[number][1]
        answered = await post(caller, session, request_id, body[:at] + b"".join(map(frame, chunks)))
        assert is_refused(sealer, answered), name
    request_id, sealer = session.sealer()
    answered = await post(caller, session, request_id, sealer.body(ask("whole"))[:-1])
    assert is_refused(sealer, answered)
    request_id, sealer = session.sealer()
    assert "whole" in read(sealer, await post(caller, session, request_id, sealer.body(ask("whole"))))


async def test_another_epoch_key_or_worker_opens_nothing(caller: Caller, kms_url: str) -> None:
    """Whoever computed with another enclave, wrapped key, worker or KMS key is not understood."""
    session = await opened(caller, kms_url, await started(caller))
    for change in (
        {"epoch": secrets.token_bytes(16)},
        {"wrapped_key": session.binding.wrapped_key + b"x"},
        {"kms_key_arn": OTHER_ARN},
        {"tenant": "somebody-else"},
        {"pool": "batch"},
    ):
        binding = replace(session.binding, **change)  # type: ignore[arg-type]
        request_id = f"r-{secrets.token_hex(8)}"
        sealer = RequestSealer(binding, session.psk, request_id)
        body = sealer.body(ask("x"))
        answered = await post(caller, session, request_id, body)
        assert (answered.status, answered.code) == (409, "session_not_open"), change
        # And where the service lets the name pass, the worker does not:
        head, at = read_head(body)
        forged = Head(head.session_id, session.binding.psk_id, head.enc).pack() + body[at:]
        assert is_refused(sealer, await post(caller, session, request_id, forged)), change


async def test_bodies_that_are_none(caller: Caller, kms_url: str) -> None:
    """What is no sealed request is refused with a reason, and the session is as it was."""
    session = await opened(caller, kms_url, await started(caller))
    for body in (b"", b"\0", b"\xff\xff\xff\xff", b"{}", bytes(600), secrets.token_bytes(5000)):
        answered = await post(caller, session, f"r-{secrets.token_hex(4)}", body)
        assert 400 <= answered.status < 500, (body[:20], answered)
    answered = await post(caller, session, "r-big", bytes(5_000_000))
    assert (answered.status, answered.code) == (413, "body_too_large")
    request_id, sealer = session.sealer()
    assert "whole" in read(sealer, await post(caller, session, request_id, sealer.body(ask("whole"))))
