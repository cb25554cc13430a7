"""The other side of a sealed session, played over HTTP: keys, documents, grants and chunks are real, and the
service in between can be told to cheat."""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from os import urandom
from typing import Any

import orjson
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpu_server.client import Client, DataKey
from gpu_server.ports import KeyService
from gpu_server.sealed import canonical
from gpu_server.sealed.attestation import verify
from gpu_server.sealed.cms import make_recipient, open_recipient
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant, seal_grant
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.request import RequestOpener, read_head
from gpu_server.sealed.software_nsm import SoftwareNsm
from gpu_server.sealed.wash import encode_record, hash_of, issue
from tests.app.api_world import KEY
from tests.app.played_service import Jumping, Played
from tests.app.played_worker import frame
from tests.sealed.washes import record

ARN = "arn:aws:kms:eu-central-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000001"
POOL, TENANT = "chat", "acme"
MEASUREMENTS = {index: bytes([index + 1]) * 48 for index in (0, 1, 2)}
PCR0 = MEASUREMENTS[0].hex()
CANARY = "canary-4711"
FENCE = 8
"""Of the session's lease; the wash before it has 7."""
NODE = Ed25519PrivateKey.from_private_bytes(b"n" * 32)
NODE_KEY = NODE.public_key().public_bytes_raw()


def text(data: bytes) -> str:
    return b64encode(data).decode()


class Keys:
    """A key service, the client's side and the service's: what it wraps opens only with the same key and
    context, and only for an enclave."""

    def __init__(self) -> None:
        self._master = AESGCM(urandom(32))
        self.contexts: list[Mapping[str, str]] = []

    async def generate(self, kms_key_arn: str, context: Mapping[str, str]) -> DataKey:
        self.contexts.append(context)
        plaintext, nonce = urandom(32), urandom(12)
        wrapped = nonce + self._master.encrypt(nonce, plaintext, self._about(kms_key_arn, context))
        return DataKey(plaintext=plaintext, wrapped=wrapped)

    async def release(
        self, *, kms_key_arn: str, wrapped_key: bytes, context: Mapping[str, str], document: bytes
    ) -> bytes:
        about = self._about(kms_key_arn, context)
        data_key = self._master.decrypt(wrapped_key[:12], wrapped_key[12:], about)
        enclave = verify(document, nonce=None, pcrs={}, allow_simulated=True)
        assert enclave.public_key is not None
        return make_recipient(data_key, enclave.public_key)

    def _about(self, kms_key_arn: str, context: Mapping[str, str]) -> bytes:
        return orjson.dumps([kms_key_arn, dict(sorted(context.items()))])


class PlayedEnclave:
    """What the enclave does, over a software NSM."""

    def __init__(self, nsm: SoftwareNsm | None = None) -> None:
        self._nsm = Nsm((nsm or SoftwareNsm(MEASUREMENTS)).process)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.spki = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def attest(self, nonce: bytes, records: tuple[bytes, ...] = ()) -> bytes:
        user_data = canonical.encode(["gpu-server/1", list(records)])
        return self._nsm.attestation(public_key=self.spki, user_data=user_data, nonce=nonce)

    def grant(self, binding: Binding, for_recipient: bytes) -> bytes:
        return seal_grant(binding, open_recipient(for_recipient, self._key))


@dataclass(frozen=True)
class Washed:
    """A wash as the service keeps it: its certificate, and the hash of the record in that."""

    raw: bytes
    h: bytes

    @property
    def hash(self) -> bytes:
        return hash_of(self.raw)


@cache
def _enclave_of_washes() -> PlayedEnclave:
    """One for all: to make its key takes long."""
    return PlayedEnclave()


def washed(
    enclave: PlayedEnclave | None = None, *, key: Ed25519PrivateKey = NODE, sealed: bool = True, **fields: Any
) -> Washed:
    """A certificate of such a record (tests/sealed/washes.py), attested by an enclave that was born after
    it; with `sealed=False` by none."""
    raw = encode_record(record(key, **({} if sealed else {"enclave": "not_applicable"}) | fields))
    h = hash_of(raw)
    paper = (enclave or _enclave_of_washes()).attest(h, (h,)) if sealed else None
    return Washed(issue(raw, paper, key), h)


