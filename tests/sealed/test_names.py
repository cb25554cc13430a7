"""Names and ARNs: matched in full, and the region comes from nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.names import check_name, region_of
from tests.sealed.exchange import ARN

KEY = "0b4a3c1e-7d7c-4a6f-9a1e-2f5d1c3b4a59"


@pytest.mark.parametrize("name", ["a", "acme", "A.b_c:d/e-9", "x" * 128])
def test_names(name: str) -> None:
    """A name comes back as it is."""
    assert check_name(name, "the tenant") == name


@pytest.mark.parametrize(
    "name", ["", "x" * 129, "a b", "a\n", "\na", "a\x00", "ä", "٣", "a,b", "a@b", "{}", b"acme", None, 7]
)
def test_no_names(name: Any) -> None:
    """Anything else is refused, and the message says what was wrong but does not quote it."""
    with pytest.raises(Malformed, match=r"^the tenant has 1 to 128 characters"):
        check_name(name, "the tenant")


@pytest.mark.parametrize(
    ("arn", "region"),
    [
        (ARN, "eu-central-1"),
        (f"arn:aws-us-gov:kms:us-gov-west-1:123456789012:key/{KEY}", "us-gov-west-1"),
        (f"arn:aws-cn:kms:cn-northwest-1:123456789012:key/{KEY}", "cn-northwest-1"),
        (
            "arn:aws:kms:ap-southeast-2:123456789012:key/mrk-0123456789abcdef0123456789abcdef",
            "ap-southeast-2",
        ),
    ],
)
def test_regions(arn: str, region: str) -> None:
    """The region is the ARN's."""
    assert region_of(arn) == region


@pytest.mark.parametrize(
    "arn",
    [
        "",
        KEY,
        "alias/chat",
        f"arn:aws:kms:eu-central-1:123456789012:alias/{KEY}",
        f"arn:aws:kms:eu-central-1:12345678901:key/{KEY}",
        f"arn:aws:kms:eu-central-1:\uff1123456789012:key/{KEY}",
        f"arn:aws:kms::123456789012:key/{KEY}",
        f"arn:aws:kms:evil.example/:123456789012:key/{KEY}",
        f"arn:aws:kms:eu-central-1.evil.example:123456789012:key/{KEY}",
        f"arn:aws-iso:kms:us-iso-east-1:123456789012:key/{KEY}",
        f"arn:aws:s3:eu-central-1:123456789012:key/{KEY}",
        "arn:aws:kms:eu-central-1:123456789012:key/",
        f"{ARN}\n",
        f" {ARN}",
        f"{ARN}/x",
        ARN.replace(KEY, "k" * 100),
    ],
)
def test_no_arns(arn: str) -> None:
    """What is not the ARN of a key, from its first to its last character, is refused."""
    with pytest.raises(Malformed):
        region_of(arn)
