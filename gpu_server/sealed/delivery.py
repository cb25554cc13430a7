"""The delivery: what the service hands to a worker with a sealed request. None of it is secret, or believed.

`u32be length || C([1, tenant, pool, KMS key's ARN, request id, epoch, wrapped key, grant])`, then the body as
the client sent it. The worker adds what it knows itself, its session and its key, and rebuilds the binding; a
changed value gives another psk, and nothing opens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_server.sealed.canonical import Value, decode, encode
from gpu_server.sealed.chunks import frame
from gpu_server.sealed.errors import Malformed
from gpu_server.sealed.grant import EPOCH_BYTES, GRANT_BYTES, MAX_WRAPPED_KEY, Binding
from gpu_server.sealed.names import check_name, region_of

MEDIA_TYPE = "application/vnd.gpu-server.sealed"

MAX_HEAD_BYTES = 8192
"""Of what stands before the body, its length included."""

_LENGTH = 4
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A sealed request on its way to its worker. Checks its names and sizes: raises `Malformed`."""

    tenant: str
    pool: str
    kms_key_arn: str
    request_id: str
    epoch: bytes
    wrapped_key: bytes = field(repr=False)
    grant: bytes = field(repr=False)
    body: bytes | memoryview = field(repr=False)
    """The request as the client sent it; of what was unpacked a view, because it may be large."""

    def __post_init__(self) -> None:
        check_name(self.tenant, "the tenant")
        check_name(self.pool, "the pool")
        check_name(self.request_id, "the request's id")
        region_of(self.kms_key_arn)
        if (
            len(self.epoch) != EPOCH_BYTES
            or not 1 <= len(self.wrapped_key) <= MAX_WRAPPED_KEY
            or len(self.grant) != GRANT_BYTES
        ):
            raise Malformed("an epoch, a wrapped key or a grant of a length that none has")

    def binding(self, session_id: str, worker_key: bytes) -> Binding:
        """The binding of this request in the worker's own session, with the worker's own public key."""
        return Binding(
            tenant=self.tenant,
            pool=self.pool,
            kms_key_arn=self.kms_key_arn,
            session_id=session_id,
            epoch=self.epoch,
            worker_key=worker_key,
            wrapped_key=self.wrapped_key,
        )


def pack(
    *,
    tenant: str,
    pool: str,
    kms_key_arn: str,
    request_id: str,
    epoch: bytes,
    wrapped_key: bytes,
    grant: bytes,
    body: bytes,
) -> bytes:
    """A delivery's bytes. Raises `Malformed` for values that none has; the body is not looked at."""
    Delivery(
        tenant=tenant,
        pool=pool,
        kms_key_arn=kms_key_arn,
        request_id=request_id,
        epoch=epoch,
        wrapped_key=wrapped_key,
        grant=grant,
        body=b"",
    )
    head: list[Value] = [_FORMAT, tenant, pool, kms_key_arn, request_id, epoch, wrapped_key, grant]
    return frame(encode(head)) + body


def unpack(data: bytes) -> Delivery:
    """What `pack` was given. Raises `Malformed`."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
    if end > MAX_HEAD_BYTES or end > len(data):
        raise Malformed("not a delivery of a sealed request")
    match decode(bytes(data[_LENGTH:end]), max_bytes=MAX_HEAD_BYTES):
        case [
            1,
            str() as tenant,
            str() as pool,
            str() as kms_key_arn,
            str() as request_id,
            bytes() as epoch,
            bytes() as wrapped_key,
            bytes() as grant,
        ]:
            return Delivery(
                tenant=tenant,
                pool=pool,
                kms_key_arn=kms_key_arn,
                request_id=request_id,
                epoch=epoch,
                wrapped_key=wrapped_key,
                grant=grant,
                body=memoryview(data)[end:],
            )
    raise Malformed("not a delivery of a sealed request")
