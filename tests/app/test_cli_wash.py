"""`gpu-server wash verify`, as a user calls it."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner

from gpu_server.cli import app
from gpu_server.cli_wash import Given, assurance, not_proved, proved
from gpu_server.sealed.wash import Chain, encode_record, hash_of, verify_chain, view
from tests.sealed.documents import PCRS, Forge
from tests.sealed.washes import (
    ALONE,
    GPU,
    MADE,
    NOBODY,
    NODE_KEY,
    OLDER,
    STAND_IN,
    chain,
    document,
    listing,
    record,
    record_hash,
    sign,
    steps,
    verified,
    washed,
)

PCR0 = PCRS[0].hex()
LINKS = chain(3)
HEAD = record_hash(LINKS[2])
KNOWN = ("--node-key", NODE_KEY.hex(), "--pcr0", PCR0, "--allow-simulated")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


def verify(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    """Run `wash verify`."""
    return CliRunner().invoke(app, ["wash", "verify", *map(str, arguments)], input=stdin)


def shown(*arguments: str | Path) -> dict[str, Any]:
    """What `--json` prints."""
    result = verify(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A chain of three."""
    paths = [tmp_path / f"{place}.cbor" for place in range(len(LINKS))]
    for path, raw in zip(paths, LINKS, strict=True):
        path.write_bytes(raw)
    return paths


def kept(folder: Path, raw: bytes, name: str = "one.cbor") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def test_a_chain(files: list[Path]) -> None:
    """With all that can be known, everything about a chain is proved but what the host alone can say; and an
    enclave that is simulated proves nothing."""
    result = verify(*files, *KNOWN, "--head", HEAD.hex())
    assert result.exit_code == 0, result.output
    first, *lines = result.stdout.splitlines()
    assert first == f"slot 0, {GPU}"
    assert lines[0] == f"2026-03-04 05:06:07 UTC  full wash, fence 0, h {record_hash(LINKS[0]).hex()}"
    assert "  scrub: passed in 10 ms, bytes_seen=1099511627776, device=NVIDIA L40S, digest=0102" in lines
    assert lines[6] == f"  simulated document of 2026-03-04 05:06:07 UTC, PCR0 {PCR0}"
    middle = lines.index("not proved:")
    said, rest = lines[lines.index("proved:") + 1 : middle], lines[middle + 1 :]
    assert len(said) == 4
    assert "The node that you know by its key" in said[0]
    assert "in this order" in said[1]
    assert "names no certificate before it" in said[2]
    assert "(--head)" in said[3]
    assert rest == [
        "  - Anything about an enclave: its root is not AWS's, so it is simulated.",
        "  - That the enclave before it is gone: the host says so. Its keys were other keys.",
        "  - That the scrub ran, or reached all of the memory: the host says so.",
        "  - Anything against root on the host.",
    ]


def test_without_knowledge(files: list[Path]) -> None:
    """What nobody said is not proved: whose key it is, what came before, and whether the tail was cut."""
    result = verify(*files[1:2], "--allow-simulated")
    assert result.exit_code == 0
    assert f"Whoever has the key {NODE_KEY.hex()} has signed" in result.stdout
    for line in ("tail not checked", "What came before the first", "--node-key was not given"):
        assert line in result.stdout.partition("not proved:")[2]


def test_json(files: list[Path]) -> None:
    """The same for programs, with every certificate in full."""
    found = shown(*files, *KNOWN, "--head", HEAD.hex())
    assert found["slot_id"] == "0"
    assert found["head"] == HEAD.hex()
    shown_raw = [one["certificate"] for one in found["certificates"]]
    assert shown_raw == [b64encode(raw).decode() for raw in LINKS]
    checked = ("node_key_checked", "pcr0_checked", "head_checked", "from_first")
    assert [found[name] for name in checked] == [True] * 4
    assert found["head_from"] == "head"
    assert found["assurance"] == "simulated"
    bare = shown(files[1], "--allow-simulated")
    assert [bare[name] for name in checked] == [False] * 4
    assert bare["head_from"] is None
    assert any("tail not checked" in line for line in bare["not_proved"])


