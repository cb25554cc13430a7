"""Writes docs/sealed-vectors: the sealed protocol's test vectors, for implementations in other languages.

Everything is fixed, the ephemeral keys and salts too, so the same files come out each time:

    ./scripts/make_sealed_vectors.sh [FOLDER]

What is fixed here must be random anywhere else.
"""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gpu_server.sealed import delivery as deliveries
from gpu_server.sealed import hpke
from gpu_server.sealed.canonical import Value, encode
from gpu_server.sealed.chunks import FINAL, MAX_DATA, MORE, frame, pad
from gpu_server.sealed.frames import MAX_SLOTS, Code, Op, encode_reply, encode_request
from gpu_server.sealed.grant import Binding, WorkerKey, seal_grant
from gpu_server.sealed.request import RequestSealer
from gpu_server.sealed.response import ResponseSealer
from scripts.attestation_vectors import attestation
from scripts.canonical_vectors import canonical, shown
from scripts.certificate_vectors import certificates

ARN = "arn:aws:kms:eu-central-1:123456789012:key/0b4a3c1e-7d7c-4a6f-9a1e-2f5d1c3b4a59"
REQUEST_ID = "01JD3ZK7Q9W4R8T2Y6"


def seed(name: str) -> bytes:
    """32 bytes that stand for something random."""
    return sha256(f"gpu-server sealed vectors: {name}".encode()).digest()


def private(name: str) -> X25519PrivateKey:
    """A key pair that stands for a random one."""
    return X25519PrivateKey.from_private_bytes(seed(name))


WORKER = WorkerKey(private("worker"))
DATA_KEY = seed("data key")
BINDING = Binding(
    tenant="acme",
    pool="chat",
    kms_key_arn=ARN,
    session_id="sess_01JD3ZK0",
    epoch=sha256(b"the enclave's SubjectPublicKeyInfo").digest()[:16],
    worker_key=WORKER.public,
    wrapped_key=b"".join(seed(f"wrapped key {i}") for i in range(6)),
)
PSK = BINDING.psk(DATA_KEY)


# -- keys --------------------------------------------------------------------------------------------------


def session() -> dict[str, Any]:
    """What client, enclave and worker know of a session, with the two secrets that no service ever has."""
    return {
        "tenant": BINDING.tenant,
        "pool": BINDING.pool,
        "kms_key_arn": BINDING.kms_key_arn,
        "session_id": BINDING.session_id,
        "epoch": BINDING.epoch.hex(),
        "worker_key": BINDING.worker_key.hex(),
        "worker_private_key": seed("worker").hex(),
        "wrapped_key": BINDING.wrapped_key.hex(),
        "data_key": DATA_KEY.hex(),
    }


def grant() -> dict[str, Any]:
    """The way from a data key to the psk, and to the grant."""
    ephemeral = private("grant")
    return {
        "session": session(),
        "wrapped_key_sha256": sha256(BINDING.wrapped_key).hexdigest(),
        "g": BINDING.info.hex(),
        "psk_id": BINDING.psk_id.hex(),
        "psk": PSK.hex(),
        "ephemeral_private_key": seed("grant").hex(),
        "ephemeral_public_key": ephemeral.public_key().public_bytes_raw().hex(),
        "grant": seal_grant(BINDING, DATA_KEY, _ephemeral=ephemeral).hex(),
    }


# -- requests ----------------------------------------------------------------------------------------------

EVENTS = [
    b'id: 1\nevent: text_delta\ndata: {"delta":"Hel"}\n\nid: 2\nevent: text_delta\ndata: {"delta":"lo"}\n\n',
    b'event: progress\ndata: {"stage":"generating","done":2,"total":3}\n\n',
    b'id: 3\nevent: end\ndata: {"status":"completed","usage":{"output_tokens":2}}\n\n',
]
REQUESTS: dict[str, list[bytes]] = {
    "a small request": [b'{"prompt":"Hello"}'],
    "one kibibyte": [bytes(i % 251 for i in range(1024))],
    "several chunks": [b'{"prompt":"', b"x" * 300, b'"}'],
    "an empty last chunk": [b'{"prompt":"Hello"}', b""],
}


