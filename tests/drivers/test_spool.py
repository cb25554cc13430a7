"""The spool: what it has was written whole, and survives the process at any moment."""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_server.drivers.spool import History, Record, Spool
from tests.full_disk import no_room_beyond

BIG = 1 << 24
TASK = "t_1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def spool(root: Path) -> Spool:
    return another(root)


def another(root: Path) -> Spool:
    """The spool of another life."""
    spool = Spool(root)
    spool.open()
    return spool


def record(first: int, count: int = 1, *, own: bool = False, told: int = 0, size: int = 20) -> Record:
    return Record(own, told, first, first + count - 1, b"%d " % first * size)


def fill(history: History, first: int, count: int, size: int = 20) -> list[Record]:
    records = [record(number, size=size) for number in range(first, first + count)]
    for one in records:
        history.append(one)
    return records


def names(root: Path) -> set[str]:
    return set(os.listdir(root))


# -- the folder -------------------------------------------------------------------------------------------


def test_everything_is_closed_to_others(root: Path) -> None:
    """The folder has mode 0700 and every file 0600, also where the umask would allow more."""
    umask = os.umask(0)
    try:
        spool = another(root)
        spool.put_input(TASK, b"x")
        spool.put_note("s_1", {"message": "x"})
        spool.secret()
        history = spool.history(TASK, 10)
        fill(history, 1, 3)
        history.close()
    finally:
        os.umask(umask)
    assert root.stat().st_mode & 0o7777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o7777 for path in root.iterdir()}
    assert modes == dict.fromkeys([".secret", "s_1.note", "t_1.events", "t_1.events.old", "t_1.input"], 0o600)


def test_a_folder_that_others_can_enter_is_refused(root: Path) -> None:
    """Whatever another user may do there."""
    for mode in (0o701, 0o710, 0o770, 0o755):
        root.mkdir()
        root.chmod(mode)
        with pytest.raises(PermissionError):
            Spool(root).open()
        root.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(root: Path) -> None:
    """Its owner could read everything."""
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(PermissionError):
        Spool(root).open()


