"""The node's key: made once, kept, never replaced; what it signs, judges and marks."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpu_server.certificates import KEY_FILE, NodeKeyUnusable, NodeSeal
from gpu_server.core.errors import CertificateRejected
from gpu_server.core.slots import WashTier
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.wash import WashRefused, encode_record, hash_of
from tests.sealed.washes import ALONE, GPU, NOBODY, document, record, sign, washed


def seal_of(folder: Path, *, enclave: bool = False, simulated: bool = True) -> NodeSeal:
    return NodeSeal.open(folder, enclave=enclave, allow_simulated=simulated)


def issued(seal: NodeSeal, **changes: Any) -> bytes:
    """A certificate of this seal's node; with a document unless the changes say that there is no enclave."""
    raw = encode_record(record(**{"node_key": seal.public_key, **changes}))
    return seal.issue(raw, None if "enclave" in changes else document(hash_of(raw)))


def rejected(seal: NodeSeal, raw: bytes) -> tuple[str, str]:
    """The slot and the reason of a rejection."""
    with pytest.raises(CertificateRejected) as caught:
        seal.judge(raw)
    return caught.value.slot_id, caught.value.why.partition(":")[0]


# -- the key file -------------------------------------------------------------------------------------------


def test_a_key_is_made_once(tmp_path: Path) -> None:
    """The first start makes the key, for its owner alone; every later one has the same, and marks alike."""
    first = seal_of(tmp_path)
    path = tmp_path / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes()[32:] == first.public_key
    before = path.stat()
    again = seal_of(tmp_path)
    assert again.public_key == first.public_key
    assert again.lease_mark("acme", "s1") == first.lease_mark("acme", "s1")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(tmp_path) == [KEY_FILE]


def test_it_is_made_closed_from_the_start(tmp_path: Path) -> None:
    """Whatever the umask says, nobody else can ever read the key."""
    old = os.umask(0)
    try:
        seal_of(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_nodes_differ(tmp_path: Path) -> None:
    """Another folder is another node."""
    keys = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        keys.add(seal_of(tmp_path / name).public_key)
    assert len(keys) == 2


def test_two_starts_at_once(tmp_path: Path) -> None:
    """Whoever makes the key first has made it for all: one link is one key, and no draft is left."""
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: seal_of(tmp_path).public_key, range(24)))
    assert len(keys) == 1
    assert os.listdir(tmp_path) == [KEY_FILE]