def sealer(name: str) -> RequestSealer:
    """The client's side of the request of that name."""
    return RequestSealer(BINDING, PSK, REQUEST_ID, _ephemeral=private(f"request: {name}"))


def request_parts(name: str) -> tuple[RequestSealer, list[bytes]]:
    """A request, and its framed chunks."""
    sealing, pieces = sealer(name), REQUESTS[name]
    return sealing, [sealing.seal(piece, final=i == len(pieces) - 1) for i, piece in enumerate(pieces)]


def request_vector(name: str) -> dict[str, Any]:
    """A request with everything that is computed on the way."""
    sealing, chunks = request_parts(name)
    return {
        "name": name,
        "request_id": REQUEST_ID,
        "info": encode(["gpu-server/1", "request", REQUEST_ID]).hex(),
        "ephemeral_private_key": seed(f"request: {name}").hex(),
        "head": sealing.head.hex(),
        "pieces": [piece.hex() for piece in REQUESTS[name]],
        "chunks": [chunk.hex() for chunk in chunks],
        "body": (sealing.head + b"".join(chunks)).hex(),
    }


def large_request() -> dict[str, Any]:
    """A request of full chunks and a last one, by its digest and the rule that its plaintext follows."""
    size = 2 * MAX_DATA + 1000
    body = sealer("large").body(bytes(i % 251 for i in range(size)))
    return {
        "name": "two full chunks and a rest",
        "request_id": REQUEST_ID,
        "ephemeral_private_key": seed("request: large").hex(),
        "plaintext": "byte i is i mod 251, from i = 0",
        "plaintext_bytes": size,
        "piece_bytes": [MAX_DATA, MAX_DATA, size - 2 * MAX_DATA],
        "body_bytes": len(body),
        "body_sha256": sha256(body).hexdigest(),
    }


def headed(version: int, session_id: str, psk_id: bytes, enc: bytes) -> bytes:
    """A head of these values."""
    return frame(encode([version, session_id, psk_id, enc]))


def padded_otherwise(padded: bytes) -> bytes:
    """A body whose one chunk is sealed as it should be, but padded in another way."""
    ephemeral = private("request: padding")
    info = encode(["gpu-server/1", "request", REQUEST_ID])
    sender = hpke.psk_sender(BINDING.worker_key, info, PSK, BINDING.psk_id, ephemeral=ephemeral)
    head = headed(1, BINDING.session_id, BINDING.psk_id, sender.enc)
    return head + frame(FINAL + sender.seal(padded, FINAL))


def sealed_otherwise(binding: Binding, psk: bytes, request_id: str) -> bytes:
    """A good request, but to another session, with another psk, or under another id."""
    return RequestSealer(binding, psk, request_id, _ephemeral=private("otherwise")).body(b"{}")


