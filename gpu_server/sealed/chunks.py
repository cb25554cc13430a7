"""Chunks: how a stream is cut, padded and framed, the same for requests and responses.

A chunk is `flag || ciphertext`: flag 1 for the last of its stream, else 0. Its plaintext is `u32be n || n
bytes || zeros` up to a multiple of 256, so that sizes are seen in steps. Framed, it has its length before it,
as u32be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpu_server.sealed.errors import Malformed, StreamBroken
from gpu_server.sealed.hpke import TAG_BYTES

STEP: Final = 256
MAX_PADDED: Final = 256 * 1024
MAX_DATA: Final = MAX_PADDED - 4
"""The most that one chunk carries, in bytes."""

MIN_CHUNK: Final = 1 + STEP + TAG_BYTES
MAX_CHUNK: Final = 1 + MAX_PADDED + TAG_BYTES

MORE: Final = b"\x00"
FINAL: Final = b"\x01"

_LENGTH: Final = 4


def pad(data: bytes) -> bytes:
    """`data` with its length before it and zeros behind. `Malformed` for more than `MAX_DATA` bytes."""
    if len(data) > MAX_DATA:
        raise Malformed(f"more than {MAX_DATA} bytes in a chunk")
    return b"".join((len(data).to_bytes(_LENGTH, "big"), data, bytes(-(len(data) + _LENGTH) % STEP)))


def unpad(padded: bytes) -> bytes:
    """What `pad` was given. Raises `Malformed` for anything that `pad` does not give."""
    size = len(padded)
    end = _LENGTH + int.from_bytes(padded[:_LENGTH], "big")
    if not 0 < size <= MAX_PADDED or end + -end % STEP != size or padded[end:] != bytes(size - end):
        raise Malformed("a chunk with wrong padding")
    return padded[_LENGTH:end]


def cut(data: bytes, *, final: bool) -> Iterator[tuple[bytes, bytes]]:
    """The chunks that `data` makes: flag and padded plaintext of each. No data and not the end: none."""
    size = len(data)
    for at in range(0, size or int(final), MAX_DATA):
        last = final and at + MAX_DATA >= size
        yield FINAL if last else MORE, pad(data[at : at + MAX_DATA])


def parse(chunk: bytes) -> tuple[bytes, bytes]:
    """Flag and ciphertext of a chunk. Raises `Malformed` for a size or a flag that no chunk has."""
    if not MIN_CHUNK <= len(chunk) <= MAX_CHUNK or (len(chunk) - 1 - TAG_BYTES) % STEP:
        raise Malformed("a chunk of a length that none has")
    flag = bytes(chunk[:1])
    if flag not in (MORE, FINAL):
        raise Malformed("a chunk with a flag that none has")
    return flag, chunk[1:]


def frame(*parts: bytes) -> bytes:
    """A chunk, given whole or in parts, with its length before it."""
    return b"".join((sum(map(len, parts)).to_bytes(_LENGTH, "big"), *parts))


class ChunkReader:
    """Takes framed chunks in whatever pieces they come, and gives them without their lengths.

    A length is judged before anything is kept for it, so at most one chunk of `max_bytes` is ever held.
    """

    def __init__(self, max_bytes: int = MAX_CHUNK) -> None:
        self._max = max_bytes
        self._rest = bytearray()

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The chunks that are complete now. Raises `Malformed` for a length that no chunk has."""
        return list(self.each(data))

    def each(self, data: bytes | memoryview) -> Iterator[bytes]:
        """What `feed` gives, one chunk at a time, so that a large message is not there twice. Read it to its
        end before anything else is fed."""
        rest = self._rest
        source: bytes | bytearray | memoryview = data
        if rest:
            rest += data
            source = rest
        at = 0
        while len(source) - at >= _LENGTH:
            begin = at + _LENGTH
            size = int.from_bytes(source[at:begin], "big")
            if not 1 <= size <= self._max:
                raise Malformed(f"a length outside 1 to {self._max}")
            if len(source) - begin < size:
                break
            at = begin + size
            yield bytes(memoryview(source)[begin:at])
        if source is rest:
            del rest[:at]
        else:
            rest += memoryview(source)[at:]

    def close(self) -> None:
        """The stream has ended. Raises `StreamBroken` in the middle of a chunk."""
        if self._rest:
            raise StreamBroken("the stream was cut in the middle of a chunk")
