"""A container runtime that does not answer: what runs goes on, nobody is started, everyone else waits."""

from __future__ import annotations

import pytest

from gpu_server.core import effects as fx
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import SessionState, TaskState
from tests.core.story import Story, only, own_washes, warm


def test_nobody_is_started_in_doubt() -> None:
    """A start that is bound to fail would cost a session; the free slot is kept for later."""
    story = Story("g0")
    story.doubt()
    assert not only(story.submit("t1"), fx.StartWorker)
    assert story.names("t1") == ["connection:queued", "queue:1"]


def test_the_line_moves_when_the_runtime_answers_again() -> None:
    """In its order, without another event."""
    story = Story("g0", "g1")
    story.doubt()
    for number in (1, 2, 3):
        story.submit(f"t{number}")
    starts = only(story.doubt(None), fx.StartWorker)
    assert [start.session_id for start in starts] == ["s1", "s2"]
    assert story.names("t3")[-1] == "queue:1"


def test_a_slot_that_becomes_free_in_doubt_is_kept() -> None:
    """Neither the end of a wash nor a health check starts anybody then."""
    story = warm("g0")
    story.submit("t2")
    story.kill("s1")
    story.doubt()
    assert not only(story.clean_up("s1"), fx.StartWorker)
    assert not only(story.is_faulty("g0", None), fx.StartWorker)
    assert [start.session_id for start in only(story.doubt(None), fx.StartWorker)] == ["s2"]


def test_what_runs_is_served_on() -> None:
    """A session that is ready needs no runtime for its next task."""
    story = warm("g0")
    story.doubt()
    assert only(story.submit("t1", to="s1"), fx.SendTask)
    story.end("t1")
    assert own_washes(story.kill())


def test_waiting_in_doubt_has_an_end_and_says_why() -> None:
    """Whoever has waited too long hears that it was not for want of a GPU."""
    story = Story("g0", gpu_wait_max=100)
    story.doubt("the engine does not answer")
    story.submit("t1")
    story.after(100)
    assert story.task().state is TaskState.TIMEOUT
    assert "the engine does not answer" in story.last()["error"]["message"]


def test_who_may_not_wait_is_refused_in_doubt() -> None:
    """Where waiting is switched off, with a code of its own: it is worth trying again soon."""
    story = Story("g0", gpu_wait_max=0)
    story.doubt("the engine does not answer")
    with pytest.raises(Refusal, match="the engine does not answer") as refused:
        story.submit("t1")
    assert refused.value.code is RefusalCode.RUNTIME_UNREACHABLE
    assert refused.value.retry_after is not None
    story.doubt(None)
    assert only(story.submit("t1"), fx.StartWorker)


def test_in_doubt_the_line_may_be_full() -> None:
    """Then it is refused as ever, though a slot is free."""
    story = Story("g0", gpu_wait_max_tasks=1)
    story.doubt()
    story.submit("t1")
    with pytest.raises(Refusal) as refused:
        story.submit("t2")
    assert refused.value.code is RefusalCode.GPU_WAIT_LINE_FULL


def test_a_start_under_way_is_not_called_off() -> None:
    """Its own deadline decides."""
    story = Story("g0")
    story.submit("t1")
    story.doubt()
    assert story.session().state is SessionState.PREPARING
    assert only(story.ready(), fx.SendTask)


def test_another_life_makes_up_its_own_mind() -> None:
    """A doubt is of this process; the next one asks the runtime itself."""
    story = Story("g0")
    story.doubt()
    story.submit("t1")
    story.restart()
    assert [start.session_id for start in only(story.passes("g0"), fx.StartWorker)] == ["s1"]