def refused_requests() -> dict[str, bytes]:
    """Bodies that must be refused by whoever opens them in this session, under this request id."""
    sealing, (first, second, last) = request_parts("several chunks")
    head, enc = sealing.head, sealing.head[-32:]
    session_id, psk_id = BINDING.session_id, BINDING.psk_id
    elsewhere = replace(BINDING, session_id="sess_other")
    chunks = {
        "no chunk": b"",
        "cut before the last chunk": first + second,
        "cut in the last chunk": first + second + last[:-1],
        "a chunk left out": first + last,
        "two chunks changed about": second + first + last,
        "a chunk twice": first + first + second + last,
        "a byte behind the last chunk": first + second + last + b"\0",
        "a chunk behind the last one": first + second + last + last,
        "a flag that ends it early": first[:4] + FINAL + first[5:],
        "a flag that hides the end": first + second + last[:4] + MORE + last[5:],
        "a flag of 2": first[:4] + b"\2" + first[5:] + second + last,
        "a chunk of another request": request_parts("a small request")[1][0],
        "a bit of the ciphertext": first[:-1] + bytes([first[-1] ^ 1]) + second + last,
        "a chunk's length of 4 GB": b"\xff\xff\xff\xff" + first[4:] + second + last,
        "an empty chunk": b"\0\0\0\0" + first + second + last,
    }
    heads = {
        "a head's length of 4 GB": b"\xff\xff\xff\xff" + head[4:],
        "a head of version 2": headed(2, session_id, psk_id, enc),
        "a head for another session": headed(1, elsewhere.session_id, psk_id, enc),
        "a head with another key id": headed(1, session_id, elsewhere.psk_id, enc),
        "an enc of low order": headed(1, session_id, psk_id, bytes(32)),
    }
    return {
        "nothing": b"",
        **{name: head + stream for name, stream in chunks.items()},
        **{name: other + first + second + last for name, other in heads.items()},
        "sealed under another request id": sealed_otherwise(BINDING, PSK, "another-request"),
        "sealed for another session": sealed_otherwise(elsewhere, elsewhere.psk(DATA_KEY), REQUEST_ID),
        "sealed with another psk": sealed_otherwise(BINDING, seed("another psk"), REQUEST_ID),
        "a step of padding too many": padded_otherwise(pad(b"{}") + bytes(256)),
        "a byte in the padding": padded_otherwise(pad(b"{}")[:-1] + b"\1"),
        "a length behind the padding": padded_otherwise(b"\0\0\1\0" + bytes(252)),
    }


def request() -> dict[str, Any]:
    """Requests, and bodies that must be refused."""
    return {
        "session": session(),
        "psk": PSK.hex(),
        "good": [request_vector(name) for name in REQUESTS],
        "by_digest": [large_request()],
        "refused": [{"name": name, "body": body.hex()} for name, body in refused_requests().items()],
    }


# -- responses ---------------------------------------------------------------------------------------------


def response() -> dict[str, Any]:
    """The answer to the small request of request.json, in both its forms; streams that must be refused."""
    info, ephemeral = encode(["gpu-server/1", "request", REQUEST_ID]), private("request: a small request")
    sender = hpke.psk_sender(BINDING.worker_key, info, PSK, BINDING.psk_id, ephemeral=ephemeral)
    secret, salt = sender.export(b"response", 32), seed("salt")
    sealing = ResponseSealer(secret, salt)
    chunks = [
        chunk for i, text in enumerate(EVENTS) for chunk in sealing.seal(text, final=i == len(EVENTS) - 1)
    ]
    first, second, last = chunks
    refused = {
        "nothing": [],
        "no final chunk": [first, second],
        "a chunk left out": [first, last],
        "two chunks changed about": [second, first, last],
        "a chunk twice": [first, first, second, last],
        "a chunk behind the final one": [first, second, last, last],
        "a flag that ends it early": [FINAL + first[1:]],
        "a flag that hides the end": [first, second, MORE + last[1:]],
        "a flag of 2": [b"\2" + first[1:], second, last],
        "a bit of the ciphertext": [first[:-1] + bytes([first[-1] ^ 1]), second, last],
        "a cut chunk": [first[:-1], second, last],
    }
    octets = salt + b"".join(frame(chunk) for chunk in chunks)
    return {
        "request": "a small request",
        "secret": secret.hex(),
        "salt": salt.hex(),
        "key": HKDF(algorithm=SHA256(), length=32, salt=salt, info=b"key").derive(secret).hex(),
        "base_nonce": HKDF(algorithm=SHA256(), length=12, salt=salt, info=b"nonce").derive(secret).hex(),
        "pieces": [text.decode() for text in EVENTS],
        "chunks": [chunk.hex() for chunk in chunks],
        "octet_stream": octets.hex(),
        "sealed_events": [b64encode(data).decode() for data in (salt, *chunks)],
        "refused": [
            {"name": name, "chunks": [chunk.hex() for chunk in stream]} for name, stream in refused.items()
        ],
    }


