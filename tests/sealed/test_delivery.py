"""The delivery: what the service adds, and that the worker believes none of it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from gpu_server.sealed.canonical import encode
from gpu_server.sealed.chunks import frame
from gpu_server.sealed.delivery import MAX_HEAD_BYTES, pack, unpack
from gpu_server.sealed.errors import CannotOpen, Malformed, SealedError
from gpu_server.sealed.grant import open_grant, seal_grant
from gpu_server.sealed.request import RequestOpener, read_head
from tests.sealed.exchange import ARN, Exchange

PLAINTEXT = b'{"prompt":"hello"}'


def values(exchange: Exchange) -> dict[str, Any]:
    """What the service knows and has of a request."""
    bound = exchange.binding
    return {
        "tenant": bound.tenant,
        "pool": bound.pool,
        "kms_key_arn": bound.kms_key_arn,
        "request_id": exchange.request_id,
        "epoch": bound.epoch,
        "wrapped_key": bound.wrapped_key,
        "grant": seal_grant(bound, exchange.data_key),
        "body": exchange.sealer.body(PLAINTEXT),
    }


def received(exchange: Exchange, data: bytes) -> bytes:
    """What a worker makes of a delivery, from the bytes and from what it knows itself."""
    delivery = unpack(data)
    bound = delivery.binding(exchange.binding.session_id, exchange.key.public)
    psk = open_grant(bound, delivery.grant, exchange.key)
    head, begin = read_head(delivery.body)
    return RequestOpener(bound, psk, delivery.request_id, exchange.key, head).open(delivery.body[begin:])


def test_from_the_client_to_the_worker() -> None:
    """Everything that the worker needs is in the delivery, and it comes out as it was put in."""
    exchange = Exchange()
    known = values(exchange)
    data = pack(**known)
    delivery = unpack(data)
    assert {name: getattr(delivery, name) for name in known} == known
    assert delivery.binding(exchange.binding.session_id, exchange.key.public) == exchange.binding
    assert received(exchange, data) == PLAINTEXT


CHANGES: dict[str, Any] = {
    "tenant": "other",
    "pool": "other",
    "kms_key_arn": ARN.replace("eu-central-1", "us-east-1"),
    "request_id": "req-2",
    "epoch": bytes(16),
    "wrapped_key": b"another",
    "grant": bytes(80),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_value_counts(name: str) -> None:
    """Whatever the service changes of a delivery, the worker opens nothing."""
    exchange = Exchange()
    with pytest.raises(CannotOpen):
        received(exchange, pack(**(values(exchange) | {name: CHANGES[name]})))


def test_every_byte_counts() -> None:
    """A delivery with any byte changed is refused by one error of the family."""
    exchange = Exchange()
    data = pack(**values(exchange))
    for at in range(len(data)):
        with pytest.raises(SealedError):
            received(exchange, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant", "a b"),
        ("pool", ""),
        ("kms_key_arn", "alias/x"),
        ("request_id", "x" * 129),
        ("epoch", bytes(17)),
        ("wrapped_key", b""),
        ("wrapped_key", bytes(6145)),
        ("grant", bytes(79)),
    ],
)
def test_values_that_none_has(name: str, value: Any) -> None:
    """What cannot be is neither packed nor unpacked."""
    known = values(Exchange()) | {name: value}
    with pytest.raises(Malformed):
        pack(**known)
    body = known.pop("body")
    with pytest.raises(Malformed):
        unpack(frame(encode([1, *known.values()])) + body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff" + bytes(9000),
        (MAX_HEAD_BYTES - 3).to_bytes(4, "big") + bytes(9000),
        frame(b"{}"),
        frame(encode([])),
        frame(encode([2, "t", "p", ARN, "r", bytes(16), b"w", bytes(80)])),
        frame(encode([1, "t", "p", ARN, "r", bytes(16), b"w", bytes(80), 0])),
        frame(encode([1, "t", "p", ARN, "r", bytes(16), b"w"])),
        frame(encode([1, b"t", "p", ARN, "r", bytes(16), b"w", bytes(80)])),
        frame(encode([1, "t", "p", ARN, "r", "0" * 16, b"w", bytes(80)])),
    ],
    ids=lambda data: f"{len(data)} bytes, {data[:12].hex()}",
)
def test_no_delivery(data: bytes) -> None:
    """Anything else is refused before a key is touched."""
    with pytest.raises(Malformed):
        unpack(data)


def test_the_largest_fits() -> None:
    """Names and a wrapped key of the greatest length leave room, and an empty body is a body."""
    known = values(Exchange()) | {
        "tenant": "t" * 128,
        "pool": "p" * 128,
        "request_id": "r" * 128,
        "wrapped_key": bytes(6144),
        "body": b"",
    }
    assert unpack(pack(**known)).body == b""


def test_content_is_not_shown() -> None:
    """A delivery in a log shows names, but neither grant nor body."""
    exchange = Exchange()
    delivery = unpack(pack(**values(exchange)))
    shown = repr(delivery)
    for hidden in (delivery.grant, bytes(delivery.body), delivery.wrapped_key):
        assert repr(hidden)[2:-1] not in shown


def test_a_large_body_is_not_copied() -> None:
    """A body is taken out of its delivery where it lies."""
    data = pack(**(values(Exchange()) | {"body": bytes(1 << 20)}))
    tracemalloc.start()
    try:
        delivery = unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert len(delivery.body) == 1 << 20
