"""The HTTP interface with an enclave, a key service and workers that open what is sealed to them: all of it
in process, and all of it computed for real."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from gpu_server.sealed import delivery
from gpu_server.sealed.attestation import verify
from gpu_server.sealed.chunks import ChunkReader
from gpu_server.sealed.errors import SealedError
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant
from gpu_server.sealed.request import RequestOpener, RequestSealer, read_head
from gpu_server.sealed.response import ResponseSealer
from tests.app.api_world import KEY, Answer, Api, api_world
from tests.app.played_worker import Call, PlayedWorker, end, frame
from tests.app.reading import Event, parse
from tests.fakes.enclave import MEASUREMENTS, FakeEnclave
from tests.fakes.key_service import ARN, FakeKeyService

OCTETS = "application/octet-stream"


def text(raw: bytes) -> str:
    return b64encode(raw).decode()


def sealed_frame(number: int, raw: bytes) -> bytes:
    """A worker's event that holds these bytes."""
    return frame(number, "sealed", data=text(raw))


def echo(metadata: dict[str, Any]) -> list[bytes]:
    """The plaintext of each chunk: the words of the prompt, and the end."""
    words = str(metadata["prompt"]).split()
    deltas = [frame(number, "text_delta", delta=word) for number, word in enumerate(words, 1)]
    return [*deltas, end(len(words) + 1, usage={"words": len(words)})]