def test_another_root(tmp_path: Path) -> None:
    """A root of one's own is trusted when it is named, and is called what it is; otherwise the certificate is
    refused, with a hint."""
    forge = Forge()
    pem = x509.load_der_x509_certificate(forge.root.der).public_bytes(Encoding.PEM)
    root = kept(tmp_path, pem, "root.pem")
    raw = encode_record(record())
    made = forge.document({"nonce": hash_of(raw), "user_data": listing(OLDER, hash_of(raw))})
    path = kept(tmp_path, sign(raw, made))
    assert shown(path, "--root", root, "--pcr0", PCR0)["assurance"] == "simulated"
    result = verify(path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"refused (document): {path}: ")
    assert result.stderr.rstrip().endswith("--allow-simulated accepts a simulated one")


def on_hardware() -> Chain:
    """The chain as it would be if its documents were of AWS's root."""
    found = verify_chain(LINKS, node_key=NODE_KEY, allow_simulated=True)
    real = []
    for one in found.certificates:
        assert one.attestation is not None
        real.append(replace(one, attestation=replace(one.attestation, simulated=False)))
    return replace(found, certificates=tuple(real))


def test_what_hardware_proves() -> None:
    """With AWS's root and PCR0 the age of the enclave's key is proved, with the root alone it is not; never
    is it that the scrub ran, or anything against root."""
    given = Given(node_key=True, head=False, document="isolated-worker", pcr0=True)
    chain = on_hardware().up_to([HEAD])
    assert assurance(chain) == "isolated-worker"
    assert [line.split()[0] for line in proved(chain, given)] == ["The", "The", "The", "The", "Each"]
    assert "--document" in proved(chain, given)[3]
    assert len(not_proved(chain, given)) == 4
    assert "several of one slot" in not_proved(chain, given)[0]
    given = replace(given, pcr0=False)
    assert [line.split()[0] for line in proved(chain, given)] == ["The", "The", "The"]
    assert "Which program the enclave of --document ran: --pcr0 was not given." in not_proved(chain, given)
    assert any("--pcr0 was not given" in line for line in not_proved(chain, given))
    mixed = replace(
        chain, certificates=(replace(chain.certificates[0], attestation=None), *chain.certificates[1:])
    )
    assert assurance(mixed) == "none"


def test_without_an_enclave(tmp_path: Path) -> None:
    """A certificate without a document is worth the node's signature, unless an enclave is asked for."""
    path = kept(tmp_path, washed(**NOBODY, **STAND_IN, **ALONE))
    found = shown(path)
    assert found["assurance"] == "none"
    assert any(line.startswith("Anything about an enclave") for line in found["not_proved"])
    result = verify(path, "--pcr0", PCR0)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "refused (document)" in result.stderr


def test_forms_of_a_file(tmp_path: Path) -> None:
    """CBOR and the JSON view, from files and from stdin. Of the view only the certificate is believed."""
    seen = view(verified(LINKS[0]))
    seen["record"]["slot_id"] = "9"
    as_json = orjson.dumps(seen, option=orjson.OPT_INDENT_2)
    assert shown(kept(tmp_path, b"\n " + as_json, "one.json"), "--allow-simulated")["slot_id"] == "0"
    for data in (LINKS[0], as_json):
        assert verify("-", "--allow-simulated", stdin=data).exit_code == 0
    mixed = [kept(tmp_path, as_json, "a"), kept(tmp_path, LINKS[1], "b")]
    assert len(shown(*mixed, "--allow-simulated")["certificates"]) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"{",
        b"{}",
        b'{"certificate": 5}',
        b'{"certificate": null}',
        b'{"certificate": "%%"}',
        b'{"certificate": "aGVsbG8="}',
        b"[1]",
        bytes(1 << 20),
        b"{" + b" " * (1 << 20),
        b"\x9b" + b"\xff" * 8,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_certificate(data: bytes) -> None:
    """Anything else is refused in one line."""
    result = verify("-", stdin=data)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("refused (malformed): -: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("order", "options", "reason", "culprit"),
    [
        ("02", (), "order", 2),
        ("10", (), "order", 0),
        ("0112", (), "order", 1),
        ("01", ("--head", HEAD.hex()), "head", 1),
        ("012", ("--node-key", "00" * 32), "node_key", 0),
        ("012", ("--pcr0", "11" * 48), "document", 0),
    ],
)
def test_refusals(files: list[Path], order: str, options: tuple[str, ...], reason: str, culprit: int) -> None:
    """One line says why, and which file it is; nothing is printed as if it were verified."""
    for form in ((), ("--json",)):
        result = verify(*(files[int(place)] for place in order), "--allow-simulated", *options, *form)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"refused ({reason}): {files[culprit]}: ")
        assert result.stderr.count("\n") == 1


