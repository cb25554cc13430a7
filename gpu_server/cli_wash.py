"""The command line of wash certificates: `gpu-server wash verify`. It works on files, without the service."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from gpu_server.cli_sealed import PCR_BYTES, err, from_hex, out, read_document

if TYPE_CHECKING:
    from gpu_server.sealed.wash import Chain, Step, Verified

app = typer.Typer(no_args_is_help=True, help="Certificates of washes.")

MAX_FILE_BYTES = 256 * 1024
"""More than any certificate in JSON."""
HASH_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the verifier was told, which decides about what is proved."""

    node_key: bool
    head: bool
    document: str | None
    """The assurance of the verifier's own document."""
    pcr0: bool


@app.callback()
def _group() -> None:
    """Keeps `verify` a command of its own while it is the only one."""


@app.command("verify")
def verify(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Certificates of one slot, oldest first: CBOR or JSON; - reads stdin."
        ),
    ],
    node_key: Annotated[
        str | None, typer.Option(metavar="HEX", help="The node's public key, as you know it.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="HEX", help="Hash of the slot's newest record, as you know it.")
    ] = None,
    document: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="An attestation document of your own that lists the newest record."
        ),
    ] = None,
    pcr0: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEX",
            help="What PCR0 of the enclaves must be; may be repeated, then any of them will do.",
        ),
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="PEM", help="PEM of a root to trust, beside AWS's.", dir_okay=False),
    ] = None,
    allow_simulated: Annotated[
        bool, typer.Option("--allow-simulated", help="Accept a simulated enclave, which proves nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify certificates of washes: print what they prove and what not, or why one is refused (exit 1)."""
    from gpu_server.sealed.attestation import AWS_ROOT_SHA256, root_fingerprint
    from gpu_server.sealed.attestation import verify as verify_document
    from gpu_server.sealed.errors import AttestationRefused
    from gpu_server.sealed.wash import WashRefused, verify_chain

    if head is not None and document is not None:
        raise typer.BadParameter("--head and --document both name the newest record: give one of them")
    if [*files, document].count("-") > 1:
        raise typer.BadParameter("stdin can be read once")
    key = None if node_key is None else from_hex(node_key, "--node-key", HASH_BYTES)
    newest = None if head is None else from_hex(head, "--head", HASH_BYTES)
    wanted = {from_hex(text, "--pcr0", PCR_BYTES) for text in pcr0 or ()}
    try:
        roots = {AWS_ROOT_SHA256, *(root_fingerprint(path.read_bytes()) for path in root or ())}
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--root: {error}") from None
    own = None
    try:
        chain = verify_chain(
            [_certificate(file, index) for index, file in enumerate(files)],
            node_key=key,
            head=newest,
            enclave="required" if wanted else "any",
            roots=roots,
            allow_simulated=allow_simulated,
        )
        for index, certificate in enumerate(chain.certificates):
            found = certificate.attestation
            if wanted and (found is None or found.pcrs.get(0) not in wanted):
                raise WashRefused("document", "PCR0 is not what is expected", index=index, document="pcr")
        if document is not None:
            try:
                own = verify_document(
                    read_document(document),
                    nonce=None,
                    pcrs={},
                    roots=roots,
                    allow_simulated=allow_simulated,
                    at_document_time=True,
                )
                if wanted and own.pcrs.get(0) not in wanted:
                    raise AttestationRefused("pcr", "PCR0 is not what is expected")
                chain = chain.up_to(own.slots)
            except AttestationRefused as error:
                _refuse("head", f"{document}: refused ({error.reason}): {error}", error.reason)
    except WashRefused as error:
        _refuse(error.reason, f"{files[error.index]}: {error}", error.document)
    given = Given(
        node_key=key is not None,
        head=newest is not None,
        document=None if own is None else "simulated" if own.simulated else "isolated-worker",
        pcr0=bool(wanted),
    )
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(_json(chain, given), option=orjson.OPT_INDENT_2) + b"\n")
        sys.stdout.flush()
    else:
        for line in _lines(chain, given):
            out.print(line, markup=False)


def _refuse(reason: str, message: str, document: str | None) -> None:
    hint = "; --allow-simulated accepts a simulated one" if document == "root" else ""
    err.print(f"refused ({reason}): {message}{hint}", markup=False)
    raise typer.Exit(1)


def _certificate(file: str, index: int) -> bytes:
    """The certificate in a file: CBOR, or `certificate` of its JSON view, of which nothing else is read.

    Raises `WashRefused` (malformed).
    """
    from gpu_server.sealed.wash import WashRefused

    try:
        with sys.stdin.buffer if file == "-" else Path(file).open("rb") as source:
            data = source.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        err.print(f"{file}: {error.strerror}", markup=False)
        raise typer.Exit(2) from None
    if len(data) > MAX_FILE_BYTES:
        raise WashRefused("malformed", f"more than {MAX_FILE_BYTES} bytes", index=index)
    if not data.lstrip().startswith(b"{"):
        return data
    try:
        return base64.b64decode(orjson.loads(data)["certificate"], validate=True)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, binascii.Error):
        raise WashRefused(
            "malformed", "JSON without a certificate in base64 as `certificate`", index=index
        ) from None


