"""The software module speaks the bytes of the real one, with its limits and its errors."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.sealed.attestation import MAX_DOCUMENT_BYTES, verify
from gpu_server.sealed.nsm import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm
from tests.sealed.documents import NOW, PCRS, payload_of, software_document, software_nsm

ZERO = bytes(48)


def ask(nsm: SoftwareNsm, request: object) -> Any:
    """What the module answers."""
    return cbor2.loads(nsm.process(cbor2.dumps(request)))


def test_the_bytes_of_the_device() -> None:
    """Requests and answers have the names and types that /dev/nsm has."""
    nsm = software_nsm()
    assert nsm.process(b"\x69GetRandom").startswith(b"\xa1\x69GetRandom\xa1\x66random\x59\x01\x00")
    assert ask(nsm, {"DescribePCR": {"index": 1}}) == {"DescribePCR": {"lock": True, "data": PCRS[1]}}
    assert ask(nsm, {"DescribePCR": {"index": 31}}) == {"DescribePCR": {"lock": False, "data": ZERO}}
    described = ask(nsm, "DescribeNSM")["DescribeNSM"]
    assert (described["max_pcrs"], described["digest"]) == (32, "SHA384")
    assert described["locked_pcrs"] == list(range(16))
    request = {"Attestation": {"user_data": None, "nonce": b"n", "public_key": None}}
    assert payload_of(ask(nsm, request)["Attestation"]["document"])["nonce"] == b"n"


def test_extending_and_locking() -> None:
    """A register above 15 is extended until it is locked; then it is part of documents."""
    nsm = software_nsm()
    assert 16 not in payload_of(software_document(nsm))["pcrs"]
    first = hashlib.sha384(ZERO + b"a").digest()
    second = hashlib.sha384(first + b"b").digest()
    assert ask(nsm, {"ExtendPCR": {"index": 16, "data": b"a"}}) == {"ExtendPCR": {"data": first}}
    assert ask(nsm, {"ExtendPCR": {"index": 16, "data": b"b"}}) == {"ExtendPCR": {"data": second}}
    assert ask(nsm, {"LockPCR": {"index": 16}}) == "LockPCR"
    assert ask(nsm, {"ExtendPCR": {"index": 16, "data": b"c"}}) == {"Error": "ReadOnlyIndex"}
    assert ask(nsm, {"LockPCR": {"index": 16}}) == {"Error": "ReadOnlyIndex"}
    assert payload_of(software_document(nsm))["pcrs"][16] == second
    assert ask(nsm, {"LockPCRs": {"range": 20}}) == "LockPCRs"
    assert sorted(payload_of(software_document(nsm))["pcrs"]) == list(range(20))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("Nothing", "InvalidOperation"),
        ({}, "InvalidOperation"),
        (7, "InvalidOperation"),
        ({"DescribePCR": {}}, "InvalidOperation"),
        ({"DescribePCR": {"index": 32}}, "InvalidIndex"),
        ({"DescribePCR": {"index": -1}}, "InvalidIndex"),
        ({"DescribePCR": {"index": "0"}}, "InvalidIndex"),
        ({"DescribePCR": {"index": True}}, "InvalidIndex"),
        ({"ExtendPCR": {"index": 15, "data": b"x"}}, "ReadOnlyIndex"),
        ({"ExtendPCR": {"index": 16, "data": "x"}}, "InvalidOperation"),
        ({"LockPCR": {"index": 0}}, "ReadOnlyIndex"),
        ({"LockPCRs": {"range": 33}}, "InvalidIndex"),
        ({"Attestation": {"nonce": "text"}}, "InvalidArgument"),
        ({"Attestation": {"other": None}}, "InvalidArgument"),
        ({"Attestation": {"nonce": bytes(513)}}, "InputTooLarge"),
        ({"Attestation": {"user_data": bytes(513)}}, "InputTooLarge"),
        ({"Attestation": {"public_key": bytes(1025)}}, "InputTooLarge"),
        ({"Attestation": {"nonce": bytes(MAX_REQUEST_BYTES)}}, "InputTooLarge"),
        ({"Attestation": {}, "GetRandom": {}}, "InvalidOperation"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors(request_: object, error: str) -> None:
    """What cannot be done is answered with the error that the real module has for it."""
    assert ask(software_nsm(), request_) == {"Error": error}


def test_the_largest_document() -> None:
    """With every field at its limit and every register locked, the answer still fits."""
    nsm = software_nsm()
    Nsm(nsm.process)
    ask(nsm, {"LockPCRs": {"range": 32}})
    fields = {"public_key": bytes(1024), "user_data": bytes(512), "nonce": bytes(512)}
    answer = nsm.process(cbor2.dumps({"Attestation": fields}))
    assert len(answer) <= MAX_RESPONSE_BYTES
    document = cbor2.loads(answer)["Attestation"]["document"]
    assert len(document) <= MAX_DOCUMENT_BYTES
    verify(document, nonce=bytes(512), pcrs=PCRS, allow_simulated=True, at=NOW)


def test_debug_mode() -> None:
    """Debug mode zeroes the registers that measure the program, and leaves the others."""
    nsm = SoftwareNsm({**PCRS, 3: b"\3" * 48, 4: b"\4" * 48}, debug=True, now=lambda: NOW)
    said = payload_of(software_document(nsm))["pcrs"]
    assert [said[index] for index in (0, 1, 2, 8)] == [ZERO] * 4
    assert (said[3], said[4]) == (b"\3" * 48, b"\4" * 48)


def test_encodings() -> None:
    """The payload is a map of definite or of indefinite length, with the same in it."""
    for encoding, first in (("definite", 0xA9), ("indefinite", 0xBF)):
        document = software_document(software_nsm(encoding=encoding))
        assert cbor2.loads(document)[2][0] == first
        assert payload_of(document)["pcrs"][0] == PCRS[0]


def test_certificates_are_renewed() -> None:
    """A module that lives long has documents that verify on every day of it, under the same root."""
    clock: list[datetime] = [NOW]
    nsm = software_nsm(now=lambda: clock[0])
    leaves = set()
    for hours in (0, 1, 2.8, 2.9, 6, 24, 24 * 7, 24 * 365):
        clock[0] = NOW + timedelta(hours=hours)
        document = software_document(nsm)
        found = verify(document, nonce=None, pcrs=PCRS, allow_simulated=True, at=clock[0])
        assert found.expires - clock[0] >= timedelta(minutes=10)
        assert payload_of(document)["cabundle"][0] == nsm.root
        leaves.add(payload_of(document)["certificate"])
    assert len(leaves) == 6


@pytest.mark.parametrize("measurements", [{0: b"short"}, {16: ZERO}, {-1: ZERO}])
def test_measurements(measurements: dict[int, bytes]) -> None:
    """Only the registers of the hypervisor are measured, with SHA-384."""
    with pytest.raises(ValueError, match="48 bytes"):
        SoftwareNsm(measurements)


@settings(max_examples=2_000, database=None)
@given(request_=st.binary(max_size=64))
def test_noise(request_: bytes) -> None:
    """Whatever is asked, there is an answer."""
    assert cbor2.loads(NSM.process(request_))


NSM = software_nsm()
