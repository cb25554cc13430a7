"""/dev/nsm, the Nitro Security Module: one ioctl whose argument names two buffers.

Source: Linux, include/uapi/linux/nsm.h (`NSM_IOCTL_RAW`, `struct nsm_raw`).
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from array import array
from collections.abc import Callable
from typing import Final

from gpu_server.sealed.nsm import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES

PATH: Final = "/dev/nsm"
NSM_IOCTL: Final = 0xC0200A00
_TWO_IOVECS: Final = struct.Struct("=QQQQ")


class NsmDevice:
    """The device, held open. `ioctl` stands in for the kernel in tests."""

    def __init__(self, path: str = PATH, ioctl: Callable[[int, int, bytearray], int] = fcntl.ioctl) -> None:
        """Raises OSError where there is no such device."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._ioctl = ioctl
        self._lock = threading.Lock()

    def process(self, request: bytes) -> bytes:
        """CBOR in, CBOR out. Raises ValueError for a request that is too long, and OSError."""
        if len(request) > MAX_REQUEST_BYTES:
            raise ValueError("the request is longer than the NSM takes")
        question = array("B", request)
        answer = array("B", bytes(MAX_RESPONSE_BYTES))
        # Arrays, since they tell their addresses and do not move while they are not resized.
        message = bytearray(_TWO_IOVECS.pack(question.buffer_info()[0], len(question), *answer.buffer_info()))
        with self._lock:
            self._ioctl(self._descriptor, NSM_IOCTL, message)
        length = _TWO_IOVECS.unpack(message)[3]
        return answer.tobytes()[: min(length, MAX_RESPONSE_BYTES)]

    def close(self) -> None:
        os.close(self._descriptor)
