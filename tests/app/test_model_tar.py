"""Tar streams: what tarfile writes is read, what would escape or lies is refused."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.model_tar import MAX_MEMBERS, Member, TarBroken, TarError, TarReader

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def packed(members: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def tar_of(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    return packed([(tarfile.TarInfo(name), content) for name, content in files.items()], form)


def special(name: str, kind: bytes = tarfile.REGTYPE, *, mode: int = 0o644, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = kind, mode, link
    return packed([(info, b"")])


def read(raw: bytes, *, step: int = 1 << 20, max_bytes: int | None = None) -> dict[str, bytes]:
    """What a reader makes of a stream that comes in pieces."""
    reader, found, last = TarReader(max_bytes=max_bytes), {}, ""
    for at in range(0, len(raw), step):
        for item in reader.feed(raw[at : at + step]):
            if isinstance(item, Member):
                last = item.path
                found[last] = b""
            else:
                found[last] += item
    reader.finish()
    return found


FILES = {"config.json": b"{}", "a/b.bin": b"x" * 1537, "empty": b"", "full": b"y" * 1024}
LONG = {"deep/" + "n" * 150 + "/" + "m" * 120: b"1", "d/" + "é" * 60: b"22"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("step", [1, 100, 512, 4096, 1 << 20])
def test_what_tar_writes(form: int, step: int) -> None:
    """Files come with path and content in every format, in pieces of every size."""
    assert read(tar_of(FILES, form), step=step) == FILES


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(form: int) -> None:
    """Names that do not fit a header come in headers of their own, and are for the next member only."""
    files = {**LONG, "after": b"3"}
    assert read(tar_of(files, form), step=700) == files


def test_the_folder_itself() -> None:
    """`tar -C folder -c .` begins its names with ./ and names the folder: that is the same."""
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    sub = tarfile.TarInfo("./sub/")
    sub.type, sub.mode = tarfile.DIRTYPE, 0o2775
    raw = packed([(folder, b""), (sub, b""), (tarfile.TarInfo("./sub/x"), b"1")])
    assert read(raw) == {"sub/x": b"1"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (special("/etc/passwd"), "absolute"),
        (special("../x"), r"\.\."),
        (special("a/../../x"), r"\.\."),
        (special("./../x"), r"\.\."),
        (special(".//etc/passwd"), "empty|absolute"),
        (special("..", tarfile.DIRTYPE), r"\.\."),
        (special("a\\b"), "character"),
        (special("a\x1bb"), "character"),
        (special("l", tarfile.SYMTYPE, link="/etc/passwd"), "'l' is a link"),
        (special("l", tarfile.LNKTYPE, link="config.json"), "'l' is a link"),
        (special("n", tarfile.CHRTYPE), "no plain file"),
        (special("n", tarfile.BLKTYPE), "no plain file"),
        (special("n", tarfile.FIFOTYPE), "no plain file"),
        (special("n", tarfile.GNUTYPE_SPARSE), "sparse"),
        (special("s", mode=0o4755), "setuid"),
        (special("s", mode=0o2755), "setuid"),
        (special("."), "without a name"),
    ],
)
def test_members_that_would_escape(raw: bytes, message: str) -> None:
    """Whatever is not a plain file or folder below one place is refused by name."""
    with pytest.raises(TarError, match=message) as caught:
        read(raw)
    assert not isinstance(caught.value, TarBroken)


def test_pax_headers_that_lie() -> None:
    """A path, a size or a sparse map that comes in an extended header is checked as any other."""
    for headers, message in (
        ({"path": "../up"}, r"\.\."),
        ({"GNU.sparse.major": "1"}, "sparse"),
        ({"size": "-1"}, "size that cannot be"),
        ({"size": "9" * 30}, "size that cannot be"),
    ):
        info = tarfile.TarInfo("plain")
        info.pax_headers = headers
        with pytest.raises(TarError, match=message):
            read(packed([(info, b"")]))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"path": "all-of-them"}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(TarError, match="all members"):
        read(stream.getvalue())


def test_a_header_that_never_fits() -> None:
    """A header that extends the next one is kept in memory, so it may not be large."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with pytest.raises(TarError, match="too large"):
        read(info.tobuf())
    with pytest.raises(TarError, match="cannot be read"):
        read(packed_header(b"x", b"7 path=toolong\n"))


