"""Sealed sessions: requests that only the session's worker can read, and answers that only this client can.

`open_sealed` verifies the enclave before anything is sealed; the protocol is docs/sealed.md. The service is
not trusted here: what it answers is compared with what was asked, and what counts is in the attestation.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import re
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Self
from uuid import uuid4

import aiohttp
import orjson

from gpu_server.client.events import TaskEvent
from gpu_server.client.kms import AwsDataKeys, DataKeys
from gpu_server.client.measurements import Expected
from gpu_server.client.sealed_stream import SealedStream
from gpu_server.client.service import Client, Refused
from gpu_server.client.waiting import OnWait, Waiting
from gpu_server.client.washes import NODE_KEY_BYTES, Judge, Lease
from gpu_server.sealed import attestation
from gpu_server.sealed.attestation import Attestation
from gpu_server.sealed.errors import AttestationRefused, Malformed, SealedError
from gpu_server.sealed.grant import Binding
from gpu_server.sealed.names import check_name, region_of
from gpu_server.sealed.request import RequestSealer
from gpu_server.sealed.wash import Verified

OPEN_SECONDS: Final = 1800.0
TROUBLE_SECONDS: Final = 60.0
END_SECONDS: Final = 10.0
WASH_SECONDS: Final = 120.0
LOOK_SECONDS: Final = 0.5
NONCE_BYTES: Final = 32
WORKER_KEY_BYTES: Final = 32
ENDED: Final = frozenset({"draining", "closed", "failed"})

Assurance = Literal["isolated-worker", "simulated"]


class OpenRefused(SealedError):
    """This client does not use the session: the service answered something else than it was asked for."""


class SessionEnded(Exception):
    """The session ended before it could be opened. `code` is the service's."""

    def __init__(self, session_id: str, code: str, message: str) -> None:
        super().__init__(f"session {session_id} ended before it could be opened: {code}: {message}")
        self.session_id, self.code, self.message = session_id, code, message


async def open_sealed(
    client: Client,
    *,
    kms_key_arn: str,
    pool: str | None = None,
    model_id: str | None = None,
    task_preset: str | None = None,
    task_difficulty: str | None = None,
    session_id: str | None = None,
    tenant: str | None = None,
    expect: Expected | None = None,
    keys: DataKeys | None = None,
    allow_simulated: bool = False,
    keep: bool = False,
    check_washes: bool = True,
    node_key: bytes | None = None,
    open_seconds: float = OPEN_SECONDS,
    trouble_seconds: float = TROUBLE_SECONDS,
    on_wait: OnWait | None = None,
) -> SealedSession:
    """Open a sealed session: start one (of `pool`, or `model_id` and `task_preset`) or take that of
    `session_id`, wait for its worker's key, and verify the enclave.

    `expect` must pin PCR0 or PCR8, unless `allow_simulated`; then an enclave without hardware is accepted
    too, which protects nothing, and `SealedSession.assurance` says which it is. `tenant`, like that of the
    client, must be who the service takes this client for.

    With `check_washes` each of the session's slots must have a certificate of a full wash before its lease,
    which the enclave's document lists, all of one node: `node_key`, its Ed25519 public key, where that is
    given.

    A slot, and the worker in it, are waited for; an enclave or a key service that is away only for
    `trouble_seconds`, because the session holds its slot meanwhile. `on_wait` is called with each reason to
    wait, once; its words are the service's.

    Raises ValueError, `Refused`, `SessionEnded`, `OpenRefused`, `AttestationRefused`, `WashNotProven`,
    `Malformed`, `DataKeyFailed`, `aiohttp.ClientError`, and `OpenTimeout` after `open_seconds`.
    """
    by_model = model_id is not None
    if by_model != (task_preset is not None) or not (by_model or pool or session_id):
        raise ValueError("name a pool, a model_id and a task_preset, or a session_id")
    if by_model and (pool is not None or session_id is not None):
        raise ValueError("a pool, and a session, has its model and preset: leave them out")
    if session_id is not None and task_difficulty is not None:
        raise ValueError("a session that is there has its difficulty: leave it out")
    expect = expect or Expected()
    if not expect.names_a_program and not allow_simulated:
        raise ValueError("expect PCR0 or PCR8: without either any enclave would do")
    if node_key is not None and len(node_key) != NODE_KEY_BYTES:
        raise ValueError(f"a node's key has {NODE_KEY_BYTES} bytes")
    region_of(kms_key_arn)
    wanted = {
        "pool": pool,
        "model_id": model_id,
        "task_preset": task_preset,
        "task_difficulty": task_difficulty,
        "kms_key_arn": kms_key_arn,
    }
    asked = _Asked(
        kms_key_arn=kms_key_arn,
        pool=pool,
        tenant=tenant or client.tenant,
        expect=expect,
        allow_simulated=allow_simulated,
        keys=keys or AwsDataKeys(),
        check_washes=check_washes,
        node_key=node_key,
        seconds=open_seconds,
        trouble_seconds=trouble_seconds,
        on_wait=on_wait,
    )
    waiting = asked.waiting()
    async with waiting.limit():
        if session_id is not None:
            found = await client.call_once("GET", f"/api/sessions/{_in_a_path(session_id)}")
            return await _open(client, asked, waiting, found, session_id, ends=False)
        body = {name: value for name, value in wanted.items() if value is not None}
        found = await client.call_once("POST", "/api/sessions", body)
        session_id = _in_a_path(_text(found, "session_id"))
        try:
            return await _open(client, asked, waiting, found, session_id, ends=not keep)
        except BaseException:
            await _end(client, session_id)
            raise


