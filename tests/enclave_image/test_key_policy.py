"""The KMS key's policy, as it is filled from measurements."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "enclave_image/key_policy.py"
NODE = "arn:aws:iam::123456789012:role/gpu-node"
NAMES = {
    "tenant": "acme",
    "tenant-arn": "arn:aws:iam::210987654321:role/acme-client",
    "node-role-arn": NODE,
    "admin-arn": "arn:aws:iam::210987654321:root",
}


def measured(first: int = 1, **more: str) -> dict[str, Any]:
    pcrs = {f"PCR{index}": f"{first + index:02x}" * 48 for index in (0, 1, 2)}
    return {"Measurements": {"HashAlgorithm": "Sha384 { ... }", **pcrs, **more}}


def fill(tmp_path: Path, *documents: object, **names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM)]
    for number, document in enumerate(documents):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document))
        command += ["--measurements", str(path)]
    for name, value in {**NAMES, **names}.items():
        command += [f"--{name}", value]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def filled(tmp_path: Path, *documents: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The statements, by their names."""
    done = fill(tmp_path, *documents)
    assert done.returncode == 0, done.stderr
    assert "@" not in done.stdout
    return {statement["Sid"]: statement for statement in json.loads(done.stdout)["Statement"]}


def test_decrypting_needs_every_register(tmp_path: Path) -> None:
    """The node's role decrypts only for an enclave with all of PCR0, PCR1 and PCR2, and for its tenant."""
    statement = filled(tmp_path, measured())["EnclaveOpensDataKeys"]
    assert statement["Principal"] == {"AWS": NODE}
    assert statement["Action"] == "kms:Decrypt"
    assert statement["Condition"] == {
        "StringEqualsIgnoreCase": {
            f"kms:RecipientAttestation:PCR{index}": [f"{index + 1:02x}" * 48] for index in (0, 1, 2)
        },
        "StringEquals": {"kms:EncryptionContext:tenant": "acme"},
    }


def test_one_register_that_differs_is_enough_to_deny(tmp_path: Path) -> None:
    """Conditions of one statement are ANDed, so each register has a Deny of its own."""
    statements = filled(tmp_path, measured())
    for index in (0, 1, 2):
        statement = statements[f"NodesDecryptNowhereElsePCR{index}"]
        assert statement["Effect"] == "Deny"
        assert statement["Condition"] == {
            "StringNotEqualsIgnoreCase": {f"kms:RecipientAttestation:PCR{index}": [f"{index + 1:02x}" * 48]}
        }
    assert "NodesDecryptNowhereElse" not in statements


def test_ways_around_are_denied_by_name(tmp_path: Path) -> None:
    """ReEncrypt and CreateGrant know no attestation; the node's role gets Decrypt and nothing else."""
    statements = filled(tmp_path, measured())
    assert statements["NoWayAroundTheAttestation"]["Action"] == ["kms:ReEncrypt*", "kms:CreateGrant"]
    assert statements["NoWayAroundTheAttestation"]["Effect"] == "Deny"
    assert statements["NodesDoNothingElse"]["NotAction"] == "kms:Decrypt"
    assert statements["NodesDoNothingElse"]["Principal"] == {"AWS": NODE}


def test_who_may_do_what(tmp_path: Path) -> None:
    """Only the node's role is ever allowed to decrypt, and no Deny keeps the administrator from changing the
    policy: KMS refuses a policy that locks its maker out."""
    statements = filled(tmp_path, measured(PCR8="ee" * 48)).values()
    allowed = [(s["Principal"]["AWS"], s["Action"]) for s in statements if s["Effect"] == "Allow"]
    assert [who for who, what in allowed if "kms:Decrypt" in what] == [NODE]
    assert [who for who, what in allowed if "kms:PutKeyPolicy" in what] == [NAMES["admin-arn"]]
    everyone = [s for s in statements if s["Effect"] == "Deny" and s["Principal"]["AWS"] != NODE]
    assert [s["Action"] for s in everyone] == [["kms:ReEncrypt*", "kms:CreateGrant"]]


def test_two_images_for_a_rollout(tmp_path: Path) -> None:
    """The old and the new image are both accepted, each register of either."""
    statements = filled(tmp_path, measured(1), measured(16))
    key = "kms:RecipientAttestation:PCR0"
    both = ["01" * 48, "10" * 48]
    assert statements["EnclaveOpensDataKeys"]["Condition"]["StringEqualsIgnoreCase"][key] == both
    assert statements["NodesDecryptNowhereElsePCR0"]["Condition"]["StringNotEqualsIgnoreCase"][key] == both