# -- what is said -------------------------------------------------------------------------------------------


def proved(chain: Chain, given: Given) -> list[str]:
    """What follows from a chain that was verified with this."""
    key = chain.certificates[0].record.node_key.hex()
    who = "The node that you know by its key" if given.node_key else f"Whoever has the key {key}"
    found = [f"{who} has signed these records, and nothing in them was changed since."]
    if len(chain.certificates) > 1:
        found.append("The washes followed each other in this order, and none between them is left out.")
    if chain.from_first:
        found.append("The first names no certificate before it.")
    if given.head:
        found.append("The last is the newest that you know of (--head).")
    elif given.document == "isolated-worker" and given.pcr0:
        found.append("The enclave of --document was started with the last: it cannot be rewritten unnoticed.")
    if assurance(chain) == "isolated-worker" and given.pcr0:
        found.append(
            "Each enclave made its key after the record that it attests: before that wash nobody could give"
            " it a data key."
        )
    return found


def not_proved(chain: Chain, given: Given) -> list[str]:
    """What does not follow, whatever somebody may say."""
    found = []
    if not chain.head_checked:
        found.append("tail not checked: newer washes of this slot may be left out (--head or --document).")
    match given.document:
        case "simulated":
            found.append("Anything that --document says: its root is not AWS's, so it is simulated.")
        case "isolated-worker" if not given.pcr0:
            found.append("Which program the enclave of --document ran: --pcr0 was not given.")
    if given.document is not None:
        found.append(
            "That the last is the slot's newest: it is one of those that the host gave the enclave of"
            " --document at its start, which may be several of one slot."
        )
    if not chain.from_first:
        found.append("What came before the first of these.")
    if not given.node_key:
        found.append("Whose key it is that signed: --node-key was not given.")
    match assurance(chain):
        case "none":
            found.append("Anything about an enclave: not every certificate has a document.")
        case "simulated":
            found.append("Anything about an enclave: its root is not AWS's, so it is simulated.")
        case _ if not given.pcr0:
            found.append("Which program the enclave ran, and so how old its key is: --pcr0 was not given.")
    if assurance(chain) != "none":
        found.append("That the enclave before it is gone: the host says so. Its keys were other keys.")
    found.append("That the scrub ran, or reached all of the memory: the host says so.")
    found.append("Anything against root on the host.")
    return found


def assurance(chain: Chain) -> str:
    """The weakest of what stands behind its certificates: isolated-worker, simulated, or none."""
    attested = [certificate.attestation for certificate in chain.certificates]
    if any(one is None for one in attested):
        return "none"
    return "simulated" if any(one is not None and one.simulated for one in attested) else "isolated-worker"


def _json(chain: Chain, given: Given) -> dict[str, object]:
    from gpu_server.sealed.wash import view

    last = chain.certificates[-1]
    return {
        "slot_id": last.record.slot_id,
        "slot_uuid": last.record.slot_uuid,
        "node_key": last.record.node_key.hex(),
        "head": last.record_hash.hex(),
        "assurance": assurance(chain),
        "node_key_checked": given.node_key,
        "pcr0_checked": given.pcr0,
        "head_checked": chain.head_checked,
        "head_from": "head" if given.head else given.document and f"document ({given.document})",
        "from_first": chain.from_first,
        "proved": proved(chain, given),
        "not_proved": not_proved(chain, given),
        "certificates": [view(certificate) for certificate in chain.certificates],
    }


def _lines(chain: Chain, given: Given) -> Iterator[str]:
    last = chain.certificates[-1]
    yield f"slot {last.record.slot_id}, {last.record.slot_uuid}"
    for certificate in chain.certificates:
        yield from _certificate_lines(certificate)
    yield "proved:"
    yield from (f"  - {line}" for line in proved(chain, given))
    yield "not proved:"
    yield from (f"  - {line}" for line in not_proved(chain, given))


def _certificate_lines(certificate: Verified) -> Iterator[str]:
    record = certificate.record
    h = certificate.record_hash.hex()
    yield f"{_time(record.made_ms)}  {record.tier} wash, fence {record.fence}, h {h}"
    for step in record.steps:
        yield f"  {step.name}: {_step(step)}"
    if (found := certificate.attestation) is not None:
        kind = "simulated document" if found.simulated else "document"
        yield f"  {kind} of {found.timestamp:%Y-%m-%d %H:%M:%S} UTC, PCR0 {found.pcrs[0].hex()}"


def _step(step: Step) -> str:
    figures = (
        f", {name}={value.hex() if isinstance(value, bytes) else value}"
        for name, value in step.figures.items()
    )
    return f"{step.result.replace('_', ' ')} in {step.ended_ms - step.started_ms} ms{''.join(figures)}"


def _time(ms: int) -> str:
    # Not fromtimestamp: what a certificate says need not fit the platform's clock.
    return f"{datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S} UTC"
