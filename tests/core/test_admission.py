"""Admission: every refusal has its code, and a refused request changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpu_server.core import effects as fx
from gpu_server.core import events as ev
from gpu_server.core.admission import known_request
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.rows import without_fingerprints
from gpu_server.core.sessions import RequestKey, TaskType
from gpu_server.core.slots import Tier
from tests.core.invariants import snapshot
from tests.core.story import EXEC, Story, device, only, work

LOW, HIGH = frozenset({Tier.LOW}), frozenset({Tier.HIGH})


def refused(story: Story, request: Callable[[], Any]) -> Refusal:
    """The refusal of a request, after a look at whether anything has changed."""
    before = snapshot(story.node)
    with pytest.raises(Refusal) as raised:
        request()
    assert snapshot(story.node) == before
    return raised.value


def served() -> Story:
    """One slot, and session `s1` of ann on it, ready."""
    story = Story("g0")
    story.ask("s1")
    story.ready("s1")
    return story


def test_an_unknown_session_is_not_found() -> None:
    """A session id that never was names the session it could not find."""
    story = served()
    refusal = refused(story, lambda: story.submit("t1", to="s9"))
    assert (refusal.code, refusal.ids) == (RefusalCode.SESSION_NOT_FOUND, {"session_id": "s9"})


@pytest.mark.parametrize("do", ["submit", "kill", "keep_alive"])
def test_anothers_session_is_as_unknown_as_none(do: str) -> None:
    """Nothing tells a tenant whether another tenant's session exists."""
    story = served()
    requests: dict[str, Callable[[str], Any]] = {
        "submit": lambda session_id: story.submit("t1", to=session_id, tenant="bob"),
        "kill": lambda session_id: story.kill(session_id, tenant="bob"),
        "keep_alive": lambda session_id: story.keep_alive(session_id, tenant="bob"),
    }
    anothers = refused(story, lambda: requests[do]("s1"))
    unknown = refused(story, lambda: requests[do]("s9"))
    assert anothers.code is unknown.code is RefusalCode.SESSION_NOT_FOUND
    assert anothers.message.replace("s1", "s9") == unknown.message


def test_anothers_task_is_as_unknown_as_none() -> None:
    """Nothing tells a tenant whether another tenant's task exists."""
    story = served()
    story.submit("t1", to="s1")
    anothers = refused(story, lambda: story.cancel("t1", tenant="bob"))
    unknown = refused(story, lambda: story.cancel("t9"))
    assert anothers.code is unknown.code is RefusalCode.TASK_NOT_FOUND
    assert anothers.message.replace("t1", "t9") == unknown.message


def test_a_session_that_drains_or_is_over_takes_no_tasks() -> None:
    """The refusal says in which state the session is, and why."""
    story = served()
    story.kill("s1")
    for state in ("draining", "closed"):
        refusal = refused(story, lambda: story.submit("t1", to="s1"))
        assert refusal.code is RefusalCode.SESSION_CLOSED
        assert f"{state} (killed)" in refusal.message
        refusal = refused(story, lambda: story.keep_alive("s1"))
        assert refusal.code is RefusalCode.SESSION_CLOSED
        story.gone("s1")


def test_a_oneoff_session_takes_no_second_task() -> None:
    """Not even a one-off task of the same preset."""
    story = Story("g0")
    story.submit("t1", kind=TaskType.ONEOFF)
    refusal = refused(story, lambda: story.submit("t2", to="s1", kind=TaskType.ONEOFF))
    assert refusal.code is RefusalCode.SESSION_MISMATCH


@pytest.mark.parametrize(
    "other",
    [
        {"workload": work(task_preset="other")},
        {"workload": work(model_id="other")},
        {"kind": TaskType.ONEOFF},
        {"tier": Tier.HIGH},
    ],
)
def test_a_task_must_fit_its_session(other: dict[str, Any]) -> None:
    """Model, preset, type and difficulty of a task are those of the session it names."""
    story = served()
    assert refused(story, lambda: story.submit("t1", to="s1", **other)).code is RefusalCode.SESSION_MISMATCH


