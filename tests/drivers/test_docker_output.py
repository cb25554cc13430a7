"""The demultiplexer of attached output, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.drivers.docker_output import AttachedOutput
from gpu_server.ports import Output


def frame(stream: int, data: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(data)) + data


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, AttachedOutput]]:
    engine, ours = socket.socketpair()
    output = AttachedOutput(ours)
    with engine:
        yield engine, output
    output.close()


@given(
    frames=st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=300)), max_size=8),
    cuts=st.lists(st.integers(1, 50)),
)
def test_frames_come_out_whole_however_they_are_cut(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    """Each stream's bytes are the same, in order, wherever the connection splits them."""

    async def through() -> dict[str, bytes]:
        engine, ours = socket.socketpair()
        found = {"stdout": b"", "stderr": b""}
        wire = b"".join(frame(*one) for one in frames)

        async def write() -> None:
            rest, sizes = wire, iter(cuts)
            with engine:
                engine.setblocking(False)
                while rest:
                    size = next(sizes, len(rest))
                    await asyncio.get_running_loop().sock_sendall(engine, rest[:size])
                    rest = rest[size:]

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(write(), name="engine")
            async for piece in AttachedOutput(ours):
                found[piece.stream] += piece.data
        return found

    assert asyncio.run(through()) == {
        "stdout": b"".join(data for stream, data in frames if stream == 1),
        "stderr": b"".join(data for stream, data in frames if stream == 2),
    }


async def test_a_long_frame_is_passed_on_while_it_arrives(ends: tuple[socket.socket, AttachedOutput]) -> None:
    """A frame may announce gigabytes: what has come is given out, and no buffer waits for the rest."""
    engine, output = ends
    engine.sendall(struct.pack(">BxxxL", 1, 1 << 31) + b"first")
    assert await anext(output) == Output("stdout", b"first")
    engine.sendall(b"second")
    assert await anext(output) == Output("stdout", b"second")


async def test_a_connection_that_breaks_ends_the_output(ends: tuple[socket.socket, AttachedOutput]) -> None:
    """An engine that goes away in the middle of a frame is an end, not an error."""
    engine, output = ends
    engine.sendall(frame(1, b"whole") + struct.pack(">BxxxL", 1, 100) + b"part")
    engine.close()
    assert [piece.data async for piece in output] == [b"whole", b"part"]
    assert [piece async for piece in output] == []


async def test_output_that_nobody_holds_closes_its_connection() -> None:
    """Dropping the iterator leaks no descriptor and warns of nothing."""
    engine, ours = socket.socketpair()
    with engine:
        output = AttachedOutput(ours)
        del output, ours
        gc.collect()
        engine.setblocking(False)
        assert engine.recv(1) == b""  # the other end is closed; an open one would have nothing to read yet


async def test_a_cancelled_read_loses_nothing(ends: tuple[socket.socket, AttachedOutput]) -> None:
    """A reader that was cancelled while it waited can go on."""
    engine, output = ends
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(output)
    engine.sendall(frame(2, b"later"))
    assert await anext(output) == Output("stderr", b"later")