def test_what_is_no_folder_is_refused(root: Path, tmp_path: Path) -> None:
    """A link could lead anywhere, to a folder of ours too."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    root.symlink_to(other)
    with pytest.raises(NotADirectoryError):
        Spool(root).open()
    root.unlink()
    root.write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        Spool(root).open()


def test_known(spool: Spool, root: Path) -> None:
    """Every task and session is known that has anything here, and nothing else."""
    assert spool.known() == set()
    spool.secret()
    spool.put_input("t_1", b"")
    spool.put_note("s_2", {})
    history = spool.history("t_3", 10)
    fill(history, 1, 3)
    history.close()
    (root / "t_3.events").unlink()  # the older half alone
    assert another(root).known() == {"t_1", "s_2", "t_3"}
    for name in ("t_1", "s_2", "t_3"):
        for drop in (spool.drop_input, spool.drop_note, spool.drop_history):
            drop(name)
            drop(name)
    assert spool.known() == set()
    assert names(root) == {".secret"}


def test_the_secret_lasts(spool: Spool, root: Path) -> None:
    """It is made once, and then the same in every life; half a one is none."""
    secret, made = spool.secret()
    assert len(secret) == 32
    assert made
    assert spool.secret() == another(root).secret() == (secret, False)
    (root / ".secret").write_bytes(secret[:31])
    renewed, made = spool.secret()
    assert made
    assert renewed != secret
    assert spool.secret() == (renewed, False)


METHODS: list[Callable[[Spool, str], Any]] = [
    lambda spool, name: spool.put_input(name, b""),
    Spool.input,
    Spool.drop_input,
    lambda spool, name: spool.put_note(name, {}),
    Spool.note,
    Spool.drop_note,
    lambda spool, name: spool.history(name, 1),
    Spool.read_history,
    Spool.history_bytes,
    lambda spool, name: spool.replace_history(name, record(1)),
    Spool.drop_history,
]


@pytest.mark.parametrize("name", ["", ".", "..", "../t", "a/b", "a.b", "t\0", "t\n", "ä", ".secret"])
def test_names_cannot_lead_elsewhere(spool: Spool, root: Path, name: str) -> None:
    """Only ids are taken, whatever is to be done with them."""
    for method in METHODS:
        with pytest.raises(ValueError, match="is no id"):
            method(spool, name)
    assert names(root) == set()


def test_what_cannot_be_dropped_is_a_fault(spool: Spool, root: Path) -> None:
    """It stays for the next life and stops nobody."""
    (root / "t_1.input").mkdir()
    spool.drop_input(TASK)
    assert spool.fault is not None


# -- inputs and notes -------------------------------------------------------------------------------------


def test_inputs(spool: Spool, root: Path) -> None:
    """An input is there, byte for byte and in every life, until it is dropped."""
    body = os.urandom(1 << 20)
    spool.put_input(TASK, body)
    spool.put_input("t_2", b"")
    assert another(root).input(TASK) == body
    assert spool.input("t_2") == b""
    spool.put_input(TASK, b"other")
    assert spool.input(TASK) == b"other"
    spool.drop_input(TASK)
    assert spool.input(TASK) is None
    assert names(root) == {"t_2.input"}


def test_notes(spool: Spool, root: Path) -> None:
    """A note is there in every life, the latest one, until it is dropped."""
    assert spool.note("s_1") is None
    spool.put_note("s_1", {"log_tail": "ä\n\0"})
    spool.put_note("s_1", {"message": "m", "n": [1]})
    assert another(root).note("s_1") == {"message": "m", "n": [1]}
    spool.drop_note("s_1")
    assert spool.note("s_1") is None


def test_without_room_nothing_is_left(spool: Spool, root: Path) -> None:
    """An input or a note that does not fit is an OSError, and no part of it takes up room."""
    with no_room_beyond(1000):
        with pytest.raises(OSError, match="File too large"):
            spool.put_input(TASK, b"x" * 1001)
        with pytest.raises(OSError, match="File too large"):
            spool.put_note("s_1", {"message": "x" * 1000})
        assert names(root) == set()
        spool.put_input(TASK, b"x" * 1000)
    assert spool.input(TASK) == b"x" * 1000


def test_half_an_input_is_none(spool: Spool, root: Path) -> None:
    """What a killed process had only begun to write belongs to nobody, and the next life removes it."""
    (root / ".draft").write_bytes(b"half")
    assert spool.known() == set()
    another(root)
    assert names(root) == set()


# -- histories --------------------------------------------------------------------------------------------


def test_histories(spool: Spool, root: Path) -> None:
    """Records come back as they were written, in every life, which each goes on behind the one before."""
    assert spool.read_history(TASK) == []
    assert spool.history_bytes(TASK) == 0
    written = []
    for life in range(3):
        history = another(root).history(TASK, BIG)
        assert history.read() == written
        new = [
            record(10 * life + 1, own=True, told=life + 1),
            record(10 * life + 2, 8, told=life + 1, size=life),
            Record(False, 2**32 - 1, 10**15 + life, 10**15 + life, b""),
        ]
        for one in new:
            history.append(one)
        written += new
        assert spool.read_history(TASK) == history.read() == written
        history.close()
        history.close()
    assert spool.history_bytes(TASK) == (root / "t_1.events").stat().st_size
    spool.drop_history(TASK)
    assert spool.read_history(TASK) == []
    assert names(root) == set()


def test_a_torn_end_at_any_byte(spool: Spool, root: Path) -> None:
    """Wherever the last write broke off, all that came before is read, and goes on without a hole."""
    history = spool.history(TASK, BIG)
    *whole, torn = fill(history, 1, 3, size=5)
    history.close()
    path = root / "t_1.events"
    content = path.read_bytes()
    end = len(content) * 2 // 3
    for size in range(end, len(content)):
        path.write_bytes(content[:size])
        assert spool.read_history(TASK) == whole
        history = spool.history(TASK, BIG)
        assert path.stat().st_size == end
        history.append(torn)
        history.close()
        assert path.read_bytes() == content


GARBAGE = [
    bytes(100),
    b"\xff" * 100,
    b"id: 3\nevent: text\n" * 10,
    random.Random(1).randbytes(5000),
    struct.pack("<?IIQQI", False, 0, 0, 3, 3, 0),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_the_end(spool: Spool, root: Path, garbage: bytes) -> None:
    """What is no record ends the history, and is overwritten by the next one."""
    path = root / "t_1.events"
    for count in (0, 2):
        history = spool.history(TASK, BIG)
        whole = fill(history, 1, count)
        history.close()
        with path.open("ab") as file:
            file.write(garbage)
        assert spool.read_history(TASK) == whole
        history = spool.history(TASK, BIG)
        whole += fill(history, count + 1, 1)
        assert history.read() == whole
        history.close()
        spool.drop_history(TASK)


def test_a_damaged_header_ends_it(spool: Spool, root: Path) -> None:
    """No bit of a header can flip without the record being taken for garbage."""
    history = spool.history(TASK, BIG)
    first, second = fill(history, 1, 2, size=0)
    path = root / "t_1.events"
    content = path.read_bytes()
    size = len(content) // 2
    for bit in range(8 * size):
        damaged = bytearray(content)
        damaged[size + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert spool.read_history(TASK) == [first]
    path.write_bytes(content)
    assert history.read() == [first, second]


def test_an_append_without_room_leaves_no_trace(spool: Spool, root: Path) -> None:
    """It is an OSError, told as a fault, and the file ends as before; with room again it goes on."""
    history = spool.history(TASK, BIG)
    written = fill(history, 1, 2)
    path = root / "t_1.events"
    size = path.stat().st_size
    for room in (0, 1, 28, 29, 30, 60):
        with no_room_beyond(size + room), pytest.raises(OSError, match="File too large"):
            history.append(record(3))
        assert path.stat().st_size == size
        assert spool.fault is not None
    written += fill(history, 3, 1)
    assert spool.fault is None
    assert spool.read_history(TASK) == written


def test_a_history_that_cannot_be_opened(spool: Spool, root: Path) -> None:
    """It is an OSError and a fault, until another one can be opened."""
    (root / "t_1.events").mkdir()
    with pytest.raises(IsADirectoryError):
        spool.history(TASK, BIG)
    assert spool.fault is not None
    spool.history("t_2", BIG)
    assert spool.fault is None


@pytest.mark.parametrize("size", [0, 1, 30, 500])
def test_a_history_is_bounded(spool: Spool, root: Path, size: int) -> None:
    """At least the bound is kept, and at most twice as much and two records: the latest, without a hole, in
    whichever life they were written."""
    bound, one = 1000, 29 + len(record(100, size=size).data)
    history = spool.history(TASK, bound)
    for number in range(1, 300):
        if number % 7 == 0:
            history.close()
            history = another(root).history(TASK, bound)
        history.append(record(number, size=size))
        kept = spool.history_bytes(TASK)
        assert kept <= 2 * (bound + one)
        numbers = [found.first for found in spool.read_history(TASK)]
        assert numbers == list(range(number - len(numbers) + 1, number + 1))
        assert numbers[0] == 1 or kept >= bound
    assert numbers[0] > 1
    assert names(root) == {"t_1.events", "t_1.events.old"}


def test_killed_between_two_generations(spool: Spool, root: Path) -> None:
    """A life that ended when the one file had been put away, and the next was not there yet, lost nothing."""
    history = spool.history(TASK, 100)
    fill(history, 1, 6)
    history.close()
    before = spool.read_history(TASK)
    (root / "t_1.events").rename(root / "t_1.events.old")
    after = [one for one in before if one in spool.read_history(TASK)]
    assert after[-1] == before[-1]
    history = spool.history(TASK, 100)
    after += fill(history, 7, 1)
    assert history.read() == after


def test_a_generation_that_cannot_begin(spool: Spool, root: Path) -> None:
    """The append is an OSError; what was there stays, and is taken up again."""
    history = spool.history(TASK, 10)
    written = fill(history, 1, 1)
    (root / "t_1.events.old").mkdir()
    with pytest.raises(OSError, match="directory"):
        history.append(record(2))
    (root / "t_1.events.old").rmdir()
    written += fill(history, 2, 1)
    assert history.read() == written


# -- what does not count ----------------------------------------------------------------------------------


def told_history() -> list[Record]:
    """Two events of the service's own, some of the worker's, two more of its own."""
    return [
        record(1, own=True, told=1),
        record(2, own=True, told=2),
        record(3, 10, told=2),
        record(13, 5, told=2),
        record(18, own=True, told=3),
        record(19, own=True, told=4),
    ]


@pytest.mark.parametrize("bound", [1, 100, 200, BIG])
@pytest.mark.parametrize(("keep", "left"), [(9, 6), (4, 6), (3, 5), (2, 4), (1, 1), (0, 0)])
def test_what_was_not_decided_is_cut_off(spool: Spool, root: Path, bound: int, keep: int, left: int) -> None:
    """The first own event that does not count goes, and all behind it, whichever file they are in; and the
    history goes on in its place."""
    history = spool.history(TASK, bound)
    for one in told_history():
        history.append(one)
    history.close()
    before = spool.read_history(TASK)
    history = another(root).history(TASK, bound)
    history.cut(keep)
    after = [one for one in before if one in told_history()[:left]]
    assert history.read() == after
    history.cut(keep)
    history.close()
    history = another(root).history(TASK, BIG)
    after += fill(history, 1000, 2)
    assert history.read() == after


def test_a_cut_where_the_event_itself_is_gone(spool: Spool) -> None:
    """What the worker said behind an own event that does not count goes, also when that one is gone."""
    history = spool.history(TASK, 10)
    for one in (record(1, own=True, told=1), record(2, told=1), record(3, told=1)):
        history.append(one)
    assert [one.first for one in history.read()] == [2, 3]
    history.cut(0)
    assert history.read() == []


@pytest.mark.parametrize("bound", [1, 100, BIG])
def test_one_record_in_place_of_all(spool: Spool, root: Path, bound: int) -> None:
    """Of a history that was too much only one record stays, and only its room is taken."""
    history = spool.history(TASK, bound)
    for one in told_history():
        history.append(one)
    history.close()
    last = told_history()[-1]
    for _ in range(2):
        spool.replace_history(TASK, last)
        assert another(root).read_history(TASK) == [last]
    assert names(root) == {"t_1.events"}


def test_replacing_makes_its_own_room(spool: Spool, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room beside the history, it goes first; where there is none at all, nothing stays."""
    history = spool.history(TASK, 100)
    fill(history, 1, 10)
    history.close()
    put, found = spool._put, list[set[str]]()

    def full_at_first(name: str, content: bytes) -> None:
        found.append(names(root))
        with no_room_beyond(10 if len(found) == 1 else BIG):
            put(name, content)

    monkeypatch.setattr(spool, "_put", full_at_first)
    spool.replace_history(TASK, record(11))
    assert found == [{"t_1.events", "t_1.events.old"}, set()]
    assert spool.read_history(TASK) == [record(11)]
    monkeypatch.undo()
    with no_room_beyond(10), pytest.raises(OSError, match="File too large"):
        spool.replace_history(TASK, record(12))
    assert names(root) == set()


