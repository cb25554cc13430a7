"""The wire to the enclave, against peers that answer wrongly, slowly, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gpu_server.drivers.enclave_link import EnclaveLink
from gpu_server.ports import EnclaveDown, EnclaveRefused
from gpu_server.sealed.frames import Code, decode_request, encode_reply
from gpu_server.sealed.grant import Binding
from tests.fakes.enclave_host import FakeEnclaveHost

Answer = Callable[[int], bytes]
NONCE = b"n" * 32
PATIENCE = 20.0
BINDING = Binding(
    tenant="t",
    pool="p",
    kms_key_arn="arn:aws:kms:eu-west-1:123456789012:key/k",
    session_id="s",
    epoch=b"e" * 16,
    worker_key=b"w" * 32,
    wrapped_key=b"w",
)


class Played:
    """What listens in the enclave's place: answers each request with whatever it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer: Callable[[int], bytes | None] = lambda number: None
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.connections = self._open = 0
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Played:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Close every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open += 1
        self._writers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                length = int.from_bytes(await reader.readexactly(4), "big")
                request = decode_request(await reader.readexactly(length))
                self.asked.set()
                answer = self.answer(request.id)
                if answer is None:
                    await reader.read(1)
                    break
                writer.write(answer)
        self._open -= 1
        if not self._open:
            self.left.set()


@pytest.fixture
async def played(tmp_path: Path) -> AsyncIterator[Played]:
    async with Played(tmp_path / "s") as made:
        yield made


@pytest.fixture
def link(played: Played) -> Iterator[EnclaveLink]:
    made = EnclaveLink(played.path, timeout=PATIENCE)
    yield made
    made.close()


def says(code: Code, *result: object) -> Answer:
    return lambda number: encode_reply(number, code, result)  # type: ignore[arg-type]


# -- the real program -----------------------------------------------------------------------------------


async def test_a_real_enclave(tmp_path: Path) -> None:
    """All four operations, and their refusals, as the real program does them."""
    host = FakeEnclaveHost(tmp_path / "s")
    await host.start()
    link = EnclaveLink(host.path, timeout=30.0)
    try:
        before = await link.status()
        assert (before.state, before.epoch, before.mode) == ("new", None, "simulated")
        with pytest.raises(EnclaveRefused) as early:
            await link.hello(NONCE)
        assert early.value.code == "POLICY"
        epoch = await link.init((b"r" * 32,))
        assert (await link.status()).epoch == epoch
        assert len(await link.hello(NONCE)) > 1000
        with pytest.raises(EnclaveRefused) as nonsense:
            await link.grant(BINDING, b"c")
        assert nonsense.value.code == "DECRYPT"
    finally:
        link.close()
        host.close_for_good()


# -- who does not answer as it should -------------------------------------------------------------------


async def test_nobody(tmp_path: Path) -> None:
    """A socket that is not there, or that nobody listens on."""
    link = EnclaveLink(tmp_path / "s")
    with pytest.raises(EnclaveDown, match="No such file"):
        await link.status()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        with pytest.raises(EnclaveDown, match="refused"):
            await link.status()


async def test_vsock_to_nobody() -> None:
    """A machine without an enclave: the error of the real vsock, and no fault of the loop's."""
    link = EnclaveLink((16, 5000), timeout=10.0)
    with pytest.raises(EnclaveDown, match="cannot be reached"):
        await link.status()
    link.close()


async def test_a_link_is_not_followed(tmp_path: Path, played: Played) -> None:
    """What stands in the folder for the socket leads nowhere else, or it could be any program's."""
    (tmp_path / "elsewhere").symlink_to(played.path)
    with pytest.raises(EnclaveDown):
        await EnclaveLink(tmp_path / "elsewhere").status()
    (tmp_path / "file").write_text("")
    with pytest.raises(EnclaveDown, match="not a socket"):
        await EnclaveLink(tmp_path / "file").status()
    assert played.connections == 0


async def test_silence(played: Played) -> None:
    """No answer within the time is an answer, and the connection is not used again."""
    link = EnclaveLink(played.path, timeout=0.2)
    with pytest.raises(EnclaveDown, match=r"within 0\.2 s"):
        await link.status()
    await played.asked.wait()
    link._timeout = PATIENCE
    played.answer = says(Code.OK, "new", b"", "1", "simulated")
    await link.status()
    assert played.connections == 2
    link.close()


@pytest.mark.parametrize(
    "answer",
    [
        lambda number: b"\xff\xff\xff\xff",
        lambda number: b"\0\0\0\0",
        lambda number: b"\0\0\0\4what",
        lambda number: encode_reply(number + 1, Code.OK, ["new", b"", "1", "simulated"]),
        lambda number: encode_reply(number + 1, Code.POLICY),
        lambda number: encode_reply(0, Code.OK, ["new", b"", "1", "simulated"]),
        lambda number: encode_reply(number, Code.OK, ["new", b"", "1", "simulated"]) * 2,
        lambda number: encode_reply(number, Code.OK, ["new", b"", "1", "simulated"]) + b"\0",
        says(Code.OK),
        says(Code.OK, "new", b"e" * 16, "1", "simulated"),
        says(Code.OK, "ready", b"e" * 15, "1", "simulated"),
        says(Code.OK, "ready", "e" * 16, "1", "simulated"),
        says(Code.OK, "ready", b"e" * 16, "1", "real"),
        says(Code.OK, "ready", b"e" * 16, "1" * 129, "nitro"),
        says(Code.OK, "ready", b"e" * 16, "1\x1b[2J\nforged=1", "nitro"),
        says(Code.OK, "other", b"", "1", "nitro"),
        says(Code.OK, "new", b"", "1", "nitro", "more"),
    ],
)
async def test_nonsense(played: Played, link: EnclaveLink, answer: Answer) -> None:
    """What is not exactly an answer to this question is no answer, and its connection is closed."""
    played.answer = answer
    with pytest.raises(EnclaveDown):
        await link.status()
    played.answer = says(Code.OK, "new", b"", "1", "simulated")
    await link.status()


