"""One sealed session, of fixed names and fresh keys, that tests of the protocol change one thing of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from os import urandom
from typing import Any

from gpu_server.sealed.grant import Binding, WorkerKey, open_grant, seal_grant
from gpu_server.sealed.request import RequestOpener, RequestSealer, read_head

ARN = "arn:aws:kms:eu-central-1:123456789012:key/0b4a3c1e-7d7c-4a6f-9a1e-2f5d1c3b4a59"
LENGTH = 4


def binding(**changes: Any) -> Binding:
    """A binding with plausible values, but for `changes`."""
    values: dict[str, Any] = {
        "tenant": "acme",
        "pool": "chat",
        "kms_key_arn": ARN,
        "session_id": "sess_01JD3Z",
        "epoch": sha256(b"an enclave's public key").digest()[:16],
        "worker_key": bytes(range(32)),
        "wrapped_key": b"what KMS made of the data key" * 6,
    }
    return Binding(**(values | changes))


@dataclass(slots=True)
class Exchange:
    """A client and a worker that agree, and one request between them."""

    request_id: str = "req-1"
    key: WorkerKey = field(default_factory=WorkerKey.generate)
    data_key: bytes = field(default_factory=lambda: urandom(32), repr=False)
    binding: Binding = field(init=False)
    psk: bytes = field(init=False, repr=False)
    sealer: RequestSealer = field(init=False)

    def __post_init__(self) -> None:
        self.binding = binding(worker_key=self.key.public)
        # By the way of a session: the enclave seals the grant, the worker opens it.
        self.psk = open_grant(self.binding, seal_grant(self.binding, self.data_key), self.key)
        self.sealer = RequestSealer(self.binding, self.psk, self.request_id)

    def opener(self, body: bytes, **changes: Any) -> tuple[RequestOpener, bytes]:
        """The worker's side of `body` and the chunks for it; `changes` are other values of the binding."""
        head, begin = read_head(body)
        seen = replace(self.binding, **changes)
        return RequestOpener(seen, self.psk, self.request_id, self.key, head), body[begin:]


def frames_of(stream: bytes) -> list[bytes]:
    """The framed chunks of a stream, each with its length, read without the reader that is tested."""
    found, at = [], 0
    while at < len(stream):
        end = at + LENGTH + int.from_bytes(stream[at : at + LENGTH], "big")
        found.append(stream[at:end])
        at = end
    return found
