"""Rows: the durable form of the node's state, as JSON values.

What is left out comes back otherwise: places in a line are counted anew, readers come back by themselves,
the story of an entity begins anew. What a worker said (`Failure.from_worker`, log tails) is never in a row.
"""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from gpu_server.core.errors import Failure
from gpu_server.core.sessions import (
    CloseReason,
    Grant,
    RequestKey,
    SealedUse,
    Sealing,
    Session,
    SessionState,
    Task,
    TaskState,
    TaskType,
    Workload,
)
from gpu_server.core.slots import NO_CERTIFICATE, Certificate, Slot, SlotSpec, SlotState, Tier, WashTier
from gpu_server.core.timers import Alarm

Row = Mapping[str, Any]
Alarms = Mapping[Alarm, float]

WORDS_LOST = "(the worker's own words were not kept)"


class Table(StrEnum):
    """The kinds of rows. `NODE` holds single values by their name. `CERTIFICATES`, by the hash of the record
    in each, in hex, are what the node has accepted: it never reads them again."""

    NODE = "node"
    SLOTS = "slots"
    SESSIONS = "sessions"
    TASKS = "tasks"
    CERTIFICATES = "certificates"


STATE_TABLES = tuple(table for table in Table if table is not Table.CERTIFICATES)
"""What a state is made of."""