async def test_no_answer_is_so_long(played: Played, link: EnclaveLink) -> None:
    """A length that no answer has is refused at once: to read 64 KiB of empty arrays took a third of a
    second, in which the service did nothing else."""
    played.answer = lambda number: (0x4000).to_bytes(4, "big")
    with pytest.raises(EnclaveDown, match="does not speak as it"):
        await link.status()


@pytest.mark.parametrize(
    ("ask", "good", "bad"),
    [
        (lambda link: link.init(()), b"e" * 16, (b"e" * 15, b"e" * 17, "e" * 16, 3)),
        (lambda link: link.hello(NONCE), b"d" * 3000, (b"", b"d" * 0x3001, "d")),
        (lambda link: link.grant(BINDING, b"c"), b"g" * 80, (b"g" * 79, b"g" * 81, "g" * 80)),
    ],
    ids=["init", "hello", "grant"],
)
async def test_results_are_bounded(
    played: Played,
    link: EnclaveLink,
    ask: Callable[[EnclaveLink], Awaitable[bytes]],
    good: bytes,
    bad: tuple[object, ...],
) -> None:
    """Each has its type and its size, whoever sends it."""
    played.answer = says(Code.OK, good)
    assert await ask(link) == good
    for result in ((), *((value,) for value in bad), (good, good)):
        played.answer = says(Code.OK, *result)
        with pytest.raises(EnclaveDown, match="does not speak"):
            await ask(link)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
async def test_refusals(played: Played, link: EnclaveLink, code: Code) -> None:
    """Each code is a refusal with that code, in words that come from here and not from the enclave."""
    played.answer = says(code, "a word of the enclave's own")
    with pytest.raises(EnclaveRefused) as refused:
        await link.hello(NONCE)
    assert refused.value.code == code
    assert "word" not in str(refused.value)
    await_ok = says(Code.OK, b"d")
    played.answer = await_ok
    assert await link.hello(NONCE) == b"d"
    assert played.connections == 1


async def test_turned_away(tmp_path: Path) -> None:
    """Told that it is busy before anything was read, the link says so, and not that nobody is there."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def turn_away() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.send(encode_reply(0, Code.BUSY))

        thread = threading.Thread(target=turn_away)
        thread.start()
        with pytest.raises(EnclaveRefused) as refused:
            await EnclaveLink(path, timeout=PATIENCE).status()
        assert refused.value.code == "BUSY"
        thread.join()


async def test_arguments_that_no_enclave_takes(played: Played, link: EnclaveLink) -> None:
    """They are refused here, before a byte is sent."""
    with pytest.raises(EnclaveRefused) as refused:
        await link.init((b"not a hash",))
    assert refused.value.code == "MALFORMED"
    with pytest.raises(EnclaveRefused):
        await link.grant(BINDING, bytes(1 << 17))
    assert played.connections == 0


# -- connections ----------------------------------------------------------------------------------------


async def test_connections_are_kept(played: Played, link: EnclaveLink) -> None:
    """One after the other, requests share one connection; at once, a few."""
    played.answer = says(Code.OK, b"d")
    for _ in range(5):
        await link.hello(NONCE)
    assert played.connections == 1
    await asyncio.gather(*(link.hello(NONCE) for _ in range(20)))
    assert 1 < played.connections <= 4


async def test_an_enclave_that_came_back(played: Played, link: EnclaveLink) -> None:
    """A kept connection that has ended is not mistaken for an enclave that is down."""
    played.answer = says(Code.OK, b"d")
    await link.hello(NONCE)
    played.cut()
    await asyncio.sleep(0)
    assert await link.hello(NONCE) == b"d"


async def test_words_that_nobody_asked_for(played: Played, link: EnclaveLink) -> None:
    """A connection on which something came unasked is not used again, so answers cannot be prepared."""
    played.answer = lambda number: encode_reply(number, Code.OK, [b"d"])
    await link.hello(NONCE)
    played._writers[0].write(encode_reply(2, Code.OK, [b"forged"]))
    await played._writers[0].drain()
    assert await link.hello(NONCE) == b"d"
    assert played.connections == 2


async def test_cancelled(played: Played, link: EnclaveLink) -> None:
    """Who goes away in the middle leaves no answer behind for the next."""
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(link.hello(NONCE))
        await played.asked.wait()
        asking.cancel()
    played.answer = says(Code.OK, b"d")
    assert await link.hello(NONCE) == b"d"
    assert played.connections == 2


async def test_close(played: Played) -> None:
    """Nothing is left open, also of a request that was under way; a later one begins anew."""
    played.answer = says(Code.OK, b"d")
    link = EnclaveLink(played.path, timeout=PATIENCE)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        first = group.create_task(link.hello(NONCE))
        await played.asked.wait()
        link.close()
        assert await first == b"d"
        await played.left.wait()
        assert await link.hello(NONCE) == b"d"
        played.left.clear()
        link.close()
        await played.left.wait()
    assert played.connections == 2
