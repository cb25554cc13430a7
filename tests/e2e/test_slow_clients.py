"""Clients that read slowly or not at all, vanish in the middle, or connect and say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from gpu_server.client import TaskEvent, read_events
from tests.e2e.harness import Caller, Service, Services, body, only_process, until

SETTINGS = {"DISCONNECT_GRACE_SECONDS": 60, "SHUTDOWN_GRACE_SECONDS": 1, "SSE_PING_SECONDS": 1}
LINE, LINES = 50_000, 800  # 40 MB in all, more than four times what is kept of a task
TALKER = f"import time\nfor n in range({LINES}):\n    print(str(n).ljust({LINE}, '.'))\n    time.sleep(0.01)"
STALLED = 20
IDLE = 400


@pytest.fixture
def own(services: Services) -> Iterator[Service]:
    """A running service of this test's own, so that its memory is that of this test."""
    service = services.own(**SETTINGS)
    yield service.start()
    service.close()
    assert service.residue() == []
    assert service.errors() == []


class Stalled:
    """A connection that asks for a task's events, and reads only when it is told to."""

    def __init__(self, caller: Caller, task_id: str) -> None:
        service = caller.service
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect(("127.0.0.1", service.port))
        head = (
            f"GET /api/tasks/{task_id}/events HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
            f"X-Tenant-ID: {caller.tenant}\r\nConnection: close\r\n\r\n"
        )
        self._socket.sendall(head.encode())

    async def rest(self) -> list[TaskEvent]:
        """Everything that comes from here on, to the end."""
        self._socket.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=self._socket)
        async with asyncio.timeout(60):
            content = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
        return [event async for event in read_events(_Content(_unchunked(content)))]  # type: ignore[arg-type]

    def close(self) -> None:
        self._socket.close()


