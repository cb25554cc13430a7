"""The command line of the sealed path: `gpu-server attestation verify` and `gpu-server kms-emulator`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console

if TYPE_CHECKING:
    from gpu_server.kms_emulator import EmulatedKey
    from gpu_server.sealed.attestation import Attestation

attestation_app = typer.Typer(no_args_is_help=True, help="Attestation documents of enclaves.")

out = Console(highlight=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

MAX_FILE_BYTES = 1 << 20
PCR_BYTES = 48
Register = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HEX", help="What this register must be; may be repeated, then any of them will do."
    ),
]


@attestation_app.callback()
def _group() -> None:
    """Keeps `verify` a command of its own while it is the only one."""


@attestation_app.command("verify")
def verify(
    file: Annotated[str, typer.Argument(help="The document, CBOR or base64 of it; - reads stdin.")],
    at_document_time: Annotated[
        bool, typer.Option("--at-document-time", help="Verify a stored document as of when it was made.")
    ] = False,
    nonce: Annotated[str | None, typer.Option(metavar="HEX", help="The nonce it must answer.")] = None,
    pcr0: Register = None,
    pcr1: Register = None,
    pcr2: Register = None,
    pcr3: Register = None,
    pcr8: Register = None,
    allow_simulated: Annotated[
        bool, typer.Option("--allow-simulated", help="Accept a simulated enclave, which proves nothing.")
    ] = False,
    max_age: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How old it may be.")] = 300.0,
) -> None:
    """Verify an attestation document: print what it says as JSON, or why it is refused (exit 1)."""
    from gpu_server.sealed.attestation import verify as verify_document
    from gpu_server.sealed.errors import AttestationRefused

    given = {0: pcr0, 1: pcr1, 2: pcr2, 3: pcr3, 8: pcr8}
    expected = {
        index: {from_hex(text, f"--pcr{index}", PCR_BYTES) for text in texts}
        for index, texts in given.items()
        if texts
    }
    try:
        attestation = verify_document(
            read_document(file),
            nonce=None if nonce is None else from_hex(nonce, "--nonce"),
            pcrs={},  # below: of each, one of several
            allow_simulated=allow_simulated,
            at_document_time=at_document_time,
            max_age=max_age,
        )
        for index, wanted in expected.items():
            if attestation.pcrs.get(index) not in wanted:
                raise AttestationRefused("pcr", f"PCR{index} is not what is expected")
    except AttestationRefused as error:
        hint = "; --allow-simulated accepts a simulated one" if error.reason == "root" else ""
        err.print(f"refused ({error.reason}): {error}{hint}", markup=False)
        raise typer.Exit(1) from None
    if attestation.simulated:
        err.print("[yellow]This is a simulated enclave: the document proves nothing.[/]")
    sys.stdout.buffer.write(orjson.dumps(_shown(attestation), option=orjson.OPT_INDENT_2) + b"\n")
    sys.stdout.flush()


def kms_emulator(
    key: Annotated[
        list[str] | None, typer.Option(metavar="ARN", help="A key that there shall be; may be repeated.")
    ] = None,
    pcr0: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEX", help="Measurement of an enclave that may use the keys of --key. Without: any."
        ),
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="JSON: ARN -> {conditions, secret, enabled}.", dir_okay=False)
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="PEM of a root to trust, beside AWS's and simulated ones.", dir_okay=False),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 8002,
) -> None:
    """Run an emulator of AWS KMS, for tests and demonstrations only: it believes any credentials."""
    from gpu_server.kms_emulator import load_keys
    from gpu_server.sealed.attestation import root_fingerprint

    if pcr0 and not key:
        raise typer.BadParameter("--pcr0 is for the keys of --key: those of a file have their own conditions")
    keys: dict[str, EmulatedKey] = {}
    try:
        roots = [root_fingerprint(path.read_bytes()) for path in root or ()]
        if keys_file is not None:
            keys |= load_keys(keys_file.read_bytes())
        measurements = [from_hex(text, "--pcr0", PCR_BYTES).hex() for text in pcr0 or ()] or "*"
        conditions = {"kms:RecipientAttestation:ImageSha384": measurements}
        keys |= load_keys(orjson.dumps({arn: {"conditions": conditions} for arn in key or ()}))
    except (OSError, ValueError) as error:
        err.print(f"These keys cannot be used: {error}", markup=False)
        raise typer.Exit(2) from None
    if not keys:
        raise typer.BadParameter("name a key, with --key or in --keys-file")
    try:
        asyncio.run(_emulate(keys, roots, port))
    except OSError as error:
        err.print(f"Cannot listen on port {port}: {error.strerror}", markup=False)
        raise typer.Exit(1) from None


async def _emulate(keys: dict[str, EmulatedKey], roots: list[bytes], port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    from gpu_server.kms_emulator import KmsEmulator

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with KmsEmulator(keys, roots=roots, allow_simulated=True, port=port) as emulator:
        out.print(f"KMS emulator on {emulator.url}, for tests only: it protects nothing.")
        for arn, emulated in keys.items():
            out.print(f"  {arn} {dict(emulated.conditions) or ''}", markup=False)
        sys.stdout.flush()
        await stop.wait()


def read_document(file: str) -> bytes:
    """The bytes of a document, from a file or stdin; base64 text is decoded."""
    try:
        with sys.stdin.buffer if file == "-" else Path(file).open("rb") as source:
            data = source.read(MAX_FILE_BYTES)
    except OSError as error:
        err.print(f"{file}: {error.strerror}", markup=False)
        raise typer.Exit(2) from None
    # A document begins with a byte that is not ASCII.
    if data.isascii():
        try:
            return base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error:
            pass
    return data


def from_hex(text: str, option: str, size: int | None = None) -> bytes:
    """The bytes that an option names. Raises `typer.BadParameter`."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        raise typer.BadParameter(f"{option} is written in hex") from None
    if size is not None and len(value) != size:
        raise typer.BadParameter(f"{option} has {size} bytes, {2 * size} hex digits")
    return value


def _shown(attestation: Attestation) -> dict[str, object]:
    """JSON: bytes in hex; `epoch` and `slots` where the document is of this project's protocol."""
    from gpu_server.sealed.errors import AttestationRefused

    shown: dict[str, object] = {
        "assurance": "simulated" if attestation.simulated else "isolated-worker",
        "module_id": attestation.module_id,
        "timestamp": attestation.timestamp.isoformat(),
        "expires": attestation.expires.isoformat(),
        "pcrs": {f"PCR{index}": data.hex() for index, data in attestation.pcrs.items()},
        "public_key": _text(attestation.public_key),
        "user_data": _text(attestation.user_data),
        "nonce": _text(attestation.nonce),
    }
    try:
        shown["slots"] = [record.hex() for record in attestation.slots]
        shown["epoch"] = attestation.epoch.hex()
    except AttestationRefused:
        pass
    return shown


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.hex()
