"""What a client may expect of an enclave, and what is no measurement."""

from __future__ import annotations

import pytest

from gpu_server.client import AttestationRefused, Expected

ONE, TWO = "0a" * 48, "B2" * 48


def test_measurements() -> None:
    """Those that are given must be met, each as 48 bytes; the others may be any."""
    assert Expected().pcrs == {}
    assert Expected(pcr0=ONE, pcr8=TWO).pcrs == {0: (bytes([10]) * 48,), 8: (bytes([0xB2]) * 48,)}
    every = Expected(pcr0=ONE, pcr1=ONE, pcr2=ONE, pcr3=ONE, pcr8=ONE)
    assert set(every.pcrs) == {0, 1, 2, 3, 8}


@pytest.mark.parametrize("text", ["", "0a", ONE + "0a", ONE[:-1], "0x" + ONE[2:], ONE[:-1] + "\n", "g" * 96])
def test_what_is_no_measurement(text: str) -> None:
    """Only 96 hex digits are a measurement."""
    with pytest.raises(ValueError, match="PCR1 must be 96 hex digits"):
        Expected(pcr0=ONE, pcr1=text)


@pytest.mark.parametrize("name", ["pcr0", "pcr3"])
def test_debug_mode(name: str) -> None:
    """Zeros are what an enclave in debug mode shows: nobody can expect them by mistake."""
    with pytest.raises(ValueError, match="debug"):
        Expected(**{name: "00" * 48})


def test_several_values() -> None:
    """Any value of a register will do, and no other; one who adds to the list later changes nothing."""
    values = [ONE, TWO]
    expected = Expected(pcr0=values, pcr2=ONE)
    values.append("0c" * 48)
    one, two = bytes.fromhex(ONE), bytes.fromhex(TWO)
    assert expected.pcrs == {0: (one, two), 2: (one,)}
    for program in (one, two):
        expected.check({0: program, 1: two, 2: one})
    for found in ({0: bytes([12]) * 48, 2: one}, {0: one, 2: two}, {0: one}, {}):
        with pytest.raises(AttestationRefused) as refused:
            expected.check(found)
        assert refused.value.reason == "pcr"
    with pytest.raises(ValueError, match="PCR8 has no value"):
        Expected(pcr8=[])
    with pytest.raises(ValueError, match="PCR8 must be"):
        Expected(pcr8=[ONE, "x"])
    assert hash(expected) == hash(Expected(pcr0=(ONE, TWO), pcr2=[ONE]))


def test_what_names_a_program() -> None:
    """A program is named by PCR0, or by who signed it, PCR8; the other registers leave it open."""
    assert Expected(pcr0=ONE).names_a_program
    assert Expected(pcr8=ONE).names_a_program
    assert not Expected(pcr1=ONE, pcr2=ONE, pcr3=ONE).names_a_program
