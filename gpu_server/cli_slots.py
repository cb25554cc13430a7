"""`gpu-server slots`: the operator's view of the slots, of their washes, and the way out of quarantine."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.table import Table
from rich.text import Text

from gpu_server.cli_client import DEFAULT_URL, AsJson, Key, Url, converse, err, one_line, out

if TYPE_CHECKING:
    from gpu_server.sealed.wash import Chain, Verified

app = typer.Typer(
    no_args_is_help=True, help="Look at slots and their washes, and wash quarantined ones (operator)."
)

SHOWN = 12
"""Digits of a hash in a table."""
MAX_LISTED = 1000


@app.command("list")
def list_(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """List this node's slots: what is the matter with one, and what its wash is at."""
    slots = converse(url, api_key, None, lambda client: client.call("GET", "/api/slots"))["slots"]
    if as_json:
        for slot in slots:
            print(orjson.dumps(slot).decode())
        return
    table = Table("slot", "uuid", "name", "tiers", "state", "session", "newest wash", "matter", box=None)
    for slot in slots:
        row = (
            *(slot[name] for name in ("id", "uuid", "name")),
            ",".join(slot["tiers"]),
            slot["state"],
            slot["session_id"] or "",
            (slot["certificate"] or "")[:SHOWN],
            _matter(slot),
        )
        table.add_row(*(Text(one_line(cell)) for cell in row))
    out.print(table)


@app.command("wash")
def wash(slot_id: str, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Wash a quarantined slot again; it is free if the wash passes."""
    slot = converse(url, api_key, None, lambda client: client.call("POST", f"/api/slots/{slot_id}/wash"))
    out.print(f"slot {slot['id']}: {slot['state']}")


@app.command("certificates")
def certificates(
    slot_id: str,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", file_okay=False, help="Write them there, a file each."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LISTED, help="How many, of the newest.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """List a slot's newest certificates, oldest first; `gpu-server wash verify` says what they prove."""
    from gpu_server.sealed.wash import WashRefused

    path = f"/api/slots/{slot_id}/certificates?limit={limit}"
    found = converse(url, api_key, None, lambda client: client.call("GET", path))["certificates"]
    if not found:
        out.print(f"slot {slot_id} has no certificate yet", markup=False)
        return
    try:
        raws = [base64.b64decode(one["certificate"], validate=True) for one in found]
        chains = chains_of(raws)
    except (WashRefused, ValueError, KeyError, TypeError) as error:
        err.print(f"these are no certificates that follow each other: {one_line(str(error))}", markup=False)
        raise typer.Exit(1) from None
    table = Table("made", "wash", "fence", "h", box=None)
    for chain in chains:
        for certificate in chain.certificates:
            record = certificate.record
            table.add_row(utc(record.made_ms), record.tier, str(record.fence), certificate.record_hash.hex())
    out.print(table)
    for chain in chains[1:]:
        h = chain.certificates[0].record_hash.hex()
        err.print(f"another chain begins with {h}: verify it by itself", markup=False)
    if out_dir is not None:
        for file in save((one for chain in chains for one in chain.certificates), out_dir):
            out.print(str(file), markup=False)


def chains_of(raws: Sequence[bytes]) -> list[Chain]:
    """Certificates of one slot, oldest first, as the chains that they are: another begins with one that names
    none before it, with another device, and with another key of the node. Raises `WashRefused`."""
    from gpu_server.sealed.wash import NO_CERTIFICATE, verify_certificate, verify_chain

    chains: list[list[bytes]] = []
    last = None
    for raw in raws:
        record = verify_certificate(raw, node_key=None, allow_simulated=True).record
        of = (record.slot_uuid, record.node_key)
        if of != last or record.prev == NO_CERTIFICATE:
            chains.append([])
        chains[-1].append(raw)
        last = of
    return [verify_chain(chain, node_key=None, allow_simulated=True) for chain in chains]


def save(certificates: Iterable[Verified], folder: Path) -> list[Path]:
    """Write certificates into a folder, made where it is not there: `<slot>_<fence>_<made_ms>_<h>.cbor`, so
    that those of one slot are in order, also where a wash was interrupted and done again under its fence. The
    paths; exits with 2 where that cannot be done."""
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in certificates:
            slot = re.sub(r"[^A-Za-z0-9-]", "-", one.record.slot_id)
            when = f"{one.record.fence:020}_{one.record.made_ms:015}"
            path = folder / f"{slot}_{when}_{one.record_hash.hex()[:SHOWN]}.cbor"
            path.write_bytes(one.raw)
            paths.append(path)
    except OSError as error:
        err.print(f"{folder}: {error.strerror}", markup=False)
        raise typer.Exit(2) from None
    return paths


def utc(ms: int) -> str:
    """Milliseconds since 1970, to the second. Not by the platform's clock, which some of them do not fit."""
    return f"{datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S} UTC"


def _matter(slot: dict[str, Any]) -> str:
    if (washing := slot["wash"]) is not None:
        why = f"; {washing['reason']}" if washing["reason"] else ""
        return f"being washed: {', '.join(washing['steps'])}{why}"
    kept = f"kept for {slot['kept_for']}, who had it last" if slot["kept_for"] else ""
    return str(slot["fault"] or slot["doubt"] or kept)