def test_a_task_may_leave_its_difficulty_to_the_session() -> None:
    """No difficulty means the session's own, and naming the same one is fine."""
    story = Story("g0")
    story.ask("s1", tier=Tier.HIGH)
    story.submit("t1", to="s1")
    story.submit("t2", to="s1", tier=Tier.HIGH)
    assert list(story.session("s1").queue) == ["t1", "t2"]


def test_a_new_session_is_low_unless_told_otherwise() -> None:
    """No difficulty on a task without a session means low."""
    story = Story("g0")
    story.submit("t1")
    assert story.session("s1").tier is Tier.LOW


def test_a_full_queue_refuses() -> None:
    """Beside the running task as many wait as the rule says, and one more is told to come back."""
    story = Story("g0", session_queue_max=2)
    story.submit("t1")
    story.ready("s1")
    story.submit("t2", to="s1")
    story.submit("t3", to="s1")
    refusal = refused(story, lambda: story.submit("t4", to="s1"))
    assert refusal.code is RefusalCode.SESSION_QUEUE_FULL
    assert refusal.retry_after is not None
    story.end("t1")
    story.submit("t4", to="s1")


def test_a_session_that_is_not_ready_keeps_places_for_those_that_will_run() -> None:
    """Who will start at once is not counted as waiting: three will run, and one waits."""
    story = Story("g0", session_queue_max=1)
    story.ask("s1", workload=work(max_concurrent_tasks=3))
    for number in range(1, 5):
        story.submit(f"t{number}", to="s1", workload=work(max_concurrent_tasks=3))
    refusal = refused(story, lambda: story.submit("t5", to="s1", workload=work(max_concurrent_tasks=3)))
    assert refusal.code is RefusalCode.SESSION_QUEUE_FULL


def test_an_exec_preset_serves_no_sessions() -> None:
    """It takes one-off tasks; a session task, or a session ahead of its tasks, is refused."""
    story = Story("g0")
    for request in (lambda: story.submit("t1", workload=EXEC), lambda: story.ask("s1", workload=EXEC)):
        assert refused(story, request).code is RefusalCode.PRESET_NOT_SUPPORTED
    story.submit("t1", workload=EXEC, kind=TaskType.ONEOFF)


@pytest.mark.parametrize(("gpus", "tier"), [(3, Tier.LOW), (2, Tier.HIGH)])
def test_what_can_never_start_is_refused_at_once(gpus: int, tier: Tier) -> None:
    """Waiting does not help where the node has too few slots of this tier, free or not."""
    story = Story(device("a", LOW), device("b"))
    refusal = refused(story, lambda: story.submit("t1", workload=work(gpus=gpus), tier=tier))
    assert refusal.code is RefusalCode.NO_SUCH_CAPACITY
    assert refusal.retry_after is None
    refusal = refused(story, lambda: story.ask("s1", workload=work(gpus=gpus), tier=tier))
    assert refusal.code is RefusalCode.NO_SUCH_CAPACITY


def test_without_waiting_no_free_gpu_is_a_refusal() -> None:
    """With waiting switched off a request either starts now or is told to come back."""
    story = Story("g0", gpu_wait_max=0)
    assert only(story.submit("t1"), fx.StartWorker)
    for request in (lambda: story.submit("t2"), lambda: story.ask("s2")):
        refusal = refused(story, request)
        assert refusal.code is RefusalCode.NO_AVAILABLE_GPU
        assert refusal.retry_after is not None


def test_without_waiting_a_free_slot_of_the_other_tier_is_none() -> None:
    """A high slot is no help to a low task."""
    story = Story(device("a", LOW), device("b", HIGH), gpu_wait_max=0)
    story.submit("t1", tier=Tier.LOW)
    assert refused(story, lambda: story.submit("t2")).code is RefusalCode.NO_AVAILABLE_GPU
    story.submit("t3", tier=Tier.HIGH)


def test_a_full_line_refuses() -> None:
    """The line is bounded; whoever could start at once is let in all the same."""
    story = Story(device("a", LOW), device("b", HIGH), gpu_wait_max_tasks=1)
    story.submit("t1")
    story.submit("t2")
    refusal = refused(story, lambda: story.submit("t3"))
    assert refusal.code is RefusalCode.GPU_WAIT_LINE_FULL
    assert refusal.retry_after is not None
    assert only(story.submit("t4", tier=Tier.HIGH), fx.StartWorker)