@dataclass
class SealedWorkers:
    """Every worker of a world: each has a key, shows it, and opens what is sealed to it. `ran` tells what
    ran.

    `say` may change the sealed stream, which is the salt and the chunks; `before[n]` happens before its item
    n; `closing` is the plain end.
    """

    keys: dict[str, WorkerKey] = field(default_factory=dict)
    ran: list[tuple[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    say: Callable[[list[bytes]], list[bytes]] = lambda said: said
    before: dict[int, Callable[[Call], Awaitable[None]]] = field(default_factory=dict)
    closing: dict[str, Any] = field(default_factory=lambda: {"status": "completed"})
    _kept: dict[tuple[str, str], tuple[bytes, list[bytes]]] = field(default_factory=dict)

    def prepare(self, worker: PlayedWorker) -> None:
        """A worker starts: it has a key before all else."""
        key = self.keys.setdefault(worker.session_id, WorkerKey.generate())
        worker.health["sealed_key"] = text(key.public)

    async def __call__(self, worker: PlayedWorker, call: Call) -> None:
        """Run a sealed task, once for each request id."""
        if call.media_type != delivery.MEDIA_TYPE:
            await call.answer(415, {"error": "only what is sealed"})
            return
        self.bodies.append(call.body)
        try:
            enc, said, known_enc = self._run(worker, call.body)
        except SealedError:
            await call.answer(400, {"error": "cannot open", "code": "decrypt"})
            return
        if known_enc != enc:
            await call.answer(409, {"error": "other bytes before", "code": "replay"})
            return
        await call.stream()
        for number, item in enumerate(said, 1):
            if number in self.before:
                await self.before[number](call)
            await call.send(sealed_frame(number, item))
        await call.send(frame(len(said) + 1, "end", **self.closing))
        await call.done()

    def _run(self, worker: PlayedWorker, body: bytes) -> tuple[bytes, list[bytes], bytes]:
        """What the request was sealed with, what is said, and what the request of that id was sealed with."""
        given, key = delivery.unpack(body), self.keys[worker.session_id]
        binding = given.binding(worker.session_id, key.public)
        psk = open_grant(binding, given.grant, key)
        head, at = read_head(given.body)
        name = (worker.session_id, given.request_id)
        if name not in self._kept:
            opener = RequestOpener(binding, psk, given.request_id, key, head)
            metadata = orjson.loads(opener.open(given.body[at:]))
            self.ran.append((given.request_id, metadata))
            sealer = opener.answer()
            said = self.say([sealer.salt, *_sealed(sealer, metadata)])
            self._kept[name] = (head.enc, said)
        known_enc, said = self._kept[name]
        return head.enc, said, known_enc


def _sealed(sealer: ResponseSealer, metadata: dict[str, Any]) -> list[bytes]:
    *pieces, last = echo(metadata)
    chunks = [chunk for piece in pieces for chunk in sealer.seal(piece, final=False)]
    return [*chunks, *sealer.seal(last, final=True)]


@dataclass
class SealedRequest:
    """One request, as a tenant's client seals it, and what opens the answer."""

    request_id: str
    sealer: RequestSealer
    body: bytes

    def read(self, octets: bytes) -> list[Event]:
        """The events in an answer of bytes. Raises `SealedError` unless it is whole."""
        reader = ChunkReader()
        chunks = reader.feed(octets[32:])
        reader.close()
        return self._open(octets[:32], chunks)

    def read_events(self, events: list[Event]) -> list[Event]:
        """The same of a stream of the service's events."""
        sealed = [b64decode(event.data["data"]) for event in events if event.name == "sealed"]
        return self._open(sealed[0], sealed[1:])

    def _open(self, salt: bytes, chunks: list[bytes]) -> list[Event]:
        opener = self.sealer.answer(salt)
        plain = b"".join(opener.open(chunk) for chunk in chunks)
        opener.close()
        return parse(plain)


@dataclass
class SealedClient:
    """A tenant with an open session: what it verified, and the key that only its worker has too."""

    api: Api
    session_id: str
    binding: Binding
    psk: bytes = field(repr=False)
    pool: str = "default"
    _count: int = 0

    def seal(self, prompt: str = "", request_id: str | None = None) -> SealedRequest:
        """A new request."""
        self._count += 1
        request_id = request_id or f"r-{self._count}"
        sealer = RequestSealer(self.binding, self.psk, request_id)
        return SealedRequest(request_id, sealer, sealer.body(orjson.dumps({"prompt": prompt})))

    async def send(self, request: SealedRequest, **changes: str | None) -> Answer:
        """Send a request for the whole answer, with other headers: None leaves one out."""
        headers = self.headers(request, **changes)
        return await self.api.ask("POST", "/inference", data=request.body, tenant=None, headers=headers)

    def headers(self, request: SealedRequest, **changes: str | None) -> dict[str, str]:
        """The headers of a request, with changes (`x_request_id=...`)."""
        headers: dict[str, str | None] = {
            "x_api_key": KEY,
            "x_kms_key_arn": self.binding.kms_key_arn,
            "x_tenant_id": self.binding.tenant,
            "x_model_pool": self.pool,
            "x_request_id": request.request_id,
            "content_type": OCTETS,
            **changes,
        }
        return {name.replace("_", "-"): value for name, value in headers.items() if value is not None}


@dataclass
class SealedApi:
    """A running application with everything that the sealed path needs."""

    api: Api
    enclave: FakeEnclave
    keys: FakeKeyService
    workers: SealedWorkers

    async def start(self, tenant: str = "a", *, ready: bool = True, **body: Any) -> str:
        """A sealed session."""
        body = {"pool": "default", "kms_key_arn": ARN, **body}
        answer = await self.api.ask("POST", "/api/sessions", body, tenant=tenant)
        assert answer.status == 201, answer.raw
        if ready:
            await self.api.world.ready(answer.json["session_id"])
        return str(answer.json["session_id"])

    async def ask_to_open(
        self, session_id: str, wrapped_key: bytes = b"wrapped", nonce: bytes = bytes(32), tenant: str = "a"
    ) -> Answer:
        """Ask for a grant of this data key."""
        body = {"nonce": text(nonce), "wrapped_key": text(wrapped_key)}
        return await self.api.ask("POST", f"/api/sessions/{session_id}/open", body, tenant=tenant)

    async def open(self, session_id: str, tenant: str = "a", pool: str = "default") -> SealedClient:
        """Open a session as a client must: verify the document, and take the epoch from it alone."""
        data_key, wrapped = self.keys.data_key(ARN, {"tenant": tenant, "pool": pool})
        nonce = os.urandom(32)
        answer = await self.ask_to_open(session_id, wrapped, nonce, tenant)
        assert answer.status == 200, answer.raw
        document = b64decode(answer.json["document"])
        attested = verify(document, nonce=nonce, pcrs=MEASUREMENTS, allow_simulated=True)
        binding = Binding(
            tenant=tenant,
            pool=pool,
            kms_key_arn=ARN,
            session_id=session_id,
            epoch=attested.epoch,
            worker_key=b64decode(answer.json["worker_key"]),
            wrapped_key=wrapped,
        )
        return SealedClient(self.api, session_id, binding, binding.psk(data_key), pool)

    async def client(self, tenant: str = "a") -> SealedClient:
        """A tenant with an open session."""
        return await self.open(await self.start(tenant), tenant)


@asynccontextmanager
async def sealed_world(tmp_path: Path, **options: Any) -> AsyncIterator[SealedApi]:
    """The application over a world of `api_world(**options)`, whose workers serve sealed tasks."""
    enclave, keys, workers = FakeEnclave(), FakeKeyService(), SealedWorkers()
    async with api_world(tmp_path, enclave=enclave, keys=keys, **options) as api:
        api.world.on_task = api.world.on_attach = workers
        api.world.prepare = workers.prepare
        yield SealedApi(api, enclave, keys, workers)