Rows = Mapping[Table, Mapping[str, Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one row; `row` None: it is gone."""

    table: Table
    id: str
    row: Row | None


class RowsUnusable(Exception):
    """The rows do not make up a state of this program."""


# -- writing ----------------------------------------------------------------------------------------------


def slot_row(slot: Slot) -> Row:
    """A slot, but for what its device says of itself now (`doubt`), and for a certificate that may not be on
    the disk yet (`pending`): after a restart that wash begins anew."""
    spec = slot.spec
    return {
        "number": slot.number,
        "uuid": spec.uuid,
        "name": spec.name,
        "memory_mb": spec.memory_mb,
        "is_gpu": spec.is_gpu,
        "tiers": sorted(spec.tiers),
        "state": slot.state,
        "holder": slot.holder,
        "fence": slot.fence,
        "fault": slot.fault,
        "prev": slot.prev.hex(),
        "head": slot.head.hex(),
        "tier": slot.tier,
        "tenant": slot.tenant,
        "kept_for": slot.kept_for,
    }


def certificate_row(certificate: Certificate) -> Row:
    """A certificate, in base64, and what one looks for it by; hashes in hex."""
    return {
        "slot_id": certificate.slot_id,
        "uuid": certificate.slot_uuid,
        "fence": certificate.fence,
        "prev": certificate.prev.hex(),
        "hash": certificate.hash.hex(),
        "tier": certificate.tier,
        "certificate": b64encode(certificate.raw).decode(),
    }


def session_row(session: Session, alarms: Alarms) -> Row:
    """A session and its deadlines, without what its worker said."""
    return {
        "tenant": session.tenant,
        "workload": asdict(session.workload),
        "tier": session.tier,
        "task_type": session.task_type,
        "created_at": session.created_at,
        "asked_for": session.asked_for,
        "state": session.state,
        "fence": session.fence,
        "slot_ids": list(session.slot_ids),
        "container_id": session.container_id,
        "max_deadline": session.max_deadline,
        "queue": list(session.queue),
        "busy": list(session.busy),
        "tearing_down": session.tearing_down,
        "tasks_done": session.tasks_done,
        "close_reason": session.close_reason,
        "failure": _failure_row(session.failure),
        "closed_at": session.closed_at,
        "key": _key_row(session.key),
        "sealing": asdict(session.sealing) if session.sealing is not None else None,
        "worker_key": session.worker_key,
        "grants": {psk_id: asdict(grant) for psk_id, grant in session.grants.items()},
        "sealed_tasks": session.sealed_tasks,
        "tasks_taken": session.tasks_taken,
        "washed_before": list(session.washed_before),
        "washed_after": list(session.washed_after),
        "alarms": dict(alarms),
    }


def task_row(task: Task, alarms: Alarms) -> Row:
    """A task and its deadlines, without what its worker said."""
    return {
        "session_id": task.session_id,
        "tenant": task.tenant,
        "task_type": task.task_type,
        "timeout": task.timeout,
        "created_at": task.created_at,
        "detached": task.detached,
        "state": task.state,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "told": task.told,
        "failure": _failure_row(task.failure),
        "key": _key_row(task.key),
        "alarms": dict(alarms),
    }


def _failure_row(failure: Failure | None) -> Row | None:
    if failure is None:
        return None
    if failure.from_worker:
        return {"code": failure.code, "from_worker": True}
    return {"code": failure.code, "message": failure.message}


def _key_row(key: RequestKey | None) -> Row | None:
    return None if key is None else {"name": key.name, "fingerprint": key.fingerprint}


# -- reading: KeyError, TypeError and ValueError mean that a row is not ours ------------------------------


def slot_of(slot_id: str, row: Row) -> Slot:
    """The slot that this row was made of."""
    spec = SlotSpec(
        id=slot_id,
        uuid=row["uuid"],
        name=row["name"],
        memory_mb=row["memory_mb"],
        is_gpu=row["is_gpu"],
        tiers=frozenset(Tier(tier) for tier in row["tiers"]),
    )
    return Slot(
        spec=spec,
        number=row["number"],
        state=SlotState(row["state"]),
        holder=row["holder"],
        fence=row["fence"],
        fault=row["fault"],
        prev=_hash_of(row["prev"]),
        head=_hash_of(row["head"]),
        tier=WashTier(row["tier"]),
        tenant=row["tenant"],
        kept_for=row["kept_for"],
    )


def session_of(session_id: str, row: Row) -> Session:
    """The session that this row was made of, with a log tail where one was put back."""
    if len(row["washed_before"]) != len(row["slot_ids"]):
        raise ValueError("not a certificate for each slot of a session")
    return Session(
        id=session_id,
        tenant=row["tenant"],
        workload=_workload_of(row["workload"]),
        tier=Tier(row["tier"]),
        task_type=TaskType(row["task_type"]),
        created_at=row["created_at"],
        asked_for=row["asked_for"],
        state=SessionState(row["state"]),
        fence=row["fence"],
        slot_ids=tuple(row["slot_ids"]),
        container_id=row["container_id"],
        idle_deadline=row["alarms"].get(Alarm.IDLE),
        max_deadline=row["max_deadline"],
        queue=deque(row["queue"]),
        busy=dict.fromkeys(row["busy"]),
        tearing_down=row["tearing_down"],
        tasks_done=row["tasks_done"],
        close_reason=CloseReason(row["close_reason"]) if row["close_reason"] else None,
        failure=_failure_of(row["failure"]),
        closed_at=row["closed_at"],
        log_tail=row.get("log_tail", ""),
        key=_key_of(row["key"]),
        sealing=Sealing(**row["sealing"]) if row["sealing"] else None,
        worker_key=row["worker_key"],
        grants={psk_id: Grant(**grant) for psk_id, grant in row["grants"].items()},
        sealed_tasks=row["sealed_tasks"],
        tasks_taken=row["tasks_taken"],
        washed_before=tuple(row["washed_before"]),
        washed_after=tuple(row["washed_after"]),
    )


def task_of(task_id: str, row: Row) -> Task:
    """The task that this row was made of."""
    return Task(
        id=task_id,
        session_id=row["session_id"],
        tenant=row["tenant"],
        task_type=TaskType(row["task_type"]),
        timeout=row["timeout"],
        created_at=row["created_at"],
        detached=row["detached"],
        state=TaskState(row["state"]),
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        told=row["told"],
        failure=_failure_of(row["failure"]),
        key=_key_of(row["key"]),
    )


def alarms_of(row: Row) -> dict[Alarm, float]:
    """The deadlines in a session's or a task's row."""
    return {Alarm(name): float(when) for name, when in row["alarms"].items()}


def _hash_of(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != len(NO_CERTIFICATE):
        raise ValueError(f"a hash of {len(value)} bytes")
    return value


def _workload_of(row: Row) -> Workload:
    return Workload(**{**row, "sealed": SealedUse(row["sealed"])})


def _failure_of(row: Row | None) -> Failure | None:
    if row is None:
        return None
    message = row.get("message", WORDS_LOST)
    return Failure(code=row["code"], message=message, from_worker=row.get("from_worker", False))


def _key_of(row: Row | None) -> RequestKey | None:
    return None if row is None else RequestKey(name=row["name"], fingerprint=row["fingerprint"])


# -- changing rows as a whole -----------------------------------------------------------------------------

_TIMES = ("created_at", "started_at", "finished_at", "closed_at", "max_deadline")


def moved_in_time(rows: Rows, seconds: float) -> Rows:
    """The same rows on a clock that shows `seconds` more: after a reboot the machine's clock began anew."""

    def moved(row: Row) -> Row:
        times = {name: row[name] + seconds for name in _TIMES if row.get(name) is not None}
        return {**row, **times, "alarms": {name: when + seconds for name, when in row["alarms"].items()}}

    return {
        table: {name: moved(row) if "alarms" in row else row for name, row in kept.items()}
        for table, kept in rows.items()
    }


def without_fingerprints(rows: Rows) -> Rows:
    """The rows with no body to compare with: what the fingerprints were made with is lost."""

    def blank(row: Row) -> Row:
        return {**row, "key": {**row["key"], "fingerprint": ""}} if row.get("key") else row

    return {table: {name: blank(row) for name, row in kept.items()} for table, kept in rows.items()}


def with_words(rows: Rows, words: Mapping[str, Mapping[str, str]]) -> Rows:
    """The rows with what workers said put back: id -> {"message", "log_tail"}, each where it is known."""

    def put_back(row: Row, said: Mapping[str, str]) -> Row:
        more: dict[str, Any] = {}
        if row.get("failure") and "message" in said:
            more["failure"] = {**row["failure"], "message": said["message"]}
        if "log_tail" in said:
            more["log_tail"] = said["log_tail"]
        return {**row, **more}

    return {
        table: {name: put_back(row, words[name]) if name in words else row for name, row in kept.items()}
        for table, kept in rows.items()
    }