class _Content:
    """Bytes, as `read_events` takes them."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def iter_any(self) -> AsyncIterator[bytes]:
        yield self._content


def _unchunked(content: bytes) -> bytes:
    pieces, position = [], 0
    while position < len(content):
        end = content.index(b"\r\n", position)
        size = int(content[position:end], 16)
        pieces.append(content[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
    return b"".join(pieces)


def lines_of(events: list[TaskEvent]) -> list[int]:
    return [int(event.data["line"].rstrip(".")) for event in events if event.event == "logs"]


async def test_clients_that_stop_reading(own: Service) -> None:
    """While a task writes megabytes, those who read nothing slow nobody and cost a bounded memory; when one
    reads again it has a `gap` for what is not kept any more, and the end."""
    async with own.caller() as caller, contextlib.AsyncExitStack() as stack:
        session = await caller.warm()
        before = own.memory()
        task = await caller.working("program", oneoff=True, code=TALKER)
        stalled = [Stalled(caller, task.task_id) for _ in range(STALLED)]
        for one in stalled:
            stack.callback(one.close)
        await task.finish()
        assert lines_of(task.events) == list(range(LINES))
        elapsed = task.events[-1].data["elapsed_seconds"]
        assert (await caller.run(session=session, prompt="others are served")).text == "others are served"
        grown = own.memory("VmHWM") - before
        print(f"{LINE * LINES / 1e6:.0f} MB in {elapsed} s, memory grew by {grown / 1e6:.0f} MB at most")
        # The history, one write of each reader, and what a busy allocator does not give back.
        assert grown < 64 << 20

        events = await stalled[0].rest()
        names = [event.event for event in events]
        assert names[-1] == "task_finish"
        assert names.count("gap") >= 1
        last = 0
        for event in events:
            if event.event == "gap":
                assert event.data["from"] == last + 1
                last = event.data["to"]
            elif event.event not in ("queue", "progress"):
                assert event.id == last + 1
                last = event.id
        lines = lines_of(events)
        assert lines == sorted(set(lines))
        assert lines[-1] == LINES - 1


@pytest.mark.parametrize(("number", "within"), [(signal.SIGTERM, 60), (signal.SIGUSR2, 30)])
async def test_a_service_that_ends_does_not_wait_for_them(
    own: Service, number: signal.Signals, within: float
) -> None:
    """Nor for those who never asked: it exits with 0 in seconds, and in fewer where it is to be replaced."""
    async with own.caller() as caller, contextlib.AsyncExitStack() as stack:
        task = await caller.working("program", oneoff=True, code=TALKER)
        for _ in range(3):
            stack.callback(Stalled(caller, task.task_id).close)
            silent = socket.create_connection(("127.0.0.1", own.port))
            stack.callback(silent.close)
        for _ in range(200):  # 10 MB, more than any of the buffers between
            await task.until("logs")
        assert own.process is not None
        process = own.process
        process.send_signal(number)
        asked = time.monotonic()
        await until("the process has ended", lambda: process.poll() is not None, within=within)
        print(f"{number.name}: ended in {time.monotonic() - asked:.1f} s")
        assert process.returncode == 0
        if number is signal.SIGUSR2:
            own.launch()
            await own.serving()
            await caller.kill(task.session_id)
            await caller.ended(task.session_id)


@only_process
async def test_clients_that_vanish_in_the_middle(serve: Callable[..., Service]) -> None:
    """Connections that are reset, or closed in one direction, count as gone: after the grace their task is
    cancelled, and the service is none the worse."""
    service = serve()
    async with service.caller() as caller:
        session = await caller.warm()
        for half in (False, True):
            wish = json.dumps(body(session=session, count=5000, delay_ms=10)).encode()
            client = socket.create_connection(("127.0.0.1", service.port))
            head = (
                f"POST /api/tasks/submit HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nX-Tenant-ID:"
                f" {caller.tenant}\r\nContent-Type: application/json\r\nContent-Length: {len(wish)}\r\n\r\n"
            )
            client.sendall(head.encode() + wish)
            client.setblocking(False)
            seen = b""
            while b"tok5 " not in seen:
                seen += await asyncio.get_running_loop().sock_recv(client, 65536)
            task_id = json.loads(seen.split(b"event: connection\ndata: ", 1)[1].split(b"\n", 1)[0])["task_id"]
            if half:
                client.shutdown(socket.SHUT_WR)
            else:
                # Closed with unread data, a reset instead of an end.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            gone = await caller.task_in_state(task_id, "cancelled")
            assert gone["error"]["code"] == "client_gone"
            client.close()
        assert (await caller.run(session=session, prompt="next")).text == "next"


@only_process
async def test_hundreds_of_idle_connections(own: Service) -> None:
    """Silent ones, half a request each, and readers of a task that says nothing: others are served as before,
    and those who ask for nothing are closed after a while."""
    async with own.caller() as caller, contextlib.AsyncExitStack() as stack:
        quiet = await caller.working(hang=True)
        before = own.memory()
        silent, halves = [], []
        for connections, words in ((silent, b""), (halves, b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")):
            for _ in range(IDLE // 2):
                client = socket.create_connection(("127.0.0.1", own.port))
                client.sendall(words)
                client.setblocking(False)
                stack.callback(client.close)
                connections.append(client)
        readers = [Stalled(caller, quiet.task_id) for _ in range(IDLE // 2)]
        for reader in readers:
            stack.callback(reader.close)
        session = await caller.warm()
        took = []
        for n in range(50):
            asked = time.monotonic()
            assert (await caller.run(session=session, prompt=str(n))).text == str(n)
            assert own.health() is not None
            took.append(time.monotonic() - asked)
        grown = own.memory("VmHWM") - before
        usual = statistics.median(took)  # a machine may stand still once
        print(f"a task takes {usual:.3f} s, or {max(took):.3f} s; memory grew by {grown / 1e6:.1f} MB")
        assert usual < 2
        assert grown < 3 * IDLE // 2 * 100_000

        def are_closed() -> bool:
            return all(_is_closed(client) for client in (*silent, *halves))

        await until("those who ask for nothing are closed", are_closed, within=60)
        await caller.cancel(quiet.task_id)
        assert (await quiet.finish())["error"]["code"] == "task_cancelled"
        for reader in readers[:5]:
            assert (await reader.rest())[-1].event == "task_finish"


def _is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(65536) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
