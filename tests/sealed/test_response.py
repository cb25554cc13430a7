"""The response's chunks: in order, each once, up to the final one, and no others."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gpu_server.sealed.chunks import MAX_DATA, MIN_CHUNK, unpad
from gpu_server.sealed.errors import CannotOpen, Malformed, SealedError, StreamBroken
from gpu_server.sealed.response import ResponseOpener, ResponseSealer

SECRET = bytes(range(32))
SALT = b"s" * 32


def five() -> tuple[ResponseSealer, list[bytes]]:
    """Four chunks and a final one."""
    sealer = ResponseSealer(SECRET)
    chunks = [chunk for i in range(4) for chunk in sealer.seal(b"event %d" % i, final=False)]
    return sealer, chunks + sealer.seal(b"end", final=True)


def test_what_is_sealed_is_opened() -> None:
    """An answer in pieces comes out in order, and is finished by its final chunk."""
    sealer, chunks = five()
    opener = ResponseOpener(SECRET, sealer.salt)
    assert [opener.open(chunk) for chunk in chunks] == [
        b"event 0",
        b"event 1",
        b"event 2",
        b"event 3",
        b"end",
    ]
    assert opener.finished
    opener.close()


def test_the_key_schedule() -> None:
    """Key, nonce and associated data are what the protocol says, computed here from the parts."""
    sealer = ResponseSealer(SECRET, SALT)
    sealer.seal(b"first", final=False)
    (chunk,) = sealer.seal(b"second", final=True)
    key = HKDF(algorithm=SHA256(), length=32, salt=SALT, info=b"key").derive(SECRET)
    base = HKDF(algorithm=SHA256(), length=12, salt=SALT, info=b"nonce").derive(SECRET)
    nonce = base[:11] + bytes([base[11] ^ 1])
    assert chunk[:1] == b"\x01"
    assert unpad(AESGCM(key).decrypt(nonce, chunk[1:], b"\x01")) == b"second"


def test_large_and_empty_plaintexts() -> None:
    """What is too long for a chunk takes several, nothing takes none, and an empty end is an end."""
    sealer = ResponseSealer(SECRET)
    data = b"0123456789" * (MAX_DATA // 4)
    assert sealer.seal(b"", final=False) == []
    chunks = sealer.seal(data, final=False)
    assert len(chunks) == 3
    ends = sealer.seal(b"", final=True)
    assert [len(chunk) for chunk in ends] == [MIN_CHUNK]
    opener = ResponseOpener(SECRET, sealer.salt)
    assert b"".join(opener.open(chunk) for chunk in chunks) == data
    assert opener.open(*ends) == b""
    opener.close()


def test_salts_are_fresh() -> None:
    """Two answers under the same secret have different salts, and so different keys."""
    first, second = ResponseSealer(SECRET), ResponseSealer(SECRET)
    assert first.salt != second.salt
    assert first.seal(b"same", final=True) != second.seal(b"same", final=True)


@pytest.mark.parametrize("salt", [b"", bytes(31), bytes(33)])
def test_a_salt_has_32_bytes(salt: bytes) -> None:
    """Anything else is no beginning of an answer."""
    with pytest.raises(Malformed):
        ResponseOpener(SECRET, salt)
    with pytest.raises(Malformed):
        ResponseSealer(SECRET, salt)


@pytest.mark.parametrize(
    "order",
    [[1], [0, 2], [0, 0], [0, 1, 0], [0, 1, 1], [0, 1, 2, 4], [4], [0, 1, 3]],
    ids=lambda order: "-".join(map(str, order)),
)
def test_chunks_left_out_doubled_or_reordered(order: list[int]) -> None:
    """A chunk opens in its own place alone, and after a failure nothing opens, not even the right one."""
    sealer, chunks = five()
    opener = ResponseOpener(SECRET, sealer.salt)
    *right, wrong = order
    for i in right:
        opener.open(chunks[i])
    with pytest.raises(CannotOpen):
        opener.open(chunks[wrong])
    for chunk in chunks[len(right) :]:
        with pytest.raises(StreamBroken):
            opener.open(chunk)
    assert not opener.finished
    with pytest.raises(StreamBroken):
        opener.close()


def test_nothing_behind_the_final_chunk() -> None:
    """A chunk behind the final one is an error at both ends, whatever it holds."""
    sealer, chunks = five()
    opener = ResponseOpener(SECRET, sealer.salt)
    for chunk in chunks:
        opener.open(chunk)
    for more in (chunks[0], chunks[-1], b"", bytes(MIN_CHUNK)):
        with pytest.raises(StreamBroken):
            opener.open(more)
    for final in (True, False):
        with pytest.raises(StreamBroken):
            sealer.seal(b"more", final=final)


def test_an_end_without_a_final_chunk() -> None:
    """A stream that stops early, be it at its beginning, is no answer."""
    sealer, chunks = five()
    for count in range(len(chunks)):
        opener = ResponseOpener(SECRET, sealer.salt)
        for chunk in chunks[:count]:
            opener.open(chunk)
        with pytest.raises(StreamBroken):
            opener.close()


@pytest.mark.parametrize("place", [0, 4])
def test_forged_flags(place: int) -> None:
    """The service can neither end a stream early nor hide its end: the flag is sealed too."""
    sealer, chunks = five()
    for flag in range(256):
        if flag == chunks[place][0]:
            continue
        opener = ResponseOpener(SECRET, sealer.salt)
        for chunk in chunks[:place]:
            opener.open(chunk)
        with pytest.raises(SealedError):
            opener.open(bytes([flag]) + chunks[place][1:])
        assert not opener.finished


def test_every_byte_of_a_chunk_counts() -> None:
    """A chunk with any byte changed, cut or added does not open."""
    sealer, (chunk, *_) = five()
    changed = [chunk[:at] + bytes([chunk[at] ^ 0x40]) + chunk[at + 1 :] for at in range(len(chunk))]
    for bad in (*changed, chunk[:-1], chunk + b"\0", chunk + bytes(256), chunk[:1], b""):
        with pytest.raises((CannotOpen, Malformed)):
            ResponseOpener(SECRET, sealer.salt).open(bad)


def test_another_answer() -> None:
    """A chunk does not open under another salt or another request's secret."""
    sealer, (chunk, *_) = five()
    with pytest.raises(CannotOpen):
        ResponseOpener(SECRET, SALT).open(chunk)
    with pytest.raises(CannotOpen):
        ResponseOpener(bytes(32), sealer.salt).open(chunk)
