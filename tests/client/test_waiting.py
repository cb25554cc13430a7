"""How long an opening waits for what, and what its caller hears."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import pytest

from gpu_server.client import Client, OpenTimeout, Refused
from gpu_server.client.service import AWAY
from gpu_server.client.waiting import MAX_REASON, TROUBLE, Waiting
from tests.app.api_world import KEY
from tests.app.played_service import Jumping


async def waited(code: str, status: int) -> float:
    """Seconds for which a refusal is waited for, by a client that waits 100 s for a service that is away."""
    clock = Jumping()
    began = clock.now()
    refused = Refused(status, {"code": code, "detail": "some detail"})
    async with Client("http://127.0.0.1:9", KEY, clock=clock, reconnect_seconds=100) as client:
        refusals = Waiting(1000, 60, lambda reason: None).refusals(client)
        with suppress(Refused):
            while True:
                await refusals.wait_out(refused)
    return clock.now() - began


@pytest.mark.parametrize("code", sorted(TROUBLE))
async def test_trouble(code: str) -> None:
    """Trouble of the enclave or the key service is waited for as long as was said, then it is told."""
    assert await waited(code, 503) == pytest.approx(60)


@pytest.mark.parametrize("status", sorted(AWAY))
async def test_a_service_that_is_away(status: int) -> None:
    """A service that is away is waited for as long as its client waits for it."""
    assert await waited("shutting_down", status) == pytest.approx(100)


async def test_what_will_not_pass() -> None:
    """Any other refusal is not waited for."""
    assert await waited("kms_denied", 403) == 0


def test_each_reason_once() -> None:
    """Each reason is told once, in the order in which they came, and none is long."""
    heard: list[str] = []
    waiting = Waiting(1, 1, heard.append)
    for found in (
        {"state": "waiting", "stage": None},
        {"state": "waiting", "stage": None},
        {"state": "preparing", "stage": None},
        {"state": "preparing", "stage": "model"},
        {"state": "preparing", "stage": "container"},
        {"state": "preparing", "stage": "model"},
        {"state": 7, "stage": []},
        {"state": "preparing", "stage": "x" * 10_000},
    ):
        waiting.for_session(found)
    *short, long = heard
    assert short == [
        "waiting for a slot: all are taken",
        "waiting for its worker, which is being started",
        "waiting for its worker, which is being started (model)",
        "waiting for its worker, which is being started (container)",
    ]
    assert len(long) == MAX_REASON


def test_reasons_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Who asks for no reasons finds them in the log."""
    caplog.set_level(logging.INFO, "gpu_server.client")
    Waiting(1, 1, None).for_session({"state": "waiting"})
    assert caplog.messages == ["waiting: waiting for a slot: all are taken"]


async def test_the_limit() -> None:
    """When the time is up, it is said what was waited for; another's timeout stays what it is."""
    waiting = Waiting(0.01, 1, lambda reason: None)
    with pytest.raises(OpenTimeout, match=r"not open after 0\.01 s$"):
        async with waiting.limit():
            await asyncio.Event().wait()
    waiting.for_session({"state": "waiting"})
    with pytest.raises(OpenTimeout, match="it was waiting for a slot"):
        async with waiting.limit():
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError) as other:
        async with Waiting(60, 1, None).limit():
            raise TimeoutError("another's")
    assert not isinstance(other.value, OpenTimeout)