@dataclass
class Task:
    """What the worker made of one request: the service's frames of its answer, each with its number."""

    metadata: dict[str, Any]
    request_id: str
    body: bytes
    frames: list[bytes] = field(default_factory=list)


def words(metadata: dict[str, Any]) -> list[bytes]:
    """The plaintext of each chunk: one word each, and the end."""
    told = [frame(n, "text_delta", delta=word) for n, word in enumerate(metadata["prompt"].split(), 1)]
    usage = {"completion_tokens": len(told)}
    return [*told, frame(len(told) + 1, "end", status="completed", usage=usage)]


class SealedService(Played):
    """A service, its enclave, its key service and one worker. What can be twisted is an attribute:

    `session`, `answer`: what `GET /api/sessions/{id}` and the opening answer; `chunks`: what the worker says;
    `stream`: the frames of an answer; `cuts`: after how many frames each stream breaks, in turn; `looks`: how
    often a client has to look until the worker shows its key; `refusals`: statuses and codes with which
    openings are refused first; `washes`: the certificates that it has, by the hash of their record; `before`
    and `behind`: those around the session; `attested`: what the enclave's document lists.
    """

    def __init__(self, keys: Keys) -> None:
        super().__init__([], Jumping())
        self.kms = keys
        self.key_service: KeyService = keys
        self.enclave, self.worker = PlayedEnclave(), WorkerKey.generate()
        self.session: dict[str, Any] = {}
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.stream: Callable[[list[bytes]], list[bytes]] = lambda frames: frames
        self.chunks: Callable[[dict[str, Any]], list[bytes]] = words
        self.cuts: list[int] = []
        self.looks = 0
        self.refusals: list[tuple[int, str]] = []
        self.psks: dict[bytes, tuple[Binding, bytes]] = {}
        self.tasks: dict[str, Task] = {}
        self.ended: list[str] = []
        self.seen = b""
        self.nonces: list[bytes] = []
        self.washes: dict[bytes, Washed] = {}
        self.behind: list[Washed] = []
        self.washed_by(washed())

    def washed_by(self, *washes: Washed) -> None:
        """These are the washes before the session, of each of its slots, and the enclave lists them."""
        self.before = [self.keep(wash) for wash in washes]
        self.attested = [wash.h for wash in washes]

    def keep(self, wash: Washed) -> Washed:
        """It has this certificate."""
        self.washes[wash.h] = wash
        return wash

    def wash(self, **fields: Any) -> Washed:
        """The session's slot is washed behind it; `fields` of the record are others than they should be."""
        made = {"fence": FENCE, "prev": [*self.before, *self.behind][-1].hash, **fields}
        self.behind.append(self.keep(washed(**made)))
        return self.behind[-1]

    def view(self) -> dict[str, Any]:
        shown = {
            "session_id": "s_1",
            "tenant": TENANT,
            "state": "starting",
            "sealed": True,
            "pool": POOL,
            "kms_key_arn": ARN,
            "worker_key": text(self.worker.public) if self.looks <= 0 else None,
            "error": None,
            "close_reason": None,
            "gpu_ids": ["0"],
            "fence": FENCE,
            "washed_before": [wash.h.hex() for wash in self.before],
            "washed_after": [wash.h.hex() for wash in self.behind],
        }
        return shown | self.session

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        body = await request.read()
        self.bodies.append(body)
        self.seen += body
        match request.method, request.path.split("/")[1:]:
            case "POST", ["api", "sessions"]:
                return web.json_response(self.view(), status=201)
            case "GET", ["api", "sessions", "s_1"]:
                self.looks -= 1
                return web.json_response(self.view())
            case "DELETE", ["api", "sessions", session_id]:
                self.ended.append(session_id)
                return web.json_response(self.view())
            case "POST", ["api", "sessions", "s_1", "open"]:
                if self.refusals:
                    return _refused(*self.refusals.pop(0))
                return web.json_response(self.answer(await self._open(orjson.loads(body))))
            case "GET", ["api", "certificates", h]:
                if (wash := self.washes.get(bytes.fromhex(h))) is None:
                    return _refused(404, "certificate_not_found")
                return web.json_response({"certificate": text(wash.raw)})
            case "POST", ["inference"]:
                return await self._inference(request, body)
            case "GET", ["api", "tasks", task_id, "events"]:
                after = int(request.headers["Last-Event-ID"])
                return await self._send(request, task_id, after)
        return _refused(404, "not_found")

    async def _open(self, asked: dict[str, Any]) -> dict[str, Any]:
        nonce, wrapped = b64decode(asked["nonce"]), b64decode(asked["wrapped_key"])
        self.nonces.append(nonce)
        document = self.enclave.attest(nonce, tuple(self.attested))
        context = {"tenant": TENANT, "pool": POOL}
        binding = Binding(
            tenant=TENANT,
            pool=POOL,
            kms_key_arn=ARN,
            session_id="s_1",
            epoch=epoch_of(self.enclave),
            worker_key=self.worker.public,
            wrapped_key=wrapped,
        )
        for_recipient = await self.key_service.release(
            kms_key_arn=ARN, wrapped_key=wrapped, context=context, document=document
        )
        grant = self.enclave.grant(binding, for_recipient)
        self.psks[binding.psk_id] = binding, open_grant(binding, grant, self.worker)
        return {
            "document": text(document),
            "worker_key": text(self.worker.public),
            "epoch": binding.epoch.hex(),
            "slots": [text(h) for h in self.attested],
            "mode": "simulated",
        }

    async def _inference(self, request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.headers["Accept"] == "text/event-stream"
        assert request.headers["Content-Type"] == "application/octet-stream"
        names = [request.headers[f"X-{name}"] for name in ("KMS-Key-ARN", "Tenant-ID", "Model-Pool")]
        assert names == [ARN, TENANT, POOL]
        request_id = request.headers["X-Request-ID"]
        for task_id, task in self.tasks.items():
            if task.request_id == request_id:
                assert task.body == body
                return await self._send(request, task_id, 0)
        head, begin = read_head(body)
        if head.psk_id not in self.psks:
            return _refused(409, "session_not_open")
        binding, psk = self.psks[head.psk_id]
        opener = RequestOpener(binding, psk, request_id, self.worker, head)
        metadata = orjson.loads(opener.open(body[begin:]))
        task_id = f"t_{len(self.tasks) + 1}"
        sealer = opener.answer()
        chunks = self.chunks(metadata)
        sealed = [sealer.salt]
        for number, chunk in enumerate(chunks, 1):
            sealed += sealer.seal(chunk, final=number == len(chunks))
        frames = [frame(1, "connection", status="allocated", task_id=task_id)]
        frames += [frame(number, "sealed", data=text(data)) for number, data in enumerate(sealed, 2)]
        frames += [frame(len(frames) + 1, "task_finish", status="completed", elapsed_seconds=0.1)]
        self.tasks[task_id] = Task(metadata, request_id, body, frames)
        return await self._send(request, task_id, 0)

    async def _send(self, request: web.Request, task_id: str, after: int) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Location": f"/api/tasks/{task_id}"}
        answer = web.StreamResponse(headers=headers)
        await answer.prepare(request)
        frames = self.stream(self.tasks[task_id].frames)[after:]
        cut = self.cuts.pop(0) if self.cuts else None
        await answer.write(b"".join(frames[:cut]))
        if cut is not None:
            assert request.transport is not None
            request.transport.abort()
        return answer


def epoch_of(enclave: PlayedEnclave) -> bytes:
    """The first 16 bytes of SHA-256 of an enclave's public key."""
    return sha256(enclave.spki).digest()[:16]


def _refused(status: int, code: str) -> web.Response:
    return web.json_response(
        {"code": code, "detail": "some detail"}, status=status, content_type="application/problem+json"
    )


@asynccontextmanager
async def sealed_world(**options: Any) -> AsyncIterator[tuple[Client, SealedService]]:
    """A service with a sealed session's worker, and a client of it, whose clock is its clock."""
    service = SealedService(Keys())
    await service.open()
    try:
        url = f"http://127.0.0.1:{service.port}"
        async with asyncio.timeout(60), Client(url, KEY, clock=service.clock, **options) as client:
            yield client, service
    finally:
        await service.close()
