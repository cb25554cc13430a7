"""Typed calls to a security module: what it says is taken only in the form that it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.sealed.nsm import MAX_RESPONSE_BYTES, Nsm, NsmError, Pcr
from tests.sealed.documents import NONCE, PCRS, PUBLIC_KEY, USER_DATA, payload_of, software_nsm


def code_of(call: Callable[[], object]) -> str:
    """The code of the `NsmError` that a call raises."""
    with pytest.raises(NsmError) as caught:
        call()
    return caught.value.code


def answering(answer: bytes) -> Nsm:
    """A module that always says the same."""
    return Nsm(lambda request: answer)


def test_calls() -> None:
    """Documents, random bytes and registers, over a module that is there."""
    nsm = Nsm(software_nsm().process)
    said = payload_of(nsm.attestation(public_key=PUBLIC_KEY, user_data=USER_DATA, nonce=NONCE))
    assert (said["public_key"], said["user_data"], said["nonce"]) == (PUBLIC_KEY, USER_DATA, NONCE)
    assert payload_of(nsm.attestation())["nonce"] is None
    assert nsm.describe_pcr(0) == Pcr(data=PCRS[0], locked=True)
    value = nsm.extend_pcr(16, b"measured")
    assert value == hashlib.sha384(bytes(48) + b"measured").digest()
    nsm.lock_pcr(16)
    assert nsm.describe_pcr(16) == Pcr(data=value, locked=True)


@pytest.mark.parametrize("size", [0, 1, 32, 256, 257, 1000])
def test_random_of_any_size(size: int) -> None:
    """As many bytes as are wanted, however few the module gives at once; and never the same."""
    nsm = Nsm(software_nsm().process)
    assert len(nsm.get_random(size)) == size
    assert size < 32 or nsm.get_random(size) != nsm.get_random(size)


def test_errors() -> None:
    """The module's own words come through."""
    nsm = Nsm(software_nsm().process)
    assert code_of(lambda: nsm.describe_pcr(32)) == "InvalidIndex"
    assert code_of(lambda: nsm.extend_pcr(0, b"x")) == "ReadOnlyIndex"
    assert code_of(lambda: nsm.attestation(nonce=bytes(513))) == "InputTooLarge"
    assert code_of(lambda: nsm.attestation(user_data=bytes(5000))) == "InputTooLarge"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        cbor2.dumps(None),
        cbor2.dumps("GetRandom"),
        cbor2.dumps({}),
        cbor2.dumps({"GetRandom": {}}),
        cbor2.dumps({"GetRandom": {"random": b""}}),
        cbor2.dumps({"GetRandom": {"random": "text"}}),
        cbor2.dumps({"DescribePCR": {"lock": True, "data": b"x"}}),
        cbor2.dumps({"GetRandom": {"random": b"x"}}) + b"\0",
        cbor2.dumps({"GetRandom": {"random": bytes(MAX_RESPONSE_BYTES)}}),
        cbor2.dumps({"Error": "no\nword"}),
        cbor2.dumps({"Error": "x" * 41}),
        cbor2.dumps({"Error": 5}),
    ],
    ids=lambda answer: answer[:16].hex(),
)
def test_bad_answers(answer: bytes) -> None:
    """An answer of another form is an error, not a value."""
    assert code_of(lambda: answering(answer).get_random(1)) == "BadAnswer"


def test_a_register_without_its_lock() -> None:
    """Whether a register is locked is said, or there is no answer."""
    answer = cbor2.dumps({"DescribePCR": {"lock": 1, "data": bytes(48)}})
    assert code_of(lambda: answering(answer).describe_pcr(0)) == "BadAnswer"


@settings(max_examples=1_000, database=None)
@given(answer=st.binary(max_size=80))
def test_noise(answer: bytes) -> None:
    """Whatever comes back, it is a value or `NsmError`."""
    for call in (lambda: answering(answer).attestation(), lambda: answering(answer).lock_pcr(0)):
        with suppress(NsmError):
            call()
