"""Routing: a task that names no session finds the right one, and never somebody else's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.routing import choose_session
from gpu_server.core.sessions import TaskType
from gpu_server.core.slots import Tier
from tests.core.invariants import snapshot
from tests.core.story import Story, device, work

TWO = work(max_concurrent_tasks=2)


def chosen(
    story: Story,
    tenant: str = "ann",
    model_id: str = "m",
    preset: str = "chat",
    tier: Tier | None = None,
    timeout: float = 60.0,
) -> str | None:
    """The choice, after a look at whether choosing has changed anything."""
    before = snapshot(story.node)
    try:
        return choose_session(story.node, tenant, model_id, preset, tier=tier, timeout=timeout, now=story.now)
    finally:
        assert snapshot(story.node) == before


def sessions(count: int, **rules: float) -> Story:
    """Sessions `s1`, `s2`, ... of ann, each with two places, ready, on a slot of its own."""
    story = Story(*(f"g{n}" for n in range(count)), **rules)
    for number in range(1, count + 1):
        story.ask(f"s{number}", workload=TWO)
        story.ready(f"s{number}")
    return story


def test_the_first_task_gets_a_new_session() -> None:
    """A tenant without sessions has none to choose from."""
    assert chosen(Story("g0")) is None


def test_a_session_is_used_again() -> None:
    """The session that serves this model is the one to use, also while it still loads or waits."""
    story = Story("g0")
    story.ask("s1", workload=TWO)
    assert chosen(story) == "s1"
    story.ready("s1")
    assert chosen(story) == "s1"
    story.ask("s2", tenant="bob", workload=TWO)
    assert story.session("s2").state == "waiting"
    assert chosen(story, "bob") == "s2"


def test_the_least_busy_of_two() -> None:
    """Of two sessions the one with fewer tasks is chosen, and of equally busy ones the oldest."""
    story = sessions(2)
    assert chosen(story) == "s1"
    story.submit("t1", to="s1", workload=TWO)
    assert chosen(story) == "s2"
    story.submit("t2", to="s2", workload=TWO)
    assert chosen(story) == "s1"
    story.submit("t3", to="s1", workload=TWO)
    assert chosen(story) == "s2"
    story.end("t1")
    story.end("t3")
    assert chosen(story) == "s1"


def test_a_place_that_is_free_now_comes_first() -> None:
    """A session that is ready and busy, with a place left, comes before an idle one that still loads."""
    story = Story("g0", "g1")
    story.ask("s1", workload=TWO)
    story.ask("s2", workload=TWO)
    story.ready("s2")
    story.submit("t1", to="s2", workload=TWO)
    assert chosen(story) == "s2"
    story.submit("t2", to="s2", workload=TWO)
    assert chosen(story) == "s1"


def test_what_does_not_fit_is_not_chosen() -> None:
    """Other tenants' sessions, other models, other presets and sessions of one-off tasks are left alone."""
    story = Story("g0", "g1")
    story.ask("s1", workload=TWO)
    story.ready("s1")
    assert chosen(story, "bob") is None
    assert chosen(story, model_id="other") is None
    assert chosen(story, preset="other") is None
    story.submit("t2", kind=TaskType.ONEOFF, workload=work(task_preset="once"))
    assert chosen(story, preset="once") is None


def test_a_session_that_ends_takes_nothing() -> None:
    """A draining session is passed over, and an ended one too."""
    story = sessions(1)
    story.kill("s1")
    assert story.session("s1").state == "draining"
    assert chosen(story) is None
    story.clean_up("s1")
    assert chosen(story) is None


def fill(story: Story, session_id: str, count: int, first: int) -> None:
    for number in range(first, first + count):
        story.submit(f"t{number}", to=session_id, workload=TWO)


def test_where_all_are_full_a_new_one_starts_if_it_can() -> None:
    """With every queue full a new session is made while a slot is free, and refused when none is."""
    story = Story("g0", "g1", session_queue_max=1)
    story.ask("s1", workload=TWO)
    story.ready("s1")
    fill(story, "s1", 2, first=10)
    assert chosen(story) == "s1", "one may wait"
    fill(story, "s1", 1, first=20)
    assert chosen(story) is None, "the other slot is free"
    story.submit("t3", workload=TWO)
    assert chosen(story) == "s3"
    story.ready("s3")
    fill(story, "s3", 2, first=30)
    with pytest.raises(Refusal) as refused:
        chosen(story)
    assert refused.value.code is RefusalCode.SESSION_QUEUE_FULL
    assert refused.value.retry_after
    story.end("t3")
    assert chosen(story) == "s3"


def test_a_full_tenant_does_not_grow_the_wait_line() -> None:
    """A free slot that somebody else waits for, or a runtime that does not answer, starts no session."""
    story = Story("g0", "g1", session_queue_max=0)
    story.ask("s1", workload=TWO)
    story.ready("s1")
    fill(story, "s1", 2, first=10)
    assert chosen(story) is None
    story.doubt()
    with pytest.raises(Refusal):
        chosen(story)
    story.doubt(None)
    story.ask("s2", tenant="bob", workload=work(gpus=2))
    with pytest.raises(Refusal):
        chosen(story)
    assert chosen(story, "cid") is None, "who has no session may wait in line"


