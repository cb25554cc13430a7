"""Client, enclave and worker in three processes: they agree from the bytes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import urandom
from pathlib import Path

from gpu_server.sealed import delivery
from gpu_server.sealed.chunks import ChunkReader
from gpu_server.sealed.frames import Code, FrameReader, Op, decode_reply, encode_request
from gpu_server.sealed.grant import Binding
from gpu_server.sealed.request import RequestSealer
from tests.sealed.exchange import ARN
from tests.sealed.other_end import EPOCH

ROOT = Path(__file__).resolve().parents[2]


class OtherEnd:
    """A process to talk to in lines of hex."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def say(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data.hex() + "\n")
        self._process.stdin.flush()

    def heard(self) -> bytes:
        assert self._process.stdout is not None
        return bytes.fromhex(self._process.stdout.readline())


@contextmanager
def other_end(*arguments: str) -> Iterator[OtherEnd]:
    with subprocess.Popen(
        [sys.executable, ROOT / "tests/sealed/other_end.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield OtherEnd(process)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_three_processes() -> None:
    """A request goes from a client to a worker by an enclave's grant, and its answer back, as bytes alone."""
    data_key, wrapped_key = urandom(32), urandom(180)
    with other_end("worker", "sess_7") as worker, other_end("enclave") as enclave:
        worker_key = worker.heard()
        bound = Binding(
            tenant="acme",
            pool="chat",
            kms_key_arn=ARN,
            session_id="sess_7",
            epoch=EPOCH,
            worker_key=worker_key,
            wrapped_key=wrapped_key,
        )
        enclave.say(
            encode_request(Op.GRANT, 3, ["acme", "chat", ARN, "sess_7", worker_key, wrapped_key, b"cms"])
        )
        enclave.say(data_key)
        (payload,) = FrameReader().feed(enclave.heard())
        reply = decode_reply(payload)
        assert (reply.id, reply.code) == (3, Code.OK)
        (grant,) = reply.result
        assert isinstance(grant, bytes)

        sealer = RequestSealer(bound, bound.psk(data_key), "req-7")
        packed = delivery.pack(
            tenant="acme",
            pool="chat",
            kms_key_arn=ARN,
            request_id="req-7",
            epoch=EPOCH,
            wrapped_key=wrapped_key,
            grant=grant,
            body=sealer.body(b"hello from another process"),
        )
        assert b"hello" not in packed
        worker.say(packed)
        octets = worker.heard()

    opener = sealer.answer(octets[:32])
    text = b"".join(opener.open(chunk) for chunk in ChunkReader().feed(octets[32:]))
    opener.close()
    assert text == b"you said: hello from another process"
