"""Rows: what is written of a node is JSON, is read again as it was, and never holds a worker's words."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.core import rows
from gpu_server.core.errors import Failure, FailureCode
from gpu_server.core.node import Node
from gpu_server.core.rows import WORDS_LOST, Row, Rows, RowsUnusable, Table
from gpu_server.core.sessions import (
    CloseReason,
    Grant,
    RequestKey,
    Rules,
    SealedUse,
    Sealing,
    Session,
    SessionState,
    Task,
    TaskState,
    TaskType,
    Workload,
)
from gpu_server.core.slots import Slot, SlotSpec, SlotState, Tier, WashTier
from gpu_server.core.timers import SESSION_ALARMS, TASK_ALARMS, Alarm
from tests.core.papers import judge
from tests.core.story import Story, work

CANARY = "the patient's name is Jane"

TEXT = st.text(max_size=8)
TIME = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 1 << 53)
HASH = st.binary(min_size=32, max_size=32)
KEYS = st.none() | st.builds(RequestKey, name=TEXT, fingerprint=TEXT)
FAILURES = st.none() | st.builds(Failure, code=st.sampled_from(FailureCode), message=TEXT)
WORKERS_OWN = st.builds(
    Failure, code=st.just("out_of_tokens"), message=st.just(CANARY), from_worker=st.just(True)
)
NO_HISTORY = st.builds(list)


def alarms(kinds: tuple[Alarm, ...]) -> st.SearchStrategy[Mapping[Alarm, float]]:
    return st.dictionaries(st.sampled_from(kinds), TIME)


SLOTS = st.builds(
    Slot,
    spec=st.builds(
        SlotSpec,
        id=TEXT,
        uuid=TEXT,
        name=TEXT,
        memory_mb=COUNT,
        is_gpu=st.booleans(),
        tiers=st.frozensets(st.sampled_from(Tier)),
    ),
    number=COUNT,
    state=st.sampled_from(SlotState),
    holder=st.none() | TEXT,
    fence=COUNT,
    fault=st.none() | TEXT,
    doubt=st.none(),
    prev=HASH,
    head=HASH,
    pending=st.none(),
    tier=st.sampled_from(WashTier),
    tenant=st.none() | TEXT,
    kept_for=st.none() | TEXT,
    history=NO_HISTORY,
)
SESSIONS = st.builds(
    Session,
    id=TEXT,
    tenant=TEXT,
    workload=st.builds(
        Workload,
        model_id=TEXT,
        task_preset=TEXT,
        serves_sessions=st.booleans(),
        gpus=st.integers(1, 8),
        max_concurrent_tasks=st.integers(1, 64),
        start_timeout=TIME,
        sealed=st.sampled_from(SealedUse),
        wash_per_task=st.booleans(),
    ),
    tier=st.sampled_from(Tier),
    task_type=st.sampled_from(TaskType),
    created_at=TIME,
    asked_for=st.booleans(),
    state=st.sampled_from(SessionState),
    stage=st.none(),
    fence=COUNT,
    slot_ids=st.just(("g0", "g1")),
    container_id=st.none() | TEXT,
    idle_deadline=st.none(),
    max_deadline=st.none() | TIME,
    queue=st.lists(TEXT).map(deque),
    busy=st.lists(TEXT, unique=True).map(dict.fromkeys),
    tearing_down=st.booleans(),
    tasks_done=COUNT,
    close_reason=st.none() | st.sampled_from(CloseReason),
    failure=FAILURES,
    closed_at=st.none() | TIME,
    log_tail=st.just(""),
    key=KEYS,
    sealing=st.none() | st.builds(Sealing, kms_key_arn=TEXT, pool=TEXT),
    worker_key=st.none() | TEXT,
    grants=st.dictionaries(TEXT, st.builds(Grant, epoch=TEXT, wrapped_key=TEXT, grant=TEXT), max_size=3),
    sealed_tasks=COUNT,
    tasks_taken=COUNT,
    washed_before=st.tuples(TEXT, TEXT),
    washed_after=st.lists(TEXT).map(tuple),
    prefetched=st.just(False),
    history=NO_HISTORY,
)
TASKS = st.builds(
    Task,
    id=TEXT,
    session_id=TEXT,
    tenant=TEXT,
    task_type=st.sampled_from(TaskType),
    timeout=TIME,
    created_at=TIME,
    detached=st.booleans(),
    key=KEYS,
    state=st.sampled_from(TaskState),
    started_at=st.none() | TIME,
    finished_at=st.none() | TIME,
    position=st.none(),
    readers=st.just(0),
    told=COUNT,
    failure=FAILURES,
    history=NO_HISTORY,
)


def written(row: Row) -> Any:
    """What is read of a row that was written."""
    return json.loads(json.dumps(row, allow_nan=False))


# -- there and back


@given(slot=SLOTS)
def test_a_slot_comes_back_as_it_was(slot: Slot) -> None:
    """All of it but its story and a doubt, which the next check brings anew."""
    assert rows.slot_of(slot.spec.id, written(rows.slot_row(slot))) == slot


@given(session=SESSIONS, deadlines=alarms(SESSION_ALARMS))
def test_a_session_comes_back_as_it_was(session: Session, deadlines: Mapping[Alarm, float]) -> None:
    """All of it but its story, its stage and its last words; times to the last bit, and its deadlines."""
    session.idle_deadline = deadlines.get(Alarm.IDLE)
    row = written(rows.session_row(session, deadlines))
    restored = rows.session_of(session.id, row)
    assert restored == session
    assert list(restored.busy) == list(session.busy)
    assert rows.alarms_of(row) == deadlines


@given(task=TASKS, deadlines=alarms(TASK_ALARMS))
def test_a_task_comes_back_as_it_was(task: Task, deadlines: Mapping[Alarm, float]) -> None:
    """All of it but its story, its place and its readers; times to the last bit, and its deadlines."""
    row = written(rows.task_row(task, deadlines))
    assert rows.task_of(task.id, row) == task
    assert rows.alarms_of(row) == deadlines


@given(slot=SLOTS, session=SESSIONS, task=TASKS)
def test_a_row_is_made_of_json_values(slot: Slot, session: Session, task: Task) -> None:
    """What is read is equal to what was written: nothing in a row is turned into something else."""
    for row in (rows.slot_row(slot), rows.session_row(session, {}), rows.task_row(task, {})):
        assert written(row) == row


def test_what_changes_by_itself_is_not_in_rows() -> None:
    """Stages, places and readers come and go without a row; another life begins without them."""
    story = Story("g0")
    story.submit("t1")
    story.submit("t2", to="s1")
    assert (story.task("t2").position, story.task("t2").readers) == (1, 1)
    for row in (rows.session_row(story.session(), {}), rows.task_row(story.task("t2"), {})):
        assert not row.keys() & {"stage", "position", "readers", "history", "log_tail"}


# -- a worker's words


@given(session=SESSIONS, task=TASKS, failure=WORKERS_OWN)
def test_a_workers_words_are_in_no_row(session: Session, task: Task, failure: Failure) -> None:
    """Its message and its last output may hold a tenant's data. The code is kept, and whose it was."""
    session.failure = task.failure = failure
    session.log_tail = f"loading\n{CANARY}"
    session_row, task_row = rows.session_row(session, {}), rows.task_row(task, {})
    assert CANARY not in json.dumps([session_row, task_row])
    for restored in (rows.session_of("s1", written(session_row)), rows.task_of("t1", written(task_row))):
        assert restored.failure == Failure(code="out_of_tokens", message=WORDS_LOST, from_worker=True)


