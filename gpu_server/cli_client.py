"""What the commands that talk to a service share: options, the conversation, and how events are shown."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

import aiohttp
import orjson
import typer
from rich.console import Console

from gpu_server.client import (
    AttestationRefused,
    Client,
    DataKeyFailed,
    OpenTimeout,
    Refused,
    SealedError,
    SessionEnded,
    TaskEvent,
    Unreadable,
    WashNotProven,
)

T = TypeVar("T")

out = Console(highlight=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

Url = Annotated[str, typer.Option("--url", envvar="GPU_SERVER_URL", help="Address of the service.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar=["GPU_SERVER_API_KEY", "INTERNAL_API_KEY"], help="API key.", show_default=False
    ),
]
TenantName = Annotated[
    str | None,
    typer.Option("--tenant", envvar="GPU_SERVER_TENANT", help="Act as this tenant (internal key)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
DEFAULT_URL = "http://127.0.0.1:8001"
MAX_MESSAGE = 2000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal obeys, but for tabs and line ends."""


class EventPrinter:
    """Prints a task's events: text as it flows, everything else a line each. `sealed`: it is a sealed task,
    so what the service says of it is told apart from what its worker says."""

    def __init__(self, *, as_json: bool, sealed: bool = False) -> None:
        self._as_json, self._sealed = as_json, sealed
        self._in_text = False

    def show(self, event: TaskEvent) -> None:
        """Print one event."""
        if self._as_json:
            line = {"id": event.id, "event": event.event, "data": event.data}
            if self._sealed:
                line["sealed"] = event.sealed
            sys.stdout.write(orjson.dumps(line).decode() + "\n")
            sys.stdout.flush()
            return
        if event.event == "text_delta" and isinstance(delta := event.data.get("delta"), str):
            self._in_text = True
            out.print(CONTROL.sub("\N{REPLACEMENT CHARACTER}", delta), end="", markup=False)
            return
        if self._in_text:
            self._in_text = False
            out.print()
        details = " ".join(
            f"{_short(name)}={_short(value)}" for name, value in event.data.items() if value is not None
        )
        colour = {"error": "red", "task_finish": "green", "logs": "yellow"}.get(event.event, "cyan")
        out.print(f"{_short(event.event):<12} ", style=colour, markup=False, end="")
        out.print(details, markup=False)
        if self._sealed and event.event == "task_finish" and not event.sealed:
            out.print("[yellow]This end is the service's word: nothing sealed says it.[/]")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return one_line(text if len(text) <= 80 else text[:77] + "...")


def one_line(text: str) -> str:
    """Somebody else's words, so that they neither look like other lines nor move the terminal's cursor."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def print_json(answer: dict[str, Any]) -> None:
    """Print one answer, laid out."""
    out.print_json(orjson.dumps(answer).decode())


async def show_all(events: AsyncIterator[TaskEvent], printer: EventPrinter) -> str | None:
    """Print events to their end; the status in which the task ended, None if there was none."""
    status = None
    async for event in events:
        printer.show(event)
        if event.event == "task_finish":
            status = str(event.data.get("status", "unknown"))
    return status


def follow(
    url: str,
    api_key: str | None,
    tenant: str | None,
    source: Callable[[Client], AsyncIterator[TaskEvent]],
    *,
    as_json: bool,
) -> None:
    """Print the events that `source` gives for a client, and exit with 1 unless they end in `completed`."""
    printer = EventPrinter(as_json=as_json)
    exit_with(converse(url, api_key, tenant, lambda client: show_all(source(client), printer)))


def exit_with(status: str | None) -> None:
    """Exit with 1 unless a task with this status completed, or had nothing left to tell."""
    if status not in ("completed", None):
        raise typer.Exit(1)


def left() -> str:
    """What is told to who ends a command with Ctrl-C or SIGTERM."""
    return "interrupted; a task that nobody reads is cancelled after a while, but for one with --detach"


def converse(
    url: str,
    api_key: str | None,
    tenant: str | None,
    work: Callable[[Client], Awaitable[T]],
    interrupted: Callable[[], str] = left,
) -> T:
    """Run one conversation with the service; every way it can fail is one line and exit status 1. SIGTERM
    ends it like Ctrl-C: `work` is cancelled, and has time to put things in order."""
    if not api_key:
        err.print("[red]No API key:[/] set GPU_SERVER_API_KEY or give --api-key")
        raise typer.Exit(2)

    async def talk() -> T:
        if threading.current_thread() is threading.main_thread():
            this = asyncio.current_task()
            assert this is not None
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        async with Client(url, api_key, tenant=tenant) as client:
            return await work(client)

    try:
        return asyncio.run(talk())
    except (Refused, SessionEnded) as refused:
        message = str(refused)
    except AttestationRefused as refused:
        message = f"The enclave is not accepted ({refused.reason}): {refused}"
    except WashNotProven as unproven:
        message = f"No proof of the washes ({unproven.reason}): {unproven}"
    except SealedError as error:
        message = f"Refused by this client: {error}"
    except DataKeyFailed as failed:
        message = f"No data key: {failed}"
    except Unreadable as error:
        message = f"The service at {url} is not understood: {error}"
    except OpenTimeout as error:
        message = f"{error}; --open-seconds gives it longer"
    except (aiohttp.ClientError, TimeoutError) as error:
        why = str(error) or "no answer in time"
        message = f"The service at {url} cannot be reached: {why}; --url or GPU_SERVER_URL says where it is"
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.print(interrupted(), style="yellow", markup=False)
        raise typer.Exit(1) from None
    err.print(one_line(message[:MAX_MESSAGE]), style="red", markup=False)
    raise typer.Exit(1)
