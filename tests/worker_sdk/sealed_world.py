"""Client, enclave and service of one sealed session, as far as a worker sees them: what is sealed to it, and
what opens its answers. All of it computed for real."""

from __future__ import annotations

import base64
import itertools
import json
import os
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from gpu_worker.sealed_session import SealedSession

from gpu_server.sealed import delivery
from gpu_server.sealed.grant import Binding, seal_grant
from gpu_server.sealed.request import RequestSealer

from .conftest import parse

ARN = "arn:aws:kms:eu-central-1:123456789012:key/0a1b2c3d"
NUMBERS = itertools.count()
HEADERS = {"Content-Type": delivery.MEDIA_TYPE}


def session(**other: str) -> SealedSession:
    """A worker's key pair, for the session that the other functions speak to."""
    names = {"session_id": "s_1", "tenant": "acme", "pool": "default", "kms_key_arn": ARN}
    return SealedSession(**{**names, **other})


def binding_of(sealed_key: str, **other: Any) -> Binding:
    """What client and enclave bind a session's keys to."""
    bound = Binding(
        tenant="acme",
        pool="default",
        kms_key_arn=ARN,
        session_id="s_1",
        epoch=bytes(16),
        worker_key=base64.b64decode(sealed_key),
        wrapped_key=b"wrapped",
    )
    return replace(bound, **other)


@dataclass
class SealedRequest:
    """One request: its bytes for the worker, and what opens the answer to it."""

    binding: Binding
    clear: bytes
    request_id: str = field(default_factory=lambda: f"r{next(NUMBERS)}")
    data_key: bytes = bytes(32)

    def __post_init__(self) -> None:
        self._sealer = RequestSealer(self.binding, self.binding.psk(self.data_key), self.request_id)
        self.body = self._sealer.body(self.clear)
        self.delivery = self.delivered()

    def delivered(self, **other: Any) -> bytes:
        """As the service hands it over; `other` are values that it changed."""
        bound = self.binding
        honest = {
            "tenant": bound.tenant,
            "pool": bound.pool,
            "kms_key_arn": bound.kms_key_arn,
            "request_id": self.request_id,
            "epoch": bound.epoch,
            "wrapped_key": bound.wrapped_key,
            "grant": seal_grant(bound, self.data_key),
            "body": self.body,
        }
        return delivery.pack(**{**honest, **other})

    def clear_stream(self, outer: bytes) -> bytes:
        """The clear text of a worker's whole stream, which must be sealed events and a bare end."""
        *sealed, end = parse(outer)
        assert [(number, event) for number, event, _ in sealed] == [
            (number, "sealed") for number in range(1, len(sealed) + 1)
        ]
        assert end[:2] == (len(sealed) + 1, "end")
        salt, *chunks = (base64.b64decode(data["data"], validate=True) for _, _, data in sealed)
        opener = self._sealer.answer(salt)
        clear = b"".join(opener.open(chunk) for chunk in chunks)
        opener.close()
        return clear

    def events(self, outer: bytes) -> list[tuple[int | None, str, dict[str, Any]]]:
        """What the worker said, opened."""
        return parse(self.clear_stream(outer))


def request_to(sealed_key: str, metadata: Any = None, **other: Any) -> SealedRequest:
    """A request with this metadata; `other` are further fields of `SealedRequest`."""
    clear = json.dumps({} if metadata is None else metadata).encode()
    return SealedRequest(binding_of(sealed_key), clear, **other)


def post(http: aiohttp.ClientSession, task_id: str, data: bytes) -> Any:
    """Hand a delivery to a worker."""
    return http.post(f"http://worker/tasks/{task_id}", data=data, headers=HEADERS)


async def read(answer: Any) -> tuple[int, bytes]:
    """The status and the whole of an answer."""
    async with answer as response:
        return response.status, await response.read()


def random_text(length: int = 24) -> str:
    """A canary: text that is nowhere else."""
    return base64.b32encode(os.urandom(length)).decode()
