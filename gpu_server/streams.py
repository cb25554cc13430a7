"""The streams of all tasks: which are in memory, which in the spool alone, and the bound for all of them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import structlog

from gpu_server.drivers.spool import History, Record, Spool
from gpu_server.stream import Budget, Stream

log = structlog.get_logger()


class _Unread(NamedTuple):
    """A history that only the spool has: how many events of the service's own it must have, and its bytes."""

    told: int
    size: int


class Streams:
    """The streams of all tasks, within a bound for all of them together; also in `spool`, where there is one.

    When the bound is passed, finished tasks lose their history, the ones that finished first at first; a
    later reader of those gets a `gap` and the end. The history of a task that ended in an earlier life counts
    with its size in the spool until it is asked for, and in memory from then on.
    """

    def __init__(self, *, max_bytes_each: int, max_bytes_total: int, spool: Spool | None = None) -> None:
        self._each, self._total = max_bytes_each, max_bytes_total
        self._spool = spool
        self._budget = Budget()
        self._streams: dict[str, Stream] = {}
        self._unread: dict[str, _Unread] = {}
        self._finished: dict[str, None] = {}
        self._incomplete: set[str] = set()  # the spool has at most the beginning of these
        self._readers_closed = False

    def __len__(self) -> int:
        return len(self._streams) + len(self._unread)

    @property
    def kept_bytes(self) -> int:
        return self._budget.used

    @property
    def fault(self) -> str | None:
        """Why some stream would not outlive this process, or None."""
        if self._spool is None:
            return None
        if self._spool.fault is None and self._incomplete:
            return f"{len(self._incomplete)} histories are not in the spool yet"
        return self._spool.fault

    def mend(self) -> None:
        """Bring into the spool, now that it may have room, what could not be written there."""
        if self._spool is None or self.fault is None:
            return
        self._spool.probe()
        for task_id in list(self._incomplete):
            if self._spool.fault is not None:
                return
            self._spool.drop_history(task_id)
            try:
                self._streams[task_id].mirror(self._spool.history(task_id, self._each))
            except OSError as error:
                log.error("history.not_kept", task_id=task_id, reason=str(error))
                return
            self._incomplete.discard(task_id)

    def open(self, task_id: str) -> Stream:
        """A stream for a new task."""
        return self._add(task_id, self._open_file(task_id))

    def get(self, task_id: str) -> Stream | None:
        """A task's stream; None where it was never here, or nothing that can be shown is left of it."""
        stream = self._streams.get(task_id)
        if stream is None and (stream := self._load(task_id)) is not None:
            self._make_room()
        return stream

    def finished(self, task_id: str) -> None:
        """A task has ended: its history may now be dropped when room is needed."""
        if (stream := self._streams.get(task_id)) is not None:
            stream.close_file()
        if self._spool is not None and task_id in self._incomplete:
            self._spool.drop_history(task_id)  # without its end it is of no use to another life
        self._incomplete.discard(task_id)
        self._finished[task_id] = None
        self._make_room()

    def forget(self, task_id: str) -> None:
        """The task's retention is over. Readers that are still there read to the end."""
        self._finished.pop(task_id, None)
        self._incomplete.discard(task_id)
        if (unread := self._unread.pop(task_id, None)) is not None:
            self._budget.used -= unread.size
        if (stream := self._streams.pop(task_id, None)) is not None:
            stream.close_file()
            self._budget.used -= stream.size
        if self._spool is not None:
            self._spool.drop_history(task_id)

    def close_readers(self) -> None:
        """End every reading, now and from here on; the streams are taken up again in another life."""
        self._readers_closed = True
        for stream in self._streams.values():
            stream.close_readers()

    # -- another life -------------------------------------------------------------------------------------

    def restore_live(self, task_id: str, told: int) -> Stream:
        """The stream of a task that goes on. `told` events of the service's own were decided: what is in the
        spool from the next one on was never seen by anybody, and is dropped."""
        records: list[Record] = []
        file = self._open_file(task_id)
        if file is not None:
            try:
                file.cut(told)
                records = file.read()
            except OSError as error:
                file.close()
                file = None
                self._not_kept(task_id, error)
        stream = self._add(task_id, file)
        stream.restore(records, told)
        return stream

    def restore_ended(self, task_id: str, told: int) -> bool:
        """Whether the spool has anything of a task that ended in an earlier life. It is read by `get`."""
        size = self._spool.history_bytes(task_id) if self._spool is not None else 0
        if size == 0:
            return False
        self._unread[task_id] = _Unread(told, size)
        self._budget.used += size
        self._finished[task_id] = None
        self._make_room()
        return True

    def _load(self, task_id: str) -> Stream | None:
        unread = self._unread.get(task_id)
        if self._spool is None or unread is None:
            return None
        try:
            records = self._spool.read_history(task_id)
        except OSError as error:
            log.error("history.unreadable", task_id=task_id, reason=str(error))
            return None
        del self._unread[task_id]
        self._budget.used -= unread.size
        if not records or records[-1].told != unread.told:
            # It lacks the end, so whoever read it would wait for ever.
            self._finished.pop(task_id, None)
            self._spool.drop_history(task_id)
            return None
        stream = self._add(task_id, None)
        stream.restore(records)
        return stream

    # -- room ---------------------------------------------------------------------------------------------

    def _add(self, task_id: str, file: History | None) -> Stream:
        on_fault = partial(self._not_kept, task_id)
        stream = self._streams[task_id] = Stream(self._each, self._budget, file, on_fault)
        if self._readers_closed:
            stream.close_readers()
        return stream

    def _open_file(self, task_id: str) -> History | None:
        if self._spool is None:
            return None
        try:
            return self._spool.history(task_id, self._each)
        except OSError as error:
            self._not_kept(task_id, error)
            return None

    def _not_kept(self, task_id: str, error: OSError) -> None:
        log.error("history.not_kept", task_id=task_id, reason=str(error))
        self._incomplete.add(task_id)

    def _make_room(self) -> None:
        while self._budget.used > self._total and self._finished:
            oldest = next(iter(self._finished))
            del self._finished[oldest]
            stream = self._streams.get(oldest) or self._load(oldest)
            if stream is None:
                continue
            last = stream.forget()
            if self._spool is not None:
                try:
                    self._spool.replace_history(oldest, last)
                except OSError as error:
                    log.error("history.not_kept", task_id=oldest, reason=str(error))
