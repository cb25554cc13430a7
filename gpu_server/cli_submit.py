"""`gpu-server submit`: a task and its events, in clear or sealed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from gpu_server.cli_client import (
    DEFAULT_URL,
    AsJson,
    EventPrinter,
    Key,
    TenantName,
    Url,
    converse,
    err,
    exit_with,
    follow,
    left,
    one_line,
    out,
    show_all,
)
from gpu_server.cli_sealed import from_hex
from gpu_server.cli_slots import save, utc
from gpu_server.client import AwsDataKeys, Client, Expected, Malformed, SealedSession, open_sealed
from gpu_server.client.sealed import OPEN_SECONDS
from gpu_server.client.washes import NODE_KEY_BYTES
from gpu_server.sealed.names import region_of

SEALED = "Sealed tasks"


def _register(index: int, what: str) -> Any:
    """The option for one measurement of the enclave; repeated, any of its values will do."""
    return typer.Option(
        f"--pcr{index}",
        metavar="HEX",
        help=f"PCR{index} of the enclave: {what}; may be repeated, then any of them will do.",
        rich_help_panel=SEALED,
        show_default=False,
    )


Pcr0 = Annotated[
    list[str] | None, _register(0, "the whole program; this or --pcr8 is needed, but for --allow-simulated")
]
Pcr1 = Annotated[list[str] | None, _register(1, "kernel and first ramdisk")]
Pcr2 = Annotated[list[str] | None, _register(2, "the application")]
Pcr3 = Annotated[list[str] | None, _register(3, "the IAM role of its machine")]
Pcr8 = Annotated[list[str] | None, _register(8, "the certificate that signed it")]


def submit(
    model: Annotated[str | None, typer.Argument(help="model_id", show_default=False)] = None,
    preset: Annotated[str | None, typer.Argument(help="task_preset", show_default=False)] = None,
    metadata: Annotated[
        str, typer.Argument(help="The worker's input: a JSON object, or - for standard input.")
    ] = "{}",
    prompt: Annotated[str | None, typer.Option(help="Short for metadata {'prompt': ...}.")] = None,
    oneoff: Annotated[bool, typer.Option("--oneoff", help="In a container of its own.")] = False,
    session: Annotated[
        str | None,
        typer.Option(help="Queue behind this session; a sealed one with the --kms-key of its start."),
    ] = None,
    difficulty: Annotated[str | None, typer.Option(help="low or high.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the task may run.")] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Do not follow it: print its id, and let it run without a reader."),
    ] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again with this key gives the same task.")
    ] = None,
    sealed: Annotated[
        bool,
        typer.Option(
            "--sealed", help="So that only the session's worker can read it.", rich_help_panel=SEALED
        ),
    ] = False,
    kms_key: Annotated[
        str | None,
        typer.Option(
            metavar="ARN", help="The KMS key to seal under.", rich_help_panel=SEALED, show_default=False
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="What shall serve it, instead of model and preset.",
            rich_help_panel=SEALED,
            show_default=False,
        ),
    ] = None,
    pcr0: Pcr0 = None,
    pcr1: Pcr1 = None,
    pcr2: Pcr2 = None,
    pcr3: Pcr3 = None,
    pcr8: Pcr8 = None,
    allow_simulated: Annotated[
        bool,
        typer.Option(
            "--allow-simulated",
            help="Accept a simulated enclave, which protects nothing.",
            rich_help_panel=SEALED,
        ),
    ] = False,
    kms_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="KMS_ENDPOINT_URL",
            help="A KMS that is elsewhere.",
            rich_help_panel=SEALED,
            show_default=False,
        ),
    ] = None,
    open_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"How long the session may take to be open; by default {OPEN_SECONDS:g}.",
            rich_help_panel=SEALED,
            show_default=False,
        ),
    ] = None,
    check_washes: Annotated[
        bool,
        typer.Option(
            "--check-washes/--no-check-washes",
            help="Whether it must be proven that its slots were washed.",
            rich_help_panel=SEALED,
        ),
    ] = True,
    node_key: Annotated[
        str | None,
        typer.Option(
            metavar="HEX",
            help="The key of the node whose certificates are accepted.",
            rich_help_panel=SEALED,
            show_default=False,
        ),
    ] = None,
    save_certificates: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="Keep the certificates of the washes before it, and behind it where it ends with this.",
            rich_help_panel=SEALED,
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Leave the session for later tasks (--session).", rich_help_panel=SEALED),
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    tenant: TenantName = None,
) -> None:
    """Submit a task and follow its events. Exit status 0 when it completed, 1 when it did not.

    With --sealed and a --pool or a --session, the metadata may be the only argument.
    """
    if sealed and (pool or session) and model is not None and preset is None and metadata == "{}":
        metadata, model = model, None
    given = _metadata(metadata, prompt)
    if not sealed:
        only_sealed = {
            "--kms-key": kms_key,
            "--pool": pool,
            "--pcr0": pcr0,
            "--pcr1": pcr1,
            "--pcr2": pcr2,
            "--pcr3": pcr3,
            "--pcr8": pcr8,
            "--allow-simulated": allow_simulated,
            "--open-seconds": open_seconds is not None,
            "--no-check-washes": not check_washes,
            "--node-key": node_key,
            "--save-certificates": save_certificates,
            "--keep": keep,
        }
        _none_of(only_sealed, "is for --sealed")
        if model is None or preset is None:
            raise typer.BadParameter("name a model_id and a task_preset")
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
            task = converse(url, api_key, tenant, lambda client: client.submit_async(body, idempotency_key))
            out.print(orjson.dumps(task).decode() if as_json else task["task_id"], markup=False)
            return
        follow(url, api_key, tenant, lambda client: client.submit(body, idempotency_key), as_json=as_json)
        return

    only_plain = {
        "--oneoff": oneoff,
        "--timeout": timeout,
        "--detach": detach,
        "--idempotency-key": idempotency_key,
    }
    _none_of(only_plain, "cannot be had with --sealed")
    options: dict[str, Any] = {
        "kms_key_arn": _kms_key(kms_key),
        "pool": pool,
        "model_id": model,
        "task_preset": preset,
        "task_difficulty": difficulty,
        "session_id": session,
        "expect": _expected(pcr0, pcr1, pcr2, pcr3, pcr8, allow_simulated=allow_simulated),
        "keys": AwsDataKeys(endpoint_url=kms_endpoint),
        "allow_simulated": allow_simulated,
        "keep": keep,
        "check_washes": check_washes,
        "node_key": None if node_key is None else from_hex(node_key, "--node-key", NODE_KEY_BYTES),
        "open_seconds": OPEN_SECONDS if open_seconds is None else open_seconds,
        "on_wait": _tell_wait,
    }
    if not check_washes and (node_key or save_certificates):
        raise typer.BadParameter("--node-key and --save-certificates are for washes that are checked")
    if (model is None) != (preset is None) or not (pool or model or session):
        raise typer.BadParameter("name a --pool, a model_id and a task_preset, or a --session")
    if (model is not None and (pool or session)) or (session and difficulty is not None):
        raise typer.BadParameter(
            "a pool has its model and preset, a session its difficulty too: leave them out"
        )

    stays = session is not None

    async def seal(client: Client) -> str | None:
        nonlocal stays
        async with await open_sealed(client, **options) as opened:
            stays = stays or keep  # before that, it is ended all the same
            _tell(opened, to_stderr=as_json, keep=keep)
            if save_certificates is not None:
                save(opened.washes, save_certificates)
            printer = EventPrinter(as_json=as_json, sealed=True)
            status = await show_all(opened.submit(given), printer)
        if save_certificates is not None and not stays:
            _tell_wait("waiting for the washes behind the session")
            save(await opened.certificates_after(), save_certificates)
        return status

    def interrupted() -> str:
        return left() if stays else "interrupted; what was started for it is ended"

    exit_with(converse(url, api_key, tenant, seal, interrupted))


def _metadata(text: str, prompt: str | None) -> dict[str, Any]:
    try:
        given = orjson.loads(sys.stdin.buffer.read() if text == "-" else text)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"metadata is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise typer.BadParameter("metadata must be a JSON object")
    return given if prompt is None else {**given, "prompt": prompt}


def _none_of(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def _kms_key(arn: str | None) -> str:
    if arn is None:
        raise typer.BadParameter("--sealed needs --kms-key")
    try:
        region_of(arn)
    except Malformed as error:
        raise typer.BadParameter(f"--kms-key: {error}") from None
    return arn


def _expected(*given: list[str] | None, allow_simulated: bool) -> Expected:
    """Of PCR0, 1, 2, 3 and 8."""
    pcr0, pcr1, pcr2, pcr3, pcr8 = (values or None for values in given)
    try:
        expected = Expected(pcr0=pcr0, pcr1=pcr1, pcr2=pcr2, pcr3=pcr3, pcr8=pcr8)
        if not expected.names_a_program and not allow_simulated:
            raise ValueError(
                "--sealed needs --pcr0 or --pcr8: without either any enclave would do; to try it out without"
                " an enclave, --allow-simulated"
            )
        return expected
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _tell(session: SealedSession, *, to_stderr: bool, keep: bool) -> None:
    """What this client has verified, before anything is sealed."""
    to = err if to_stderr else out
    if session.assurance == "simulated":
        to.print("[yellow]sealed: simulated enclave, proves nothing[/]")
    else:
        to.print(f"[green]sealed: {session.assurance}, PCR0 {session.attestation.pcrs[0].hex()}[/]")
    to.print(_washes(session))
    if keep:
        to.print(f"session: {session.session_id}", markup=False)


def _washes(session: SealedSession) -> str:
    """What is proven of the washes before it, in one line."""
    if not session.washes:
        return "[yellow]washes: not checked[/]"
    slots = ", ".join(f"slot {one.record.slot_id} at {utc(one.record.made_ms)}" for one in session.washes)
    said = f"washed before: {slots}; certified by node {session.washes[0].record.node_key.hex()}"
    colour = "yellow" if session.assurance == "simulated" else "green"
    return f"[{colour}]{said}[/]"


def _tell_wait(reason: str) -> None:
    """Why the session is not open yet, in the service's words."""
    err.print(one_line(reason), style="yellow", markup=False)