def test_a_node_that_shuts_down_takes_nothing_new() -> None:
    """Neither tasks nor sessions, and the refusal says when to come back."""
    story = Story("g0")
    story.shut_down()
    for request in (lambda: story.submit("t1"), lambda: story.ask("s1")):
        refusal = refused(story, request)
        assert (refusal.code, refusal.retry_after) == (RefusalCode.SHUTTING_DOWN, 30)


@pytest.mark.parametrize(
    ("slot_id", "code"),
    [("g0", RefusalCode.SLOT_NOT_QUARANTINED), ("g9", RefusalCode.SLOT_NOT_FOUND)],
)
def test_only_a_quarantined_slot_can_be_washed_by_order(slot_id: str, code: RefusalCode) -> None:
    """An operator cannot wash a slot under somebody's feet, nor one that is not there."""
    story = served()
    assert refused(story, lambda: story.order_wash(slot_id)).code is code


# -- requests that come again


def known(
    story: Story, name: str, fingerprint: str, *, tenant: str = "ann", session: bool = False
) -> str | None:
    """What a request with this key has made."""
    key, node = RequestKey(name=name, fingerprint=fingerprint), story.node
    if session:
        return known_request(node.session_keys, node.sessions, tenant, key)
    return known_request(node.task_keys, node.tasks, tenant, key)


def keyed() -> Story:
    """Task `t1` of ann, made by a request with the key `k1`."""
    story = Story("g0", task_retention=100)
    story.submit("t1", key=RequestKey(name="k1", fingerprint="f1"))
    return story


def test_a_request_that_comes_again_finds_what_it_made() -> None:
    """While it runs and after its end, in this life of the service and in another."""
    story = keyed()
    assert known(story, "k1", "f1") == "t1"
    story.kill()
    assert known(story, "k1", "f1") == "t1"
    story.restart()
    assert known(story, "k1", "f1") == "t1"


def test_a_key_with_another_body_is_refused() -> None:
    """It would get the answer to a question that it did not ask."""
    story = keyed()
    with pytest.raises(
        Refusal, match="Idempotency-Key k1 came with another body before, and made t1"
    ) as refused:
        known(story, "k1", "f2")
    assert refused.value.code is RefusalCode.IDEMPOTENCY_MISMATCH


def test_a_key_is_its_tenants_own() -> None:
    """Another tenant's request with the same key is a new one."""
    assert known(keyed(), "k1", "f1", tenant="bob") is None


def test_keys_of_tasks_and_of_sessions_are_apart() -> None:
    """The same key may have made one of each."""
    story = keyed()
    assert known(story, "k1", "f1", session=True) is None
    story.ask("s2", key=RequestKey(name="k1", fingerprint="f9"))
    assert known(story, "k1", "f9", session=True) == "s2"
    assert known(story, "k1", "f1") == "t1"


def test_a_key_is_forgotten_with_what_it_made() -> None:
    """After its retention the request is a new one."""
    story = keyed()
    story.kill()
    story.after(100)
    assert known(story, "k1", "f1") is None


def test_without_its_fingerprint_the_key_decides() -> None:
    """What cannot be compared any more counts as the same: nothing is done twice."""
    story = keyed()
    story.journal.replace(without_fingerprints(story.journal.rows()))
    story.restart()
    assert known(story, "k1", "whatever") == "t1"


@pytest.mark.parametrize("session", [False, True])
def test_a_request_that_was_taken_back_may_come_again(session: bool) -> None:
    """Its client was told no, so its key is free, in this life and in another, and what it made ends."""
    story, key = Story("g0"), RequestKey(name="k1", fingerprint="f1")
    if session:
        story.ask("s1", key=key)
        story.tell(ev.RequestWithdrawn(task_id=None, session_id="s1"))
    else:
        story.submit("t1", key=key)
        story.tell(ev.RequestWithdrawn(task_id="t1", session_id="s1"))
        assert story.names("t1")[-2:] == ["error:storage_failing", "task_finish:failed"]
    assert story.session().tearing_down
    assert known(story, "k1", "f1", session=session) is None
    story.restart()
    assert known(story, "k1", "f1", session=session) is None
