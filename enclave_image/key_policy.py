"""Fills the template of a KMS key's policy with the measurements of one or more enclave images.

    key_policy.py --measurements measurements.json [--measurements older.json] --tenant NAME
                  --tenant-arn ARN --node-role-arn ARN --admin-arn ARN >policy.json

A statement that holds "@EACH_MEASUREMENT@" becomes one statement for each register: conditions within one are
ANDed, and a Deny must fire when any of them differs. Of several images all are accepted: for a rollout.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("kms-key-policy.json.in")
REGISTERS = ("PCR0", "PCR1", "PCR2", "PCR8")
PINNED = REGISTERS[:3]
"""Those that every image has; PCR8 is that of its signing certificate."""
CONDITION = "kms:RecipientAttestation:{}"
NAME = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
"""A tenant, as in docs/sealed.md."""
IAM = r"arn:aws(?:-cn|-us-gov)?:iam::[0-9]{12}:"
PATH = r"(?:[\w+=,.@-]+/)*[\w+=,.@-]+"
ROLE = re.compile(f"{IAM}role/{PATH}", re.ASCII)
PRINCIPAL = re.compile(f"{IAM}(?:root|(?:role|user)/{PATH})", re.ASCII)
"""Who can be named in a key's policy for good: no pattern, and no session of a role."""
FORMS = {
    "TENANT": (NAME, "a tenant's name, of A-Z a-z 0-9 . _ : / -"),
    "TENANT_ARN": (PRINCIPAL, "an ARN such as arn:aws:iam::ACCOUNT:role/NAME (or user/NAME, or root)"),
    "NODE_ROLE_ARN": (ROLE, "the ARN of a role, arn:aws:iam::ACCOUNT:role/NAME"),
    "ADMIN_ARN": (PRINCIPAL, "an ARN such as arn:aws:iam::ACCOUNT:role/NAME (or user/NAME, or root)"),
}


class BadMeasurements(Exception):
    """What was given does not name an image."""


class BadName(Exception):
    """What was given does not name a tenant, or somebody in IAM."""


def check_names(names: dict[str, str]) -> None:
    """Raises `BadName`: KMS would say no more than that the policy is malformed, or take a pattern."""
    for name, (form, what) in FORMS.items():
        if not form.fullmatch(names[name]):
            raise BadName(f"--{name.lower().replace('_', '-')} is {what}, not {names[name]!r}")


def measurements(documents: list[Any]) -> dict[str, list[str]]:
    """Register -> values, of what `nitro-cli build-enclave` printed, or, without `Measurements` around them,
    `python -m enclave --measurements`. Raises `BadMeasurements`."""
    found: dict[str, list[str]] = {}
    images = [
        document.get("Measurements", document) if isinstance(document, dict) else {} for document in documents
    ]
    for of_one in (image if isinstance(image, dict) else {} for image in images):
        for register in REGISTERS:
            value = of_one.get(register)
            if value is None and register not in PINNED:
                continue
            if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{96}", value) or not int(value, 16):
                raise BadMeasurements(f"{register} is not the measurement of an image")
            found.setdefault(register, [])
            if value.lower() not in found[register]:
                found[register].append(value.lower())
    signed = ["PCR8" in image for image in images]
    if any(signed) and not all(signed):
        raise BadMeasurements("of several images either all are signed or none")
    return found


def policy(template: dict[str, Any], values: dict[str, list[str]], names: dict[str, str]) -> dict[str, Any]:
    """The filled template. `names`: placeholder without its `@` -> text."""
    filled = copy.deepcopy(template)
    statements = []
    for statement in filled["Statement"]:
        conditions = {CONDITION.format(register): among for register, among in values.items()}
        if "@EACH_MEASUREMENT@" not in statement.get("Condition", {}).values():
            statements.append(_filled(statement, conditions, names))
            continue
        for register in values:
            one = {**statement, "Sid": f"{statement['Sid']}{register}"}
            key = CONDITION.format(register)
            one["Condition"] = {
                operator: {key: values[register]} if value == "@EACH_MEASUREMENT@" else value
                for operator, value in statement["Condition"].items()
            }
            statements.append(_filled(one, conditions, names))
    filled["Statement"] = statements
    return filled


def _filled(value: Any, conditions: dict[str, list[str]], names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, conditions, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, conditions, names) for item in value]
    if value == "@MEASUREMENTS@":
        return conditions
    if isinstance(value, str) and (placeholder := re.fullmatch("@([A-Z_]+)@", value)):
        return names[placeholder[1]]
    return value


def main() -> int:
    """Print the policy."""
    parser = argparse.ArgumentParser(description="Fills the policy of a KMS key for sealed requests.")
    parser.add_argument("--measurements", action="append", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tenant", required=True, help="as in the encryption context")
    parser.add_argument("--tenant-arn", required=True, help="who makes data keys: the tenant's client")
    parser.add_argument("--node-role-arn", required=True, help="the role of the GPU nodes' instance profile")
    parser.add_argument("--admin-arn", required=True, help="who administers the key")
    options = parser.parse_args()
    names = {
        name: getattr(options, name.lower())
        for name in ("TENANT", "TENANT_ARN", "NODE_ROLE_ARN", "ADMIN_ARN")
    }
    try:
        check_names(names)
        values = measurements([json.loads(path.read_text()) for path in options.measurements])
    except (BadMeasurements, BadName, OSError, ValueError) as error:
        print(f"key_policy: {error}", file=sys.stderr)
        return 1
    print(json.dumps(policy(json.loads(TEMPLATE.read_text()), values, names), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
