"""Names on the sealed path: tenants, pools, sessions, requests, and the ARN of a KMS key."""

from __future__ import annotations

import re
from typing import Final

from gpu_server.sealed.errors import Malformed

MAX_NAME: Final = 128

NAME: Final = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
"""Every header value and id. Matched in full: a `$` would let a line end through."""

KMS_ARN: Final = re.compile(
    r"arn:aws(?:-cn|-us-gov)?:kms:(?P<region>[a-z]{2,4}(?:-[a-z]{2,16}){1,3}-[0-9]{1,2})"
    r":[0-9]{12}:key/[A-Za-z0-9-]{1,64}"
)
"""A KMS key's ARN, never an alias. The region becomes part of a host's name, so it is matched closely."""


def check_name(text: str, what: str) -> str:
    """`text`, if it is a name: 1 to 128 characters of `A-Za-z0-9._:/-`. Else `Malformed`, saying `what`."""
    if not isinstance(text, str) or not NAME.fullmatch(text):
        raise Malformed(f"{what} has 1 to {MAX_NAME} characters of A-Z a-z 0-9 . _ : / -")
    return text


def region_of(kms_key_arn: str) -> str:
    """The region that a KMS key's ARN names. Raises `Malformed` for what is not such an ARN, in full."""
    match = KMS_ARN.fullmatch(check_name(kms_key_arn, "the ARN of the KMS key"))
    if match is None:
        raise Malformed("the ARN of the KMS key is arn:aws:kms:REGION:ACCOUNT:key/ID")
    return match["region"]
