"""The published vectors: what the script makes, and this implementation agrees with each of them."""

from __future__ import annotations

import json
from base64 import b64decode
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from gpu_server.sealed import delivery
from gpu_server.sealed.attestation import Attestation, verify
from gpu_server.sealed.canonical import Value, decode, encode
from gpu_server.sealed.chunks import ChunkReader
from gpu_server.sealed.errors import AttestationRefused, SealedError
from gpu_server.sealed.frames import FrameReader, decode_reply, decode_request
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant
from gpu_server.sealed.request import RequestOpener, read_head
from gpu_server.sealed.response import ResponseOpener
from scripts import make_sealed_vectors as script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/sealed-vectors"

ATTESTATION, CANONICAL, GRANT, REQUEST, RESPONSE, FRAMES, DELIVERY = (
    json.loads((FOLDER / f"{name}.json").read_text())
    for name in ("attestation", "canonical", "grant", "request", "response", "frames", "delivery")
)
RAW = bytes.fromhex


def binding(session: dict[str, str]) -> Binding:
    return Binding(
        **{name: session[name] for name in ("tenant", "pool", "kms_key_arn", "session_id")},
        **{name: RAW(session[name]) for name in ("epoch", "worker_key", "wrapped_key")},
    )


def worker(session: dict[str, str]) -> WorkerKey:
    key = WorkerKey(X25519PrivateKey.from_private_bytes(RAW(session["worker_private_key"])))
    assert key.public.hex() == session["worker_key"]
    return key


def value(shown: Any) -> Value:
    """A value from its form in JSON."""
    if isinstance(shown, list):
        return [value(item) for item in shown]
    ((kind, content),) = shown.items()
    return {"text": str, "bytes": RAW, "uint": int}[kind](content)  # type: ignore[no-any-return, operator]


def opened(body: bytes, request_id: str) -> RequestOpener:
    """The worker's side of a body that it has opened in full."""
    head, begin = read_head(body)
    bound = binding(REQUEST["session"])
    opener = RequestOpener(bound, RAW(REQUEST["psk"]), request_id, worker(REQUEST["session"]), head)
    opener.open(body[begin:])
    return opener


def test_the_files_are_what_the_script_makes() -> None:
    """The script writes the published files, byte for byte, and there are no others."""
    assert {path.name for path in FOLDER.glob("*.json")} == set(script.VECTORS)
    for name in script.VECTORS:
        assert (FOLDER / name).read_text() == script.render(name), f"run the script: {name} has changed"


def test_the_script_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes into the folder that it is told, and says which files are new."""
    assert script.main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.split() == [word for name in script.VECTORS for word in ("written:", name)]
    assert script.main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == ""
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
        name: (FOLDER / name).read_text() for name in script.VECTORS
    }


@pytest.mark.parametrize("vector", CANONICAL["good"], ids=lambda vector: vector["name"])
def test_values(vector: dict[str, Any]) -> None:
    """Every value has the encoding that stands beside it."""
    assert encode(list(value(vector["value"]))).hex() == vector["hex"]  # type: ignore[arg-type]
    assert decode(RAW(vector["hex"])) == value(vector["value"])


def test_grant() -> None:
    """g, the key's id and the psk follow from the session, and the grant opens."""
    bound = binding(GRANT["session"])
    assert bound.info.hex() == GRANT["g"]
    assert bound.psk_id.hex() == GRANT["psk_id"]
    assert bound.psk(RAW(GRANT["session"]["data_key"])).hex() == GRANT["psk"]
    assert open_grant(bound, RAW(GRANT["grant"]), worker(GRANT["session"])).hex() == GRANT["psk"]


@pytest.mark.parametrize("vector", REQUEST["good"], ids=lambda vector: vector["name"])
def test_requests(vector: dict[str, Any]) -> None:
    """Every request opens to its pieces."""
    head, begin = read_head(RAW(vector["body"]))
    assert RAW(vector["body"])[:begin].hex() == vector["head"]
    key, psk = worker(REQUEST["session"]), RAW(REQUEST["psk"])
    opener = RequestOpener(binding(REQUEST["session"]), psk, vector["request_id"], key, head)
    assert [opener.feed(RAW(chunk)).hex() for chunk in vector["chunks"]] == vector["pieces"]
    opener.finish()


def test_the_large_request() -> None:
    """What is known by its digest alone is made again from its rule."""
    (vector,) = REQUEST["by_digest"]
    body = script.sealer("large").body(bytes(i % 251 for i in range(vector["plaintext_bytes"])))
    assert (len(body), sha256(body).hexdigest()) == (vector["body_bytes"], vector["body_sha256"])
    chunks = ChunkReader().feed(body[read_head(body)[1] :])
    assert len(list(chunks)) == len(vector["piece_bytes"])
    assert sum(vector["piece_bytes"]) == vector["plaintext_bytes"]


@pytest.mark.parametrize("vector", REQUEST["refused"], ids=lambda vector: vector["name"])
def test_refused_requests(vector: dict[str, str]) -> None:
    """Every body that must be refused is, by an error of the family."""
    with pytest.raises(SealedError):
        opened(RAW(vector["body"]), REQUEST["good"][0]["request_id"])


