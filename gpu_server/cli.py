"""The command line: `gpu-server serve`, `submit`, and what looks at tasks, sessions, slots and presets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import orjson
import typer
import uvicorn
from pydantic import ValidationError
from rich.table import Column, Table

from gpu_server import __version__, cli_models, cli_sealed, cli_slots, cli_wash, log, presets
from gpu_server.cli_client import (
    DEFAULT_URL,
    AsJson,
    Key,
    TenantName,
    Url,
    converse,
    err,
    follow,
    out,
    print_json,
)
from gpu_server.cli_submit import submit
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
app.add_typer(cli_slots.app, name="slots")
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_sealed.attestation_app, name="attestation")
app.add_typer(cli_wash.app, name="wash")
app.command("kms-emulator")(cli_sealed.kms_emulator)


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


app.command()(submit)


@tasks_app.command("follow")
def tasksfollow(
    task_id: str,
    after: Annotated[int, typer.Option(min=0, help="Only the events behind this id.")] = 0,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    tenant: TenantName = None,
) -> None:
    """Follow a task's events to its end. Exit status 1 when it did not complete."""
    follow(url, api_key, tenant, lambda client: client.follow(task_id, after), as_json=as_json)


@tasks_app.command("show")
def tasks_show(task_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None) -> None:
    """Show one task as JSON."""
    print_json(converse(url, api_key, tenant, lambda c: c.call("GET", f"/api/tasks/{task_id}")))


@tasks_app.command("cancel")
def tasks_cancel(
    task_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Cancel a task."""
    print_json(converse(url, api_key, tenant, lambda c: c.call("DELETE", f"/api/tasks/{task_id}")))


@sessions_app.command("list")
def sessions_list(
    as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """List the tenant's sessions."""
    answer = converse(url, api_key, tenant, lambda client: client.call("GET", "/api/sessions"))
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
    print_json(converse(url, api_key, tenant, lambda c: c.call("GET", f"/api/sessions/{session_id}")))


@sessions_app.command("kill")
def sessions_kill(
    session_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Kill a session; its tasks are cancelled."""
    print_json(converse(url, api_key, tenant, lambda c: c.call("DELETE", f"/api/sessions/{session_id}")))


@sessions_app.command("keepalive")
def sessions_keepalive(
    session_id: str, url: Url = DEFAULT_URL, api_key: Key = None, tenant: TenantName = None
) -> None:
    """Renew a session's idle deadline."""
    print_json(
        converse(url, api_key, tenant, lambda c: c.call("POST", f"/api/sessions/{session_id}/keepalive"))
    )


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


@presets_app.command("list")
def presets_list(
    file: Annotated[Path | None, typer.Argument(help="MODEL_PRESETS_FILE by default.")] = None,
) -> None:
    """List what tasks may ask for: the models of a presets file and the presets of each."""
    settings = _settings()
    try:
        loaded = presets.load(file or settings.model_presets_file, settings.allowed_docker_images)
    except presets.PresetsError as error:
        for problem in error.problems:
            err.print(problem, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    table = Table(
        "model_id", "task_preset", "contract", "gpus", "openai", "sealed", "pools", "image", box=None
    )
    for model_id, name, preset in loaded:
        openai = "yes" if preset.openai else ""
        sealed = preset.workload(model_id, name).sealed
        pools = ",".join(loaded.pools_of(model_id, name))
        row = (preset.contract, str(preset.gpus), openai, sealed, pools, preset.docker_image)
        table.add_row(model_id, name, *row)
    out.print(table)


def _settings() -> Settings:
    """The settings; each that is wrong is a line, without its value, and exit status 2."""
    try:
        return Settings()
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"]).upper() or "settings"
            err.print(f"[red]{name}[/]: {detail['msg']}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
