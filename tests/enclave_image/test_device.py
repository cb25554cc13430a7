"""/dev/nsm's ioctl: the bytes that the kernel would see, read from memory as it would read them."""

from __future__ import annotations

import ctypes
import struct

import pytest
from enclave.device import NSM_IOCTL, NsmDevice

from gpu_server.sealed.nsm import MAX_RESPONSE_BYTES, Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm

PCRS = {0: b"\1" * 48}


class Kernel:
    """What the driver does with the argument: reads one buffer, writes the other, says how much."""

    def __init__(self, claimed: int | None = None) -> None:
        self._nsm = SoftwareNsm(PCRS)
        self._claimed = claimed
        self.requests: list[bytes] = []

    def ioctl(self, descriptor: int, number: int, message: bytearray) -> int:
        assert number == NSM_IOCTL == 0xC0200A00
        request_at, request_length, response_at, response_length = struct.unpack("=QQQQ", message)
        assert response_length == MAX_RESPONSE_BYTES
        request = ctypes.string_at(request_at, request_length)
        self.requests.append(request)
        answer = self._nsm.process(request)
        ctypes.memmove(response_at, answer, len(answer))
        length = len(answer) if self._claimed is None else self._claimed
        message[:] = struct.pack("=QQQQ", request_at, request_length, response_at, length)
        return 0


def test_requests_and_answers() -> None:
    """Two buffers named by address and length; the answer is as long as the driver says."""
    kernel = Kernel()
    device = NsmDevice("/dev/null", kernel.ioctl)
    nsm = Nsm(device.process)
    assert nsm.describe_pcr(0).data == PCRS[0]
    assert len(nsm.get_random(256)) == 256
    assert len(nsm.attestation(nonce=b"n" * 32, public_key=b"k" * 294, user_data=b"u")) > 1000
    assert kernel.requests[1] == b"iGetRandom"
    device.close()


def test_a_length_that_cannot_be(tmp_path: object) -> None:
    """No more is read than the buffer holds, whatever length comes back."""
    device = NsmDevice("/dev/null", Kernel(claimed=1 << 40).ioctl)
    assert len(device.process(b"iGetRandom")) == MAX_RESPONSE_BYTES
    device.close()


def test_a_request_that_is_too_long() -> None:
    """It is not sent."""
    device = NsmDevice("/dev/null", Kernel().ioctl)
    with pytest.raises(ValueError, match="longer"):
        device.process(bytes(0x1001))
    device.close()


def test_a_machine_without_the_device() -> None:
    """There is no enclave without its security module."""
    with pytest.raises(FileNotFoundError):
        NsmDevice("/dev/nsm-that-is-not-there")


def test_a_device_that_is_none() -> None:
    """The real ioctl of something else is an error, not an answer."""
    device = NsmDevice("/dev/null")
    with pytest.raises(OSError, match="ioctl"):
        device.process(b"iGetRandom")
    device.close()