def test_a_workers_words_are_in_no_change() -> None:
    """Also not in the rows of a node that has just heard them."""
    story, failure = Story("g0"), Failure(code="oops", message=CANARY, from_worker=True)
    story.submit("t1")
    story.ready()
    story.end("t1", TaskState.FAILED, failure)
    story.submit("t2", to="s1")
    story.lose(failure=failure, log_tail=CANARY)
    story.clean_up()
    assert story.session().failure == story.task("t2").failure == failure
    assert CANARY not in json.dumps(story.journal.rows())


def test_words_that_were_kept_elsewhere_are_put_back() -> None:
    """A message where there was a failure, a log tail in any case; what is not known stays lost."""
    failure = {"code": "oops", "from_worker": True}
    kept: Rows = {
        Table.SESSIONS: {"s1": {"failure": failure}, "s2": {"failure": None}},
        Table.TASKS: {"t1": {"failure": failure}, "t2": {"failure": failure}},
    }
    words = {
        "s1": {"message": "it crashed", "log_tail": "oom"},
        "s2": {"message": "of no failure", "log_tail": "bye"},
        "t1": {"message": "it crashed"},
        "t9": {"message": "of nobody"},
    }
    assert rows.with_words(kept, words) == {
        Table.SESSIONS: {
            "s1": {"failure": {**failure, "message": "it crashed"}, "log_tail": "oom"},
            "s2": {"failure": None, "log_tail": "bye"},
        },
        Table.TASKS: {"t1": {"failure": {**failure, "message": "it crashed"}}, "t2": {"failure": failure}},
    }


