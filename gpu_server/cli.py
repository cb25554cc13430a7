"""The command line: `gpu-server serve`, `submit`, and what looks at tasks, sessions, slots and presets."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import orjson
import typer
import uvicorn
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from gpu_server import __version__, cli_models, log, presets
from gpu_server.client import Client, Refused, TaskEvent
from gpu_server.settings import Settings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Lease GPUs to containers, one tenant each."
)
tasks_app = typer.Typer(no_args_is_help=True, help="Look at, follow and cancel tasks.")
sessions_app = typer.Typer(no_args_is_help=True, help="Look at and end sessions.")
presets_app = typer.Typer(no_args_is_help=True, help="The presets file.")
app.add_typer(tasks_app, name="tasks")
app.add_typer(sessions_app, name="sessions")
app.add_typer(presets_app, name="presets")
slots_app = typer.Typer(no_args_is_help=True, help="Look at slots, and wash quarantined ones (operator).")
app.add_typer(slots_app, name="slots")
app.add_typer(cli_models.app, name="models")

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


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


@app.command()
def serve() -> None:
    """Run the control service. Settings come from the environment and .env; see .env.example."""
    from gpu_server.app import serve as run
    from gpu_server.ports import InventoryError
    from gpu_server.service import StartRefusedByNode

    settings = _settings()
    log.configure(settings.log_level)
    loop_factory = uvicorn.Config(lambda: None, log_config=None).get_loop_factory()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            status = runner.run(run(settings))
    except (StartRefusedByNode, InventoryError, presets.PresetsError) as error:
        err.print("[red]The service did not start:[/]", style=None)
        err.print(str(error), markup=False)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="model_id")],
    preset: Annotated[str, typer.Argument(help="task_preset")],
    metadata: Annotated[
        str, typer.Argument(help="The worker's input: a JSON object, or - for standard input.")
    ] = "{}",
    prompt: Annotated[str | None, typer.Option(help="Short for metadata {'prompt': ...}.")] = None,
    oneoff: Annotated[bool, typer.Option("--oneoff", help="In a container of its own.")] = False,
    session: Annotated[str | None, typer.Option(help="Queue behind this session.")] = None,
    difficulty: Annotated[str | None, typer.Option(help="low or high.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the task may run.")] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Do not follow it: print its id, and let it run without a reader."),
    ] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again with this key gives the same task.")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    tenant: TenantName = None,
) -> None:
    """Submit a task and follow its events. Exit status 0 when it completed, 1 when it did not."""
    try:
        given = orjson.loads(sys.stdin.buffer.read() if metadata == "-" else metadata)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"metadata is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise typer.BadParameter("metadata must be a JSON object")
    if prompt is not None:
        given["prompt"] = prompt
    body: dict[str, Any] = {
        "task_type": "oneoff" if oneoff else "session",
        "model_id": model,
        "task_preset": preset,
        "metadata": given,
    }
    for name, value in (
        ("session_id", session),
        ("task_difficulty", difficulty),
        ("timeout_seconds", timeout),
    ):
        if value is not None:
            body[name] = value

    if detach:
        task = _run(url, api_key, tenant, lambda client: client.submit_async(body, idempotency_key))
        out.print(orjson.dumps(task).decode() if as_json else task["task_id"], markup=False)
        return
    _follow(url, api_key, tenant, lambda client: client.submit(body, idempotency_key), as_json=as_json)


@tasks_app.command("follow")
def tasks_follow(
    task_id: str,
    after: Annotated[int, typer.Option(min=0, help="Only the events behind this id.")] = 0,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    tenant: TenantName = None,
) -> None:
    """Follow a task's events to its end. Exit status 1 when it did not complete."""
    _follow(url, api_key, tenant, lambda client: client.follow(task_id, after), as_json=as_json)


@tasks_app.command("show")
def tasks_show(task_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None) -> None:
    """Show one task as JSON."""
    _print_json(_run(url, api_key, tenant, lambda c: c.call("GET", f"/api/tasks/{task_id}")))