def answer() -> ResponseOpener:
    """The client's side of the answer."""
    return ResponseOpener(RAW(RESPONSE["secret"]), RAW(RESPONSE["salt"]))


def test_response() -> None:
    """Both forms of the answer open to its pieces, under the secret that the request exports."""
    body = next(item["body"] for item in REQUEST["good"] if item["name"] == RESPONSE["request"])
    again = opened(RAW(body), REQUEST["good"][0]["request_id"]).answer(RAW(RESPONSE["salt"]))
    last = len(RESPONSE["pieces"]) - 1
    made = [
        chunk.hex()
        for i, piece in enumerate(RESPONSE["pieces"])
        for chunk in again.seal(piece.encode(), final=i == last)
    ]
    assert made == RESPONSE["chunks"]

    octets = RAW(RESPONSE["octet_stream"])
    by_octets = [octets[:32], *ChunkReader().feed(octets[32:])]
    by_events = [b64decode(data) for data in RESPONSE["sealed_events"]]
    for salt, *chunks in (by_octets, by_events):
        assert salt.hex() == RESPONSE["salt"]
        opener = answer()
        assert [opener.open(chunk).decode() for chunk in chunks] == RESPONSE["pieces"]
        opener.close()


@pytest.mark.parametrize("vector", RESPONSE["refused"], ids=lambda vector: vector["name"])
def test_refused_responses(vector: dict[str, Any]) -> None:
    """Every stream that must be refused is, at its end at the latest."""

    def read() -> None:
        opener = answer()
        for chunk in vector["chunks"]:
            opener.open(RAW(chunk))
        opener.close()

    with pytest.raises(SealedError):
        read()


def test_frames() -> None:
    """Every frame is the request or reply that stands beside it."""
    for vector in FRAMES["requests"]:
        (payload,) = FrameReader().feed(RAW(vector["frame"]))
        request = decode_request(payload)
        assert (request.op, request.id) == (vector["op"], int(vector["id"]))
        assert request.args == value(vector["args"])
    for vector in FRAMES["replies"]:
        (payload,) = FrameReader().feed(RAW(vector["frame"]))
        reply = decode_reply(payload)
        assert (reply.code, reply.id) == (vector["code"], int(vector["id"]))
        assert reply.result == value(vector["result"])


@pytest.mark.parametrize("vector", FRAMES["refused"], ids=lambda vector: vector["name"])
def test_refused_frames(vector: dict[str, str]) -> None:
    """Every payload that is neither request nor reply is refused as both."""
    for read in (decode_request, decode_reply):
        with pytest.raises(SealedError):
            read(RAW(vector["payload"]))


def test_delivery() -> None:
    """The delivery has all that its worker needs beside its session and its key."""
    found = delivery.unpack(RAW(DELIVERY["delivery"]))
    session = DELIVERY["session"]
    key = worker(session)
    bound = found.binding(session["session_id"], key.public)
    assert bound == binding(session)
    head, begin = read_head(found.body)
    opener = RequestOpener(bound, open_grant(bound, found.grant, key), found.request_id, key, head)
    (pieces,) = [item["pieces"] for item in REQUEST["good"] if item["name"] == DELIVERY["request"]]
    assert opener.open(found.body[begin:]).hex() == "".join(pieces)
    assert DELIVERY["media_type"] == delivery.MEDIA_TYPE


def attested(document: str, at: str, **options: Any) -> Attestation:
    """A document that the client has verified against all that it expects, epoch and slots included."""
    found = verify(
        RAW(document),
        nonce=RAW(ATTESTATION["nonce"]),
        pcrs={int(index): RAW(data) for index, data in ATTESTATION["pcrs"].items()},
        max_age=ATTESTATION["max_age_seconds"],
        at=datetime.fromisoformat(at),
        **{"roots": [RAW(ATTESTATION["root_sha256"])], **options},
    )
    assert found.epoch.hex() == ATTESTATION["epoch"]
    assert [record.hex() for record in found.slots] == ATTESTATION["slots"]
    return found


@pytest.mark.parametrize("vector", ATTESTATION["good"], ids=lambda vector: vector["name"])
def test_attestation(vector: dict[str, str]) -> None:
    """Every document is accepted at its time under its own root, and by nobody who trusts AWS's alone."""
    assert sha256(RAW(ATTESTATION["root"])).hexdigest() == ATTESTATION["root_sha256"]
    found = attested(vector["document"], ATTESTATION["at"])
    assert found.public_key == RAW(ATTESTATION["public_key"])
    assert found.user_data == RAW(ATTESTATION["user_data"])
    for options in ({}, {"allow_simulated": True}):
        with pytest.raises(AttestationRefused) as caught:
            verify(RAW(vector["document"]), nonce=None, pcrs={}, at_document_time=True, **options)
        assert caught.value.reason == "root"


@pytest.mark.parametrize("vector", ATTESTATION["refused"], ids=lambda vector: vector["name"])
def test_refused_attestation(vector: dict[str, str]) -> None:
    """Every other document is refused, for the reason that stands beside it."""
    with pytest.raises(AttestationRefused) as caught:
        attested(vector["document"], vector["at"])
    assert caught.value.reason == vector["reason"]