def test_a_node_finds_the_words_that_were_put_back() -> None:
    """What the worker said is there again, and is still marked as the worker's."""
    story, failure = Story("g0"), Failure(code="oops", message="it crashed", from_worker=True)
    story.submit("t1")
    story.lose(failure=failure, log_tail="oom")
    words = {"s1": {"message": "it crashed", "log_tail": "oom"}, "t1": {"message": "it crashed"}}
    node = Node(Rules(), judge=judge)
    node.restore(rows.with_words(story.journal.rows(), words))
    assert node.sessions["s1"].failure == node.tasks["t1"].failure == failure
    assert node.sessions["s1"].log_tail == "oom"


# -- rows as a whole


def test_rows_are_moved_in_time_as_a_whole() -> None:
    """After a reboot every time and deadline is by so much later or earlier; nothing else has changed."""
    story = Story("g0", "g1", tombstone_retention=500)
    story.ask("s1")
    story.ready()
    story.submit("t1", to="s1")
    story.submit("t2")
    story.kill("s2")
    story.clean_up("s2")
    before = story.journal.rows()
    moved = written(rows.moved_in_time(before, -600.5))
    assert (moved[Table.SLOTS], moved[Table.NODE]) == (before[Table.SLOTS], before[Table.NODE])
    session, ended = moved[Table.SESSIONS]["s1"], moved[Table.SESSIONS]["s2"]
    assert (session["created_at"], session["max_deadline"]) == (399.5, 3999.5)
    assert session["alarms"] == {"lifetime": 3999.5}
    assert (ended["closed_at"], ended["alarms"]) == (399.5, {"forget_session": 899.5})
    running, over = moved[Table.TASKS]["t1"], moved[Table.TASKS]["t2"]
    assert (running["created_at"], running["started_at"], running["alarms"]) == (
        399.5,
        399.5,
        {"task": 459.5},
    )
    assert (over["started_at"], over["finished_at"]) == (None, 399.5)
    assert running["timeout"] == 60.0


@given(seconds=st.integers(-(1 << 40), 1 << 40))
def test_rows_that_are_moved_there_and_back_are_the_same(seconds: int) -> None:
    """Whole seconds are exact."""
    story = Story("g0")
    story.submit("t1")
    kept = story.journal.rows()
    assert rows.moved_in_time(rows.moved_in_time(kept, seconds), -seconds) == kept


def test_without_its_secret_a_fingerprint_is_blank() -> None:
    """The keys are kept, and nothing that they could be compared by."""
    story = Story("g0", "g1")
    story.ask("s1", key=RequestKey(name="k1", fingerprint="f1"))
    story.submit("t2", key=RequestKey(name="k2", fingerprint="f2"))
    blank = rows.without_fingerprints(story.journal.rows())
    assert blank[Table.SESSIONS]["s1"]["key"] == {"name": "k1", "fingerprint": ""}
    assert blank[Table.TASKS]["t2"]["key"] == {"name": "k2", "fingerprint": ""}
    assert blank[Table.SESSIONS]["s2"]["key"] is None


# -- rows that are not ours


def full() -> dict[Table, dict[str, Any]]:
    """Rows of a node with something of everything."""
    story = Story("g0", "g1", "g2", "g3")
    key = RequestKey(name="k1", fingerprint="f1")
    story.ask("s1", workload=work(gpus=2), key=key)
    story.ready()
    story.submit("t1", to="s1", workload=work(gpus=2))
    story.submit("t2", to="s1", workload=work(gpus=2), key=key)
    story.ask("s3")
    story.kill("s3")
    story.fails("g2", session_id="s3")
    story.ask("s4")
    story.kill("s4")
    story.ask("s5")
    return story.journal.rows()


def refuses(kept: Mapping[Table, Any]) -> None:
    with pytest.raises(RowsUnusable):
        Node(Rules(), judge=judge).restore(kept)


def test_rows_of_a_node_can_be_read() -> None:
    """The rows that the following tests spoil are good: whoever waits, holds and drains is there."""
    node = Node(Rules(), judge=judge)
    node.restore(full())
    assert [session.state for session in node.sessions.values()] == [
        "working",
        "failed",
        "draining",
        "waiting",
    ]


FIELDS = [
    (table, name, column) for table, kept in full().items() for name, row in kept.items() for column in row
]


@pytest.mark.parametrize(("table", "name", "column"), FIELDS)
def test_a_row_without_one_of_its_fields_is_not_ours(table: Table, name: str, column: str) -> None:
    """There is no default for what was decided."""
    kept = full()
    del kept[table][name][column]
    refuses(kept)