# -- kill -9 ----------------------------------------------------------------------------------------------

WRITER = """
import itertools, sys
from pathlib import Path
from gpu_server.drivers.spool import Record, Spool

spool = Spool(Path(sys.argv[1]))
spool.open()
history = spool.history("t_1", 1 << 20)
begun = [record.last for record in history.read()]
for number in itertools.count(begun[-1] + 1 if begun else 1):
    history.append(Record(False, 0, number, number, b"%d " % number * (number * 7919 % 30_000)))
    print(number, flush=True)
"""


def test_kill_9_loses_no_record(root: Path) -> None:
    """Whenever the process is killed, what it had appended is there, whole and without holes."""
    chance, last = random.Random(), 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for line in itertools.islice(writer.stdout, chance.randrange(1, 200)):
                last = int(line)
            writer.kill()
            for line in writer.stdout:
                last = int(line) if line.endswith(b"\n") else last
        found = another(root).read_history(TASK)
        numbers = [one.first for one in found]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[-1] in (last, last + 1)
        for one in found:
            assert one.data == b"%d " % one.first * (one.first * 7919 % 30_000)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_note_that_is_none(spool: Spool, root: Path, content: bytes) -> None:
    """A note that a power cut has damaged, where there is no tmpfs, counts as none."""
    (root / "s_1.note").write_bytes(content)
    assert spool.note("s_1") is None
