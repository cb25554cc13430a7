"""The enclave's or the worker's end of the protocol, in a process of its own: hex lines in, hex lines out.

python other_end.py enclave    a GRANT request's frame and the data key -> the reply's frame
python other_end.py worker SESSION    says its public key; a delivery -> the answer as an octet-stream
"""

from __future__ import annotations

import sys

from gpu_server.sealed import delivery
from gpu_server.sealed.chunks import frame
from gpu_server.sealed.frames import Code, FrameReader, decode_request, encode_reply
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant, seal_grant
from gpu_server.sealed.request import RequestOpener, read_head

EPOCH = b"enclave's epoch."


def heard() -> bytes:
    return bytes.fromhex(sys.stdin.readline())


def say(data: bytes) -> None:
    print(data.hex(), flush=True)


def enclave() -> None:
    (payload,) = FrameReader().feed(heard())
    data_key = heard()
    request = decode_request(payload)
    match request.args:
        case [
            str() as tenant,
            str() as pool,
            str() as arn,
            str() as session,
            bytes() as key,
            bytes() as wrapped,
            _,
        ]:
            bound = Binding(
                tenant=tenant,
                pool=pool,
                kms_key_arn=arn,
                session_id=session,
                epoch=EPOCH,
                worker_key=key,
                wrapped_key=wrapped,
            )
            say(encode_reply(request.id, Code.OK, [seal_grant(bound, data_key)]))


def worker(session_id: str) -> None:
    key = WorkerKey.generate()
    say(key.public)
    found = delivery.unpack(heard())
    bound = found.binding(session_id, key.public)
    head, begin = read_head(found.body)
    opener = RequestOpener(bound, open_grant(bound, found.grant, key), found.request_id, key, head)
    prompt = opener.open(found.body[begin:])
    answer = opener.answer()
    chunks = answer.seal(b"you said: ", final=False) + answer.seal(prompt, final=True)
    say(answer.salt + b"".join(frame(chunk) for chunk in chunks))


if __name__ == "__main__":
    {"enclave": enclave, "worker": worker}[sys.argv[1]](*sys.argv[2:])