def test_a_tier_of_its_own() -> None:
    """A new session counts on slots of its tier, not on those of another."""
    high = device("g1", frozenset({Tier.HIGH}))
    story = Story("g0", high, session_queue_max=0)
    story.ask("s1", workload=TWO)
    story.ready("s1")
    fill(story, "s1", 2, first=10)
    assert chosen(story, tier=Tier.HIGH) is None
    for tier in (None, Tier.LOW):
        with pytest.raises(Refusal):
            chosen(story, tier=tier)


def aged(*slots: str, ages: tuple[float, ...]) -> Story:
    """Sessions of these ages, the oldest first, with lives of 1,000 seconds."""
    story = Story(*slots, max_lifetime=1000.0, idle_timeout=5000.0)
    for number, (age, next_age) in enumerate(zip(ages, (*ages[1:], 0.0), strict=True), 1):
        story.ask(f"s{number}", workload=TWO)
        story.ready(f"s{number}")
        story.after(age - next_age)
    return story


def test_near_its_end_a_session_comes_last() -> None:
    """A task goes to a session that may outlive it, also to a busier one, or to one that still loads."""
    story = aged("g0", "g1", ages=(950, 800))
    assert chosen(story, timeout=50) == "s1", "enough is left"
    assert chosen(story, timeout=51) == "s2"
    fill(story, "s2", 2, first=10)
    assert chosen(story, timeout=51) == "s2"
    story = aged("g0", "g1", ages=(950,))
    story.ask("s2", workload=TWO)
    assert chosen(story, timeout=51) == "s2"


def test_near_its_end_a_session_is_better_than_none() -> None:
    """Where no other is there a new one is made, if that can start at once; else the one that is there will
    do, of two equally busy ones the younger."""
    story = aged("g0", "g1", ages=(950,))
    assert chosen(story, timeout=51) is None
    story.ask("s2", tenant="bob", workload=TWO)
    assert chosen(story, timeout=51) == "s1"
    story = aged("g0", "g1", ages=(990, 970))
    assert chosen(story) == "s2"
    fill(story, "s2", 1, first=10)
    assert chosen(story) == "s1"


def test_only_the_last_quarter_is_near_the_end() -> None:
    """Where a task may take a whole lifetime, sessions are used all the same."""
    story = aged("g0", "g1", ages=(750,))
    assert chosen(story, timeout=1000) == "s1"
    story.after(1)
    assert chosen(story, timeout=1000) is None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "submit", "oneoff", "ready", "end", "kill", "clean_up", "lose"]),
        st.sampled_from(["ann", "bob"]),
        st.integers(0, 7),
    ),
    max_size=30,
)


@given(steps=STEPS, queue_max=st.integers(0, 2))
def test_what_is_chosen_is_admitted(steps: list[tuple[str, str, int]], queue_max: int) -> None:
    """Whatever has happened, the session that is chosen takes the task, and is its tenant's."""
    story = Story("g0", "g1", session_queue_max=queue_max)
    for number, (what, tenant, pick) in enumerate(steps):
        take_step(story, what, tenant, pick, number)
    for tenant in ("ann", "bob"):
        try:
            session_id = chosen(story, tenant)
        except Refusal:
            continue  # all its sessions are full
        story.submit(f"t_{tenant}", to=session_id, tenant=tenant, workload=TWO)
        assert story.session(story.task(f"t_{tenant}").session_id).tenant == tenant


def take_step(story: Story, what: str, tenant: str, pick: int, number: int) -> None:
    """Something happens, if it can."""
    sessions = [s for s in story.node.sessions.values() if s.tenant == tenant]
    session = sessions[pick % len(sessions)] if sessions else None
    if what == "ask":
        story.ask(f"s{number}", tenant=tenant, workload=TWO)
    elif what in ("submit", "oneoff"):
        kind = TaskType.ONEOFF if what == "oneoff" else TaskType.SESSION
        story.submit(f"t{number}", tenant=tenant, kind=kind, workload=TWO)
    elif session is None:
        return
    elif what == "ready" and session.state == "preparing":
        story.ready(session.id)
    elif what == "end" and session.state == "working":
        story.end(next(iter(session.busy)))
    elif what == "kill":
        story.kill(session.id, tenant)
    elif what == "lose" and session.state in ("ready", "working"):
        story.lose(session.id)
    elif what == "clean_up" and session.state == "draining":
        story.clean_up(session.id)


def test_a_session_that_is_washed_after_every_task_is_never_chosen() -> None:
    """It has its task, or somebody has asked for it in order to give it one."""
    story = Story("g0", "g1")
    story.ask("s1", workload=work(wash_per_task=True))
    story.ready("s1")
    assert chosen(story) is None


def test_another_session_is_made_where_a_slot_is_kept_for_the_tenant() -> None:
    """A slot that is kept for her lets her start at once; one that is kept for another does not."""
    story = Story("g0", "g1", light_wash=True, session_queue_max=0)
    story.ask("s1")
    story.ready("s1")
    story.submit("t1", to="s1")
    story.ask("s2")
    story.kill("s2")
    story.clean_up("s2")
    assert chosen(story) is None
    story.ask("s3")
    story.kill("s3")
    story.gone("s3")
    with pytest.raises(Refusal, match="no other can start now"):
        chosen(story)