def test_a_signed_image_pins_its_certificate(tmp_path: Path) -> None:
    """PCR8, where there is one, is a condition like the others."""
    statements = filled(tmp_path, measured(PCR8="EE" * 48))
    conditions = statements["EnclaveOpensDataKeys"]["Condition"]["StringEqualsIgnoreCase"]
    assert conditions["kms:RecipientAttestation:PCR8"] == ["ee" * 48]
    assert "NodesDecryptNowhereElsePCR8" in statements


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"Measurements": {"PCR0": "00"}},
        {"Measurements": {**measured()["Measurements"], "PCR0": "00" * 48}},
        {"Measurements": {**measured()["Measurements"], "PCR1": "*" * 96}},
        {"Measurements": {"PCR0": "11" * 48, "PCR1": "22" * 48}},
        {"PCR0": "11" * 48, "PCR1": "22" * 48},
        {"Measurements": "11" * 48},
        ["PCR0"],
    ],
    ids=["nothing", "short", "debug", "a pattern", "one missing", "flat, one missing", "text", "an array"],
)
def test_what_is_no_measurement(tmp_path: Path, document: object) -> None:
    """No policy is made that would let in a debug enclave, or any."""
    done = fill(tmp_path, document)
    assert (done.returncode, done.stdout) == (1, "")
    assert "PCR" in done.stderr


def test_the_form_of_a_simulation(tmp_path: Path) -> None:
    """What `python -m enclave --measurements` prints has no `Measurements` around it, and gives the same
    policy as if it had; with PCR8 in it too."""
    for more in ({}, {"PCR8": "ee" * 48}):
        flat = {name: value for name, value in measured(**more)["Measurements"].items() if "PCR" in name}
        assert filled(tmp_path, flat) == filled(tmp_path, measured(**more))
    printed = subprocess.run(
        [sys.executable, "-m", "enclave", "--measurements"],
        env={"PYTHONPATH": f"{ROOT / 'enclave_image'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    simulated = json.loads(printed.stdout)
    conditions = filled(tmp_path, simulated)["EnclaveOpensDataKeys"]["Condition"]["StringEqualsIgnoreCase"]
    assert conditions["kms:RecipientAttestation:PCR0"] == [simulated["PCR0"]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant", "two words"),
        ("tenant", "*"),
        ("tenant-arn", "acme-client"),
        ("tenant-arn", "*"),
        ("tenant-arn", "arn:aws:iam::210987654321:role/*"),
        ("tenant-arn", "arn:aws:iam::2109:role/acme-client"),
        ("tenant-arn", "arn:aws:sts::210987654321:assumed-role/acme-client/session"),
        ("node-role-arn", "arn:aws:iam::123456789012:root"),
        ("node-role-arn", "arn:aws:iam::123456789012:instance-profile/gpu-node"),
        ("admin-arn", "arn:aws:kms:eu-central-1:210987654321:key/0a1b2c3d"),
        ("admin-arn", "arn:aws:iam::210987654321:root\n"),
    ],
)
def test_what_names_nobody(tmp_path: Path, name: str, value: str) -> None:
    """No policy is made with a text that is no principal, or with a pattern; the message says which."""
    done = fill(tmp_path, measured(), **{name: value})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"key_policy: --{name} is ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant-arn", "arn:aws:iam::210987654321:user/people/ann@example.com"),
        ("node-role-arn", "arn:aws-us-gov:iam::123456789012:role/nodes/gpu-node_1"),
        ("admin-arn", "arn:aws-cn:iam::210987654321:role/key-admin"),
    ],
)
def test_who_may_be_named(tmp_path: Path, name: str, value: str) -> None:
    """Roles and users, with a path or without, of every partition that has KMS with enclaves."""
    done = fill(tmp_path, measured(), **{name: value})
    assert done.returncode == 0, done.stderr
    assert value in done.stdout


def test_signed_and_unsigned_images_do_not_mix(tmp_path: Path) -> None:
    """A Deny on PCR8 would shut out the unsigned one without a word."""
    for pair in ((measured(1), measured(2, PCR8="ee" * 48)), (measured(2, PCR8="ee" * 48), measured(1))):
        assert "signed" in fill(tmp_path, *pair).stderr


def test_nothing_but_the_placeholders_is_changed() -> None:
    """The template is JSON, and is not changed by being filled."""
    spec = importlib.util.spec_from_file_location("key_policy", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    template = json.loads(module.TEMPLATE.read_text())
    before = json.dumps(template)
    names = dict.fromkeys(("TENANT", "TENANT_ARN", "NODE_ROLE_ARN", "ADMIN_ARN"), "x")
    module.policy(template, {"PCR0": ["1"]}, names)
    assert json.dumps(template) == before
