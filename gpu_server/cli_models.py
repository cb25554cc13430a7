"""The command line of the model store, `gpu-server models`: it works on the folder, without the service."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import structlog
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from gpu_server import presets
from gpu_server.drivers.model_folder import (
    FolderFault,
    FoundFile,
    compare,
    hash_files,
    read_manifest,
    scan,
    write_manifest,
)
from gpu_server.drivers.model_upload import UploadFailed
from gpu_server.drivers.model_upload import upload as send
from gpu_server.drivers.models import FolderModelStore, sources_of, store_of
from gpu_server.model_manifest import Manifest, ManifestError, dumps, is_derived, make
from gpu_server.ports import StartRefused
from gpu_server.settings import Settings

app = typer.Typer(no_args_is_help=True, help="The model store: look at it, verify, fetch and upload models.")

out = Console(highlight=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

Tell = Callable[[int, int | None], None]
ModelId = Annotated[str, typer.Argument(help="model_id: name, or org/name.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of the store, as `list` tells of it. `state` is `verified`, `unverified`, `no manifest`, or
    what is wrong with it."""

    model_id: str
    bytes: int
    files: int
    version: str | None
    state: str
    presets: tuple[str, ...]


@app.callback()
def _warnings_to_stderr() -> None:
    """What is worth a warning goes where it is no part of an answer."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """List the models that are there, and which presets use them."""
    settings = _settings()
    store, used = store_of(settings), _presets_by_model(settings)
    entries = [_entry(store, model_id, used.get(model_id, ())) for model_id in store.names()]
    if as_json:
        for entry in entries:
            fields = {name: getattr(entry, name) for name in Entry.__dataclass_fields__}
            out.print(orjson.dumps(fields).decode(), markup=False)
        return
    table = Table("model", "size", "files", "version", "state", "presets", box=None)
    for entry in entries:
        row = (entry.model_id, decimal(entry.bytes), str(entry.files), entry.version or "", entry.state)
        # As texts: versions and names of files are anybody's, and may look like markup.
        table.add_row(*map(Text, (*row, " ".join(entry.presets))))
    out.print(table)


@app.command()
def verify(
    model_ids: Annotated[
        list[str] | None, typer.Argument(help="Models; all that have a manifest by default.")
    ] = None,
) -> None:
    """Read models whole and compare them with their manifests. Exit status 1 and a line for each bad file."""
    store, bad = store_of(_settings(), fetching=False), False
    for model_id in model_ids or [name for name in store.names() if _has_manifest(store, name)]:
        faults = _run(f"verifying {model_id}", partial(store.faults, model_id))
        for fault in faults:
            err.print(f"{model_id}: {fault}", style="red", markup=False)
        bad = bad or bool(faults)
        if not faults:
            out.print(f"{model_id}: as its manifest says", markup=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def fetch(model_id: ModelId) -> None:
    """Fetch a model into the store, from MODEL_SOURCE_S3_URI or else FILE_SERVICE_URL, and verify it."""
    settings = _settings()
    store = store_of(settings, fetching=True)
    try:
        there = store.find(model_id) is not None
    except ValueError as error:
        raise _failed(str(error)) from None
    if not there and not sources_of(settings):
        err.print("[red]There is no source:[/] set MODEL_SOURCE_S3_URI or FILE_SERVICE_URL")
        raise typer.Exit(2)
    folder = _run(f"fetching {model_id}", partial(store.prepare, model_id))
    out.print(f"{model_id}: {folder}", markup=False)


@app.command()
def manifest(
    model_id: ModelId,
    version: Annotated[
        str | None, typer.Option(help="Name of this version; made of the files' hashes by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a manifest that says otherwise.")] = False,
) -> None:
    """Write manifest.json for a model that is in the store, from the files as they are."""
    store = store_of(_settings())
    folder, old, found = _look(store, model_id, broken_manifest=force)
    visible = [file for file in found if not file.hidden]
    try:
        hashed = _run(f"reading {model_id}", lambda tell: hash_files(folder, visible, tell))
        new = make(hashed, version)
        if old is not None and version is None and not is_derived(old):
            new = make(hashed, old.version)  # somebody's name for it
        if old is not None and old != new and not force:
            raise FolderFault("manifest.json", "is there and says otherwise; --force replaces it")
        if old != new:
            write_manifest(folder, dumps(new))
    except (FolderFault, ManifestError) as error:
        raise _failed(f"{model_id}: {error}") from None
    except OSError as error:
        raise _failed(f"{model_id}: manifest.json cannot be written: {error.strerror}") from None
    store.verified.remember(folder, new, found)
    out.print(f"{model_id}: version {new.version}, {len(new.files)} files, {new.total} bytes", markup=False)


@app.command()
def upload(
    model_id: ModelId,
    to: Annotated[
        str | None, typer.Option(help="s3://bucket/prefix; MODEL_SOURCE_S3_URI by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another version that is there.")] = False,
) -> None:
    """Verify a model and put it into S3, its manifest last. What is there already is not sent again."""
    settings = _settings() if to is None else _settings(model_source_s3_uri=to)
    uri = settings.model_source_s3_uri
    if uri is None:
        err.print("[red]Where to?[/] set MODEL_SOURCE_S3_URI or give --to")
        raise typer.Exit(2)
    store = store_of(settings, fetching=False)
    _run(f"verifying {model_id}", partial(store.prepare, model_id))
    folder, wanted, found = _look(store, model_id)
    if wanted is None:
        raise _failed(f"{model_id}: has no manifest.json; `gpu-server models manifest` writes one")
    done = _run(
        f"uploading {model_id}",
        lambda tell: send(uri, model_id, folder, wanted, found, tell, force=force),
    )
    out.print(f"{model_id}: {len(done.sent)} files sent, {done.kept} were there", markup=False)
    for path in done.strays:
        err.print(f"{uri}/{model_id}/{path} is not in the manifest: remove it", style="yellow", markup=False)


def _entry(store: FolderModelStore, model_id: str, used_by: tuple[str, ...]) -> Entry:
    folder, wanted = store.find(model_id), None
    found: tuple[FoundFile, ...] = ()
    try:
        if folder is None:
            raise FolderFault(model_id, "is gone")
        found = scan(folder)
        wanted = read_manifest(folder)
        if wanted is None:
            state = "no manifest"
        elif faults := compare(wanted, found):
            state = str(faults[0])
        else:
            state = "verified" if store.verified.knows(folder, wanted, found) else "unverified"
    except FolderFault as fault:
        state = str(fault)
    return Entry(
        model_id=model_id,
        bytes=sum(file.size for file in found),
        files=len(found),
        version=wanted.version if wanted is not None else None,
        state=state,
        presets=used_by,
    )


def _has_manifest(store: FolderModelStore, model_id: str) -> bool:
    """Whether there is one; a broken one is one."""
    folder = store.find(model_id)
    try:
        return folder is not None and read_manifest(folder) is not None
    except FolderFault:
        return True


def _look(
    store: FolderModelStore, model_id: str, *, broken_manifest: bool = False
) -> tuple[Path, Manifest | None, tuple[FoundFile, ...]]:
    """Folder, manifest and files of a model; exit status 1 when it is not there or cannot be used."""
    folder = None
    with suppress(ValueError):
        folder = store.find(model_id)
    if folder is None:
        raise _failed(f"model {model_id} is not in the model store")
    try:
        found = scan(folder)
        try:
            return folder, read_manifest(folder), found
        except FolderFault:
            if broken_manifest:
                return folder, None, found
            raise
    except FolderFault as fault:
        raise _failed(f"{model_id}: {fault}") from None


def _presets_by_model(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The presets that use each model's folder; none where the presets file cannot be used."""
    used: dict[str, tuple[str, ...]] = {}
    with suppress(presets.PresetsError):
        for model_id, name, preset in presets.load(settings.model_presets_file, ()):
            if preset.model == "folder":
                used[model_id] = (*used.get(model_id, ()), name)
    return used


def _run(title: str, work: Callable[[Tell], Coroutine[Any, Any, Any]]) -> Any:
    """Do something long, and show on a terminal how far it is; every way it can fail is exit status 1."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    try:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task(title, total=None)

            def tell(done: int, total: int | None) -> None:
                progress.update(task, completed=done, total=total)

            return asyncio.run(work(tell))
    except StartRefused as refused:
        raise _failed(refused.message) from None
    except (UploadFailed, FolderFault) as error:
        raise _failed(str(error)) from None
    except KeyboardInterrupt:
        raise _failed("interrupted; the next try goes on from here where it can") from None


def _failed(message: str) -> typer.Exit:
    err.print(message, style="red", markup=False)
    return typer.Exit(1)


def _settings(**changes: str) -> Settings:
    """The settings; each that is wrong is a line, without its value, and exit status 2."""
    try:
        return Settings(**changes)  # type: ignore[arg-type]
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"]).upper() or "settings"
            err.print(f"[red]{name}[/]: {detail['msg']}")
        raise typer.Exit(2) from None