class SealedSession:
    """An open sealed session; `open_sealed` makes it. Leaving it ends the session, if that was started for it
    and not to be kept."""

    def __init__(self, client: Client, asked: _Asked, terms: _Terms, opened: _Opened, *, ends: bool) -> None:
        self._client, self._asked, self._terms, self._opened = client, asked, terms, opened
        self._ends = ends

    @property
    def session_id(self) -> str:
        """The service's name for it."""
        return self._terms.session_id

    @property
    def tenant(self) -> str:
        """Whose it is; part of every key."""
        return self._terms.tenant

    @property
    def pool(self) -> str:
        """What serves it; part of every key."""
        return self._terms.pool

    @property
    def attestation(self) -> Attestation:
        """The enclave's document, as this client verified it."""
        return self._opened.attestation

    @property
    def document(self) -> bytes:
        """That document itself, to be kept: `gpu-server attestation verify --at-document-time` reads it."""
        return self._opened.document

    @property
    def assurance(self) -> Assurance:
        """What this client has verified itself, never what an answer claims."""
        return "simulated" if self.attestation.simulated else "isolated-worker"

    @property
    def washes(self) -> tuple[Verified, ...]:
        """The certificates of the washes before this session, verified, in the order of its slots; none where
        they were not to be checked."""
        return self._opened.washes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._ends:
            await _end(self._client, self.session_id)

    async def submit(self, metadata: Mapping[str, Any]) -> AsyncGenerator[TaskEvent, None]:
        """Submit a task and give its events, the last being `task_finish`. What the worker wrote has
        `sealed=True`; the rest are the service's hints. A lost connection is taken up again, and a lost
        answer asked for with the same bytes, so that it runs once.

        Raises `Refused`, `SealedStreamBroken`, or `aiohttp.ClientError` or TimeoutError when the service
        cannot be reached (again).
        """
        binding, request_id = self._opened.binding, uuid4().hex
        sealer = RequestSealer(binding, self._opened.psk, request_id)
        stream = SealedStream(sealer.answer)
        headers = {
            "Accept": "text/event-stream",
            "Content-Type": "application/octet-stream",
            "X-KMS-Key-ARN": binding.kms_key_arn,
            "X-Tenant-ID": binding.tenant,
            "X-Model-Pool": binding.pool,
            "X-Request-ID": request_id,
        }
        body = sealer.body(orjson.dumps(dict(metadata)))
        events = self._client.submit_bytes("/inference", body, headers, complete=lambda: stream.complete)
        async with aclosing(events):
            async for event in events:
                for told in stream.take(event):
                    yield told
                if event.event == "task_finish":
                    return
        for told in stream.close():
            yield told

    async def reopen(self) -> None:
        """Open the session anew, with a new challenge and a new data key: for a service that has forgotten it
        was opened (`session_not_open`). What was sealed before stays readable. Raises as `open_sealed`."""
        waiting = self._asked.waiting()
        async with waiting.limit():
            self._opened = await _challenge(self._client, self._asked, waiting, self._terms)

    async def certificates_after(self, seconds: float = WASH_SECONDS) -> tuple[Verified, ...]:
        """The certificates of the washes behind it, verified, once it has ended and each slot has one. They
        follow those of `washes`, and their enclave is another one than the session's.

        Raises `WashNotProven`, with the reason missing after `seconds`; `Refused`, and `aiohttp.ClientError`
        or TimeoutError when the service cannot be reached (again).
        """
        lease = self._terms.lease
        if lease is None:
            found = await self._client.call_once("GET", f"/api/sessions/{self.session_id}")
            lease = Lease.of(self.session_id, found)
        judge = self._asked.judge(self.attestation)
        return await judge.after(self._client, lease, self.washes, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the caller wants; None for what may be any."""

    kms_key_arn: str
    pool: str | None
    tenant: str | None
    expect: Expected
    allow_simulated: bool
    keys: DataKeys
    check_washes: bool
    node_key: bytes | None
    seconds: float
    trouble_seconds: float
    on_wait: OnWait | None

    def waiting(self) -> Waiting:
        """For one opening."""
        return Waiting(self.seconds, self.trouble_seconds, self.on_wait)

    def judge(self, attestation: Attestation) -> Judge:
        """For the certificates of washes."""
        return Judge(node_key=self.node_key, expect=self.expect, attestation=attestation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What one session's keys are bound to."""

    tenant: str
    pool: str
    kms_key_arn: str
    session_id: str
    worker_key: bytes
    lease: Lease | None
    """None where washes are not to be checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    binding: Binding
    document: bytes = field(repr=False)
    attestation: Attestation
    washes: tuple[Verified, ...]
    psk: bytes = field(repr=False)


async def _open(
    client: Client,
    asked: _Asked,
    waiting: Waiting,
    found: Mapping[str, Any],
    session_id: str,
    *,
    ends: bool,
) -> SealedSession:
    found = await _with_worker_key(client, waiting, found, session_id)
    terms = _Terms(
        tenant=check_name(_text(found, "tenant"), "tenant"),
        pool=check_name(_text(found, "pool"), "pool"),
        kms_key_arn=_text(found, "kms_key_arn"),
        session_id=session_id,
        worker_key=_bytes(found, "worker_key", WORKER_KEY_BYTES),
        lease=Lease.of(session_id, found) if asked.check_washes else None,
    )
    for what, is_, wanted in (
        ("session_id", found.get("session_id"), session_id),
        ("tenant", terms.tenant, asked.tenant),
        ("pool", terms.pool, asked.pool),
        ("KMS key", terms.kms_key_arn, asked.kms_key_arn),
    ):
        if wanted is not None and is_ != wanted:
            raise OpenRefused(f"the session's {what} is another than was asked for")
    opened = await _challenge(client, asked, waiting, terms)
    return SealedSession(client, asked, terms, opened, ends=ends)


async def _with_worker_key(
    client: Client, waiting: Waiting, found: Mapping[str, Any], session_id: str
) -> Mapping[str, Any]:
    """The session, once its worker has shown its key: that is while the model still loads."""
    refusals = waiting.refusals(client)
    while found.get("worker_key") is None:
        if found.get("sealed") is not True:
            raise OpenRefused("the session is not sealed")
        if (state := _text(found, "state")) in ENDED:
            match found.get("error"):
                case {"code": str(code), "message": str(message)}:
                    raise SessionEnded(session_id, code, message)
            raise SessionEnded(session_id, str(found.get("close_reason")), state)
        waiting.for_session(found)
        await client.clock.sleep_until(client.clock.now() + LOOK_SECONDS)
        try:
            found = await client.call_once("GET", f"/api/sessions/{session_id}")
            refusals.renew()
        except Refused as refused:
            await refusals.wait_out(refused)
    return found


async def _challenge(client: Client, asked: _Asked, waiting: Waiting, terms: _Terms) -> _Opened:
    """Have the enclave attest itself, and hand the data key to the worker. Nothing is sealed before this."""
    data_key = await asked.keys.generate(terms.kms_key_arn, {"tenant": terms.tenant, "pool": terms.pool})
    nonce = os.urandom(NONCE_BYTES)
    answer = await _ask_again(
        client,
        waiting,
        "POST",
        f"/api/sessions/{terms.session_id}/open",
        {"nonce": b64encode(nonce).decode(), "wrapped_key": b64encode(data_key.wrapped).decode()},
    )
    document = _bytes(answer, "document")
    verified = attestation.verify(document, nonce=nonce, pcrs={}, allow_simulated=asked.allow_simulated)
    asked.expect.check(verified.pcrs)
    if not verified.simulated and not asked.expect.names_a_program:
        raise AttestationRefused("pcr", "neither PCR0 nor PCR8 was expected, so any enclave would do")
    if _bytes(answer, "worker_key", WORKER_KEY_BYTES) != terms.worker_key:
        raise OpenRefused("the session's worker has another key than it had before")
    _check_slots(answer, verified)
    washes: tuple[Verified, ...] = ()
    if terms.lease is not None:
        get = partial(_ask_again, client, waiting, "GET")
        washes = await asked.judge(verified).before(get, terms.lease)
    # What follows is the document's or this client's own; `epoch` and `mode` of the answer are not looked at.
    binding = Binding(
        tenant=terms.tenant,
        pool=terms.pool,
        kms_key_arn=terms.kms_key_arn,
        session_id=terms.session_id,
        epoch=verified.epoch,
        worker_key=terms.worker_key,
        wrapped_key=data_key.wrapped,
    )
    psk = binding.psk(data_key.plaintext)
    return _Opened(binding=binding, document=document, attestation=verified, washes=washes, psk=psk)


async def _ask_again(
    client: Client, waiting: Waiting, method: str, path: str, body: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One request, again while what it needs is not there yet."""
    refusals = waiting.refusals(client)
    while True:
        try:
            return await client.call_once(method, path, body)
        except Refused as refused:
            await refusals.wait_out(refused)


def _check_slots(answer: Mapping[str, Any], verified: Attestation) -> None:
    """Every wash record that the service names must be one that the enclave was started with."""
    slots = answer.get("slots", [])
    attested = {b64encode(record).decode() for record in verified.slots}
    if not isinstance(slots, list) or not all(isinstance(slot, str) and slot in attested for slot in slots):
        raise OpenRefused("a slot's wash record is not in the enclave's attestation")


async def _end(client: Client, session_id: str) -> None:
    """End the session, as far as that can be done now; it ends by itself when nobody uses it."""
    with suppress(Refused, aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            await client.call("DELETE", f"/api/sessions/{session_id}")


def _in_a_path(session_id: str) -> str:
    """A name on the sealed path may hold slashes and dots, which would be another route."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", session_id):
        raise Malformed("a session's id has letters, digits, _ and - only")
    return session_id


def _text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise OpenRefused(f"the service named no {name}")
    return value


def _bytes(answer: Mapping[str, Any], name: str, length: int | None = None) -> bytes:
    try:
        value = binascii.a2b_base64(_text(answer, name), strict_mode=True)
    except ValueError:
        raise OpenRefused(f"the service's {name} is not base64") from None
    if length is not None and len(value) != length:
        raise OpenRefused(f"the service's {name} has not {length} bytes")
    return value