# -- frames and deliveries ---------------------------------------------------------------------------------


def frames() -> dict[str, Any]:
    """Frames to the enclave and from it, and payloads that are neither."""
    hashes: list[Value] = [seed("record 0"), seed("record 1")]
    granted: list[Value] = [BINDING.tenant, BINDING.pool, ARN, BINDING.session_id, BINDING.worker_key]
    requests: list[tuple[Op, list[Value]]] = [
        (Op.INIT, []),
        (Op.INIT, hashes),
        (Op.HELLO, [seed("nonce")]),
        (Op.GRANT, [*granted, BINDING.wrapped_key, b"CiphertextForRecipient, which is CMS in BER"]),
        (Op.STATUS, []),
    ]
    sealed_grant = seal_grant(BINDING, DATA_KEY, _ephemeral=private("grant"))
    replies: list[tuple[Code, list[Value]]] = [
        (Code.OK, [BINDING.epoch]),
        (Code.OK, [sealed_grant]),
        (Code.OK, ["new", b"", "gpu-server/1", "simulated"]),
        *((code, []) for code in Code if code is not Code.OK),
    ]
    refused: dict[str, list[Value]] = {
        "another version": [2, "STATUS", 1, []],
        "an unknown operation": [1, "STOP", 1, []],
        "an operation in small letters": [1, "status", 1, []],
        "no id": [1, "STATUS", []],
        "an id as text": [1, "STATUS", "1", []],
        "an argument too many": [1, "STATUS", 1, [0]],
        "a nonce as text": [1, "HELLO", 1, ["n" * 32]],
        "a record hash of 31 bytes": [1, "INIT", 1, [bytes(31)]],
        "too many slots": [1, "INIT", 1, [bytes(32)] * (MAX_SLOTS + 1)],
        "an unknown code": [1, 1, "FINE", []],
        "a result that is no array": [1, 1, "OK", "new"],
    }
    return {
        "requests": [
            {"op": op, "id": str(i), "args": shown(args), "frame": encode_request(op, i, args).hex()}
            for i, (op, args) in enumerate(requests)
        ],
        "replies": [
            {
                "id": str(i),
                "code": code,
                "result": shown(result),
                "frame": encode_reply(i, code, result).hex(),
            }
            for i, (code, result) in enumerate(replies)
        ],
        "refused": [{"name": name, "payload": encode(content).hex()} for name, content in refused.items()],
    }


def delivery() -> dict[str, Any]:
    """What the service hands to the worker with the small request."""
    sealing, chunks = request_parts("a small request")
    data = deliveries.pack(
        tenant=BINDING.tenant,
        pool=BINDING.pool,
        kms_key_arn=ARN,
        request_id=REQUEST_ID,
        epoch=BINDING.epoch,
        wrapped_key=BINDING.wrapped_key,
        grant=seal_grant(BINDING, DATA_KEY, _ephemeral=private("grant")),
        body=sealing.head + b"".join(chunks),
    )
    return {
        "media_type": deliveries.MEDIA_TYPE,
        "session": session(),
        "request_id": REQUEST_ID,
        "request": "a small request",
        "delivery": data.hex(),
    }


VECTORS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "attestation.json": attestation,
    "canonical.json": canonical,
    "certificates.json": certificates,
    "grant.json": grant,
    "request.json": request,
    "response.json": response,
    "frames.json": frames,
    "delivery.json": delivery,
}


def render(name: str) -> str:
    """The text of one file."""
    return json.dumps(VECTORS[name](), indent=1) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Writes all files; says which of them were other before."""
    default = Path(__file__).resolve().parent.parent / "docs/sealed-vectors"
    folder = Path(arguments[0]) if arguments else default
    folder.mkdir(parents=True, exist_ok=True)
    for name in VECTORS:
        path, text = folder / name, render(name)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
            print(f"written: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
