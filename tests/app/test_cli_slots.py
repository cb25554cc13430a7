"""`gpu-server slots`, against a service that runs in a thread."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gpu_server import cli
from gpu_server.cli_slots import SHOWN, _matter, chains_of, save, utc
from gpu_server.sealed.wash import WashRefused, hash_of, verify_certificate
from tests.app.api_world import KEY
from tests.app.served import Served, served_world
from tests.sealed.washes import GPU, MADE, OTHER_NODE, chain, washed

REASON = "[Errno 5] it [bold]smokes[/x]"
"""Taken for markup it could not be shown."""


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running service with two slots, of which one is in quarantine."""
    with served_world(tmp_path_factory.mktemp("service")) as served:
        served.quarantine("1", REASON)
        yield served


def run(served: Served, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["slots", *arguments, "--url", served.url, "--api-key", KEY])


def test_a_list(served: Served) -> None:
    """Each slot is a line, or with --json an object: its state, its newest wash, what is wrong with it."""
    result = run(served, "list")
    assert result.exit_code == 0, result.output
    head, first, second = result.stdout.splitlines()
    assert head.split()[:5] == ["slot", "uuid", "name", "tiers", "state"]
    assert first.split()[:5] == ["0", "CPU-0000", "CPU", "high,low", "free"]
    slots = [json.loads(line) for line in run(served, "list", "--json").stdout.splitlines()]
    assert [slot["id"] for slot in slots] == ["0", "1"]
    assert slots[0]["certificate"][:SHOWN] in first
    assert second.split()[4] == "quarantined"
    assert second.rstrip().endswith(REASON)


@pytest.mark.parametrize(
    ("slot", "words"),
    [
        ({}, ""),
        ({"fault": "it smokes", "doubt": "no answer"}, "it smokes"),
        ({"doubt": "no answer"}, "no answer"),
        ({"kept_for": "acme"}, "kept for acme, who had it last"),
        ({"wash": {"steps": ["scrub", "enclave"], "reason": None}}, "being washed: scrub, enclave"),
        ({"wash": {"steps": ["disk"], "reason": "disk: full"}}, "being washed: disk; disk: full"),
    ],
)
def test_what_is_the_matter(slot: dict[str, object], words: str) -> None:
    """A wash that is under way is told with its steps, and why one of them is tried again."""
    assert _matter({"fault": None, "doubt": None, "kept_for": None, "wash": None, **slot}) == words


def test_certificates(served: Served, tmp_path: Path) -> None:
    """A slot's certificates are listed, and written as files that `wash verify` reads in their order."""
    listed = run(served, "certificates", "0", "--limit", "5", "--out", str(tmp_path / "out"))
    assert listed.exit_code == 0, listed.output
    lines = listed.stdout.splitlines()
    assert lines[0].split() == ["made", "wash", "fence", "h"]
    (file,) = (tmp_path / "out").iterdir()
    assert lines[-1] == str(file)
    certificate = verify_certificate(file.read_bytes(), node_key=None)
    shown = ["full", str(certificate.record.fence), certificate.record_hash.hex()]
    assert lines[1].split()[-3:] == shown
    verified = CliRunner().invoke(cli.app, ["wash", "verify", str(file)])
    assert (verified.exit_code, "tail not checked" in verified.stdout) == (0, True)


def test_chains_of_a_slot() -> None:
    """Another chain begins where the device or the node's key is another, or none is named before it; within
    one none may be missing."""
    first = chain(3)
    second = chain(2, slot_uuid=GPU[:-1] + "1")
    third = [washed(OTHER_NODE, slot_uuid=GPU[:-1] + "1", prev=hash_of(second[-1]))]
    found = chains_of([*first, *first, *second, *third])
    assert [[one.raw for one in chain.certificates] for chain in found] == [first, first, second, third]
    with pytest.raises(WashRefused) as caught:
        chains_of([first[0], first[2], *second])
    assert caught.value.reason == "order"


def test_certificates_of_two_chains(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot whose device was replaced still has its certificates listed and saved; where the next chain
    begins is said."""
    raws = [*chain(2), *chain(2, slot_uuid=GPU[:-1] + "1")]
    answer = {"certificates": [{"certificate": b64encode(raw).decode()} for raw in raws]}
    monkeypatch.setattr("gpu_server.cli_slots.converse", lambda *_: answer)
    result = run(served, "certificates", "0", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").iterdir())) == len(raws)
    h = verify_certificate(raws[2], node_key=None, allow_simulated=True).record_hash.hex()
    assert result.stderr.startswith(f"another chain begins with {h}")


def test_a_slot_that_is_not_there(served: Served) -> None:
    """An unknown slot is a refusal in one line."""
    for command in ("certificates", "wash"):
        result = run(served, command, "7")
        assert (result.exit_code, result.stderr[:14]) == (1, "slot_not_found")


def test_a_wash(served: Served) -> None:
    """A quarantined slot is washed by order; another one is not."""
    assert run(served, "wash", "0").stderr.startswith("slot_not_quarantined")
    result = run(served, "wash", "1")
    assert (result.exit_code, result.stdout) == (0, "slot 1: washing\n")


def test_names_of_files(tmp_path: Path) -> None:
    """Files of one slot are in the order of its washes, also of those that were done again under one fence,
    and no slot's name leads out of the folder."""
    some = [
        verify_certificate(
            washed(slot_id="../x", fence=fence, made_ms=MADE + later), node_key=None, allow_simulated=True
        )
        for fence, later in ((9, 0), *((10, later) for later in range(6)))
    ]
    paths = save(some, tmp_path)
    assert paths == sorted(tmp_path.iterdir())
    assert [path.read_bytes() for path in paths] == [one.raw for one in some]


def test_times() -> None:
    """Milliseconds since 1970 are told to the second, up to the last that a record may have."""
    assert utc(0) == "1970-01-01 00:00:00 UTC"
    assert utc(253_402_300_799_999) == "9999-12-31 23:59:59 UTC"