@pytest.mark.parametrize("table", rows.STATE_TABLES)
def test_rows_without_one_of_the_tables_are_not_ours(table: Table) -> None:
    """None of them is missing, though each may be empty."""
    kept = full()
    del kept[table]
    refuses(kept)


@pytest.mark.parametrize(
    ("table", "name", "column", "value"),
    [
        (Table.SLOTS, "g0", "state", "lost"),
        (Table.SLOTS, "g0", "tiers", ["middle"]),
        (Table.SLOTS, "g0", "tier", "thorough"),
        (Table.SLOTS, "g0", "prev", "00"),
        (Table.SLOTS, "g0", "head", "no hash"),
        (Table.SESSIONS, "s1", "state", "asleep"),
        (Table.SESSIONS, "s1", "close_reason", "boredom"),
        (Table.SESSIONS, "s1", "alarms", {"snooze": 1.0}),
        (Table.SESSIONS, "s1", "workload", {"model_id": "m", "task_preset": "p", "color": "red"}),
        (Table.TASKS, "t1", "state", "paused"),
        (Table.TASKS, "t1", "task_type", "batch"),
    ],
)
def test_a_word_of_another_version_is_not_ours(table: Table, name: str, column: str, value: Any) -> None:
    """A state, a reason or a clock that this program does not know is not guessed at."""
    kept = full()
    kept[table][name][column] = value
    refuses(kept)


@pytest.mark.parametrize(
    ("table", "name", "changes"),
    [
        pytest.param(Table.TASKS, "t2", {"session_id": "s9"}, id="a task whose session is not there"),
        pytest.param(Table.TASKS, "t2", {"session_id": "s3"}, id="a task whose session has ended"),
        pytest.param(Table.TASKS, "t2", {"session_id": "s5"}, id="a task that another session queues"),
        pytest.param(Table.TASKS, "t1", {"state": "queued"}, id="a task that waits and runs"),
        pytest.param(Table.TASKS, "t2", {"state": "completed"}, id="a task that is over and queued"),
        pytest.param(Table.SESSIONS, "s1", {"queue": []}, id="a task that nobody queues"),
        pytest.param(Table.SESSIONS, "s1", {"busy": []}, id="a task that runs nowhere"),
        pytest.param(Table.SESSIONS, "s1", {"busy": ["t1", "t9"]}, id="a task that is not there"),
        pytest.param(Table.SLOTS, "g0", {"holder": "s9"}, id="a slot leased to nobody"),
        pytest.param(Table.SLOTS, "g0", {"holder": None}, id="a slot leased without a holder"),
        pytest.param(Table.SLOTS, "g0", {"holder": "s3"}, id="a slot leased to one that has ended"),
        pytest.param(Table.SLOTS, "g0", {"holder": "s5"}, id="a slot leased to one that does not know it"),
        pytest.param(Table.SLOTS, "g2", {"state": "leased", "holder": "s4"}, id="leased to one taken down"),
        pytest.param(Table.SLOTS, "g0", {"state": "free", "holder": None}, id="a free slot that is held"),
        pytest.param(
            Table.SESSIONS,
            "s1",
            {"slot_ids": ["g0"], "washed_before": ["00"]},
            id="a lease that its holder forgot",
        ),
        pytest.param(
            Table.SESSIONS,
            "s5",
            {"slot_ids": ["g0"], "washed_before": ["00"]},
            id="a slot that two hold",
        ),
        pytest.param(Table.SESSIONS, "s1", {"washed_before": []}, id="a lease of slots that nobody washed"),
    ],
)
def test_rows_that_contradict_each_other_are_not_ours(table: Table, name: str, changes: Row) -> None:
    """One transaction wrote what belongs together, so something else is wrong here."""
    kept = full()
    kept[table][name].update(changes)
    refuses(kept)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TIME | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


@given(field=st.sampled_from(FIELDS), value=ANY_JSON)
def test_whatever_a_row_holds_has_one_answer(field: tuple[Table, str, str], value: Any) -> None:
    """It is taken, or it is unusable; nothing else ever comes of it."""
    kept, (table, name, column) = full(), field
    kept[table][name][column] = value
    with contextlib.suppress(RowsUnusable):
        Node(Rules(), judge=judge).restore(kept)


@given(place=st.sampled_from([(t, name) for t, name, _ in FIELDS if t is not Table.NODE]), value=ANY_JSON)
def test_whatever_stands_for_a_row_has_one_answer(place: tuple[Table, str], value: Any) -> None:
    """Also where it is no row at all."""
    kept, (table, name) = full(), place
    kept[table][name] = value
    refuses(kept)