@tasks_app.command("cancel")
def tasks_cancel(
    task_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Cancel a task."""
    _print_json(_run(url, api_key, tenant, lambda c: c.call("DELETE", f"/api/tasks/{task_id}")))


def _follow(url: str, api_key: str | None, tenant: str | None, source: Any, *, as_json: bool) -> None:
    """Print the events that `source` gives for a client, and exit with 1 unless they end in `completed`."""

    async def show_all(client: Client) -> str:
        status, printer = "", EventPrinter(as_json=as_json)
        async for event in source(client):
            printer.show(event)
            if event.event == "task_finish":
                status = event.data["status"]
        return status

    if _run(url, api_key, tenant, show_all) not in ("completed", ""):
        raise typer.Exit(1)


class EventPrinter:
    """Prints a task's events: text as it flows, everything else a line each."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._in_text = False

    def show(self, event: TaskEvent) -> None:
        if self._as_json:
            line = orjson.dumps({"id": event.id, "event": event.event, "data": event.data})
            sys.stdout.write(line.decode() + "\n")
            sys.stdout.flush()
            return
        if event.event == "text_delta":
            self._in_text = True
            out.print(event.data["delta"], end="", markup=False)
            return
        if self._in_text:
            self._in_text = False
            out.print()
        details = " ".join(
            f"{name}={_short(value)}" for name, value in event.data.items() if value is not None
        )
        colour = {"error": "red", "task_finish": "green", "logs": "yellow"}.get(event.event, "cyan")
        out.print(f"[{colour}]{event.event:<12}[/] ", end="")
        out.print(details, markup=False)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."


@sessions_app.command("list")
def sessions_list(
    as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """List the tenant's sessions."""
    answer = _run(url, api_key, tenant, lambda client: client.call("GET", "/api/sessions"))
    if as_json:
        for session in answer["sessions"]:
            print(orjson.dumps(session).decode())
        return
    table = Table(
        Column("session", no_wrap=True, min_width=28),
        "model",
        "preset",
        "state",
        "slots",
        "running",
        "waiting",
        "done",
        "ends",
        box=None,
    )
    for session in answer["sessions"]:
        queue, expiry = session["queue"], session["expiry"]
        ends = session["close_reason"] or f"{expiry['effective']} ({expiry['reason']})"
        table.add_row(
            session["session_id"],
            session["model_id"],
            session["task_preset"],
            session["state"],
            ",".join(session["gpu_ids"]),
            *(str(n) for n in (queue["running"], queue["waiting"], session["tasks_done"])),
            ends,
        )
    out.print(table)


@sessions_app.command("show")
def sessions_show(
    session_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Show one session as JSON."""
    _print_json(_run(url, api_key, tenant, lambda c: c.call("GET", f"/api/sessions/{session_id}")))


@sessions_app.command("kill")
def sessions_kill(
    session_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Kill a session; its tasks are cancelled."""
    _print_json(_run(url, api_key, tenant, lambda c: c.call("DELETE", f"/api/sessions/{session_id}")))


@sessions_app.command("keepalive")
def sessions_keepalive(
    session_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Renew a session's idle deadline."""
    _print_json(_run(url, api_key, tenant, lambda c: c.call("POST", f"/api/sessions/{session_id}/keepalive")))


@slots_app.command("list")
def slots_list(url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """List this node's slots."""
    health = _run(url, api_key, None, lambda client: client.call("GET", "/health"))
    table = Table("slot", "uuid", "name", "tiers", "state", "fault", box=None)
    for slot in health["gpus"]:
        row = (slot["id"], slot["uuid"], slot["name"], ",".join(slot["tiers"]), slot["state"], slot["fault"])
        table.add_row(*(value or "" for value in row))
    out.print(table)


@slots_app.command("wash")
def slots_wash(slot_id: str, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Wash a quarantined slot again; it is free if the wash passes."""
    slot = _run(url, api_key, None, lambda client: client.call("POST", f"/api/slots/{slot_id}/wash"))
    out.print(f"slot {slot['id']}: {slot['state']}")


@presets_app.command("check")
def presets_check(
    file: Annotated[Path | None, typer.Argument(help="MODEL_PRESETS_FILE by default.")] = None,
) -> None:
    """Check a presets file; exit status 1 and a line for each mistake."""
    settings = _settings()
    path = file or settings.model_presets_file
    try:
        loaded = presets.load(path, settings.allowed_docker_images)
    except presets.PresetsError as error:
        for problem in error.problems:
            err.print(problem, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    refused = [(m, n, p.docker_image) for m, n, p in loaded if not loaded.allows(p.docker_image)]
    for model_id, name, image in refused:
        err.print(f"{path}: {model_id}.{name}: image {image} is not in ALLOWED_DOCKER_IMAGES", markup=False)
    if refused:
        raise typer.Exit(1)
    out.print(f"{path}: {sum(1 for _ in loaded)} presets, no mistakes")


def _settings() -> Settings:
    """The settings; each that is wrong is a line, without its value, and exit status 2."""
    try:
        return Settings()
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"]).upper() or "settings"
            err.print(f"[red]{name}[/]: {detail['msg']}")
        raise typer.Exit(2) from None


def _print_json(answer: dict[str, Any]) -> None:
    out.print_json(orjson.dumps(answer).decode())


def _run(url: str, api_key: str | None, tenant: str | None, work: Any) -> Any:
    """Run one conversation with the service; every way it can fail is one line and exit status 1."""
    if not api_key:
        err.print("[red]No API key:[/] set GPU_SERVER_API_KEY or give --api-key")
        raise typer.Exit(2)

    async def talk() -> Any:
        async with Client(url, api_key, tenant=tenant) as client:
            return await work(client)

    try:
        return asyncio.run(talk())
    except Refused as refused:
        err.print(str(refused), style="red", markup=False)
    except aiohttp.ClientError as error:
        message = f"The service at {url} cannot be reached: {error}; --url or GPU_SERVER_URL says where it is"
        err.print(message, style="red", markup=False)
    except KeyboardInterrupt:
        message = (
            "interrupted; a task that nobody reads is cancelled after a while, but for one with --detach"
        )
        err.print(message, style="yellow")
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