def test_a_tampered_file(files: list[Path]) -> None:
    """A bit of the signature, and the file is named."""
    files[1].write_bytes(LINKS[1][:-1] + bytes([LINKS[1][-1] ^ 1]))
    result = verify(*files, "--allow-simulated")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"refused (signature): {files[1]}: ")


def test_several_programs(tmp_path: Path) -> None:
    """Any of several PCR0 will do: for chains that reach over an upgrade."""
    path = kept(tmp_path, LINKS[0])
    assert verify(path, "--allow-simulated", "--pcr0", "11" * 48, "--pcr0", PCR0.upper()).exit_code == 0


def test_a_document_as_head(files: list[Path], tmp_path: Path) -> None:
    """A client's own document checks the tail: it lists the newest record. What it proves is said as well."""
    own = kept(tmp_path, document(b"n" * 32, user_data=listing(OLDER, HEAD)), "own.cbor")
    found = shown(*files, *KNOWN, "--document", own)
    assert (found["head_checked"], found["head_from"]) == (True, "document (simulated)")
    assert any("--document" in line and "simulated" in line for line in found["not_proved"])
    text = kept(tmp_path, b64encode(own.read_bytes()), "own.b64")
    assert shown(*files, *KNOWN, "--document", text)["head_checked"]
    cut = verify(*files[:2], *KNOWN, "--document", own)
    assert cut.exit_code == 1
    assert cut.stderr.startswith(f"refused (head): {files[1]}: ")


def test_documents_that_are_refused(files: list[Path], tmp_path: Path) -> None:
    """A document of another root, program or protocol says nothing about the tail."""
    other = kept(
        tmp_path, Forge().document({"user_data": listing(HEAD), "pcrs": {0: b"\7" * 48}}), "other.cbor"
    )
    alien = kept(tmp_path, document(b"n" * 32, user_data=None), "alien.cbor")
    none = kept(tmp_path, b"hello", "none.cbor")
    for path, reason in ((other, "pcr"), (alien, "malformed"), (none, "malformed")):
        result = verify(*files, *KNOWN, "--document", path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"refused (head): {path}: refused ({reason})" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--node-key", "00"),
        ("--node-key", "xyz"),
        ("--head", "00"),
        ("--pcr0", "00"),
        ("--root", "/nonexistent"),
        ("--root", __file__),
        ("--head", "00" * 32, "--document", __file__),
        ("--document", "/nonexistent"),
        ("-", "-"),
        ("/nonexistent",),
    ],
)
def test_bad_options(files: list[Path], options: tuple[str, ...]) -> None:
    """An option that cannot be meant, or a file that is not there, is an error of usage: never a weaker
    check."""
    result = verify(*files, *options, "--allow-simulated")
    assert (result.exit_code, result.stdout) == (2, "")


def test_no_file() -> None:
    """Without a file there is nothing to verify."""
    assert verify().exit_code == 2


def test_nothing_that_a_certificate_says_looks_like_ours(tmp_path: Path) -> None:
    """Markup in a figure is shown as it stands; line ends and control characters cannot be in one."""
    first, *rest = steps(MADE, enclave="not_applicable")
    path = kept(tmp_path, washed(**ALONE, steps=(replace(first, figures={"a": "[bold]proved:[/]"}), *rest)))
    assert "a=[bold]proved:[/]" in verify(path).stdout
