"""Sealed sessions: who is let in, whose key it is, which grants are kept, and when they have had enough."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpu_server.core import effects as fx
from gpu_server.core.errors import FailureCode, Refusal, RefusalCode
from gpu_server.core.routing import choose_session
from gpu_server.core.sessions import CloseReason, SealedUse, SessionState, TaskState, TaskType
from tests.core.story import EXEC, GRANT, SEALING, Story, only, own_washes, sealed, warm, work


def refused(do: Callable[[], object]) -> tuple[str, int | None]:
    """The code of the refusal, and when to come again."""
    with pytest.raises(Refusal) as refusal:
        do()
    return refusal.value.code, refusal.value.retry_after


# -- the worker's key -------------------------------------------------------------------------------------


def test_a_worker_shows_its_key_while_it_loads() -> None:
    """The key is there for whoever opens the session before its worker is ready, and stays."""
    story = Story()
    story.ask("s1", sealing=SEALING)
    assert story.session().worker_key is None
    story.shows("mine")
    assert story.session().worker_key == "mine"
    story.ready()
    story.shows("mine")
    assert (story.session().state, story.session().worker_key) == (SessionState.READY, "mine")


@pytest.mark.parametrize("when", ["loading", "ready", "working", "after a restart"])
def test_another_key_ends_the_session(when: str) -> None:
    """What was sealed to one key is for no other, so a worker that shows another is not served any more."""
    story = Story()
    story.ask("s1", sealing=SEALING)
    story.shows("mine")
    if when != "loading":
        story.open()
        story.ready()
    if when == "working":
        story.submit(to="s1", psk_id="psk")
    if when == "after a restart":
        story.restart()
    effects = story.shows("another")
    assert [wash.session_id for wash in own_washes(effects)] == ["s1"]
    session = story.session()
    assert (session.close_reason, session.worker_key) == (CloseReason.WORKER_MISBEHAVED, "mine")
    assert session.failure is not None
    assert session.failure.code == FailureCode.WORKER_PROTOCOL
    if when == "working":
        assert story.task().state is TaskState.FAILED


def test_a_sealed_session_needs_a_worker_with_a_key() -> None:
    """A worker that is ready and shows no key cannot serve it: the start has failed, and says why."""
    story = Story()
    story.ask("s1", sealing=SEALING)
    effects = story.ready()
    assert own_washes(effects)
    failure = story.session().failure
    assert story.session().close_reason is CloseReason.START_FAILED
    assert failure is not None
    assert "key" in failure.message


def test_a_plain_session_has_no_key() -> None:
    """What a worker shows that nobody asked for changes nothing; nor does what is shown too late."""
    story = warm()
    story.shows()
    assert story.session().worker_key is None
    story = sealed()
    story.kill()
    story.shows("another")
    assert story.session().close_reason is CloseReason.KILLED


# -- opening ----------------------------------------------------------------------------------------------


def test_who_may_open_what() -> None:
    """Only the tenant, only a sealed session, only while it serves, and not before there is a key."""
    story = warm("g0", "g1")
    story.ask("s2", sealing=SEALING)
    assert refused(lambda: story.open(session_id="s2", tenant="bob")) == ("session_not_found", None)
    assert refused(lambda: story.open(session_id="s3")) == ("session_not_found", None)
    assert refused(lambda: story.open(session_id="s1")) == ("sealed_not_supported", None)
    assert refused(lambda: story.open(session_id="s2")) == ("session_not_ready", 1)
    story.shows(session_id="s2")
    story.open(session_id="s2")
    assert story.session("s2").grants == {"psk": GRANT}
    story.kill("s2")
    assert refused(lambda: story.open(session_id="s2")) == ("session_closed", None)


def test_the_newest_grants_are_kept() -> None:
    """The oldest goes first, and one that is made again is new again; they outlive the service."""
    story = sealed(grants_max=3)
    for psk_id in ("a", "b", "psk", "c"):
        story.open(psk_id)
    assert list(story.session().grants) == ["b", "psk", "c"]
    story.restart()
    assert list(story.session().grants) == ["b", "psk", "c"]
    assert story.session().worker_key == "key"


def test_an_enclave_that_died_changes_nothing_for_what_is_open() -> None:
    """A grant of an earlier life of the enclave opens what it opened before."""
    story = sealed()
    story.open("of the next enclave")
    assert only(story.submit(to="s1", psk_id="psk"), fx.SendTask)


# -- admission --------------------------------------------------------------------------------------------


def test_sealed_and_plain_do_not_mix() -> None:
    """A sealed session takes what is sealed with a key that it was granted, and nothing else."""
    story = sealed("g0", "g1")
    story.ask("s2")
    assert refused(lambda: story.submit(to="s1")) == ("session_mismatch", None)
    assert refused(lambda: story.submit(to="s1", psk_id="other")) == ("session_not_open", None)
    assert refused(lambda: story.submit(to="s2", psk_id="psk")) == ("sealed_not_supported", None)
    assert refused(lambda: story.submit(to="s1", psk_id="psk", tenant="bob")) == ("session_not_found", None)
    assert only(story.submit(to="s1", psk_id="psk"), fx.SendTask)


def test_a_preset_that_must_be_sealed() -> None:
    """Plain sessions and plain tasks of any kind are refused, sealed ones are served."""
    story, must = Story(), work(sealed=SealedUse.REQUIRED)
    assert refused(lambda: story.ask(workload=must)) == ("sealed_required", None)
    for kind in TaskType:
        assert refused(lambda kind=kind: story.submit(workload=must, kind=kind)) == ("sealed_required", None)
    story.ask("s1", workload=must, sealing=SEALING)
    story.shows()
    story.open()
    story.ready()
    assert only(story.submit(to="s1", psk_id="psk", workload=must), fx.SendTask)


def test_a_preset_that_became_required() -> None:
    """A plain session of before takes no more plain tasks."""
    story = warm()
    must = work(sealed=SealedUse.REQUIRED)
    assert refused(lambda: story.submit(to="s1", workload=must)) == ("sealed_required", None)


@pytest.mark.parametrize("workload", [work(sealed=SealedUse.OFF), EXEC])
def test_a_preset_that_cannot_be_sealed(workload: object) -> None:
    """A sealed session of it is refused."""
    codes = {RefusalCode.SEALED_NOT_SUPPORTED, RefusalCode.PRESET_NOT_SUPPORTED}
    assert refused(lambda: Story().ask(workload=workload, sealing=SEALING))[0] in codes  # type: ignore[arg-type]


def test_nobody_is_routed_to_a_sealed_session() -> None:
    """A task that names a model alone never lands where it would be refused."""
    story = sealed("g0", "g1")
    routed = choose_session(story.node, "ann", "m", "chat", tier=None, timeout=60.0, now=story.now)
    assert routed is None


# -- the end ----------------------------------------------------------------------------------------------


def test_a_session_takes_so_many_sealed_tasks() -> None:
    """Then it takes no more, finishes those that it has, and ends for a reason of its own."""
    story = sealed(sealed_tasks_max=2)
    story.submit("t1", to="s1", psk_id="psk")
    story.submit("t2", to="s1", psk_id="psk")
    assert refused(lambda: story.submit("t3", to="s1", psk_id="psk")) == ("session_closed", None)
    assert refused(story.open) == ("session_closed", None)
    assert not own_washes(story.end("t1"))
    story.restart()
    story.read("t2")
    assert own_washes(story.end("t2"))
    story.clean_up()
    session = story.session()
    assert (session.state, session.close_reason) == (SessionState.CLOSED, CloseReason.SEALED_TASKS_SPENT)
    assert (session.failure, story.task("t2").state) == (None, TaskState.COMPLETED)


@pytest.mark.parametrize("ready", [True, False])
def test_the_last_task_is_cancelled(ready: bool) -> None:
    """Also then the session ends, once its worker has let go."""
    story = Story(sealed_tasks_max=1)
    story.ask("s1", sealing=SEALING)
    story.shows()
    story.open()
    if ready:
        story.ready()
    story.submit("t1", to="s1", psk_id="psk")
    effects = story.cancel("t1")
    if ready:
        effects = story.end("t1", TaskState.CANCELLED)
    assert own_washes(effects)
    assert story.session().close_reason is CloseReason.SEALED_TASKS_SPENT


def test_sealed_tasks_survive_a_restart() -> None:
    """A sealed task that was sent is followed further, one that waits is sent."""
    story = sealed()
    story.submit("t1", to="s1", psk_id="psk")
    story.submit("t2", to="s1", psk_id="psk")
    effects = story.restart()
    assert [resumed.task_id for resumed in only(effects, fx.ResumeTask)] == ["t1"]
    story.read("t2")
    assert [sent.task_id for sent in only(story.end("t1"), fx.SendTask)] == ["t2"]
