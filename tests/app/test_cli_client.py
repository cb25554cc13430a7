"""What the commands share: how events are shown, and how a conversation that fails is told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
import typer

from gpu_server.cli_client import EventPrinter, converse, exit_with
from gpu_server.client import (
    AttestationRefused,
    Client,
    DataKeyFailed,
    OpenRefused,
    OpenTimeout,
    Refused,
    SealedStreamBroken,
    SessionEnded,
    TaskEvent,
    Unreadable,
    WashNotProven,
)

URL = "http://127.0.0.1:9"
FINISH = TaskEvent(id=3, event="task_finish", data={"status": "failed"})


def test_long_values_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """An artifact does not fill the screen."""
    data = {"name": "n", "media_type": "m", "data": "x" * 10_000, "nothing": None}
    EventPrinter(as_json=False).show(TaskEvent(id=1, event="artifact", data=data))
    shown = capsys.readouterr().out
    assert len(shown) < 200
    assert "name=n" in shown
    assert "nothing" not in shown


def test_who_says_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """In a sealed task an end that did not come sealed says so; in a plain one there is nothing to say."""
    sealed = TaskEvent(id=3, event="task_finish", data={"status": "failed"}, sealed=True)
    for as_sealed, event, words in ((True, FINISH, True), (True, sealed, False), (False, FINISH, False)):
        EventPrinter(as_json=False, sealed=as_sealed).show(event)
        assert ("the service's word" in capsys.readouterr().out) is words


def test_json_says_what_was_sealed(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a sealed task every line of JSON says whether it came sealed."""
    for as_sealed in (False, True):
        EventPrinter(as_json=True, sealed=as_sealed).show(FINISH)
        line = json.loads(capsys.readouterr().out)
        assert line.pop("sealed", None) == (False if as_sealed else None)
        assert line == {"id": 3, "event": "task_finish", "data": {"status": "failed"}}


FORGED = "x\n\x1b[2J\x9btask_finish  status=completed\r"


def test_words_that_are_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """What a service says can neither look like another line nor move the terminal's cursor; nor is it
    markup."""
    printer = EventPrinter(as_json=False, sealed=True)
    printer.show(TaskEvent(id=1, event="connection", data={"status": FORGED, FORGED: 1, "ü": "é"}))
    printer.show(TaskEvent(id=1, event=f"[/] {FORGED}", data={}))
    first, second = capsys.readouterr().out.splitlines()
    assert (first + second).isprintable()
    assert r"status=x\n\x1b[2J\x9btask_finish  status=completed\r" in first
    assert "ü=é" in first
    assert second.startswith("[/] x")
    with pytest.raises(typer.Exit):
        converse(URL, "a key", None, failing(Refused(500, {"detail": FORGED * 10_000})))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert len(line) < 4000


def test_text_is_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A worker's text has its lines, and nothing else that a terminal obeys."""
    printer = EventPrinter(as_json=False)
    printer.show(TaskEvent(id=1, event="text_delta", data={"delta": "one\ntwo\x1b[2J\r[red]ü"}))
    assert capsys.readouterr().out == "one\ntwo\ufffd[2J\ufffd[red]ü"
    for data in ({}, {"delta": 7}):
        printer.show(TaskEvent(id=1, event="text_delta", data=data))


def failing(error: BaseException) -> Callable[[Client], Awaitable[None]]:
    async def work(client: Client) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refused(404, {"code": "some_code", "detail": "some detail"}), "some_code (404): some detail"),
        (SessionEnded("s_1", "image_missing", "no image"), "session s_1 ended before"),
        (AttestationRefused("pcr", "PCR0 is another"), "The enclave is not accepted (pcr): PCR0 is another"),
        (WashNotProven("tier", "it was light"), "No proof of the washes (tier): it was light"),
        (OpenRefused("another tenant"), "Refused by this client: another tenant"),
        (SealedStreamBroken("cut"), "Refused by this client: cut"),
        (DataKeyFailed("AccessDeniedException", "no"), "No data key: AccessDeniedException: no"),
        (Unreadable("no event stream"), f"The service at {URL} is not understood: no event stream"),
        (aiohttp.ClientConnectionError("gone"), f"The service at {URL} cannot be reached: gone"),
        (OpenTimeout("not open after 5 s; it was x"), "not open after 5 s; it was x; --open-seconds"),
        (TimeoutError("too long"), f"The service at {URL} cannot be reached: too long"),
        (TimeoutError(), f"The service at {URL} cannot be reached: no answer in time"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_goes_wrong(error: BaseException, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way in which a conversation can fail is one line and status 1."""
    with pytest.raises(typer.Exit) as ended:
        converse(URL, "a key", None, failing(error))
    assert ended.value.exit_code == 1
    shown = capsys.readouterr().err
    assert shown.startswith(words)
    assert shown.count("\n") == 1


def test_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM ends a conversation like Ctrl-C: what it holds is put in order first, and the caller's words
    are told."""
    order: list[str] = []

    async def work(client: Client) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            order.append("put in order")

    with pytest.raises(typer.Exit) as ended:
        converse(URL, "a key", None, work, lambda: "these words")
    assert (ended.value.exit_code, order) == (1, ["put in order"])
    assert capsys.readouterr().err == "these words\n"


def test_the_exit_status() -> None:
    """A task that did not complete is status 1; one that had nothing left to tell is none."""
    for status in ("completed", None):
        exit_with(status)
    for status in ("failed", "timeout", "cancelled", "unknown", ""):
        with pytest.raises(typer.Exit):
            exit_with(status)
