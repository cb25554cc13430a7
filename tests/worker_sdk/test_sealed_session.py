import base64
from typing import Any

import pytest
from gpu_worker import sealed_session
from gpu_worker.sealed_record import Refused
from gpu_worker.sealed_session import SealedSession

from gpu_server.sealed.grant import Binding, WorkerKey, open_grant, seal_grant

from . import sealed_world
from .sealed_world import ARN, SealedRequest, binding_of, request_to

ENVIRONMENT = {
    "GPU_SESSION_ID": "s_1",
    "SEALED_TENANT": "acme",
    "SEALED_POOL": "default",
    "SEALED_KMS_KEY_ARN": ARN,
}


def opened(session: SealedSession, data: bytes) -> Any:
    metadata, _ = session.open(session.read(data))
    return metadata


def test_a_key_pair_for_each_session() -> None:
    """32 bytes in base64, never the same twice."""
    keys = {sealed_world.session().public_key for _ in range(3)}
    assert len(keys) == 3
    assert {len(base64.b64decode(key, validate=True)) for key in keys} == {32}


@pytest.mark.parametrize("missing", ENVIRONMENT)
def test_the_environment_must_be_complete(missing: str) -> None:
    """The variable that is missing is named."""
    assert SealedSession.from_environment(ENVIRONMENT).public_key
    with pytest.raises(ValueError, match=missing):
        SealedSession.from_environment({**ENVIRONMENT, missing: ""})


@pytest.mark.parametrize(("name", "value"), [("tenant", "a b"), ("kms_key_arn", "alias/mine")])
def test_names_that_the_protocol_does_not_allow(name: str, value: str) -> None:
    """They are refused at the start, not at the first request."""
    with pytest.raises(ValueError, match=r"the tenant|the ARN"):
        sealed_world.session(**{name: value})


@pytest.mark.parametrize("size", [0, 1024, 3 << 20])
def test_what_was_sealed_opens(size: int) -> None:
    """The metadata as the client wrote it, of any size, again and again."""
    session = sealed_world.session()
    for _ in range(2):
        metadata = {"prompt": "x" * size}
        assert opened(session, request_to(session.public_key, metadata).delivery) == metadata


def test_a_grant_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with one grant share the key in it; no more than 64 are remembered, the latest used."""
    session = sealed_world.session()
    grants: list[bytes] = []

    def count(binding: Binding, grant: bytes, key: WorkerKey) -> bytes:
        grants.append(grant)
        return open_grant(binding, grant, key)

    monkeypatch.setattr(sealed_session, "open_grant", count)
    bindings = [binding_of(session.public_key, wrapped_key=b"%d" % number) for number in range(65)]
    granted = [seal_grant(binding, bytes(32)) for binding in bindings]
    for number in (*range(64), 0, 64, 0, 1):  # 64 takes the place of 1
        request = SealedRequest(bindings[number], b"{}")
        assert opened(session, request.delivered(grant=granted[number])) == {}
    assert grants == [*granted, granted[1]]
    assert len(session._grants) == 64


def changed(request: SealedRequest) -> dict[str, bytes]:
    """A delivery for each way in which it may be wrong."""
    bound = request.binding
    other_key = sealed_world.session().public_key
    flipped = bytearray(request.body)
    flipped[-1] ^= 1
    return {
        "tenant": request.delivered(tenant="other"),
        "pool": request.delivered(pool="other"),
        "arn": request.delivered(kms_key_arn=ARN + "9"),
        "request id": request.delivered(request_id="other"),
        "epoch": request.delivered(epoch=b"1" * 16),
        "wrapped key": request.delivered(wrapped_key=b"other"),
        "grant of another data key": request.delivered(grant=seal_grant(bound, b"1" * 32)),
        "grant to another worker": request.delivered(grant=seal_grant(binding_of(other_key), bytes(32))),
        "grant of another session": request.delivered(
            grant=seal_grant(binding_of(other_key, session_id="s_2"), bytes(32))
        ),
        "another worker's request": SealedRequest(binding_of(other_key), b"{}").delivery,
        "another session's request": SealedRequest(
            binding_of(base64.b64encode(bound.worker_key).decode(), session_id="s_2"), b"{}"
        ).delivery,
        "a byte of a chunk": request.delivered(body=bytes(flipped)),
        "no chunk": request.delivered(body=request._sealer.head),
        "a chunk cut": request.delivered(body=request.body[:-1]),
        "a chunk too many": request.delivered(body=request.body + request.body[len(request._sealer.head) :]),
        "no head": request.delivered(body=b""),
        "no delivery": b"\xff\xff\xff\xff",
        "nothing": b"",
    }


def test_whatever_is_wrong_the_answer_is_the_same() -> None:
    """A changed name, key, grant or byte opens nothing, and the refusal does not tell which it was."""
    session = sealed_world.session()
    request = request_to(session.public_key)
    told = set()
    for what, data in changed(request).items():
        with pytest.raises(Refused) as caught:
            print("opened in spite of", what, opened(session, data))
        told.add((caught.value.status, caught.value.code, caught.value.message))
        assert caught.value.__cause__ is None
    assert told == {(400, "decrypt", "this request cannot be opened")}
    assert opened(session, request.delivery) == {}


@pytest.mark.parametrize("clear", [b"", b"\xff", b"[]", b"null", b"[" * 100_000])
def test_sealed_bytes_that_are_no_object_are_no_metadata(clear: bytes) -> None:
    """They opened, so the answer to them is sealed too: it is not for the service to hear."""
    session = sealed_world.session()
    assert opened(session, SealedRequest(binding_of(session.public_key), clear).delivery) is None


def test_it_shows_nothing_of_its_keys() -> None:
    """Neither a session nor a request that was read prints what opens or is opened."""
    session = sealed_world.session()
    read = session.read(request_to(session.public_key, {"prompt": "canary"}).delivery)
    session.open(read)
    shown = repr((session, session._key, read))
    (psk,) = session._grants.values()
    assert repr(psk) not in shown
    assert repr(read.delivery.grant) not in shown
    assert "canary" not in shown