GOOD = bytes(range(32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:-1], "has not 64 bytes"),
        (lambda data: data[:32], "has not 64 bytes"),
        (lambda data: data + b"\n", "has not 64 bytes"),
        (lambda data: data + bytes(1 << 20), "has not 64 bytes"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "is damaged"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 0x40]), "is damaged"),
        (lambda data: bytes(64), "is damaged"),
    ],
)
def test_a_damaged_key(tmp_path: Path, change: Any, said: str) -> None:
    """A key file that is not whole is refused with a word about what to do, and left as it is."""
    path = tmp_path / KEY_FILE
    seal_of(tmp_path)
    path.write_bytes(damaged := change(path.read_bytes()))
    for _ in range(2):
        with pytest.raises(NodeKeyUnusable) as caught:
            seal_of(tmp_path)
        assert f"{path} {said}. Put it back from a backup, or move it away" in str(caught.value)
        assert path.read_bytes() == damaged
    assert os.listdir(tmp_path) == [KEY_FILE]


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o610, 0o666])
def test_a_key_that_others_can_reach(tmp_path: Path, mode: int) -> None:
    """A key that others can read or write is refused, and its mode is left for the operator to judge."""
    seal_of(tmp_path)
    path = tmp_path / KEY_FILE
    path.chmod(mode)
    with pytest.raises(NodeKeyUnusable, match="with mode 0600"):
        seal_of(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o400)
    assert seal_of(tmp_path).public_key


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_key_of_somebody_else(tmp_path: Path) -> None:
    """A key that belongs to another user is refused."""
    seal_of(tmp_path)
    os.chown(tmp_path / KEY_FILE, 65534, 65534)
    with pytest.raises(NodeKeyUnusable, match="must belong to the service"):
        seal_of(tmp_path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A link, a folder, a pipe or a folder that is not there is refused, and nothing is made in its place."""
    path = tmp_path / KEY_FILE
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NodeKeyUnusable, match="not a link"):
        seal_of(tmp_path)
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(NodeKeyUnusable, match="no regular file"):
        seal_of(tmp_path)
    path.rmdir()
    os.mkfifo(path, 0o600)
    with pytest.raises(NodeKeyUnusable, match="no regular file"):
        seal_of(tmp_path)
    with pytest.raises(NodeKeyUnusable, match="No such file"):
        seal_of(tmp_path / "none")
    assert os.listdir(tmp_path) == [KEY_FILE]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that cannot be written whole is not there at all, so that the next start can make one."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NodeKeyUnusable, match="No space left"):
            seal_of(tmp_path)
        assert os.listdir(tmp_path) == []
    assert seal_of(tmp_path).public_key


def test_nothing_shows_the_key(tmp_path: Path) -> None:
    """Neither the seal nor an error about its file shows anything secret."""
    seal = seal_of(tmp_path)
    path = tmp_path / KEY_FILE
    seed = path.read_bytes()[:32]
    assert seed.hex() not in repr(seal)
    assert repr(seed)[2:-1] not in repr(seal)
    path.write_bytes(seed)
    with pytest.raises(NodeKeyUnusable) as caught:
        seal_of(tmp_path)
    assert seed.hex() not in str(caught.value)


# -- what it signs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["full", "light"])
def test_it_judges_its_own(tmp_path: Path, tier: str) -> None:
    """What it signs, it accepts, and core gets all that it compares."""
    seal = seal_of(tmp_path, enclave=True)
    raw = issued(seal, tier=tier, fence=9, prev=b"p" * 32)
    found = seal.judge(raw)
    assert (found.slot_id, found.slot_uuid, found.fence, found.prev) == ("0", GPU, 9, b"p" * 32)
    assert (found.raw, found.hash, found.tier) == (raw, hash_of(raw), WashTier(tier))
    assert found.record_hash == hash_of(
        encode_record(record(node_key=seal.public_key, tier=tier, fence=9, prev=b"p" * 32))
    )


def test_the_enclave_is_there_or_not(tmp_path: Path) -> None:
    """A node with an enclave takes no certificate without a document, and one without takes none with."""
    with_enclave, without = seal_of(tmp_path, enclave=True), seal_of(tmp_path)
    attested, plain = issued(with_enclave), issued(without, **ALONE)
    assert with_enclave.judge(attested).raw == attested
    assert without.judge(plain).raw == plain
    assert rejected(with_enclave, plain) == ("0", "document")
    assert rejected(without, attested) == ("0", "document")


def test_simulations(tmp_path: Path) -> None:
    """A node whose enclave is a real one takes no document of a simulated one."""
    raw = issued(seal_of(tmp_path, enclave=True))
    assert rejected(seal_of(tmp_path, enclave=True, simulated=False), raw) == ("0", "document")


def test_what_it_rejects(tmp_path: Path) -> None:
    """Bytes that are none, another node's, a signature of another's, a step that is not clean, a document for
    another record: each is rejected with its reason, and with the slot where that can be read."""
    seal = seal_of(tmp_path, enclave=True)
    mine = {"node_key": seal.public_key, "slot_id": "5"}
    good = issued(seal, **mine)
    raw = encode_record(record(**mine))
    assert seal.judge(good).slot_id == "5"
    assert rejected(seal, b"") == ("?", "malformed")
    assert rejected(seal, good + b"\0") == ("?", "malformed")
    assert rejected(seal, washed(slot_id="5")) == ("5", "node_key")
    assert rejected(seal, sign(raw, document(hash_of(raw)))) == ("5", "signature")
    other = encode_record(record(**mine, fence=8))
    assert rejected(seal, seal.issue(raw, document(hash_of(other)))) == ("5", "nonce")
    assert rejected(seal, sign(encode_record(record(**mine, residue="failed")), b"", seal._key)) == (
        "5",
        "steps",
    )


def test_it_signs_no_nonsense(tmp_path: Path) -> None:
    """A record of another node, one that is not clean, and what is none are not signed."""
    seal = seal_of(tmp_path)
    for raw, error in (
        (b"", Malformed),
        (encode_record(record(**ALONE)), WashRefused),
        (encode_record(record(node_key=seal.public_key, gates="failed", **ALONE)), WashRefused),
    ):
        with pytest.raises(error):
            seal.issue(raw, None)


# -- what it marks ------------------------------------------------------------------------------------------


def test_marks(tmp_path: Path) -> None:
    """A mark is the same for the same lease, another one for any other tenant, session or node, also where
    one name ends where the other begins; and it fits into a record."""
    (tmp_path / "other").mkdir()
    seal, other = seal_of(tmp_path), seal_of(tmp_path / "other")
    leases = [("acme", "s1"), ("acme", "s2"), ("acmes", "1"), ("s1", "acme"), ("", "acmes1"), ("acmes1", "")]
    marks = [seal.lease_mark(*lease) for lease in leases] + [other.lease_mark("acme", "s1")]
    assert len(set(marks)) == len(leases) + 1
    assert {len(mark) for mark in marks} == {32}
    assert marks[0] == seal.lease_mark("acme", "s1")
    assert record(lease=marks[0]).lease == marks[0]
    assert record(**NOBODY).lease == b""
