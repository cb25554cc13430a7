"""Relays: carry one task to its worker and what comes back into its stream, until the task has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.sessions import TaskState
from gpu_server.drivers.worker_link import (
    EventsDropped,
    LinkBroken,
    TaskRefused,
    TaskUnknown,
    WorkerLink,
    WorkerNotReady,
)
from gpu_server.exec_output import ExecOutput
from gpu_server.frames import FrameReader, ProtocolFault
from gpu_server.ports import CreatedWorker, Output, OutputLost, WorkerExit
from gpu_server.sealed.delivery import MEDIA_TYPE as SEALED_MEDIA_TYPE
from gpu_server.stream import Stream

REATTACH_TRIES = 3
EXEC_PIECE_BYTES = 4096

_SEALED_REFUSALS: Mapping[int, tuple[FailureCode, str]] = {
    400: (FailureCode.DECRYPT_FAILED, "the worker cannot open the request with the keys it was granted"),
    409: (FailureCode.REPLAY, "the request's id came with other bytes before"),
    410: (FailureCode.EVENTS_GONE, "the request ran before, and its answer is not kept any more"),
}
"""What the statuses mean with which a worker refuses a sealed task."""

End = tuple[TaskState, Failure | None, Mapping[str, Any] | None]


async def relay_http(
    link: WorkerLink,
    task_id: str,
    body: bytes | None,
    stream: Stream,
    *,
    delivered: Callable[[], None],
    exit_is_near: Callable[[], Awaitable[bool]],
    is_running: Callable[[], Awaitable[bool]],
    sealed: bool = False,
) -> End | None:
    """Send a task and relay its events, behind those that `stream` has; how it ended, or None where the
    worker's own end will tell. `delivered` is called when the worker has the task for certain; with `body`
    None it must have it already. Of a `sealed` session's worker nothing is taken that is in the clear.

    A broken connection is taken up again, and a worker that is not ready is asked again: it may be about to
    exit. Raises `LinkBroken` when that does not help a worker that certainly runs, and `ProtocolFault`.
    """
    reader = FrameReader(stream, stream.worker_seq, sealed=sealed)
    media_type = SEALED_MEDIA_TYPE if sealed else "application/json"
    began, tries, drops = reader.seq, 0, 0
    while reader.end is None:
        seen = reader.seq
        try:
            if seen == 0 and body is not None:
                # Again, too: a known id runs once.
                await link.run(task_id, body, reader, delivered, media_type=media_type)
            else:
                await link.attach(task_id, reader)
        except EventsDropped as dropped:
            drops += 1
            if drops > REATTACH_TRIES:
                raise ProtocolFault("the worker drops its events again and again") from dropped
            reader.skip_to(dropped.oldest - 1)
        except TaskUnknown as unknown:
            if reader.seq > began:
                raise ProtocolFault("the worker has forgotten a task that it runs") from unknown
            message = "the worker does not know the task: its input was lost, or its events were dropped"
            return TaskState.FAILED, Failure(code=FailureCode.SERVICE_RESTARTED, message=message), None
        except (LinkBroken, WorkerNotReady) as problem:
            if reader.end is not None:
                break  # it has said all there is to say
            if await exit_is_near():
                return None
            tries = 1 if reader.seq > seen else tries + 1
            if tries > REATTACH_TRIES and await is_running():
                if isinstance(problem, LinkBroken):
                    raise
                return TaskState.FAILED, _refusal(problem, sealed=sealed), None
        except TaskRefused as refused:
            if reader.seq > 0:
                raise ProtocolFault(str(refused)) from refused
            return TaskState.FAILED, _refusal(refused, sealed=sealed), None
    return reader.end


def _refusal(refused: TaskRefused, *, sealed: bool) -> Failure:
    if sealed and refused.status in _SEALED_REFUSALS:
        code, message = _SEALED_REFUSALS[refused.status]
        return Failure(code=code, message=message)
    return Failure(code=FailureCode.WORKER_PROTOCOL, message=str(refused), from_worker=True)


async def relay_exec(
    worker: CreatedWorker,
    output: ExecOutput,
    exited: asyncio.Future[WorkerExit],
    *,
    remember: Callable[[Output], None],
    is_interrupted: Callable[[], bool],
    silence: float,
) -> bool:
    """Read all that a program writes until it has exited. What it left behind may hold its output open: then
    reading ends when nothing has come for `silence` seconds after the exit.

    False where the connection to the runtime was lost meanwhile, so that there may be more to read. Raises
    `OutputLost` where the runtime has dropped some of it.
    """
    taken, lost = 0, None

    async def read() -> None:
        """In small pieces: 4 KiB may be as many events, and others want the event loop too."""
        nonlocal taken, lost
        try:
            async for piece in worker.output:
                remember(piece)
                for start in range(0, len(piece.data), EXEC_PIECE_BYTES):
                    part = piece.data[start : start + EXEC_PIECE_BYTES]
                    taken += len(part)
                    output.feed(Output(piece.stream, part))
                    await asyncio.sleep(0)
        except OutputLost as error:
            lost = error

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        either: list[asyncio.Future[Any]] = [reading, exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        seen = -1
        while not reading.done() and seen != taken:
            seen = taken
            await asyncio.wait([reading], timeout=silence)
        worker.output.close()
    if lost is not None:
        raise lost
    while not exited.done() and not is_interrupted():  # a program may close its output and go on
        await asyncio.wait([exited], timeout=silence)
    if is_interrupted():
        return False
    output.close()
    return True
