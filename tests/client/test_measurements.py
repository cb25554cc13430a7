"""What a client may expect of an enclave, and what is no measurement."""

from __future__ import annotations

import pytest

from gpu_server.client import Expected

ONE, TWO = "0a" * 48, "B2" * 48


def test_measurements() -> None:
    """Those that are given must be met, each as 48 bytes; the others may be any."""
    assert Expected().pcrs == {}
    assert Expected(pcr0=ONE, pcr8=TWO).pcrs == {0: bytes([10]) * 48, 8: bytes([0xB2]) * 48}
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