def test_many_headers_before_a_member() -> None:
    """All of them count for it, and what nobody asks for is not kept."""
    reader = TarReader()
    tracemalloc.start()
    try:
        for number in range(200):
            record = b"65500 key%d=" % number
            record += b"v" * (65500 - len(record) - 1) + b"\n"
            assert not list(reader.feed(packed_header(b"x", record)))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20
    plain = packed([(tarfile.TarInfo("plain"), b"")])
    twice = packed_header(b"x", b"10 path=b\n") + packed_header(b"x", b"7 k=v1\n")
    assert read(twice + plain) == {"b": b""}
    sparse = packed_header(b"x", b"22 GNU.sparse.major=1\n") + packed_header(b"x", b"7 k=v1\n")
    with pytest.raises(TarError, match="sparse"):
        read(sparse + plain)
    assert read(packed_header(b"x", b"10 path=b\n") + plain[:512] + plain) == {"b": b"", "plain": b""}


def packed_header(kind: bytes, content: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


def test_too_much() -> None:
    """More content than was announced, more members than a model has, and no end, are refused."""
    with pytest.raises(TarError, match="larger than the 10 bytes"):
        read(tar_of({"a": b"x" * 6, "b": b"x" * 6}), max_bytes=10)
    with pytest.raises(TarError, match="members"):
        read(packed_header(b"x", b"9 path=a\n") * (MAX_MEMBERS + 1))
    with pytest.raises(TarError, match="does not end"):
        read(bytes(40 << 20))


def test_a_stream_that_breaks() -> None:
    """Wherever it breaks, also just between two members, it is not taken for a whole one."""
    raw = tar_of(FILES).rstrip(b"\0")
    whole = raw + bytes(-len(raw) % 512)
    for cut in {0, 1, 511, 512, 1024, 2048, len(whole) - 512, len(whole)}:
        with pytest.raises(TarBroken):
            read(whole[:cut])
    assert read(whole + bytes(1024)) == FILES


def test_what_is_no_tar() -> None:
    """An error page, a header that was damaged, or something behind the end, is broken, not refused."""
    raw = bytearray(tar_of(FILES))
    raw[3] ^= 1
    for garbage in (b"<html>" * 200, bytes(raw), tar_of(FILES) + tar_of(FILES)):
        with pytest.raises(TarBroken):
            read(garbage)


NAMES = st.from_regex(r"[a-z]{1,30}(/[a-z]{1,80}){0,3}", fullmatch=True)


@given(
    st.dictionaries(NAMES, st.binary(max_size=2000), max_size=5),
    st.sampled_from(FORMATS),
    st.integers(1, 3000),
)
def test_any_files(files: dict[str, bytes], form: int, step: int) -> None:
    """Whatever tarfile packs, in whatever pieces it comes, is what was packed."""
    files = {
        name: content for name, content in files.items() if form != tarfile.USTAR_FORMAT or len(name) <= 100
    }
    assert read(tar_of(files, form), step=step) == files


@given(st.binary(max_size=1536), st.integers(1, 600), st.booleans())
def test_any_bytes(raw: bytes, step: int, repaired: bool) -> None:
    """Whatever comes, it is a tar or a TarError; a right checksum does not make a header right."""
    if repaired and len(raw) >= 512:
        total = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
        raw = raw[:148] + b"%06o\0 " % total + raw[156:]
    with contextlib.suppress(TarError):
        read(raw, step=step)
